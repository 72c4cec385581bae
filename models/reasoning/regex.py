"""A regular expression as a deterministic automaton over UTF-8 bytes.

    automaton = byte_automaton(r"-?\\d+(\\.\\d+)?")
    automaton.accepts("-3.25")                       as `re.fullmatch` with `re.ASCII`

| read | refused by name |
|---|---|
| literals, `.` (no newline), `[a-z]`, `[^a-z]`, escapes, `\\d \\w \\s` and `\\D \\W \\S` (ASCII) | anchors `^ $ \\b`: the whole text must match anyway |
| alternation, groups of any kind that only group | back-references, look-around, conditional groups |
| `* + ? {m} {m,} {m,n}`; the lazy forms mean the same | possessive and atomic forms, inline flags |

The pattern is parsed by Python's own `re`, built up with silent edges (Thompson 1968), made
deterministic by sets of states (Rabin & Scott 1959), merged by refinement (Moore 1956) and freed
of states that lead nowhere.  Code points become byte ranges as in RE2.  Read next: `automaton.py`.
"""

import re
from collections.abc import Iterator
from re import _constants as ops  # pyright: ignore  the parser that `re` itself uses
from re import _parser as parser  # pyright: ignore
from typing import Any, NamedTuple

import numpy as np

#: more states than this, before or after determinisation, are refused
MOST_STATES = 20_000
#: distance of a state from which no accepting one can be reached
NEVER = np.iinfo(np.int32).max

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)  # no characters of their own: UTF-8 has none
_DIGIT = [(48, 57)]
_SPACE = [(9, 13), (32, 32)]
_WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
_REFUSED = {
    ops.AT: "an anchor (^, $, \\b); the whole text must match, so leave it out",
    ops.GROUPREF: "a back-reference",
    ops.GROUPREF_EXISTS: "a conditional group",
    ops.ASSERT: "look-around",
    ops.ASSERT_NOT: "look-around",
    ops.ATOMIC_GROUP: "an atomic group",
    ops.POSSESSIVE_REPEAT: "a possessive quantifier",
}
Ranges = list[tuple[int, int]]


class ByteAutomaton(NamedTuple):
    """A minimal deterministic automaton; state 0 is the start, every state can still accept.

    Attributes:
        next_state: `(S, 256)` int32, -1 where no text goes on so.
        accepting: `(S,)` bool.
    """

    next_state: np.ndarray
    accepting: np.ndarray

    def accepts(self, text: str | bytes) -> bool:
        """Whether the whole text matches."""
        state = 0
        for byte in text.encode() if isinstance(text, str) else text:
            state = int(self.next_state[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


class _Graph(NamedTuple):
    """An automaton while it grows: of each state its edges `(low, high, target)` and silent ones."""

    edges: list[list[tuple[int, int, int]]]
    silent: list[list[int]]

    def new(self) -> int:
        _refuse_size(len(self.edges))
        self.edges.append([])
        self.silent.append([])
        return len(self.edges) - 1


def byte_automaton(pattern: str) -> ByteAutomaton:
    """The minimal automaton of a pattern, which the whole text must match.

    Args:
        pattern: see the table of the module.
    Raises:
        NotImplementedError: what the table refuses, by name.
        ValueError: not a regular expression, one that nothing matches, or more than
            `MOST_STATES` states.
    """
    try:
        tree = parser.parse(pattern, re.ASCII)
    except re.error as error:
        raise ValueError(
            f"smcscale: `pattern` {pattern!r} is not a regular expression ({error})."
        ) from error
    if tree.state.flags != re.ASCII:
        raise NotImplementedError(_has(pattern, "inline flags"))
    graph = _Graph([], [])
    start = graph.new()
    end = _grow(graph, tree, start, pattern)
    table, accepting, widths = _deterministic(graph, start, end)
    table, accepting = _merged(table, accepting)
    alive = distance([np.unique(row[row >= 0]) for row in table], accepting) < NEVER
    if not alive[0]:
        raise ValueError(f"smcscale: no text matches the pattern {pattern!r}.")
    table, accepting = without(table, ~alive), accepting[alive]
    return ByteAutomaton(np.repeat(table, widths, axis=1), accepting)


def distance(targets: list[np.ndarray], accepting: np.ndarray) -> np.ndarray:
    """Fewest steps from each state to an accepting one `(S,)` int32; `NEVER` where no way leads.

    Args:
        targets: of each state the states one step on.
        accepting: `(S,)` bool.
    """
    sources: list[list[int]] = [[] for _ in targets]
    for state, reached in enumerate(targets):
        for target in reached.tolist():
            sources[target].append(state)
    steps = np.where(accepting, 0, NEVER).astype(np.int32)
    queue = np.flatnonzero(accepting).tolist()
    for state in queue:  # grows while it is read
        for source in sources[state]:
            if steps[source] == NEVER:
                steps[source] = steps[state] + 1
                queue.append(source)
    return steps


def without(table: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """A table of next states `(S, C)` without some states; edges to them become -1."""
    number = np.where(dropped, -1, np.cumsum(~dropped) - 1).astype(np.int32)
    number = np.append(number, np.int32(-1))  # which is what -1 finds
    return number[table[~dropped]]


def _has(pattern: str, what: str) -> str:
    return (
        f"smcscale: `pattern` {pattern!r} has {what}, which an automaton does not read.\n"
        "  try: literals, classes, groups, |, *, +, ?, {m,n}."
    )


def _refuse_size(states: int) -> None:
    if states >= MOST_STATES:
        raise ValueError(
            f"smcscale: `pattern` needs more than {MOST_STATES} states.\n"
            "  try: smaller counts in {m,n}, or no bound at all."
        )


# ---- pattern to graph


def _grow(graph: _Graph, tree: Any, start: int, pattern: str) -> int:
    """Add what `tree` matches to the graph, from `start`; the state at its end.

    Nothing ever leads back to `start` itself, so that alternatives may share it.
    """
    state = start
    for op, argument in tree:
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, inner = argument
            state = _repeat(graph, least, most, inner, state, pattern)
        elif op is ops.SUBPATTERN:
            _, added, removed, inner = argument
            if added or removed:
                raise NotImplementedError(_has(pattern, "inline flags"))
            state = _grow(graph, inner, state, pattern)
        elif op is ops.BRANCH:
            end = graph.new()
            for inner in argument[1]:
                graph.silent[_grow(graph, inner, state, pattern)].append(end)
            state = end
        elif op in _REFUSED:
            raise NotImplementedError(_has(pattern, _REFUSED[op]))
        else:
            state = _character(graph, _ranges(op, argument, pattern), state)
    return state


def _repeat(graph: _Graph, least: int, most: int, inner: Any, state: int, pattern: str) -> int:
    for _ in range(least):
        state = _grow(graph, inner, state, pattern)
    if most is ops.MAXREPEAT:
        loop = graph.new()
        graph.silent[state].append(loop)
        graph.silent[_grow(graph, inner, loop, pattern)].append(loop)
        state = loop
        most = least
    end = graph.new()
    for _ in range(most - least):
        graph.silent[state].append(end)
        state = _grow(graph, inner, state, pattern)
    graph.silent[state].append(end)
    return end


def _ranges(op: Any, argument: Any, pattern: str) -> Ranges:
    """The code points that one item of a pattern matches, in order."""
    if op is ops.LITERAL:
        return [(argument, argument)]
    if op is ops.RANGE:
        return [argument]
    if op is ops.ANY:
        return _others([(10, 10)])
    if op is ops.NOT_LITERAL:
        return _others([(argument, argument)])
    if op is ops.CATEGORY:
        name = str(argument)
        kind = next(k for w, k in _CATEGORIES.items() if name.endswith(w))
        return _others(kind) if "_NOT_" in name else kind
    if op is ops.IN:
        items = [item for item in argument if item[0] is not ops.NEGATE]
        found = [pair for kind, what in items for pair in _ranges(kind, what, pattern)]
        return _others(found) if len(items) < len(argument) else sorted(found)
    raise NotImplementedError(_has(pattern, str(op).lower()))


_CATEGORIES = {"_DIGIT": _DIGIT, "_SPACE": _SPACE, "_WORD": _WORD}


def _others(ranges: Ranges) -> Ranges:
    """All code points but these."""
    found, low = [], 0
    for first, last in sorted(ranges):
        if low < first:
            found.append((low, first - 1))
        low = max(low, last + 1)
    return [*found, (low, _LAST)] if low <= _LAST else found


def _character(graph: _Graph, ranges: Ranges, start: int) -> int:
    """One character out of `ranges`, as its bytes."""
    end = graph.new()
    for first, last in ranges:
        for low, high in ((first, min(last, _SURROGATES[0] - 1)), (max(first, 0xE000), last)):
            for path in _utf8(low, high):
                state = start
                for number, (a, b) in enumerate(path):
                    target = end if number == len(path) - 1 else graph.new()
                    graph.edges[state].append((a, b, target))
                    state = target
    return end


def _utf8(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences of byte ranges that are together the UTF-8 of the code points low to high.

    Source: Cox 2010, "Regular Expression Matching in the Wild", on UTF-8 in RE2.
    """
    if low > high:
        return
    cut = next((last for last in (0x7F, 0x7FF, 0xFFFF) if low <= last < high), None)
    for bits in (6, 12, 18) if high > 0x7F and cut is None else ():
        rest = (1 << bits) - 1  # the range must be whole in its last bytes, or agree before them
        if low & ~rest != high & ~rest:
            if low & rest:
                cut = low | rest
            elif high & rest != rest:
                cut = (high & ~rest) - 1
        if cut is not None:
            break
    if cut is None:
        yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))
    else:
        yield from _utf8(low, cut)
        yield from _utf8(cut + 1, high)


# ---- graph to table


def _deterministic(graph: _Graph, start: int, end: int) -> tuple[np.ndarray, np.ndarray, list]:
    """Next states `(S, C)` and accepting states `(S,)` over C ranges of bytes of given widths."""
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        if state not in closures:
            found, stack = {state}, [state]
            while stack:
                more = [s for s in graph.silent[stack.pop()] if s not in found]
                found.update(more)
                stack += more
            closures[state] = frozenset(found)
        return closures[state]

    # bytes between two cuts are never told apart
    edges = [edge for out in graph.edges for edge in out]
    cuts = sorted({0, 256}.union(*((low, high + 1) for low, high, _ in edges)))
    cell = {cut: index for index, cut in enumerate(cuts)}
    number = {closure(start): 0}
    order, rows = list(number), []
    for members in order:  # grows while it is read
        targets: list[set[int]] = [set() for _ in cuts[1:]]
        for state in members:
            for low, high, target in graph.edges[state]:
                for index in range(cell[low], cell[high + 1]):
                    targets[index] |= closure(target)
        row = []
        for reached in map(frozenset, targets):
            if reached and reached not in number:
                _refuse_size(len(order))
                number[reached] = len(order)
                order.append(reached)
            row.append(number.get(reached, -1))
        rows.append(row)
    accepting = np.array([end in members for members in order])
    return np.array(rows, np.int32).reshape(len(rows), -1), accepting, np.diff(cuts).tolist()


def _merged(table: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The automaton with equivalent states merged; the start stays state 0."""
    block, blocks = accepting.astype(np.int64), 0
    while len(np.unique(block)) > blocks:
        blocks = len(np.unique(block))
        after = np.append(block, -1)[table]  # -1 finds the last place: nothing goes on
        rows = np.column_stack([block, after])
        block = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    _, first = np.unique(block, return_index=True)
    number = np.argsort(np.argsort(first))  # blocks in the order of their first states
    chosen = np.sort(first)
    merged = np.append(number[block], -1)[table[chosen]].astype(np.int32)
    return merged, accepting[chosen]
