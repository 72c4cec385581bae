"""A learned value against the exact one of a mixture; a bad one leaves the evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import mixtures, schedules
from smcscale.models.diffusion.learned import fit_value
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.twisted import Sloped, Twisted
from support.montecarlo import assert_mean

LINE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5], [1.0]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)  # fmt: skip
REWARD = mixtures.quadratic([[2.0]], center=[-0.8])
SCHEDULE, STRENGTH = schedules.vp_linear(12), 1.5
DATA = LINE.distribution().sample(jax.random.key(0), (20_000,))
EXACT = float(LINE.tilted(REWARD, STRENGTH).log_normalizer)


def quiet(*text, **options):
    pass


@pytest.fixture(scope="module")
def learned():
    return fit_value(REWARD, SCHEDULE, DATA, strength=STRENGTH, steps=1500, log=quiet)


def test_the_value_is_learned(learned):
    """Root mean square error over noised data, level by level; values vary by 0.3 to 0.8."""
    exact = mixtures.ExactTwist(LINE, REWARD, STRENGTH)
    noise = jax.random.normal(jax.random.key(1), (500, 1))
    for k in (2, 6, 12):
        level = SCHEDULE.level(k)
        x = level.alpha * DATA[:500] + level.sigma * noise
        found, truth = (
            np.asarray(jax.vmap(lambda x, f=f, level=level: f(x, None, level))(x))
            for f in (learned, exact)
        )
        error = np.sqrt(np.mean((found - truth) ** 2))
        assert error < 0.15, (k, error, truth.std())
    # nothing is known of the data at the top level: the evidence
    assert found.mean() == pytest.approx(EXACT / STRENGTH, abs=0.05)


def log_evidences(value, guided, num_runs):
    steering = Steering(REWARD, strength=STRENGTH, value=value)
    denoiser = mixtures.ExactDenoiser(LINE)
    options = {}
    if guided:
        denoiser, options = Sloped(denoiser, steering), {"sampler": Twisted(steering)}
    smc = SMC(
        ParticleFilter(denoise, store="last"), num_particles=4, num_runs=num_runs,
        progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(2), denoiser, SCHEDULE, steering, shape=(1,), **options)
    return np.asarray(smc.log_evidence, np.float64)


@pytest.mark.slow
@pytest.mark.statistical
def test_a_learned_guide_lowers_the_variance_and_leaves_the_evidence(learned):
    plain, guided = log_evidences(None, False, 60_000), log_evidences(learned, True, 8000)
    assert guided.std() < 0.8 * plain.std(), (guided.std(), plain.std())
    # the discretized model is the same, so its plain filter is the reference
    reference = np.exp(plain)
    error = reference.std() / np.sqrt(len(reference))
    assert error < 0.006 * reference.mean()
    assert_mean(np.exp(guided) / reference.mean(), 1.0, family=1, smallest_bias=0.03)


@pytest.mark.refusal
def test_refusals():
    with pytest.raises(ValueError, match="a finite `strength` that is not 0"):
        fit_value(REWARD, SCHEDULE, DATA, strength=0.0)
    with pytest.raises(ValueError, match=r"`reward` of one state has shape \(1,\)"):
        fit_value(lambda x: x, SCHEDULE, np.asarray(DATA))
    with pytest.raises(ValueError, match="`reward` must be finite for all `data`, 20000 given"):
        fit_value(lambda x: jnp.where(x[0] > 0, 0.0, -jnp.inf), SCHEDULE, DATA)
