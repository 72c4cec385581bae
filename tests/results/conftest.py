"""Results made without the engine: a bootstrap filter of a two-state chain, written in NumPy.

The chain has an exact answer (`algorithms.md` section 7): states 0 and 1, y = 0, 1, 1, 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.engine.store import Paths
from smcscale.result import Diagnostics, Initial, Moments, Result

FIRST = np.array([0.6, 0.4])
MOVE = np.array([[0.9, 0.1], [0.2, 0.8]])
SEE = np.array([[0.8, 0.2], [0.3, 0.7]])  # P(y given state)
SEEN = (0, 1, 1, 0)


def chain(seed, num_runs, num_particles, *, store="paths", biases=(), kill=(), resample=True):
    """A `Result` of R bootstrap filters with multinomial resampling at every step.

    Its site "x" is the state, "twice" before the loop holds twice the particle's first state,
    "double" after the loop twice its last one.
    """
    rng = np.random.default_rng(seed)
    shape, steps = (num_runs, num_particles), len(SEEN)
    x = (rng.random(shape) < FIRST[1]).astype(np.int32)
    eve = np.broadcast_to(np.arange(num_particles, dtype=np.int32), shape).copy()
    first, log_evidence = 2.0 * x, np.zeros(num_runs)
    log_weights = np.zeros(shape)
    states, weights, ancestors, rows = [], [], [], []
    for t, y in enumerate(SEEN):
        parents = np.broadcast_to(np.arange(num_particles), shape).copy()
        if t > 0 and resample:
            w = np.exp(log_weights)
            w = np.where(w.sum(1, keepdims=True) > 0, w, 1)
            cumulative = np.cumsum(w / w.sum(1, keepdims=True), 1)
            for r in range(num_runs):
                points = rng.random(num_particles)
                found = np.searchsorted(cumulative[r], points, side="right")
                parents[r] = np.minimum(found, num_particles - 1)
            x, eve, first = (np.take_along_axis(a, parents, 1) for a in (x, eve, first))
            log_weights = np.where(np.isfinite(log_weights).any(1, keepdims=True), 0.0, -np.inf)
            log_weights = np.broadcast_to(log_weights, shape)
        if t > 0:
            x = (rng.random(shape) < MOVE[x, 1]).astype(np.int32)
        log_weights = log_weights + np.log(SEE[x, y])
        for run in kill:
            log_weights[run] = -np.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.log(np.mean(np.exp(log_weights), 1))
            log_weights = log_weights - np.where(np.isfinite(step), step, 0)[:, None]
            log_evidence = log_evidence + step
            w = np.exp(log_weights) / np.exp(log_weights).sum(1, keepdims=True)
        mean = (w * x).sum(1)
        ess = 1 / (w**2).sum(1)
        unique = np.array([len(np.unique(row)) for row in parents], np.int32)
        rows.append((ess, unique, log_evidence.copy(), mean, mean * (1 - mean)))
        states.append(x)
        weights.append(log_weights)
        ancestors.append(parents.astype(np.int32))
    ess, unique, running, mean, variance = (jnp.asarray(np.stack(a, 1)) for a in zip(*rows))
    stack = [jnp.asarray(np.stack(a)) for a in (states, weights, ancestors)]
    history = Paths({"x": stack[0]}, stack[1], stack[2]) if store == "paths" else None
    moved = np.arange(steps) > 0 if resample else np.zeros(steps, bool)
    return Result(
        log_evidence=jnp.asarray(log_evidence),
        log_weights=jnp.asarray(log_weights),
        before={"twice": jnp.asarray(first)},
        final={"x": jnp.asarray(x)},
        after={"double": 2.0 * jnp.asarray(x)},
        eve=jnp.asarray(eve),
        num_resamplings=jnp.full(num_runs, moved.sum(), jnp.int32),
        moments=Moments({"x": mean}, {"x": variance}),
        history=history,
        diagnostics=Diagnostics(
            ess=jnp.nan_to_num(ess),
            resampled=jnp.asarray(np.broadcast_to(moved, (num_runs, steps))),
            unique_ancestors=unique,
            beta=jnp.ones((num_runs, steps)),
            log_evidence=running,
            num_particles=np.full(steps, num_particles, np.int32),
            initial=Initial(jnp.full(num_runs, float(num_particles)), jnp.zeros(num_runs)),
            dead_time=jnp.asarray([0 if r in kill else -2 for r in range(num_runs)], jnp.int32),
        ),
        cost={"particle_steps": float(num_runs * num_particles * steps), "seconds": 0.5},
        biases=tuple(biases),
        key_data=jax.random.key_data(jax.random.key(seed)),
        warnings=("a static parameter degenerates",),
    )


@pytest.fixture
def chain_result():
    """The builder: `chain(seed, num_runs, num_particles, ...)`."""
    return chain


@pytest.fixture(scope="session")
def chain_exact():
    """Log evidence, filtered and smoothed probabilities of state 1, by enumeration."""
    steps = len(SEEN)
    log_evidence, running, weights = 0.0, [], {}
    for path in np.ndindex(*(2,) * steps):
        p = FIRST[path[0]] * SEE[path[0], SEEN[0]]
        for t in range(1, steps):
            p *= MOVE[path[t - 1], path[t]] * SEE[path[t], SEEN[t]]
        weights[path] = p
    total = sum(weights.values())
    log_evidence = np.log(total)
    smoothed = [sum(p for x, p in weights.items() if x[t]) / total for t in range(steps)]
    forward = FIRST * SEE[:, SEEN[0]]
    running.append(forward[1] / forward.sum())
    for y in SEEN[1:]:
        forward = (forward @ MOVE) * SEE[:, y]
        running.append(forward[1] / forward.sum())
    return float(log_evidence), np.array(running), np.array(smoothed)
