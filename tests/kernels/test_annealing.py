"""Tilts by inverse temperature of `kernels/annealing.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.kernels import annealing
from smcscale.weights import ess, normalize

SKEWED = jnp.asarray([0.0, -1.0, -4.0, -6.0, -jnp.inf, -3.0, -9.0, -jnp.inf])
NUM_STEPS = 10


def test_fixed_and_scheduled():
    np.testing.assert_allclose(annealing.Fixed(0.5)(SKEWED, 3), 0.5 * SKEWED)
    np.testing.assert_array_equal(annealing.Fixed(0.0)(SKEWED, 3)[4], -jnp.inf)
    assert annealing.Fixed(0.0)(SKEWED, 3)[0] == 0
    ramp = annealing.Fixed(lambda time: time / 4)
    np.testing.assert_allclose(ramp(SKEWED, jnp.int32(3)), 0.75 * SKEWED)
    assert ramp.beta(SKEWED, 2) == 0.5


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.9])
def test_floor_is_reached(fraction):
    annealed = annealing.ESSFloor(fraction)
    reached = ess(annealed(SKEWED, 0))
    floor = fraction * 6  # of the living
    beta = annealed.beta(SKEWED, 0)
    assert 0 < beta <= 1
    assert reached >= floor
    assert beta == 1 or reached < floor * 1.001


def test_floor_leaves_even_weights_alone():
    even = jnp.asarray([0.0, 0.1, -0.1, -jnp.inf])
    assert annealing.ESSFloor(0.5).beta(even, 0) == 1
    np.testing.assert_array_equal(annealing.ESSFloor(0.5)(even, 0), even)


def test_floor_of_everything_is_uniform_on_survivors():
    np.testing.assert_allclose(
        normalize(annealing.ESSFloor(1.0)(SKEWED, 0)), np.isfinite(SKEWED) / 6, atol=1e-3
    )


SCHEDULES = {
    "ess": annealing.FromESS(),
    "entropy": annealing.FromEntropy(),
    "progress": annealing.FromProgress(),
}


def published_temperature(schedule: str, log_weights, progress: float) -> float:
    """Temperature of Giannone et al. 2025 in float64, while the rule acts."""
    weights = np.asarray(normalize(log_weights), np.float64)
    effective = 1 / (weights**2).sum()
    positive = weights[weights > 0]
    entropy = -(positive * np.log(positive)).sum() / np.log(len(weights))
    return {
        "ess": max(1, len(weights) / effective * (1 - progress)),
        "entropy": max(1, 1 / (entropy + (1 - entropy) * progress)),
        "progress": max(1, 2 - progress),
    }[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_entropic_follows_the_published_rule(schedule):
    annealed = annealing.Entropic(NUM_STEPS, SCHEDULES[schedule])
    beta = jax.jit(annealed.beta)
    for log_weights in (SKEWED, 5 * SKEWED, jnp.zeros(8), jnp.zeros(8).at[2].set(40.0)):
        size, effective = 8, float(ess(log_weights))
        for time in range(NUM_STEPS + 1):
            progress = time / NUM_STEPS
            value = float(beta(log_weights, time))
            if effective < 4 and progress < 0.5:
                if time > 0:
                    expected = published_temperature(schedule, log_weights, progress)
                    assert value == pytest.approx(1 / expected, rel=1e-4)
                highest = {
                    "ess": size * (1 - progress),
                    "entropy": 1 / progress if time else np.inf,
                    "progress": 2,
                }[schedule]
                assert 1 / highest * (1 - 1e-4) <= value <= 1
                if schedule == "progress":
                    assert 1 / 2 <= value <= 1 / 1.5
            else:
                assert value == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_entropic_is_harmless_at_the_edges(schedule):
    annealed = annealing.Entropic(NUM_STEPS, SCHEDULES[schedule])
    beta = jax.jit(annealed.beta)
    assert beta(jnp.zeros(1), 1) == 1
    assert beta(jnp.full(8, -jnp.inf), 1) == 1
    assert beta(SKEWED.at[0].set(jnp.nan), 1) == 1
    one_alive = jnp.full(8, -jnp.inf).at[3].set(0.0)
    assert 0 <= beta(one_alive, 0) <= 1
    assert 0 < beta(one_alive, 1) <= 1
    np.testing.assert_array_equal(np.isfinite(annealed(one_alive, 0)), np.isfinite(one_alive))


def test_correction_and_bias():
    for make in (
        lambda **k: annealing.Fixed(0.5, **k),
        lambda **k: annealing.ESSFloor(0.5, **k),
        lambda **k: annealing.Entropic(NUM_STEPS, **k),
    ):
        assert make().corrected and make().bias is None
        assert make(corrected=False).bias == "no target"
        np.testing.assert_array_equal(make()(SKEWED, 1), make(corrected=False)(SKEWED, 1))
        assert make() == make() and hash(make()) == hash(make())
        assert make() != make(corrected=False)
    assert annealing.Entropic(5) != annealing.Entropic(6)
    assert annealing.Entropic(5) != annealing.Entropic(5, annealing.FromEntropy())
