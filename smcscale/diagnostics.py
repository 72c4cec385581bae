"""How far the answer may be off: errors of the evidence, from the runs or from one genealogy.

| function | what comes out |
|---|---|
| `log_evidence_error` | standard error of the pooled log evidence, and where it comes from |
| `ess_over_runs` | how many runs carry the pooled evidence |
| `genealogical_variance` | relative variance of each run's evidence, multinomial resampling only |
| `mean_error` | standard error of a posterior mean, between runs |

Standard errors of logs are by the delta method, so good while they are well under 1.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from smcscale.result import Result, require_evidence

#: below this share of the runs, their spread says little
_FEW_RUNS = 0.5


class EvidenceError(NamedTuple):
    """Standard error of the pooled log evidence.

    Attributes:
        value: nats; NaN when there is none.
        source: `"runs"` (spread between runs), `"genealogy"` (one run), or `"none"`.
        note: why there is none, or why to doubt it; empty when all is well.
    """

    value: float
    source: str
    note: str

    def __float__(self) -> float:
        return self.value


def log_evidence_error(result: Result) -> EvidenceError:
    """Standard error of `pooled_log_evidence`.

    Several runs: `sd(Z_r) / (sqrt(R) mean Z_r)`. One run under multinomial resampling: square root
    of `genealogical_variance`. Else none, with the reason.

    Raises:
        ValueError: where a kernel has no target distribution.
    """
    require_evidence(result)
    if result.num_runs > 1:
        return _between_runs(np.asarray(result.log_evidence, np.float64))
    if not np.isfinite(np.asarray(result.log_evidence)).all():
        return EvidenceError(math.nan, "none", "every particle is dead")
    if result.eve is None:
        return EvidenceError(
            math.nan, "none", "one run under this resampling says nothing of its error; num_runs=4"
        )
    try:
        variance = float(genealogical_variance(result)[0])
    except ValueError as refused:
        return EvidenceError(math.nan, "none", str(refused).splitlines()[0])
    if variance < 0:
        return EvidenceError(math.nan, "none", "negative single-run estimate; num_runs=4")
    note = ""
    if len(np.unique(np.asarray(result.eve))) == 1:
        note = "all particles descend from one: no information in this run; num_runs=4"
    return EvidenceError(math.sqrt(variance), "genealogy", note)


def ess_over_runs(result: Result) -> float:
    """`(sum Z_r)^2 / sum Z_r^2`, in `[1, R]`; 0 when every run is dead."""
    return _ess(np.asarray(result.log_evidence, np.float64))


def genealogical_variance(result: Result) -> np.ndarray:
    """Relative variance of each run's evidence, from its own genealogy.

    `V = 1 - (N / (N - 1))^(n + 1) (1 - sum_k S_k^2)` with `n` resamplings and `S_k` the weight of
    the particles that descend from initial particle k. `E[Z^2 V] = Var(Z)` under multinomial
    resampling at fixed times. May be negative; NaN for a dead run.

    Returns:
        variance: `(R,)`.
    Raises:
        ValueError: under any other resampling, where it is several times too small, and when the
            number of particles changes.
    Source: Chan & Lai (2013); Lee & Whiteley (2018), Theorem 1.
    """
    if result.eve is None:
        raise ValueError(
            "smcscale: the single-run variance holds under multinomial resampling only.\n"
            "  try: resampling=resampling.multinomial, or the spread over num_runs."
        )
    if len(np.unique(result.diagnostics.num_particles)) > 1 or result.num_particles < 2:
        raise ValueError(
            "smcscale: the single-run variance needs a constant number of particles, two or more.\n"
            "  try: the spread over num_runs."
        )
    eve = np.asarray(result.eve)
    resamplings = np.asarray(result.num_resamplings)
    size = result.num_particles
    log_weights = np.asarray(result.log_weights, np.float64)
    variance = np.full(result.num_runs, np.nan)
    for r in range(result.num_runs):
        largest = log_weights[r].max()
        if not np.isfinite(largest):
            continue
        weights = np.exp(log_weights[r] - largest)
        shares = np.bincount(eve[r], weights / weights.sum(), minlength=size)
        growth = math.exp((resamplings[r] + 1) * math.log1p(1 / (size - 1)))
        variance[r] = 1 - growth * (1 - np.sum(shares**2))
    return variance


def mean_error(result: Result, per_run: ArrayLike) -> np.ndarray:
    """Standard error of a posterior mean pooled over runs.

    Args:
        result: R runs.
        per_run: `(R, ...)`, each run's own weighted mean.
    Returns:
        error: `(...)`, of `sum_r Z_r f_r / sum_r Z_r`; NaN for a single run.
    """
    values = np.asarray(per_run, np.float64)
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    log_evidence = np.asarray(result.log_evidence, np.float64)
    if not np.isfinite(log_evidence).any():
        return np.full(values.shape[1:], np.nan)
    share = np.exp(log_evidence - np.logaddexp.reduce(log_evidence))
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    values = np.where(share > 0, values, 0)
    around = share * (values - np.sum(share * values, 0))
    return np.asarray(np.sqrt(np.sum(around**2, 0) * len(values) / (len(values) - 1)))


def _between_runs(log_evidence: np.ndarray) -> EvidenceError:
    largest = log_evidence.max()
    if not np.isfinite(largest):
        return EvidenceError(math.nan, "none", "every particle of every run is dead")
    evidence = np.exp(log_evidence - largest)
    error = evidence.std(ddof=1) / (math.sqrt(len(evidence)) * evidence.mean())
    carrying = _ess(log_evidence)
    note = ""
    if carrying < _FEW_RUNS * len(evidence):
        note = (
            f"{carrying:.1f} of {len(evidence)} runs carry the evidence, so this error is "
            "unreliable; more particles"
        )
    return EvidenceError(float(error), "runs", note)


def _ess(log_weights: np.ndarray) -> float:
    largest = log_weights.max()
    if not np.isfinite(largest):
        return 0.0
    weights = np.exp(log_weights - largest)
    return float(weights.sum() ** 2 / np.sum(weights**2))
