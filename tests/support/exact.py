"""Small models with exact answers, their optimal guides and predictive look-aheads.

Numbers are exact (Kalman or forward-backward, see `tests/models/statespace`), for unbiasedness tests
that see a bias of 2%.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan


class Exact(NamedTuple):
    """A program, its proposal and look-ahead, and what every filter must find.

    Attributes:
        program: NumPyro program of the data.
        guide: its optimal proposal.
        log_eta: look-ahead of one particle, `(carry, next row) -> log predictive density`.
        data: `(T,)` or `(T + 1,)` rows.
        log_evidence: nats.
        filter_mean: of the last state.
        smoothing_mean: `(T,)`, of the states inside the loop.
    """

    program: Callable
    guide: Callable
    log_eta: Callable
    data: jax.Array
    log_evidence: float
    filter_mean: float
    smoothing_mean: np.ndarray


def _normal(x: Any, loc: Any, variance: Any) -> Any:
    return dist.Normal(loc, jnp.sqrt(variance)).log_prob(x)


# ---- random walk, x_0 not observed


def walk(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.3))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, x0, y)


def walk_guide(y):
    x0 = numpyro.sample("x0", dist.Normal(0.5, 1.2))
    variance = 1 / (1 / 0.09 + 1.0)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(variance * (x / 0.09 + y_t), variance**0.5))
        return x, None

    scan(step, x0, y)


WALK = Exact(
    walk,
    walk_guide,
    lambda x, y: _normal(y, x, 1.09),
    jnp.array([1.5, 1.2, 1.6, 1.4, 1.5]),
    -6.51701,
    1.2998,
    np.array([1.1328, 1.1933, 1.2531, 1.2818, 1.2998]),
)

# ---- two-state hidden Markov model, x_0 observed

_START = jnp.array([0.6, 0.4])
_MOVE = jnp.array([[0.9, 0.1], [0.2, 0.8]])
_SAME = jnp.array([0.8, 0.3])  # P(y = 0 | state)


def _likelihood(y: Any) -> Any:
    return jnp.where(y == 0, _SAME, 1 - _SAME)


def hmm(y):
    x0 = numpyro.sample("x0", dist.Categorical(_START))
    numpyro.sample("y0", dist.Bernoulli(1 - _SAME[x0]), obs=y[0])

    def step(x, y_t):
        x = numpyro.sample("x", dist.Categorical(_MOVE[x]))
        numpyro.sample("y", dist.Bernoulli(1 - _SAME[x]), obs=y_t)
        return x, None

    scan(step, x0, y[1:])


def hmm_guide(y):
    x0 = numpyro.sample("x0", dist.Categorical(jnp.array([0.5, 0.5])))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Categorical(logits=jnp.log(_MOVE[x] * _likelihood(y_t))))
        return x, None

    scan(step, x0, y[1:])


HMM = Exact(
    hmm,
    hmm_guide,
    lambda x, y: jnp.log(jnp.sum(_MOVE[x] * _likelihood(y))),
    jnp.array([0, 1, 1, 0]),
    -3.20722,
    0.38778,
    np.array([0.63267, 0.62104, 0.38778]),
)

# ---- random walk of unit steps, x_0 observed


def observed_walk(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
    numpyro.sample("y0", dist.Normal(x0, 1.0), obs=y[0])

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, x0, y[1:])


def observed_walk_guide(y):
    x0 = numpyro.sample("x0", dist.Normal(y[0] / 2, 0.8))

    def step(x, y_t):
        return numpyro.sample("x", dist.Normal((x + y_t) / 2, 0.5**0.5)), None

    scan(step, x0, y[1:])


OBSERVED_WALK = Exact(
    observed_walk,
    observed_walk_guide,
    lambda x, y: _normal(y, x, 2.0),
    jnp.array([-1.3, 0.7]),
    -1.68801 - 1.74158,
    0.16,
    np.array([0.16]),
)


# ---- stationary autoregression


def autoregression(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.25))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.6 * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.5), obs=y_t)
        return x, None

    scan(step, x0, y)


def autoregression_guide(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.4))
    variance = 1 / (1 + 1 / 2.25)

    def step(x, y_t):
        mean = variance * (0.6 * x + y_t / 2.25)
        return numpyro.sample("x", dist.Normal(mean, variance**0.5)), None

    scan(step, x0, y)


def _autoregression_answers(y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Evidence and means from one dense Gaussian over x_0..x_T."""
    steps = len(y)
    lag = np.abs(np.subtract.outer(np.arange(steps + 1), np.arange(steps + 1)))
    prior = 1.5625 * 0.6**lag  # stationary: 1 / (1 - 0.36) = 1.5625
    cross = prior[:, 1:]
    marginal = prior[1:, 1:] + 2.25 * np.eye(steps)
    solved = np.linalg.solve(marginal, y)
    _, logdet = np.linalg.slogdet(2 * np.pi * marginal)
    mean = cross @ solved
    return -0.5 * (y @ solved + logdet), float(mean[-1]), mean[1:]


_SERIES = np.array([0.4, -1.1, 0.9, 1.6, 0.2, -0.7])
_ANSWERS = _autoregression_answers(_SERIES)
AUTOREGRESSION = Exact(
    autoregression,
    autoregression_guide,
    lambda x, y: _normal(y, 0.6 * x, 3.25),
    jnp.asarray(_SERIES, jnp.float32),
    _ANSWERS[0],
    _ANSWERS[1],
    _ANSWERS[2],
)

MODELS = {
    "walk": WALK,
    "hmm": HMM,
    "observed_walk": OBSERVED_WALK,
    "autoregression": AUTOREGRESSION,
}
