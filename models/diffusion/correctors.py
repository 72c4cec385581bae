"""Feynman-Kac correctors: products, powers and tilts of diffusion models, sampled exactly.

The score of `q_1^b_1 q_2^b_2 ... exp(beta r)` is the sum of scores, `S = sum_i b_i s_i + beta grad r`. But a
walk that follows S does not end with that law: at every level its particles lack a weight. This module walks
by S and carries the weight.

    both = Composed((cats, dogs), (1.0, 1.0))                   # product of two models
    smc.run(key, both, schedule, shape=(d,), sampler=Corrected(), start=composed_start(schedule, both.at(schedule.level(-1)), (d,)))

| wanted | weights `b_i` of `Composed` |
|---|---|
| annealing `q^beta` | `(beta,)` |
| product | `(1.0, 1.0)`, or any |
| classifier-free guidance, geometric average | `(1 - beta, beta)` |
| reward tilt | `Composed(..., tilt=Tilt(reward, strength))` |
| powers that grow along the walk | `Composed(..., path=PowerPath(share, log_densities))` |

With `B = sum b_i`, drift factor kappa and noise factor zeta, the walk towards the data and its log-weight are

    dx    = [-f + g^2 (kappa sum_i b_i s_i + (zeta^2 / 2) beta grad r)] dt + zeta g dw
    dlogw = [(B - 1) div f - beta <grad r, f> + beta' r + sum_i b_i' log q_i] dt
            + g^2 [D sum_i b_i div s_i - sum_i b_i |s_i|^2 / 2 + <S, u> - zeta^2 |S|^2 / 2] dt,

`u` the bracket after `g^2`, `D = kappa - (1 + zeta^2) / 2`. Every choice of kappa and zeta has the same law;
they differ in the variance of the weights:

| drift | kappa | zeta | D | |
|---|---|---|---|---|
| `target_score` | 1 | 1 | 0 | Skreta et al., a = 0 |
| `tempered_noise` | (1 + B) / 2B | 1 / sqrt(B) | 0 | Skreta et al., a = 1/2; loses the tails for B > 1 |
| `bridge` | (1 + B) / 2B | 1 | (1 - B) / 2B | no weight at all where the models are normal |

`bridge` needs the divergence of the scores: exact with d products of the Jacobian, or one random probe. On
mixtures its log Z varies far less than that of the others, so it is the default.

The walk is Euler-Maruyama: what it samples approaches the product as steps shrink, and the evidence
estimates `log of the integral of the product`.

Source: Skreta et al. 2025, "Feynman-Kac correctors in diffusion" (arXiv 2503.02819), propositions 3.1 to 3.4,
C.6 (changing powers) and D.5; the family with D is derived by the same computation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Constant, Network, Proposed
from smcscale.models.diffusion.schedules import Level, Schedule, increments
from smcscale.program.spend import spend


def share_of_signal(level: Level) -> Float[Array, ""]:
    """`alpha^2 / (alpha^2 + sigma^2)`: 0 at the noise, 1 at the data."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


class Tilt(eqx.Module):
    """A reward of noisy states that grows along the walk.

    Attributes:
        reward: `(x) -> ()`, differentiable, of the state itself at any level.
        strength: lambda, at the data.
        share: `(level) -> ()`, of lambda: 0 at the noise, 1 at the data.
    """

    reward: Callable[[Array], Array]
    strength: ArrayLike = 1.0
    share: Callable[[Level], Array] = share_of_signal

    def at(self, level: Level) -> Float[Array, ""]:
        """beta of a level; the whole of lambda at the data."""
        return jnp.asarray(self.strength * jnp.where(level.index == 0, 1.0, self.share(level)))


class PowerPath(eqx.Module):
    """Powers that change along the walk; only where the models' densities are known.

    Their sum must be above 0 at every level: the noise that a walk starts from is raised to it.

    Attributes:
        share: `(level) -> (M,)` or `()`, what is taken of each power: 1 at the data.
        log_densities: `(x, level) -> (M,)`, `log q_i` of a state at a level, normalized.
    """

    share: Callable[[Level], Array]
    log_densities: Callable[[Array, Level], Array]


class Parts(NamedTuple):
    """What `Composed` adds to a prediction, of every model.

    Attributes:
        eps: `(M, ...)`, predicted noises.
    """

    eps: Float[Array, "M ..."]


class Composed(eqx.Module):
    """Models multiplied with powers: a denoiser whose score is the weighted sum of theirs.

    Attributes:
        denoisers: M of them, `(x, level) -> Prediction`.
        powers: `(M,)`, `b_i` at the data.
        tilt: a reward, or None.
        path: of the powers, None where they stay.
    """

    denoisers: tuple[Network, ...]
    powers: Float[Array, " M"]
    tilt: Tilt | None
    path: PowerPath | None

    def __init__(
        self,
        denoisers: tuple[Network, ...],
        powers: Any,
        tilt: Tilt | None = None,
        path: PowerPath | None = None,
    ):
        self.denoisers = tuple(denoisers)
        self.powers = jnp.asarray(powers, float)
        self.tilt = tilt
        self.path = path
        if self.powers.shape != (len(self.denoisers),):
            raise ValueError(
                f"smcscale: Composed has {len(self.denoisers)} denoisers and powers of shape "
                f"{self.powers.shape}.\n  try: one power for each."
            )

    def at(self, level: Level) -> Float[Array, " M"]:
        """The powers of a level; those of the data at the data."""
        if self.path is None:
            return self.powers
        return self.powers * jnp.where(level.index == 0, 1.0, self.path.share(level))

    def noises(self, x: Float[Array, "..."], level: Level) -> Float[Array, "M ..."]:
        """Predicted noise of every model."""
        return jnp.stack([denoiser(x, level).eps for denoiser in self.denoisers])

    def __call__(self, x: Float[Array, "..."], level: Level) -> Prediction:
        """Data and noise of the product, with `extra` the `Parts`."""
        eps = self.noises(x, level)
        total = jnp.tensordot(self.at(level), eps, axes=1)
        return Prediction((x - level.sigma * total) / level.alpha, total, None, Parts(eps))


def exact_divergence(model: Composed, x: Array, level: Level) -> Float[Array, " M"]:
    """Divergence of every model's score, `(M,)`: d products with the Jacobian."""
    eye = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    columns = jax.vmap(lambda v: jax.jvp(lambda x: model.noises(x, level), (x,), (v,))[1])(eye)
    spend(jacobian_products=x.size * len(model.denoisers))
    return -jnp.einsum("imi->m", columns.reshape(x.size, -1, x.size)) / level.sigma


def probed_divergence(model: Composed, x: Array, level: Level) -> Float[Array, " M"]:
    """An unbiased estimate of it, `(M,)`, from one random probe of signs (Hutchinson 1990)."""
    heads = dist.Bernoulli(jnp.full(x.shape, 0.5)).to_event(x.ndim)
    drawn: Any = numpyro.sample("probe", heads)
    probe = 2 * drawn.astype(x.dtype) - 1
    products = jax.jvp(lambda x: model.noises(x, level), (x,), (probe,))[1]
    spend(jacobian_products=len(model.denoisers))
    return -jnp.sum(products * probe, axis=tuple(range(1, x.ndim + 1))) / level.sigma


class Drift(NamedTuple):
    """How a corrected walk moves, given `B`, the sum of the powers.

    Attributes:
        kappa: factor of the scores.
        zeta: factor of the noise.
        divergent: whether D differs from 0.
    """

    kappa: Callable[[Array], Array]
    zeta: Callable[[Array], Array]
    divergent: bool


target_score = Drift(jnp.ones_like, jnp.ones_like, False)
tempered_noise = Drift(lambda b: (1 + b) / (2 * b), lambda b: 1 / jnp.sqrt(b), False)
bridge = Drift(lambda b: (1 + b) / (2 * b), jnp.ones_like, True)


def always(level: Level) -> Any:
    """Weigh at every level."""
    return jnp.asarray(True)


class Corrected(eqx.Module):
    """Euler-Maruyama step of a `Composed` model, with the log-weight that its walk owes.

    Attributes:
        drift: `bridge`, `target_score` or `tempered_noise`; all are one where the powers add up to 1
            (guidance), and `target_score` then spares the divergence.
        divergence: of the scores, where the drift needs it: `exact_divergence`, or `probed_divergence`
            for states of more than a few numbers.
        active: `(level) -> bool`, where weights are kept; elsewhere they are dropped, which is the
            published "active interval" and no longer the product's law.
    """

    drift: Drift = eqx.field(static=True, default=bridge)
    divergence: Callable[[Composed, Array, Level], Array] = exact_divergence
    active: Callable[[Level], Any] = always

    def __call__(
        self, denoiser: Network, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Proposed:
        """Law of the state at `low`, and the weight owed for leaving `high`.

        Raises:
            TypeError: the denoiser is no `Composed`.
        """
        if not isinstance(denoiser, Composed):
            raise TypeError(
                f"smcscale: Corrected runs a Composed model, got {type(denoiser).__name__}.\n"
                "  try: Composed((denoiser,), (1.0,))."
            )
        powers, tilt, path = denoiser.at(high), denoiser.tilt, denoiser.path
        total = jnp.sum(powers)
        kappa, zeta = self.drift.kappa(total), self.drift.zeta(total)
        growth, variance = increments(high, low)
        scores = -prediction.extra.eps / high.sigma
        mixed = jnp.tensordot(powers, scores, axes=1)
        whole, move = mixed, kappa * mixed
        log_weight = -(total - 1) * growth * x.size  # div f dt = -growth d
        if tilt is not None:
            value, slope = jax.value_and_grad(tilt.reward)(x)
            beta = tilt.at(high)
            whole, move = whole + beta * slope, move + zeta**2 / 2 * beta * slope
            log_weight += beta * growth * jnp.sum(slope * x) + (tilt.at(low) - beta) * value
        if path is not None:
            log_weight += (denoiser.at(low) - powers) @ path.log_densities(x, high)
        squares = jnp.sum(scores.reshape(len(powers), -1) ** 2, axis=1)
        rate = jnp.sum(whole * move) - powers @ squares / 2 - zeta**2 / 2 * jnp.sum(whole**2)
        if self.drift.divergent:
            rate += (kappa - (1 + zeta**2) / 2) * (powers @ self.divergence(denoiser, x, high))
        log_weight = jnp.where(self.active(high), log_weight + variance * rate, 0.0)
        law = dist.Normal(x + growth * x + variance * move, zeta * jnp.sqrt(variance))
        return Proposed(law.to_event(jnp.ndim(x)), lambda state: log_weight)


def composed_start(schedule: Schedule, powers: Any, shape: tuple[int, ...]) -> Proposed:
    """The law of noise raised to powers (`Composed.at` of the top level), and its normalizer.

    With `N(0, c^2 I)` at level K for every model, `c` the schedule's `initial_scale`, their product is
    normal with variance `c^2 / B`, times a constant. Start from it and the evidence is the log of the
    product's integral.
    """
    total = jnp.sum(jnp.asarray(powers, float))
    if not isinstance(total, Tracer) and not total > 0:
        raise ValueError(
            f"smcscale: `powers` must add up to more than 0, got {powers}.\n"
            "  try: powers under which the noise can be normalized."
        )
    size = math.prod(shape)
    scale = schedule.initial_scale
    log_normalizer = size / 2 * ((1 - total) * jnp.log(2 * jnp.pi * scale**2) - jnp.log(total))
    law = dist.Normal(jnp.zeros(shape), scale / jnp.sqrt(total)).to_event(len(shape))
    return Proposed(law, Constant(log_normalizer))
