"""Exact answers for linear-Gaussian programs: Kalman filter, smoother, log evidence.

The convention of every program here: `x_0` is drawn before the loop, then each row of the data
moves the state and observes it,

    x_0 ~ N(initial_mean, initial_cov)
    x_t = transition x_{t-1} + N(0, transition_cov)
    y_t = observation x_t + N(0, observation_cov)          for rows t = 1..T.

Arrays over rows have length `T`; what belongs to `x_0` sits in fields named `initial_*`. Missing
numbers are NaN, element by element, and are marginalised exactly.

| function | gives |
|---|---|
| `kalman_filter` | filtered and predicted moments, log evidence |
| `kalman_smoother` | moments given all rows, and covariances of neighbouring states |
| `local_level_model`, `autoregression_model`, `coupled_model` | the models most often asked for |

Read next: `zoo.py` for the same models as programs, `hmm.py` for discrete states.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float


class LinearGaussian(eqx.Module):
    """A linear-Gaussian state-space model; all fields are array leaves.

    Attributes:
        initial_mean: `(d,)`, mean of `x_0`.
        initial_cov: `(d, d)`, covariance of `x_0`.
        transition: `(d, d)`, the matrix that moves the state.
        transition_cov: `(d, d)`, covariance of the noise of a move.
        observation: `(p, d)`, the matrix that shows the state.
        observation_cov: `(p, p)`, covariance of the noise of an observation.
    """

    initial_mean: Float[Array, " d"]
    initial_cov: Float[Array, "d d"]
    transition: Float[Array, "d d"]
    transition_cov: Float[Array, "d d"]
    observation: Float[Array, "p d"]
    observation_cov: Float[Array, "p p"]


class Filtered(NamedTuple):
    """What the Kalman filter knows after each row.

    Attributes:
        log_evidence: `()`, `log p(y)` in nats, the observation of `x_0` included if there is one.
        log_increments: `(T,)`, `log p(y_t | y before t)`; 0 for a row that is missing.
        predicted_means: `(T, d)`, `E[x_t | y before t]`.
        predicted_covs: `(T, d, d)`.
        means: `(T, d)`, `E[x_t | y up to t]`.
        covs: `(T, d, d)`.
        initial_mean: `(d,)`, mean of `x_0` given its own observation, if any.
        initial_cov: `(d, d)`.
        initial_log_increment: `()`, log density of the observation of `x_0`, else 0.
    """

    log_evidence: Float[Array, ""]
    log_increments: Float[Array, " T"]
    predicted_means: Float[Array, "T d"]
    predicted_covs: Float[Array, "T d d"]
    means: Float[Array, "T d"]
    covs: Float[Array, "T d d"]
    initial_mean: Float[Array, " d"]
    initial_cov: Float[Array, "d d"]
    initial_log_increment: Float[Array, ""]


class Smoothed(NamedTuple):
    """What all rows together say about each state.

    Attributes:
        means: `(T, d)`, `E[x_t | y]`.
        covs: `(T, d, d)`.
        lag_one_covs: `(T, d, d)`, `Cov(x_{t-1}, x_t | y)`; its first entry is with `x_0`.
        initial_mean: `(d,)`, `E[x_0 | y]`.
        initial_cov: `(d, d)`.
    """

    means: Float[Array, "T d"]
    covs: Float[Array, "T d d"]
    lag_one_covs: Float[Array, "T d d"]
    initial_mean: Float[Array, " d"]
    initial_cov: Float[Array, "d d"]


def _update(
    model: LinearGaussian,
    mean: Float[Array, " d"],
    cov: Float[Array, "d d"],
    y: Float[Array, " p"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, ""]]:
    """Moments after seeing `y`, and its log density; NaN elements of `y` are marginalised."""
    seen = jnp.isfinite(y)
    # a missing element becomes an independent N(0, 1) seen at 0: it moves nothing, and its own
    # log density is left out of the sum below
    show = jnp.where(seen[:, None], model.observation, 0.0)
    noise = jnp.where(seen[:, None] & seen, model.observation_cov, jnp.eye(len(y), dtype=cov.dtype))
    innovation = jnp.where(seen, y - show @ mean, 0.0)
    chol = jnp.linalg.cholesky(show @ cov @ show.T + noise)
    gain = jax.scipy.linalg.cho_solve((chol, True), show @ cov).T
    white = jax.scipy.linalg.solve_triangular(chol, innovation, lower=True)
    log_density = (
        -0.5 * jnp.sum(white**2)
        - jnp.sum(jnp.log(jnp.diagonal(chol)))
        - 0.5 * jnp.sum(seen) * jnp.log(2 * jnp.pi)
    )
    keep = jnp.eye(len(mean), dtype=cov.dtype) - gain @ show
    # Joseph's form: stays symmetric and positive in float32
    return mean + gain @ innovation, keep @ cov @ keep.T + gain @ noise @ gain.T, log_density


def kalman_filter(
    model: LinearGaussian,
    observations: Float[ArrayLike, "T p"] | Float[ArrayLike, " T"],
    *,
    initial_observation: Float[ArrayLike, "..."] | None = None,
) -> Filtered:
    """Filtered moments and exact log evidence of a linear-Gaussian model.

    Args:
        model: the model, `d` state coordinates and `p` observed ones.
        observations: `(T, p)`, or `(T,)` when `p` is 1; NaN marks a missing number.
        initial_observation: `(p,)` or `()`, an observation of `x_0` itself; None when `x_0` is
            not observed.
    Returns:
        `Filtered`; jit, vmap and grad go through.
    Raises:
        ValueError: at trace time, when the rows do not have `p` numbers.
    Source: Kalman 1960; Särkkä 2013, theorem 4.2.

    >>> model = local_level_model(level_scale=1.0, noise_scale=1.0, initial_mean=0.0,
    ...     initial_scale=1.0)
    >>> filtered = kalman_filter(model, jnp.array([0.7]), initial_observation=-1.3)
    >>> round(float(filtered.means[0, 0]), 2), round(float(filtered.covs[0, 0, 0]), 2)
    (0.16, 0.6)
    """
    p = model.observation.shape[0]
    rows = _rows(observations, p)
    mean, cov = model.initial_mean, model.initial_cov
    initial_increment = jnp.zeros((), cov.dtype)
    if initial_observation is not None:
        first = jnp.asarray(initial_observation, cov.dtype).reshape(-1)
        mean, cov, initial_increment = _update(model, mean, cov, _rows(first[None], p)[0])

    def step(carry, y):
        mean, cov = carry
        ahead = model.transition @ mean
        ahead_cov = model.transition @ cov @ model.transition.T + model.transition_cov
        mean, cov, increment = _update(model, ahead, ahead_cov, y)
        return (mean, cov), (increment, ahead, ahead_cov, mean, cov)

    rows = rows.astype(cov.dtype)
    _, (increments, ahead, ahead_covs, means, covs) = lax.scan(step, (mean, cov), rows)
    log_evidence = initial_increment + jnp.sum(increments)
    return Filtered(
        log_evidence, increments, ahead, ahead_covs, means, covs, mean, cov, initial_increment
    )


def kalman_smoother(model: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Moments of every state given all rows, by the backward recursion.

    Args:
        model: the model that was filtered.
        filtered: what `kalman_filter` returned for it.
    Returns:
        `Smoothed`, with covariances of neighbouring states.
    Source: Rauch, Tung & Striebel 1965; lag-one covariances: Särkkä 2013, section 12.2.
    """
    before_means = jnp.concatenate([filtered.initial_mean[None], filtered.means[:-1]])
    before_covs = jnp.concatenate([filtered.initial_cov[None], filtered.covs[:-1]])

    def step(carry, row):
        later_mean, later_cov = carry
        mean, cov, ahead, ahead_cov = row
        factor = jnp.linalg.cholesky(ahead_cov)
        gain = jax.scipy.linalg.cho_solve((factor, True), model.transition @ cov).T
        lag_one = gain @ later_cov
        mean = mean + gain @ (later_mean - ahead)
        cov = cov + gain @ (later_cov - ahead_cov) @ gain.T
        return (mean, cov), (mean, cov, lag_one)

    last = (filtered.means[-1], filtered.covs[-1])
    rows = (before_means, before_covs, filtered.predicted_means, filtered.predicted_covs)
    _, (means, covs, lag_one) = lax.scan(step, last, rows, reverse=True)
    return Smoothed(
        means=jnp.concatenate([means[1:], filtered.means[-1:]]),
        covs=jnp.concatenate([covs[1:], filtered.covs[-1:]]),
        lag_one_covs=lag_one,
        initial_mean=means[0],
        initial_cov=covs[0],
    )


def local_level_model(
    *,
    level_scale: Float[ArrayLike, ""],
    noise_scale: Float[ArrayLike, ""],
    initial_mean: Float[ArrayLike, ""] = 0.0,
    initial_scale: Float[ArrayLike, ""] = 1.0,
) -> LinearGaussian:
    """The local level model as matrices: a random walk seen through noise, `d = p = 1`.

    Args:
        level_scale: standard deviation of a step of the walk.
        noise_scale: standard deviation of an observation around the level.
        initial_mean, initial_scale: law of the level before the first step.
    """
    return _scalar_model(1.0, level_scale, noise_scale, initial_mean, initial_scale)


def autoregression_model(
    *,
    coefficient: Float[ArrayLike, ""],
    state_scale: Float[ArrayLike, ""],
    noise_scale: Float[ArrayLike, ""],
) -> LinearGaussian:
    """A stationary AR(1) process of mean 0 seen through noise, as matrices, `d = p = 1`.

    Args:
        coefficient: in (-1, 1).
        state_scale: standard deviation of a step's noise; `x_0` has the stationary law.
        noise_scale: standard deviation of an observation around the state.
    """
    stationary = jnp.asarray(state_scale) / jnp.sqrt(1 - jnp.square(coefficient))
    return _scalar_model(coefficient, state_scale, noise_scale, 0.0, stationary)


def coupled_model(d: int, coupling: float = 0.42) -> LinearGaussian:
    """`d` coordinates that pull on each other: `transition[i, j] = coupling ** (|i - j| + 1)`.

    All covariances, and the observation matrix, are the identity.

    Args:
        d: number of coordinates, all observed.
        coupling: in (0, 1).
    Source: Guarniero, Johansen & Lee 2017, section 4.2.
    """
    index = jnp.arange(d)
    transition = coupling ** (jnp.abs(index[:, None] - index) + 1.0)
    eye = jnp.eye(d)
    return LinearGaussian(jnp.zeros(d), eye, transition, eye, eye, eye)


def _scalar_model(coefficient, state_scale, noise_scale, initial_mean, initial_scale):
    def matrix(value):
        return jnp.asarray(value, float).reshape(1, 1)

    return LinearGaussian(
        initial_mean=jnp.asarray(initial_mean, float).reshape(1),
        initial_cov=matrix(jnp.square(initial_scale)),
        transition=matrix(coefficient),
        transition_cov=matrix(jnp.square(state_scale)),
        observation=jnp.ones((1, 1)),
        observation_cov=matrix(jnp.square(noise_scale)),
    )


def _rows(observations, p: int):
    rows = jnp.asarray(observations)
    if rows.ndim == 1 and p == 1:
        rows = rows[:, None]
    if rows.ndim != 2 or rows.shape[1] != p:
        raise ValueError(
            f"smcscale: observations have shape {jnp.shape(observations)}, but the model's "
            f"observation matrix shows {p} numbers a row: pass an array of shape (T, {p})."
        )
    return rows
