"""The same filter in particles (NumPy, resampling compiled by numba)."""

import numpy as np
import particles
from particles import distributions, state_space_models
from particles.collectors import Moments

VERSIONS = {"particles": "0.4", "numpy": np.__version__}
MU, PHI, SIGMA = -1.0, 0.95, 0.25


class Volatility(state_space_models.StateSpaceModel):
    """Stochastic volatility; its first state has moved once, as in the program."""

    def PX0(self):
        scale = (PHI**2 * 0.8**2 + SIGMA**2) ** 0.5
        return distributions.Normal(loc=MU, scale=scale)

    def PX(self, t, xp):
        return distributions.Normal(loc=MU + PHI * (xp - MU), scale=SIGMA)

    def PY(self, t, xp, x):
        return distributions.Normal(loc=0.0, scale=np.exp(x / 2))


def prepare(y, num_particles):
    """`run(seed)` of a bootstrap filter with moments and ESS kept."""
    model = state_space_models.Bootstrap(ssm=Volatility(), data=y)

    def run(seed):
        np.random.seed(seed)
        smc = particles.SMC(
            fk=model,
            N=num_particles,
            resampling="systematic",
            ESSrmin=0.5,
            collect=[Moments()],
        )
        smc.run()
        return smc.logLt

    return run
