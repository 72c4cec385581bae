"""Linear inverse problems: `y = A x_0 + noise`, with a proposal that looks at `y` at every level.

In the basis of A's singular vectors each observed coordinate is one number seen through normal noise, and a
noisy number is what a diffusion model holds at some level: `y_i` scaled by `alpha` is a state of the level
where noise over signal equals that of the observation. From pure noise down to that level the coordinate is
drawn towards it by a conjugate (normal) step; below, it moves freely.

    problem = LinearProblem(matrix, y, scale, schedule)
    smc.run(key, **problem.arguments(denoiser))
    problem.data(smc.get_samples()["x"])                          # in the data's own coordinates
    smc.log_evidence + problem.log_constant                       # log p(y)

Inpainting is a matrix of unit rows, super-resolution one of averages, deblurring one of a kernel's rows.
No gradient of the network is needed. The law is exact as steps shrink and `kappa` goes to 0: unlike steering
by the likelihood it takes the denoiser's walk for the true reverse walk.

For variance-preserving schedules. A step's weight depends on its parent alone and is charged when the parent
is reached, so that resampling sees it before the step is made.

Source: Cardoso, Janati, Le Corff & Moulines 2024, "Monte Carlo guided diffusion for Bayesian linear inverse
problems" (arXiv 2308.07983). Their code divides the last potential of a
coordinate out again, which has infinite variance for small kappa; here it stays, as in the paper's target.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int32

from smcscale.models.diffusion.potentials import Seen, nothing_seen
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Constant, Network, Proposed, ancestral
from smcscale.models.diffusion.schedules import Level, Schedule


class LinearProblem(eqx.Module):
    """An observation `y = A x_0 + N(0, scale^2 I)` under a variance-preserving schedule.

    Attributes:
        basis: `(d, d)`, rows are the right singular vectors of A.
        target: `(d,)`, observations in that basis, divided by the singular values; 0 where unseen.
        until: `(d,)` int32, level down to which a coordinate is drawn to its target; above the top level
            where it is not seen.
        signal: `(d,)`, alpha at that level.
        schedule: the levels.
        kappa: slack of the observation at its level, small.
        log_constant: `()`, nats, what the evidence lacks of `log p(y)`.
    """

    basis: Float[Array, "d d"]
    target: Float[Array, " d"]
    until: Int32[Array, " d"]
    signal: Float[Array, " d"]
    schedule: Schedule
    kappa: float
    log_constant: Float[Array, ""]

    def __init__(
        self,
        matrix: Any,
        y: Any,
        scale: float,
        schedule: Schedule,
        *,
        kappa: float = 1e-2,
    ):
        """Find the basis and the level of every observed coordinate.

        Args:
            matrix: A, `(p, d)`.
            y: `(p,)`.
            scale: standard deviation of the noise, 0 or more.
            schedule: variance-preserving.
            kappa: in (0, 1].
        Raises:
            ValueError: shapes that do not fit, values that are not finite, a negative scale, kappa out of
                range, a schedule that does not preserve the variance, or noiseless observations without
                signal.
        """
        a, b = np.asarray(matrix, np.float64), np.asarray(y, np.float64)
        if a.ndim != 2 or b.shape != a.shape[:1]:
            raise ValueError(
                f"smcscale: `matrix` has shape {a.shape} and `y` has shape {b.shape}.\n"
                "  try: (p, d) and (p,)."
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            name = "y" if np.isfinite(a).all() else "matrix"
            raise ValueError(
                f"smcscale: `{name}` has values that are NaN or infinite.\n"
                "  try: leave the rows of missing observations out of both."
            )
        if scale < 0 or not 0 < kappa <= 1:
            raise ValueError(
                f"smcscale: need scale >= 0 and kappa in (0, 1], got {scale} and {kappa}."
            )
        alpha, sigma = (np.asarray(s, np.float64) for s in (schedule.alpha, schedule.sigma))
        if np.abs(alpha**2 + sigma**2 - 1).max() > 1e-4:
            raise ValueError(
                "smcscale: LinearProblem needs a variance-preserving schedule.\n"
                "  try: vp_linear or vp_cosine."
            )
        left, values, right = np.linalg.svd(a, full_matrices=True)
        seen = values > 1e-10 * max(values.max(initial=0.0), 1e-300)
        d, rank = a.shape[1], int(seen.sum())
        rotated = left.T @ b
        rest = rotated[rank:]
        if scale == 0 and np.abs(rest).max(initial=0.0) > 1e-6 * max(np.abs(b).max(), 1e-300):
            raise ValueError(
                "smcscale: `y` is not of the form `matrix @ x`, and scale is 0.\n  try: a scale."
            )
        wanted = scale / values[:rank]
        levels = np.abs(np.log1p(sigma[None] / alpha[None]) - np.log1p(wanted)[:, None]).argmin(1)
        target, until = np.zeros(d), np.full(d, len(alpha), np.int32)
        target[:rank], until[:rank] = rotated[:rank] / values[:rank], levels
        self.basis = jnp.asarray(right, float)
        self.target = jnp.asarray(target, float)
        self.until = jnp.asarray(until)
        self.signal = jnp.asarray(np.append(alpha, 1.0)[until], float)
        self.schedule = schedule
        self.kappa = kappa
        constant = np.sum(np.log(alpha[levels]) - np.log(values[:rank]))
        if scale > 0:
            constant += np.sum(-(rest**2) / (2 * scale**2) - np.log(scale * np.sqrt(2 * np.pi)))
        self.log_constant = jnp.asarray(constant, float)

    def arguments(self, denoiser: Network, inner: Callable[..., Any] = ancestral) -> dict[str, Any]:
        """All arguments of `denoise`, which belong together: `smc.run(key, **problem.arguments(d))`."""
        return {
            "denoiser": self.denoiser(denoiser),
            "schedule": self.schedule,
            "steering": self.potential(inner),
            "shape": (len(self.target),),
            "sampler": self.sampler(inner),
            "start": self.start(),
        }

    def denoiser(self, denoiser: Network) -> Network:
        """The denoiser in the basis of the singular vectors."""
        return Rotated(denoiser, self.basis)

    def data(self, states: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """States of the walk in the data's own coordinates."""
        return states @ self.basis

    def slack(self, level: Level) -> Float[Array, " d"]:
        """Variance of a coordinate around its target at a level."""
        return 1 - (1 - self.kappa) * (level.alpha / self.signal) ** 2

    def active(self, level: Level) -> Bool[Array, " d"]:
        """Coordinates that are drawn to their target at a level."""
        return level.index >= self.until

    def start(self) -> Proposed:
        """The law of noise given the targets at the top level, and its constant weight."""
        top = self.schedule.level(-1)
        slack = jnp.where(self.active(top), self.slack(top), 1.0)
        goal = top.alpha * self.target
        gain = jnp.where(self.active(top), 1 / (1 + slack), 0.0)
        variance = jnp.where(self.active(top), slack * gain, 1.0)
        law = dist.Normal(gain * goal, jnp.sqrt(variance)).to_event(1)
        each = dist.Normal(0.0, jnp.sqrt(1 + slack)).log_prob(goal)
        weight = jnp.sum(jnp.where(self.active(top), each, 0.0))
        return Proposed(law, Constant(weight))

    def sampler(self, inner: Callable[..., Any] = ancestral) -> "Conjugate":
        """A normal sampler's step, drawn towards the targets."""
        return Conjugate(self, inner)

    def potential(self, inner: Callable[..., Any] = ancestral) -> "Owed":
        """What stands in the place of a `Steering`: the weights that those steps owe."""
        return Owed(self, inner)


class Rotated(eqx.Module):
    """A denoiser in another basis."""

    inner: Network
    basis: Float[Array, "d d"]

    def __call__(self, x: Float[Array, " d"], level: Level) -> Prediction:
        found = self.inner(x @ self.basis, level)
        return Prediction(self.basis @ found.x0, self.basis @ found.eps)


class Conjugate(eqx.Module):
    """The sampler of a `LinearProblem`.

    Attributes:
        problem: what is observed.
        inner: a sampler with normal steps, such as `ancestral`.
    """

    problem: LinearProblem
    inner: Callable[..., Any] = ancestral

    def __call__(
        self, denoiser: Network, x: Array, prediction: Prediction, high: Level, low: Level
    ) -> Any:
        """Law of the state at `low`: the sampler's own step times the potential of `low`."""
        own = self.inner(denoiser, x, prediction, high, low)
        drawn = self.problem.active(low)
        slack = self.problem.slack(low)
        gain = jnp.where(drawn, own.variance / (own.variance + slack), 0.0)
        mean = gain * low.alpha * self.problem.target + (1 - gain) * own.mean
        return dist.Normal(mean, jnp.sqrt(jnp.where(drawn, slack * gain, own.variance))).to_event(1)


class Owed(eqx.Module):
    """The potential of a `LinearProblem`, in the form of a `Steering`.

    At a state it charges what its next step will be worth, over the potential that the state was drawn by.

    Attributes:
        problem, inner: those of the `Conjugate` sampler.
    """

    problem: LinearProblem
    inner: Callable[..., Any] = ancestral
    num_guesses: int = eqx.field(static=True, default=0)

    def start(self) -> Seen:
        """Nothing is remembered between steps."""
        return nothing_seen()

    def calls(self, made: Array, last: Array) -> Array:
        """No reward is called."""
        return jnp.zeros((), jnp.int32)

    def __call__(
        self,
        seen: Seen,
        x: Array,
        prediction: Prediction,
        guesses: None,
        level: Level,
        made: Array,
        last: Array,
    ) -> tuple[Seen, Array]:
        """Log potential of a state at its level; arguments as of `Steering`."""
        problem = self.problem
        low = problem.schedule.level(jnp.maximum(level.index - 1, 0))
        own = self.inner(None, x, prediction, level, low)
        staying = problem.active(low) & ~last
        slack = jnp.where(staying, problem.slack(low), 1.0)
        variance = jnp.where(staying, own.variance, 0.0)
        ahead = dist.Normal(own.mean, jnp.sqrt(variance + slack))
        paid = dist.Normal(
            level.alpha * problem.target, jnp.sqrt(jnp.where(staying, problem.slack(level), 1.0))
        )
        owed = ahead.log_prob(low.alpha * problem.target) - paid.log_prob(x)
        return seen, jnp.sum(jnp.where(staying, owed, 0.0))
