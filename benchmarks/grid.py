"""Is the evidence unbiased in every cell of {model} x {kernel} x {trigger} x {tilt} x {proposal}?

    python benchmarks/grid.py            (make test-grid)

Runs all cells, two processes side by side (`--rows FILE` keeps what is done, so that a run that was
stopped goes on with the same code), and writes `benchmarks/results/grid.json`: for each cell
the mean of `Z_hat / Z` over independent runs with its standard error and the z-scores of evidence,
filter and smoothing means. Fails if any z-score passes the two-sided 0.1% limit over all cells.
"""

import argparse
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from provenance import made_with

# cells are small and compiled once: less optimisation saves more time than it costs
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

KERNELS = ("multinomial", "stratified", "systematic", "residual", "ssp", "killing", "rejection")
MODES = ("bootstrap", "guided", "lookahead")
RESULTS = Path(__file__).resolve().parent / "results" / "grid.json"


def run_cell(cell: tuple[str, str, str, str, str]) -> dict:
    """One cell: relative evidence with its error, and the largest z-scores of the means."""
    import numpy as np

    from support.cells import replicates
    from support.exact import MODELS
    from support.room import make_room

    make_room()
    model, kernel, trigger, tilt, mode = cell
    exact = MODELS[model]
    found = replicates(exact, kernel, trigger, tilt, mode)

    def z(values: np.ndarray, expected: np.ndarray | float) -> np.ndarray:
        error = values.std(0, ddof=1) / len(values) ** 0.5
        return np.atleast_1d((values.mean(0) - expected) / error)

    return {
        "cell": list(cell),
        "ratio": float(found.ratio.mean()),
        "error": float(found.ratio.std(ddof=1) / len(found.ratio) ** 0.5),
        "z_evidence": float(z(found.ratio, 1.0)[0]),
        "z_filter": float(z(found.filtered, exact.filter_mean)[0]),
        "z_smoothing": [float(v) for v in z(found.smoothed, exact.smoothing_mean)],
    }


def new(model: str, kernel: str, trigger: str, tilt: str, mode: str) -> bool:
    """Whether a cell is another computation than the cells before it."""
    if trigger == "never":  # neither kernel nor tilt is ever used
        return (kernel, tilt) == (KERNELS[0], "none")
    return tilt != "optimal" or kernel == "systematic"


def main() -> None:
    """Run the grid and write its result file."""
    import scipy.stats

    from support.cells import NUM_PARTICLES, NUM_RUNS, TILTS, TRIGGERS
    from support.exact import MODELS

    cells = [
        cell for cell in itertools.product(MODELS, KERNELS, TRIGGERS, TILTS, MODES) if new(*cell)
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="a file of finished cells, one a line")
    kept = parser.parse_args().rows
    if kept:
        kept.touch()
    started = time.time()
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept else []
    done = {tuple(row["cell"]) for row in rows}
    left = [cell for cell in cells if cell not in done]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for row in pool.map(run_cell, left, chunksize=4):
            rows.append(row)
            if kept:
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if len(rows) % 100 == 0:
                print(
                    f"{len(rows)} of {len(cells)} cells, {time.time() - started:.0f} s", flush=True
                )
    scores = [abs(z) for r in rows for z in (r["z_evidence"], r["z_filter"], *r["z_smoothing"])]
    limit = float(scipy.stats.norm.isf(1e-3 / (2 * len(scores))))
    summary = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/grid.py",
        **made_with("jax", "numpyro"),
        "num_particles": NUM_PARTICLES,
        "num_runs": NUM_RUNS,
        "num_cells": len(cells),
        "num_scores": len(scores),
        "largest_z": max(scores),
        "limit_z": limit,
        "largest_relative_error": max(r["error"] for r in rows),
        "cells": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{len(cells)} cells, {len(scores)} scores: largest |z| {max(scores):.2f}, "
        f"limit {limit:.2f}, largest standard error of Z_hat / Z "
        f"{summary['largest_relative_error']:.4f}"
    )
    if max(scores) > limit:
        raise SystemExit("a cell is biased")


if __name__ == "__main__":
    main()
