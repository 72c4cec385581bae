"""The written-out generator gives JAX's own bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import threefry


@pytest.mark.parametrize("shape", [(1,), (7,), (64, 3), (1000, 2, 2)])
def test_bits_are_those_of_jax(shape):
    key = jax.random.fold_in(jax.random.key(5), 7)
    assert threefry.applies(key, 32, shape)
    np.testing.assert_array_equal(threefry.bits(key, shape), jax.random.bits(key, shape))


def test_keys_of_a_batch_give_the_bits_of_each():
    keys = jax.random.split(jax.random.key(1), 5)
    found = jax.jit(jax.vmap(lambda k: threefry.bits(k, (9,))))(keys)
    expected = jnp.stack([jax.random.bits(k, (9,)) for k in keys])
    np.testing.assert_array_equal(found, expected)


def test_other_generators_and_widths_are_left_alone():
    assert not threefry.applies(jax.random.key(0, impl="rbg"), 32, (4,))
    assert not threefry.applies(jax.random.key(0), 64, (4,))


def test_lowers_for_every_platform():
    exported = jax.export.export(
        jax.jit(lambda data: threefry.bits(jax.random.wrap_key_data(data), (8,))),
        platforms=["cpu", "cuda", "tpu"],
    )(jax.random.key_data(jax.random.key(0)))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
