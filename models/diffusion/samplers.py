"""Transitions: the law of a state one level lower, as a NumPyro distribution.

A sampler is `(denoiser, x, prediction, high, low) -> Distribution` of the state at `low`, for one
particle whose state `x` at `high` the denoiser has already read: `prediction`. A guided one returns
`Proposed(distribution, log_weight)`.

| sampler | the step | density |
|---|---|---|
| `DDIM(eta)` | data and noise moved to `low`, a share of the noise drawn anew | where `eta > 0` |
| `ancestral` | `DDIM(1.0)`, the DDPM sampler | yes |
| `DDPM()` | the same mean, with the larger of the two published variances | yes |
| `EulerMaruyama()` | reverse SDE of a VP or VE walk | yes |
| `FlowSDE(g)` | SDE of the same marginals as the flow, any noise `g` | where `g > 0` |
| `churn(schedule, ...)` | Karras et al.'s stochastic sampler, Euler or Heun | where noise is added |

"Density" is of a step into a level with noise. A step into level 0 of most schedules adds none
(`DDIM`, `DDPM` with `sigma_0 = 0`; `FlowSDE` and `churn` never do): it is a point mass, its
`log_prob` is not finite, and it can only be run as a bootstrap step, which is all that `denoise`
does. A sampler whose steps never draw (`DDIM(0.0)`, `FlowSDE(zero)`) makes copies of a particle
identical for ever: resampling needs noise.

With a `prediction.variance`, `DDIM` and `DDPM` add what a point prediction loses (see `DDIM`).

Source: Song, Meng & Ermon 2021, equation 12 (DDIM); Ho et al. 2020, section 3.2; Song et al. 2021,
equation 6; Karras et al. 2022, algorithm 2; Kim et al. 2025 (arXiv 2503.19385).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.schedules import (
    Level,
    Schedule,
    added_noise,
    as_schedule,
    bridge,
    increments,
)

Network = Callable[[Array, Level], Prediction]


class Proposed(NamedTuple):
    """A step that is drawn from another law than the model's, or that carries a weight.

    Attributes:
        distribution: what the state at `low` is drawn from.
        log_weight: `(drawn state) -> ()`, nats: log density of the model's own transition minus that
            of `distribution`, a corrector's increment, or both.
    """

    distribution: Any
    log_weight: Callable[[Array], Float[Array, ""]]


class Constant(eqx.Module):
    """A log-weight that is the same for all states: of a start that is drawn given what is observed.

    Attributes:
        log_weight: `()`, nats.
    """

    log_weight: Float[Array, ""]

    def __call__(self, state: Array) -> Float[Array, ""]:
        """The log-weight."""
        return self.log_weight


class DDIM(eqx.Module):
    """Data and noise moved to the lower level; a share of the noise is drawn anew.

    The mean is `alpha_low x_0 + sqrt(sigma_low^2 - v) eps` with `v = eta^2` times the variance of
    `bridge`. A point prediction of `x_0` forgets its own variance, so that no number of steps below
    infinity is exact; where the prediction has a `variance`, it is added, through the factor of `x_0`
    in the mean, which makes normal data exact at any number of steps.

    Attributes:
        eta: 0 deterministic, 1 ancestral.
    """

    eta: ArrayLike = 1.0

    def __call__(
        self, denoiser: Network | None, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`, a normal with independent coordinates."""
        variance = jnp.asarray(self.eta) ** 2 * bridge(high, low).variance
        mean, kept = _down(prediction, low, variance)
        if prediction.variance is not None:
            # x_0 enters twice: as data, and through eps = (x - alpha x_0) / sigma
            factor = low.alpha - kept * high.alpha / high.sigma
            variance = variance + factor**2 * prediction.variance
        return _normal(mean, variance)


#: the DDPM sampler of Ho et al. 2020: `DDIM(1.0)`
ancestral = DDIM(1.0)


class DDPM(eqx.Module):
    """The mean of `ancestral` with the larger variance: that of the forward step.

    Right for data that are standard normal, as the smaller one is for a single point; the published
    `variance_type="fixed_large"`. The step into level 0 draws nothing.
    """

    def __call__(
        self, denoiser: Network | None, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`."""
        mean, _ = _down(prediction, low, bridge(high, low).variance)
        return _normal(mean, jnp.where(low.sigma > 0, added_noise(high, low), 0.0))


class EulerMaruyama(eqx.Module):
    """Euler-Maruyama step of the reverse SDE of a variance-preserving or -exploding walk.

    `dx = [f x - g^2 score] dt + g dw` backwards, with `f dt` and `g^2 dt` integrated over the step:
    `f dt = -log(alpha_low / alpha_high)`, and `g^2 dt` its double (VP) or the change of `sigma^2` (VE).
    It draws noise in every step, the last one too.
    """

    def __call__(
        self, denoiser: Network | None, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`."""
        growth, variance = increments(high, low)
        return _normal(x + growth * x + variance * prediction.score(high), variance)


class FlowSDE(eqx.Module):
    """A step of the SDE with the marginals of the flow, for any noise `g`.

    `dx = [u - (g^2 / 2) score] dt + g dw` backwards, u the velocity and t counted by sigma. The part of u
    is moved exactly (`alpha`, `sigma` from `high` to `low`), which is Euler's step where alpha is linear
    in sigma. Near the data the score is as large as `1 / sigma`: `g` should fall with sigma, or steps be
    short. The last step is the flow's alone.

    Attributes:
        g: `(level) -> ()`, or a number that multiplies sigma. 0 is the flow itself.
    """

    g: Callable[[Level], Array] | ArrayLike = 1.0

    def __call__(
        self, denoiser: Network | None, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`."""
        g = self.g(high) if callable(self.g) else self.g * high.sigma
        variance = jnp.where(low.sigma > 0, g**2 * (high.sigma - low.sigma), 0.0)
        along = low.alpha * prediction.x0 + low.sigma * prediction.eps
        return _normal(along + variance / 2 * prediction.score(high), variance)


class Churn(eqx.Module):
    """One step of Karras et al.'s sampler on the levels that `churn` raised.

    Attributes:
        floor: `(K + 1,)`, sigma of every level before noise was added again.
        noise: factor of that noise's standard deviation.
        heun: whether the step is corrected by a second call of the denoiser, at its end.
    """

    floor: Float[Array, " levels"]
    noise: float = 1.003
    heun: bool = eqx.field(static=True, default=True)

    @property
    def extra_calls(self) -> int:
        """Calls of the denoiser in a step that is not the last, beside the one of its start."""
        return int(self.heun)

    def __call__(
        self, denoiser: Network, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at the raised level `low`."""
        floor = self.floor[low.index]
        step = floor - high.sigma
        down = x + step * prediction.eps
        if self.heun:
            # into level 0 there is no slope to correct by: `denoise` counts no call there
            at = low._replace(sigma=floor, tau=floor)
            slope = lax.cond(floor > 0, lambda: denoiser(down, at).eps, lambda: prediction.eps)
            down = x + step * (prediction.eps + slope) / 2
        return _normal(down, self.noise**2 * jnp.maximum(low.sigma**2 - floor**2, 0))


def churn(
    schedule: Schedule,
    *,
    amount: float,
    sigma_min: float = 0.05,
    sigma_max: float = 50.0,
    noise: float = 1.003,
    heun: bool = True,
) -> tuple[Schedule, Churn]:
    """Karras et al.'s stochastic sampler: the schedule it walks on, and its step.

    The published step adds noise (from sigma to `sigma (1 + gamma)`), then follows the flow down. Here
    a state is what the network is asked about, the state with the noise added, and a step first goes
    down, then adds noise: the same walk cut at another place, in which every network call serves the
    potential as well, and a step is normal given its parent, with a density wherever noise is added.

    Args:
        schedule: levels with alpha 1, such as `edm(...)`.
        amount: S_churn; noise is raised by `gamma = min(amount / K, sqrt(2) - 1)`.
        sigma_min, sigma_max: S_tmin and S_tmax, the levels where noise is added.
        noise: S_noise, factor of the added noise's standard deviation.
        heun: second-order steps, at twice the calls (less one); False for Euler.
    Returns:
        the raised schedule, and the sampler for it.
    Source: Karras et al. 2022, algorithm 2.
    """
    if bool(jnp.any(schedule.alpha != 1)):
        raise ValueError(
            "smcscale: churn adds noise to a state, so it needs a schedule with alpha 1.\n"
            "  try: edm(num_steps) or ve(num_steps)."
        )
    gamma = min(amount / schedule.num_steps, 2**0.5 - 1)
    inside = (schedule.sigma >= sigma_min) & (schedule.sigma <= sigma_max)
    sigma = jnp.where(inside, (1 + gamma) * schedule.sigma, schedule.sigma)
    # the walk starts at the noise added to the first level, too
    extra = noise**2 * (sigma[-1] ** 2 - schedule.sigma[-1] ** 2)
    start = jnp.sqrt(schedule.initial_scale**2 + extra)
    raised = as_schedule(
        schedule.alpha, sigma, sigma, schedule.alpha_rate, schedule.sigma_rate, start
    )
    return raised, Churn(schedule.sigma, noise, heun)


def _down(prediction: Prediction, low: Level, variance: Array) -> tuple[Array, Array]:
    """Mean of a state at `low` with `variance` to be added, and the noise's share in it."""
    kept = jnp.sqrt(jnp.maximum(low.sigma**2 - variance, 0))  # rounding may leave -1e-9
    return low.alpha * prediction.x0 + kept * prediction.eps, kept


def _normal(mean: Array, variance: Array) -> Any:
    # a scale of 0, where a step draws nothing, is meant: NumPyro would refuse it outside jit
    return dist.Normal(mean, jnp.sqrt(variance), validate_args=False).to_event(jnp.ndim(mean))
