"""The same filter in cuthbert (JAX, resampling on the host by numba).

Its own `filter` keeps all particles of all times; to keep the same as the others, the scan over its
`filter_prepare` and `filter_combine` is written here and keeps evidence, ESS, mean and variance.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
from cuthbert.smc.particle_filter import build_filter
from cuthbertlib.resampling import adaptive, systematic
from cuthbertlib.smc.ess import log_ess
from jax import lax

VERSIONS = {"cuthbert": importlib.metadata.version("cuthbert"), "jax": jax.__version__}
MU, PHI, SIGMA = -1.0, 0.95, 0.25


def first(key):
    """One draw of `x_0`."""
    return MU + 0.8 * jax.random.normal(key)


def move(key, x, y):
    """One draw of the next state."""
    return MU + PHI * (x - MU) + SIGMA * jax.random.normal(key)


def log_potential(previous, x, y):
    """Log-likelihood of a row."""
    return -0.5 * (jnp.log(2 * jnp.pi) + x + y * y * jnp.exp(-x))


def prepare(y, num_particles):
    """`run(seed)` of the compiled filter."""
    rows = jnp.asarray(y)
    resampling = adaptive.ess_decorator(systematic.resampling, 0.5)
    filter_ = build_filter(first, move, log_potential, num_particles, resampling)

    @jax.jit
    def compiled(key, rows):
        start, rest = jax.random.split(key)
        state = filter_.init_prepare(key=start)._replace(model_inputs=rows[0])

        def step(state, row):
            y, key = row
            state = filter_.filter_combine(state, filter_.filter_prepare(y, key=key))
            weights = jax.nn.softmax(state.log_weights)
            mean = jnp.sum(weights * state.particles)
            variance = jnp.sum(weights * state.particles**2) - mean**2
            ess = jnp.exp(log_ess(state.log_weights))
            return state, (state.log_normalizing_constant, ess, mean, variance)

        state, kept = lax.scan(step, state, (rows, jax.random.split(rest, len(rows))))
        return state.particles, state.log_weights, kept

    def run(seed):
        _, _, kept = jax.block_until_ready(compiled(jax.random.key(seed), rows))
        return kept[0][-1]

    return run
