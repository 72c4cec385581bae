"""Guided proposals against the exact evidence of a discretized model on a grid.

The model is one-dimensional: two normal components, seven levels, DDIM(1) with the exact predicted data,
started from N(0, 1). Its evidences are integrals over six steps, found by refining a grid.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import mixtures, schedules
from smcscale.models.diffusion.potentials import Polynomial, Steering
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.samplers import DDIM, Proposed, ancestral
from smcscale.models.diffusion.twisted import (
    NoisyLikelihood,
    Sloped,
    Twisted,
    data_shift,
    mean_shift,
)
from support.montecarlo import assert_mean

MIXTURE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])),
    jnp.asarray([[-1.5], [1.0]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)
SIGNAL = np.asarray([1, 0.97, 0.85, 0.6, 0.3, 0.1, 0.02])  # alpha squared
FAMILY = 8


def reward(x):
    return -0.7 * (x[0] - 0.4) ** 2 - 0.3


def log_likelihood(x):
    return dist.Normal(x[0], 0.5).log_prob(0.6)


def point_prediction(x, level):
    """The exact mean of the data, without its variance: plain DDIM."""
    return mixtures.ExactDenoiser(MIXTURE)(x, level)._replace(variance=None)


def coarse() -> schedules.Schedule:
    zero = np.zeros(7)
    return schedules.as_schedule(
        np.sqrt(SIGNAL), np.sqrt(1 - SIGNAL), np.arange(7.0), zero, zero, 1.0
    )


@jax.jit
def _moments(x, high, low):
    """Mean and variance `(n,)` of the states below states `(n,)`."""

    def one(x):
        law = ancestral(None, x[None], point_prediction(x[None], high), high, low)
        return law.mean[0], law.variance[0]

    return jax.vmap(one)(x)


def expected(function, strength=1.0):
    """`E[exp(strength * function(x_0))]` of the discretized model, by a recursion on a grid."""
    grid = np.linspace(-9, 9, 3001)
    schedule = coarse()
    values = np.zeros_like(grid)
    for k in range(1, 7):
        high, low = schedule.level(k), schedule.level(k - 1)
        mean, variance = _moments(jnp.asarray(grid), high, low)
        if k == 1:  # nothing is drawn
            values = np.exp(strength * np.asarray(jax.vmap(function)(jnp.asarray(mean)[:, None])))
            continue
        mean, variance = (np.asarray(a, np.float64)[:, None] for a in (mean, variance))
        kernel = np.exp(-((grid - mean) ** 2) / (2 * variance))
        values = kernel @ values / kernel.sum(axis=1)
    start = np.exp(-(grid**2) / 2)
    return float(start @ values / start.sum())


def evidences(steering, sampler, num_runs=20_000):
    smc = SMC(
        ParticleFilter(denoise, store="last"), num_particles=4, num_runs=num_runs,
        progress_bar=False,
    )  # fmt: skip
    smc.run(
        jax.random.key(3), Sloped(point_prediction, steering), coarse(), steering, shape=(1,),
        sampler=sampler,
    )  # fmt: skip
    return np.exp(np.asarray(smc.log_evidence, np.float64))


OBSERVED = Steering(log_likelihood, value=NoisyLikelihood(lambda x: x, jnp.asarray([0.6]), 0.5))
REWARDED = Steering(reward, strength=1.3)
TEMPERED = Steering(reward, strength=1.3, tempering=Polynomial(0.3))


def test_the_grid_gives_the_published_numbers():
    """Numbers of the reference task, by grid refinement to 12 digits."""
    assert expected(reward, 1.3) == pytest.approx(0.379576709909, abs=2e-6)
    assert expected(log_likelihood) == pytest.approx(0.393825096699, abs=2e-6)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("function", "sampler"),
    [
        (log_likelihood, Twisted(OBSERVED)),
        pytest.param(
            log_likelihood, Twisted(OBSERVED, by=data_shift, scale=0.4), marks=pytest.mark.slow
        ),
        pytest.param(reward, Twisted(REWARDED), marks=pytest.mark.slow),
        (reward, Twisted(TEMPERED, 6)),
    ],
    ids=["TDS", "TDS-data-shift", "DAS-untempered", "DAS"],
)
def test_evidence(function, sampler):
    """`E[Z] = Z` of the discretized model at K = 4 particles, whatever the shift."""
    truth = expected(function, float(sampler.steering.strength))
    found = evidences(sampler.steering, sampler)
    assert_mean(found, truth, family=FAMILY, smallest_bias=0.02 * truth)


@pytest.mark.slow
@pytest.mark.statistical
def test_the_slope_lowers_the_variance():
    plain = evidences(OBSERVED, ancestral, num_runs=4000)
    guided = evidences(OBSERVED, Twisted(OBSERVED), num_runs=4000)
    # measured .55 (± .03)
    assert np.log(guided).std() / np.log(plain).std() < 0.8


def test_the_slope_is_that_of_the_reward_through_the_network():
    level = coarse().level(4)
    x = jnp.asarray([0.3])
    found = Sloped(point_prediction, REWARDED)(x, level).extra.gradient
    step = 1e-3
    ends = [reward(point_prediction(x + s, level).x0) for s in (step, -step)]
    np.testing.assert_allclose(found[0], (ends[0] - ends[1]) / (2 * step), rtol=2e-3)
    short = Sloped(point_prediction, REWARDED, bound=0.01)(x, level).extra.gradient
    np.testing.assert_allclose(jnp.abs(short), 0.01, rtol=1e-5)


def test_the_weight_is_the_ratio_of_densities():
    schedule = coarse()
    high, low = schedule.level(5), schedule.level(4)
    x, state = jnp.asarray([0.3]), jnp.asarray([-0.2])
    denoiser = Sloped(point_prediction, REWARDED)
    prediction = denoiser(x, high)
    for shift in (mean_shift, data_shift):
        law, log_weight = Twisted(REWARDED, by=shift)(denoiser, x, prediction, high, low)
        own = ancestral(denoiser, x, prediction._replace(extra=None), high, low)
        expected = own.log_prob(state) - law.log_prob(state)
        np.testing.assert_allclose(log_weight(state), expected, rtol=1e-4)
        assert abs(float(law.mean[0] - own.mean[0])) > 1e-3


def test_a_step_without_noise_is_the_models_own():
    schedule = coarse()
    high, low = schedule.level(1), schedule.level(0)
    x = jnp.asarray([0.3])
    denoiser = Sloped(point_prediction, REWARDED)
    for eta in (1.0, 0.0):

        @jax.jit
        def step(x, high, low, eta=eta):
            prediction = denoiser(x, high)
            law, log_weight = Twisted(REWARDED, sampler=DDIM(eta))(
                denoiser, x, prediction, high, low
            )
            own = DDIM(eta)(denoiser, x, prediction._replace(extra=None), high, low)
            return law.mean, own.mean, log_weight(law.mean)

        mean, own, weight = step(x, high, low)
        np.testing.assert_array_equal(mean, own)
        assert float(weight) == 0.0


@pytest.mark.refusal
def test_refusals():
    schedule = coarse()
    high, low = schedule.level(5), schedule.level(4)
    x = jnp.asarray([0.3])
    with pytest.raises(TypeError, match="Sloped"):
        Twisted(REWARDED)(point_prediction, x, point_prediction(x, high), high, low)
    denoiser = Sloped(point_prediction, REWARDED)
    with pytest.raises(ValueError, match="num_steps"):
        Twisted(TEMPERED)(denoiser, x, denoiser(x, high), high, low)
    weighed = lambda *given: Proposed(ancestral(*given), lambda state: 0.0)
    with pytest.raises(TypeError, match="plain normal steps"):
        Twisted(REWARDED, sampler=weighed)(denoiser, x, denoiser(x, high), high, low)
