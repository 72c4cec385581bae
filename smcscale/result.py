"""What a run leaves behind, and how it is read: weighted particles, samples, filter tables.

`Result` is plain data; everything here is a function of it. Runs are pooled by their evidence:
particle i of run r has weight `Z_r W_ri`, which removes the O(1/N) bias that one vote per run
keeps for ever.

| function | what comes out |
|---|---|
| `pooled_log_evidence` | one log evidence for all runs |
| `require_evidence` | nothing; raises where a kernel leaves no target |
| `get_samples` | equally weighted draws, or weighted particles |
| `filter` | mean, variance and quantiles of every step given the data up to it |

Read next: `diagnostics.py` (errors of the evidence), `summary.py`, `plot.py`.
"""

import math
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PyTree, UInt32

from smcscale import keys
from smcscale.readout import normalized, systematic_indices, weighted_quantiles

#: implementation of a random key by the number of its words
_KEY_KINDS = {2: "threefry2x32", 4: "rbg"}


class Moments(NamedTuple):
    """Filter moments of every run and step: each site given the data up to its step.

    Attributes:
        mean: weighted means; the sites' pytree, leaves `(R, T, ...)`.
        variance: weighted variances, same shapes.
    """

    mean: PyTree
    variance: PyTree


class Initial(NamedTuple):
    """Diagnostics of the initial law and its potential.

    Attributes:
        ess: `(R,)`.
        log_evidence: `(R,)`, nats.
    """

    ess: Float[Array, " R"]
    log_evidence: Float[Array, " R"]


class Diagnostics(NamedTuple):
    """How the particles fared, for every run and step.

    Attributes:
        ess: `(R, T)`, in `[0, N]`: after weighting, before any resampling.
        resampled: `(R, T)`: whether the population was resampled right before step t.
        unique_ancestors: `(R, T)` int32: distinct parents of the particles at t; N if not resampled.
        beta: `(R, T)`: inverse temperature of that resampling, 1 without annealing.
        log_evidence: `(R, T)`, nats: the running log evidence after weighting at t.
        num_particles: `(T,)` int, numpy.
        initial: see `Initial`.
        dead_time: `(R,)` int32: the first step with every particle dead, -1 before the loop, -2 none.
    """

    ess: Float[Array, "R T"]
    resampled: Bool[Array, "R T"]
    unique_ancestors: Int32[Array, "R T"]
    beta: Float[Array, "R T"]
    log_evidence: Float[Array, "R T"]
    num_particles: Any
    initial: Initial
    dead_time: Int32[Array, " R"]


class History(Protocol):
    """Particle paths as `smcscale/engine/store.py` keeps them; "paths" has every particle."""

    @property
    def kind(self) -> str:
        """`"paths"` or `"ancestry"`."""
        ...

    def trace(self, indices: Int32[Array, "R K"]) -> PyTree:
        """Paths that end in these final particles, leaves `(R, K, T, ...)`."""
        ...


class Result(eqx.Module):
    """Weighted particles of R independent runs.

    Attributes:
        log_evidence: `(R,)`, nats.
        log_weights: `(R, N)`, of the final particles, mean weight 1; all `-inf` in a dead run.
        before: sites drawn before the loop, leaves `(R, N, ...)`.
        final: sites of the last step, or the state of a plain Feynman-Kac model.
        after: deterministic sites after the loop.
        eve: `(R, N)` int32, first ancestors; None but under multinomial resampling.
        num_resamplings: `(R,)` int32.
        moments: see `Moments`.
        history: see `History`; None under store="last".
        diagnostics: see `Diagnostics`.
        cost: totals over all runs by name.
        biases: notes such as `"asymptotic: Metropolis"` and `"no target: TopK"`.
        key_data: of the run's key; fixes the draws of `get_samples`.
        warnings: lines for `print_summary`.
    """

    log_evidence: Float[Array, " R"]
    log_weights: Float[Array, "R N"]
    before: dict[str, PyTree]
    final: PyTree
    after: dict[str, PyTree]
    eve: Int32[Array, "R N"] | None
    num_resamplings: Int32[Array, " R"]
    moments: Moments
    history: Any
    diagnostics: Diagnostics
    cost: dict[str, Any]
    biases: tuple[str, ...] = eqx.field(static=True)
    key_data: UInt32[Array, "..."]
    warnings: tuple[str, ...] = eqx.field(static=True)

    @property
    def num_runs(self) -> int:
        """R."""
        return self.log_weights.shape[0]

    @property
    def num_particles(self) -> int:
        """N, at the last step."""
        return self.log_weights.shape[1]

    @property
    def num_steps(self) -> int:
        """T."""
        return self.diagnostics.ess.shape[1]

    @property
    def store(self) -> str:
        """What was kept: `"last"`, `"ancestry"` or `"paths"`."""
        return "last" if self.history is None else self.history.kind


class FilterTable(NamedTuple):
    """The filter law of every step, as moments and, where the particles were kept, quantiles.

    Attributes:
        mean: the sites' pytree, leaves `(T, ...)`, or `(R, T, ...)` per run.
        variance: same shapes.
        result: where it came from.
        per_run: whether runs are kept apart.
    """

    mean: PyTree
    variance: PyTree
    result: Result
    per_run: bool

    @property
    def std(self) -> PyTree:
        """Square roots of `variance`."""
        return jax.tree.map(jnp.sqrt, self.variance)

    def quantiles(self, q: Any, steps: Any = None) -> PyTree:
        """Weighted quantiles of every step.

        Args:
            q: `()` or `(Q,)`, probabilities in `[0, 1]`.
            steps: 0-based rows to look at, all T of them by default.
        Returns:
            quantiles: real leaves of the sites' pytree, `(Q, T, ...)` or `(Q, R, T, ...)`, without
                the first axis for a scalar `q`; other leaves are None.
        Raises:
            ValueError: when the run kept no particles of earlier steps.
        """
        history = self.result.history
        if history is None or history.kind != "paths":
            raise ValueError(
                "smcscale: filter quantiles need the particles of every step, and this run kept "
                f'store="{self.result.store}".\n'
                '  try: ParticleFilter(..., store="paths"); mean and variance are always kept.'
            )
        probabilities = np.atleast_1d(np.asarray(q, np.float64))
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(f"smcscale: quantiles are asked for in [0, 1], got {q}.")
        rows = np.arange(self.result.num_steps) if steps is None else np.atleast_1d(steps)
        log_evidence = _comparable_evidence(self.result)
        all_log_weights = np.asarray(history.log_weights, np.float64)
        populations = []  # weights of each step, (R, N) or (1, R*N)
        for t in rows:
            weights = normalized(all_log_weights[t], axis=1)
            if not self.per_run:
                share = normalized(log_evidence[:, t], axis=0)[:, None]
                weights = np.where(share > 0, share * weights, 0 * share).reshape(1, -1)
            populations.append(weights)

        def table(leaf):
            if not is_real(leaf):
                return None
            leaf, out = np.asarray(leaf), []
            for t, weights in zip(rows, populations, strict=True):
                values = leaf[t].reshape(*weights.shape, *leaf.shape[3:])
                pairs = zip(values, weights, strict=True)
                out.append(np.stack([weighted_quantiles(x, w, probabilities) for x, w in pairs], 1))
            full = np.stack(out, 2)  # (Q, R or 1, T, ...)
            full = full if self.per_run else full[:, 0]
            return jnp.asarray(full[0] if np.ndim(q) == 0 else full)

        return jax.tree.map(table, history.states)


def is_real(leaf: Any) -> bool:
    """Whether an array holds numbers that have a mean: floats, integers or booleans."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating)
        or jnp.issubdtype(dtype, jnp.integer)
        or dtype == np.bool_
    )


def require_evidence(result: Result) -> None:
    """Refuse to give an evidence where a kernel has none.

    Raises:
        ValueError: names the kernel that leaves no target distribution.
    """
    culprits = [note.partition(": ")[2] for note in result.biases if note.startswith("no target")]
    if culprits:
        raise ValueError(
            f"smcscale: there is no log evidence: {', '.join(culprits)} chooses particles without "
            "a target distribution.\n"
            "  try: an unbiased kernel such as resampling.systematic, or corrected=True; "
            "get_samples() gives what the search found."
        )


def pooled_log_evidence(result: Result) -> float:
    """Log of the mean evidence over runs, nats; `-inf` when every run is dead.

    Raises:
        ValueError: where a kernel has no target, see `require_evidence`.
    """
    require_evidence(result)
    return float(np.logaddexp.reduce(np.asarray(result.log_evidence, np.float64))) - math.log(
        result.num_runs
    )


def pooled_log_weights(result: Result) -> np.ndarray:
    """Log of `Z_r W_ri`, `(R, N)` float64; runs count alike where a kernel has no target."""
    log_weights = np.asarray(result.log_weights, np.float64) - math.log(result.num_particles)
    return log_weights + _run_log_weights(result)[:, None]


def readout_key(result: Result) -> Array:
    """The key of all draws from a finished run, from the run's own."""
    data = jnp.asarray(result.key_data)
    return keys.readout(jax.random.wrap_key_data(data, impl=_KEY_KINDS[data.shape[-1]]))


def get_samples(result: Result, weighted: bool = False) -> Any:
    """Draws from the posterior, all runs together.

    Args:
        result: R runs of N particles.
        weighted: whether to return the particles themselves with their weights.
    Returns:
        samples: `{site: (R*N, ...)}`, sites of the loop with a time axis `(R*N, T, ...)` if paths
            or ancestries were kept and at the last step otherwise. Equally weighted draws by
            systematic resampling, in random order, the same at each call. A plain Feynman-Kac
            model gives its state's pytree in place of the dictionary.
        log_weights: only if `weighted`: `(R*N,)`, `log(Z_r W_ri)`; the samples are then the
            particles in order, run after run.
    Raises:
        ValueError: when every particle of every run is dead.
    """
    log_weights = pooled_log_weights(result)
    if weighted:
        dtype = result.log_weights.dtype
        return _everything(result, None), jnp.asarray(log_weights.reshape(-1), dtype)
    if not np.isfinite(log_weights).any():
        raise ValueError(
            "smcscale: there is nothing to sample from: every particle of every run is dead.\n"
            "  try: get_samples(weighted=True) for the particles as they are, or the cures that "
            'on_dead="raise" lists.'
        )
    indices = systematic_indices(readout_key(result), log_weights.reshape(-1))
    return _everything(result, jnp.asarray(indices, jnp.int32))


def filter(result: Result, per_run: bool = False) -> FilterTable:
    """Mean, variance and quantiles of every step given the data up to it.

    Args:
        result: R runs.
        per_run: keep the runs apart instead of pooling them by their running evidence.
    """
    mean, variance = result.moments
    if per_run:
        return FilterTable(mean, variance, result, True)
    log_evidence = _comparable_evidence(result)
    share = normalized(log_evidence, axis=0)  # (R, T)

    def over_runs(leaf):
        weights = share.reshape(*share.shape, *(1,) * (np.ndim(leaf) - 2))
        # a dead run has a weight of zero and may hold anything
        return np.sum(np.where(weights > 0, weights * np.asarray(leaf, np.float64), 0), 0)

    def spread(m, v):
        m, v = np.asarray(m, np.float64), np.asarray(v, np.float64)
        return np.maximum(over_runs(v + (m - over_runs(m)) ** 2), 0)

    def like(f):
        return lambda *leaves: jnp.asarray(f(*leaves), jnp.asarray(leaves[0]).dtype)

    pooled = jax.tree.map(like(over_runs), mean), jax.tree.map(like(spread), mean, variance)
    return FilterTable(*pooled, result, False)


def sites(values: PyTree) -> dict[str, Any]:
    """The arrays of a pytree of sites by name; inner parts are joined with dots.

    Sites that are objects (an `eqx.Module`, such as the text of a language model) are left out.
    """

    def whole(value):
        return isinstance(value, eqx.Module)

    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(values, is_leaf=whole)[0]:
        if not whole(leaf):
            named[jax.tree_util.keystr(path, simple=True, separator=".") or "state"] = leaf
    return named


def _everything(result: Result, indices: Array | None) -> Any:
    """All sites of these particles out of R*N (all of them in order if None)."""

    def take(leaf):
        flat = leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
        return flat if indices is None else flat[indices]

    inside = result.final
    if result.history is not None:
        shape = result.num_runs, result.num_particles
        inside = result.history.trace(
            jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        )
    inside = jax.tree.map(take, inside)
    if not result.before and not result.after:
        return inside
    return {
        **{name: jax.tree.map(take, value) for name, value in result.before.items()},
        **inside,
        **{name: jax.tree.map(take, value) for name, value in result.after.items()},
    }


def _run_log_weights(result: Result) -> np.ndarray:
    """Log weight of each run `(R,)` in the pool."""
    if any(note.startswith("no target") for note in result.biases):
        return np.zeros(result.num_runs)
    return np.asarray(result.log_evidence, np.float64)


def _comparable_evidence(result: Result) -> np.ndarray:
    """Log weight `(R, T)` of each run in the pool at each step."""
    running = np.asarray(result.diagnostics.log_evidence, np.float64)
    if any(note.startswith("no target") for note in result.biases):
        return np.where(np.isfinite(running), 0.0, -np.inf)
    return running
