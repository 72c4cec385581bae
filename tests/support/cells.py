"""One cell of the grid {model} x {kernel} x {trigger} x {tilt} x {proposal}: independent replicates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, lookahead, resampling, tilts, triggers
from support.exact import Exact

#: particles and replicates of a cell
NUM_PARTICLES = 80
NUM_RUNS = 6500

TRIGGERS = {
    "never": triggers.never,
    "always": triggers.always,
    "ess": triggers.ess_below(0.5),
    "every": triggers.every(2),
}
TILTS = {
    "none": {},
    "fixed": {"annealing": annealing.Fixed(0.5)},
    "floor": {"annealing": annealing.ESSFloor(0.6)},
    "entropic": {"annealing": annealing.Entropic(num_steps=5)},
    "soft": {"tilt": tilts.Soft(0.5)},
    "optimal": {"tilt": tilts.Optimal(NUM_PARTICLES // 2)},
}


class Replicates(NamedTuple):
    """Unbiased estimates of a cell, one for each run.

    Attributes:
        ratio: `(R,)`, evidence over the exact one.
        filtered: `(R,)`, last filter mean times ratio.
        smoothed: `(R, T)`, smoothing means times ratio.
    """

    ratio: np.ndarray
    filtered: np.ndarray
    smoothed: np.ndarray


def replicates(
    exact: Exact, kernel: Any, trigger: str, tilt: str, mode: str, seed: int = 0
) -> Replicates:
    """Run a cell of the grid."""
    options: dict = dict(TILTS[tilt])
    if mode == "guided":
        options["guide"] = exact.guide
    if mode == "lookahead":
        options["lookahead"] = lookahead.LookAhead(exact.log_eta)
    particle_filter = ParticleFilter(
        exact.program,
        resampling=getattr(resampling, kernel) if isinstance(kernel, str) else kernel,
        trigger=TRIGGERS[trigger],
        store="paths",
        **options,
    )
    smc = SMC(particle_filter, num_particles=NUM_PARTICLES, num_runs=NUM_RUNS, progress_bar=False)
    smc.run(jax.random.key(seed), exact.data)
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64) - exact.log_evidence)
    weights = np.asarray(jax.nn.softmax(smc.result.log_weights, axis=1), np.float64)
    slots = jnp.broadcast_to(jnp.arange(NUM_PARTICLES), weights.shape)
    paths = np.asarray(smc.result.history.trace(slots)["x"], np.float64)
    smoothed = np.einsum("rn,rnt->rt", weights, paths)
    filtered = np.asarray(smc.result.moments.mean["x"], np.float64)[:, -1]
    return Replicates(ratio, filtered * ratio, smoothed * ratio[:, None])
