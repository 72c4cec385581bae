"""What a network predicts, and the one form that samplers read: data and noise of a state.

A network is a plain callable `(x, tau)` or `(x, tau, condition)` of one particle: a function, an
Equinox module, a Flax NNX module. `Denoiser` puts it behind `(x, level) -> Prediction`; anything
else with that signature (such as `mixtures.ExactDenoiser`) will do.

| parameterization | the network gives | in terms of `x_0`, eps |
|---|---|---|
| `eps` | the noise | eps |
| `x0` | the data | `x_0` |
| `v` | Salimans & Ho's v | `alpha eps - sigma x_0` |
| `score` | gradient of the log density of `x` | `-eps / sigma` |
| `velocity` | slope of the interpolant | `alpha' x_0 + sigma' eps`, primes by time |

All are expectations given `x`, and `x = alpha x_0 + sigma eps` holds for the expectations too, so
that each is an exact, linear function of any other: `v.write(eps.read(network(x, tau), x, level),
level)`. Where `alpha` is 0, `eps` and `score` say nothing of the data and cannot be read.

Source: Salimans & Ho 2022, appendix D (v); Karras et al. 2022, table 1 (`Preconditioned`); Albergo et
al. 2023, section 2 (velocity).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from smcscale.models.diffusion.schedules import Level


class Prediction(NamedTuple):
    """What is known of a noisy state's parts.

    Attributes:
        x0: shape of the state, `E[x_0 | x]`.
        eps: likewise, `E[eps | x]`.
        variance: likewise, `Var(x_0 | x)` of every coordinate, or None where it is not known.
        extra: what a guided sampler reads beside it (`twisted.Slope`, `correctors.Parts`), or None.
    """

    x0: Float[Array, "..."]
    eps: Float[Array, "..."]
    variance: Float[Array, "..."] | None = None
    extra: Any = None

    def score(self, level: Level) -> Float[Array, "..."]:
        """Gradient of the log density of the state at its level."""
        return -self.eps / level.sigma


class Parameterization(NamedTuple):
    """One thing that a network may predict.

    Attributes:
        read: `(output, x, level) -> Prediction`.
        write: `(prediction, level) -> output`, its inverse.
    """

    read: Callable[[Array, Array, Level], Prediction]
    write: Callable[[Prediction, Level], Array]


def _read_eps(output: Array, x: Array, level: Level) -> Prediction:
    return Prediction((x - level.sigma * output) / level.alpha, output)


def _read_x0(output: Array, x: Array, level: Level) -> Prediction:
    return Prediction(output, (x - level.alpha * output) / level.sigma)


def _read_v(output: Array, x: Array, level: Level) -> Prediction:
    size = level.alpha**2 + level.sigma**2  # 1 where the variance is preserved
    x0 = (level.alpha * x - level.sigma * output) / size
    return Prediction(x0, (level.sigma * x + level.alpha * output) / size)


def _read_score(output: Array, x: Array, level: Level) -> Prediction:
    return _read_eps(-level.sigma * output, x, level)


def _read_velocity(output: Array, x: Array, level: Level) -> Prediction:
    a, b, a_rate, b_rate = level.alpha, level.sigma, level.alpha_rate, level.sigma_rate
    turn = a * b_rate - a_rate * b
    return Prediction((b_rate * x - b * output) / turn, (a * output - a_rate * x) / turn)


eps = Parameterization(_read_eps, lambda p, level: p.eps)
x0 = Parameterization(_read_x0, lambda p, level: p.x0)
v = Parameterization(_read_v, lambda p, level: level.alpha * p.eps - level.sigma * p.x0)
score = Parameterization(_read_score, lambda p, level: p.score(level))
velocity = Parameterization(
    _read_velocity, lambda p, level: level.alpha_rate * p.x0 + level.sigma_rate * p.eps
)


class Denoiser(eqx.Module):
    """A network as `(x, level) -> Prediction`.

    Args:
        network: `(x, tau) -> array of x's shape`, with a `condition` `(x, tau, condition)`.
        predicts: what the network gives: `eps`, `x0`, `v`, `score` or `velocity`.
        condition: class label, embedding, ..., the network's third argument.
        clip: bound of the data; predictions of it are cut to `[-clip, clip]`, and the noise is what
            is then left of the state.
        variance: `(x, tau) -> Var(x_0 | x)` of every coordinate, for samplers that add it.
    """

    network: Callable[..., Array]
    predicts: Parameterization = eqx.field(static=True)
    condition: PyTree
    clip: float | None
    variance: Callable[..., Array] | None

    def __init__(
        self,
        network: Any,
        predicts: Parameterization,
        *,
        condition: PyTree = None,
        clip: float | None = None,
        variance: Callable[..., Array] | None = None,
    ):
        if not callable(network):
            raise TypeError(
                f"smcscale: `network` of a Denoiser must be callable as network(x, tau), got "
                f"{type(network).__name__}."
            )
        if not isinstance(predicts, Parameterization):
            raise TypeError(
                f"smcscale: `predicts` must be a Parameterization, got {predicts!r}.\n"
                "  try: smcscale.models.diffusion.predictors.eps, x0, v, score or velocity."
            )
        pure: Any = Frozen(network) if isinstance(network, nnx.Module) else network
        self.network = pure
        self.predicts = predicts
        self.condition = condition
        self.clip = clip
        self.variance = variance

    def __call__(self, x: Float[Array, "..."], level: Level) -> Prediction:
        """One call of the network, for one state at a level with noise."""
        given = () if self.condition is None else (self.condition,)
        output = self.network(x, level.tau, *given)
        if jnp.shape(output) != jnp.shape(x):
            raise ValueError(
                f"smcscale: the network gives an array of shape {jnp.shape(output)} for a state of "
                f"shape {jnp.shape(x)}.\n  try: a network of one particle, without a batch axis."
            )
        prediction = self.predicts.read(output, x, level)
        if self.clip is not None:
            bounded = jnp.clip(prediction.x0, -self.clip, self.clip)
            prediction = x0.read(bounded, x, level)
        if self.variance is None:
            return prediction
        return prediction._replace(variance=self.variance(x, level.tau, *given))


class Frozen(eqx.Module):
    """A Flax NNX module as a pure function: its graph is static, its arrays are leaves."""

    graph: Any = eqx.field(static=True)
    state: Any

    def __init__(self, module: Any):
        self.graph, self.state = nnx.split(module)

    def __call__(self, *args: Any) -> Array:
        return nnx.merge(self.graph, self.state)(*args)


class Preconditioned(eqx.Module):
    """Karras et al.'s scaling around a raw network: a predictor of `x0` for the `edm` schedule.

    Attributes:
        network: `(c_in x, log(sigma) / 4)`, and a condition if there is one.
        sigma_data: standard deviation of the data.
        sign: -1 for a raw network that gives v in place of noise (`EDMEulerScheduler` of
            `diffusers` with `prediction_type="v_prediction"`).
    """

    network: Callable[..., Array]
    sigma_data: float = 0.5
    sign: float = eqx.field(static=True, default=1.0)

    def __call__(self, x: Float[Array, "..."], tau: Float[Array, ""], *condition: Any) -> Array:
        """`E[x_0 | x]` at noise `tau`; shape of x."""
        total = tau**2 + self.sigma_data**2
        raw = self.network(x / jnp.sqrt(total), jnp.log(tau) / 4, *condition)
        outer = self.sign * tau * self.sigma_data / jnp.sqrt(total)
        return self.sigma_data**2 / total * x + outer * raw


class Converted(eqx.Module):
    """A denoiser of one interpolant, asked at the levels of another.

    A state of the new interpolant is one of the old, at the level with the same `alpha / sigma`, times
    a number; data and noise are those of the old. A network trained on straight lines is so run on
    variance-preserving levels, whose sampling is more diverse at equal calls.

    Attributes:
        denoiser: `(x, level) -> Prediction` of the old interpolant.
        level_at: `alpha / sigma -> Level` of the old one, such as `straight_level`.
    Source: Kim et al. 2025, "Inference-time scaling for flow models" (arXiv 2503.19385).
    """

    denoiser: Callable[[Array, Level], Prediction]
    level_at: Callable[[Array], Level]

    def __call__(self, x: Float[Array, "..."], level: Level) -> Prediction:
        """The old denoiser's prediction for the same data and noise."""
        old = self.level_at(level.alpha / level.sigma)
        return self.denoiser(x * old.sigma / level.sigma, old._replace(index=level.index))


def straight_level(ratio: Float[Array, "..."]) -> Level:
    """The level of rectified flow where `alpha / sigma` is `ratio`."""
    tau = 1 / (1 + ratio)
    one = jnp.ones_like(tau)
    return Level(1 - tau, tau, tau, -one, one, jnp.zeros(tau.shape, jnp.int32))


def preserving_level(ratio: Float[Array, "..."], beta_min: float = 0.1, beta_max: float = 20.0):
    """The level of `vp_linear` where `alpha / sigma` is `ratio`."""
    integral = jnp.log1p(ratio**-2)  # alpha^2 = exp(-integral)
    width = beta_max - beta_min
    tau = 2 * integral / (beta_min + jnp.sqrt(beta_min**2 + 2 * width * integral))
    alpha, sigma = jnp.exp(-integral / 2), jnp.sqrt(-jnp.expm1(-integral))
    rate = -(beta_min + width * tau) * alpha / 2
    return Level(alpha, sigma, tau, rate, -alpha * rate / sigma, jnp.zeros(tau.shape, jnp.int32))
