"""Tilts of `kernels/tilts.py` and `kernels/lookahead.py`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.kernels import annealing, lookahead, resampling, tilts
from smcscale.weights import normalize
from support.contracts import offspring, weights_of
from support.montecarlo import assert_mean

LOG_WEIGHTS = jnp.asarray([0.5, -jnp.inf, 1.0, -2.0, 0.0, -30.0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_soft_mixes_with_the_uniform_law_on_survivors(alpha):
    alive = np.isfinite(np.asarray(LOG_WEIGHTS))
    expected = alpha * weights_of(LOG_WEIGHTS) + (1 - alpha) * alive / alive.sum()
    tilted = tilts.Soft(alpha)(LOG_WEIGHTS, 0)
    np.testing.assert_allclose(jnp.exp(tilted), expected, rtol=1e-5)
    assert tilted.dtype == LOG_WEIGHTS.dtype


def test_soft_gradient():
    def quotient(log_weights):
        return jnp.sum((log_weights - tilts.Soft(0.4)(log_weights, 0))[jnp.asarray([0, 2, 3])])

    gradient = jax.grad(quotient)(LOG_WEIGHTS)
    assert np.isfinite(np.asarray(gradient)).all()
    step = 1e-2
    for i in (0, 2, 3, 4):
        change = jnp.zeros(6).at[i].set(step)
        numeric = (quotient(LOG_WEIGHTS + change) - quotient(LOG_WEIGHTS - change)) / (2 * step)
        assert abs(gradient[i] - numeric) < 2e-3


def test_stop_gradient():
    np.testing.assert_array_equal(tilts.stop_gradient(LOG_WEIGHTS, 0), LOG_WEIGHTS)
    gradient = jax.grad(lambda lw: tilts.stop_gradient(lw, 0)[0])(LOG_WEIGHTS)
    np.testing.assert_array_equal(gradient, np.zeros(6))


def _optimal(log_weights, n):
    """The law v of the tilt, and the level c at which it cuts the weights, in float64."""
    tilted = np.asarray(tilts.Optimal(n)(log_weights, 0), np.float64)
    weights = weights_of(log_weights)
    cut = tilted < np.asarray(log_weights, np.float64)
    ratio = np.exp(tilted[cut] - np.asarray(log_weights, np.float64)[cut])
    level = (weights[cut] * ratio).mean() if cut.any() else 1 / n
    return weights_of(tilted), level


@pytest.mark.parametrize("seed", range(5))
def test_optimal_level_solves_its_equation(seed):
    num_particles, n = 40, 12
    scale = (0.1, 1.0, 3.0, 10.0, 3.0)[seed]
    log_weights = scale * jax.random.normal(jax.random.key(seed), (num_particles,))
    log_weights = log_weights.at[5].set(-jnp.inf)
    law, level = _optimal(log_weights, n)
    weights = weights_of(log_weights)
    assert abs(np.minimum(weights / level, 1).sum() - n) < 1e-4
    np.testing.assert_allclose(law, np.minimum(weights, level) / (n * level), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("alive", [3, 7, 8, 9])
def test_optimal_keeps_all_when_few_are_alive(alive):
    log_weights = jnp.where(
        jnp.arange(20) % 20 < alive, LOG_WEIGHTS[0] - jnp.arange(20.0), -jnp.inf
    )
    tilted = np.asarray(tilts.Optimal(8)(log_weights, 0))
    assert (np.isfinite(tilted) == (np.arange(20) < alive)).all()
    equal = np.ptp(tilted[:alive]) == 0
    assert equal == (alive <= 8)


@pytest.mark.statistical
def test_optimal_with_systematic_is_unbiased_without_copies():
    num_particles, n, replicates = 20, 8, 20_000
    log_weights = 2 * jax.random.normal(jax.random.key(1), (num_particles,))
    weights = weights_of(log_weights)
    law, level = _optimal(log_weights, n)
    keys = jax.random.split(jax.random.key(2), replicates)
    tilted = tilts.Optimal(n)(log_weights, 0)
    run = jax.jit(jax.vmap(lambda key: resampling.systematic(key, tilted, n)))
    counts = offspring(run(keys), num_particles)
    assert counts.max() == 1
    kept = weights >= level * (1 + 1e-5)
    assert 1 < kept.sum() < n
    assert counts[:, kept].min() == 1
    # what the engine keeps: each ancestor carries W / (n v)
    carried = counts * weights / (n * law)
    np.testing.assert_allclose(carried[:, kept], np.tile(weights[kept], (replicates, 1)), rtol=1e-4)
    assert_mean(carried[:, ~kept], weights[~kept], family=num_particles, smallest_bias=0.003)
    # the same weights with stratified uniforms do give copies
    run = jax.jit(jax.vmap(lambda key: resampling.stratified(key, tilted, n)))
    assert offspring(run(keys), num_particles).max() > 1


def test_composition_is_one_after_the_other():
    both = tilts.compose(annealing.Fixed(0.5), tilts.Soft(0.25))
    expected = tilts.Soft(0.25)(annealing.Fixed(0.5)(LOG_WEIGHTS, 3), 3)
    np.testing.assert_array_equal(both(LOG_WEIGHTS, 3), expected)
    assert both.bias is None and both.corrected
    biased = tilts.compose(tilts.Soft(0.25), annealing.Fixed(0.5, corrected=False))
    assert biased.bias == "no target" and not biased.corrected


def test_by_value():
    for make in (
        lambda: tilts.Soft(0.5),
        lambda: tilts.Optimal(8),
        lambda: tilts.compose(tilts.Soft(0.5), annealing.ESSFloor(0.5)),
        lambda: lookahead.LookAhead(_pull),
    ):
        assert make() == make() and hash(make()) == hash(make())
    assert tilts.Soft(0.5) != tilts.Soft(0.6)


def _pull(state, input):
    return -((state["x"] - input) ** 2)


class _Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, state, input):
        return self.scale * _pull(state, input)


def test_lookahead_multiplies_the_weights():
    states = {"x": jnp.arange(6.0).at[1].set(jnp.nan)}  # the dead one's state may be broken
    tilted = lookahead.LookAhead(_pull)(LOG_WEIGHTS, states, jnp.asarray(2.0), 0)
    expected = np.asarray(LOG_WEIGHTS) - (np.arange(6.0) - 2) ** 2
    np.testing.assert_allclose(tilted, expected, rtol=1e-6)
    assert tilted[1] == -jnp.inf


def test_lookahead_holds_arrays_as_leaves():
    states = {"x": jnp.arange(6.0)}
    traces = []

    def look(tilt):
        traces.append(tilt)
        return tilt(LOG_WEIGHTS, states, jnp.asarray(2.0), 0)

    run = jax.jit(look)
    for scale in (1.0, 2.0):
        tilted = run(lookahead.LookAhead(_Scaled(jnp.asarray(scale))))
        expected = np.asarray(LOG_WEIGHTS) - scale * (np.arange(6.0) - 2) ** 2
        np.testing.assert_allclose(tilted, expected, rtol=1e-6)
    assert len(traces) == 1


def test_tilts_ignore_a_constant():
    for tilt in (tilts.Soft(0.5), tilts.Optimal(3), annealing.ESSFloor(0.8)):
        plain = normalize(tilt(LOG_WEIGHTS, 0))
        np.testing.assert_allclose(normalize(tilt(LOG_WEIGHTS + 300, 0)), plain, atol=1e-5)
