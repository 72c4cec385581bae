"""Laws that keep the measure: cheap, sharp, most of them to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from smcscale import SMC, FeynmanKac, ParticleFilter, drive, keys
from smcscale.engine import mutate
from smcscale.kernels import triggers
from support.exact import WALK


def run(program, *args, num_particles=256, num_runs=2, num_steps=None, islands=1, **options):
    smc = SMC(
        ParticleFilter(program, **options),
        num_particles=num_particles,
        num_runs=num_runs,
        num_islands=islands,
        progress_bar=False,
    )
    smc.run(jax.random.key(3), *args, num_steps=num_steps)
    return smc


def series(num_steps):
    return jnp.asarray(np.random.default_rng(1).normal(size=num_steps), jnp.float32)


def test_online_steps_equal_the_run():
    particle_filter = ParticleFilter(WALK.program)
    whole = run(WALK.program, WALK.data, num_runs=1)
    key = keys.run_keys(jax.random.key(3), 1)[0]
    state = particle_filter.init(key, 256, WALK.data[:1])

    def step(state, given):
        time, y = given
        state, info = particle_filter.step(keys.step(key, time), state, y)
        return state, (info.ess, info.log_evidence_increment)

    state, (ess, increments) = jax.lax.scan(step, state, (jnp.arange(5), WALK.data))
    np.testing.assert_allclose(ess, whole.diagnostics.ess[0], rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(increments), whole.log_evidence[0], rtol=1e-5)
    np.testing.assert_allclose(state.states.carry, whole.result.final["x"][0], rtol=1e-5)


def test_a_model_cut_in_two_and_composed_is_the_whole():
    particle_filter = ParticleFilter(WALK.program)
    key = keys.run_keys(jax.random.key(3), 1)[0]

    def rows(state, first, last):
        for t in range(first, last):
            state, _ = particle_filter.step(keys.step(key, t), state, WALK.data[t])
        return state

    start = particle_filter.init(key, 128, WALK.data[:1])
    whole = rows(start, 0, 4)
    halves = rows(jax.tree.map(jnp.copy, rows(start, 0, 2)), 2, 4)
    np.testing.assert_array_equal(whole.log_weights, halves.log_weights)
    np.testing.assert_array_equal(whole.log_evidence, halves.log_evidence)


@pytest.mark.parametrize("steps", [3, 64, 1000])
def test_block_size_changes_no_number(monkeypatch, steps):
    data = series(150)
    usual = run(WALK.program, data, num_particles=2000, store="last")
    monkeypatch.setattr(drive, "_BLOCK_STEPS", steps)
    other = run(WALK.program, data, num_particles=2000, store="last")
    np.testing.assert_array_equal(usual.log_evidence, other.log_evidence)
    np.testing.assert_array_equal(usual.result.final["x"], other.result.final["x"])
    np.testing.assert_array_equal(usual.diagnostics.ess, other.diagnostics.ess)


def test_a_run_is_the_beginning_of_a_longer_one():
    data = series(130)
    options = {"num_particles": 20_000, "num_runs": 1, "store": "last"}
    long, short = (run(WALK.program, data[:n], **options) for n in (130, 100))
    told = long.diagnostics.log_evidence[:, 99]
    np.testing.assert_allclose(short.log_evidence, told, rtol=1e-6)


@pytest.mark.long
def test_store_and_progress_bar_change_no_number():
    data = series(40)
    last = run(WALK.program, data, store="last")
    for store in ("ancestry", "paths", "auto"):
        other = run(WALK.program, data, store=store)
        np.testing.assert_array_equal(last.log_evidence, other.log_evidence)
        np.testing.assert_array_equal(last.result.final["x"], other.result.final["x"])
    shown = SMC(ParticleFilter(WALK.program, store="last"), num_particles=256, num_runs=2)
    shown.run(jax.random.key(3), data)
    np.testing.assert_array_equal(last.log_evidence, shown.log_evidence)


def test_ancestry_keeps_the_paths_that_are_alive():
    data = series(120)
    paths = run(WALK.program, data, store="paths", trigger=triggers.always)
    ancestry = run(WALK.program, data, store="ancestry", trigger=triggers.always)
    slots = jnp.broadcast_to(jnp.arange(256), (2, 256))
    np.testing.assert_array_equal(
        paths.result.history.trace(slots)["x"], ancestry.result.history.trace(slots)["x"]
    )


def test_ancestry_is_compacted(monkeypatch):
    monkeypatch.setattr(drive, "_BLOCK_STEPS", 40)
    kept = run(WALK.program, series(400), num_particles=100, store="ancestry")
    widths = [leaves[0].shape[2] for leaves in kept.result.history.segments]
    assert widths[-1] == 100
    assert widths[0] < 10, "the oldest steps keep the few paths that have descendants"


def test_a_run_does_not_depend_on_how_many_runs_there_are():
    few, many = (run(WALK.program, series(60), num_runs=r) for r in (2, 5))
    np.testing.assert_array_equal(few.log_evidence, many.log_evidence[:2])
    fired = np.asarray(many.diagnostics.resampled)
    np.testing.assert_array_equal(few.diagnostics.resampled, fired[:2])
    assert (fired.any(axis=0) & ~fired.all(axis=0)).any(), "runs resample at times of their own"


@pytest.mark.long
def test_one_island_changes_no_number_and_four_stay_unbiased():
    one, plain = (run(WALK.program, WALK.data, islands=i) for i in (1, 1))
    np.testing.assert_array_equal(one.log_evidence, plain.log_evidence)
    four = run(
        WALK.program, WALK.data, islands=4, num_runs=2000, num_particles=64, trigger=triggers.always
    )
    ratio = np.exp(np.asarray(four.log_evidence) - WALK.log_evidence)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 2000**0.5


def test_guide_equal_to_the_prior_is_the_bootstrap_filter():
    def program(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    def prior(y):
        def step(x, y_t):
            return numpyro.sample("x", dist.Normal(0.9 * x, 0.5)), None

        scan(step, 0.0, y)

    bootstrap = run(program, series(30))
    guided = run(program, series(30), guide=prior)
    np.testing.assert_allclose(bootstrap.log_evidence, guided.log_evidence, rtol=1e-6)
    np.testing.assert_allclose(bootstrap.result.final["x"], guided.result.final["x"], rtol=1e-6)


def _walk(potential):
    return FeynmanKac(
        lambda key: jax.random.normal(key),
        lambda key, x, row: x + row["move"] * jax.random.normal(key),
        potential,
    )


def test_batch_conditioning_equals_sequential_conditioning():
    once = _walk(lambda _, x, row: -0.5 * (x - row["a"]) ** 2 - 0.5 * (x - row["b"]) ** 2)
    twice = _walk(lambda _, x, row: -0.5 * (x - row["a"]) ** 2)
    batch = run(once, {"move": jnp.ones(1), "a": jnp.ones(1), "b": jnp.full(1, 0.3)})
    sequential = run(
        twice,
        {"move": jnp.array([1.0, 0.0]), "a": jnp.array([1.0, 0.3])},
        trigger=triggers.never,
    )
    np.testing.assert_allclose(batch.log_evidence, sequential.log_evidence, rtol=1e-5)


def test_a_potential_moves_freely_across_a_deterministic_step():
    rows = {"move": jnp.array([1.0, 0.0, 1.0]), "on": jnp.array([1.0, 0.0, 1.0])}
    moved = {**rows, "on": jnp.array([0.0, 1.0, 1.0])}
    model = _walk(lambda _, x, row: -0.5 * row["on"] * (x - 1.0) ** 2)
    early, late = (run(model, r, trigger=triggers.never) for r in (rows, moved))
    np.testing.assert_allclose(early.log_evidence, late.log_evidence, rtol=1e-5)


def test_inputs_at_start_score_the_initial_law():
    from smcscale import Capabilities

    model = FeynmanKac(
        lambda key, y: jax.random.normal(key),
        lambda key, x, y: x + jax.random.normal(key),
        lambda previous, x, y: dist.Normal(x, 1.0).log_prob(y),
        capabilities=Capabilities(inputs_at_start=True),
    )
    found = run(model, jnp.array([-1.3, 0.7]), num_particles=64, num_runs=3000)
    assert found.diagnostics.ess.shape == (3000, 2)
    ratio = np.exp(np.asarray(found.log_evidence) + 1.68801 + 1.74158)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 3000**0.5
    first = np.exp(np.asarray(found.diagnostics.initial.log_evidence) + 1.68801)
    assert abs(first.mean() - 1) < 4 * first.std() / 3000**0.5


@pytest.mark.long
def test_a_schedule_of_particle_numbers_stays_unbiased():
    smc = SMC(
        ParticleFilter(WALK.program, store="last"),
        num_particles=[80, 80, 40, 40, 60],
        num_runs=3000,
        progress_bar=False,
    )
    smc.run(jax.random.key(0), WALK.data)
    assert smc.result.final["x"].shape == (3000, 60)
    np.testing.assert_array_equal(smc.diagnostics.num_particles, [80, 80, 40, 40, 60])
    ratio = np.exp(np.asarray(smc.log_evidence) - WALK.log_evidence)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 3000**0.5


@pytest.mark.long
def test_chunks_of_noise_change_no_number_in_a_schedule(monkeypatch):
    numbers = [100] * 30 + [20_000] * 300  # 128 steps of noise at once, then fewer
    options = {"num_particles": numbers, "num_runs": 1, "store": "last"}
    usual = run(WALK.program, series(330), **options)
    monkeypatch.setattr(mutate, "_CHUNK_ELEMENTS", 1)  # two steps at once, in both segments
    jax.clear_caches()  # the chunk is read while a block is traced
    other = run(WALK.program, series(330), **options)
    jax.clear_caches()
    assert usual.filter.mean["x"].shape == (330,)
    np.testing.assert_allclose(usual.filter.mean["x"], other.filter.mean["x"], atol=1e-5)
    np.testing.assert_allclose(usual.log_evidence, other.log_evidence, rtol=1e-6)


def test_random_log_weight_increments_keep_the_evidence_unbiased():
    from smcscale import Weighted

    def transition(key, x, y):
        move, weight = jax.random.split(key)
        # exp of the increment is 0.5 or 1.5 with equal probability: mean 1
        increment = jnp.log(jnp.where(jax.random.bernoulli(weight), 0.5, 1.5))
        return Weighted(x + 0.3 * jax.random.normal(move), increment)

    model = FeynmanKac(
        lambda key: jax.random.normal(key),
        transition,
        lambda previous, x, y: dist.Normal(x, 1.0).log_prob(y),
    )
    found = run(model, WALK.data, num_particles=128, num_runs=2000)
    ratio = np.exp(np.asarray(found.log_evidence) - WALK.log_evidence)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 2000**0.5


def test_batched_transition_moves_all_particles():
    model = FeynmanKac(
        lambda key: jax.random.normal(key),
        lambda key, x, y: x,
        lambda previous, x, y: dist.Normal(x, 1.0).log_prob(y),
        batched=lambda key, x, y: x + 0.3 * jax.random.normal(key, x.shape),
    )
    found = run(model, WALK.data, num_particles=128, num_runs=2000)
    ratio = np.exp(np.asarray(found.log_evidence) - WALK.log_evidence)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 2000**0.5


def test_heavy_leaves_follow_their_particles():
    def transition(key, state, y):
        x = state["x"] + jax.random.normal(key)
        return {"x": x, "cache": state["cache"].at[0].set(state["x"])}

    model = FeynmanKac(
        lambda key: {"x": jax.random.normal(key), "cache": jnp.zeros(7)},
        transition,
        lambda previous, state, y: dist.Normal(state["x"], 0.3).log_prob(y),
        heavy="cache",
    )
    found = run(model, series(30), trigger=triggers.always, store="paths")
    # along every path, the heavy leaf at t is the light one at t - 1
    paths = found.result.history.trace(jnp.broadcast_to(jnp.arange(256), (2, 256)))
    np.testing.assert_array_equal(paths["cache"][:, :, 1:, 0], paths["x"][:, :, :-1])
