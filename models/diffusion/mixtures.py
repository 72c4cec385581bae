"""Gaussian mixtures: a diffusion model in which everything has an exact answer.

Of data from a mixture, the law at every level, the denoiser, the reverse kernel and the law tilted by a
quadratic reward are mixtures again, and the evidence of steering is a sum over components.

| name | what it is |
|---|---|
| `GaussianMixture` | weights, means, covariances; `noised`, `posterior`, `tilted`, moments |
| `Quadratic`, `gaussian_likelihood` | rewards that keep a mixture a mixture |
| `ExactDenoiser` | `E[x_0 | x]`, `E[eps | x]` at any level, for `denoise` |
| `ExactReverse` | the sampler without discretization error: `p(x_low | x_high)` itself |
| `TwistedReverse`, `twisted_start`, `ExactTwist` | the optimal proposal, start and value: |
| | steering with them has weights without variance |

    mixture = GaussianMixture(log_weights, means, covs)
    top = schedule.level(-1)
    smc.run(key, ExactDenoiser(mixture), schedule, Steering(reward), shape=(d,),
            sampler=ExactReverse(mixture), start=mixture.noised(top.alpha, top.sigma).distribution())
    mixture.tilted(reward).log_normalizer                       # what smc.log_evidence estimates

The only error left in such a run is that of the particles. With another sampler the target is the law
that sampler gives, which differs from the mixture's by discretization.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Proposed
from smcscale.models.diffusion.schedules import Level, bridge


class Quadratic(eqx.Module):
    """Reward `-(x - center)' precision (x - center) / 2 + slope' x + constant`.

    Attributes:
        precision: `(d, d)`, symmetric; zeros for a linear reward.
        center: `(d,)`.
        slope: `(d,)`.
        constant: `()`.
    """

    precision: Float[Array, "d d"]
    center: Float[Array, " d"]
    slope: Float[Array, " d"]
    constant: Float[Array, ""]

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Reward `()` of a point."""
        away = x - self.center
        return -away @ self.precision @ away / 2 + self.slope @ x + self.constant


def quadratic(
    precision: Any,
    center: Any = None,
    slope: Any = None,
    constant: ArrayLike = 0.0,
) -> Quadratic:
    """A `Quadratic` with zeros for what is left out; `precision` is `(d, d)`."""
    precision = jnp.asarray(precision, float)
    zeros = jnp.zeros(len(precision))
    return Quadratic(
        precision,
        zeros if center is None else jnp.asarray(center, float),
        zeros if slope is None else jnp.asarray(slope, float),
        jnp.asarray(constant, float),
    )


def gaussian_likelihood(
    matrix: Float[Array, "p d"], y: Float[Array, " p"], scale: ArrayLike
) -> Quadratic:
    """`log N(y; matrix x, scale^2 I)` as a reward of x; its evidence is that of `y`."""
    matrix, y = jnp.asarray(matrix, float), jnp.asarray(y, float)
    noise = jnp.asarray(scale, float) ** 2
    constant = -(y @ y) / (2 * noise) - len(y) / 2 * jnp.log(2 * jnp.pi * noise)
    return quadratic(matrix.T @ matrix / noise, slope=matrix.T @ y / noise, constant=constant)


class Tilted(NamedTuple):
    """A mixture times `exp(strength * reward)`.

    Attributes:
        log_normalizer: `()`, nats: `log E[exp(strength * reward)]`.
        mixture: the tilted law.
    """

    log_normalizer: Float[Array, ""]
    mixture: "GaussianMixture"


class GaussianMixture(eqx.Module):
    """A mixture of C normal laws in d dimensions.

    Attributes:
        log_weights: `(C,)`, log weights that sum to 1.
        means: `(C, d)`.
        covs: `(C, d, d)`.
    """

    log_weights: Float[Array, " C"]
    means: Float[Array, "C d"]
    covs: Float[Array, "C d d"]

    def distribution(self) -> Any:
        """The mixture as a NumPyro distribution over `(d,)`."""
        return dist.MixtureSameFamily(
            dist.Categorical(logits=self.log_weights),
            dist.MultivariateNormal(self.means, scale_tril=jnp.linalg.cholesky(self.covs)),
        )

    def log_prob(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log density `()`."""
        return jax.nn.logsumexp(self.log_weights + _log_normal(x - self.means, self.covs)[0])

    @property
    def mean(self) -> Float[Array, " d"]:
        """`(d,)`."""
        return jnp.exp(self.log_weights) @ self.means

    @property
    def cov(self) -> Float[Array, "d d"]:
        """`(d, d)`."""
        away = self.means - self.mean
        spread = self.covs + away[:, :, None] * away[:, None, :]
        return jnp.einsum("c,cij->ij", jnp.exp(self.log_weights), spread)

    def pushed(self, factor: ArrayLike, shift: ArrayLike, variance: ArrayLike) -> "GaussianMixture":
        """Law of `factor x + shift + N(0, variance I)`."""
        eye = jnp.eye(self.means.shape[1], dtype=self.covs.dtype)
        return GaussianMixture(
            self.log_weights,
            jnp.asarray(factor) * self.means + shift,
            jnp.asarray(factor) ** 2 * self.covs + variance * eye,
        )

    def noised(self, alpha: ArrayLike, sigma: ArrayLike) -> "GaussianMixture":
        """Law of `alpha x_0 + sigma eps`: the marginal at a level."""
        return self.pushed(alpha, 0.0, jnp.asarray(sigma) ** 2)

    def posterior(
        self, x: Float[Array, " d"], alpha: ArrayLike, sigma: ArrayLike
    ) -> "GaussianMixture":
        """Law of `x_0` given `alpha x_0 + sigma eps = x`, sigma above 0."""
        marginal = self.noised(alpha, sigma)
        logs, solve = _log_normal(x - marginal.means, marginal.covs)
        gain = alpha * solve(self.covs)  # (alpha S^-1 C), C and S symmetric
        means = self.means + jnp.einsum("cji,cj->ci", gain, x - marginal.means)
        # C - alpha^2 C S^-1 C = sigma^2 C S^-1, without the difference
        covs = jnp.asarray(sigma) ** 2 * solve(self.covs)
        covs = (covs + jnp.swapaxes(covs, 1, 2)) / 2
        return GaussianMixture(jax.nn.log_softmax(self.log_weights + logs), means, covs)

    def tilted(self, reward: Quadratic, strength: ArrayLike = 1.0) -> Tilted:
        """The mixture times `exp(strength * reward)`, normalized.

        Needs `I + strength C precision` positive for every component, as it is for a concave reward.
        """
        precision = strength * reward.precision
        eye = jnp.eye(self.means.shape[1], dtype=self.covs.dtype)
        grown = eye + self.covs @ precision
        covs = jnp.linalg.solve(grown, self.covs)
        slope = strength * reward.slope - (self.means - reward.center) @ precision
        shift = jnp.einsum("cij,cj->ci", covs, slope)
        logs = (
            self.log_weights
            + strength * jax.vmap(reward)(self.means)
            - jnp.linalg.slogdet(grown)[1] / 2
            + jnp.sum(slope * shift, axis=1) / 2
        )
        log_normalizer = jax.nn.logsumexp(logs)
        covs = (covs + jnp.swapaxes(covs, 1, 2)) / 2
        tilted = GaussianMixture(logs - log_normalizer, self.means + shift, covs)
        return Tilted(log_normalizer, tilted)


class ExactDenoiser(eqx.Module):
    """The denoiser of data from a mixture, at any level.

    Attributes:
        mixture: law of the data.
        with_variance: give `Var(x_0 | x)` of every coordinate too.
    """

    mixture: GaussianMixture
    with_variance: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Float[Array, " d"], level: Level) -> Prediction:
        """`E[x_0 | x]`, `E[eps | x]`."""
        found = self.mixture.posterior(x, level.alpha, level.sigma)
        marginal = self.mixture.noised(level.alpha, level.sigma)
        _, solve = _log_normal(x - marginal.means, marginal.covs)
        # not (x - alpha x_0) / sigma, which loses digits where sigma is small
        noise = level.sigma * solve((x - marginal.means)[..., None])[..., 0]
        eps = jnp.exp(found.log_weights) @ noise
        variance = jnp.diagonal(found.cov) if self.with_variance else None
        return Prediction(found.mean, eps, variance)


class ExactReverse(eqx.Module):
    """Sampler: the reverse kernel `p(x_low | x_high)` of a mixture's walk, a mixture itself.

    Attributes:
        mixture: law of the data.
    """

    mixture: GaussianMixture

    def __call__(
        self, denoiser: Any, x: Array, prediction: Prediction | None, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`."""
        return _lowered(
            self.mixture.posterior(x, high.alpha, high.sigma), x, high, low
        ).distribution()


class TwistedReverse(eqx.Module):
    """Sampler: the reverse kernel of the tilted mixture, with its weight.

    Together with `twisted_start` and the value `ExactTwist` the weights have no variance: the sharpest
    test there is of everything that carries them.

    Attributes:
        mixture: law of the data.
        reward: what it is tilted by.
        strength: lambda.
    """

    mixture: GaussianMixture
    reward: Quadratic
    strength: ArrayLike = 1.0

    def __call__(
        self, denoiser: Any, x: Array, prediction: Prediction | None, high: Level, low: Level
    ) -> Proposed:
        """Law of the state at `low`, and log ratio of `ExactReverse` to it."""
        found = self.mixture.posterior(x, high.alpha, high.sigma)
        model = _lowered(found, x, high, low)
        twisted = _lowered(found.tilted(self.reward, self.strength).mixture, x, high, low)
        return Proposed(twisted.distribution(), lambda y: model.log_prob(y) - twisted.log_prob(y))


class Ratio(eqx.Module):
    """Log ratio of two mixtures' densities."""

    above: GaussianMixture
    below: GaussianMixture

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Log ratio `()` at a point, nats."""
        return self.above.log_prob(x) - self.below.log_prob(x)


def twisted_start(
    mixture: GaussianMixture, reward: Quadratic, strength: ArrayLike, level: Level
) -> Proposed:
    """The tilted data noised to a level, and the log ratio of the mixture's marginal to it."""
    model = mixture.noised(level.alpha, level.sigma)
    twisted = mixture.tilted(reward, strength).mixture.noised(level.alpha, level.sigma)
    return Proposed(twisted.distribution(), Ratio(model, twisted))


class ExactTwist(eqx.Module):
    """Value of a noisy state: `log E[exp(strength reward(x_0)) | x] / strength`, for `Steering`.

    Attributes:
        mixture: law of the data.
        reward: of the data.
        strength: lambda, not 0.
    """

    mixture: GaussianMixture
    reward: Quadratic
    strength: ArrayLike = 1.0

    def __call__(
        self, x: Float[Array, " d"], prediction: Prediction | None, level: Level
    ) -> Float[Array, ""]:
        """Value `()` of a state at a level with noise; no prediction is needed."""
        found = self.mixture.posterior(x, level.alpha, level.sigma)
        return found.tilted(self.reward, self.strength).log_normalizer / self.strength


def _lowered(found: GaussianMixture, x: Array, high: Level, low: Level) -> GaussianMixture:
    """Law of the state at `low` given that at `high`, when `x_0` given the latter is `found`."""
    step = bridge(high, low)
    return found.pushed(step.data, step.state * x, step.variance)


def _log_normal(away: Float[Array, "C d"], covs: Float[Array, "C d d"]) -> tuple[Array, Any]:
    """Log densities `(C,)` of normal laws at `away` from their means, and `B -> covs^-1 B`."""
    roots = jnp.linalg.cholesky(covs)
    # inverted once, not solved for every particle: two batched solves at a time, each of the size of a
    # population, may wait for each other forever in jaxlib's pool of threads (seen with 0.10.2)
    eye = jnp.broadcast_to(jnp.eye(covs.shape[-1], dtype=covs.dtype), covs.shape)
    inverse = jax.scipy.linalg.solve_triangular(roots, eye, lower=True)
    white = jnp.einsum("cij,cj->ci", inverse, away)
    logdet = jnp.sum(jnp.log(jnp.diagonal(roots, axis1=1, axis2=2)), axis=1)
    size = away.shape[1] * jnp.log(2 * jnp.pi)

    def solve(right: Array) -> Array:
        return jnp.swapaxes(inverse, 1, 2) @ (inverse @ right)

    return -jnp.sum(white**2, axis=1) / 2 - logdet - size / 2, solve
