"""What `python -m smcscale filter` and `solve` do.

| function | does |
|---|---|
| `filter_file` | a column of a CSV file through a state-space program: table and picture |
| `solve_question` | a question through a language model: answer, texts, cost |
| `read_column` | the numbers and dates of a CSV file |
| `volatility_mean` | a level for the log-variance that fits a series |

Wrong input is a `ValueError` or `OSError` whose text says what to do.
"""

import csv
import datetime
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
from numpyro.contrib.control_flow import scan

from smcscale import plot
from smcscale.engine.filter import ParticleFilter
from smcscale.kernels import resampling, triggers
from smcscale.models.reasoning import answers, tasks
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.solve import MAX_STEPS, Solution, solve
from smcscale.models.statespace import zoo
from smcscale.run import SMC

_FEW_ROWS = 10


class Column(NamedTuple):
    """A column of a file.

    Attributes:
        name: from the header.
        values: `(T,)` float32; NaN where a cell is empty.
        dates: `(T,)` datetime64, or None if the file has no dates.
    """

    name: str
    values: np.ndarray
    dates: np.ndarray | None


class Setting(NamedTuple):
    """A program with parameters that fit a series, and what to draw of it.

    Attributes:
        program: `(y, *parameters)`.
        parameters: numbers after `y`.
        told: the parameters in words.
        transform: of the site "x" for the picture.
        label: of its axis.
        dots: observations in the same unit, or None.
    """

    program: Callable[..., None]
    parameters: tuple[float, ...]
    told: str
    transform: Callable[[Any], Any] | None
    label: str
    dots: np.ndarray | None


def filter_file(
    file: str,
    *,
    column: str | None = None,
    model: str = "stochastic_volatility",
    num_particles: int = 1000,
    num_runs: int = 4,
    seed: int = 0,
    picture: str | None = None,
) -> Path:
    """Filter a column of a CSV file, print the summary, draw the filtered state.

    Args:
        file: CSV with a header line; a column of ISO dates becomes the time axis.
        column: its name; None for the only numeric one.
        model: one of `stochastic_volatility`, `stochastic_volatility_with_leverage` (returns),
            `local_level` (a level seen through noise).
        num_particles: of each run.
        num_runs: independent runs.
        seed: of the random key.
        picture: where it goes.
    Returns:
        path: of the picture.
    """
    if model not in _SETTINGS:
        raise ValueError(f'there is no model "{model}"; try one of {", ".join(_SETTINGS)}.')
    series = read_column(Path(file), column)
    plain = re.sub(r"\W+", "_", series.name)
    path = Path(picture or f"{Path(file).stem}_{plain}.png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of the picture, {path.absolute().parent}, does not exist.")
    setting = _SETTINGS[model](series.values)
    print(f'{len(series.values)} rows of "{series.name}" under {model}: {setting.told}')
    smc = SMC(
        ParticleFilter(setting.program, nan_is_missing=True, store="paths"),
        num_particles=num_particles,
        num_runs=num_runs,
    )
    smc.run(jax.random.key(seed), series.values, *setting.parameters)
    smc.print_summary()
    ax = plot.filter_bands(smc, "x", setting.dots, dates=series.dates, transform=setting.transform)
    ax.set_ylabel(setting.label)
    ax.set_title(f"{series.name}: {model.replace('_', ' ')}", fontsize="medium")
    ax.figure.savefig(path, dpi=150)
    print(f"picture: {path}")
    return path


def read_column(file: Path, column: str | None = None) -> Column:
    """Numbers and dates of one column of a CSV file.

    Raises:
        ValueError: no such column, none or several that are numeric, words among the numbers,
            fewer than 10 rows, not a text file.
        OSError: the file cannot be read.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = [row for row in csv.reader(opened) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file ({error}).") from error
    if len(rows) < 2:
        raise ValueError(f"{file} has no rows under a header line.")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    cells = {
        name: [row[i].strip() if i < len(row) else "" for row in body]
        for i, name in enumerate(header)
    }
    numeric = [name for name in cells if _all_numbers(cells[name])]
    dates = next(
        (d for d in (_dates(cells[n]) for n in cells if n != column) if d is not None), None
    )
    if column is None:
        if len(numeric) != 1:
            found = f"has {len(numeric)} numeric columns" if numeric else "has no numeric column"
            which = f" ({', '.join(numeric)}); choose one with --column" if numeric else ""
            raise ValueError(f"{file} {found}{which}.")
        column = numeric[0]
    if column not in cells:
        raise ValueError(f'{file} has no column "{column}"; it has {", ".join(header)}.')
    values = np.empty(len(body), np.float32)
    for i, cell in enumerate(cells[column]):
        number = _number(cell)
        if number is None or math.isinf(number):
            raise ValueError(f'{file}, column "{column}", row {i + 1}: {cell!r} is no number.')
        values[i] = number
    if np.isfinite(values).sum() < _FEW_ROWS:
        raise ValueError(f'{file}, column "{column}" has fewer than {_FEW_ROWS} numbers.')
    return Column(column, values, dates)


def volatility_mean(returns: np.ndarray, phi: float, sigma: float) -> float:
    """Mean of the log-variance that gives returns their observed variance.

    `E[y²] = exp(mu + sigma² / (2 (1 - phi²)))` under stochastic volatility.
    """
    variance = float(np.nanmean(np.square(returns, dtype=np.float64)))
    return math.log(variance) - sigma**2 / (2 * (1 - phi**2))


def solve_question(
    question: str,
    *,
    model: str | None = None,
    reward: str | None = None,
    num_particles: int = 16,
    seed: int = 0,
) -> Solution:
    """Solve a question with the shipped models, or with those of a folder, and print the answer.

    Args:
        question: text.
        model: a language model in the Hugging Face layout. Without `reward` its texts vote.
        reward: a process reward model with the same tokens.
        num_particles: how many texts are written.
        seed: of the random key.
    Raises:
        ValueError: a question that the shipped model cannot know, an answer that nobody wrote.
    """
    key = jax.random.key(seed)
    if model is None:
        if reward is not None:
            raise ValueError("--reward belongs to a model of your own; add --model FOLDER.")
        _check_family(question)
        solution = solve(question, num_particles=num_particles, key=key)
    else:
        lm = LanguageModel.from_pretrained(model)
        if reward is None:
            solution = _vote(question, lm, num_particles, key)
        else:
            prm = ProcessRewardModel.from_pretrained(reward)
            solution = solve(question, lm=lm, prm=prm, num_particles=num_particles, key=key)
    best = int(np.argmax(np.where([a == solution.answer for a in solution.answers], 1, 0)))
    if solution.answer is None:
        print(f"no text of {num_particles} came to an answer; the first one reads:")
    else:
        weights = np.exp(solution.log_weights - solution.log_weights.max())
        agree = np.array([a == solution.answer for a in solution.answers])
        share = weights[agree].sum() / weights.sum()
        print(f"answer: {solution.answer}  ({share:.0%} of the weight of {num_particles} texts)")
    print("\n".join("  " + line for line in solution.texts[best].strip().split("\n")))
    spent = ", ".join(f"{k} {v:,.0f}" for k, v in solution.cost.items() if k != "seconds")
    print(f"cost: {spent}, seconds {solution.cost['seconds']:.1f}")
    return solution


def _check_family(question: str) -> None:
    """Refuse a question with words that the shipped model has never read."""
    known = set(tasks.words())
    strange = [word for word in re.findall(r"[A-Za-z]+", question) if word not in known]
    if strange or not re.search(r"\d", question) or "?" not in question:
        why = f'"{strange[0]}" is new to it' if strange else "a number and a question are needed"
        raise ValueError(
            "the shipped model is tiny and knows only its own family of word problems, such as "
            f'"Ana has 35 books. Ana buys 4 more books. How many books does Ana have now?" ({why}); '
            "try --model FOLDER for a language model of yours."
        )


def _vote(question: str, lm: LanguageModel, num_particles: int, key: Any) -> Solution:
    """Independent texts of a model without a judge, one vote each."""

    def write(lm: LanguageModel, prompt: Any) -> None:
        lm = lm.given(prompt)

        def step(text, _):
            return numpyro.sample("step", lm.next_step(text)), None

        scan(step, lm.start(), None, length=MAX_STEPS)

    method = ParticleFilter(
        write, resampling=resampling.systematic, trigger=triggers.never, store="last"
    )
    smc = SMC(method, num_particles=num_particles, progress_bar=False)
    smc.run(key, lm, lm.read(question.strip() + "\n"))
    samples, log_weights = smc.get_samples(weighted=True)
    written = samples["step"].written
    rows = zip(np.asarray(written.tokens), np.asarray(written.length), strict=True)
    texts = tuple(lm.decode(tokens[:count]) for tokens, count in rows)
    found = tuple(tasks.final_answer(text) for text in texts)
    chosen = answers.majority(found)
    nothing = np.full(num_particles, np.nan)
    return Solution(chosen, found, np.asarray(log_weights), None, texts, nothing, dict(smc.cost))


def _volatility(program: Callable[..., None]) -> Callable[[np.ndarray], Setting]:
    def setting(returns: np.ndarray) -> Setting:
        phi, sigma = 0.98, 0.2
        if not np.nanvar(returns) > 0:
            raise ValueError("the column is constant; stochastic volatility needs returns.")
        mu = volatility_mean(returns, phi, sigma)
        told = f"phi {phi}, sigma {sigma}, mu {mu:.2f} from the variance of the column"
        label = "standard deviation of a row"
        dots = np.abs(returns)
        return Setting(program, (mu, phi, sigma), told, lambda x: np.exp(x / 2), label, dots)

    return setting


def _local_level(values: np.ndarray) -> Setting:
    """Scales from the first two autocovariances of the differences (Harvey 1989, chapter 2)."""
    steps = np.diff(values.astype(np.float64))
    steps = steps[np.isfinite(steps)]
    total = float(np.var(steps)) if len(steps) > 1 else 0.0
    if not total > 0:
        raise ValueError("the column moves by equal steps; local_level needs noise.")
    noise = max(-float(np.mean((steps[1:] - steps.mean()) * (steps[:-1] - steps.mean()))), 0.0)
    noise = min(max(noise, 0.01 * total), 0.49 * total)
    level = math.sqrt(max(total - 2 * noise, 0.02 * total))
    first, width = float(values[np.isfinite(values)][0]), math.sqrt(total) * 2
    told = f"level_scale {level:.3g}, noise_scale {math.sqrt(noise):.3g} from the column's steps"
    parameters = (level, math.sqrt(noise), first, width)
    return Setting(zoo.local_level, parameters, told, None, "level", values)


_SETTINGS: dict[str, Callable[[np.ndarray], Setting]] = {
    "stochastic_volatility": _volatility(zoo.stochastic_volatility),
    "stochastic_volatility_with_leverage": _volatility(zoo.stochastic_volatility_with_leverage),
    "local_level": _local_level,
}


def _number(cell: str) -> float | None:
    """A cell as a number, NaN if it is empty, None if it is something else."""
    if cell.lower() in ("", "nan", "na", "null"):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _all_numbers(cells: list[str]) -> bool:
    numbers = [_number(cell) for cell in cells]
    return None not in numbers and any(n is not None and math.isfinite(n) for n in numbers)


def _dates(cells: list[str]) -> np.ndarray | None:
    """The cells as dates, or None if one of them is not an ISO date."""
    if not all("-" in cell for cell in cells):  # 20180131 is a date to Python, and a number to us
        return None
    try:
        parsed = [datetime.datetime.fromisoformat(cell).replace(tzinfo=None) for cell in cells]
    except ValueError:
        return None
    return np.array(parsed, "datetime64[s]")
