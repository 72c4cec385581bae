"""The demo: one engine on a series of returns, on word problems and on pictures of digits.

    python -m smcscale demo

prints what it does as it goes and writes three pictures: `volatility.png`, `accuracy.png`,
`steering.png`.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from smcscale import plot
from smcscale.engine.filter import ParticleFilter
from smcscale.kernels import resampling
from smcscale.models.commands import volatility_mean
from smcscale.models.diffusion.demo import steering
from smcscale.models.reasoning.cache import bucketed
from smcscale.models.reasoning.grow import from_texts
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.program import reason
from smcscale.models.reasoning.solve import (
    Solution,
    shipped_language_model,
    shipped_reward_model,
    solve,
)
from smcscale.models.reasoning.tasks import Problem, problems
from smcscale.models.reasoning.tree import to_text
from smcscale.models.statespace.data import sp500_returns
from smcscale.models.statespace.zoo import stochastic_volatility
from smcscale.run import SMC

#: the same kernel object resamples volatilities, texts and digits
_KERNEL = resampling.systematic
_PARTICLES = (1, 4, 16)
_PROBLEMS = 40
_SEED = 2024  # of the demo's problems


class Accuracy(NamedTuple):
    """One row of the accuracy table.

    Attributes:
        num_particles: N.
        right, total: problems solved, problems tried.
        low, high: 95% interval of the share solved.
        tokens: written by the language model, per problem.
        seconds: per problem, without compilation.
    """

    num_particles: int
    right: int
    total: int
    low: float
    high: float
    tokens: float
    seconds: float


def demo(folder: str | Path = "demo") -> None:
    """Run all parts and write the pictures into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    volatility(folder / "volatility.png")
    reasoning(folder / "accuracy.png")
    steering(folder / "steering.png", _KERNEL)
    print(f"\ndone in {time.perf_counter() - started:.0f} s. Pictures:")
    for name, shows in (
        (
            "volatility.png",
            "volatility of the S&P 500 with its 90% band; the crisis of 2008 and its ESS",
        ),
        ("accuracy.png", "share of word problems solved against tokens written, with intervals"),
        ("steering.png", "digits of the model, the best of four, and four steered to eights"),
    ):
        print(f"  {folder / name}: {shows}")


def volatility(picture: Path) -> SMC:
    """Filter the S&P 500 under stochastic volatility and draw the band."""
    import matplotlib.pyplot as plt

    whole = sp500_returns()
    recent = whole.times >= np.datetime64("2007-01-01")
    returns, dates = whole.values[recent], whole.times[recent]
    phi, sigma = 0.98, 0.2
    mu = volatility_mean(returns, phi, sigma)
    print(f"1. S&P 500, {len(returns)} daily returns, {dates[0]} to {dates[-1]} (from arch),")
    print(f"   under stochastic volatility with mu {mu:.2f}, phi {phi}, sigma {sigma}:")
    print("   4 runs of 2000 particles, systematic resampling below half the ESS")
    smc = SMC(
        ParticleFilter(stochastic_volatility, resampling=_KERNEL, store="paths"),
        num_particles=2000,
        num_runs=4,
    )
    smc.run(jax.random.key(0), returns, mu, phi, sigma)
    smc.print_summary(times=4)

    def band(ax: Any) -> None:
        # the state x is the log-variance: exp(x / 2) is the standard deviation of a day
        plot.filter_bands(
            smc, "x", np.abs(returns), dates=dates, transform=lambda x: np.exp(x / 2), ax=ax
        )
        ax.set_ylabel("percent a day")
        ax.set_ylim(0, 11.5)

    figure, named = plt.subplot_mosaic(
        [["all", "all"], ["crisis", "ess"]],
        figsize=(11, 7),
        height_ratios=(3, 2),
        layout="constrained",
    )
    axes: dict[str, Any] = dict(named)
    band(axes["all"])
    axes["all"].set_title("Volatility of the S&P 500, and absolute daily returns")
    band(axes["crisis"])
    axes["crisis"].set_title("The autumn of 2008", fontsize="medium")
    axes["crisis"].get_legend().remove()
    plot.ess(smc, 0, dates=dates, ax=axes["ess"])
    axes["ess"].set_title("Effective sample size of run 1, same days", fontsize="medium")
    for name in ("crisis", "ess"):
        axes[name].set_xlim(np.datetime64("2008-08-15"), np.datetime64("2009-01-15"))
        axes[name].tick_params(axis="x", labelrotation=20)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    print(f"   -> {picture}")
    return smc


def reasoning(picture: Path) -> list[Accuracy]:
    """Solve held-out word problems with more and more particles; print a tree and a table."""
    lm, prm = shipped_language_model(), shipped_reward_model()
    size = sum(x.size for x in jax.tree.leaves(lm.weights))
    held_out = _alike(problems(_SEED, 3 * _PROBLEMS, "test"), lm)[:_PROBLEMS]
    print(
        f"\n2. {len(held_out)} held-out word problems of 6 to 10 steps, of similar length. A language"
    )
    print(
        f"   model of {size / 1e6:.1f} M parameters writes, a reward model judges each step, and the"
    )
    print("   same systematic resampling keeps the texts that score well.")
    method = ParticleFilter(reason, resampling=_KERNEL, store="last")
    rows = []
    for num_particles in _PARTICLES:
        solutions, seconds = [], []
        for i, problem in enumerate(held_out):
            started = time.perf_counter()
            solution = solve(
                problem.question,
                lm=lm,
                prm=prm,
                num_particles=num_particles,
                method=method,
                key=jax.random.fold_in(jax.random.key(_SEED), i),
            )
            seconds.append(time.perf_counter() - started)
            solutions.append(solution)
        rows.append(_accuracy(num_particles, held_out, solutions, seconds))
        print(f"   {num_particles} particles: {rows[-1].right} of {len(held_out)} right")
        if num_particles == _PARTICLES[-1]:
            i = _interesting(held_out, solutions)
            print(f"\n   One problem and its {num_particles} particles")
            print(tree(held_out[i], solutions[i], prm))
    print()
    print(table(rows))
    print("   So few problems leave wide intervals; the README has 300 problems, and every method.")
    _draw(rows, picture)
    print(f"   -> {picture}")
    return rows


def tree(problem: Problem, solution: Solution, prm) -> str:
    """The texts of a solution as a tree, under the question and over the answer."""
    texts = [tuple(text.strip().split("\n")) for text in solution.texts]
    scores = {text: np.asarray(prm.score(problem.question + "\n", text)) for text in set(texts)}
    grown = from_texts(texts, [scores[text] for text in texts], solution.log_weights)

    def wrong(steps: tuple[str, ...]) -> str:
        place = len(steps) - 1
        right = place < len(problem.steps) and steps[-1] == problem.steps[place]
        return "" if right else "wrong"

    verdict = "right" if solution.answer == str(problem.answer) else "wrong"
    lines = [*_wrapped(problem.question, 92), "", *to_text(grown, 92, mark=wrong).split("\n"), ""]
    lines += [f"weighted majority: {solution.answer} ({verdict}; true answer {problem.answer})"]
    return "\n".join("   " + line for line in lines)


def table(rows: list[Accuracy]) -> str:
    """The accuracy table."""
    lines = ["   particles   solved   95% interval   tokens a problem   seconds a problem"]
    for row in rows:
        share = f"{row.right / row.total:.0%}"
        interval = f"{row.low:.0%} to {row.high:.0%}"
        lines.append(
            f"   {row.num_particles:>9}   {share:>6}   {interval:>12}   {row.tokens:>16.0f}"
            f"   {row.seconds:>17.2f}"
        )
    return "\n".join(lines)


def interval(right: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z = 1.96
    p, weight = right / total, z * z / total
    middle = (p + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(p * (1 - p) / total + weight / (4 * total))
    return middle - half, middle + half


def _accuracy(
    num_particles: int, asked: list[Problem], solutions: list[Solution], seconds: list[float]
) -> Accuracy:
    right = sum(s.answer == str(p.answer) for p, s in zip(asked, solutions, strict=True))
    tokens = sum(s.cost.get("tokens", 0.0) for s in solutions) / len(solutions)
    # the median leaves out the few that compile
    middle = float(np.median(seconds))
    return Accuracy(num_particles, right, len(asked), *interval(right, len(asked)), tokens, middle)


def _alike(asked: list[Problem], lm: LanguageModel) -> list[Problem]:
    """The problems of the most common padded length, so that each N compiles once."""
    assert lm.tokenizer is not None
    sizes = [bucketed(len(lm.tokenizer.encode(p.question + "\n"))) for p in asked]
    common = max(set(sizes), key=sizes.count)
    return [p for p, size in zip(asked, sizes, strict=True) if size == common]


def _interesting(asked: list[Problem], solutions: list[Solution]) -> int:
    """A problem solved by particles that disagree, if there is one."""

    def disagreement(i: int) -> tuple[bool, int]:
        solved = solutions[i].answer == str(asked[i].answer)
        return solved, min(len(set(solutions[i].texts)), 6)

    return max(range(len(asked)), key=disagreement)


def _draw(rows: list[Accuracy], picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = [row.tokens for row in rows]
    share = np.array([row.right / row.total for row in rows])
    low, high = (np.array([getattr(row, name) for row in rows]) for name in ("low", "high"))
    ax.errorbar(tokens, share, (share - low, high - share), fmt="o-", capsize=4)
    for row, x, y in zip(rows, tokens, share, strict=True):
        text = f"{row.num_particles} particle{'s' if row.num_particles > 1 else ''}"
        ax.annotate(text, (x, y), xytext=(8, -14), textcoords="offset points", fontsize="small")
    ax.set_xscale("log")
    ax.set_xticks(tokens, [f"{x:,.0f}" for x in tokens])
    ax.minorticks_off()
    ax.set_ylim(0, 1.02)
    ax.set_xlim(tokens[0] / 1.6, tokens[-1] * 2.6)
    ax.set_xlabel("tokens written for a problem")
    ax.set_ylabel("share of problems solved")
    ax.set_title(f"{rows[0].total} held-out word problems, 95% intervals", fontsize="medium")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _wrapped(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return [*lines, line]
