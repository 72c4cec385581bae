"""Resampling schemes that read the cumulative weights: `(key, log_weights, n) -> ancestors (n,)`.

Expected offspring are added up once, as exact integers (`smcscale.weights.cumulative_counts`);
a scheme then only decides where its `n` points lie in `[0, n)`, one or none in each unit cell.

| scheme | points or rule | variance, unsorted particles |
|---|---|---|
| `multinomial` | n independent uniforms | 1 |
| `residual` | whole parts kept, independent uniforms on the rest | about 0.5 |
| `stratified` | one uniform in each cell | about 0.3 |
| `ssp` | whole parts kept, the rest rounded in pairs | about 0.2 |
| `systematic` | one uniform for all cells | about 0.2, no guarantee |
| `killing` | survive with probability w / max w, else redraw | |

Read next: `parallel.py` (no sum over the weights), `selection.py` (biased search rules).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from smcscale.types import Ancestors, Key, LogWeights
from smcscale.weights import (
    PARTS,
    Counts,
    cumulative_counts,
    prefix_sum,
    scaled_prefix_sum,
)


def ancestors_at(boundaries: Int32[Array, " N"], n: int) -> Ancestors:
    """Ancestors whose last slots, plus one, are `boundaries`, nondecreasing up to `n`; sorted.

    Slots from the last boundary on, if it is below n, mean nothing.
    """
    # boundaries of n drop out; cut off instead, the last one would keep XLA from vectorising
    starts = jnp.zeros(n, jnp.int32).at[boundaries.astype(jnp.uint32)].add(1, mode="drop")
    return jnp.minimum(prefix_sum(starts), boundaries.size - 1)  # broken weights stay in range


def systematic(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Systematic resampling: n equally spaced points under one shared uniform.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, sorted; particle i appears within one of `n * weights[i]` times.
    Properties: unbiased; O(N + n); variance without guarantee (it may exceed multinomial on
        periodic orders); gradient: zero through `ancestors`.
    Source: Carpenter, Clifford & Fearnhead 1999.
    """
    counts = cumulative_counts(log_weights, n)
    point = uniform_parts(key, ())
    return ancestors_at(counts.whole + (counts.part > point), n)


def stratified(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Stratified resampling: one uniform point in each of n equal cells.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, sorted; particle i appears within two of `n * weights[i]` times.
    Properties: unbiased; O(N + n); variance at most multinomial's; gradient: zero through
        `ancestors`.
    Source: Kitagawa 1996.
    """
    counts = cumulative_counts(log_weights, n)
    points = uniform_parts(key, (n,))
    return ancestors_at(counts.whole + (counts.part > points.at[counts.whole].get(mode="clip")), n)


def multinomial(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Multinomial resampling: n independent draws from the weights.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, sorted: exchangeable only after a random permutation.
    Properties: unbiased; O(N + n); the single-run variance estimate holds for it alone; gradient:
        zero through `ancestors`.
    Source: Gordon, Salmond & Smith 1993; sorted uniforms from exponential gaps.
    """
    counts = cumulative_counts(log_weights, n)
    return ancestors_at(points_below(key, counts, n, n), n)


def residual(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Residual resampling: `floor(n weights)` sure copies, the rest multinomial on what remains.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, sorted; particle i appears at least `floor(n * weights[i])` times.
    Properties: unbiased; O(N + n); variance at most multinomial's; gradient: zero through
        `ancestors`.
    Source: Liu & Chen 1998.
    """
    counts = cumulative_counts(log_weights, n)
    sure = prefix_sum(split_counts(counts)[0])
    remaining = Counts(counts.whole - sure, counts.part)
    drawn = points_below(key, remaining, remaining.whole[-1], n)
    return ancestors_at(sure + drawn, n)


def ssp(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Srinivasan sampling: counts are `floor(n w)` or one more, rounded against each other.

    Fractional parts meet in pairs: one is closed at 0 or 1, the other goes on with what is left,
    up a knockout tree of `log2 N` rounds.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, sorted; counts are `floor(n * weights[i])` or one more.
    Properties: unbiased; O(N + n); counts negatively associated, hence consistent; gradient: zero
        through `ancestors`.
    Source: Gerber, Chopin & Whiteley 2019, section 3; as a tree instead of a scan.
    """
    sure, remainder = split_counts(cumulative_counts(log_weights, n))
    size = 1 << (remainder.size - 1).bit_length()
    part = jnp.pad(remainder, (0, size - remainder.size))
    item = jnp.arange(size, dtype=jnp.int32)
    raised = jnp.zeros(size, jnp.int32)
    uniforms = jax.random.uniform(key, (size,), jnp.float32)
    while size > 1:
        size //= 2
        (i, j), (p, q) = item.reshape(size, 2).T, part.reshape(size, 2).T
        full = p + q >= PARTS
        # full: i closes at one and j stays open; else i stays open and j closes at zero
        chance = jnp.where(full, PARTS - q, p) / jnp.where(full, PARTS - p + (PARTS - q), p + q)
        first = uniforms[size : 2 * size] < chance  # 0 / 0: false, and both have nothing
        raised = raised.at[jnp.where(first, i, j)].add(full.astype(jnp.int32))
        item, part = jnp.where(first != full, i, j), p + q - full * PARTS
    # the fractional parts add up to an integer, so that the last open value is exactly zero
    return ancestors_at(prefix_sum(sure + raised[: sure.size]), n)


def killing(key: Key, log_weights: LogWeights, n: int) -> Ancestors:
    """Killing resampling: particle i survives with probability w_i / max w, else is redrawn.

    Args:
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors; this scheme needs `n == N`.
    Returns:
        ancestors: `(n,)` int32; `ancestors[i] == i` for survivors, so heavy states stay in place.
    Raises:
        ValueError: at trace time, when `n != N`.
    Properties: unbiased; O(N); unordered; gradient: zero through `ancestors`.
    Source: Del Moral 2004, section 2.5.
    """
    if n != log_weights.size:
        raise ValueError(
            f"smcscale: killing resampling keeps the number of particles, but n = {n} ancestors "
            f"of {log_weights.size} particles were asked for.\n"
            "  try: resampling.systematic where the number of particles changes."
        )
    for_survival, for_redraw = jax.random.split(key)
    # log of a uniform that is never 0, so that no dead particle survives
    log_uniforms = -jax.random.exponential(for_survival, (n,), log_weights.dtype)
    survives = log_uniforms <= log_weights - jnp.max(log_weights)
    return redraw(for_redraw, log_weights, jnp.arange(n, dtype=jnp.int32), ~survives)


def redraw(
    key: Key, log_weights: LogWeights, ancestors: Ancestors, vacant: Bool[Array, " n"]
) -> Ancestors:
    """Ancestors with the vacant slots filled by independent draws from the weights."""
    n = ancestors.size
    counts = cumulative_counts(log_weights, n)
    rank = prefix_sum(vacant.astype(jnp.int32))
    # only as many points as there are vacant slots: the first of n sorted ones would be small
    drawn = ancestors_at(points_below(key, counts, rank[-1], n), n)
    return jnp.where(vacant, drawn.at[rank - 1].get(mode="clip"), ancestors)


def uniform_parts(key: Key, shape: tuple[int, ...]) -> Int32[Array, "..."]:
    """Uniform fractional parts of a count."""
    return (jax.random.bits(key, shape, jnp.uint32) // (2**32 // PARTS)).astype(jnp.int32)


def split_counts(counts: Counts) -> tuple[Int32[Array, " N"], Int32[Array, " N"]]:
    """Whole and fractional parts of each particle's own expected offspring."""
    before = Counts(*(jnp.pad(x[:-1], (1, 0)) for x in counts))
    borrow = (counts.part < before.part).astype(jnp.int32)
    return counts.whole - before.whole - borrow, counts.part - before.part + borrow * PARTS


def points_below(
    key: Key, counts: Counts, num_points: Int32[Array, ""] | int, n: int
) -> Int32[Array, " N"]:
    """How many of `num_points <= n` sorted uniform points in `[0, counts[-1])` lie below each."""
    cells = counts.whole[-1]
    gaps = jax.random.exponential(key, (n + 1,), jnp.float32)
    points = scaled_prefix_sum(jnp.where(jnp.arange(n + 1) <= num_points, gaps, 0), cells, n)
    # before[c]: points in the cells before c; inside a cell there are few, found by bisection
    before = prefix_sum(jnp.zeros(n + 2, jnp.int32).at[points.whole + 1].add(1, mode="drop"))
    low = before.at[counts.whole].get(mode="clip")
    high = before.at[counts.whole + 1].get(mode="clip")

    def halve(bounds):
        low, high = bounds
        middle = (low + high) // 2
        below = points.part.at[middle].get(mode="clip") < counts.part
        searching = low < high
        return (
            jnp.where(searching & below, middle + 1, low),
            jnp.where(searching & ~below, middle, high),
        )

    low, _ = lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))
    return jnp.where(counts.whole == cells, num_points, jnp.minimum(low, num_points))
