"""A bed of `reason` with an exact value function: walks through a graph to a goal.

A text is a walk along edges, its reward that the goal is reached, its answer the first move; all is known by
dynamic programming.  Under `beds.EXACT` the evidence is the probability that a walk of the model reaches the
goal.  Scores on the way only guide: exact ones, or noisy ones.  Read `beds.py` first, for `Bed`.

Source: Todorov 2006, section 2 (value functions of a random walk).
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcscale.models.reasoning.beds import Bed
from smcscale.models.reasoning.known_model import KnownModel, MarkovLaw
from smcscale.models.reasoning.language_model import TextState
from smcscale.models.reasoning.rewards import RewardFunction


class Promise(eqx.Module):
    """Score of a walk: what is known of where it stands, given the moves that are left.

    Attributes:
        values: `(T, V)`, in [0, 1]; row t is for walks of t + 1 moves.
    """

    values: Float[Array, "T V"]

    def __call__(self, state: TextState) -> Float[Array, ""]:
        """The score `()` of the walk so far."""
        place = jnp.maximum(state.written.length - 1, 0)
        return self.values[place, state.written.tokens[place]]


def navigation(
    table: Any, start: int, goal: int, *, num_moves: int, noise: float = 0.0, seed: int = 0
) -> Bed:
    """A random walk along the edges of a graph that should reach a goal, and then stops.

    Exact: the value of a node (the probability to reach the goal with the moves that are left), the
    evidence (that of the start) and the posterior of the first move, all by dynamic programming
    from the goal.

    Args:
        table: `(V, V)`, probabilities of the moves from each node; those from the goal are not read.
        start, goal: nodes.
        num_moves: a walk with so many is over.
        noise: standard deviation of the errors of the values on the way, in logits; the last score
            is right all the same.  0: exact values.
        seed: of the noise.
    Raises:
        ValueError: a start that is the goal.
    """
    if start == goal:
        raise ValueError(f"smcscale: start and goal are the same node, {start}.")
    table = np.array(table, np.float64)
    nodes = len(table)
    table[goal] = np.eye(nodes)[goal]
    values = [np.eye(nodes)[goal]]
    for _ in range(num_moves):
        values.append(table @ values[-1])
    evidence = float(values[num_moves][start])
    exact = np.array(values[:num_moves][::-1])  # row t: after t + 1 moves
    told = exact.copy()
    if noise:
        rng = np.random.default_rng(seed)
        inside = np.clip(exact[:-1], 0.01, 0.99)  # a node without hope may look as if it had some
        logits = np.log(inside / (1 - inside)) + noise * rng.standard_normal(inside.shape)
        told[:-1] = 1 / (1 + np.exp(-logits))
        told[:, goal] = 1.0
    moves = np.broadcast_to(table, (num_moves - 1, nodes, nodes))
    lm = KnownModel(
        MarkovLaw.of(table[start], moves), nodes, max_tokens=num_moves, end_tokens=(goal,)
    )
    with np.errstate(invalid="ignore"):
        posterior = table[start] * exact[0] / np.float64(evidence)
    return Bed(
        lm,
        RewardFunction(Promise(jnp.asarray(told, jnp.float32))),
        num_moves,
        evidence,
        posterior,
        lambda tokens, lengths: tokens[:, 0],
        lambda tokens: " -> ".join(str(int(node)) for node in (start, *tokens)),
    )


def num_walks(table: Any, start: int, goal: int, num_moves: int) -> int:
    """How many different walks of at most so many moves end when they first reach the goal."""
    edges = np.asarray(table) > 0
    ways = [0] * len(edges)  # Python's integers, which do not overflow
    ways[start], found = 1, 0
    for _ in range(num_moves):
        ways = [sum(ways[i] for i in np.flatnonzero(edges[:, j])) for j in range(len(edges))]
        found, ways[goal] = found + ways[goal], 0
    return found


def mazes(
    seed: int, count: int, *, nodes: int = 6, num_moves: int = 5, noise: float = 0.0
) -> list[Bed]:
    """`count` random beds of `navigation` from node 0 to the last: a ring with random chords.

    Walks go along each edge of a node with random probabilities.  The goal can be reached in all of
    them.
    """
    if min(nodes - 1, num_moves) < 2:
        raise ValueError(
            f"smcscale: a maze needs 3 nodes and 2 moves, got {nodes} and {num_moves}."
        )
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        ring = np.roll(np.eye(nodes, dtype=bool), 1, axis=1)
        ring[nodes - 1] = ring[:, nodes - 1] = False  # the goal hangs on chords alone
        chords = np.triu(rng.random((nodes, nodes)) < 0.3, 1)
        chords[0, nodes - 1] = False
        edges = ring | ring.T | chords | chords.T
        if not edges[nodes - 1].any() or not edges.any(1).all():
            continue
        table = np.where(edges, rng.gamma(1.0, size=(nodes, nodes)), 0.0)
        table /= table.sum(1, keepdims=True)
        bed = navigation(
            table, 0, nodes - 1, num_moves=num_moves, noise=noise, seed=int(rng.integers(2**31))
        )
        if bed.evidence > 0:
            found.append(bed)
    return found
