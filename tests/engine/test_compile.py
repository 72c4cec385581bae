"""What compiles and when: counted through JAX's own monitoring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter, keys
from smcscale.engine import compiled
from smcscale.engine.compiled import Sizes
from smcscale.kernels import annealing, resampling, triggers
from support.exact import WALK

_COMPILED = []


def _listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations(action):
    before = len(_COMPILED)
    action()
    return len(_COMPILED) - before


def run(data, seed=0, program=WALK.program, **options):
    options = {"annealing": annealing.ESSFloor(0.5), "trigger": triggers.ess_below(0.4)} | options
    smc = SMC(
        ParticleFilter(program, store="last", **options), num_particles=100, progress_bar=False
    )
    smc.run(jax.random.key(seed), data)
    return np.asarray(smc.log_evidence)


@pytest.mark.compile
def test_rebuilt_and_rerun_compiles_nothing():
    data = jnp.asarray(np.random.default_rng(0).normal(size=300), jnp.float32)
    moved, short = data + 1.0, data[:200]
    other = short + 1.0
    run(data)
    assert compilations(lambda: run(moved)) == 0, "new data of the same shape"
    assert compilations(lambda: run(data, seed=5)) == 0, "another seed"
    assert compilations(lambda: run(2 * np.asarray(data))) <= 1, "NumPy data: the conversion"
    assert compilations(lambda: run(data, annealing=annealing.ESSFloor(0.7))) > 0
    assert compilations(lambda: run(data, resampling=resampling.stratified)) > 0
    assert compilations(lambda: run(short)) > 0, "another T compiles once"
    assert compilations(lambda: run(other)) == 0


@pytest.mark.compile
def test_a_block_is_one_compilation_whatever_the_length():
    data = jnp.asarray(np.random.default_rng(0).normal(size=1100), jnp.float32)
    run(data[:10])

    long = jnp.tile(data, 3)
    # start, block, finish, and a few one-line array operations: as many for 5 blocks as for 13
    assert compilations(lambda: run(long)) <= compilations(lambda: run(data))


@pytest.mark.parametrize("store", ["last", "paths"])
def test_the_block_exports_for_cpu_cuda_and_tpu(store):
    sizes = Sizes(64, 2, 1, None)
    particle_filter = ParticleFilter(
        WALK.program, guide=WALK.guide, annealing=annealing.ESSFloor(0.5), store=store
    )
    run_keys = keys.run_keys(jax.random.key(0), 2)
    population, _, meta = compiled.start(particle_filter, run_keys, sizes, (WALK.data,), {}, False)

    def block(run_data, population, data):
        ks = jax.random.wrap_key_data(run_data)
        fixed = (particle_filter, ks, sizes, (data,), {}, (1, store == "paths"), jnp.int32(5))
        new, info, _, _ = compiled.block(fixed, population)
        return new.log_evidence, info.ess

    exported = jax.export.export(jax.jit(block), platforms=["cpu", "cuda", "tpu"])(
        jax.random.key_data(run_keys), population, WALK.data
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    evidence, _ = exported.call(jax.random.key_data(run_keys), population, WALK.data)
    assert np.isfinite(np.asarray(evidence)).all()
    assert meta.chunk >= 2
