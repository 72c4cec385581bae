"""What the benchmarks on mixtures share: the exact denoiser, the published levels, a run, distances."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import mixtures
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.schedules import Level, Schedule, as_schedule

#: alpha squared of the usual 1000 levels, beta from 1e-4 to 0.02
SIGNAL = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Modes(eqx.Module):
    """The exact denoiser of a mixture of normal laws with one variance in all directions.

    Attributes:
        log_weights: `(C,)`.
        means: `(C, d)`.
        variance: of every mode.
    """

    log_weights: Float[Array, " C"]
    means: Float[Array, "C d"]
    variance: Float[Array, ""]

    def __call__(self, x: Float[Array, " d"], level: Level) -> Prediction:
        """`E[x_0 | x]`, `E[eps | x]`."""
        spread = level.alpha**2 * self.variance + level.sigma**2
        away = x - level.alpha * self.means
        shares = jax.nn.softmax(self.log_weights - jnp.sum(away**2, axis=1) / (2 * spread))
        mean = shares @ self.means
        rest = (x - level.alpha * mean) / spread
        return Prediction(mean + level.alpha * self.variance * rest, level.sigma * rest)

    def full(self) -> mixtures.GaussianMixture:
        """With a covariance for every mode."""
        covs = self.variance * jnp.eye(self.means.shape[1])
        return mixtures.GaussianMixture(
            self.log_weights, self.means, jnp.broadcast_to(covs, (len(self.means), *covs.shape))
        )


def respaced(steps: np.ndarray) -> Schedule:
    """Levels at these of the 1000 published ones, and the data."""
    signal = SIGNAL[np.unique(steps)]
    alpha, sigma = np.append(1.0, np.sqrt(signal)), np.append(0.0, np.sqrt(1 - signal))
    zero = np.zeros_like(alpha)
    return as_schedule(alpha, sigma, np.arange(len(alpha)), zero, zero, 1.0)


def mean_of(values: Any) -> dict:
    """Mean and half of its 95% interval (Student's t)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": values.mean(), "half": scipy.stats.t.isf(0.025, len(values) - 1) * error}


def told(cell: dict, digits: int = 3) -> str:
    """A mean with its interval."""
    return f"{cell['mean']:.{digits}f} ± {cell['half']:.{digits}f}"


def even(log_weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many equal particles, by systematic resampling: indices."""
    weights = np.exp(log_weights.astype(np.float64) - log_weights.max())
    count = len(weights)
    points = (np.arange(count) + rng.uniform()) / count
    return np.searchsorted(np.cumsum(weights / weights.sum()), points).clip(max=count - 1)


def sliced(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> float:
    """Sliced Wasserstein-1 distance of two samples of one size, 1000 slices."""
    slices = rng.normal(size=(one.shape[1], 1000))
    slices /= np.linalg.norm(slices, axis=0)
    sorted_ones = (np.sort(sample @ slices, axis=0) for sample in (one, other))
    return float(np.mean(np.abs(np.subtract(*sorted_ones))))


def ran(key: Any, *args: Any, particles: int, runs: int = 1, trigger: Any = None, **kwargs: Any):
    """A run of `denoise`."""
    trigger = triggers.ess_below(0.5) if trigger is None else trigger
    smc = SMC(
        ParticleFilter(denoise, trigger=trigger, store="last"), num_particles=particles,
        num_runs=runs, progress_bar=False,
    )  # fmt: skip
    smc.run(key, *args, **kwargs)
    return smc


def nearest(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Index of the mode that is nearest."""
    return np.square(points[..., None, :] - means).sum(-1).argmin(-1)
