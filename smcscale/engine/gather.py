"""Moving states after resampling: only what the next step reads, heavy leaves in place.

Leaves that the next step does not read keep their old order: nobody looks at them before they are
overwritten. Heavy leaves (KV caches) are moved slot by slot into dead slots only, outside the
branch that resamples, since a branch copies what passes through it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


def move(leaves: list, ancestors: Int32[Array, "R n"], wanted: tuple[bool, ...]) -> list:
    """Gather the wanted leaves `(R, N, ...)` by `ancestors`, indices within a run."""
    num_runs, num_particles = ancestors.shape[0], leaves[0].shape[1] if leaves else 0
    offsets = jnp.arange(num_runs, dtype=jnp.int32)[:, None] * num_particles
    flat = (ancestors + offsets).reshape(-1)
    out = []
    for leaf, want in zip(leaves, wanted, strict=True):
        if not want:
            out.append(leaf)
            continue
        rows = leaf.reshape(num_runs * num_particles, *leaf.shape[2:])
        moved = jnp.take(rows, flat, axis=0, mode="clip")
        out.append(moved.reshape(*ancestors.shape, *leaf.shape[2:]))
    return out


def from_memory(ancestors: Int32[Array, "R n"], use: Callable[[Array], Any]) -> Any:
    """`use(ancestors)`, with the numbers written out before they are read.

    Nothing is fused across a branch; without it XLA works the sums that ancestors are made of out
    again wherever one is read.
    """

    def never(ancestors: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(use, ancestors))

    return jax.lax.cond(ancestors[0, 0] >= 0, use, never, ancestors)


def canonical(ancestors: Int32[Array, " N"]) -> Int32[Array, " N"]:
    """The same offspring counts with every survivor in its own slot; copies fill dead slots."""
    n = ancestors.shape[0]
    slots = jnp.arange(n, dtype=jnp.int32)
    counts = jnp.zeros(n, jnp.int32).at[ancestors].add(1)
    dead = counts == 0
    copies = jnp.cumsum(jnp.maximum(counts - 1, 0))
    rank = jnp.cumsum(dead) - 1
    source = jnp.searchsorted(copies, rank, side="right").astype(jnp.int32)
    return jnp.where(dead, jnp.minimum(source, n - 1), slots)


def move_in_place(leaves: list, ancestors: Int32[Array, "R N"], heavy: tuple[bool, ...]) -> list:
    """Overwrite the dead slots of heavy leaves `(R, N, ...)`; `ancestors` are canonical."""
    if not any(heavy):
        return leaves
    num_runs, num_particles = ancestors.shape
    offsets = jnp.arange(num_runs, dtype=jnp.int32)[:, None] * num_particles
    flat = (ancestors + offsets).reshape(-1)
    moved: Bool[Array, " RN"] = flat != jnp.arange(flat.shape[0], dtype=jnp.int32)
    order = jnp.argsort(~moved, stable=True)
    chosen = [leaf for leaf, is_heavy in zip(leaves, heavy, strict=True) if is_heavy]
    rows = [leaf.reshape(num_runs * num_particles, *leaf.shape[2:]) for leaf in chosen]

    def overwrite(i: Array, rows: list) -> list:
        slot = order[i]
        return [
            jax.lax.dynamic_update_index_in_dim(
                r, jax.lax.dynamic_index_in_dim(r, flat[slot], keepdims=False), slot, 0
            )
            for r in rows
        ]

    rows = jax.lax.fori_loop(0, jnp.sum(moved), overwrite, rows)
    placed = iter(row.reshape(leaf.shape) for row, leaf in zip(rows, chosen, strict=True))
    return [
        next(placed) if is_heavy else leaf for leaf, is_heavy in zip(leaves, heavy, strict=True)
    ]


def unique_ancestors(ancestors: Int32[Array, "R n"]) -> Int32[Array, " R"]:
    """Number of distinct parents of each run; above `2**24` of them rounded to a float32."""
    n = ancestors.shape[1]
    risen = jnp.sign(ancestors[:, 1:] - ancestors[:, :-1]).astype(jnp.float32)
    # one pass counts the rises of sorted ancestors and shows, by its sign, those that are not
    rises = jnp.sum(jnp.where(risen < 0, -float(n), risen), axis=1)

    def counted() -> Array:
        hit = jax.vmap(lambda a: jnp.zeros(a.shape, jnp.int8).at[a].set(1, mode="drop"))(ancestors)
        return jnp.sum(hit, axis=1, dtype=jnp.int32)

    return jax.lax.cond(jnp.all(rises >= 0), lambda: 1 + rises.astype(jnp.int32), counted)
