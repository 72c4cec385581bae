"""One set of kernel objects under a time series, a language model and a diffusion model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.models.diffusion import mixtures, schedules
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.program import denoise
from smcscale.models.reasoning import program
from smcscale.models.reasoning.program import reason
from support.exact import WALK
from support.montecarlo import assert_mean
from support.reasoning import tiny

KERNELS = {
    "resampling": resampling.ssp,
    "trigger": triggers.ess_below(0.95),
    "annealing": annealing.ESSFloor(0.5),
}
STEPS = 3
MIXTURE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5], [1.0]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)  # fmt: skip


def time_series():
    return WALK.program, (WALK.data,), {}, WALK.log_evidence


def language():
    """A potential that telescopes: the evidence is the mean of the last score over all texts."""
    lm, prm = tiny.language_model(), tiny.reward_model()
    texts = tiny.texts(lm, STEPS)
    exact = sum(
        np.exp(tiny.log_probability(lm, tokens)) * tiny.scores(prm, tokens, ends)[-1]
        for tokens, ends in texts
    )
    prompt = program.read_prompt(lm, prm, tiny.PROMPT)
    return reason, (lm, prm, prompt), {"max_steps": STEPS}, np.log(exact)


def diffusion():
    schedule, reward = schedules.vp_linear(8), mixtures.quadratic([[1.0]], center=[0.4])
    top = schedule.level(-1)
    options = {
        "shape": (1,),
        "sampler": mixtures.ExactReverse(MIXTURE),
        "start": MIXTURE.noised(top.alpha, top.sigma).distribution(),
    }
    args = (mixtures.ExactDenoiser(MIXTURE), schedule, Steering(reward, strength=0.8))
    return denoise, args, options, float(MIXTURE.tilted(reward, 0.8).log_normalizer)


@pytest.mark.statistical
@pytest.mark.parametrize("domain", [time_series, language, diffusion])
def test_the_same_kernels_give_the_exact_evidence(domain):
    model, args, options, exact = domain()
    smc = SMC(
        ParticleFilter(model, store="last", **KERNELS), num_particles=16, num_runs=2000,
        progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(7), *args, **options)
    found = np.exp(np.asarray(smc.log_evidence, np.float64) - exact)
    assert_mean(found, 1.0, family=3, smallest_bias=0.1)
    assert smc.cost["resampled_particles"] > 0
