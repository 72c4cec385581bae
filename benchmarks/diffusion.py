"""Does steering make more of the network's calls than choosing the best of as many samples?

    python benchmarks/diffusion.py [--runs 400] [--label 8] [--quick]

The shipped digits: an unconditional denoiser is steered to one class by a logistic regression trained on
half of the digits (`reward`); support vector machines trained on the other half (`judge`) say what came out.
Methods get the same calls of the network, particles times 100 steps: steering with the difference potential
(every 5 steps, systematic resampling below half of the ESS), best-of-N of the same sampler, and a random
search over initial noises with the deterministic sampler. Of each population the particle of the highest
reward is judged, and one drawn by the weights, which is what the target says. Also: mean distance to the
nearest real image of the class, spread (standard deviation of a pixel over runs), and the evidence against
plain Monte Carlo over base samples. Writes `benchmarks/results/diffusion.json`.
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
from smcscale.models.diffusion import DDIM, Interval, Steering, ancestral, denoise, vp_linear
from smcscale.models.diffusion.judges import load_judges
from smcscale.models.diffusion.networks import PRETRAINED, load_denoiser
from smcscale.models.diffusion.train import digits

RESULT = Path(__file__).resolve().parent / "results" / "diffusion.json"
STEPS = 100
PARTICLES = (1, 4, 8, 16, 64)
LAST_ONLY = Interval(start=STEPS)
#: particles of all runs at once, for memory
AT_ONCE = 6400


def population(method: str, strength: float, particles: int, runs: int, reward, seed: int) -> dict:
    """Samples `(runs, particles, 64)` with rewards, log-weights, and log evidence `(runs,)`."""
    steered = method == "steering"
    steering = Steering(
        reward, strength=strength, scored=Interval(every=5) if steered else LAST_ONLY
    )
    trigger = triggers.ess_below(0.5) if steered else triggers.never
    sampler = DDIM(0.0) if method == "noise search" else ancestral
    pieces = []
    size = max(1, min(runs, AT_ONCE // particles))
    for start in range(0, runs, size):
        smc = SMC(
            ParticleFilter(denoise, trigger=trigger, store="last"),
            num_particles=particles, num_runs=min(size, runs - start), progress_bar=False,
        )  # fmt: skip
        smc.run(
            jax.random.fold_in(jax.random.key(seed), start), load_denoiser(PRETRAINED / "digits"),
            vp_linear(STEPS), steering, shape=(64,), sampler=sampler,
        )  # fmt: skip
        assert smc.cost["denoiser_calls"] == STEPS * particles * smc.num_runs
        final = smc.result.final
        pieces.append(
            {
                "x": np.asarray(final["x"]),
                "reward": np.asarray(final["reward"]),
                "log_weights": np.asarray(smc.result.log_weights),
                "log_evidence": np.asarray(smc.log_evidence),
            }
        )
    return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


def measured(found: dict, label: int, judge, real: np.ndarray, seed: int) -> dict:
    """What the judge says of one particle of each run: the best, and one drawn by weight."""
    rows = np.arange(len(found["x"]))
    rng = np.random.default_rng(seed)
    gumbel = rng.gumbel(size=found["log_weights"].shape)
    chosen = {
        "best": found["reward"].argmax(axis=1),
        "draw": (found["log_weights"] + gumbel).argmax(axis=1),
    }
    out = {}
    for name, which in chosen.items():
        x = found["x"][rows, which]
        right = np.asarray(jax.vmap(judge)(jnp.asarray(x))) == label
        nearest = np.sqrt(((x[:, None] - real[None]) ** 2).sum(-1)).min(axis=1)
        out[name] = {
            "judged right": mean_of(right),
            "reward": mean_of(found["reward"][rows, which]),
            "distance to a real image": mean_of(nearest),
            "spread": float(x.std(axis=0).mean()),
            "_right": right,
        }
    evidence = np.exp(found["log_evidence"].astype(np.float64))
    out["evidence"] = mean_of(evidence)
    return out


def mean_of(values) -> dict:
    """Mean over independent runs, with its standard error."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean(), "se": values.std(ddof=1) / np.sqrt(len(values))}


def difference(one: dict, other: dict, pick: str) -> dict:
    """Of shares judged right in independent runs, with its 95% interval."""
    a, b = (d[pick]["_right"].astype(float) for d in (one, other))
    mean = a.mean() - b.mean()
    half = 1.96 * np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return {"mean": mean, "interval": [mean - half, mean + half]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--label", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="few runs, writes nothing")
    options = parser.parse_args()
    runs = 20 if options.quick else options.runs
    judges = load_judges(PRETRAINED / "digits-judges")
    label = options.label

    def reward(x):
        return judges.reward(x)[label]

    images, labels = digits("B")
    real = images[labels == label]
    started = time.time()
    base = population("best-of-N", 1.0, 1, 10 * runs, reward, seed=99)
    direct = {s: mean_of(np.exp(s * base["reward"][:, 0])) for s in (1.0, 3.0)}
    methods = [("steering", 1.0), ("steering", 3.0), ("best-of-N", 1.0), ("noise search", 1.0)]
    cells: dict[str, dict[int, dict]] = {}
    for method, strength in methods:
        name = f"{method}, lambda {strength:g}" if method == "steering" else method
        cells[name] = {}
        for particles in PARTICLES if method == "best-of-N" else PARTICLES[1:]:
            found = population(method, strength, particles, runs, reward, seed=particles)
            cells[name][particles] = measured(found, label, judges.judge, real, seed=1)
            told = cells[name][particles]
            print(
                f"{name:22s} {particles:3d}  best {told['best']['judged right']['mean']:.3f}  "
                f"draw {told['draw']['judged right']['mean']:.3f}  evidence "
                f"{told['evidence']['mean']:.4f} +- {told['evidence']['se']:.4f}",
                flush=True,
            )
    gains = {
        f"steering, lambda {s:g} - {other}, {pick}, {n}": difference(
            cells[f"steering, lambda {s:g}"][n], cells[other][n], pick
        )
        for s in (1, 3)
        for other in ("best-of-N", "noise search")
        for pick in ("best", "draw")
        for n in PARTICLES[1:]
    }
    for name, gain in gains.items():
        low, high = gain["interval"]
        print(f"{name:50s} {gain['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")
    if options.quick:
        return
    rows = []
    for name, by_size in cells.items():
        for pick in ("best", "draw"):
            row = [f"{name}: {'highest reward' if pick == 'best' else 'drawn by weight'}"]
            for n in PARTICLES:
                cell = by_size.get(n)
                if cell is None:
                    row.append("")
                    continue
                share = cell[pick]["judged right"]
                row.append(f"{share['mean']:.2f} ± {1.96 * share['se']:.2f}")
            rows.append(row)
    for by_size in cells.values():
        for cell in by_size.values():
            for pick in ("best", "draw"):
                del cell[pick]["_right"]
    result = {
        "question": __doc__.splitlines()[0],
        **made_with("jax", "numpyro", "smcscale"),
        "runs": runs,
        "label": label,
        "E exp(lambda r) by plain Monte Carlo": {f"{s:g}": d for s, d in direct.items()},
        "methods": cells,
        "differences": gains,
        "seconds": round(time.time() - started),
        "table": {
            "columns": [
                "share that the judge reads as the wanted digit, ± 95%",
                *(f"{n} particles" if n > 1 else "1" for n in PARTICLES),
            ],
            "rows": rows,
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT.relative_to(RESULT.parents[2])}")


if __name__ == "__main__":
    main()
