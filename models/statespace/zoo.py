"""Classic state-space programs, in NumPyro, ready for `ParticleFilter`.

Every program draws `x_0` before the loop; then each row of `y` moves the state and observes it.
Parameters are ordinary arguments: Python numbers by default, arrays if you want other values
without a new compilation. With `y=None` and `length=T` the same program simulates.

| program | state | observation | exact answer |
|---|---|---|---|
| `stochastic_volatility` | log-variance of a return | the return | none |
| `stochastic_volatility_with_parameters` | the same, parameters unknown | the return | none |
| `stochastic_volatility_with_leverage` | the same, moved by the last return | the return | none |
| `local_level` | level of a random walk | level plus noise | `kalman.py` |
| `linear_gaussian` | a vector, moved by a matrix | a matrix of it plus noise | `kalman.py` |
| `hidden_markov` | one of K states | one of M symbols | `hmm.py` |
| `theta_logistic` | log-size of a population | noisy log-count | none |
| `bearings_only` | position and velocity | an angle | none |

Read next: `data.py` for series to run them on; copy a program and change it.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Int
from numpyro.contrib.control_flow import scan

from smcscale.models.statespace.hmm import HiddenMarkov
from smcscale.models.statespace.kalman import LinearGaussian

Scalar = float | Float[Array, ""]


def stochastic_volatility(
    y: Float[Array, " T"] | None,
    mu: Scalar = -1.0,
    phi: Scalar = 0.95,
    sigma: Scalar = 0.25,
    *,
    length: int | None = None,
) -> None:
    """Returns whose log-variance is a stationary AR(1) process.

    `x_t ~ N(mu + phi (x_{t-1} - mu), sigma)`, `y_t ~ N(0, exp(x_t / 2))`.

    Args:
        y: `(T,)`, returns (percent, if `mu` is to be near 0); None simulates `length` rows.
        mu: mean of the log-variance.
        phi: persistence, in (-1, 1).
        sigma: standard deviation of a step of the log-variance.
        length: number of rows when `y` is None.
    Source: Taylor 1982; Kim, Shephard & Chib 1998, equation 1.
    """
    x0 = numpyro.sample("x0", dist.Normal(mu, sigma / jnp.sqrt(1 - jnp.square(phi))))
    _volatility_loop(x0, y, mu, phi, sigma, length)


def stochastic_volatility_with_parameters(
    y: Float[Array, " T"] | None, *, length: int | None = None
) -> None:
    """Stochastic volatility with unknown `mu`, `phi`, `sigma`, drawn before the loop.

    A particle filter alone lets such parameters degenerate; this is a program for SMC², PMMH or
    particle Gibbs.

    Args:
        y: `(T,)`, percent returns; None simulates `length` rows.
        length: number of rows when `y` is None.
    Source: priors on `phi` and `mu` as in Kim, Shephard & Chib 1998, section 3.2.1 (here `mu` of
        scale 3 instead of the square root of 10), on `sigma²` of the form of Kastner &
        Frühwirth-Schnatter 2014, section 2: `Gamma(1/2, 1/(2B))`, here with `B = 0.1`.
    """
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    to_phi = dist.transforms.AffineTransform(-1.0, 2.0)
    phi = numpyro.sample("phi", dist.TransformedDistribution(dist.Beta(20.0, 1.5), to_phi))
    variance = numpyro.sample("sigma2", dist.Gamma(0.5, 5.0))
    sigma = jnp.sqrt(variance)
    x0 = numpyro.sample("x0", dist.Normal(mu, sigma / jnp.sqrt(1 - jnp.square(phi))))
    _volatility_loop(x0, y, mu, phi, sigma, length)


def _volatility_loop(x0, y, mu, phi, sigma, length):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(mu + phi * (x - mu), sigma))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def stochastic_volatility_with_leverage(
    y: Float[Array, " T"] | None,
    mu: Scalar = -1.0,
    phi: Scalar = 0.95,
    sigma: Scalar = 0.25,
    rho: Scalar = -0.5,
    *,
    length: int | None = None,
) -> None:
    """Stochastic volatility in which a fall of the price raises the next log-variance.

    `x_t ~ N(mu + phi (x_{t-1} - mu) + rho sigma e_{t-1}, sigma sqrt(1 - rho²))` with
    `e_t = y_t exp(-x_t / 2)` the standardised return; the first step has `e_0 = 0`.

    Args:
        y: `(T,)`, percent returns; None simulates `length` rows.
        mu, phi, sigma: as in `stochastic_volatility`.
        rho: correlation of a return with the next step of the log-variance, in (-1, 1).
        length: number of rows when `y` is None.
    Source: Omori, Chib, Shephard & Nakajima 2007, equations 1 to 3.
    """
    x0 = numpyro.sample("x0", dist.Normal(mu, sigma / jnp.sqrt(1 - jnp.square(phi))))

    own = sigma * jnp.sqrt(1 - jnp.square(rho))

    def step(carry, y_t):
        x, shock = carry
        x = numpyro.sample("x", dist.Normal(mu + phi * (x - mu) + rho * sigma * shock, own))
        y_t = numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return (x, y_t / jnp.exp(x / 2)), x

    scan(step, (x0, jnp.zeros_like(x0)), y, length=length)


def local_level(
    y: Float[Array, " T"] | None,
    level_scale: Scalar = 1.0,
    noise_scale: Scalar = 1.0,
    initial_mean: Scalar = 0.0,
    initial_scale: Scalar = 1.0,
    *,
    length: int | None = None,
) -> None:
    """A random walk seen through noise.

    `x_t ~ N(x_{t-1}, level_scale)`, `y_t ~ N(x_t, noise_scale)`.

    Args:
        y: `(T,)`; None simulates `length` rows.
        level_scale: standard deviation of a step.
        noise_scale: standard deviation of an observation.
        initial_mean, initial_scale: law of `x_0`.
        length: number of rows when `y` is None.
    Source: Durbin & Koopman 2012, section 2.1 (the Nile: noise_scale² 15099, level_scale² 1469.1).
    """
    x0 = numpyro.sample("x0", dist.Normal(initial_mean, initial_scale))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, level_scale))
        numpyro.sample("y", dist.Normal(x, noise_scale), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def linear_gaussian(
    y: Float[Array, "T p"] | None,
    model: LinearGaussian,
    initial_y: Float[Array, " p"] | None = None,
    *,
    length: int | None = None,
) -> None:
    """A vector moved by a matrix and seen through another, with Gaussian noise.

    Args:
        y: `(T, p)`; None simulates `length` rows.
        model: the matrices, as for `kalman_filter`.
        initial_y: `(p,)`, an observation of `x_0` itself (site "y0"); None if there is none.
        length: number of rows when `y` is None.
    Source: Kalman 1960.
    """
    x0 = numpyro.sample("x0", dist.MultivariateNormal(model.initial_mean, model.initial_cov))
    if initial_y is not None:
        y0 = dist.MultivariateNormal(model.observation @ x0, model.observation_cov)
        numpyro.sample("y0", y0, obs=initial_y)

    def step(x, y_t):
        move = dist.MultivariateNormal(model.transition @ x, model.transition_cov)
        x = numpyro.sample("x", move)
        seen = dist.MultivariateNormal(model.observation @ x, model.observation_cov)
        numpyro.sample("y", seen, obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def hidden_markov(
    y: Int[Array, " T"] | None,
    model: HiddenMarkov,
    initial_y: Int[ArrayLike, ""] | None = None,
    *,
    length: int | None = None,
) -> None:
    """A state that jumps between K values and shows one of M symbols at each row.

    Args:
        y: `(T,)`, symbols in `[0, M)`; None simulates `length` rows.
        model: the tables of probabilities.
        initial_y: `()`, a symbol shown by `x_0` itself (site "y0"); None if there is none.
        length: number of rows when `y` is None.
    Source: Rabiner 1989, section II.
    """
    x0 = numpyro.sample("x0", dist.CategoricalProbs(model.initial))
    if initial_y is not None:
        numpyro.sample("y0", dist.CategoricalProbs(model.emission[x0]), obs=initial_y)

    def step(x, y_t):
        x = numpyro.sample("x", dist.CategoricalProbs(model.transition[x]))
        numpyro.sample("y", dist.CategoricalProbs(model.emission[x]), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def theta_logistic(
    y: Float[Array, " T"] | None,
    growth: Scalar = 0.15,
    crowding: Scalar = 0.12,
    theta: Scalar = 0.1,
    sigma: Scalar = 0.47,
    noise_scale: Scalar = 0.39,
    *,
    length: int | None = None,
) -> None:
    """Log-size of a population whose growth falls with its size, counted with error.

    `x_t ~ N(x_{t-1} + growth - crowding exp(theta x_{t-1}), sigma)`, `y_t ~ N(x_t, noise_scale)`.

    Args:
        y: `(T,)`, log-counts; None simulates `length` rows.
        growth, crowding, theta: growth rate without crowding, its fall, and the power of size.
        sigma: standard deviation of a step of the log-size.
        noise_scale: standard deviation of a log-count.
        length: number of rows when `y` is None.
    Source: Peters, Hosack & Hayes 2010, by way of `ThetaLogistic` in particles, whose default
        numbers these are.
    """
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        mean = x + growth - crowding * jnp.exp(theta * x)
        x = numpyro.sample("x", dist.Normal(mean, sigma))
        numpyro.sample("y", dist.Normal(x, noise_scale), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def bearings_only(
    y: Float[Array, " T"] | None,
    sigma: Scalar = 0.001,
    noise_scale: Scalar = 0.005,
    initial_mean: tuple[float, ...] | Float[Array, " 4"] = (0.0, 0.0, 0.4, -0.05),
    initial_scale: tuple[float, ...] | Float[Array, " 4"] = (0.5, 0.005, 0.3, 0.01),
    *,
    length: int | None = None,
) -> None:
    """A ship followed by the direction in which it is seen from the origin.

    State `(4,)`: position and velocity in the first coordinate, then in the second. Each step
    draws an acceleration `push ~ N(0, sigma)` in both; the state follows from it.

    Args:
        y: `(T,)`, angles in radians from the first axis; None simulates `length` rows.
        sigma: standard deviation of the acceleration.
        noise_scale: standard deviation of an angle, in radians.
        initial_mean, initial_scale: `(4,)`, law of the state before the first row.
        length: number of rows when `y` is None.
    Source: Gordon, Salmond & Smith 1993, the bearings-only example. Here the angle has a von Mises law of the
        same spread instead of a normal one, so that a track may cross the cut at pi.
    """
    mean, scale = jnp.asarray(initial_mean), jnp.asarray(initial_scale)
    x0 = numpyro.sample("x0", dist.Normal(mean, scale).to_event(1))

    def step(x, y_t):
        push = numpyro.sample("push", dist.Normal(jnp.zeros(2), sigma).to_event(1))
        position, velocity = x[0::2], x[1::2]
        position, velocity = position + velocity + push / 2, velocity + push
        x = numpyro.deterministic("x", jnp.stack([position, velocity], axis=-1).reshape(4))
        angle = jnp.arctan2(position[1], position[0])
        numpyro.sample("y", dist.VonMises(angle, 1 / jnp.square(noise_scale)), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)
