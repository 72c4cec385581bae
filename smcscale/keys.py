"""The one place where random keys are derived: by run, purpose and time.

`fold_in(key, i) == split(key, n)[i]` in JAX, so keys that are derived in several places collide and
correlate draws silently. Everything random in a run comes from `run_keys(key, num_runs)`; a run's
keys depend on its own index only, so run r draws the same whatever the number of runs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Key, PRNGKeyArray

# purposes: folded in first, so that no two kinds of draw share a stream
_INITIAL, _MOVE, _RESAMPLE, _READOUT, _PREDICT, _ANCESTOR = range(6)


def as_key(key: Array) -> PRNGKeyArray:
    """A typed scalar key, from `jax.random.key(0)` or the older `jax.random.PRNGKey(0)`.

    Raises:
        TypeError: when `key` is not one random key.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        typed = key
    elif getattr(key, "dtype", None) == jnp.uint32 and jnp.ndim(key) == 1:
        typed = jax.random.wrap_key_data(jnp.asarray(key))
    else:
        raise TypeError(
            f"smcscale: `key` must be a JAX random key, got {type(key).__name__}.\n"
            "  try: jax.random.key(0)"
        )
    if typed.shape != ():
        raise TypeError(
            f"smcscale: `key` must be one random key, got an array of keys {typed.shape}.\n"
            "  try: one key; `num_runs` gives independent runs."
        )
    return typed


@functools.partial(jax.jit, static_argnums=1)
def run_keys(key: PRNGKeyArray, num_runs: int) -> Key[Array, " R"]:
    """Keys `(R,)` of independent runs."""
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(num_runs))


def initial(run_key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the draw from the initial law."""
    return jax.random.fold_in(run_key, _INITIAL)


def step(run_key: PRNGKeyArray, time: ArrayLike) -> PRNGKeyArray:
    """Key of one filter step, as `ParticleFilter.step` takes it."""
    return jax.random.fold_in(jax.random.fold_in(run_key, _MOVE), time)


def resampling(step_key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the resampling inside a step."""
    return jax.random.fold_in(step_key, _RESAMPLE)


def move(step_key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the transition inside a step."""
    return jax.random.fold_in(step_key, _MOVE)


def ancestor(step_key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the draw of a kept path's ancestor inside a step."""
    return jax.random.fold_in(step_key, _ANCESTOR)


def readout(key: PRNGKeyArray) -> PRNGKeyArray:
    """Key of the draws that turn weighted particles into equally weighted ones."""
    return jax.random.fold_in(key, _READOUT)


def predict(key: PRNGKeyArray, time: ArrayLike) -> PRNGKeyArray:
    """Key of one step of forecasting."""
    return jax.random.fold_in(jax.random.fold_in(key, _PREDICT), time)
