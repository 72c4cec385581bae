"""What does a real small model gain from particles, with a checker of equations as reward?

    python -m smcscale get smollm2
    python benchmarks/smollm2.py [--problems 200] [--texts 16] [--rows FILE] [--report]

SmolLM2-135M-Instruct (4-bit weights), five worked examples in its chat template, fresh two- and three-step
word problems of numbers 2 to 10. A line is a step; `EquationJudge` scores it, in plain Python, knowing neither
plan nor answer. Every method of `RUNS` writes so many texts a problem: independent ones (read as one sample, best score,
majority and weighted vote), filters that differ in when they resample, in the power of the score (`sharp`:
its square), in seeing a step before choosing (`look-ahead`), or that keep a text and write again (particle
Gibbs, four sweeps). Rows go to a file (`bench.py`), so that a run that was stopped goes on. Intervals are
bootstraps over problems, differences paired. Writes `benchmarks/results/smollm2.json`.
"""

import argparse
import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from provenance import made_with

from smcscale import SMC, ParticleFilter
from smcscale.engine.conditional_host import sweep
from smcscale.kernels import resampling, triggers
from smcscale.kernels.resampling import FanOut
from smcscale.models.reasoning import answers, bench, report
from smcscale.models.reasoning.equations import EquationJudge
from smcscale.models.reasoning.host_program import host_reason
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.problem_files import Problem
from smcscale.models.reasoning.smollm2 import get_smollm2

RESULT = Path(__file__).resolve().parent / "results" / "smollm2.json"
PROBLEM_SEED = 11
MAX_STEPS, STEP_TOKENS, MAX_TOKENS = 5, 16, 64
SWEEPS = 4
#: kernels of the filter, the potential, sweeps that share the texts
RUNS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "independent": ({"trigger": triggers.never}, difference, 1),
    "filter, always": ({"trigger": triggers.always}, difference, 1),
    "filter, ESS below half": ({}, difference, 1),
    "filter, sharp": ({"trigger": triggers.always}, Potential(difference, temperature=0.5), 1),
    "look-ahead": (
        {"resampling": FanOut(resampling.systematic, 4), "trigger": triggers.always}, difference, 1,
    ),
    "particle Gibbs": ({}, difference, SWEEPS),
}  # fmt: skip
NAMES = ("Ana", "Tom", "Mia", "Leo", "Eva", "Ben", "Ida", "Max")
THINGS = ("pens", "apples", "books", "cards", "shells", "coins", "cups", "balls")
PRONOUNS = {"Ana": "She", "Mia": "She", "Eva": "She", "Ida": "She"}
EXAMPLE_SEED, NUM_EXAMPLES = 100, 5


def story(rng: random.Random) -> tuple[str, str, int]:
    """A question of two or three steps, its solution, and its answer."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    pronoun, first, second = PRONOUNS.get(name, "He"), rng.randint(2, 10), rng.randint(2, 10)
    if rng.random() < 0.5:
        value = first * second
        text = f"{name} has {first} boxes with {second} {thing} in each box."
        lines = [f"{first} * {second} = {value}"]
    else:
        value = first + second
        text = f"{name} has {first} {thing}. {pronoun} buys {second} more {thing}."
        lines = [f"{first} + {second} = {value}"]
    for _ in range(rng.choice((1, 2))):
        more = rng.randint(2, 10)
        if more < value and rng.random() < 0.5:
            lines.append(f"{value} - {more} = {value - more}")
            text += f" {pronoun} gives {more} {thing} to a friend."
            value -= more
        else:
            lines.append(f"{value} + {more} = {value + more}")
            text += f" {pronoun} finds {more} more {thing}."
            value += more
    question = f"{text} How many {thing} does {name} have now?"
    return question, "\n".join([*lines, f"Answer: {value}"]), value


def problem(rng: random.Random, number: int) -> Problem:
    """A fresh question."""
    question, _, value = story(rng)
    return Problem(str(number), question, str(value))


def prompt(lm: LanguageModel, question: str) -> list[int]:
    """Worked examples and the question, in the model's chat template."""
    examples = [story(random.Random(EXAMPLE_SEED + number))[:2] for number in range(NUM_EXAMPLES)]
    messages = []
    for asked, solved in (*examples, (question, "")):
        messages.append({"role": "user", "content": asked})
        if solved:
            messages.append({"role": "assistant", "content": solved})
    return lm.chat(messages)


def cell(lm: LanguageModel, problem: Problem, method: str, texts: int, seed: int) -> report.Row:
    """All runs of a problem, on one key, which pairs them."""
    key = jax.random.fold_in(jax.random.key(seed), int(problem.id))
    asked = lm.read(prompt(lm, problem.question))
    runs = {name: run(lm, problem, asked, *how, texts, key) for name, how in RUNS.items()}
    return {"answer": problem.answer} | runs


def run(
    lm: LanguageModel, problem: Problem, asked: Any, kernels: dict, potential: Any, sweeps: int,
    texts: int, key: Any,
) -> dict:  # fmt: skip
    """What one run left: answers, log-weights, scores, tokens."""
    judge = EquationJudge(problem.question)
    program = host_reason(lm, judge, asked, max_steps=MAX_STEPS, potential=potential)
    pf = ParticleFilter(program, store="last", **kernels)
    if sweeps == 1:
        smc = SMC(pf, num_particles=texts, progress_bar=False)
        smc.run(key)
        parts = [(smc.get_samples(weighted=True)[0]["step"], smc.result.log_weights[0])]
        evidence, tokens = float(smc.log_evidence[0]), int(smc.cost["tokens"])
    else:  # the first sweep, which nothing was kept for, is not read
        made = [sweep(pf, jax.random.fold_in(key, 0), num_particles=texts // sweeps)]
        for count in range(1, sweeps):
            made.append(sweep(
                pf, jax.random.fold_in(key, count), num_particles=texts // sweeps, kept=made[-1].path
            ))  # fmt: skip
        parts = [(one.states.step, one.log_weights) for one in made[1:]]
        evidence, tokens = made[0].log_evidence, int(sum(one.cost["tokens"] for one in made))
    written, weights = [], []
    for step, log_weights in parts:
        rows = zip(np.asarray(step.written.tokens), np.asarray(step.written.length), strict=True)
        written += [lm.decode(row[:length]) for row, length in rows]
        weights.append(np.asarray(log_weights) - np.logaddexp.reduce(log_weights))
    # of the last line that names one
    lines = [list(filter(None, map(judge.said, text.split("\n")))) for text in written]
    found = [named[-1] if named else None for named in lines]
    return {
        "answers": [match[1].removesuffix(".0") if match else None for match in found],
        "log_weights": [round(float(w), 4) for w in np.concatenate(weights)],
        "scores": [round(judge.score(text), 5) for text in written],
        "log_evidence": round(evidence, 4),
        "tokens": tokens,
        "text": written[0],
    }


def chosen(name: str, run: dict) -> dict[str, str | None]:
    """The answer of every method that a run serves."""
    texts, weights, scores = run["answers"], np.array(run["log_weights"]), np.array(run["scores"])
    if name != "independent":
        return {name: answers.weighted_majority(texts, weights)}
    return {
        "one sample": texts[0],
        "best score": answers.argmax(texts, weights, scores),
        "majority": answers.majority(texts),
        "weighted vote": answers.weighted_majority(texts, weights),
    }


FULL = 0.98  # a text without a fault has 0.99


def texts_told(rows: list[dict], name: str) -> dict[str, float]:
    """Of the texts of one kind of run: how many are right, how many have a full score, and both."""
    right = [[answer == row["answer"] for answer in row[name]["answers"]] for row in rows]
    full = [np.array(row[name]["scores"]) > FULL for row in rows]
    among = [np.mean(np.array(r)[f]) for r, f in zip(right, full, strict=True) if f.any()]
    return {
        "share of texts that are right": float(np.mean([np.mean(r) for r in right])),
        "share of problems with a right text": float(np.mean([any(r) for r in right])),
        "share of texts with a full score": float(np.mean([np.mean(f) for f in full])),
        "share of right ones among those": float(np.mean(among)) if among else 0.0,
    }


def summary(rows: list[dict]) -> dict:
    """The result file."""
    right: dict[str, list[float]] = {}
    tokens: dict[str, list[float]] = {}
    for row, name in itertools.product(rows, RUNS):
        for method, answer in chosen(name, row[name]).items():
            right.setdefault(method, []).append(float(answer == row["answer"]))
            share = len(row[name]["answers"]) if method == "one sample" else 1
            tokens.setdefault(method, []).append(row[name]["tokens"] / share)
    values = {method: np.array(found) for method, found in right.items()}
    table, gains = [], {}
    methods = list(values)
    for method, value in values.items():
        low, high = report.interval(value)
        table.append([method, f"{value.mean():.3f} ({low:.3f} to {high:.3f})",
                      f"{np.mean(tokens[method]):.0f}"])  # fmt: skip
        for other in ("one sample", "best score", "majority"):
            if other in values and methods.index(other) < methods.index(method):
                change = value - values[other]
                gains[f"{method} - {other}"] = {
                    "mean": float(change.mean()),
                    "interval": report.interval(change, lowest=-1.0),
                    "p_value": report.sign_flip(change.astype(int)),
                }
    adjusted = report.holm([one["p_value"] for one in gains.values()])
    for one, p_value in zip(gains.values(), adjusted, strict=True):
        one["p_value, Holm"] = float(p_value)
    return {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "smcscale", "gguf"),
        "problems": len(rows),
        "problem seed": PROBLEM_SEED,
        "texts": {name: texts_told(rows, name) for name in RUNS},
        "differences": gains,
        "table": {"columns": ["method", "share solved (95% interval)", "tokens a problem"],
                  "rows": table},
    }  # fmt: skip


def main() -> None:
    """Run what is missing, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--texts", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--rows", type=Path, default=Path("smollm2_rows.jsonl"))
    parser.add_argument("--report", action="store_true", help="of the rows that are there")
    options = parser.parse_args()
    told = {
        "problem seed": PROBLEM_SEED, "texts": options.texts,
        "temperature": options.temperature, "max steps": MAX_STEPS,
        "step tokens": STEP_TOKENS, "max tokens": MAX_TOKENS,
    }  # fmt: skip
    if options.report:
        kept = report.read_results(options.rows)
        rows, told = kept.rows, kept.configuration
    else:
        lm = LanguageModel.from_pretrained(
            get_smollm2(), temperature=options.temperature, step_tokens=STEP_TOKENS,
            max_tokens=MAX_TOKENS,
        )  # fmt: skip
        rng = random.Random(PROBLEM_SEED)
        problems = [problem(rng, number) for number in range(options.problems)]
        rows = bench.run(
            problems, partial(cell, lm), options.rows, methods=["smollm2"],
            budgets=[options.texts], configuration=told,
        )  # fmt: skip
    result = summary(rows) | {"configuration": told}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["table"]["rows"], indent=1))


if __name__ == "__main__":
    main()
