"""The nine modes of Kim, Kim & Park 2025 (DAS): evidence and masses of the modes, held to closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import schedules
from smcscale.models.diffusion.mixtures import (
    ExactDenoiser,
    ExactReverse,
    ExactTwist,
    GaussianMixture,
    quadratic,
)
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.program import denoise
from support.montecarlo import assert_mean

MEANS = jnp.array([[x, y] for x in (-4.0, 0.0, 4.0) for y in (-4.0, 0.0, 4.0)])
MODES = GaussianMixture(jnp.full(9, -jnp.log(9.0)), MEANS, jnp.tile(0.3 * jnp.eye(2), (9, 1, 1)))
#: reward, its log Z, the coordinate whose modes are listed, their masses: as published or worked out
REWARDS = {
    "r1": (quadratic([[0.02, 0.0], [0.0, 2.0]]), -1.43969, 0, [0.31522, 0.36956, 0.31522]),
    "r2": (
        quadratic([[2.0, 0.0], [0.0, 0.2]], [0.0, 1.0]), -2.10195, 1, [0.06602, 0.63530, 0.29868],
    ),
}  # fmt: skip
FAMILY = 2 * 2 * 4


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("name", "steps"),
    [("r1", 8), ("r2", 8), *(pytest.param(name, 32, marks=pytest.mark.slow) for name in REWARDS)],
)
def test_evidence_and_masses_of_the_modes(name, steps):
    """The walk is exact at any number of steps, so only Monte Carlo error is left."""
    reward, log_z, coordinate, masses = REWARDS[name]
    schedule = schedules.vp_linear(steps)
    top = schedule.level(-1)
    smc = SMC(ParticleFilter(denoise, store="last"), num_particles=64, num_runs=1500,
              progress_bar=False)  # fmt: skip
    smc.run(
        jax.random.key(4), ExactDenoiser(MODES), schedule,
        Steering(reward, value=ExactTwist(MODES, reward)), shape=(2,),
        sampler=ExactReverse(MODES), start=MODES.noised(top.alpha, top.sigma).distribution(),
    )  # fmt: skip
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64) - log_z)
    weights = np.asarray(jax.nn.softmax(smc.result.log_weights, axis=1), np.float64)
    samples, _ = smc.get_samples(weighted=True)
    x = np.asarray(samples["x"]).reshape(*weights.shape, 2)[..., coordinate]
    mode = np.clip(np.round(x / 4), -1, 1)
    shares = [np.where(mode == side, weights, 0.0).sum(1) * ratio for side in (-1, 0, 1)]
    assert_mean(
        np.stack([ratio, *shares], axis=1), [1.0, *masses], family=FAMILY, smallest_bias=0.06
    )
