"""What is kept of the past: nothing (last), live paths only (ancestry), everything (paths).

Both kinds of history answer `trace(indices)`: the paths of chosen final particles. `Paths` holds
every particle, weight and ancestor; `Ancestry` drops what has no living descendant after each block,
which leaves O(T + N log N) paths on average (Jacob, Murray & Rubenthaler 2015).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Kept(NamedTuple):
    """One block of steps: leaves `(B, R, N, ...)`, ancestors and log-weights `(B, R, N)`.

    `ancestors[t]` are indices into the population at `t - 1`.
    """

    leaves: list
    ancestors: Any
    log_weights: Any


class Paths(eqx.Module):
    """Every particle of every step.

    Attributes:
        states: pytree, leaves `(T, R, N, ...)`.
        log_weights: `(T, R, N)`.
        ancestors: `(T, R, N)` int32, indices into step t - 1.
    """

    states: Any
    log_weights: jax.Array
    ancestors: jax.Array
    kind: str = eqx.field(static=True, default="paths")

    def trace(self, indices: jax.Array) -> Any:
        """Paths of final particles `indices (R, K)`: leaves `(R, K, T, ...)`."""
        return _trace(self.states, self.ancestors, jnp.asarray(indices, jnp.int32))


class Live(NamedTuple):
    """An ancestry in the making: see `Ancestry`."""

    segments: list
    links: list


class Ancestry(eqx.Module):
    """The paths of the final particles, compacted.

    Attributes:
        segments: leaves `(B, R, K, ...)` of the K paths alive in each block, oldest first.
        links: `(R, K')` int32 for each segment, from the paths of the next one (for the last, from
            the final particles) to its own.
        structure: of the recorded pytree.
    """

    segments: list
    links: list
    structure: Any = eqx.field(static=True)
    kind: str = eqx.field(static=True, default="ancestry")

    def trace(self, indices: jax.Array) -> Any:
        """Paths of final particles `indices (R, K)`: leaves `(R, K, T, ...)`."""
        pieces: list = []
        current = np.asarray(indices)
        for leaves, link in zip(reversed(self.segments), reversed(self.links), strict=True):
            current = np.take_along_axis(np.asarray(link), current, axis=1)
            pieces.append([_pick(leaf, current) for leaf in leaves])
        pieces.reverse()
        joined = [
            jnp.concatenate([jnp.asarray(p[i]) for p in pieces], axis=2)
            for i in range(len(pieces[0]))
        ]
        return jax.tree.unflatten(self.structure, joined)


History = Paths | Ancestry


@jax.jit
def _trace(states: Any, ancestors: jax.Array, indices: jax.Array) -> Any:
    def back(index: jax.Array, step: tuple) -> tuple:
        leaves, parents = step
        values = jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), leaves)
        return jnp.take_along_axis(parents, index, axis=1), values

    _, values = jax.lax.scan(back, indices, (states, ancestors), reverse=True)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), values)


def paths(blocks: list[Kept], structure: Any) -> Paths:
    """Join the blocks of a run."""
    leaves = [
        jnp.concatenate([block.leaves[i] for block in blocks]) for i in range(len(blocks[0].leaves))
    ]
    return Paths(
        jax.tree.unflatten(structure, leaves),
        jnp.concatenate([block.log_weights for block in blocks]),
        jnp.concatenate([block.ancestors for block in blocks]),
    )


def extend(ancestry: Live | None, block: Kept) -> Live:
    """Add a block to an ancestry and drop every path without a living descendant."""
    parents = np.asarray(block.ancestors)
    steps, num_runs, num_particles = parents.shape
    index = np.broadcast_to(np.arange(num_particles, dtype=np.int32), (num_runs, num_particles))
    lineage = np.empty((steps, num_runs, num_particles), np.int32)
    for t in range(steps - 1, -1, -1):
        lineage[t] = index
        index = np.take_along_axis(parents[t], index, axis=1)
    rows = [
        np.stack([_pick_one(np.asarray(leaf)[t], lineage[t]) for t in range(steps)])
        for leaf in block.leaves
    ]
    segments = [] if ancestry is None else list(ancestry.segments)
    links = [] if ancestry is None else list(ancestry.links)
    # `index` now points from the block's particles to the population before the block
    if links:
        links[-1] = np.take_along_axis(np.asarray(links[-1]), index, axis=1)
    segments.append(rows)
    links.append(
        np.broadcast_to(np.arange(num_particles, dtype=np.int32), (num_runs, num_particles))
    )
    for i in range(len(segments) - 2, -1, -1):
        alive, links[i] = _distinct(links[i])
        width = segments[i][0].shape[2] if segments[i] else 0
        if alive.shape[1] == width:
            # nothing died here, so nothing died further back
            links[i] = np.take_along_axis(alive, links[i], axis=1)
            break
        segments[i] = [_columns(leaf, alive) for leaf in segments[i]]
        if i > 0:
            links[i - 1] = np.take_along_axis(np.asarray(links[i - 1]), alive, axis=1)
    return Live(segments, links)


def _distinct(link: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct entries of each run (padded to one width) and the links renumbered to them."""
    found = [np.unique(row, return_inverse=True) for row in link]
    width = max(len(values) for values, _ in found)
    alive = np.stack([np.pad(v, (0, width - len(v)), mode="edge") for v, _ in found])
    return alive, np.stack([inverse.reshape(-1).astype(np.int32) for _, inverse in found])


def _columns(leaf: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`(B, R, K, ...)` at columns `(R, K')`."""
    return np.stack([leaf[:, r, columns[r]] for r in range(columns.shape[0])], axis=1)


def _pick_one(leaf: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.stack([leaf[r, index[r]] for r in range(index.shape[0])])


def _pick(leaf: Any, index: np.ndarray) -> np.ndarray:
    """`(B, R, K, ...)` at `(R, K')` as `(R, K', B, ...)`."""
    return np.moveaxis(_columns(np.asarray(leaf), index), 0, 2)
