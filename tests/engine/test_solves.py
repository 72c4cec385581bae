"""Factorizations of every particle run one after the other: side by side they can wait forever on CPU."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var

from smcscale.noise import split_noise

PARTICLES = 5


def step(key, x, shared):
    noise = jax.random.normal(key)
    eye = jnp.eye(2)
    one = jnp.linalg.cholesky(eye * jnp.exp(x))
    other = jnp.linalg.cholesky(eye * jnp.exp(2 * x + noise))
    third = jnp.linalg.eigh(eye * jnp.exp(3 * x))[0]
    return [one.sum() + other.sum() + third.sum() + jnp.linalg.cholesky(shared).sum()]


def over_particles(x, shared, key):
    split = split_noise(step, key.dtype, [x[0], shared], num_shared=1)
    axes = tuple(0 if b else None for b in split.batched)
    rest = jax.vmap(lambda v, x: split.rest(v, x, shared)[0], in_axes=(axes, 0))
    return rest(split.noise(key, PARTICLES), x)


def test_each_waits_for_the_one_before_and_what_is_shared_stays_one():
    x, shared, key = jnp.linspace(-1.0, 1.0, PARTICLES), 2 * jnp.eye(2), jax.random.key(0)
    jaxpr = jax.make_jaxpr(over_particles)(x, shared, key).jaxpr
    after: dict = {}  # of each variable, the factorizations it came through
    sizes, waited = [], []
    for eqn in jaxpr.eqns:
        through = set().union(*(after.get(v, ()) for v in eqn.invars if isinstance(v, Var)))
        if eqn.primitive.name in ("cholesky", "eigh"):
            shape = eqn.invars[0].aval.shape
            sizes.append(shape[:-2])
            if shape[:-2]:
                waited.append(len(through))
                through = through | {len(sizes)}
        after.update(dict.fromkeys(eqn.outvars, through))
    assert sorted(sizes) == [(), (PARTICLES,), (PARTICLES,), (PARTICLES,)]
    assert waited == [0, 1, 2]


def test_waiting_changes_no_number():
    x, shared, key = jnp.linspace(-1.0, 1.0, PARTICLES), 2 * jnp.eye(2), jax.random.key(0)
    noise = jax.random.normal(key, (PARTICLES,))
    exact = 2 * np.exp(x / 2) + 2 * np.exp(x + noise / 2) + 2 * np.exp(3 * x) + 2 * np.sqrt(2)
    np.testing.assert_allclose(over_particles(x, shared, key), exact, rtol=1e-5)


PROGRAM = """
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from smcscale import SMC, ParticleFilter

def program(y):
    def step(state, y):
        x, s = state
        x = numpyro.sample("x", dist.MultivariateNormal(0.9 * x, 0.1 * jnp.eye(3)))
        s = numpyro.sample("s", dist.Normal(s, 0.1))
        one, other = jnp.eye(3) * jnp.exp(s), jnp.eye(3) * jnp.exp(0.1 * x[0] + s)
        numpyro.sample("one", dist.MultivariateNormal(x, one), obs=y)
        numpyro.sample("other", dist.MultivariateNormal(2 * x, other), obs=y)
        return (x, s), None
    scan(step, (jnp.zeros(3), 0.0), y)

smc = SMC(ParticleFilter(program, store="last"), num_particles=30_000, progress_bar=False)
smc.run(jax.random.key(0), jnp.zeros((50, 3)))
print(float(smc.log_evidence[0]))
"""


@pytest.mark.long
def test_two_covariances_of_every_particle_end():
    """Each its own process, with a limit: what it guards against does not end."""
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=150,
        env={**os.environ, "JAX_ENABLE_X64": "0"}, check=True,
    )  # fmt: skip
    assert np.isfinite(float(told.stdout.split()[-1]))
