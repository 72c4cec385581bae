"""`Result` to ArviZ: chain = run, draw = equally weighted draws inside the run.

Draws are exchangeable, so ArviZ's own effective sample size only counts them; the honest numbers
(ESS, unique ancestors, log evidence) are in `sample_stats`. Dead runs are left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smcscale.readout import systematic_indices
from smcscale.result import Result, is_real, readout_key, sites


def to_arviz(result: Result) -> Any:
    """ArviZ data with groups `posterior` and `sample_stats`.

    Returns:
        data: `arviz.InferenceData` (`xarray.DataTree` from ArviZ 1 on). Posterior variables have
            dims `(chain, draw, ...)`, with `time` third when paths or ancestries were kept;
            `sample_stats` has `ess`, `resampled`, `unique_ancestors`, `beta` and
            `running_log_evidence` over `(chain, time)` and `log_evidence` over `(chain,)`.
    Raises:
        ImportError: when ArviZ is not installed.
        ValueError: when every run is dead.
    """
    try:
        import arviz
        import xarray
    except ImportError as error:
        raise ImportError(
            "smcscale: to_arviz needs ArviZ.\n  try: pip install 'smcscale[arviz]'."
        ) from error
    log_weights = np.asarray(result.log_weights, np.float64)
    alive = np.flatnonzero(np.isfinite(log_weights).any(1))
    if not len(alive):
        raise ValueError("smcscale: every particle of every run is dead; there are no draws.")
    key = readout_key(result)
    indices = np.zeros(log_weights.shape, np.int32)
    for r in alive:
        indices[r] = systematic_indices(jax.random.fold_in(key, int(r)), log_weights[r])

    coordinates = {"chain": alive, "draw": np.arange(result.num_particles)}
    posterior = {}
    for name, leaf in _draws(result, jnp.asarray(indices)).items():
        leaf, timed = leaf
        if is_real(leaf):
            dims = ["chain", "draw"] + ["time"] * timed
            dims += [f"{name}_dim_{i}" for i in range(np.ndim(leaf) - len(dims))]
            posterior[name] = (dims, np.asarray(leaf)[alive])
    diagnostics = result.diagnostics
    by_time = {
        "ess": diagnostics.ess,
        "resampled": diagnostics.resampled,
        "unique_ancestors": diagnostics.unique_ancestors,
        "beta": diagnostics.beta,
        "running_log_evidence": diagnostics.log_evidence,
    }
    stats = {name: (["chain", "time"], np.asarray(x)[alive]) for name, x in by_time.items()}
    stats["log_evidence"] = (["chain"], np.asarray(result.log_evidence)[alive])
    about = {"inference_library": "smcscale", "biases": ", ".join(result.biases)}
    groups = {
        "posterior": xarray.Dataset(posterior, coordinates, about),
        "sample_stats": xarray.Dataset(stats, {"chain": alive}, about),
    }
    if any("time" in dims for dims, _ in posterior.values()):
        steps = np.arange(result.num_steps)
        groups = {name: group.assign_coords(time=steps) for name, group in groups.items()}
    before_version_1: Any = vars(arviz).get("InferenceData")
    if before_version_1 is not None:
        return before_version_1(**groups)
    return xarray.DataTree.from_dict(groups)


def _draws(result: Result, indices: jax.Array) -> dict[str, tuple[Any, bool]]:
    """Draws `(R, K, ...)` of every site by name, and whether time is their third axis."""

    def take(leaf):
        return jax.vmap(lambda run, chosen: run[chosen])(leaf, indices)

    timed = result.history is not None
    if timed:
        inside = result.history.trace(indices)
    else:
        inside = jax.tree.map(take, result.final)
    named = {}
    for part, has_time in ((result.before, False), (result.after, False)):
        named |= {k: (v, has_time) for k, v in sites(jax.tree.map(take, part)).items()}
    return named | {k: (v, timed) for k, v in sites(inside).items()}
