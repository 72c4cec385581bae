"""What compiles and when: counted through JAX's own monitoring."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from smcscale import SMC, FeynmanKac, ParticleFilter, keys
from smcscale.engine import compiled
from smcscale.engine.compiled import Sizes
from smcscale.feynman_kac import Capabilities
from smcscale.kernels import annealing, lookahead, resampling, tilts, triggers
from smcscale.models.reasoning import program
from support.compilations import compilations
from support.exact import HMM, WALK
from support.reasoning import tiny


def run(data, seed=0, model=WALK.program, **options):
    options = {"annealing": annealing.ESSFloor(0.5), "trigger": triggers.ess_below(0.4)} | options
    smc = SMC(ParticleFilter(model, store="last", **options), num_particles=100, progress_bar=False)
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


def _plain(**pieces):
    move = lambda key, x, y: x + 0.3 * jax.random.normal(key)
    return FeynmanKac(
        lambda key: jax.random.normal(key),
        move,
        lambda previous, x, y: dist.Normal(x, 1.0).log_prob(y),
        **pieces,
    )


def _heavy():
    return FeynmanKac(
        lambda key: {"x": jax.random.normal(key), "cache": jnp.zeros(7)},
        lambda key, state, y: state | {"x": state["x"] + jax.random.normal(key)},
        lambda previous, state, y: dist.Normal(state["x"], 1.0).log_prob(y),
        heavy="cache",
    )


def _batched(key, x, y):
    return x + 0.3 * jax.random.normal(key, x.shape)


PROMPT = program.read_prompt(tiny.language_model(), tiny.reward_model(), tiny.PROMPT)
TEXT = (tiny.language_model(), tiny.reward_model(), PROMPT)
ROWS = (WALK.data,)
# what is filtered, on what, with which options, in how many islands
PATHS = {
    "bootstrap": (WALK.program, ROWS, {}, 1),
    "no history": (WALK.program, ROWS, {"store": "last"}, 1),
    "ancestry": (WALK.program, ROWS, {"store": "ancestry"}, 1),
    "guided, annealed": (
        WALK.program, ROWS, {"guide": WALK.guide, "annealing": annealing.ESSFloor(0.5)}, 1
    ),
    "look-ahead": (WALK.program, ROWS, {"lookahead": lookahead.LookAhead(WALK.log_eta)}, 1),
    "soft": (WALK.program, ROWS, {"tilt": tilts.Soft(0.5)}, 1),
    "optimal": (WALK.program, ROWS, {"tilt": tilts.Optimal(32)}, 1),
    "islands": (WALK.program, ROWS, {}, 4),
    "best per island": (WALK.program, ROWS, {"resampling": resampling.BestPerIsland()}, 4),
    "discrete": (HMM.program, (HMM.data,), {}, 1),
    "missing": (WALK.program, ROWS, {"nan_is_missing": True}, 1),
    "plain": (_plain(), ROWS, {}, 1),
    "plain, batched": (_plain(batched=_batched), ROWS, {}, 1),
    "plain, heavy": (_heavy(), ROWS, {}, 1),
    "language model": (program.reason, TEXT, {"store": "last"}, 1),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS)
def test_every_path_exports_for_cpu_cuda_and_tpu(path):
    model, args, options, islands = PATHS[path]
    kwargs = {"max_steps": 3} if model is program.reason else {}
    sizes = Sizes(64, 2, islands, None)
    particle_filter = ParticleFilter(model, **({"store": "paths"} | options))
    run_keys = keys.run_keys(jax.random.key(0), 2)
    arrays, fixed_args = eqx.partition(args, eqx.is_array)

    def whole(run_data, arrays):
        run_keys = jax.random.wrap_key_data(run_data)
        args = eqx.combine(arrays, fixed_args)
        population, _, _ = compiled.start(particle_filter, run_keys, sizes, args, kwargs, False)
        recorded = (4, particle_filter.store != "last")
        last = jnp.int32(3)
        fixed = (particle_filter, run_keys, sizes, args, kwargs, recorded, last)
        new, info, _, _ = compiled.block(fixed, population)
        return new.log_evidence, info.ess

    exported = jax.export.export(jax.jit(whole), platforms=["cpu", "cuda", "tpu"])(
        jax.random.key_data(run_keys), arrays
    )
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    evidence, ess = exported.call(jax.random.key_data(run_keys), arrays)
    assert np.isfinite(np.asarray(evidence)).all()
    assert (np.asarray(ess)[:3] > 0).all()


def test_a_host_model_made_of_other_functions_compiles_nothing():
    def run_again():
        model = FeynmanKac(
            _origin,
            lambda keys, previous, y: np.asarray(previous) + 1,
            lambda previous, states, y: np.zeros(len(states)),
            capabilities=Capabilities(host=True),
        )
        smc = SMC(ParticleFilter(model, store="last"), num_particles=8, progress_bar=False)
        smc.run(jax.random.key(0), jnp.ones(3))
        return smc.log_evidence

    run_again()
    assert compilations(run_again) == 0


def _origin(key):
    return jnp.zeros(())
