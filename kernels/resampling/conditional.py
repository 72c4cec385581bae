"""Resampling given one kept ancestor: `(key, log_weights, n, kept_ancestor, kept_slot) -> ancestors`.

What conditional filters (particle Gibbs) need: `ancestors[kept_slot] == kept_ancestor`, and the others
as the plain kernel would have drawn them, given that. "Would have" is meant of the kernel with its slots
rotated at random, in which each slot holds ancestor i with probability `weights[i]`.

| form | given the kept one |
|---|---|
| `multinomial` | the others are independent draws |
| `stratified` | its point lies in its particle's stretch, the other cells are drawn anew |
| `systematic` | its point lies in its particle's stretch, the others follow at equal distances |
| `residual` | it is one of the sure copies, or one of the drawn ones |
| `killing` | its slot held the kept particle, or one that was redrawn |

`form_of(kernel)` finds the form of a kernel of `schemes.py`; ssp, rejection, metropolis and selections have
none. A kernel of one's own brings it as its attribute `conditional`.

Source: Andrieu, Doucet & Holenstein 2010 (multinomial); Chopin & Singh 2015, section 5 (systematic,
residual); the others by the same argument.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smcscale.kernels.resampling import schemes
from smcscale.kernels.resampling.schemes import (
    ancestors_at,
    points_below,
    split_counts,
    uniform_parts,
)
from smcscale.types import Ancestors, Key, LogWeights
from smcscale.weights import PARTS, Counts, cumulative_counts, prefix_sum, scale

Index = Int32[Array, ""] | int


def multinomial(
    key: Key, log_weights: LogWeights, n: int, kept_ancestor: Index, kept_slot: Index
) -> Ancestors:
    """Multinomial resampling with one ancestor kept; the others are independent of it.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
        kept_ancestor: in `[0, N)`, alive.
        kept_slot: in `[0, n)`.
    Returns:
        ancestors: `(n,)` int32, in random order.
    Source: Andrieu, Doucet & Holenstein 2010, section 4.3.
    """
    for_points, for_order = jax.random.split(key)
    counts = cumulative_counts(log_weights, n)
    drawn = ancestors_at(points_below(for_points, counts, n - 1, n), n)[: n - 1]
    return _inserted(jax.random.permutation(for_order, drawn), kept_ancestor, kept_slot)


def systematic(
    key: Key, log_weights: LogWeights, n: int, kept_ancestor: Index, kept_slot: Index
) -> Ancestors:
    """Systematic resampling with one ancestor kept: n equally spaced points, one in its stretch.

    Args, Returns: as of `multinomial`; ancestors are sorted up to a rotation.
    Source: Chopin & Singh 2015, section 5.3.
    """
    counts = cumulative_counts(log_weights, n)
    cell, point = _inside(key, counts, kept_ancestor)
    ancestors = ancestors_at(counts.whole + (counts.part > point), n)
    return jnp.roll(ancestors, kept_slot - cell)


def stratified(
    key: Key, log_weights: LogWeights, n: int, kept_ancestor: Index, kept_slot: Index
) -> Ancestors:
    """Stratified resampling with one ancestor kept: its cell's point lies in its stretch.

    Args, Returns: as of `multinomial`; ancestors are sorted up to a rotation.
    """
    for_kept, for_others = jax.random.split(key)
    counts = cumulative_counts(log_weights, n)
    cell, point = _inside(for_kept, counts, kept_ancestor)
    points = uniform_parts(for_others, (n,)).at[cell].set(point)
    ancestors = ancestors_at(
        counts.whole + (counts.part > points.at[counts.whole].get(mode="clip")), n
    )
    return jnp.roll(ancestors, kept_slot - cell)


def residual(
    key: Key, log_weights: LogWeights, n: int, kept_ancestor: Index, kept_slot: Index
) -> Ancestors:
    """Residual resampling with one ancestor kept, a sure copy or a drawn one.

    Args, Returns: as of `multinomial`; in random order.
    Source: Chopin & Singh 2015, section 5.2.
    """
    for_kind, for_points, for_order = jax.random.split(key, 3)
    counts = cumulative_counts(log_weights, n)
    copies, part = split_counts(counts)
    expected = copies[kept_ancestor] + part[kept_ancestor] / PARTS
    drawn = jax.random.uniform(for_kind) * expected >= copies[kept_ancestor]
    sure = prefix_sum(copies)
    remaining = Counts(counts.whole - sure, counts.part)
    left = jnp.maximum(remaining.whole[-1] - drawn, 0)
    # one of the draws is the kept one
    mine = drawn & (jnp.arange(sure.size) >= kept_ancestor)
    boundaries = sure + points_below(for_points, remaining, left, n) + mine
    ancestors = ancestors_at(boundaries, n)
    # the last slot of the kept particle goes, the others are shuffled
    gone = boundaries[kept_ancestor] - 1
    rest = jnp.arange(n - 1)
    others = ancestors[rest + (rest >= gone)]
    return _inserted(jax.random.permutation(for_order, others), kept_ancestor, kept_slot)


def killing(
    key: Key, log_weights: LogWeights, n: int, kept_ancestor: Index, kept_slot: Index
) -> Ancestors:
    """Killing resampling with one ancestor kept: its slot held it, or one that was redrawn.

    Candidates are in rotated order, the redrawn in random order.

    Args, Returns: as of `multinomial`; needs `n == N`.
    Raises:
        ValueError: at trace time, when `n != N`.
    """
    if n != log_weights.size:
        raise ValueError(
            f"smcscale: killing resampling keeps the number of particles, but n = {n} ancestors "
            f"of {log_weights.size} particles were asked for.\n"
            "  try: conditional.systematic where the number of particles changes."
        )
    for_slot, for_survival, for_redraw, for_order = jax.random.split(key, 4)
    share = scale(log_weights)[0]  # weights over the largest
    chances = (1 - share).at[kept_ancestor].add(jnp.sum(share))
    candidate = jax.random.categorical(for_slot, jnp.log(chances))
    candidates = ((jnp.arange(n) + candidate - kept_slot) % n).astype(jnp.int32)
    survives = jax.random.uniform(for_survival, (n,)) < share[candidates]
    counts = cumulative_counts(log_weights, n)
    drawn = ancestors_at(points_below(for_redraw, counts, n, n), n)
    # in random order: each vacant slot gets a draw of its own
    ancestors = jnp.where(survives, candidates, jax.random.permutation(for_order, drawn))
    return ancestors.at[kept_slot].set(kept_ancestor)


def form_of(kernel: Any) -> Callable[..., Ancestors]:
    """The conditional form of a resampling kernel.

    Raises:
        ValueError: for a kernel that has none, by its name.
    """
    own = getattr(kernel, "conditional", None)
    if own is not None:
        return own
    for plain, form in _FORMS:
        if kernel is plain:
            return form
    name = getattr(kernel, "__name__", type(kernel).__name__)
    raise ValueError(
        f"smcscale: the resampling kernel {name} has no form given a kept ancestor.\n"
        "  try: systematic, stratified, residual, multinomial or killing, or give the kernel an "
        "attribute `conditional`."
    )


_FORMS = (
    (schemes.multinomial, multinomial),
    (schemes.systematic, systematic),
    (schemes.stratified, stratified),
    (schemes.residual, residual),
    (schemes.killing, killing),
)


def _inserted(others: Int32[Array, " others"], kept_ancestor: Index, kept_slot: Index) -> Ancestors:
    """The others `(n - 1,)` with the kept one among them."""
    n = others.size + 1
    slots = jnp.arange(n)
    return jnp.where(
        slots == kept_slot,
        kept_ancestor,
        jnp.concatenate([others, others[:1]])[jnp.where(slots > kept_slot, slots - 1, slots)]
        if n > 1
        else kept_ancestor,
    ).astype(jnp.int32)


def _inside(key: Key, counts: Counts, index: Index) -> tuple[Index, Index]:
    """A uniform point of a particle's stretch of `[0, n)`: its cell, and its part of the cell."""
    for_where, for_cell, for_part = jax.random.split(key, 3)
    before = jnp.maximum(index - 1, 0)
    first, start = (jnp.where(index > 0, x[before], 0) for x in counts)
    last, end = (x[index] for x in counts)
    # the stretch is the rest of its first cell, whole cells, and the beginning of its last one
    cells = jnp.maximum(last - first - 1, 0)
    same = first == last
    head: Float[Array, ""] = jnp.where(same, end - start, PARTS - start) / PARTS
    tail: Float[Array, ""] = jnp.where(same, 0, end) / PARTS
    at = jax.random.uniform(for_where) * (head + cells + tail)
    in_head, in_tail = at < head, at >= head + cells
    low = jnp.where(in_head, start, 0)
    high = jnp.where(in_head, jnp.where(same, end, PARTS), jnp.where(in_tail, end, PARTS))
    # not `randint`, which favours the first numbers of a long range
    chosen = jnp.floor(jax.random.uniform(for_cell) * cells).astype(jnp.int32)
    cell = jnp.where(in_head, first, jnp.where(in_tail, last, first + 1 + chosen))
    part = low + jnp.floor(jax.random.uniform(for_part) * (high - low)).astype(jnp.int32)
    return cell.astype(jnp.int32), jnp.minimum(part, jnp.maximum(high - 1, low)).astype(jnp.int32)
