"""Arithmetic of log-weights `(N,)`: unnormalised, in nats, `-inf` for a dead particle.

| function | what comes out |
|---|---|
| `normalize` | weights that sum to one |
| `log_normalize` | their logarithms |
| `ess` | effective sample size |
| `log_mean_exp` | log of the mean weight |
| `cool` | weights to a power, the dead kept dead |
| `largest_beta` | the largest power that keeps a condition |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from smcscale.types import LogWeights


def _scaled(log_weights: LogWeights) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """Weights over the largest one, and its logarithm (0 when all are dead)."""
    largest = lax.stop_gradient(jnp.max(log_weights))
    largest = jnp.where(largest == -jnp.inf, jnp.zeros_like(largest), largest)
    return jnp.exp(log_weights - largest), largest


def normalize(log_weights: LogWeights) -> Float[Array, " N"]:
    """Weights `(N,)` that sum to one; equal ones when every particle is dead.

    Properties: NaN stays NaN; gradient: exact.
    """
    scaled, _ = _scaled(log_weights)
    total = jnp.sum(scaled)
    dead = total == 0
    return jnp.where(dead, 1 / log_weights.size, scaled / jnp.where(dead, 1, total))


def log_normalize(log_weights: LogWeights) -> LogWeights:
    """Log-weights `(N,)` whose exponentials sum to one; equal ones when every particle is dead.

    Properties: NaN stays NaN; gradient: exact.
    """
    scaled, largest = _scaled(log_weights)
    total = jnp.sum(scaled)
    dead = total == 0
    normalized = log_weights - (largest + jnp.log(jnp.where(dead, 1, total)))
    return jnp.where(dead, -jnp.log(jnp.asarray(log_weights.size, total.dtype)), normalized)


def ess(log_weights: LogWeights) -> Float[Array, ""]:
    """Effective sample size `(sum w)^2 / sum w^2`, in `[1, N]`; 0 when every particle is dead.

    Properties: NaN stays NaN, so compare with `not (ess >= floor)`; gradient: exact.
    """
    scaled, _ = _scaled(log_weights)
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
