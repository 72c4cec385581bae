"""What do more particles do when the judge misleads: accuracy and reward against N, method by method?

    python benchmarks/misled.py [--quick] [--fresh]

`misleading` problems (8 steps, each right with chance 0.75): an honest judge; a judge who believes a share of the
errors for half of the text (over-confident early scores); a judge who lets a share of wrong texts
pass with a score above that of right ones (false positives). 40 problems each, 50 runs a problem. A method
hands in one answer; accuracy is the share of right ones, reward the judge's score of what was handed in. All
methods of one N write as many steps. The properly weighted filters target the score to its 4th power; what
annealing adds is told against the same filter that resamples at every row as it does. Intervals
are over problems, p-values of sign flips, corrected by Holm. Writes `benchmarks/results/misled.json` and
`misled.png`; cells that the file has are kept, `--fresh` runs all again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from provenance import made_with

from smcscale import SMC
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import methods, report
from smcscale.models.reasoning.beds import unclipped
from smcscale.models.reasoning.methods import Method
from smcscale.models.reasoning.misleading import misleading
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.program import read_prompt

RESULTS = Path(__file__).resolve().parent / "results"
JUDGES = {
    "honest": {},
    "over-confident early": {"overconfident": 0.4},
    "false positives": {"false_positives": 0.1},
}
SIZES = (1, 2, 4, 8, 16, 32, 64)
RUNS = 50  # of a problem
DEPTH = 8
SHARP = Potential(difference, unclipped, temperature=0.25)
#: name: method, whether the best score is handed in (else the vote by weight)
METHODS: dict[str, tuple[Any, bool]] = {
    "best of N": (lambda n: methods.best_of_n(), True),
    "particle filter": (lambda n: methods.particle_filter(), False),
    "particle filter, every row": (lambda n: methods.particle_filter(trigger=always), False),
    "particle filter, as published": (lambda n: methods.published_filter(), True),
    "entropic filter": (lambda n: methods.entropic_filter(DEPTH), False),
    "entropic filter, as published": (
        lambda n: methods.published_entropic_filter(DEPTH), True,
    ),
    "beam search": (lambda n: methods.beam_search(max(1, n // 4)), True),
}  # fmt: skip


def handed_in(method: Method, best: bool, bed: Any, size: int, runs: int, seed: int) -> tuple:
    """Whether the answer of each run is right `(R,)`, and the judge's score of it."""
    smc = SMC(
        method.filter, num_particles=size, num_runs=runs, num_islands=method.num_islands,
        progress_bar=False,
    )  # fmt: skip
    options = {"potential": SHARP} | method.options
    prompt = read_prompt(bed.lm, bed.reward, ())
    smc.run(jax.random.key(seed), bed.lm, bed.reward, prompt, max_steps=bed.max_steps, **options)
    samples, _ = smc.get_samples(weighted=True)
    written = samples["step"].written
    tokens, lengths = np.asarray(written.tokens), np.asarray(written.length)
    answers = bed.answers(tokens.reshape(-1, DEPTH), lengths.reshape(-1)).reshape(runs, size)
    scores = np.asarray(samples["score"]).reshape(runs, size)
    rng = np.random.default_rng(seed)
    if best:
        chosen = (scores + 1e-6 * rng.random(scores.shape)).argmax(1)
    else:
        weights = np.asarray(jax.nn.softmax(jnp.asarray(smc.result.log_weights), axis=1))
        votes = np.einsum("rn,rnm->rm", weights, answers[:, :, None] == answers[:, None, :])
        chosen = (votes + 1e-6 * rng.random(votes.shape)).argmax(1)
    rows = np.arange(runs)
    return answers[rows, chosen] == 0, scores[rows, chosen]


def measured(problems: int, runs: int, kept: dict) -> dict:
    """Every cell: means by problem; those of `kept` as they are."""
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for judge, knobs in JUDGES.items():
        beds = [misleading(seed, **knobs) for seed in range(problems)]
        for name, (make, best) in METHODS.items():
            if name in kept.get(judge, {}):
                found.setdefault(judge, {})[name] = kept[judge][name]
                continue
            for size in SIZES:
                cells = [
                    handed_in(make(size), best, bed, size, runs, seed)
                    for seed, bed in enumerate(beds)
                ]
                right, reward = ([float(np.mean(c[k])) for c in cells] for k in (0, 1))
                found.setdefault(judge, {}).setdefault(name, {})[str(size)] = {
                    "right": right, "reward": float(np.mean(reward)),
                    "accuracy": float(np.mean(right)), "interval": report.interval(right),
                }  # fmt: skip
            points = found[judge][name]
            print(judge, name, [round(points[str(n)]["accuracy"], 3) for n in SIZES], flush=True)
    return found


def gains(found: dict) -> dict:
    """What annealing adds, and what resampling at every row does, paired by problem."""
    pairs = {
        "annealing": ("entropic filter", "particle filter, every row"),
        "resampling at every row": ("particle filter, every row", "particle filter"),
        "annealing, as published": (
            "entropic filter, as published",
            "particle filter, as published",
        ),
    }
    told: dict[str, dict[str, dict]] = {}
    for what, names in pairs.items():
        cells = {}
        for judge, by_name in found.items():
            for size in SIZES[1:]:
                right = [np.asarray(by_name[name][str(size)]["right"]) for name in names]
                change = right[0] - right[1]
                cells[f"{judge}, N = {size}"] = {
                    "mean": float(change.mean()), "interval": report.interval(change, lowest=-1.0),
                    "p": report.sign_flip(np.rint(change * RUNS).astype(int)),
                }  # fmt: skip
        for cell, p in zip(
            cells.values(), report.holm([cell["p"] for cell in cells.values()]), strict=True
        ):
            cell["p"] = float(p)
        told[what] = cells
    return told


def draw(found: dict) -> None:
    """Accuracy above, reward below, one column a judge."""
    figure, axes = plt.subplots(2, len(found), figsize=(11, 6), sharex=True, sharey="row")
    for column, (judge, by_name) in enumerate(found.items()):
        for name, cells in by_name.items():
            line = "--" if "published" in name else "-"
            value = [cells[str(n)]["accuracy"] for n in SIZES]
            low, high = np.transpose([cells[str(n)]["interval"] for n in SIZES])
            (drawn,) = axes[0, column].plot(SIZES, value, line, label=name)
            axes[0, column].fill_between(SIZES, low, high, color=drawn.get_color(), alpha=0.15)
            reward = [cells[str(n)]["reward"] for n in SIZES]
            axes[1, column].plot(SIZES, reward, line, color=drawn.get_color())
        axes[0, column].set_title(f"judge: {judge}")
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xticks(SIZES, SIZES)
        axes[1, column].set_xlabel("particles")
    axes[0, 0].set_ylabel("share right")
    axes[1, 0].set_ylabel("judge's score")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.set_layout_engine("constrained")
    figure.savefig(RESULTS / "misled.png", dpi=110)


def main() -> None:
    """Run, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few problems, writes nothing")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of the result file")
    options = parser.parse_args()
    path, kept = RESULTS / "misled.json", {}
    if path.exists() and not options.fresh and not options.quick:
        kept = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = measured(4 if options.quick else 40, RUNS, kept)
    if options.quick:
        return
    shown = (1, 4, 16, 64)
    rows = [
        [f"{judge}: {name}", *(f"{cells[str(n)]['accuracy']:.2f}" for n in shown)]
        for judge, by_name in found.items()
        for name, cells in by_name.items()
    ]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "numpyro", "smcscale"),
        "cells": found,
        "differences": gains(found),
        "table": {"columns": ["judge: method", *(f"N = {n}" for n in shown)], "rows": rows},
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(found)


if __name__ == "__main__":
    main()
