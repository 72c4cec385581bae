"""Tilts by inverse temperature: `(log_weights, time) -> beta * log_weights (N,)`, beta in [0, 1].

Resampling with cooled weights keeps more particles alive; the engine keeps the rest of the weight.
`corrected=False` forgets it instead, as the literature on language models does: such a run has no
target, and its evidence is refused. Each module has `.beta(log_weights, time) -> ()`.

| annealing | beta |
|---|---|
| `Fixed(beta)` | a number, or a function of time |
| `ESSFloor(fraction)` | the largest that keeps the ESS at a fraction of the living particles |
| `Entropic(num_steps, schedule)` | early in the run, while few particles hold the weight, by |
| | a schedule: `FromESS()`, `FromEntropy()` or `FromProgress()` |

`time` is the number of rows made. Read next: `tilts.py`.
"""

from collections.abc import Callable
from typing import Protocol

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcscale.types import LogWeights, Time
from smcscale.weights import cool, ess, largest_beta, normalize


def _bias(corrected: bool) -> str | None:
    return None if corrected else "no target"


class Fixed(eqx.Module):
    """Annealing: a fixed beta, or one that depends on time.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        time: rows made.
    Returns:
        log_weights: `(N,)`, unnormalised, times beta; the dead stay dead at beta 0 too.
    Properties: evidence unbiased when corrected; gradient: exact through the weights.
    """

    beta_or_schedule: float | Callable[[Time], Float[Array, ""] | float]
    corrected: bool = True

    @property
    def bias(self) -> str | None:
        """ "no target" when not corrected."""
        return _bias(self.corrected)

    def beta(self, log_weights: LogWeights, time: Time) -> Float[Array, ""]:
        """Inverse temperature `()` at this time."""
        value = self.beta_or_schedule
        return jnp.asarray(value(time) if callable(value) else value, log_weights.dtype)

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        return cool(log_weights, self.beta(log_weights, time))


class ESSFloor(eqx.Module):
    """Annealing: the largest beta whose ESS stays above a fraction of the living particles.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        time: not used.
    Returns:
        log_weights: `(N,)`, unnormalised, times beta: 1 when the ESS suffices as it is.
    Properties: evidence unbiased when corrected; `iterations` halvings, beta low by at most
        `2 ** -iterations`; gradient: biased, as beta is found by bisection.
    Source: Jasra et al. 2011, section 3.3, as a rule for resampling instead of tempering.
    """

    fraction: float = 0.5
    iterations: int = 20
    corrected: bool = True

    @property
    def bias(self) -> str | None:
        """ "no target" when not corrected."""
        return _bias(self.corrected)

    def beta(self, log_weights: LogWeights, time: Time) -> Float[Array, ""]:
        """Inverse temperature `()` for these weights."""
        floor = self.fraction * jnp.sum(log_weights > -jnp.inf)
        return largest_beta(lambda cooled: ess(cooled) >= floor, log_weights, self.iterations)

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        return cool(log_weights, self.beta(log_weights, time))


class TemperatureSchedule(Protocol):
    """A temperature from weights and progress, at least 1."""

    def __call__(self, log_weights: LogWeights, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Temperature `()`; `progress` is rows made over rows in all, in `[0, 1]`."""
        ...


class FromESS(eqx.Module):
    """Temperature `(N / ess) (1 - progress)`, in `[1, N (1 - progress)]`."""

    def __call__(self, log_weights: LogWeights, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Temperature `()`; see the class."""
        return jnp.maximum(1, log_weights.size / ess(log_weights) * (1 - progress))


class FromEntropy(eqx.Module):
    """Temperature `1 / (h + (1 - h) progress)`, h the entropy over its maximum: `[1, 1/progress]`.

    Source: as `FromESS`; the published code does not divide the entropy for N = 2, here it is
    divided for every N.
    """

    def __call__(self, log_weights: LogWeights, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Temperature `()`; see the class."""
        if log_weights.size == 1:
            return jnp.ones((), log_weights.dtype)
        weights = normalize(log_weights)
        logs = jnp.log(jnp.where(weights > 0, weights, 1))
        entropy = -jnp.sum(weights * logs) / jnp.log(jnp.asarray(weights.size, weights.dtype))
        # before the first row a single survivor gives 1 / 0: an infinite temperature, beta 0
        return jnp.maximum(1, 1 / (entropy + (1 - entropy) * progress))


class FromProgress(eqx.Module):
    """Temperature `2 - progress`, in `[1, 2]`, whatever the weights."""

    def __call__(self, log_weights: LogWeights, progress: Float[Array, ""]) -> Float[Array, ""]:
        """Temperature `()`; see the class."""
        return jnp.maximum(1, 2 - progress)


class Entropic(eqx.Module):
    """Annealing: `beta = 1 / temperature` early in the run, while few particles hold the weight.

    It acts while `ess < ess_threshold * N` and `progress = time / num_steps < early_phase`; else
    beta is 1. That it stops at once at both thresholds is the published rule.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats, cumulated since the last resampling.
        time: rows made.
    Returns:
        log_weights: `(N,)`, unnormalised, times beta.
    Properties: evidence unbiased when corrected, though beta depends on the particles; gradient:
        exact through the weights.
    Source: Giannone et al. 2025, "Mitigating premature exploitation"; the published method is
        `corrected=False` with resampling at every row.
    """

    num_steps: int
    schedule: TemperatureSchedule = FromESS()
    ess_threshold: float = 0.5
    early_phase: float = 0.5
    corrected: bool = True

    @property
    def bias(self) -> str | None:
        """ "no target" when not corrected."""
        return _bias(self.corrected)

    def beta(self, log_weights: LogWeights, time: Time) -> Float[Array, ""]:
        """Inverse temperature `()` for these weights at this time."""
        size = log_weights.size
        progress = jnp.asarray(time, log_weights.dtype) / self.num_steps
        effective = ess(log_weights)
        # false for NaN and when all are dead (ess 0): beta 1
        early = (effective < self.ess_threshold * size) & (progress < self.early_phase)
        active = early & (effective > 0)
        temperature = self.schedule(jnp.where(active, log_weights, 0), progress)
        return jnp.where(active, 1 / temperature, 1).astype(log_weights.dtype)

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        return cool(log_weights, self.beta(log_weights, time))
