"""The flow of a model as an ordinary differential equation, solved by adaptive steps (diffrax).

    curve = Rectified()                                   # alpha(tau), sigma(tau) for every tau
    x = flow(denoiser, curve, noise)                      # noise to data
    noise = flow(denoiser, curve, x, start=1e-3, end=0.999)       # and back
    log_density(denoiser, curve, x)                       # log q(x), nats

A reference for the samplers, whose steps are fixed, an encoder, and the density that a network's model
has: what `correctors.PowerPath` asks for. A flow draws nothing, so that particles cannot be resampled along it:
to steer, use `FlowSDE`. Needs the extra `ode`.

Where `sigma` is 0 most denoisers say nothing, nor do those that predict noise where `alpha` is 0, so the
flow runs between 0.001 and 0.999 unless told otherwise: `flow` returns the state there, off from data by
noise of `sigma(end)`.

Source: Song et al. 2021, "Score-based generative modeling", sections 4.3 and D (probability flow, densities);
Chen et al. 2018, "Neural ordinary differential equations", theorem 1.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.samplers import Network
from smcscale.models.diffusion.schedules import Level


class Curve(eqx.Module):
    """Signal and noise at every time, `x = alpha(tau) x_0 + sigma(tau) eps`; a subclass says which."""

    @abc.abstractmethod
    def alpha(self, tau: Array) -> Array:
        """Factor of the signal, in JAX: the rates come by differentiating."""

    @abc.abstractmethod
    def sigma(self, tau: Array) -> Array:
        """Standard deviation of the noise."""

    def level(self, tau: ArrayLike) -> Level:
        """The level of a time; its index is 1, as levels with noise are."""
        tau = jnp.asarray(tau, float)
        alpha, alpha_rate = jax.jvp(self.alpha, (tau,), (jnp.ones_like(tau),))
        sigma, sigma_rate = jax.jvp(self.sigma, (tau,), (jnp.ones_like(tau),))
        return Level(alpha, sigma, tau, alpha_rate, sigma_rate, jnp.ones((), jnp.int32))


class Rectified(Curve):
    """Straight lines: `alpha = 1 - tau`, `sigma = tau`, as in `schedules.rectified_flow`."""

    def alpha(self, tau: Array) -> Array:
        """Factor of the signal."""
        return 1 - tau

    def sigma(self, tau: Array) -> Array:
        """Standard deviation of the noise."""
        return tau


class Preserving(Curve):
    """The variance-preserving curve of `schedules.vp_linear`.

    Attributes:
        beta_min: rate of noise at the data.
        beta_max: rate at the noise.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, tau: Array) -> Array:
        """Factor of the signal."""
        return jnp.exp(-self._integral(tau) / 2)

    def sigma(self, tau: Array) -> Array:
        """Standard deviation of the noise."""
        return jnp.sqrt(-jnp.expm1(-self._integral(tau)))

    def _integral(self, tau: Array) -> Array:
        return tau * (self.beta_min + tau * (self.beta_max - self.beta_min) / 2)


def flow(
    denoiser: Network,
    curve: Curve,
    x: Float[Array, "..."],
    *,
    start: ArrayLike = 0.999,
    end: ArrayLike = 1e-3,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    max_steps: int = 4096,
) -> Float[Array, "..."]:
    """The state at `end` of the flow through `x` at `start`; downwards makes data, upwards noise.

    Args:
        denoiser: `(x, level) -> Prediction`; a network that is told time must be told tau.
        curve: alpha and sigma by tau.
        x: one state.
        start, end: times, in either order.
        rtol, atol: error allowed in a step.
        max_steps: that the solver may take.
    Raises:
        RuntimeError: more steps are needed (`equinox.EquinoxRuntimeError`).
    """

    x = jnp.asarray(x, jnp.result_type(x, float))
    return _solved(Slope(denoiser, curve), x, start, end, rtol, atol, max_steps)


def log_density(
    denoiser: Network,
    curve: Curve,
    x: Float[Array, "..."],
    *,
    start: ArrayLike = 1e-3,
    end: ArrayLike = 0.999,
    scale: ArrayLike = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    max_steps: int = 4096,
) -> Float[Array, ""]:
    """Log density `()` of a state at `start`, nats: the flow to the noise, and what it stretches.

    Exact but for the solver, and for the noise's law at `end`; every evaluation takes as many products
    with the Jacobian as the state has numbers.

    Args:
        denoiser, curve, x, rtol, atol, max_steps: as in `flow`.
        start: time of the state.
        end: time of the noise.
        scale: standard deviation of the normal law at `end`.
    Raises:
        RuntimeError: more steps are needed (`equinox.EquinoxRuntimeError`).
    """
    x = jnp.asarray(x, jnp.result_type(x, float))
    slope = Stretch(Slope(denoiser, curve))
    noise, stretched = _solved(
        slope, (x, jnp.zeros((), x.dtype)), start, end, rtol, atol, max_steps
    )
    return jnp.sum(jax.scipy.stats.norm.logpdf(noise, scale=scale)) + stretched


class Slope(eqx.Module):
    """What the solver follows: the velocity of a state. A pytree, so that it is compiled once."""

    denoiser: Network
    curve: Curve

    def __call__(self, tau: Array, x: Array, _: Any) -> Array:
        """Velocity at a time."""
        level = self.curve.level(tau)
        found = self.denoiser(x, level)
        return level.alpha_rate * found.x0 + level.sigma_rate * found.eps


class Stretch(eqx.Module):
    """The velocity, and its divergence."""

    slope: Slope

    def __call__(self, tau: Array, state: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
        """Both at a time."""
        x = state[0]
        eye = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
        columns = jax.vmap(lambda v: jax.jvp(lambda x: self.slope(tau, x, None), (x,), (v,))[1])(
            eye
        )
        return self.slope(tau, x, None), jnp.trace(columns.reshape(x.size, x.size))


def _solved(
    slope: Callable[..., Any],
    state: Any,
    start: ArrayLike,
    end: ArrayLike,
    rtol: float,
    atol: float,
    max_steps: int,
) -> Any:
    """The state at `end`, by Tsitouras' pair of orders 5 and 4."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            'smcscale: the flow needs diffrax.\n  try: pip install "smcscale[ode]".'
        ) from error
    dtype = jnp.result_type(float)
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Tsit5(),
        t0=jnp.asarray(start, dtype),
        t1=jnp.asarray(end, dtype),
        dt0=None,
        y0=state,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
    )
    return jax.tree.map(lambda a: a[-1], found.ys)
