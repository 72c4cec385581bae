"""Arithmetic of log-weights `(N,)`: unnormalised, in nats, `-inf` for a dead particle.

| function | what comes out |
|---|---|
| `normalize` | weights that sum to one |
| `log_normalize` | their logarithms |
| `ess` | effective sample size |
| `log_mean_exp` | log of the mean weight |
| `cool` | weights to a power, the dead kept dead |
| `largest_beta` | the largest power that keeps a condition |
| `prefix_sum` | running sums |
| `cumulative_counts` | running sums of expected offspring, as exact integers |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from smcscale.types import LogWeights


def scale(log_weights: LogWeights) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """Weights over the largest one, and its logarithm (0 when all are dead)."""
    largest = lax.stop_gradient(jnp.max(log_weights))
    largest = jnp.where(largest == -jnp.inf, jnp.zeros_like(largest), largest)
    # without the barrier XLA turns the square of an exponential into a second exponential
    return lax.optimization_barrier(jnp.exp(log_weights - largest)), largest


def normalize(log_weights: LogWeights) -> Float[Array, " N"]:
    """Weights `(N,)` that sum to one; equal ones when every particle is dead.

    Properties: NaN stays NaN; gradient: exact.
    """
    scaled, _ = scale(log_weights)
    total = jnp.sum(scaled)
    dead = total == 0
    return jnp.where(dead, 1 / log_weights.size, scaled / jnp.where(dead, 1, total))


def log_normalize(log_weights: LogWeights) -> LogWeights:
    """Log-weights `(N,)` whose exponentials sum to one; equal ones when every particle is dead.

    Properties: NaN stays NaN; gradient: exact.
    """
    scaled, largest = scale(log_weights)
    total = jnp.sum(scaled)
    dead = total == 0
    normalized = log_weights - (largest + jnp.log(jnp.where(dead, 1, total)))
    return jnp.where(dead, -jnp.log(jnp.asarray(log_weights.size, total.dtype)), normalized)


def ess(log_weights: LogWeights) -> Float[Array, ""]:
    """Effective sample size `(sum w)^2 / sum w^2`, in `[1, N]`; 0 when every particle is dead.

    Properties: NaN stays NaN, so compare with `not (ess >= floor)`; gradient: exact.
    """
    scaled, _ = scale(log_weights)
    squares = jnp.sum(scaled * scaled)
    return jnp.sum(scaled) ** 2 / jnp.where(squares == 0, 1, squares)


def log_mean_exp(log_weights: LogWeights) -> Float[Array, ""]:
    """Log of the mean weight, `-inf` when every particle is dead; gradient: exact."""
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.asarray(log_weights.size, log_weights.dtype))


def cool(log_weights: LogWeights, beta: Float[Array, ""] | float) -> LogWeights:
    """Log-weights times `beta`, with the dead kept dead at `beta = 0` too; gradient: exact."""
    dead = log_weights == -jnp.inf  # 0 * -inf is NaN, and so is its gradient
    return jnp.where(dead, -jnp.inf, beta * jnp.where(dead, 0, log_weights))


def largest_beta(
    ok: Callable[[LogWeights], Bool[Array, ""]], log_weights: LogWeights, iterations: int
) -> Float[Array, ""]:
    """The largest `beta` in `[0, 1]` with `ok(cool(log_weights, beta))`, by bisection.

    Args:
        ok: true up to some `beta` and false beyond; taken to hold at 0.
        log_weights: `(N,)`.
        iterations: halvings; the answer is low by at most `2 ** -iterations`.
    Returns:
        beta: `()`, exactly 1 where `ok` holds there; else the last value found to be ok.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        good = ok(cool(log_weights, middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    zero, one = jnp.zeros((), log_weights.dtype), jnp.ones((), log_weights.dtype)
    low, _ = lax.fori_loop(0, iterations, halve, (zero, one))
    return jnp.where(ok(log_weights), one, low)


#: Numbers added by one matrix product: float32 holds their sums exactly.
_ROW = 32
#: Units of a fractional part while summing: a row of them stays below 2**24, which float32 holds.
_UNITS = 1 << 17
#: Units of a fractional part of `Counts`.
PARTS = 1 << 30
#: Largest number of particles whose counts float32 holds exactly.
MOST = 1 << 24


class Counts(NamedTuple):
    """Nonnegative fixed-point numbers `whole + part / PARTS`, exact under addition.

    Attributes:
        whole: `(N,)` int32.
        part: `(N,)` int32 in `[0, PARTS)`.
    """

    whole: Int32[Array, " N"]
    part: Int32[Array, " N"]


def prefix_sum(values: Int32[Array, " N"]) -> Int32[Array, " N"]:
    """Running sums `(N,)` of nonnegative integers that add up to less than `2**24`."""
    (sums,) = _running(_rows(values.astype(jnp.float32)))
    return _flat(sums, values.size)


def cumulative_counts(log_weights: LogWeights, n: int) -> Counts:
    """Running sums of the expected offspring `n * weights`, exact for ten million particles.

    Args:
        log_weights: `(N,)`, at least one of them above `-inf`.
        n: the total.
    Returns:
        counts: `(N,)`, nondecreasing; from the last living particle on exactly `(n, 0)`; equal to
        the one before where a particle is dead. Good to `n 2**-40`, whatever N.
    Raises:
        ValueError: at trace time, when N or n is above `2**24`.
    """
    if max(n, log_weights.size) > MOST:
        raise ValueError(
            f"smcscale: offspring of {log_weights.size} particles for {n} cannot be counted "
            f"exactly; at most {MOST} can.\n  try: SMC(..., num_islands=M)."
        )
    return scaled_prefix_sum(scale(log_weights)[0], n, n)


def scaled_prefix_sum(
    values: Float[Array, " N"], total: int | Int32[Array, ""], most: int
) -> Counts:
    """Running sums of nonnegative numbers, scaled so that the last one is exactly `total <= most`.

    A float32 sum of 1e7 has a spacing of 1, so whole and fractional parts are added apart, each as
    integers that float32 holds exactly. What the float sum of all got wrong is spread over them.
    """
    shift = max(0, (MOST // 2 // most).bit_length() - 1)  # finer, as far as float32 holds them
    fine = total * 2**shift
    expected = _rows(values) * (fine / jnp.sum(values))
    whole = jnp.floor(expected)
    part = jnp.round((expected - whole) * _UNITS)
    whole, part = _running(whole.astype(jnp.float32), part.astype(jnp.float32))
    position = whole + part / _UNITS
    # a few units more, so that the last one does not fall short by rounding
    missing = (fine - whole[-1, -1]) * _UNITS - part[-1, -1] + 4
    # an integer, so that equal sums stay equal and the order is kept
    part += jnp.floor(position * (missing / jnp.maximum(position[-1, -1], 1)))
    whole, part = _carry(whole, part)
    part = jnp.where(whole < fine, part, 0)
    whole = jnp.minimum(whole, fine)
    whole, part = _flat(whole, values.size), _flat(part, values.size)
    # `shift` bits of the whole belong to the part, of `part` as many as still fit
    spare = PARTS.bit_length() - _UNITS.bit_length() - shift
    part = part << spare if spare >= 0 else part >> -spare
    return Counts(whole >> shift, (whole & (2**shift - 1)) * (PARTS >> shift) + part)


def _rows(values: Shaped[Array, " N"]) -> Shaped[Array, "rows columns"]:
    """Numbers in rows of `_ROW`, zeros at the end."""
    padding = -values.size % _ROW
    return (jnp.pad(values, (0, padding)) if padding else values).reshape(-1, _ROW)


def _flat(rows: Float[Array, "rows columns"], size: int) -> Int32[Array, " N"]:
    return rows.astype(jnp.int32).reshape(-1)[:size]


def _carry(*sums: Float[Array, "*N"]) -> tuple[Float[Array, "*N"], ...]:
    """Sums of (whole, part) with the part under one; a single kind of sum as it is."""
    if len(sums) == 1:
        return sums
    whole, part = sums
    carried = jnp.floor(part / _UNITS)
    return whole + carried, part - carried * _UNITS


def _running(*kinds: Float[Array, "rows columns"]) -> tuple[Float[Array, "rows columns"], ...]:
    """Running sums along all rows of each kind; the part is not carried.

    By products with a triangular matrix: on CPU faster than `lax.associative_scan` and
    `jnp.cumsum`, and no work is repeated by fusion.
    """
    sums = [_product(x, _triangle(_ROW, 0)) for x in kinds]
    offsets = _before(*_carry(*(x[:, -1] for x in sums)))
    return tuple(x + offset[:, None] for x, offset in zip(sums, offsets, strict=True))


def _before(*kinds: Float[Array, " M"]) -> tuple[Float[Array, " M"], ...]:
    """Sums of all earlier ones, of each kind."""
    size = kinds[0].size
    if size <= _ROW:
        return _carry(*(_product(x[None], _triangle(size, 1))[0] for x in kinds))
    rows = [_rows(x) for x in kinds]
    offsets = _before(*_carry(*(jnp.sum(x, axis=1) for x in rows)))
    # the offset enters by the product too: added afterwards, the whole tower of offsets would be
    # worked out anew for every element of the level below
    weights = jnp.concatenate([_triangle(_ROW, 1), jnp.ones((1, _ROW), jnp.float32)])
    extended = [
        jnp.concatenate([x, offset[:, None]], axis=1)
        for x, offset in zip(rows, offsets, strict=True)
    ]
    return tuple(x.reshape(-1)[:size] for x in _carry(*(_product(x, weights) for x in extended)))


def _product(rows: Float[Array, "rows K"], weights: Float[Array, "K M"]) -> Float[Array, "rows M"]:
    return jnp.dot(rows, weights, precision=lax.Precision.HIGHEST)  # exact on GPU and TPU too


def _triangle(size: int, diagonal: int) -> Float[Array, "columns columns"]:
    return jnp.triu(jnp.ones((size, size), jnp.float32), diagonal)
