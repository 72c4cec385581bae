"""What a file of results says: accuracy against budget, methods compared in pairs, a picture.

    results = read_results("results.jsonl")
    print_report(results.rows)
    draw(results.rows)

| name | what it is |
|---|---|
| `read_results`, `Results` | the rows of a file that `bench.py` writes, torn end or not |
| `accuracies`, `Point` | accuracy of each method at each budget, with interval and cost |
| `compare`, `Comparison` | two methods on the same problems: difference, interval, exact test |
| `interval`, `sign_flip`, `holm` | the statistics behind them |
| `print_report`, `draw` | tables and a picture |

Problems are the units: an interval says what other problems of the same kind would give, and the
seeds of one problem are averaged, never counted as problems of their own.

Source: Efron & Tibshirani 1993, chapter 13 (percentile intervals); McNemar 1947 and, for several
seeds, Fisher's test of sign flips, of which the exact McNemar test is the case of one seed; Holm 1979.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from smcscale.models.reasoning.budget import Spent

#: the key under which the first line of a file holds how the runs were made
HEADER = "configuration"
Row = dict[str, Any]


class Results(NamedTuple):
    """A file of results.

    Attributes:
        configuration: how the runs were made; None if the file has no whole line.
        rows: one for each finished cell, in the order of the file.
        size: bytes of the lines that are whole.
    """

    configuration: dict[str, Any] | None
    rows: list[Row]
    size: int


class Point(NamedTuple):
    """A method at a budget.

    Attributes:
        num_problems: that it was tried on.
        accuracy, low, high: mean over problems, and its 95% interval.
        cost: means over runs, by the names of `budget.Spent`, and "seconds".
    """

    method: str
    budget: int
    num_problems: int
    accuracy: float
    low: float
    high: float
    cost: dict[str, float]


class Comparison(NamedTuple):
    """Two methods at one budget, on the runs that both have done.

    Attributes:
        difference, low, high: accuracy of the first less that of the second, its 95% interval.
        wins, losses: problems on which the first was right more often, less often.
        p_value: exact, that neither is better.
    """

    first: str
    second: str
    budget: int
    num_problems: int
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p_value: float


def read_results(path: str | Path) -> Results:
    """Read what is whole of a file of results.

    The end of a file may be torn, where a run was killed while it wrote: what follows the last
    newline, or a last line that is no JSON, is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line before the last that is no row, or a first line of another kind.
    """
    data = Path(path).read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    found: list[Row] = []
    size = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or (HEADER if number == 1 else "problem") not in row:
            if number == len(lines) > 1:
                break
            raise ValueError(
                f"smcscale: line {number} of {path} is not one that this command writes.\n"
                "  try: another --out, or delete the line if the file is a damaged one of ours."
            )
        found.append(row)
        size += len(line)
    torn = data[len(b"".join(lines)) :]
    start = json.dumps({HEADER: {}})[:-2].encode()
    if not found and not torn.startswith(start[: len(torn)]):
        raise ValueError(
            f"smcscale: {path} is not a file of results, and is left as it is.\n"
            "  try: another --out."
        )
    return Results(found[0][HEADER] if found else None, found[1:], size)


def interval(
    values: Any, level: float = 0.95, *, lowest: float = 0.0, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a mean over problems, by percentiles.

    Where all problems agree a bootstrap sees no spread.  The ends are then moved towards the lowest
    and the highest value by `1 - a^(1/P)`, `a = (1 - level) / 2`: for accuracy 0 or 1 the exact
    binomial interval.

    Args:
        values: `(P,)`, one for each problem, in `[lowest, 1]`.
        level: of the interval.
        lowest: -1 for differences of accuracies.
        draws, seed: of the bootstrap.
    Returns:
        `(low, high)`.
    """
    values = np.asarray(values, float)
    count, tail = len(values), (1 - level) / 2
    if np.ptp(values) == 0:
        value, rare = float(values[0]), 1 - tail ** (1 / count)
        return value - rare * (value - lowest), value + rare * (1 - value)
    share = np.full(count, 1 / count)
    weights = np.random.default_rng(seed).multinomial(count, share, size=draws)
    low, high = np.quantile(weights @ values / count, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip(differences: Any) -> float:
    """Exact two-sided p-value of `sum(differences)` when each sign is as likely as the other.

    With one seed, differences in {-1, 0, 1}, this is McNemar's exact test.

    Args:
        differences: `(P,)` integers, runs of a problem won less runs lost.
    """
    sizes = np.abs(np.asarray(differences, np.int64))
    total = int(sizes.sum())
    law = np.zeros(2 * total + 1)  # of the sum, from -total to total
    law[total] = 1.0
    for size in sizes[sizes > 0]:
        law = (np.roll(law, size) + np.roll(law, -size)) / 2  # its ends are still empty
    seen = abs(int(np.sum(differences)))
    far = np.abs(np.arange(-total, total + 1)) >= seen
    return min(1.0, float(law[far].sum()))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values after Holm's correction: the chance of any false finding stays below the level."""
    given = np.asarray(p_values, float)
    order = np.argsort(given)
    scaled = np.minimum(given[order] * np.arange(len(given), 0, -1), 1.0)
    adjusted = np.empty_like(given)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def accuracies(rows: Iterable[Row]) -> list[Point]:
    """Accuracy and cost of each method at each budget, in order of appearance."""
    found = []
    for (method, budget), cells in _groups(rows, "method", "budget").items():
        values = [_mean(runs, "correct") for runs in _groups(cells, "problem").values()]
        cost = {name: _mean(cells, name) for name in _COSTS}
        low, high = interval(values)
        accuracy = float(np.mean(values))
        found.append(Point(method, budget, len(values), accuracy, low, high, cost))
    return found


def compare(rows: Iterable[Row], first: str, second: str, budget: int) -> Comparison | None:
    """Two methods at one budget on the problems and seeds that both have; None if there are none."""
    cells: dict[str, dict[tuple, bool]] = {first: {}, second: {}}
    for row in rows:
        if row["budget"] == budget and row["method"] in cells:
            cells[row["method"]][row["problem"], row["seed"]] = row["correct"]
    pairs: dict[str, list[int]] = {}
    for (problem, seed), right in cells[first].items():
        if (problem, seed) in cells[second]:
            other = cells[second][problem, seed]
            pairs.setdefault(problem, []).append(int(right) - int(other))
    if not pairs:
        return None
    won = np.array([sum(each) for each in pairs.values()])
    means = np.array([np.mean(each) for each in pairs.values()])
    low, high = interval(means, lowest=-1.0)
    counts = (
        len(pairs),
        float(means.mean()),
        low,
        high,
        int((won > 0).sum()),
        int((won < 0).sum()),
    )
    return Comparison(first, second, budget, *counts, sign_flip(won))


def print_report(rows: Sequence[Row], console: Console | None = None) -> None:
    """Tables: accuracy against budget, by level where there are levels, and methods compared.

    Methods are compared with the first one of the file.
    """
    console = console or Console()
    console = console if console.width >= _WIDTH else Console(file=console.file, width=_WIDTH)
    points = accuracies(rows)
    if not points:
        console.print("no runs are finished yet")
        return
    sizes = sorted({point.num_problems for point in points})
    told = " to ".join(f"{size:,}" for size in sizes[:1] + sizes[1:][-1:])
    names = ("method", "N", "accuracy, 95%", "tokens", "judged", "FLOPs")
    table = _table(f"accuracy against budget, {told} problems; a problem takes", names)
    for point in points:
        cost = point.cost
        table.add_row(
            point.method, f"{point.budget}",
            f"{point.accuracy:.3f} [{point.low:.3f}, {point.high:.3f}]",
            f"{cost['tokens']:,.0f}", f"{cost['prm_passes']:,.0f}",
            f"{cost['flops'] + cost['prm_flops']:.1e}",
            style="bold" if point.accuracy == max(p.accuracy for p in points) else None,
        )  # fmt: skip
    console.print(table)
    _print_levels(rows, points, console)
    budgets = sorted({point.budget for point in points})
    reference = points[0].method
    others = [method for method in dict.fromkeys(p.method for p in points) if method != reference]
    found = [compare(rows, method, reference, budget) for budget in budgets for method in others]
    compared = [one for one in found if one is not None]
    if not compared:
        return
    names = ("method", "N", "difference, 95%", "won : lost", "p", "p, Holm")
    table = _table(f"accuracy less that of {reference}, paired by problem", names)
    for one, adjusted in zip(compared, holm([one.p_value for one in compared]), strict=True):
        table.add_row(
            one.first, f"{one.budget}",
            f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
            f"{one.wins} : {one.losses}", f"{one.p_value:.3g}", f"{adjusted:.3g}",
        )  # fmt: skip
    console.print(table)


def draw(rows: Iterable[Row], ax: Any = None) -> Any:
    """Accuracy against generated tokens a problem, with 95% intervals, a line for each method.

    Methods are drawn 2% apart, so that their intervals do not hide each other.

    Args:
        rows: of a file of results.
        ax: matplotlib axes.
    Returns:
        ax: with labels and a legend.
    """
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "smcscale: pictures need matplotlib.\n  try: pip install 'smcscale[demo]'."
            ) from error
        ax = plt.subplots(figsize=(7, 4.5), layout="constrained")[1]
    points = accuracies(rows)
    for number, method in enumerate(dict.fromkeys(point.method for point in points)):
        mine = sorted((p for p in points if p.method == method), key=lambda p: p.budget)
        tokens = [point.cost["tokens"] * 1.02**number for point in mine]
        middle = [point.accuracy for point in mine]
        ends = [[p.accuracy - p.low for p in mine], [p.high - p.accuracy for p in mine]]
        label = method.replace("_", " ")
        ax.errorbar(tokens, middle, yerr=ends, marker="o", capsize=3, label=label)
        for point, x, y in zip(mine, tokens, middle, strict=True):
            ax.annotate(f"{point.budget}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
    ax.set_xscale("log")
    ax.set_xlabel("generated tokens a problem (numbers: texts)")
    ax.set_ylabel("share of problems solved")
    if points:
        ax.legend(loc="best", fontsize="small")
    return ax


#: a narrower screen wraps lines, so that no number is cut off
_WIDTH = 90
_COSTS = (*Spent._fields, "seconds")


def _print_levels(rows: Sequence[Row], points: list[Point], console: Console) -> None:
    """Accuracy by level at the largest budget of each method."""
    levels = sorted({row["level"] for row in rows if row["level"] is not None}, key=_natural)
    if len(levels) < 2:
        return
    largest = {point.method: max(p.budget for p in points if p.method == point.method)
               for point in points}  # fmt: skip
    table = _table("accuracy by level", ("method", "N", *levels))
    for method, budget in largest.items():
        mine = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        by_level = {level: [row for row in mine if row["level"] == level] for level in levels}
        shares = [f"{_mean(part, 'correct'):.3f}" if part else "" for part in by_level.values()]
        table.add_row(method, f"{budget}", *shares)
    console.print(table)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, box=None, title_justify="left", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    return table


def _groups(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by the values of some fields (a tuple of several), in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _natural(level: str) -> tuple[float, str]:
    """Sorts levels by the number in them."""
    digits = "".join(c for c in level if c.isdigit())
    return (float(digits) if digits else np.inf, level)
