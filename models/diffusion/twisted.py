"""Guided proposals: steps that look up the slope of the reward, and are weighed for it.

Steering alone (`potentials.py`) waits for particles that happen to go the right way. A guided sampler
moves them there, along the gradient of `lambda r(E[x_0 | x])` through the network, and returns the ratio
of the model's density to its own, so that target and evidence stay those of the steering.

    steering = Steering(reward, strength=10.0)
    smc.run(key, Sloped(denoiser, steering), schedule, steering, shape=..., sampler=Twisted(steering))

| published as | here |
|---|---|
| TDS (Wu et al. 2023) | `Steering(log_likelihood, value=NoisyLikelihood(...))`, `Twisted(steering, by=data_shift)`, or the gentler `mean_shift` |
| DAS (Kim et al. 2025) | `Steering(reward, strength, tempering=Exponential(0.008))` |
| classifier guidance, with weights | reward `log p(class | x_0)` |

The gradient is of what the steering reads off a state; it comes with the prediction, from one pass forward and
one backward through the network. A step into a level without noise has no density: there the model's
own step is taken and no weight is due, as in the published code. Any shift gives the same target; a poor
one gives a large variance.

Source: Wu et al. 2023, "Practical and asymptotically exact conditional sampling in diffusion models"
(arXiv 2306.17775); Kim, Kim & Park 2025 (arXiv 2501.05803).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.potentials import Steering, full
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Network, Proposed, ancestral
from smcscale.models.diffusion.schedules import Level


class Slope(NamedTuple):
    """What `Sloped` adds to a prediction.

    Attributes:
        gradient: shape of the state, of `r(E[x_0 | x])` with respect to `x`.
    """

    gradient: Float[Array, "..."]


class Sloped(eqx.Module):
    """A denoiser whose predictions carry the gradient of what a steering reads off them.

    Attributes:
        denoiser: `(x, level) -> Prediction`.
        steering: its reward, or its value, must be differentiable.
        bound: longest gradient, by its norm; longer ones are shortened. Nets of finite training give
            wild gradients at the noise end.
    """

    denoiser: Network
    steering: Steering
    bound: float | None = None

    def __call__(self, x: Float[Array, "..."], level: Level) -> Prediction:
        """The prediction, with `extra` a `Slope`; one call forward and one backward."""

        def value(x: Array) -> tuple[Array, Prediction]:
            prediction = self.denoiser(x, level)
            return self.steering.read(x, prediction, level), prediction

        gradient, prediction = jax.grad(value, has_aux=True)(x)
        if self.bound is not None:
            norm = jnp.sqrt(jnp.sum(gradient**2))
            gradient = gradient * jnp.minimum(1.0, self.bound / jnp.maximum(norm, 1e-30))
        return prediction._replace(extra=Slope(gradient))


class NoisyLikelihood(eqx.Module):
    """Value of a noisy state for a steering by `log N(y; forward(x_0), scale^2)`.

    The prediction is less certain than the data: at a level its variance is taken as
    `sigma^2 / (alpha^2 + sigma^2)`, that of data with variance 1, and added to the noise of `y`.

    Attributes:
        forward: `x_0 -> ` shape of `y`.
        y: what was observed.
        scale: standard deviation of its noise.
    Source: Song et al. 2023, "Pseudoinverse-guided diffusion models".
    """

    forward: Callable[[Array], Array]
    y: Float[Array, "..."]
    scale: ArrayLike

    def __call__(self, x: Array, prediction: Prediction, level: Level) -> Float[Array, ""]:
        """Log density `()`, nats."""
        added = level.sigma**2 / (level.alpha**2 + level.sigma**2)
        law = dist.Normal(self.forward(prediction.x0), jnp.sqrt(self.scale**2 + added))
        return jnp.sum(law.log_prob(self.y))


def mean_shift(
    prediction: Prediction, slope: Array, high: Level, low: Level, step: Any
) -> tuple[Prediction, Array]:
    """Mean moved by its variance times the slope: the locally optimal normal step, to first order.

    Gives the prediction as it is, and the shift of the step's mean.
    """
    return prediction, step.variance.reshape(slope.shape) * slope


def data_shift(
    prediction: Prediction, slope: Array, high: Level, low: Level, step: Any
) -> tuple[Prediction, Array]:
    """Predicted data moved by `sigma^2 / alpha` times the slope, the noise left: as published in TDS.

    Some times longer than `mean_shift` on coarse grids, without a bound near the data: heavy tails.
    """
    shift = high.sigma**2 / high.alpha * slope
    return prediction._replace(x0=prediction.x0 + shift), jnp.zeros_like(slope)


class Twisted(eqx.Module):
    """Another sampler's step, moved along the slope of a steering, and weighed for it.

    Attributes:
        steering: the one that weighs the states; its strength and tempering are those of the shift.
        num_steps: K, for a tempered steering.
        sampler: a sampler whose steps are normal, such as `ancestral`.
        by: `mean_shift` or `data_shift`, or one's own.
        scale: factor of the shift; less than 1 is careful, and as exact.
    """

    steering: Steering
    num_steps: int | None = eqx.field(static=True, default=None)
    sampler: Callable[..., Any] = ancestral
    by: Callable[..., tuple[Prediction, Array]] = mean_shift
    scale: ArrayLike = 1.0

    def __call__(
        self, denoiser: Network, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Proposed:
        """The guided step, and the log density of the model's own minus its own.

        Raises:
            TypeError: the denoiser's predictions carry no slope, or the sampler's steps are weighed.
            ValueError: a tempered steering, and no `num_steps`.
        """
        if not isinstance(prediction.extra, Slope):
            raise TypeError(
                "smcscale: Twisted needs predictions with a slope, which this denoiser does not give.\n"
                "  try: Sloped(denoiser, steering)."
            )
        share = self.steering.strength * self.scale
        if self.steering.tempering is not full:
            if self.num_steps is None:
                raise ValueError(
                    "smcscale: the Twisted of a tempered steering must know how many steps there are.\n"
                    "  try: Twisted(steering, num_steps=schedule.num_steps)."
                )
            share = share * self.steering.tempering(self.num_steps - low.index)
        plain = prediction._replace(extra=None)
        own = self.sampler(denoiser, x, plain, high, low)
        if isinstance(own, Proposed):
            raise TypeError(
                f"smcscale: Twisted moves plain normal steps, not those of {self.sampler!r}."
            )
        slope = share * prediction.extra.gradient
        moved, shift = self.by(plain, slope, high, low, own)
        law = self.sampler(denoiser, x, moved, high, low)
        # no density without noise: the model's own step, for which no weight is due
        noisy = jnp.all(own.variance > 0)
        mean = jnp.where(noisy, law.mean + shift, own.mean)
        scale = jnp.sqrt(own.variance)
        law = dist.Normal(mean, scale, validate_args=False).to_event(jnp.ndim(x))

        def log_weight(state: Array) -> Array:
            safe = jnp.where(noisy, scale, 1.0)
            one, other = (state - own.mean) / safe, (state - mean) / safe
            return jnp.where(noisy, jnp.sum(other**2 - one**2) / 2, 0.0)

        return Proposed(law, log_weight)
