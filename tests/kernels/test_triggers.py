"""Triggers of `kernels/triggers.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.kernels import triggers

EVEN = jnp.zeros(8)
ONE = jnp.full(8, -50.0).at[2].set(0.0)


def test_always_and_never():
    for time in (0, 5):
        assert triggers.always(ONE, time)
        assert not triggers.never(ONE, time)


def test_ess_below():
    trigger = triggers.ess_below(0.5)
    assert not trigger(EVEN, 1)
    assert trigger(ONE, 1)
    half = jnp.where(jnp.arange(8) < 4, 0.0, -jnp.inf)  # ess exactly 4
    assert not trigger(half, 1)
    assert triggers.ess_below(0.51)(half, 1)
    assert not trigger(half - 1000, 1)


def test_broken_weights_resample():
    for log_weights in (EVEN.at[1].set(jnp.nan), jnp.full(8, -jnp.inf), EVEN.at[1].set(jnp.inf)):
        assert triggers.ess_below(0.5)(log_weights, 1)


def test_ess_below_looks_at_one_run_under_vmap():
    both = jax.vmap(triggers.ess_below(0.5), in_axes=(0, None))(jnp.stack([EVEN, ONE]), 1)
    np.testing.assert_array_equal(both, [False, True])


def test_every():
    fires = [bool(triggers.every(3)(EVEN, time)) for time in range(8)]
    assert fires == [False, False, False, True, False, False, True, False]
    assert jax.jit(triggers.every(2))(EVEN, jnp.int32(4))
    with pytest.raises(ValueError, match="triggers.never"):
        triggers.every(0)


def test_by_value():
    assert triggers.ess_below(0.5) == triggers.ess_below(0.5) != triggers.ess_below(0.6)
    assert hash(triggers.ess_below(0.5)) == hash(triggers.ess_below(0.5))
    assert triggers.every(2) == triggers.every(2) != triggers.every(3)
    assert hash(triggers.every(2)) == hash(triggers.every(2))
