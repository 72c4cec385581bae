"""`print_summary`: one table of what a run found, what it cost and what to doubt."""

import math
import sys
from typing import Any

import numpy as np

from smcscale.diagnostics import EvidenceError, ess_over_runs, log_evidence_error
from smcscale.readout import weighted_quantiles
from smcscale.result import (
    Result,
    filter,
    is_real,
    pooled_log_evidence,
    pooled_log_weights,
    sites,
)

_COLUMNS = ("mean", "std", "median", "5.0%", "95.0%")
_QUANTILES = (0.5, 0.05, 0.95)


def print_summary(
    result: Result, *, times: int | Any = 4, max_rows: int | None = 20, file: Any = None
) -> None:
    """Print the summary of a run.

    Sites before the loop, those of the last step and those after the loop are summarised by the
    weighted final particles. Earlier steps of the loop show the filter law, each step given the
    data up to it: mean and standard deviation always, quantiles if store="paths".

    Args:
        result: of a run.
        times: how many steps to show, evenly spaced and ending with the last; or the steps.
        max_rows: of the table for one site at one step; None for all its elements.
        file: where to print; standard output by default.
    """
    print(summary_text(result, times=times, max_rows=max_rows), file=file or sys.stdout)


def summary_text(result: Result, *, times: int | Any = 4, max_rows: int | None = 20) -> str:
    """The text that `print_summary` prints."""
    rows = _rows(result, times, max_rows)
    width = max([len(label) for label, _ in rows] + [10])
    lines = ["", " " * width + "".join(f"{c:>11}" for c in _COLUMNS)]
    for label, values in rows:
        lines.append(f"{label:>{width}}" + "".join(f"{_number(v):>11}" for v in values))
    lines.append("")
    facts = _facts(result)
    wide = max(len(name) for name, _ in facts)
    lines += [f"{name:<{wide}}  {text}" for name, text in facts]
    return "\n".join(lines)


def _rows(result: Result, times: int | Any, max_rows: int | None) -> list[tuple[str, list[Any]]]:
    """Label and cells of each row of the table."""
    weights = np.exp(_finite(pooled_log_weights(result)).reshape(-1))
    weights = weights / weights.sum() if weights.sum() > 0 else np.full_like(weights, np.nan)
    rows = []
    for name, leaf in sites(result.before).items():
        rows += _site(name, leaf, weights, max_rows)
    steps = _steps(result, times)
    earlier = [t for t in steps if t != result.num_steps - 1]
    moments = filter(result)
    means, stds = sites(moments.mean), sites(moments.std)
    kept = result.history is not None and result.history.kind == "paths" and earlier
    quantiles = sites(moments.quantiles(_QUANTILES, earlier)) if kept else {}
    for name, leaf in sites(result.final).items():
        for i, t in enumerate(earlier):
            if name not in means:
                continue
            mean, std = (np.asarray(x[name][t]).reshape(-1) for x in (means, stds))
            marks: list = [[None] * 3] * len(mean)
            if quantiles.get(name) is not None:
                marks = list(np.asarray(quantiles[name][:, i]).reshape(3, -1).T)
            cells = [[m, s, *q] for m, s, q in zip(mean, std, marks, strict=True)]
            rows += _elements(f"{name}[t={t}]", np.shape(means[name])[1:], cells, max_rows)
        rows += _site(f"{name}[t={result.num_steps - 1}]", leaf, weights, max_rows)
    for name, leaf in sites(result.after).items():
        rows += _site(name, leaf, weights, max_rows)
    return rows


def _site(label: str, leaf: Any, weights: np.ndarray, max_rows: int | None) -> list:
    """Rows of one array `(R, N, ...)` under weights `(R*N,)`; none if it holds no numbers."""
    if not is_real(leaf):
        return []
    shape = np.shape(leaf)[2:]
    values = np.asarray(leaf).reshape(len(weights), math.prod(shape))
    if max_rows is not None:
        values = values[:, :max_rows]
    values = np.where(weights[:, None] > 0, values.astype(np.float64), 0)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ (values - mean) ** 2, 0))
    marks = weighted_quantiles(values, weights, _QUANTILES)
    cells = [[m, s, *q] for m, s, q in zip(mean, std, marks.T, strict=True)]
    return _elements(label, shape, cells, max_rows)


def _elements(label: str, shape: tuple, cells: list, max_rows: int | None) -> list:
    """One row for a scalar, one for each element otherwise, then how many are not shown."""
    if not shape:
        return [(label, cells[0])]
    size = math.prod(shape)
    shown = min(size, len(cells), max_rows if max_rows is not None else size)
    rows = []
    for i in range(shown):
        index = ",".join(str(int(j)) for j in np.unravel_index(i, shape))
        rows.append((f"{label}[{index}]", cells[i]))
    if shown < size:
        rows.append((f"{label} +{size - shown}", []))
    return rows


def _facts(result: Result) -> list[tuple[str, str]]:
    """Name and text of each line under the table."""
    diagnostics = result.diagnostics
    size = f"{result.num_particles:,} x {_plural(result.num_runs, 'run')}"
    facts = [
        ("particles", f"{size}, {_plural(result.num_steps, 'step')}, store={result.store}"),
        ("log evidence", _evidence(result)),
    ]
    ess = np.asarray(diagnostics.ess, np.float64)
    if ess.size:
        run, step = np.unravel_index(np.argmin(ess), ess.shape)
        where = f" (run {run + 1})" if result.num_runs > 1 else ""
        facts.append(("ESS", f"lowest {ess.min():,.1f} at step {step}{where}, final {_final(ess)}"))
        unique = np.asarray(diagnostics.unique_ancestors)
        step = int(np.unravel_index(np.argmin(unique), unique.shape)[1])
        facts.append(
            ("ancestors", f"fewest {unique.min():,} at step {step}, final {_final(unique)}")
        )
    counts = [int(n) for n in np.asarray(result.num_resamplings)]
    facts.append(("resamplings", _spread(counts)))
    facts.append(("cost", ", ".join(f"{k} {_amount(k, v)}" for k, v in result.cost.items())))
    dead = np.asarray(diagnostics.dead_time)
    gone = int((~np.isfinite(np.asarray(result.log_weights)).any(1)).sum())
    if gone:
        facts.append(("dead", f"{_plural(gone, 'run')}, first at step {dead[dead > -2].min()}"))
    for note in result.biases:
        kind, _, kernel = note.partition(": ")
        text = (
            f"{kernel} leaves no target distribution: no evidence, draws are what a search found"
            if kind == "no target"
            else f"{kernel}: evidence and means are biased, less as particles or iterations grow"
        )
        facts.append(("biased", text))
    facts += [("warning", line) for line in result.warnings]
    return facts


def _evidence(result: Result) -> str:
    if any(note.startswith("no target") for note in result.biases):
        return "none (see below)"
    text = f"{pooled_log_evidence(result):.4f}"
    error: EvidenceError = log_evidence_error(result)
    if error.source == "runs":
        text += f", s.e. {error.value:.4f} between {result.num_runs} runs"
        text += f" (ESS over runs {ess_over_runs(result):.1f})"
    elif error.source == "genealogy":
        text += f", s.e. {error.value:.4f} from the genealogy of one run"
    else:
        text += f", s.e. unknown: {error.note}"
    return text if error.source == "none" or not error.note else f"{text}; {error.note}"


def _steps(result: Result, times: int | Any) -> list[int]:
    """The steps to show, in order."""
    last = result.num_steps - 1
    if isinstance(times, int):
        return sorted({round(t) for t in np.linspace(last, 0, min(max(times, 1), last + 1))})
    steps = [int(t) for t in times]
    outside = [t for t in steps if not 0 <= t <= last]
    if outside:
        raise ValueError(f"smcscale: `times` must lie in 0..{last}, got {outside}.")
    return steps


def _finite(log_weights: np.ndarray) -> np.ndarray:
    largest = log_weights.max()
    return log_weights - (largest if np.isfinite(largest) else 0)


def _final(values: np.ndarray) -> str:
    low, high = values[:, -1].min(), values[:, -1].max()
    return f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"


def _spread(counts: list[int]) -> str:
    return f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} in a run"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _amount(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "seconds" else f"{value:,.0f}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    value = float(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"
    return f"{value:.2e}"
