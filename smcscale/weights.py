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
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

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


def prefix_sum(values: Shaped[Array, " N"]) -> Shaped[Array, " N"]:
    """Running sums `(N,)`, added pairwise (on CPU faster than `jnp.cumsum`, and more exact)."""
    return lax.associative_scan(jnp.add, values)


class Counts(NamedTuple):
    """Nonnegative fixed-point numbers `whole + part / 2**32`, exact under addition.

    Attributes:
        whole: `(N,)` int32.
        part: `(N,)` uint32, in units of `2**-32`.
    """

    whole: Int32[Array, " N"]
    part: UInt32[Array, " N"]


def cumulative_counts(log_weights: LogWeights, n: int) -> Counts:
    """Running sums of the expected offspring `n * weights`, exact for ten million particles.

    Args:
        log_weights: `(N,)`, at least one of them above `-inf`.
        n: the total.
    Returns:
        counts: `(N,)`, nondecreasing; from the last living particle on exactly `(n, 0)`; equal to
        the one before where a particle is dead.
    """
    return scaled_prefix_sum(jnp.exp(log_weights - jnp.max(log_weights)), n)


def scaled_prefix_sum(values: Float[Array, " N"], total: int | Int32[Array, ""]) -> Counts:
    """Running sums of nonnegative numbers, scaled so that the last one is exactly `total`.

    A float32 sum of 1e7 has a spacing of 1, so whole and fractional parts are added as integers.
    """
    # a little low, so that what the float sum got wrong is always left to be added
    expected = values * (total * (1 - 2.0**-20) / jnp.sum(values))
    floor = expected.astype(jnp.int32)
    part = _as_part(expected - floor.astype(expected.dtype))
    running = prefix_sum(part)  # wraps around; a carry is where it fell
    whole = prefix_sum(floor + (running < part).astype(jnp.int32))
    last_whole, last_part = whole[-1], running[-1]
    missing = (total - last_whole).astype(jnp.float32) - last_part.astype(jnp.float32) * 2.0**-32
    correction = whole.astype(jnp.float32) * (missing / jnp.maximum(total, 1))
    carried = jnp.floor(correction)
    corrected = running + _as_part(correction - carried)
    whole_corrected = whole + carried.astype(jnp.int32) + (corrected < running).astype(jnp.int32)
    ended = (whole == last_whole) & (running == last_part) | (whole_corrected >= total)
    return Counts(
        jnp.where(ended, total, whole_corrected), jnp.where(ended, jnp.uint32(0), corrected)
    )


def _as_part(fraction: Float[Array, " N"]) -> UInt32[Array, " N"]:
    """A number in `[0, 1)` in units of `2**-32`, the last bit zero."""
    return (fraction * 2.0**31).astype(jnp.int32).astype(jnp.uint32) << 1
