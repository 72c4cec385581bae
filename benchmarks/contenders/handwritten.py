"""The best bootstrap filter for stochastic volatility that we could write by hand in JAX.

Measured choices, each against its alternatives: normals for a chunk of steps are drawn outside an
inner loop, from one key a step; one maximum, one exponential and its sums serve weights, evidence,
ESS and moments; the branch that resamples returns the states alone; prefix sums are blockwise (a
product with a triangular matrix inside blocks), offspring boundaries are scattered and summed
instead of searched. `written_out.py` is the same filter with another lowering of the generator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VERSIONS = {"jax": jax.__version__}
MU, PHI, SIGMA = -1.0, 0.95, 0.25
BLOCK = 32


def prefix_sum(values):
    """Running sums `(N,)`: inside blocks by a triangular product, over blocks pairwise."""
    n = len(values)
    blocks = jnp.pad(values, (0, -n % BLOCK)).reshape(-1, BLOCK)
    triangle = jnp.triu(jnp.ones((BLOCK, BLOCK), values.dtype))
    inside = jnp.dot(blocks, triangle, precision="highest")
    totals = inside[:, -1]
    before = lax.associative_scan(jnp.add, totals) - totals
    return (inside + before[:, None]).reshape(-1)[:n]


def systematic(key, weights):
    """Ancestors `(N,)` of systematic resampling."""
    n = len(weights)
    cumulative = prefix_sum(weights)
    boundary = jnp.ceil(cumulative * (n / cumulative[-1]) - jax.random.uniform(key, ()))
    starts = jnp.zeros(n, jnp.int32).at[boundary[:-1].astype(jnp.int32)].add(1, mode="drop")
    return lax.associative_scan(jnp.add, starts)


def normals(key, n):
    """Standard normal numbers `(n,)`."""
    return jax.random.normal(key, (n,))


def sums(w, x):
    """Sums of `w`, `w²`, `w x` and `w x²`: one small product is faster until about 8192 numbers."""
    if len(w) < 8192:
        return jnp.stack([jnp.ones_like(x), w, x, x * x]) @ w
    return jnp.sum(w), jnp.sum(w * w), jnp.sum(w * x), jnp.sum(w * x * x)


def make(num_particles, num_steps, chunk, normals=normals):
    """The compiled filter: `(key, y) -> states, log-weights, (evidence, ess, mean, variance)`."""
    n = num_particles

    def step(carry, row):
        x, lw, top, total, log_norm, ess = carry
        noise, key, y = row
        resample = ~(ess >= 0.5 * n)

        def resampled(x, lw, top):
            return jnp.take(x, systematic(key, jnp.exp(lw - top)), mode="clip")

        x = lax.cond(resample, resampled, lambda x, lw, top: x, x, lw, top)
        log_norm = jnp.where(resample, log_norm + top + jnp.log(total / n), log_norm)
        lw = jnp.where(resample, 0.0, lw)
        x = MU + PHI * (x - MU) + SIGMA * noise
        lw = lw - 0.5 * (np.log(2 * np.pi).astype(np.float32) + x + y * y * jnp.exp(-x))
        top = jnp.max(lw)
        # without the barrier XLA computes the exponential again in each of the sums
        w = lax.optimization_barrier(jnp.exp(lw - top))
        total, squares, first, second = sums(w, x)
        ess = total**2 / squares
        mean = first / total
        variance = second / total - mean**2
        kept = (log_norm + top + jnp.log(total / n), ess, mean, variance)
        return (x, lw, top, total, log_norm, ess), kept

    def some_steps(carry, rows):
        noise_keys, keys, y = rows
        noise = jax.vmap(lambda key: normals(key, n))(noise_keys)
        return lax.scan(step, carry, (noise, keys, y))

    def run(key, y):
        initial, moves, choices = jax.random.split(key, 3)
        x = MU + 0.8 * normals(initial, n)
        zero = jnp.zeros(())
        carry = (x, jnp.zeros(n), zero, zero + n, zero, zero + n)
        whole = num_steps // chunk * chunk
        rows = (jax.random.split(moves, num_steps), jax.random.split(choices, num_steps), y)
        chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:]), rows)
        carry, kept = lax.scan(some_steps, carry, chunks)
        kept = jax.tree.map(lambda a: a.reshape(-1), kept)
        if whole < num_steps:
            carry, last = some_steps(carry, jax.tree.map(lambda a: a[whole:], rows))
            kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, last)
        return carry[0], carry[1], kept

    return jax.jit(run)


def prepare(y, num_particles, normals=normals, chunk=None):
    """`run(seed)` of the compiled filter."""
    rows = jnp.asarray(y)
    if chunk is None:
        # the fastest at 10,000 and 100,000 particles of 2, 4, 8 and of 7, 40, 80
        chunk = 2 if num_particles > 65536 else (3 << 18) // num_particles
    compiled = make(num_particles, len(rows), min(chunk, len(rows)), normals)

    def run(seed):
        _, _, kept = jax.block_until_ready(compiled(jax.random.key(seed), rows))
        return kept[0][-1]

    return run
