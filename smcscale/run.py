"""`SMC`, the front door: takes a program's arguments in, gives results out.

The time scan is compiled in fixed blocks that a host loop (`drive.py`) calls one after the other;
that loop is where progress, interrupts and errors live, so the compiled program contains no
callback and its numbers depend on none of them.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale import diagnostics as diagnose
from smcscale import keys, saving, summary
from smcscale import result as results
from smcscale.arviz_export import to_arviz
from smcscale.drive import Drive, divisible, memory, positive, schedule
from smcscale.engine import compiled
from smcscale.engine.compiled import Sizes
from smcscale.engine.filter import ParticleFilter
from smcscale.feynman_kac import FeynmanKac
from smcscale.program.forecast import forecast


class SMC:
    """Runs a particle algorithm, as NumPyro's `MCMC` runs a kernel.

    Args:
        algorithm: a `ParticleFilter`.
        num_particles: N of each run; or a static schedule, a sequence of one number for each row or
            a function of the row.
        num_runs: R independent runs in one compiled call; their spread gives standard errors.
        num_islands: M; kernels get one island of N / M particles at a time.
        on_dead: "raise" or "return", when every particle of every run has zero weight.
        progress_bar: show steps, ESS and log evidence while running (interactive output only).
    Raises:
        TypeError, ValueError: by argument name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from smcscale import SMC, FeynmanKac, ParticleFilter
        >>> walk = FeynmanKac(
        ...     initial=lambda key: jax.random.normal(key),
        ...     transition=lambda key, x, y: x + jax.random.normal(key),
        ...     log_potential=lambda previous, x, y: -0.5 * (y - x) ** 2,
        ... )
        >>> smc = SMC(ParticleFilter(walk), num_particles=1000, num_runs=2, progress_bar=False)
        >>> smc.run(jax.random.key(0), jnp.array([0.5, 1.0, 0.8]))
        >>> smc.log_evidence.shape
        (2,)
    """

    def __init__(
        self,
        algorithm: ParticleFilter,
        *,
        num_particles: int | Sequence[int] | Callable[[int], int],
        num_runs: int = 1,
        num_islands: int = 1,
        on_dead: str = "raise",
        progress_bar: bool = True,
    ):
        if not isinstance(algorithm, ParticleFilter):
            raise TypeError(
                f"smcscale: `algorithm` must be a ParticleFilter, got {type(algorithm).__name__}.\n"
                "  try: SMC(ParticleFilter(program), num_particles=...)."
            )
        positive("num_runs", num_runs)
        positive("num_islands", num_islands)
        if on_dead not in ("raise", "return"):
            raise ValueError(f'smcscale: `on_dead` must be "raise" or "return", got {on_dead!r}.')
        if isinstance(num_particles, str) or not (
            callable(num_particles) or isinstance(num_particles, Sequence)
        ):
            divisible(positive("num_particles", num_particles), num_islands)
        self.algorithm = algorithm
        self.num_particles = num_particles
        self.num_runs = num_runs
        self.num_islands = num_islands
        self.on_dead = on_dead
        self.progress_bar = progress_bar
        self._result: results.Result | None = None
        self._call: tuple | None = None
        self._population: Any = None

    # ---- running

    def run(self, key: Array, *args: Any, num_steps: int | None = None, **kwargs: Any) -> None:
        """Run the algorithm; results are then attributes and methods of this object.

        Args:
            key: random key; the same key gives the same result.
            *args: the program's arguments; for a `FeynmanKac` model its rows, leaves `(T, ...)`.
            num_steps: T, for a `FeynmanKac` model without rows, unless it says so itself.
            **kwargs: the program's keyword arguments.
        Raises:
            ValueError: bad arguments, before any long work.
            FloatingPointError: NaN or +inf potentials, NaN states, or all particles dead, with the
                first step, run and site.
        """
        key = keys.as_key(key)
        if not isinstance(self.algorithm.program, FeynmanKac) and num_steps is not None:
            kwargs["num_steps"], num_steps = num_steps, None
        args, kwargs = _arrays(args), _arrays(kwargs)
        started = time.perf_counter()
        drive = Drive(self, key, args, kwargs, num_steps)
        if drive.meta.observed:
            self._check_missing(args, kwargs)
        try:
            drive.loop()
        except KeyboardInterrupt:
            if drive.done == 0:
                raise
            warnings.warn(
                f"smcscale: interrupted after {drive.done} of {drive.meta.num_steps} steps; the "
                "partial result is kept.",
                stacklevel=2,
            )
        self._result = drive.result(time.perf_counter() - started)
        self._population = drive.population
        self._call = (key, args, kwargs)

    def estimate_memory(
        self, *args: Any, num_steps: int | None = None, **kwargs: Any
    ) -> dict[str, int]:
        """Bytes that `run` with these arguments would need, by part, without running it.

        Returns:
            `{"particles", "history", "total"}`; raises nothing however large.
        """
        if not isinstance(self.algorithm.program, FeynmanKac) and num_steps is not None:
            kwargs["num_steps"], num_steps = num_steps, None
        args, kwargs = _arrays(args), _arrays(kwargs)
        run_keys = keys.run_keys(jax.random.key(0), self.num_runs)
        probe = Sizes(self.num_islands, self.num_runs, self.num_islands, num_steps)
        meta = compiled.describe(self.algorithm, run_keys, probe, args, kwargs)
        return memory(self, meta, schedule(self, meta))

    def _check_missing(self, args: tuple, kwargs: dict) -> None:
        """Refuse NaN observations by site and time, before the run."""
        if isinstance(self.algorithm.program, FeynmanKac) or not _any_nan((args, kwargs)):
            return
        found = compiled.missing(self.algorithm, args, kwargs)
        for site, (absent, partly) in found.items():
            absent, partly = np.asarray(absent), np.asarray(partly)
            if self.algorithm.nan_is_missing:
                if partly.any():
                    raise ValueError(
                        f'smcscale: observed site "{site}" is partly NaN at step '
                        f"{int(partly.argmax())}; a joint distribution cannot drop elements.\n"
                        "  try: independent sites for the elements, or all of them missing."
                    )
            elif absent.any():
                raise ValueError(
                    f'smcscale: observed site "{site}" is NaN at step {int(absent.argmax())} '
                    f"({int(absent.sum())} of {absent.size} rows).\n"
                    "  try: ParticleFilter(..., nan_is_missing=True), or `mask` in the program."
                )

    # ---- results

    @property
    def result(self) -> results.Result:
        """Everything the run gave; raises before `run`."""
        if self._result is None:
            raise RuntimeError("smcscale: nothing has been run yet.\n  try: smc.run(key, ...).")
        return self._result

    @property
    def log_evidence(self) -> Array:
        """`(num_runs,)`, nats: logs of unbiased estimates of the evidence.

        Raises:
            ValueError: when a selection kernel or `corrected=False` left no target.
        """
        results.require_evidence(self.result)
        return self.result.log_evidence

    @property
    def log_evidence_error(self) -> Any:
        """Standard error of the pooled log evidence, nats; see `diagnostics.log_evidence_error`."""
        return diagnose.log_evidence_error(self.result)

    @property
    def diagnostics(self) -> results.Diagnostics:
        """ESS, resampling, ancestors and evidence by step."""
        return self.result.diagnostics

    @property
    def cost(self) -> dict[str, float]:
        """What the run spent, by name, over all runs."""
        return self.result.cost

    @property
    def filter(self) -> Any:
        """Weighted filter means, variances and quantiles by step; see `smcscale.result.filter`."""
        return results.filter(self.result)

    def get_samples(self, weighted: bool = False) -> Any:
        """Equally weighted draws, runs pooled by their evidence; see `smcscale.result.get_samples`."""
        return results.get_samples(self.result, weighted=weighted)

    def predict(self, key: Array, num_steps: int, xs: Any = None) -> dict:
        """Forecasts: the program run on beyond the data, observed sites drawn too.

        Args:
            key: random key.
            num_steps: steps beyond the last row.
            xs: rows of the scanned inputs beyond the data, where the program reads more of them
                than observations; leaves `(num_steps, ...)`.
        Returns:
            `{site: (num_runs * num_particles, num_steps, ...)}`, equally weighted.
        Raises:
            ValueError: when the program reads inputs that are not given.
        """
        if self._call is None:
            raise RuntimeError(
                "smcscale: there is no run to predict from (a loaded result has no program).\n"
                "  try: smc.run(key, ...) first."
            )
        positive("num_steps", num_steps)
        if isinstance(self.algorithm.program, FeynmanKac):
            raise NotImplementedError(
                "smcscale: `predict` needs a program; a FeynmanKac model says nothing of "
                "observations.\n  try: its `transition` on get_samples()."
            )
        run_key, args, kwargs = self._call
        pooled = results.pooled_log_weights(self.result).reshape(-1)
        if not np.isfinite(pooled).any():
            raise ValueError("smcscale: every particle of every run is dead; nothing to predict.")
        key = keys.as_key(key)
        indices = results.systematic_indices(keys.readout(key), pooled)
        run_keys = keys.run_keys(run_key, self.num_runs)
        sizes = Sizes(self.result.num_particles, self.num_runs, self.num_islands, None)
        states = compiled.final_states(
            self.algorithm, run_keys, sizes, args, kwargs, self._population
        )
        return forecast(
            self.algorithm.program,
            self.algorithm.guide,
            jax.random.split(key, len(indices)),
            jnp.asarray(indices, jnp.int32),
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states),
            args,
            kwargs,
            num_steps,
            xs,
        )

    def print_summary(self, **options: Any) -> None:
        """A table of sites, ESS, evidence and cost; see `summary.print_summary`."""
        summary.print_summary(self.result, **options)

    def to_arviz(self) -> Any:
        """ArviZ data: chain = run, draw = equally weighted draws inside the run."""
        return to_arviz(self.result)

    def save(self, path: Any) -> None:
        """Write the result (not the program) as safetensors and JSON."""
        saving.save(self.result, path)

    @classmethod
    def load(cls, path: Any) -> "SMC":
        """An `SMC` that holds a saved result: everything but `run` and `predict`."""
        loaded = cls.__new__(cls)
        loaded._result = saving.load(path)
        loaded._call = None
        return loaded


def _arrays(tree: Any) -> Any:
    """NumPy arrays, series and frames as JAX arrays; the rest as it is."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
            return leaf
        return jnp.asarray(np.asarray(leaf))

    return jax.tree.map(convert, tree)


def _any_nan(tree: Any) -> bool:
    floating = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return bool(floating) and bool(_has_nan(floating))


@jax.jit
def _has_nan(leaves: list[Array]) -> Array:
    return jnp.any(jnp.stack([jnp.any(jnp.isnan(leaf)) for leaf in leaves]))
