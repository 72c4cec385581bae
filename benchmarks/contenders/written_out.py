"""`handwritten.py` with the same random bits computed by a generator that XLA can fuse.

On a CPU JAX lowers threefry as a loop over whole arrays, five passes through memory; written out in
`jax.numpy`, the twenty rounds and the inverse error function become one pass. The numbers are those
of `jax.random.normal`, bit for bit.
"""

import handwritten
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VERSIONS = handwritten.VERSIONS
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def bits(key, n):
    """`jax.random.bits(key, (n,))`."""
    first, second = jax.random.key_data(key)
    words = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    b = lax.iota(jnp.uint32, n) + words[1]
    a = jnp.zeros_like(b) + words[0]
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << jnp.uint32(r)) | (b >> jnp.uint32(32 - r)))
        a = a + words[(i + 1) % 3]
        b = b + words[(i + 2) % 3] + jnp.uint32(i + 1)
    return a ^ b


def normals(key, n):
    """`jax.random.normal(key, (n,))`."""
    mantissa = (bits(key, n) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    u = (lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0) * (1.0 - lowest) + lowest
    return np.float32(np.sqrt(2)) * lax.erf_inv(jnp.maximum(lowest, u))


def prepare(y, num_particles):
    """`run(seed)` of the compiled filter."""
    return handwritten.prepare(y, num_particles, normals)
