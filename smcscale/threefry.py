"""`jax.random.bits` of 32 bits, written out so that XLA fuses it: the same bits, faster on CPU.

On a CPU JAX lowers threefry as a loop over whole arrays, five passes through memory; written out in
`jax.numpy`, the twenty rounds and what is computed from the bits become one pass, which makes a whole
particle filter up to twice as fast (`benchmarks/filter.py`, hand-written rows). On other platforms
JAX's own generator is kept.

Source: Salmon, Moraes, Dror & Shaw 2011 (Threefry-2x32, 20 rounds); counters as in JAX's
partitionable form.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PRNGKeyArray, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def applies(key: PRNGKeyArray, bit_width: int, shape: tuple[int, ...]) -> bool:
    """Whether `bits` gives what `jax.random.bits` gives for this key and shape."""
    return (
        str(key.dtype) == "key<fry>"
        and key.ndim == 0
        and bit_width == 32
        and bool(jax.config.jax_threefry_partitionable)  # pyright: ignore[reportAttributeAccessIssue]
        and math.prod(shape) < 2**32
    )


def bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """`jax.random.bits(key, shape)`, bit for bit."""
    return lax.platform_dependent(
        key,
        cpu=lambda k: _written_out(jax.random.key_data(k), math.prod(shape)).reshape(shape),
        default=lambda k: jax.random.bits(k, shape),
    )


def _written_out(data: Array, size: int) -> Array:
    words = (data[0], data[1], data[0] ^ data[1] ^ jnp.uint32(0x1BD11BDA))
    b = lax.iota(jnp.uint32, size) + words[1]
    a = jnp.zeros_like(b) + words[0]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << jnp.uint32(r)) | (b >> jnp.uint32(32 - r)))
        a = a + words[(i + 1) % 3]
        b = b + words[(i + 2) % 3] + jnp.uint32(i + 1)
    return a ^ b
