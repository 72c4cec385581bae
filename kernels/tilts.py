"""Resample with other weights: `(log_weights, time) -> log_weights (N,)`.

A tilt gives the law `v` to resample with; the engine keeps the quotient of weight and `v` as
importance weight, so that the evidence stays unbiased. What is dead stays dead, and what lives
stays alive.

| tilt | resampled with | for |
|---|---|---|
| `Soft(alpha)` | weights mixed with the uniform law | gradients through the weights |
| `stop_gradient` | the same weights, without gradient | the particle score |
| `Optimal(n)` | weights cut at the level c, then systematic resampling | discrete states, prefixes |
| `Composed(tilts)`, `compose(...)` | one tilt after another | |

Read next: `annealing.py` (tilts by inverse temperature), `lookahead.py` (tilts by the future).
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from smcscale.types import LogWeights, Tilt, Time
from smcscale.weights import log_normalize


class Soft(eqx.Module):
    """Tilt: `alpha` parts of the weights, `1 - alpha` parts of the uniform law on survivors.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        time: not used.
    Returns:
        log_weights: `(N,)`, normalised: `log(alpha W + (1 - alpha) / number alive)`.
    Properties: evidence unbiased; gradient: through the weights only, biased, as the ancestors
        are discrete.
    Source: Karkus, Hsu & Lee 2018, section 3.3; uniform on survivors instead of on all.
    """

    alpha: float = 0.5

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        alive = log_weights > -jnp.inf
        number = jnp.maximum(jnp.sum(alive), 1)
        weights = jnp.exp(jnp.where(alive, log_normalize(log_weights), -jnp.inf))
        mixed = self.alpha * weights + (1 - self.alpha) / number
        # the inner where keeps the gradient of log away from zero
        return jnp.where(alive, jnp.log(jnp.where(alive, mixed, 1)), -jnp.inf)


def stop_gradient(log_weights: LogWeights, time: Time) -> LogWeights:
    """The same log-weights without gradient, so that weights keep theirs through resampling.

    Args:
        log_weights: `(N,)`, unnormalised, nats.
        time: not used.
    Returns:
        log_weights: `(N,)`, equal to those given.
    Properties: evidence unbiased and unchanged in value; gradient: zero through this law, so the
        quotient carries it: exact for `E[evidence]`, biased for `log evidence` at finite N.
    Source: Scibior & Wood 2021, section 4.
    """
    return lax.stop_gradient(log_weights)


class Optimal(eqx.Module):
    """Tilt: weights cut at the level c at which `sum min(W / c, 1) = n`.

    Followed by **systematic** resampling to n ancestors, every particle with `W >= c` is kept once
    with its weight, and every other one survives at most once, with weight c. Stratified uniforms
    would give duplicates. If at most n particles are alive all are kept.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats, usually `N > n`.
        time: not used.
    Returns:
        log_weights: `(N,)`, unnormalised: `min(log W, log c)`.
    Properties: evidence unbiased; least squared error among schemes that keep n of N; O(N log N);
        gradient: biased.
    Source: Fearnhead & Clifford 2003, section 3.2 and appendix; tails summed from the small end.
    """

    n: int

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        largest = jnp.max(log_weights)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        descending = -jnp.sort(-log_weights)
        weights = jnp.exp(descending - largest)
        tails = lax.associative_scan(jnp.add, weights, reverse=True)
        rank = jnp.arange(weights.size)
        # number kept for sure: the first k < n with w_k (n - k) <= the sum of w_k and below
        enough = (weights * (self.n - rank) <= tails) & (rank < self.n) & (weights > 0)
        kept = jnp.argmax(enough)
        level = tails[kept] / jnp.maximum(self.n - kept, 1)
        lowest = jnp.min(jnp.where(log_weights > -jnp.inf, log_weights, jnp.inf))
        log_level = jnp.where(jnp.any(enough), jnp.log(level) + largest, lowest)
        return jnp.minimum(log_weights, log_level)


class Composed(eqx.Module):
    """Tilt: several tilts, each given the log-weights of the one before.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        time: passed on.
    Returns:
        log_weights: `(N,)`, of the last.
    """

    tilts: tuple[Tilt, ...]

    @property
    def bias(self) -> str | None:
        """The first bias among the parts, "no target" before "asymptotic"."""
        found = [getattr(tilt, "bias", None) for tilt in self.tilts]
        return max(filter(None, found), default=None)

    @property
    def corrected(self) -> bool:
        """Whether every part keeps its quotient."""
        return all(getattr(tilt, "corrected", True) for tilt in self.tilts)

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        for tilt in self.tilts:
            log_weights = tilt(log_weights, time)
        return log_weights


def compose(*tilts: Tilt) -> Composed:
    """One tilt made of several, applied from left to right."""
    return Composed(tilts)
