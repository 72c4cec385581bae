"""A regular expression over the tokens of a vocabulary, as arrays that a program looks up.

    words = vocabulary_of(lm.tokenizer, lm.config.vocabulary_size)
    automaton = from_regex(r"Answer : \\d+", words)
    automaton.allowed(state, left)          (V,) bool, tokens that may follow

| name | what it is |
|---|---|
| `Vocabulary`, `vocabulary_of` | the bytes that every token adds to a text |
| `TokenAutomaton` | next states `(S, V)`, accepting states, tokens to go |
| `from_regex` | the texts that match a pattern (`regex.py`) |
| `both` | the texts that two automata accept |

Tokens are walked through the pattern byte by byte, so one that holds half a character is as good
as any.  A token that no matching text goes on from is forbidden at once: states without a way, in
whole tokens, to an accepting one are gone.  End tokens are allowed exactly in accepting states and
stay there.  Special tokens and unknown words are never allowed.

Source: Willard & Louf 2023, "Efficient Guided Generation for LLMs" (arXiv 2307.09702).
Read next: `constraints.py`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from smcscale.models.reasoning.regex import NEVER, byte_automaton, distance, without
from smcscale.models.reasoning.tokenizer import Tokenizer

#: bytes of the table of next states that are not refused: 880 states of 152 064 tokens
LIMIT = 2**29
#: tokenizers of another kind are measured pair by pair, up to so many tokens
MEASURED = 1024


class Vocabulary(NamedTuple):
    """What every token adds to a text.

    Attributes:
        pieces: `(K, V)`, the bytes that a token adds in each of K contexts, context 0 being the
            beginning of a text.  None for a token that is never allowed; one that adds nothing is
            allowed where it changes the context (a space that decoding strips).
        after: `(V,)` int32, the context after each token.
        end_tokens: tokens that end a text.
    """

    pieces: Sequence[Sequence[bytes | None]]
    after: np.ndarray
    end_tokens: tuple[int, ...]


class TokenAutomaton(eqx.Module):
    """The texts that a constraint accepts, token by token; the start is state 0.

    A pytree of arrays: give it to `SMC.run` as an argument, and others of one shape share a
    compiled program.

    Attributes:
        next_state: `(S, V)`, -1 where a token is forbidden.
        accepting: `(S,)`, whether the text so far may end.
        distance: `(S,)`, the fewest tokens to an accepting state.
        end_tokens: tokens that end a text (static).
    """

    next_state: Int32[Array, "S V"]
    accepting: Bool[Array, " S"]
    distance: Int32[Array, " S"]
    end_tokens: tuple[int, ...] = eqx.field(static=True)

    def allowed(self, state: Int32[Array, ""], left: Int32[Array, ""]) -> Bool[Array, " V"]:
        """Tokens after which an accepting state is at most `left` tokens away; none in state -1."""
        after = self.next_state[state]
        return (state >= 0) & (after >= 0) & (self.distance[after] <= left)

    def after(self, state: Int32[Array, ""], token: Int32[Array, ""]) -> Int32[Array, ""]:
        """The state `()` one token on; -1 for a forbidden token, and for ever after."""
        return jnp.where(state >= 0, self.next_state[state, token], -1)

    def read(
        self, state: Int32[Array, ""], tokens: Int32[Array, " S"], count: Int32[Array, ""]
    ) -> Int32[Array, ""]:
        """The state `()` after the first `count` of some tokens; -1 once one was forbidden."""

        def one(state, xs):
            place, token = xs
            return jnp.where(place < count, self.after(state, token), state), None

        return jax.lax.scan(one, jnp.asarray(state), (jnp.arange(tokens.shape[0]), tokens))[0]

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether a text of tokens is accepted, with or without an end token at its end."""
        table, state = np.asarray(self.next_state), 0
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            if state < 0 or (token in self.end_tokens and not last):
                return False
            state = int(table[state, token])
        return state >= 0 and bool(self.accepting[state])


def from_regex(pattern: str, vocabulary: Vocabulary, *, limit: int = LIMIT) -> TokenAutomaton:
    """The automaton of the texts that match a pattern.

    Args:
        pattern: what the whole text matches, see `regex.py`.
        vocabulary: see `vocabulary_of`.
        limit: bytes that the table of next states may have.
    Raises:
        NotImplementedError: a construct that is no regular language, or not read.
        ValueError: no text of whole tokens matches, or the table would exceed `limit`.
    """
    bytewise = byte_automaton(pattern)
    table = np.vstack([bytewise.next_state, np.full(256, -1, np.int32)])  # -1 finds the last row
    contexts = len(vocabulary.pieces)
    packed = [_pack(vocabulary, context) for context in range(contexts)]
    ends = list(vocabulary.end_tokens)

    def row(code: int) -> np.ndarray:
        place, context = divmod(code, contexts)
        letters, tokens, counts = packed[context]
        reached = np.full(len(vocabulary.after), -1, np.int64)
        state = np.full(len(tokens), place, np.int64)
        for index, longer in enumerate(counts):
            state[:longer] = table[state[:longer], letters[:longer, index]]
        reached[tokens] = np.where(state >= 0, state * contexts + vocabulary.after[tokens], -1)
        reached[ends] = code if bytewise.accepting[place] else -1
        return reached

    return _explored(
        row, lambda code: bool(bytewise.accepting[code // contexts]), ends, limit, repr(pattern)
    )


def both(first: TokenAutomaton, second: TokenAutomaton, *, limit: int = LIMIT) -> TokenAutomaton:
    """The automaton of the texts that two automata over one vocabulary accept (their product).

    Raises:
        ValueError: other vocabularies or end tokens; no text in common; a table beyond `limit`
            bytes.
    """
    if (first.next_state.shape[1], first.end_tokens) != (
        second.next_state.shape[1],
        second.end_tokens,
    ):
        raise ValueError(
            "smcscale: `first` and `second` are automata over other vocabularies: "
            f"{first.next_state.shape[1]} and {second.next_state.shape[1]} tokens, end tokens "
            f"{first.end_tokens} and {second.end_tokens}.\n"
            "  try: from_regex with one vocabulary for both."
        )
    one, other = (np.asarray(x.next_state, np.int64) for x in (first, second))
    ends = np.asarray(first.accepting), np.asarray(second.accepting)

    def row(code: int) -> np.ndarray:
        i, j = divmod(code, len(other))
        return np.where((one[i] < 0) | (other[j] < 0), -1, one[i] * len(other) + other[j])

    def accepting(code: int) -> bool:
        i, j = divmod(code, len(other))
        return bool(ends[0][i] and ends[1][j])

    return _explored(row, accepting, list(first.end_tokens), limit, "both constraints")


def _explored(
    row: Callable[[int], np.ndarray],
    accepting: Callable[[int], bool],
    end_tokens: list[int],
    limit: int,
    what: str,
) -> TokenAutomaton:
    """States found from code 0 on by `row(code) -> codes after each token`, the dead taken out."""
    number, rows, targets = {0: 0}, [], []
    order = [0]
    for code in order:  # grows while it is read
        codes, inverse = np.unique(row(code), return_inverse=True)
        for reached in codes[codes >= 0].tolist():
            if reached not in number:
                number[reached] = len(order)
                order.append(reached)
        numbers = np.array([number.get(reached, -1) for reached in codes.tolist()], np.int32)
        rows.append(numbers[inverse.reshape(-1)])
        targets.append(numbers[numbers >= 0])
        needed = len(order) * rows[0].nbytes
        if needed > limit:
            raise ValueError(
                f"smcscale: the table of {what} needs more than `limit` {limit} bytes: "
                f"{len(order)} states or more, {len(rows[0])} tokens.\n"
                "  try: a pattern with fewer states (smaller {m,n}), or a larger limit."
            )
    final = np.array([accepting(code) for code in order])
    steps = distance(targets, final)
    alive = steps < NEVER
    if not alive[0]:
        raise ValueError(f"smcscale: no text made of whole tokens matches {what}.")
    table = without(np.stack(rows), ~alive)
    return TokenAutomaton(
        jnp.asarray(table), jnp.asarray(final[alive]), jnp.asarray(steps[alive]), tuple(end_tokens)
    )


def _pack(vocabulary: Vocabulary, context: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Bytes `(n, longest)` of the tokens allowed in a context, longest first; how many go on at each."""
    pieces = {
        token: piece
        for token, piece in enumerate(vocabulary.pieces[context])
        if piece is not None
        and token not in vocabulary.end_tokens
        and (piece or vocabulary.after[token] != context)
    }
    chosen = sorted(pieces, key=lambda token: -len(pieces[token]))
    lengths = np.array([len(pieces[token]) for token in chosen], np.int64)
    longest = int(lengths.max(initial=0))
    joined = b"".join(pieces[token].ljust(longest, b"\0") for token in chosen)
    letters = np.frombuffer(joined, np.uint8).reshape(len(chosen), longest)
    counts = [int(np.sum(lengths > index)) for index in range(longest)]
    return letters, np.array(chosen, np.int64), counts


# ---- vocabularies


def vocabulary_of(tokenizer: Tokenizer, size: int | None = None) -> Vocabulary:
    """The bytes of every token of a tokenizer.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen) and those with byte fallback (Llama 2, Gemma)
    are read from the tokenizer's file.  Of others, up to `MEASURED` tokens, every pair is decoded,
    since what a token adds may depend on the one before it (a space between words, none between
    digits).

    Args:
        tokenizer: of the language model.
        size: the model's vocabulary, where it exceeds the tokenizer's.
    Raises:
        NotImplementedError: a tokenizer whose texts are not put together token by token.
    """
    content = json.loads(tokenizer._content)
    decoder = content.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    kinds = [part.get("type") for part in parts]
    size = size or tokenizer.vocabulary_size
    words: list[str | None] = [None] * size
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    for word, token in tokenizer._backend.get_vocab().items():
        if token < size and token not in special:
            words[token] = word
    if kinds == ["ByteLevel"]:
        rows = [[_byte_level(word) for word in words]]
        after = np.zeros(size, np.int32)
    elif "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        rows, after = _with_fallback(words, parts)
    else:
        rows, after = _measured(tokenizer, words, kinds)
    vocabulary = Vocabulary(rows, after, tokenizer.end_tokens)
    _check(vocabulary, tokenizer)
    return vocabulary


def _printable() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary (GPT-2): those that show, first."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_LETTERS = _printable()


def _byte_level(word: str | None) -> bytes | None:
    if word is None:
        return None
    known = all(letter in _LETTERS for letter in word)
    return bytes(_LETTERS[letter] for letter in word) if known else word.encode()


def _with_fallback(words: list[str | None], parts: list[dict]) -> tuple[list, np.ndarray]:
    def piece(word: str | None) -> bytes | None:
        if word is None:
            return None
        for part in parts:
            if part["type"] == "Replace":
                if "String" not in part["pattern"]:
                    raise NotImplementedError(_UNKNOWN.format("a Replace by a regular expression"))
                word = word.replace(part["pattern"]["String"], part["content"])
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return word.encode()

    plain = [piece(word) for word in words]
    strip = next((part for part in parts if part["type"] == "Strip"), None)
    if strip is None:
        return [plain], np.zeros(len(words), np.int32)
    if strip["start"] != 1 or strip["stop"] != 0:
        raise NotImplementedError(_UNKNOWN.format("a Strip of more than one character"))
    first = [None if p is None else p.removeprefix(strip["content"].encode()) for p in plain]
    return [first, plain], np.ones(len(words), np.int32)


def _measured(
    tokenizer: Tokenizer, words: list[str | None], kinds: list
) -> tuple[list, np.ndarray]:
    known = [token for token, word in enumerate(words) if word is not None]
    if len(known) > MEASURED:
        raise NotImplementedError(_UNKNOWN.format(f"decoder {kinds} and {len(known)} tokens"))
    alone = {token: tokenizer.decode([token]) for token in known}

    def row(context: int | None) -> tuple[bytes | None, ...]:
        pieces: list[bytes | None] = [None] * len(words)
        for token in known:
            before = "" if context is None else alone[context]
            text = alone[token] if context is None else tokenizer.decode([context, token])
            if not text.startswith(before):
                raise NotImplementedError(_UNKNOWN.format("a token that changes the one before"))
            pieces[token] = text[len(before) :].encode()
        return tuple(pieces)

    number = {row(None): 0}
    after = np.zeros(len(words), np.int32)
    for token in known:
        after[token] = number.setdefault(row(token), len(number))
    return list(number), after


_UNKNOWN = (
    "smcscale: the texts of this tokenizer are not put together token by token, as a constraint "
    "needs ({}).\n  try: a byte-level tokenizer, or one with byte fallback."
)


def _check(vocabulary: Vocabulary, tokenizer: Tokenizer, number: int = 200) -> None:
    """Decode random texts as a whole and by pieces."""
    usable = [t for t, piece in enumerate(vocabulary.pieces[-1]) if piece]
    rng = np.random.default_rng(0)
    for _ in range(number if usable else 0):
        context, pieces = 0, []
        tokens = rng.choice(usable, 8).tolist()
        for token in tokens:
            pieces.append(vocabulary.pieces[context][token] or b"")
            context = int(vocabulary.after[token])
        try:
            text = b"".join(pieces).decode()
        except UnicodeDecodeError:  # no text: decoders show such bytes as they please
            continue
        if text != tokenizer.decode(tokens):
            raise NotImplementedError(_UNKNOWN.format(f"{text!r} is {tokenizer.decode(tokens)!r}"))


def token_bytes(vocabulary: Vocabulary, tokens: Any) -> bytes:
    """The bytes of a text of tokens; end tokens and those never allowed add none."""
    context, found = 0, b""
    for token in tokens:
        if token not in vocabulary.end_tokens:
            found += vocabulary.pieces[context][token] or b""
            context = int(vocabulary.after[token])
    return found
