"""One set of kernel objects in a series, a language model and a diffusion model."""

import jax
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.models.diffusion import (
    Interval,
    Steering,
    denoise,
    load_denoiser,
    load_judges,
    pretrained,
    vp_linear,
)
from smcscale.models.reasoning import reason, solve, tasks
from smcscale.models.statespace import local_level, nile

KERNELS = {
    "resampling": resampling.ssp,
    "trigger": triggers.ess_below(0.95),
    "annealing": annealing.ESSFloor(0.5),
}


def _series():
    smc = SMC(ParticleFilter(local_level, store="last", **KERNELS), num_particles=50)
    numbers = {"level_scale": 38.3, "noise_scale": 122.9}
    numbers |= {"initial_mean": 1000.0, "initial_scale": 300.0}
    smc.run(jax.random.key(0), nile().values[:20], **numbers)
    return smc.algorithm, smc.log_evidence, smc.cost


def _texts():
    method = ParticleFilter(reason, store="last", **KERNELS)
    found = solve(tasks.problems(77, 1)[0].question, num_particles=8, method=method)
    return method, found.log_evidence, found.cost


def _digits():
    classify, _ = load_judges(pretrained("digits-judges"))
    smc = SMC(ParticleFilter(denoise, store="last", **KERNELS), num_particles=8)
    steering = Steering(lambda x: classify(x)[8], strength=3.0, scored=Interval(every=5))
    smc.run(
        jax.random.key(0), load_denoiser(pretrained("digits")), vp_linear(30), steering, shape=(64,)
    )
    return smc.algorithm, smc.log_evidence, smc.cost


@pytest.mark.parametrize("domain", [_series, _texts, _digits])
def test_the_same_kernels_serve(domain):
    """The objects go in unchanged, have something to do, and leave a finite evidence."""
    method, log_evidence, cost = domain()
    assert method.resampling is KERNELS["resampling"]
    assert method.trigger == KERNELS["trigger"] and method.annealing == KERNELS["annealing"]
    assert np.isfinite(log_evidence).all()
    assert cost["resampled_particles"] > 0
