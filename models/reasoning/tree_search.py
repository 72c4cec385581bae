"""Searches over trees of texts, baselines for the particle filter: A* and AB-MCTS.

    found = a_star(key, writing(lm, prm, prompt), budget=Budget(tokens=4000))
    found = ab_mcts(key, answering(lm, prm, prompt), budget=Budget(tokens=4000))
    weighted_majority(answers, jnp.log(found.scores))

| search | nodes | next node |
|---|---|---|
| `a_star` | unfinished texts | the best `g + h` in a priority queue |
| `ab_mcts` | whole answers | a walk from the root by Thompson draws (`thompson.py`) |

`ab_mcts` is a loop around `ask` and `tell`, which serve any source of answers and scores:

    tree = Tree.start()
    tree, requests = ask(key, tree, rule, batch)      at which nodes to make a child, by which action
    tree = tell(tree, request, score)                 in any order, again if in doubt
    Tree.from_json(tree.to_json())                    to stop and go on

Searches have no target distribution and no evidence.  Same step function, scores and budget as
`reason`: see `search_texts.py`.

Sources: Chatziveroglou 2025, "A*-Decoding" (arXiv 2505.13672); Inoue et al. 2025, "Wider or Deeper?"
(arXiv 2503.04412).
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from smcscale.keys import as_key
from smcscale.models.reasoning.search_problem import (
    LOWEST,
    Budget,
    Found,
    SearchProblem,
    Tree,
    expanded,
    found,
)
from smcscale.models.reasoning.thompson import NEW, MixedModel, NodeAggregation, Scores, summary

Rule = NodeAggregation | MixedModel

# ---- A*


def weakest(path: float, score: float) -> float:
    """g after one more step: log of the lowest score so far; does not depend on length."""
    return min(path, float(np.log(max(score, LOWEST))))


def product(path: float, score: float) -> float:
    """g after one more step: log of the product of all scores; long texts are punished."""
    return path + float(np.log(max(score, LOWEST)))


def newest(score: float, state: Any) -> float:
    """h of an unfinished text: log of its newest score."""
    return float(np.log(max(score, LOWEST)))


def a_star(
    key: Any,
    problem: SearchProblem,
    *,
    budget: Budget,
    width: int = 4,
    path: Callable[[float, float], float] = weakest,
    heuristic: Callable[[float, Any], float] = newest,
    num_solutions: int = 1,
    max_steps: int | None = None,
) -> Found:
    """Best-first search by `f = g + h`: always lengthen the text that promises most.

    g is what the steps so far have earned, `g_t = path(g_(t-1), r_t)` with `g_0 = 0`; h is what is
    hoped of the rest, `heuristic(r_t, state)`, and 0 for a finished text.  A popped text gets
    `width` children; a popped finished text is a solution.  A child that says what an earlier one
    says (by `problem.identity`) is paid for, noted in the tree, and not queued: a sure model writes
    the same step again and again.  Ties go to the deeper node, then to the older one.

    The paper's g and h are not public; these are ours.  g is the lowest score so far: a solution is
    as good as its weakest step, and depths compare.  h is the newest score: a reward model trained
    on roll-outs (Math-Shepherd, the shipped one) estimates by it the chance that the rest comes out
    right.  It is not admissible: the true rest can only lower g, so its best is 0, and h < 0 makes
    the search greedy and quick instead of certain to pop the best first.  `heuristic=lambda *_: 0.0`
    is admissible (uniform cost); with an h that never underestimates, the first solution is the
    best one in the tree of children that were drawn.

    Args:
        key: random key.
        problem: `writing(...)`, or any `SearchProblem`.  `batch // width` nodes are popped at once
            (K-best-first search); `batch == width` is plain A*.
        budget: what may be spent; the last node may get fewer children.
        width: children of a node.
        path, heuristic: see above.
        num_solutions: finished texts to pop before the search ends.
        max_steps: deeper unfinished texts are given up.
    Returns:
        `Found`: solutions in the order popped; if the budget ended first, then the finished texts
        still in the queue, best first.  There may be none.
    Raises:
        ValueError: a budget without end, a width that does not fit the batch.
    """
    key = as_key(key)
    budget.check()
    if not 1 <= width <= problem.batch:
        raise ValueError(
            f"smcscale: width must be in [1, {problem.batch}], the batch of the problem; got {width}."
        )
    parents, scores, earned, depths = [-1], [np.nan], [0.0], [0]
    states, over = {0: problem.root}, {0: False}
    queue, solved, spent, calls = [(0.0, 0, 0)], [], {}, 0
    known: set[Any] = set()
    while queue and len(solved) < num_solutions:
        rows = min(problem.batch, budget.rows(spent, problem.most))
        if rows == 0:
            break
        popped: list[int] = []
        while queue and len(popped) < max(rows // width, 1) and len(solved) < num_solutions:
            if over[queue[0][-1]] and popped:
                break  # what those before it lead to may be better
            node = heapq.heappop(queue)[-1]
            if over[node]:
                solved.append(node)
            elif max_steps is None or depths[node] < max_steps:
                popped.append(node)
            else:
                del states[node]
        asked = [node for node in popped for _ in range(width)][:rows]
        if not asked:
            break
        children = expanded(
            problem, jax.random.fold_in(key, calls), [states[node] for node in asked], spent
        )
        calls += 1
        for node in popped:
            del states[node]
        for parent, (state, score, end) in zip(asked, children, strict=True):
            node = len(parents)
            parents.append(parent)
            scores.append(score)
            depths.append(depths[parent] + 1)
            earned.append(path(earned[parent], score))
            name = node if problem.identity is None else problem.identity(state)
            if name in known:
                continue
            known.add(name)
            states[node], over[node] = state, end
            promise = earned[node] + (0.0 if end else heuristic(score, state))
            heapq.heappush(queue, (-promise, -depths[node], node))
    if len(solved) < num_solutions:
        waiting = [node for *_, node in sorted(queue) if over[node]]
        solved += waiting[: num_solutions - len(solved)]
    actions = np.where(np.asarray(parents) < 0, -1, 0).astype(np.int32)
    tree = Tree(np.asarray(parents, np.int32), actions, np.asarray(scores))
    return found(problem, tree, solved, states, spent)


# ---- AB-MCTS

#: the children of a node are padded to this, or to the next power of two: few compilations
SMALLEST = 8


class Request(NamedTuple):
    """A child to be made: its number, the node to make it from, and by which action."""

    node: int
    parent: int
    action: int


def ask(
    key: Any, tree: Tree, rule: Rule, batch: int = 1, *, num_actions: int = 1
) -> tuple[Tree, list[Request]]:
    """Where to make the next children; they may all be worked on at once.

    Each request is one walk from the root: at every node the rule draws whether to make a new child
    here or to go to one of the children; a node without children gets one.  With `batch=1`, told
    before the next is asked, this is the paper's search.

    Walks of one batch are independent draws from the posterior of what was told so far; children
    still awaited take no part.  The published batches do the same and grow wide trees, because the
    first batch can only go to the root.  Here a batch starts slowly: no more requests than answers
    told so far, at least one.  That alone brought the width of the root back to that of one at a time
    under `MixedModel`; counting awaited children at an expected score was tried and did not help.

    Args:
        key: random key.
        tree: as `tell` left it.
        rule: `NodeAggregation(...)` or `MixedModel(...)`.
        batch: how many requests, at most.
        num_actions: how many ways there are to make a child.
    Returns:
        the tree with the requests in it, and the requests.
    """
    key = as_key(key)
    told = int(np.sum(~np.isnan(tree.scores)))
    own, below = _sums(tree)
    by_action = np.zeros((num_actions, 3))
    np.add.at(by_action, tree.actions[1:], own[1:])
    grown, requests = tree, []
    for number in range(min(batch, max(told, 1))):
        walk_key, action_key = jax.random.split(jax.random.fold_in(key, number))
        parent = _walk(walk_key, tree, rule, own, below)
        action = int(rule.action(action_key, summary(by_action))) if num_actions > 1 else 0
        requests.append(Request(grown.size, parent, action))
        grown = grown.grown(parent, action)
    return grown, requests


def tell(tree: Tree, request: Request, score: float) -> Tree:
    """The tree with a request's score; in any order, and again without effect.

    Raises:
        ValueError: a request that this tree did not make, a score outside [0, 1], another score
            than the one told before.
    """
    node, parent, action = request
    known = 0 < node < tree.size and (tree.parents[node], tree.actions[node]) == (parent, action)
    if not known:
        raise ValueError(
            f"smcscale: this tree made no {request}.\n  try: the tree that `ask` returned with it."
        )
    if not 0 <= score <= 1:
        raise ValueError(f"smcscale: scores must be in [0, 1], got {score} for node {node}.")
    if np.isnan(tree.scores[node]):
        scores = tree.scores.copy()
        scores[node] = score
        return Tree(tree.parents, tree.actions, scores)
    if tree.scores[node] != score:
        raise ValueError(
            f"smcscale: node {node} was told {tree.scores[node]} and now {score}.\n"
            "  try: one score for a request."
        )
    return tree


def ab_mcts(
    key: Any,
    problems: SearchProblem | Sequence[SearchProblem],
    *,
    budget: Budget,
    rule: Rule = NodeAggregation(),  # noqa: B008  frozen
    batch: int | None = None,
) -> Found:
    """Adaptive branching: whole answers, each new one fresh or a new version of an earlier one.

    Args:
        key: random key.
        problems: `answering(...)`: one problem, or one for each action.
        budget: what may be spent.
        rule: `NodeAggregation()` (AB-MCTS-A; `NodeAggregation(Beta())` for Beta posteriors) or
            `MixedModel()` (AB-MCTS-M).
        batch: requests before the next scores are told, at most; the problem's batch when None.  1
            is the paper's search, see `ask` for what a batch changes.
    Returns:
        `Found`: all answers in the order made; choose by score or by vote (`answers.py`).
    Raises:
        ValueError: a budget without end; problems of different batches.
    """
    key = as_key(key)
    budget.check()
    actions = (problems,) if isinstance(problems, SearchProblem) else tuple(problems)
    size = actions[0].batch if batch is None else batch
    if not 1 <= size <= min(problem.batch for problem in actions):
        raise ValueError(
            f"smcscale: batch must be in [1, {actions[0].batch}], what every problem makes in one "
            f"call; got {size}."
        )
    most: dict[str, float] = {}
    for problem in actions:
        most = {name: max(most.get(name, 0.0), c) for name, c in (most | problem.most).items()}
    tree, states, spent, calls = Tree.start(), {0: actions[0].root}, {}, 0
    while rows := min(size, budget.rows(spent, most)):
        call = jax.random.fold_in(key, calls)
        tree, requests = ask(call, tree, rule, rows, num_actions=len(actions))
        for action, problem in enumerate(actions):
            mine = [request for request in requests if request.action == action]
            if not mine:
                continue
            draw = jax.random.fold_in(call, size + action)  # beyond the walks' own
            parents = [states[request.parent] for request in mine]
            children = expanded(problem, draw, parents, spent)
            for request, (state, score, _) in zip(mine, children, strict=True):
                states[request.node] = state
                tree = tell(tree, request, score)
        calls += 1
    return found(actions[0], tree, range(1, tree.size), states, spent)


def _sums(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Sums `(n, 3)` of `1, y, y^2`: of each node, and of each node with all below it.

    Added up in the order of the nodes, so the order of telling cannot show, not even in the last
    bit.
    """
    scores = np.nan_to_num(tree.scores)
    own = np.stack([~np.isnan(tree.scores), scores, scores**2], axis=1)
    below = own.copy()
    for node in range(tree.size - 1, 0, -1):
        below[tree.parents[node]] += below[node]
    return own, below


def _walk(key: Any, tree: Tree, rule: Rule, own: np.ndarray, below: np.ndarray) -> int:
    """The node that gets the next child."""
    told, node, depth = own[:, 0] > 0, 0, 0
    while len(children := np.flatnonzero((tree.parents == node) & told)):
        choice = int(rule(jax.random.fold_in(key, depth), *_seen(children, own, below)))
        if choice == NEW:
            break
        node, depth = int(children[choice]), depth + 1
    return node


def _seen(children: np.ndarray, own: np.ndarray, below: np.ndarray) -> tuple[Scores, ...]:
    """What a rule is told of a node: made here, made further down, and by child, padded."""
    generated = own[children].sum(0)
    padded = np.zeros((max(SMALLEST, 1 << int(len(children) - 1).bit_length()), 3))
    padded[: len(children)] = below[children]
    return summary(generated), summary(padded.sum(0) - generated), summary(padded)
