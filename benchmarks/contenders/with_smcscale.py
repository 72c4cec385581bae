"""The program of the README with other parameters; the SMC object is rebuilt at every run."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from smcscale import SMC, ParticleFilter

VERSIONS = {"jax": jax.__version__, "numpyro": numpyro.__version__}


def volatility(y):
    """Stochastic volatility."""
    x0 = numpyro.sample("x0", dist.Normal(-1.0, 0.8))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(-1.0 + 0.95 * (x + 1.0), 0.25))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, x

    scan(step, x0, y)


def prepare(y, num_particles):
    """`run(seed)` of the whole front door."""
    rows = jnp.asarray(y)

    def run(seed):
        particle_filter = ParticleFilter(volatility, store="last")
        smc = SMC(particle_filter, num_particles=num_particles, progress_bar=False)
        smc.run(jax.random.key(seed), rows)
        return smc.log_evidence[0]

    return run
