"""Powers of forty modes (Skreta et al. 2025, FKC): their integral, and the masses of the modes.

    python benchmarks/mixtures_annealed.py [--quick]

40 modes in the plane, scaled to unit variance, exact scores, and their 2nd and 3rd power; 1000 particles, 1000 steps (`bridge`
also 2000: what it is off by falls with the steps). Integral and masses are exact, by quadrature. `target score` and `tempered noise` are the published drifts, `bridge`
the default here; without weights the walk alone. Intervals are 95%, over runs. Writes
`benchmarks/results/mixtures_annealed.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from modes import Modes, mean_of, nearest, ran, told
from provenance import made_with

from smcscale.models.diffusion import correctors
from smcscale.models.diffusion.schedules import Level, vp_linear

RESULT = Path(__file__).resolve().parent / "results" / "mixtures_annealed.json"


def annealed(runs: int) -> dict:
    """The FKC problem: integral and modes of powers of a mixture."""
    rng = np.random.default_rng(0)
    scale = 40 / np.sqrt(3)  # standard deviation of a uniform law on (-40, 40)
    means = rng.uniform(-40, 40, size=(40, 2)) / scale
    variance = float(np.log1p(np.e)) / scale**2  # softplus(1), as in the published mixture
    modes = Modes(jnp.full(40, -np.log(40.0)), jnp.asarray(means), jnp.asarray(variance))
    ticks = np.linspace(-2.2, 2.2, 2201)
    plane = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)
    density = np.zeros(len(plane))
    for mean in means:
        density += np.exp(-np.square(plane - mean).sum(1) / (2 * variance))
    density /= 40 * 2 * np.pi * variance
    cells = {}
    for power in (2.0, 3.0):
        raised = density**power
        exact = np.log(raised.sum() * (ticks[1] - ticks[0]) ** 2)
        masses = (
            np.bincount(nearest_mode(plane, means), weights=raised, minlength=40) / raised.sum()
        )
        model = correctors.Composed((modes,), (power,))
        drifts = {
            "bridge": correctors.bridge,
            "target score": correctors.target_score,
            "tempered noise": correctors.tempered_noise,
        }
        walks = [(name, weighed, 1000) for name in drifts for weighed in (True, False)]
        for name, weighed, steps in [*walks, ("bridge", True, 2000)]:
            schedule = vp_linear(steps)
            start = correctors.composed_start(schedule, model.powers, (2,))
            active = correctors.always if weighed else nowhere
            smc = ran(
                jax.random.key(2), model, schedule, shape=(2,), particles=1000, runs=runs,
                sampler=correctors.Corrected(drift=drifts[name], active=active), start=start,
            )  # fmt: skip
            x, log_weights = np.asarray(smc.result.final["x"]), np.asarray(smc.result.log_weights)
            weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            found = [
                np.bincount(nearest_mode(x[r], means), weights=weights[r], minlength=40)
                for r in range(runs)
            ]
            errors = np.asarray(smc.log_evidence, np.float64) - exact
            cell = {
                "error of log Z": mean_of(errors) if weighed else None,
                "root mean square": float(np.sqrt(np.mean(errors**2))) if weighed else None,
                "distance of mode masses": mean_of(abs(np.stack(found) - masses).sum(axis=1) / 2),
            }
            key = f"power {power:g}, {name}" + ("" if weighed else ", without weights")
            key += "" if steps == 1000 else f", {steps} steps"
            cells[key] = cell
            print(f"{key:45s} {cell}", flush=True)
    rows = [
        [
            name,
            "" if cell["error of log Z"] is None else told(cell["error of log Z"], 2),
            told(cell["distance of mode masses"], 3),
        ]
        for name, cell in cells.items()
    ]
    columns = ["forty modes", "error of log Z", "distance of mode masses"]
    return {"cells": cells, "table": {"columns": columns, "rows": rows}}


def nowhere(level: Level) -> Any:
    """Weigh at no level."""
    return jnp.asarray(False)


def nearest_mode(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Index of the nearest mode, by pieces for memory."""
    pieces = np.array_split(points, max(1, len(points) // 100_000))
    return np.concatenate([nearest(piece, means) for piece in pieces])


def main() -> None:
    """Run, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, writes nothing")
    quick = parser.parse_args().quick
    found = annealed(3 if quick else 20)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "numpyro", "smcscale"),
        **found,
    }
    if not quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
