"""Does a vote over block schedules find more answers than as many lines of one schedule?

    python benchmarks/text.py [--problems 200] [--rows 3] [--quick]

The shipped text model is given the question of a held-out line, and writes its nine characters of results
in `--rows` rows, so that some are shown together. Every cell has the same network calls a problem, lines
times rows: 12 lines of one schedule, or 4 lines of each of three (HEX). Of the lines: the share whose last
digit is right, the answer of most lines (HEX's published vote, equal answers to the smaller block), and the
answer of most weight where the lines are steered by the share of right steps (`pooled` filters). Writes
`benchmarks/results/text.json`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from provenance import made_with

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import text
from smcscale.models.diffusion.blocks import Adaptive, Fixed, Local, pooled, vote, write
from smcscale.models.diffusion.networks import PRETRAINED
from smcscale.models.diffusion.token_steering import TokenSteering

RESULT = Path(__file__).resolve().parent / "results" / "text.json"
LINES = 12
STRENGTH = 5.0
COMMA = text.CHARACTERS.index(",")
SCHEDULES = {
    "blocks of 3, all at once": Fixed(3, 3),
    "adaptive, up to a comma": Adaptive((COMMA,), 4, 4),
    "local, around anchors": Local(9, 0.9, 0.6, 2),
}


def right_share(tokens):
    """Share of right steps of a line."""
    return jnp.mean(text.right_steps(tokens).astype(float))


def written(network, start, schedule, lines: int, rows: int, seed: int, steering) -> tuple:
    """Answers, log-weights `(lines,)`, log evidence of one filter."""
    trigger = triggers.never if steering is None else triggers.ess_below(0.5)
    smc = SMC(
        ParticleFilter(write, store="last", trigger=trigger),
        num_particles=lines, progress_bar=False,
    )  # fmt: skip
    smc.run(
        jax.random.key(seed), network, jnp.asarray(start), schedule, num_steps=rows,
        steering=steering,
    )  # fmt: skip
    samples, _ = smc.get_samples(weighted=True)
    answers = [text.answer(row) for row in np.asarray(samples["tokens"])]
    return answers, np.asarray(smc.result.log_weights[0]), float(np.asarray(smc.log_evidence)[0])


def solved(network, start, truth: int | None, names: tuple, rows: int, seed: int) -> dict:
    """Of one problem and some schedules: share of right lines, and whether each vote is right."""
    steering = TokenSteering(right_share, STRENGTH)
    each = LINES // len(names)
    plain, weighted = (
        [
            written(network, start, SCHEDULES[n], each, rows, seed + 1000 * i, way)
            for i, n in enumerate(names)
        ]
        for way in (None, steering)
    )
    answers = [answer for found, _, _ in plain for answer in found]
    sizes = [SCHEDULES[name].size for name in names for _ in range(each)]
    steered = [answer for found, _, _ in weighted for answer in found]
    log_weights = pooled([w for _, w, _ in weighted], [z for _, _, z in weighted])
    return {
        "one line": np.mean([answer == truth for answer in answers]),
        "vote": float(vote(answers, sizes=sizes)[0] == truth),
        "weighted vote": float(vote(steered, log_weights)[0] == truth),
    }


def mean_of(values) -> dict:
    """Mean over problems, with its standard error."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean(), "se": values.std(ddof=1) / np.sqrt(len(values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few problems, writes nothing")
    options = parser.parse_args()
    count = 10 if options.quick else options.problems
    network = text.load_text(PRETRAINED / "text")
    held_out = text.lines(1, count, "test")
    started = time.time()
    cells = {name: (name,) for name in SCHEDULES} | {"all three (HEX)": tuple(SCHEDULES)}
    found: dict[str, dict[str, list]] = {}
    for name, names in cells.items():
        per = [
            solved(network, text.problem(x), text.answer(x), names, options.rows, seed)
            for seed, x in enumerate(held_out)
        ]
        found[name] = {key: [p[key] for p in per] for key in per[0]}
        told = {key: mean_of(values) for key, values in found[name].items()}
        print(
            f"{name:26s} "
            + "  ".join(f"{k} {d['mean']:.3f} +- {d['se']:.3f}" for k, d in told.items()),
            flush=True,
        )
    hex_votes = found["all three (HEX)"]
    gains = {
        f"{key}: all three - {name}": mean_of(np.subtract(hex_votes[key], found[name][key]))
        for key in ("vote", "weighted vote")
        for name in SCHEDULES
    }
    for name, gain in gains.items():
        print(f"{name:50s} {gain['mean']:+.3f} +- {1.96 * gain['se']:.3f}")
    if options.quick:
        return
    told = {n: {k: mean_of(v) for k, v in by.items()} for n, by in found.items()}
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "numpyro", "smcscale"),
        "problems": count,
        "rows": options.rows,
        "lines": LINES,
        "strength": STRENGTH,
        "methods": told,
        "differences over the same problems": gains,
        "seconds": round(time.time() - started),
        "table": {
            "columns": [
                f"share of {count} answers right, ± 95%, {LINES} lines of {options.rows} rows",
                "one line", "vote", "weighted vote",
            ],
            "rows": [
                [name, *(f"{d['mean']:.2f} ± {1.96 * d['se']:.2f}" for d in by.values())]
                for name, by in told.items()
            ],
        },
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT.relative_to(RESULT.parents[2])}")


if __name__ == "__main__":
    main()
