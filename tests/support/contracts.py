"""What every member of a kind must do, and the lists of members.

A new kernel adds itself to `RESAMPLING` here, and its name to `KERNELS` in
`tests/engine/test_evidence.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from smcscale.kernels import resampling
from support.montecarlo import assert_mean


class Member(NamedTuple):
    """A resampling kernel and what it claims.

    Attributes:
        kernel: `(key, log_weights, n) -> ancestors`.
        sorted: whether the ancestors come out in order.
        any_n: whether it takes another number of ancestors than of particles.
        any_one: whether it gives a single ancestor.
        platforms: where it must lower to.
    """

    kernel: Any
    sorted: bool = True
    any_n: bool = True
    any_one: bool = True
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")


RESAMPLING = {
    "multinomial": Member(resampling.multinomial),
    "stratified": Member(resampling.stratified),
    "systematic": Member(resampling.systematic),
    "residual": Member(resampling.residual),
    "ssp": Member(resampling.ssp),
    "killing": Member(resampling.killing, sorted=False, any_n=False),
    "metropolis": Member(resampling.metropolis, sorted=False),
    "rejection": Member(resampling.rejection, sorted=False),
    "fan-out": Member(resampling.FanOut(resampling.systematic, 2), any_one=False),
}

#: dead first, in the middle and last; a weight above 1 / N, a small one, two equal ones; multiples
#: of 1/8 so that adding a constant changes no bit
LOG_WEIGHTS = np.array(
    [-np.inf, 0.25, -1.0, -np.inf, 1.25, -3.0, -1.0, -6.0, 0.5, -np.inf], np.float32
)
_REPLICATES = 20_000
_COUNTS = (LOG_WEIGHTS.size, 6)
#: all comparisons of expected offspring: members x numbers of ancestors x particles
_FAMILY = len(RESAMPLING) * len(_COUNTS) * LOG_WEIGHTS.size


def weights_of(log_weights) -> np.ndarray:
    """Weights that sum to one, in float64."""
    log_weights = np.asarray(log_weights, np.float64)
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def offspring(ancestors, num_particles: int) -> np.ndarray:
    """Number of children `(..., N)` of every particle."""
    ancestors = np.asarray(ancestors)
    flat = ancestors.reshape(-1, ancestors.shape[-1])
    shifted = flat + num_particles * np.arange(len(flat))[:, None]
    counts = np.bincount(shifted.reshape(-1), minlength=len(flat) * num_particles)
    return counts.reshape(*ancestors.shape[:-1], num_particles)


@functools.cache
def _compiled(kernel: Any, n: int) -> Any:
    """`(key, log_weights) -> ancestors`, compiled once for all checks."""
    return jax.jit(lambda key, log_weights: kernel(key, log_weights, n))


@functools.cache
def many_draws(kernel: Any, n: int) -> np.ndarray:
    """Ancestors `(R, n)` under vmap, from the keys of `_draw_keys`."""
    log_weights = jnp.asarray(LOG_WEIGHTS)
    draw = jax.jit(jax.vmap(lambda key: kernel(key, log_weights, n)))
    return np.asarray(draw(_draw_keys(n)))


def _draw_keys(n: int) -> Any:
    return jax.random.split(jax.random.key(n), _REPLICATES)


def check_offspring(member: Member) -> None:
    """Range, dtype, order, none for the dead, and `E[offspring] = n weights`."""
    for n in _COUNTS if member.any_n else _COUNTS[:1]:
        ancestors = many_draws(member.kernel, n)
        assert ancestors.shape == (_REPLICATES, n)
        assert ancestors.dtype == jnp.int32
        assert ancestors.min() >= 0 and ancestors.max() < LOG_WEIGHTS.size
        in_order = (np.diff(ancestors, axis=1) >= 0).all()
        assert in_order == member.sorted
        counts = offspring(ancestors, LOG_WEIGHTS.size)
        assert (counts[:, np.isneginf(LOG_WEIGHTS)] == 0).all()
        assert_mean(counts, n * weights_of(LOG_WEIGHTS), family=_FAMILY, smallest_bias=0.08)


def check_transformations(member: Member) -> None:
    """The same draws under vmap and in a loop, with and without jit, and for shifted weights."""
    n = LOG_WEIGHTS.size
    one = _compiled(member.kernel, n)
    keys = _draw_keys(n)[:5]
    alone = [np.asarray(one(key, LOG_WEIGHTS)) for key in keys]
    np.testing.assert_array_equal(many_draws(member.kernel, n)[:5], alone)
    for shift in (64.0, -64.0):
        shifted = np.asarray(one(keys[0], LOG_WEIGHTS + np.float32(shift)))
        np.testing.assert_array_equal(shifted, alone[0])
    eager = np.asarray(member.kernel(keys[0], jnp.asarray(LOG_WEIGHTS), n))
    np.testing.assert_array_equal(eager, alone[0])


def check_many(member: Member) -> None:
    """At a million particles, most of them dead and the last too: none of those is chosen."""
    n = 1_000_000
    log_weights = jax.random.normal(jax.random.key(1), (n,))
    dead = (jnp.arange(n) % 3 > 0) | (jnp.arange(n) > n - 100)
    log_weights = jnp.where(dead, -jnp.inf, log_weights)
    ancestors = np.asarray(_compiled(member.kernel, n)(jax.random.key(2), log_weights))
    assert ancestors.min() >= 0 and ancestors.max() < n
    assert not np.asarray(dead)[ancestors].any()


def check_edges(member: Member) -> None:
    """All weight on one particle, weights of every size, and one particle only."""
    n = LOG_WEIGHTS.size
    biased = getattr(member.kernel, "bias", None) is not None
    run = _compiled(member.kernel, n)
    for heavy in (0, n - 1):
        for rest in (-np.inf,) if biased else (-np.inf, -1e30, -100.0):
            log_weights = np.full(n, rest, np.float32)
            log_weights[heavy] = 3.0
            ancestors = np.asarray(run(jax.random.key(0), log_weights))
            np.testing.assert_array_equal(ancestors, np.full(n, heavy))
    if member.any_one:
        alone = np.asarray(_compiled(member.kernel, 1)(jax.random.key(0), jnp.asarray([3.0])))
        np.testing.assert_array_equal(alone, [0])


def check_broken(member: Member) -> None:
    """NaN and all-dead weights come to an end, with indices in range (the engine reports them)."""
    n = LOG_WEIGHTS.size
    run = _compiled(member.kernel, n)
    for value in (np.nan, np.inf, -np.inf):
        for log_weights in (np.full(n, value), np.where(np.arange(n) == 3, value, 0.0)):
            ancestors = np.asarray(run(jax.random.key(0), np.asarray(log_weights, np.float32)))
            assert ancestors.min() >= 0 and ancestors.max() < n


def check_export(member: Member) -> None:
    """Lowers for every platform, without callbacks."""
    n = LOG_WEIGHTS.size
    run = jax.jit(lambda key, lw: member.kernel(jax.random.wrap_key_data(key), lw, n))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    log_weights = jax.ShapeDtypeStruct((n,), jnp.float32)
    exported = export.export(run, platforms=member.platforms)(key, log_weights)
    assert set(exported.platforms) == set(member.platforms)
    assert "callback" not in exported.mlir_module()


def check_resampling(member: Member) -> None:
    """The whole contract."""
    check_offspring(member)
    check_transformations(member)
    check_many(member)
    check_edges(member)
    check_broken(member)
    check_export(member)
