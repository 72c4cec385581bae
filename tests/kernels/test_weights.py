"""Arithmetic of log-weights, `smcscale/weights.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import weights as w
from support.contracts import weights_of

MIXED = jnp.asarray([0.0, -jnp.inf, 1.0, -2.0])
DEAD = jnp.full(4, -jnp.inf)
NAN = jnp.asarray([0.0, jnp.nan, 1.0, -2.0])


def test_normalize():
    np.testing.assert_allclose(w.normalize(MIXED + 500), weights_of(MIXED), rtol=1e-5)
    np.testing.assert_allclose(w.normalize(DEAD), np.full(4, 0.25))
    assert np.isnan(w.normalize(NAN)).all()
    np.testing.assert_allclose(jnp.exp(w.log_normalize(MIXED - 500)), weights_of(MIXED), rtol=1e-4)
    np.testing.assert_allclose(jnp.exp(w.log_normalize(DEAD)), np.full(4, 0.25), rtol=1e-6)
    assert np.isnan(w.log_normalize(NAN)).all()


def test_ess():
    expected = 1 / (weights_of(MIXED) ** 2).sum()
    assert w.ess(MIXED - 300) == pytest.approx(expected, rel=1e-5)
    assert w.ess(jnp.zeros(1000)) == 1000
    assert w.ess(DEAD) == 0
    assert np.isnan(w.ess(NAN))


def test_log_mean_exp():
    expected = np.log(np.exp(np.asarray(MIXED, np.float64)).mean())
    assert w.log_mean_exp(MIXED) == pytest.approx(expected, abs=1e-6)
    assert w.log_mean_exp(DEAD) == -np.inf


def test_gradients_at_the_dead_are_finite():
    for function in (w.ess, w.log_mean_exp, lambda lw: w.normalize(lw)[0]):
        assert np.isfinite(np.asarray(jax.grad(function)(MIXED))).all()
    gradient = jax.grad(lambda beta: w.ess(w.cool(MIXED, beta)))(0.5)
    step = 1e-2
    numeric = (w.ess(w.cool(MIXED, 0.5 + step)) - w.ess(w.cool(MIXED, 0.5 - step))) / (2 * step)
    assert gradient == pytest.approx(float(numeric), rel=1e-2)


def test_cool_keeps_the_dead_dead():
    np.testing.assert_array_equal(w.cool(MIXED, 0.0), [0, -np.inf, 0, 0])
    np.testing.assert_array_equal(w.cool(MIXED, 1.0), MIXED)


def test_largest_beta():
    ok = lambda cooled: jnp.max(cooled) <= 0.3
    beta = w.largest_beta(ok, MIXED, 20)
    assert 0.3 - 2**-20 <= beta <= 0.3
    assert w.largest_beta(lambda cooled: jnp.asarray(True), MIXED, 20) == 1
    assert w.largest_beta(lambda cooled: jnp.max(cooled) <= 0, MIXED, 20) == 0


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000, 1024, 1025, 40_000])
def test_prefix_sum_is_exact(size):
    values = jax.random.randint(jax.random.key(size), (size,), 0, 300)
    expected = np.cumsum(np.asarray(values))
    np.testing.assert_array_equal(jax.jit(w.prefix_sum)(values), expected)


@pytest.mark.parametrize("size", [3, 1000, 100_000])
@pytest.mark.parametrize("n", [1, 700, 100_000])
def test_cumulative_counts(size, n):
    log_weights = 4 * jax.random.normal(jax.random.key(size + n), (size,))
    log_weights = jnp.where(jnp.arange(size) % 7 == 2, -jnp.inf, log_weights)
    counts = jax.jit(w.cumulative_counts, static_argnums=1)(log_weights, n)
    whole, part = (np.asarray(x, np.int64) for x in counts)
    assert counts.whole.dtype == counts.part.dtype == jnp.int32
    assert (part >= 0).all() and (part < w.PARTS).all()
    units = whole * w.PARTS + part
    steps = np.diff(units, prepend=0)
    dead = np.isneginf(np.asarray(log_weights))
    assert (steps >= 0).all() and (steps[dead] == 0).all()
    assert units[-1] == n * w.PARTS
    expected = n * weights_of(log_weights)
    assert (
        np.abs(steps / w.PARTS - expected) <= 2e-6 * expected + 1e-6 * n / size + 1 / w.PARTS
    ).all()


def test_ten_million_weights_sum_to_their_number():
    """A float32 running sum of these would be off by hundreds."""
    size = 10_000_000
    log_weights = jnp.where(jnp.arange(size) % 2 == 0, 0.0, -0.5)
    counts = jax.jit(w.cumulative_counts, static_argnums=1)(log_weights, size)
    middle = size // 2
    units = int(counts.whole[middle - 1]) * w.PARTS + int(counts.part[middle - 1])
    assert abs(units / w.PARTS - middle) < 0.01
