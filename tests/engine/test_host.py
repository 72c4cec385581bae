"""Models whose transition runs Python: equal laws, one call a row, errors, no compilations."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, FeynmanKac, ParticleFilter
from smcscale.feynman_kac import Capabilities, Weighted
from smcscale.kernels import annealing, resampling
from smcscale.kernels.triggers import always
from support.montecarlo import assert_mean

HOST = Capabilities(host=True)
Y = np.array([0.5, 1.0, -0.8, 2.0, 0.1], np.float32)
PHI = 0.9


def initial(key):
    return {"x": jax.random.normal(key), "calls": jnp.zeros((), jnp.int32)}


def log_evidence():
    """Of the walk below, by the Kalman filter."""
    mean, variance, total = 0.0, 1.0, 0.0
    for y in Y.astype(float):
        mean, variance = PHI * mean, PHI**2 * variance + 1
        spread = variance + 1
        total += -0.5 * (np.log(2 * np.pi * spread) + (y - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (y - mean), (1 - gain) * variance
    return total


def model(seen=None, weigh=True, wait=False):
    """The walk `x' = PHI x + e`, `y = x' + e`, in NumPy; weights in the potential or the increment."""

    def moved(keys, previous):
        noise = np.asarray(jax.vmap(jax.random.normal)(keys))
        if seen is not None:
            seen.append(len(noise))
        return {"x": PHI * np.asarray(previous["x"]) + noise, "calls": previous["calls"] + 1}

    def log_likelihood(states, y):
        return -0.5 * ((float(y) - np.asarray(states["x"])) ** 2 + np.log(2 * np.pi))

    def transition(keys, previous, y):
        states = moved(keys, previous)
        return states if weigh else Weighted(states, log_likelihood(states, y))

    async def slowly(keys, previous, y):
        await asyncio.sleep(0)
        return transition(keys, previous, y)

    return FeynmanKac(
        initial,
        slowly if wait else transition,
        lambda previous, states, y: log_likelihood(states, y) if weigh else 0.0,
        capabilities=HOST,
        cost=lambda previous, states, y: {"moves": np.ones(len(states["x"]))},
    )


def run(program, num_particles=8, num_runs=4, store="last", **kernels):
    smc = SMC(
        ParticleFilter(program, store=store, **kernels),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(3), Y)
    return smc


@pytest.mark.statistical
@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize(
    "kernels",
    [{"trigger": always}, {"annealing": annealing.Fixed(0.5)}, {"resampling": resampling.residual}],
    ids=["always", "annealed", "residual"],
)
def test_evidence_is_exact(weigh, kernels):
    smc = run(model(weigh=weigh), num_particles=64, num_runs=1000, **kernels)
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64) - log_evidence())
    assert_mean(ratio, 1.0, family=6, smallest_bias=0.05)


def test_all_particles_of_all_runs_go_in_one_call():
    seen = []
    smc = run(model(seen))
    assert seen == [8 * 4] * len(Y)
    assert smc.cost["moves"] == 8 * 4 * len(Y)


def test_a_run_draws_the_same_whatever_the_number_of_runs():
    alone, among = run(model(), num_runs=1), run(model(), num_runs=5)
    assert np.allclose(alone.log_evidence[0], among.log_evidence[0], atol=1e-5)


def test_awaited_and_plain_transitions_are_equal():
    assert np.array_equal(run(model(wait=True)).log_evidence, run(model()).log_evidence)


def test_inside_a_running_event_loop():
    async def notebook():
        return run(model(wait=True)).log_evidence

    assert np.array_equal(asyncio.run(notebook()), run(model()).log_evidence)


def test_a_run_inside_a_host_function_that_is_awaited_is_refused():
    async def transition(keys, previous, y):
        return run(model(wait=True))

    program = dataclasses.replace(model(), transition=transition)
    with pytest.raises(RuntimeError, match="to_thread"):
        run(program)


def test_paths_follow_the_ancestors():
    samples = run(model(), store="paths", trigger=always).get_samples()
    assert samples["x"].shape == (32, len(Y))
    assert np.array_equal(samples["calls"], np.broadcast_to(np.arange(1, 6), (32, 5)))


def broken(what):
    good = model()

    def transition(keys, previous, y):
        states = good.transition(keys, previous, y)
        if what == "structure":
            return states["x"]
        if what == "shape":
            return {**states, "x": states["x"][:-1]}
        if what == "nan":
            return {**states, "x": states["x"] * np.nan}
        return states

    def log_potential(previous, states, y):
        return np.zeros(3) if what == "scores" else good.log_potential(previous, states, y)

    return FeynmanKac(initial, transition, log_potential, capabilities=HOST)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("structure", TypeError, "another structure"),
        ("shape", TypeError, r"leaf of shape \(31,\) where it was given \(32,\)"),
        ("scores", TypeError, r"`log_potential` of a host model has shape \(3,\)"),
        ("nan", FloatingPointError, "step 0"),
    ],
)
def test_bad_answers_are_named(what, error, message):
    with pytest.raises(error, match=message):
        run(broken(what))


def test_what_a_host_model_cannot_do_is_refused():
    with pytest.raises(ValueError, match="no `batched`"):
        FeynmanKac(initial, print, print, batched=print, capabilities=HOST)
    with pytest.raises(ValueError, match="takes no `proposal`"):
        ParticleFilter(model(), proposal=object())
    online = ParticleFilter(model())
    state = online.init(jax.random.key(0), 4, Y)
    with pytest.raises(NotImplementedError, match="outside jit, vmap and export"):
        online.step(jax.random.key(0), state, Y[0])
