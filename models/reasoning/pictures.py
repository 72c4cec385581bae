"""Pictures of a run of a reasoning program over its rows, with matplotlib.

| function | what it shows |
|---|---|
| `annealing` | effective sample size, and the inverse temperature of every resampling |

Draws on `ax` (a new one if None) and returns it.  Accuracy against budget is drawn by `report.draw`,
the texts of the particles by `tree.py`, everything else by `smcscale.plot`.
"""

from typing import Any

import numpy as np

from smcscale import plot
from smcscale.result import Result


def annealing(smc: Any, run: int = 0, *, ax: Any = None) -> Any:
    """Effective sample size of a run, and how much its resamplings were annealed.

    A mark of the inverse temperature stands at the row whose weights were resampled: at 1 they
    counted in full, near 0 hardly.

    Args:
        smc: a run, or its `Result`, such as one of `methods.entropic_filter`.
        run: 0-based.
        ax: matplotlib axes.
    Returns:
        ax: both quantities lie in [0, 1] and share it.
    """
    result = smc if isinstance(smc, Result) else smc.result
    ax = plot.ess(result, run, ax=ax)
    resampled = np.flatnonzero(np.asarray(result.diagnostics.resampled)[run, 1:])
    beta = np.asarray(result.diagnostics.beta)[run, resampled + 1]
    ax.plot(resampled, beta, "s--", color="C1", ms=5, lw=1, label="inverse temperature")
    ax.set_ylim(0, 1.06)
    ax.set_ylabel("ESS / N, inverse temperature")
    ax.legend(loc="best", fontsize="small")
    return ax
