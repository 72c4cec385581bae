"""Linear inverse problems on 25 modes (Cardoso et al. 2024, MCGDiff): distance to the exact posterior.

    python benchmarks/mixtures_inverse.py [--quick]

Modes in 8, 80 and 800 dimensions, exact scores; 1, 2 or 4 noisy linear observations with random
singular values; 1000 particles, 100 steps of the usual schedule and the levels of the observations; one
problem a seed, 20 seeds (5 in 800 dimensions).

`as released` is the published method in the settings of its authors' example: a filter of 32 or of 128
particles for each of 1000 samples, kappa 1e-6, levels even in alpha as there, here with those of the
observations among them. `MCGDiff, as many calls` is one filter of 32,000. Of these columns, that of 128
has 10 seeds (8 dimensions only), the others have 10 in 80 dimensions and none in 800.

Sliced Wasserstein distance to 1000 exact posterior samples; `floor` is that of another exact sample,
`guidance alone` drops the weights. Intervals are 95%, over seeds. Writes
`benchmarks/results/mixtures_inverse.json`.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from modes import SIGNAL, Modes, even, mean_of, ran, respaced, sliced, told
from provenance import made_with

from smcscale.kernels import triggers
from smcscale.models.diffusion import mixtures, twisted
from smcscale.models.diffusion.linear import LinearProblem
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.samplers import ancestral
from smcscale.models.diffusion.schedules import Level

RESULT = Path(__file__).resolve().parent / "results" / "mixtures_inverse.json"


class Inverse:
    """One random problem of MCGDiff: what is observed, and the exact posterior."""

    def __init__(self, seed: int, size: int, observed: int):
        self.rng = rng = np.random.default_rng([seed, size, observed])
        pairs = itertools.product(range(-2, 3), repeat=2)
        means = np.array([[-8.0 * i, -8.0 * j] * (size // 2) for i, j in pairs])
        weights = rng.normal(size=25) ** 2
        self.weights, self.means = weights / weights.sum(), means
        left, _, right = np.linalg.svd(rng.normal(size=(observed, size)), full_matrices=False)
        values = np.sort(rng.uniform(size=observed))[::-1]
        self.matrix = (left * values) @ right
        self.scale = float(rng.uniform() * values.max())
        x = means[rng.choice(25, p=self.weights)] + rng.normal(size=size)
        self.y = self.matrix @ x + self.scale * rng.normal(size=observed)
        wanted = self.scale**2 / values**2  # noise over signal of each coordinate
        levels = np.abs(np.log((1 - SIGNAL) / SIGNAL) - np.log(wanted)[:, None]).argmin(axis=1)
        steps = np.append(np.linspace(0, 999, 100).astype(int), levels)
        self.schedule = respaced(padded(steps, 100 + observed))
        self.published = respaced(padded(even_in_alpha(set(levels.tolist())), 100 + observed))
        self.modes = Modes(jnp.log(self.weights), jnp.asarray(means), jnp.asarray(1.0))

    def released(self, key: Array, draws: int, particles: int) -> np.ndarray:
        """Draws by the published method."""
        sharp = LinearProblem(self.matrix, self.y, self.scale, self.published, kappa=1e-6)
        seen = np.zeros(self.matrix.shape[1])
        seen[: len(self.y)] = np.linalg.svd(self.matrix, compute_uv=False)
        found = filtered(
            key, sharp, self.modes, jnp.asarray(seen), jnp.asarray(self.scale), draws, particles
        )
        return np.asarray(found)

    def sample(self, count: int) -> np.ndarray:
        """Exact draws of the posterior."""
        a, noise = self.matrix, self.scale**2
        seen = a @ a.T + noise * np.eye(len(a))
        gain = np.linalg.solve(seen, a).T
        away = self.y - self.means @ a.T
        logs = np.log(self.weights) - np.einsum("ki,ij,kj->k", away, np.linalg.inv(seen), away) / 2
        shares = np.exp(logs - logs.max())
        which = self.rng.choice(25, size=count, p=shares / shares.sum())
        # a draw of the mode, corrected by what it fails to say of y
        x = self.means[which] + self.rng.normal(size=(count, self.means.shape[1]))
        missing = self.y - x @ a.T - self.scale * self.rng.normal(size=(count, len(a)))
        return x + missing @ gain.T


@eqx.filter_jit
def filtered(
    key: Array,
    problem: LinearProblem,
    modes: Modes,
    seen: Array,
    scale: Array,
    draws: int,
    particles: int,
) -> Array:
    """One draw from each of many small filters, as the authors' code has it, in the data's coordinates.

    Noise is not drawn towards the observations, every step resamples (multinomial), kappa is 1e-6, and what a
    coordinate was worth at its level is divided out again, for the likelihood of the data.

    Args:
        seen: `(d,)`, singular values of what is observed, 0 elsewhere.
        scale: of the noise.
        draws, particles: filters, and particles of each.
    """
    denoiser, schedule = problem.denoiser(modes), problem.schedule
    last = jnp.min(problem.until)  # the filter ends at this level

    def worth(x: Array, level: Level, variance: Array | float = 0.0) -> Array:
        """Log potential at a level, of a state or of a normal law around it."""
        away = (x - level.alpha * problem.target) ** 2 / (problem.slack(level) + variance)
        return jnp.sum(jnp.where(problem.active(level), -away / 2, 0.0), axis=-1)

    def step(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple, None]:
        (x, paid), (key, k) = carry, at
        high, low = schedule.level(k), schedule.level(k - 1)

        def moved(x: Array) -> tuple[Array, Array]:
            own = ancestral(None, x, denoiser(x, high), high, low)
            return own.mean, jnp.broadcast_to(own.variance, x.shape)

        mean, variance = jax.vmap(moved)(x)
        logits = worth(mean, low, variance) - worth(x, high)
        picks, noise = jax.random.split(key)
        ancestors = jax.random.categorical(picks, logits, shape=(particles,))
        filtering = low.index >= last
        mean = jnp.where(filtering, mean[ancestors], mean)
        drawn = problem.active(low)
        gain = jnp.where(drawn, variance / (variance + problem.slack(low)), 0.0)
        mean = gain * low.alpha * problem.target + (1 - gain) * mean
        variance = jnp.where(drawn, gain * problem.slack(low), variance)
        x = mean + jnp.sqrt(variance) * jax.random.normal(noise, x.shape)
        return (x, jnp.where(filtering, worth(x, low), paid)), None

    def draw(key: Array) -> Array:
        begin, walk, end = jax.random.split(key, 3)
        x = jax.random.normal(begin, (particles, len(problem.target)))
        levels = jnp.arange(len(schedule.alpha) - 1, 0, -1)
        keys = jax.random.split(walk, len(levels))
        (x, paid), _ = jax.lax.scan(step, (x, jnp.zeros(particles)), (keys, levels))
        away = (seen * (x - problem.target)) ** 2 / scale**2
        return x[jax.random.categorical(end, -jnp.sum(away, axis=1) / 2 - paid)]

    return problem.data(jax.lax.map(draw, jax.random.split(key, draws), batch_size=50))


def even_in_alpha(levels: set[int], count: int = 100) -> np.ndarray:
    """The authors' levels: alpha falls by equal amounts, then the rest of the steps; these among them."""
    alpha = np.sqrt(SIGNAL)
    end = int(np.argmax(alpha < 1e-2)) or 999
    amount = (1 - alpha[end]) / (count - 1 - len(levels))
    steps, last = [], 1.0
    for i in range(end):
        if last - alpha[i] >= amount or i in levels:
            steps.append(i)
            last = alpha[i]
    rest = np.ceil(np.linspace(steps[-1], 999, max(count - len(steps), 1))).astype(int)
    return np.append(steps, rest[1:])


def padded(steps: np.ndarray, count: int) -> np.ndarray:
    """These steps, and unused ones until there are `count`: problems share a compiled program."""
    steps = np.unique(steps)
    spare = np.setdiff1d(np.arange(1000), steps)
    more = spare[np.linspace(0, len(spare) - 1, count - len(steps)).astype(int)]
    return np.append(steps, more)


def inverse(seeds: int) -> dict:
    """The MCGDiff problem: sliced Wasserstein distances to the posterior."""
    cells, particles = {}, 1000
    for size, observed in itertools.product((8, 80, 800), (1, 2, 4)):
        found: dict[str, list[float]] = {}
        started = time.time()
        for seed in range(seeds if size < 800 else max(2, seeds // 4)):
            problem = Inverse(seed, size, observed)
            exact, again = problem.sample(particles), problem.sample(particles)
            value = twisted.NoisyLikelihood(
                Matrix(jnp.asarray(problem.matrix)),
                jnp.asarray(problem.y),
                jnp.asarray(problem.scale),
            )
            likely = mixtures.gaussian_likelihood(problem.matrix, problem.y, problem.scale)
            steering = Steering(likely, value=value)
            sloped, guided = twisted.Sloped(problem.modes, steering), twisted.Twisted(steering)
            conjugate = LinearProblem(
                problem.matrix, problem.y, problem.scale, problem.schedule, kappa=1e-2
            )
            runs = {
                "MCGDiff": (
                    conjugate.denoiser(problem.modes), conjugate.potential(),
                    {"sampler": conjugate.sampler(), "start": conjugate.start()},
                ),
                "TDS": (sloped, steering, {"sampler": guided}),
                "steering": (problem.modes, steering, {"sampler": ancestral}),
                "guidance alone": (sloped, steering, {"sampler": guided, "trigger": triggers.never}),
            }  # fmt: skip
            for method, (denoiser, steers, options) in runs.items():
                smc = ran(
                    jax.random.key(seed), denoiser, problem.schedule, steers, shape=(size,),
                    particles=particles, **options,
                )  # fmt: skip
                x, log_weights = (
                    np.asarray(a)[0] for a in (smc.result.final["x"], smc.result.log_weights)
                )
                if method == "MCGDiff":
                    x = np.asarray(conjugate.data(x))
                if method != "guidance alone":
                    x = x[even(log_weights, problem.rng)]
                found.setdefault(method, []).append(sliced(x, exact, problem.rng))
            half = seed < seeds // 2
            if size == 8 or (size == 80 and half):
                for count in (32, 128) if size == 8 and half else (32,):
                    x = problem.released(jax.random.key(seed), particles, count)
                    distance = sliced(x, exact, problem.rng)
                    found.setdefault(f"as released, {count}", []).append(distance)
                smc = ran(
                    jax.random.key(seed), conjugate.denoiser(problem.modes), problem.schedule,
                    conjugate.potential(), shape=(size,), particles=32 * particles,
                    sampler=conjugate.sampler(), start=conjugate.start(),
                )  # fmt: skip
                picked = even(np.asarray(smc.result.log_weights)[0], problem.rng)
                picked = problem.rng.choice(picked, particles, replace=False)
                x = np.asarray(conjugate.data(smc.result.final["x"][0][picked]))
                found.setdefault("MCGDiff, as many calls", []).append(sliced(x, exact, problem.rng))
            found.setdefault("floor", []).append(sliced(again, exact, problem.rng))
        cells[f"{size}, {observed}"] = {name: mean_of(values) for name, values in found.items()}
        each = {name: told(cell, 2) for name, cell in cells[f"{size}, {observed}"].items()}
        print(f"{size}, {observed}: {each}, {time.time() - started:.0f} s", flush=True)
    names = list(next(iter(cells.values())))
    rows = [
        [name, *(told(cell[method], 2) if method in cell else "" for method in names)]
        for name, cell in cells.items()
    ]
    return {
        "cells": cells,
        "table": {"columns": ["dimensions, observations", *names], "rows": rows},
    }


class Matrix(eqx.Module):
    """`x -> matrix x`."""

    matrix: Float[Array, "p d"]

    def __call__(self, x: Array) -> Array:
        return self.matrix @ x


def main() -> None:
    """Run, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, writes nothing")
    quick = parser.parse_args().quick
    found = inverse(2 if quick else 20)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        **made_with("jax", "numpyro", "smcscale"),
        **found,
    }
    if not quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
