"""Numbers that others can look up: small models with exact answers, and sizes of errors.

The exact numbers are Kalman, forward sums or conjugate formulas, checked again here in float64 where
it takes a line. Evidence and means are compared as `Z_hat / Z` and `Z_hat f_hat / Z`, which are
unbiased at any N.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from smcscale import SMC, ParticleFilter
from smcscale.kernels.lookahead import LookAhead
from support.exact import HMM, OBSERVED_WALK, WALK
from support.montecarlo import assert_mean

FAMILY = 40  # comparisons in this file


def replicated(program, *args, num_particles=100, num_runs=4000, **options):
    """Evidence ratios to come from `num_runs` independent runs, and the finished SMC."""
    smc = SMC(
        ParticleFilter(program, **options),
        num_particles=num_particles,
        num_runs=num_runs,
        progress_bar=False,
    )
    smc.run(jax.random.key(11), *args)
    return smc, np.asarray(smc.log_evidence, np.float64)


def moments(smc, site):
    """Mean and second moment of the last row, of every run `(R,)`."""
    mean = np.asarray(smc.result.moments.mean[site], np.float64)[:, -1]
    variance = np.asarray(smc.result.moments.variance[site], np.float64)[:, -1]
    return mean, variance + mean**2


@pytest.mark.statistical
@pytest.mark.parametrize("guided", [False, True])
def test_random_walk(guided):
    options = {"guide": WALK.guide} if guided else {}
    smc, evidence = replicated(WALK.program, WALK.data, store="paths", **options)
    ratio = np.exp(evidence + 6.51701)
    mean, square = moments(smc, "x")
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.02)
    assert_mean(ratio * mean, 1.2998, family=FAMILY, smallest_bias=0.04)
    assert_mean(ratio * square, 0.27564 + 1.2998**2, family=FAMILY, smallest_bias=0.06)
    weights = np.asarray(jax.nn.softmax(smc.result.log_weights, axis=1), np.float64)
    slots = jnp.broadcast_to(jnp.arange(weights.shape[1]), weights.shape)
    paths = smc.result.history.trace(slots)
    x = np.asarray(paths["x"], np.float64)
    total = np.einsum("rn,rn->r", weights, x.sum(axis=2))
    assert_mean(ratio * total, 6.1608, family=FAMILY, smallest_bias=0.15)
    product = np.einsum("rn,rn->r", weights, x[:, :, 3] * x[:, :, 4])
    assert_mean(ratio * product, 0.2104 + 1.2818 * 1.2998, family=FAMILY, smallest_bias=0.06)


@pytest.mark.statistical
def test_two_rows_of_an_observed_walk():
    smc, evidence = replicated(OBSERVED_WALK.program, OBSERVED_WALK.data)
    ratio = np.exp(evidence + 1.68801 + 1.74158)
    mean, square = moments(smc, "x")
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.02)
    assert_mean(ratio * mean, 0.16, family=FAMILY, smallest_bias=0.02)
    assert_mean(ratio * square, 0.6 + 0.16**2, family=FAMILY, smallest_bias=0.03)
    first = np.exp(np.asarray(smc.diagnostics.initial.log_evidence, np.float64) + 1.68801)
    assert_mean(first, 1.0, family=FAMILY, smallest_bias=0.02)


@pytest.mark.statistical
def test_hidden_markov_model():
    smc, evidence = replicated(HMM.program, HMM.data)
    ratio = np.exp(evidence + 3.20722)
    mean, _ = moments(smc, "x")
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.02)
    assert_mean(ratio * mean, 0.38778, family=FAMILY, smallest_bias=0.02)


def constant(y, scale):
    """A value that does not move, seen once a row."""
    x = numpyro.sample("theta", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        numpyro.deterministic("x", x)
        numpyro.sample("y", dist.Normal(x, scale), obs=y_t)
        return x, None

    scan(step, x, y)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("y", "scale", "log_evidence", "mean", "variance"),
    [
        ([4.0], 0.5, -7.43051, 3.2, 0.2),
        ([2.0, 2.0], 1.0, -3.72052, 4 / 3, 1 / 3),
        ([2.0, 2.0, 2.0, 2.0], 1.0, -6.08047, 1.6, 0.2),
        ([1.5, 2.0, 1.0], 1.0, -4.54371, 1.125, 0.25),
    ],
)
def test_a_value_that_does_not_move(y, scale, log_evidence, mean, variance):
    # the prior seldom comes near one sharp row: that takes more particles
    num_particles = 12_000 if scale < 1 else 400
    smc, evidence = replicated(constant, jnp.asarray(y), scale, num_particles=num_particles)
    ratio = np.exp(evidence - log_evidence)
    found, square = moments(smc, "x")
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.03)
    assert_mean(ratio * found, mean, family=FAMILY, smallest_bias=0.03 * mean)
    second = variance + mean**2
    assert_mean(ratio * square, second, family=FAMILY, smallest_bias=0.03 * second)


# ---- sizes of errors: bootstrap, guided by the optimal proposal, auxiliary

RHO, SIGMA_Y = 0.9, 0.2
STATIONARY = (1 / (1 - RHO**2)) ** 0.5
POSTERIOR = 1 / (1 + 1 / SIGMA_Y**2)  # variance of x_t given x_(t-1) and y_t


def autoregression(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, STATIONARY))
    numpyro.sample("y0", dist.Normal(x0, SIGMA_Y), obs=y[0])

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, 1.0))
        numpyro.sample("y", dist.Normal(x, SIGMA_Y), obs=y_t)
        return x, None

    scan(step, x0, y[1:])


def optimal(y):
    first = 1 / (1 / STATIONARY**2 + 1 / SIGMA_Y**2)
    x0 = numpyro.sample("x0", dist.Normal(first * y[0] / SIGMA_Y**2, first**0.5))

    def step(x, y_t):
        mean = POSTERIOR * (RHO * x + y_t / SIGMA_Y**2)
        return numpyro.sample("x", dist.Normal(mean, POSTERIOR**0.5)), None

    scan(step, x0, y[1:])


def predictive(x, y_t):
    return dist.Normal(RHO * x, (1 + SIGMA_Y**2) ** 0.5).log_prob(y_t)


@pytest.mark.statistical
def test_spread_of_the_evidence_of_three_filters():
    """N = 1000, T = 100: published ranges over data sets; bootstrap at least 8 times guided."""
    rng = np.random.default_rng(5)
    x, rows = STATIONARY * rng.normal(), []
    for _ in range(100):
        rows.append(x + SIGMA_Y * rng.normal())
        x = RHO * x + rng.normal()
    y = np.asarray(rows)
    lag = np.abs(np.subtract.outer(np.arange(100), np.arange(100)))
    law = STATIONARY**2 * RHO**lag + SIGMA_Y**2 * np.eye(100)
    exact = -0.5 * (y @ np.linalg.solve(law, y) + np.linalg.slogdet(2 * np.pi * law)[1])
    filters = {
        "bootstrap": {},
        "guided": {"guide": optimal},
        "auxiliary": {"guide": optimal, "lookahead": LookAhead(predictive)},
    }
    published = {"bootstrap": (0.7, 1.2), "guided": (0.045, 0.075), "auxiliary": (0.03, 0.065)}
    num_runs = 400
    spread = {}
    for name, options in filters.items():
        _, evidence = replicated(
            autoregression, jnp.asarray(y), num_particles=1000, num_runs=num_runs, **options
        )
        spread[name] = evidence.std(ddof=1)
        low, high = published[name]
        error = spread[name] / (2 * num_runs) ** 0.5  # of a standard deviation of normal numbers
        assert low - 4 * error <= spread[name] <= high + 4 * error, name
        if name != "bootstrap":  # near enough to log-normal: log Z_hat is low by half its variance
            low_by = exact - evidence.mean()
            assert abs(low_by - spread[name] ** 2 / 2) < 4 * spread[name] / num_runs**0.5, name
    assert spread["bootstrap"] >= 8 * spread["guided"]
