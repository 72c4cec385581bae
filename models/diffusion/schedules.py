"""Noise levels: how much signal and how much noise a state holds, from data to noise.

A state at level k is `x_k = alpha_k x_0 + sigma_k eps`, eps standard normal; level 0 is data, level
K noise, and a sampler walks from K down to 0. `tau_k` is what a network is told about the level.

| schedule | alpha | sigma | tau |
|---|---|---|---|
| `vp_linear` | `exp(-T / 2)`, T the integral of a linear beta | `sqrt(1 - alpha^2)` | time in [0, 1] |
| `vp_cosine` | a cosine of time | `sqrt(1 - alpha^2)` | time in [0, 1] |
| `ve` | 1 | geometric | sigma |
| `edm` | 1 | Karras et al.'s grid | sigma |
| `rectified_flow` | `1 - tau` | `tau` | time in [0, 1], shifted |
| `interpolant` | any `a(tau)` | any `b(tau)` | time |

Everything that depends on two levels is derived from `alpha` and `sigma` here, in `bridge`; samplers
hold no schedule of their own. Read next: `predictors.py`, and `scheduler_config.py` for the
`scheduler_config.json` of published models.

Source: Song et al. 2021, "Score-based generative modeling" (VP, VE); Nichol & Dhariwal 2021 (cosine);
Karras et al. 2022, equation 5; Liu et al. 2023 (rectified flow); Esser et al. 2024, equation 23
(the shift).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int32


class Level(NamedTuple):
    """One noise level.

    Attributes:
        alpha: `()`, factor of the signal.
        sigma: `()`, standard deviation of the noise.
        tau: `()`, what a network is told.
        alpha_rate: `()`, derivative of alpha by the time that velocities are by (mostly tau).
        sigma_rate: `()`, likewise of sigma.
        index: `()` int32, k: 0 data, K noise.
    """

    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]
    tau: Float[Array, "..."]
    alpha_rate: Float[Array, "..."]
    sigma_rate: Float[Array, "..."]
    index: Int32[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]  the field's word


class Walk(NamedTuple):
    """The K moves of a sampler, leaves `(K,)`, first move first.

    Attributes:
        high: the level a move leaves.
        low: the level it enters.
        made: int32, moves made when it is done, 1..K.
        last: bool, whether it enters level 0.
    """

    high: Level
    low: Level
    made: Int32[Array, "..."]
    last: Bool[Array, "..."]


class Schedule(eqx.Module):
    """K + 1 noise levels, from data (index 0) to noise (index K).

    Attributes:
        alpha: `(K + 1,)`, factors of the signal.
        sigma: `(K + 1,)`, standard deviations of the noise, increasing; 0 at level 0 of most.
        tau: `(K + 1,)`, what a network is told.
        alpha_rate: `(K + 1,)`, derivatives of alpha, for networks that give velocities.
        sigma_rate: `(K + 1,)`, of sigma; 0 at a level without noise, where no network is asked.
        initial_scale: `()`, standard deviation of the normal law that level K starts from.
    """

    alpha: Float[Array, " levels"]
    sigma: Float[Array, " levels"]
    tau: Float[Array, " levels"]
    alpha_rate: Float[Array, " levels"]
    sigma_rate: Float[Array, " levels"]
    initial_scale: Float[Array, ""]

    @property
    def num_steps(self) -> int:
        """K, the moves from noise to data."""
        return self.alpha.shape[0] - 1

    def level(self, index: int | Int32[Array, "..."]) -> Level:
        """The level `index`, 0 data to K noise; -1 counts from noise."""
        arrays = (self.alpha, self.sigma, self.tau, self.alpha_rate, self.sigma_rate)
        at = jnp.arange(self.num_steps + 1, dtype=jnp.int32)[index]
        alpha, sigma, tau, alpha_rate, sigma_rate = (a[at] for a in arrays)
        return Level(alpha, sigma, tau, alpha_rate, sigma_rate, at)

    def walk(self) -> Walk:
        """The moves from level K down to level 0, as rows to scan over."""
        top = jnp.arange(self.num_steps, 0, -1, dtype=jnp.int32)
        return Walk(self.level(top), self.level(top - 1), self.num_steps + 1 - top, top == 1)


class Bridge(NamedTuple):
    """The law of a lower level given a higher one and the data: normal, all entries `()`.

    Attributes:
        data: factor of `x_0` in its mean.
        state: factor of `x_high` in its mean.
        variance: of every coordinate.
    """

    data: Float[Array, "..."]
    state: Float[Array, "..."]
    variance: Float[Array, "..."]


def added_noise(high: Level, low: Level) -> Float[Array, "..."]:
    """Variance that the forward walk adds from `low` to `high`: `Var(x_high | x_low)`."""
    return high.sigma**2 - (high.alpha / low.alpha) ** 2 * low.sigma**2


def increments(high: Level, low: Level) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What the reverse SDE of a variance-preserving or -exploding walk does over a move.

    With `dx = f x dt + g dw` forwards: `-f dt`, by which a state grows on the way down, and `g^2 dt`.

    Args:
        high, low: levels, alpha above 0.
    Returns:
        growth `()` and variance `()`.
    """
    growth = jnp.log(low.alpha / high.alpha)
    # d(sigma^2) = 2 f sigma^2 dt + g^2 dt, sigma^2 by the trapezium rule: the change of sigma^2
    # where alpha is constant, and 2 growth + O(growth^3) where alpha^2 + sigma^2 = 1
    middle = (high.sigma**2 + low.sigma**2) / 2
    return growth, high.sigma**2 - low.sigma**2 + 2 * growth * middle


def bridge(high: Level, low: Level) -> Bridge:
    """`q(x_low | x_high, x_0)`, the posterior of the forward walk.

    Args:
        high: level of the state, sigma above 0.
        low: level below it.
    Source: Ho et al. 2020, equations 6 and 7, for any alpha and sigma.
    """
    share = added_noise(high, low) / high.sigma**2
    return Bridge(
        low.alpha * share,
        high.alpha / low.alpha * low.sigma**2 / high.sigma**2,
        low.sigma**2 * share,
    )


def vp_linear(num_steps: int, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Variance-preserving levels with `beta(tau)` linear in tau, tau uniform in [0, 1].

    Args:
        num_steps: K.
        beta_min: rate of noise at the data.
        beta_max: rate at the noise.
    """
    tau = _uniform(num_steps)
    beta = beta_min + tau * (beta_max - beta_min)
    integral = tau * (beta_min + beta) / 2
    alpha, sigma = np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))
    return _preserving(alpha, sigma, tau, -beta * alpha / 2)


def vp_cosine(num_steps: int, *, offset: float = 0.008, smallest_alpha: float = 1e-3) -> Schedule:
    """Variance-preserving levels with `alpha` a cosine of tau.

    Args:
        num_steps: K.
        offset: keeps the first levels apart.
        smallest_alpha: where tau ends, short of 1: without signal, `x_0` cannot be told from eps.
    """
    end = 2 * np.arccos(smallest_alpha * np.cos(offset / (1 + offset) * np.pi / 2)) / np.pi
    tau = _uniform(num_steps) * (end * (1 + offset) - offset)
    angle = (tau + offset) / (1 + offset) * np.pi / 2
    start = angle[0]
    alpha = np.cos(angle) / np.cos(start)
    rate = -np.sin(angle) / np.cos(start) * np.pi / 2 / (1 + offset)
    # 1 - alpha^2 without the difference of near-equal numbers at the data
    sigma = np.sqrt(np.sin(angle - start) * np.sin(angle + start)) / np.cos(start)
    return _preserving(alpha, sigma, tau, rate)


def ve(num_steps: int, *, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Variance-exploding levels: geometric from `sigma_max` to `sigma_min`, then 0.

    Args:
        num_steps: K.
        sigma_min: noise of level 1.
        sigma_max: noise of level K.
    """
    return _exploding(np.geomspace(sigma_min, sigma_max, _positive(num_steps)))


def edm(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Schedule:
    """The levels of Karras et al.: `sigma^(1/rho)` evenly spaced, then 0.

    Args:
        num_steps: K.
        sigma_min: noise of level 1.
        sigma_max: noise of level K.
        rho: larger values put more levels near the data.
    """
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _exploding(np.linspace(*ends, _positive(num_steps)) ** rho)


def rectified_flow(num_steps: int, *, shift: float = 1.0) -> Schedule:
    """Straight lines from noise to data: `alpha = 1 - tau`, `sigma = tau`.

    Args:
        num_steps: K.
        shift: above 1 puts more levels near the noise, for large images.
    """
    tau = _uniform(num_steps)
    tau = shift * tau / (1 + (shift - 1) * tau)
    return as_schedule(1 - tau, tau, tau, -np.ones_like(tau), np.ones_like(tau), 1.0)


def interpolant(
    a: Callable[[Array], Array],
    b: Callable[[Array], Array],
    taus: Float[Array, " levels"] | Any,
    *,
    initial_scale: ArrayLike = 1.0,
) -> Schedule:
    """Levels of any stochastic interpolant `x = a(tau) x_0 + b(tau) eps`.

    Args:
        a, b: smooth functions of a scalar, in JAX; rates come by differentiating them.
        taus: `(K + 1,)`, data first.
        initial_scale: standard deviation of the normal law at the last of them.
    """
    taus = jnp.asarray(taus, float)
    one = jnp.ones(())
    alpha, alpha_rate = jax.vmap(lambda tau: jax.jvp(a, (tau,), (one,)))(taus)
    sigma, sigma_rate = jax.vmap(lambda tau: jax.jvp(b, (tau,), (one,)))(taus)
    return as_schedule(alpha, sigma, taus, alpha_rate, sigma_rate, initial_scale)


def as_schedule(
    alpha: Any,
    sigma: Any,
    tau: Any,
    alpha_rate: Any,
    sigma_rate: Any,
    initial_scale: ArrayLike,
) -> Schedule:
    """A `Schedule` of these numbers, each `(K + 1,)` from data to noise, in the default precision.

    Raises:
        ValueError: unless there are two levels or more, all arrays of one length.
    """
    given = (alpha, sigma, tau, alpha_rate, sigma_rate)
    lengths = {np.shape(a) for a in given}
    if len(lengths) > 1 or min(len(s) and s[0] for s in lengths) < 2:
        raise ValueError(
            f"smcscale: the arrays of a Schedule have shapes {sorted(lengths)}.\n"
            "  try: (num_steps + 1,) for each, data first."
        )
    alpha, sigma, tau, alpha_rate, sigma_rate = (jnp.asarray(a, float) for a in given)
    return Schedule(
        alpha,
        sigma,
        tau,
        jnp.where(jnp.isfinite(alpha_rate), alpha_rate, 0),
        jnp.where(jnp.isfinite(sigma_rate), sigma_rate, 0),
        jnp.asarray(initial_scale, float),
    )


def _preserving(alpha: np.ndarray, sigma: np.ndarray, tau: np.ndarray, rate: np.ndarray):
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma_rate = -alpha * rate / sigma
    return as_schedule(alpha, sigma, tau, rate, sigma_rate, 1.0)


def _exploding(sigma: np.ndarray) -> Schedule:
    sigma = np.append(0.0, sigma)
    one = np.ones_like(sigma)
    return as_schedule(one, sigma, sigma, 0 * one, one, sigma[-1])


def _uniform(num_steps: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, _positive(num_steps) + 1)


def _positive(num_steps: int) -> int:
    if num_steps < 1:
        raise ValueError(f"smcscale: num_steps must be at least 1, got {num_steps}.")
    return num_steps
