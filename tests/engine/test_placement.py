"""Particles over the devices of a mesh: the numbers of one device, each array cut."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.placement import AXIS, particle_mesh
from support.exact import HMM, WALK

pytestmark = pytest.mark.multidevice


@pytest.fixture(autouse=True)
def eight_devices():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")


def run(model=WALK, num_particles=64, num_runs=3, **options):
    options = {"trigger": triggers.ess_below(0.7)} | options
    smc = SMC(
        ParticleFilter(model.program, **options), num_particles=num_particles, num_runs=num_runs,
        progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(0), model.data)
    return smc


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resampling": resampling.multinomial, "trigger": triggers.always, "store": "paths"},
        {"annealing": annealing.ESSFloor(0.5), "store": "ancestry"},
    ],
    ids=["ess", "paths", "annealed"],
)
@pytest.mark.parametrize("model", [WALK, HMM], ids=["walk", "hmm"])
def test_the_numbers_are_those_of_one_device(model, options):
    alone = run(model, **options)
    with jax.set_mesh(particle_mesh()):
        spread = run(model, **options)
    np.testing.assert_allclose(spread.log_evidence, alone.log_evidence, atol=1e-4)
    np.testing.assert_array_equal(spread.diagnostics.resampled, alone.diagnostics.resampled)
    np.testing.assert_allclose(spread.result.log_weights, alone.result.log_weights, atol=1e-3)
    for name, value in alone.result.final.items():
        np.testing.assert_allclose(spread.result.final[name], value, atol=1e-4)


def test_schedules_and_estimates():
    alone = run(num_particles=[64, 64, 32, 32, 32], store="last")
    with jax.set_mesh(particle_mesh()):
        smc = run(num_particles=[64, 64, 32, 32, 32], store="last")
        assert smc.estimate_memory(WALK.data)["total"] > 0
    np.testing.assert_allclose(smc.log_evidence, alone.log_evidence, atol=1e-4)
    assert {s.data.shape for s in smc.result.final["x"].addressable_shards} == {(3, 32 // 8)}


def test_arrays_are_cut():
    with jax.set_mesh(particle_mesh()):
        smc = run(store="last")
    final = smc.result.final["x"]
    assert {s.data.shape for s in final.addressable_shards} == {(3, 64 // 8)}
    smc = run(store="last")
    assert len(smc.result.final["x"].sharding.device_set) == 1


@pytest.mark.refusal
def test_meshes_that_do_not_fit_are_refused():
    with (
        jax.set_mesh(particle_mesh()),
        pytest.raises(ValueError, match="num_particles = 60 cannot be cut"),
    ):
        run(num_particles=60)
    explicit = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match='"particles" must be automatic'):
        run()
