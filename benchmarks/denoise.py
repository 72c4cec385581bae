"""How much does the engine add to the time of a diffusion model's network?

    python benchmarks/denoise.py [--particles 64] [--rounds 30]

The shipped digits, 100 steps. Two programs, compiled, each on new keys, turn by turn: `steering`, a run of `SMC` with
the difference potential at every step, systematic resampling below half of the ESS; and `loop`, the same network
calls, sampler steps and rewards in one `lax.scan` by hand, without weights, resampling and results. The engine's
own time is what the first takes beyond the second. Ratios are of neighbours; median, and middle half. Writes
`benchmarks/results/denoise.json`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from provenance import made_with

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import Steering, ancestral, denoise, vp_linear
from smcscale.models.diffusion.judges import load_judges
from smcscale.models.diffusion.networks import PRETRAINED, load_denoiser

RESULT = Path(__file__).resolve().parent / "results" / "denoise.json"
STEPS, LABEL = 100, 8


def main() -> None:
    """Time both, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    count = options.particles
    denoiser, judges = (
        load_denoiser(PRETRAINED / "digits"),
        load_judges(PRETRAINED / "digits-judges"),
    )
    schedule = vp_linear(STEPS)

    def reward(x):
        return judges.reward(x)[LABEL]

    smc = SMC(
        ParticleFilter(denoise, trigger=triggers.ess_below(0.5), store="last"),
        num_particles=count, progress_bar=False,
    )  # fmt: skip

    def steering(key):
        smc.run(key, denoiser, schedule, Steering(reward), shape=(64,))
        jax.block_until_ready(smc.result.log_evidence)

    @jax.jit
    def walked(key, denoiser, schedule):
        start, key = jax.random.split(key)
        top = schedule.level(-1)
        x = schedule.initial_scale * jax.random.normal(start, (count, 64))
        found = jax.vmap(lambda x: denoiser(x, top))(x)

        def step(carry, row):
            x, found, total = carry
            walk, key = row

            def one(x, found, key):
                return ancestral(None, x, found, walk.high, walk.low).sample(key)

            x = jax.vmap(one)(x, found, jax.random.split(key, count))
            after = jax.lax.cond(
                walk.last,
                lambda: found._replace(x0=x),
                lambda: jax.vmap(lambda x: denoiser(x, walk.low))(x),
            )
            return (x, after, total + jax.vmap(reward)(after.x0)), None

        rows = (schedule.walk(), jax.random.split(key, STEPS))
        (x, _, total), _ = jax.lax.scan(step, (x, found, jax.vmap(reward)(found.x0)), rows)
        return x, total

    def loop(key):
        jax.block_until_ready(walked(key, denoiser, schedule))

    seconds = {"steering": [], "loop": []}
    for number in range(options.rounds + 2):
        for name, run in (("steering", steering), ("loop", loop)):
            key = jax.random.key(number)
            before = time.perf_counter()
            run(key)
            seconds[name].append(time.perf_counter() - before)
    mine, plain = (np.array(seconds[name][2:]) for name in ("steering", "loop"))
    ratios = np.percentile(mine / plain, [25, 50, 75])
    print(f"steering over loop: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "smcscale"),
        "particles": count,
        "steps": STEPS,
        "rounds": options.rounds,
        "steering over loop": {"median": ratios[1], "middle half": [ratios[0], ratios[2]]},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
