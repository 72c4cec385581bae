"""What a tree search works on: a function that makes children, a budget, and the tree it grows.

| name | what it is |
|---|---|
| `SearchProblem` | root, `expand`, `finished`; any state that is a pytree of arrays |
| `Budget` | what a search may spend; never exceeded |
| `Tree` | parents, actions and scores of all nodes |
| `Found` | what a search returns |
| `expanded`, `found` | how a search calls a problem, and reports |

Children are made in calls of a fixed batch, so nothing recompiles while a tree grows.  States stay
on the device, each apart, and are dropped with the node.  Read next: `search_texts.py` (language
models as such problems), `tree_search.py`.
"""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: logs of scores are taken of at least this
LOWEST = 1e-6

Expand = Callable[[Any, Any, int], tuple[Any, Any, dict[str, Any]]]


class SearchProblem(NamedTuple):
    """A tree given by its root and a function that draws children.

    Attributes:
        root: state of the root, a pytree of arrays.
        expand: `(key, states, count) -> children, scores, cost`: one child for each of the `batch`
            rows of `states` (a node that gets several children comes several times); only the
            first `count` rows are asked for, the others are padding.  `scores` `(batch,)` in
            [0, 1], `cost` amounts `(batch,)` by name.
        finished: `states -> (batch,)` bool, nodes without children.
        batch: rows of a call.
        most: the most that one row can cost, by the names of `cost`.
        text: text of a state, if it has one.
        identity: what two copies of one state share (hashable), if a search should tell.
    """

    root: Any
    expand: Expand
    finished: Callable[[Any], Any]
    batch: int
    most: dict[str, float]
    text: Callable[[Any], str] | None = None
    identity: Callable[[Any], Hashable] | None = None


class Budget(NamedTuple):
    """What a search may spend; it stops before a call that could exceed any of these.

    Attributes:
        tokens: written by the language model.
        prm_tokens: read by the reward model.
        expansions: children made.
    """

    tokens: float = np.inf
    prm_tokens: float = np.inf
    expansions: float = np.inf

    def rows(self, spent: dict[str, float], most: dict[str, float]) -> int:
        """How many more children can be paid for, whatever they turn out to cost."""
        worst = most | {"expansions": 1.0}
        rows = 2.0**31
        for name, limit in self._asdict().items():
            if worst.get(name, 0.0) > 0:
                rows = min(rows, (limit - spent.get(name, 0.0)) // worst[name])
        return max(int(rows), 0)

    def check(self) -> None:
        """Raises ValueError for a budget without end."""
        if not np.isfinite(self).any():
            raise ValueError(
                "smcscale: a search without a budget may never end.\n  try: Budget(tokens=5000)."
            )


@dataclass(frozen=True, eq=False)
class Tree:
    """A tree of scored nodes, numbered in the order in which they were asked for; 0 is the root.

    Attributes:
        parents: `(n,)` int32; -1 for the root.
        actions: `(n,)` int32, what made the node; -1 for the root.
        scores: `(n,)` float64 in [0, 1]; NaN for the root and while a score is awaited.
    """

    parents: np.ndarray
    actions: np.ndarray
    scores: np.ndarray

    @classmethod
    def start(cls) -> "Tree":
        """The root alone."""
        root = np.full(1, -1, np.int32)
        return cls(root, root, np.full(1, np.nan))

    def grown(self, parent: int, action: int = 0, score: float = np.nan) -> "Tree":
        """This tree with one more node."""
        return Tree(
            np.append(self.parents, np.int32(parent)),
            np.append(self.actions, np.int32(action)),
            np.append(self.scores, score),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and all(
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    @property
    def size(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @property
    def visits(self) -> np.ndarray:
        """`(n,)` int, how many nodes lie below each."""
        below = np.zeros(self.size, int)
        for node in range(self.size - 1, 0, -1):
            below[self.parents[node]] += below[node] + 1
        return below

    @property
    def depths(self) -> np.ndarray:
        """`(n,)` int, steps from the root."""
        depths = np.zeros(self.size, int)
        for node in range(1, self.size):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def to_json(self) -> str:
        """The tree as text; `Tree.from_json` gives it back, bit by bit."""
        scores = [None if np.isnan(s) else float(s) for s in self.scores]
        return json.dumps(
            {"parents": self.parents.tolist(), "actions": self.actions.tolist(), "scores": scores}
        )

    @classmethod
    def from_json(cls, text: str) -> "Tree":
        """A tree that `to_json` wrote.

        Raises:
            ValueError: the text is not such a tree.
        """
        try:
            read = json.loads(text)
            parents = np.asarray(read["parents"], np.int32)
            actions = np.asarray(read["actions"], np.int32)
            scores = np.asarray([np.nan if s is None else s for s in read["scores"]], np.float64)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"smcscale: this text is no saved tree ({error}).") from error
        sizes = {parents.shape, actions.shape, scores.shape}
        ordered = (parents[1:] < np.arange(1, len(parents))).all() and (parents[1:] >= 0).all()
        if len(sizes) > 1 or not len(parents) or parents[0] != -1 or not ordered:
            raise ValueError("smcscale: this text is no saved tree (parents must come first).")
        return cls(parents, actions, scores)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        texts: of the solutions, as the search orders them; empty strings without `problem.text`.
        scores: `(m,)` last score of each, in [0, 1].
        states: of the solutions.
        nodes: `(m,)` int, where they are in the tree.
        cost: what was spent, by name ("tokens", "prm_tokens", "expansions").
        tree: everything that was tried.
    """

    texts: tuple[str, ...]
    scores: np.ndarray
    states: tuple[Any, ...]
    nodes: np.ndarray
    cost: dict[str, float]
    tree: Tree


def found(
    problem: SearchProblem, tree: Tree, nodes: Sequence[int], states: dict[int, Any], cost: dict
) -> Found:
    """The result of a search whose solutions are `nodes`."""
    chosen = tuple(states[node] for node in nodes)
    texts = tuple("" if problem.text is None else problem.text(state) for state in chosen)
    where = np.asarray(nodes, int)
    return Found(texts, tree.scores[where], chosen, where, dict(cost), tree)


def expanded(
    problem: SearchProblem, key: Any, parents: Sequence[Any], spent: dict[str, float]
) -> list[tuple[Any, float, bool]]:
    """Children of up to `batch` states: `(state, score, finished)` each; their cost is added."""
    count = len(parents)
    padded = [*parents, *[parents[0]] * (problem.batch - count)]
    children, scores, cost = problem.expand(key, _stacked(padded), count)
    scores, over = np.asarray(scores, np.float64), np.asarray(problem.finished(children))
    if not ((scores[:count] >= 0) & (scores[:count] <= 1)).all():
        raise ValueError(f"smcscale: scores must be in [0, 1], the problem gave {scores[:count]}.")
    for name, amounts in cost.items():
        spent[name] = spent.get(name, 0.0) + float(np.sum(np.asarray(amounts, float)[:count]))
    spent["expansions"] = spent.get("expansions", 0.0) + count
    rows = _rows(children)[:count]
    return [(row, float(s), bool(end)) for row, s, end in zip(rows, scores, over)]


@jax.jit
def _stacked(states: list) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def _rows(states: Any) -> list:
    return [row_of(states, i) for i in range(num_rows(states))]


def row_of(states: Any, row: int) -> Any:
    """One state of a batch."""
    return jax.tree.map(lambda leaf: leaf[row], states)


def num_rows(states: Any) -> int:
    """How many states a batch has."""
    return jax.tree.leaves(states)[0].shape[0]
