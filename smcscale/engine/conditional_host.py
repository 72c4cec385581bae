"""Conditional SMC for models that run Python: sweeps of a particle filter with one path of states kept.

    first = sweep(pf, key, num_particles=8)                    # nothing kept yet: the filter itself
    again = sweep(pf, key, num_particles=8, kept=first.path)   # and so on

Transition and potential of a host model are called once a row with the particles that move; the kept path
is not drawn again, its states, which were stored, take slot 0. It keeps its own ancestors: to draw them
anew (`conditional.py`) takes the density of a transition, which a host model need not have. A sweep with a
path from the filter's target leaves that law unchanged, with any number of particles. The states of all rows
are held until the sweep ends.

Source: Andrieu, Doucet & Holenstein 2010, section 4.3.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcscale import keys
from smcscale.engine import conditional
from smcscale.engine.bound import bind
from smcscale.engine.compiled import row_at
from smcscale.engine.host import checked, scores, wait_for
from smcscale.feynman_kac import FeynmanKac, Weighted, weighted
from smcscale.kernels.resampling.conditional import form_of


class Path(NamedTuple):
    """What one particle went through: its states and log-weight increments, the initial ones first."""

    states: list[Any]
    increments: list[float]


class HostSweep(NamedTuple):
    """What a sweep leaves.

    Attributes:
        states: the last row's, leaves `(N, ...)`; that of the kept path is first.
        log_weights: `(N,)`, the largest is 0.
        path: one of the particles', drawn by weight.
        log_evidence: nats; an estimate of the log evidence when nothing was kept.
        num_resamplings: of the rows.
        cost: by name, of the particles that moved.
    """

    states: Any
    log_weights: Float[Array, " N"]
    path: Path
    log_evidence: float
    num_resamplings: int
    cost: dict[str, float]


def sweep(
    pf: Any,
    key: Array,
    inputs: Any = None,
    *,
    num_particles: int,
    num_steps: int | None = None,
    kept: Path | None = None,
) -> HostSweep:
    """Run one sweep.

    Args:
        pf: the filter of a host `FeynmanKac`; its trigger and resampling kernel are used, see
            `conditional.check_kernels`.
        key: consumed.
        inputs, num_steps: rows, as `SMC.run` takes them.
        num_particles: N, the kept one counted; 2 or more with one.
        kept: a path of the same number of rows.
    Raises:
        TypeError: another kind of program.
        ValueError: kernels without a conditional form, one particle beside a kept path, or a path of
            another length.
        FloatingPointError: a log potential that is NaN or +inf, or particles that all died.
    """
    model = pf.program
    if not isinstance(model, FeynmanKac) or not model.capabilities.host:
        raise TypeError(
            "smcscale: this sweep is for host models.\n  try: `conditional.sweep` of a NumPyro program."
        )
    conditional.check_kernels(pf)
    if model.capabilities.inputs_at_start:
        raise ValueError("smcscale: conditional SMC takes no model with a row for its initial law.")
    bound = bind(pf, () if inputs is None else (inputs,), {}, num_steps)
    if kept is not None and (num_particles < 2 or len(kept.states) != bound.num_steps + 1):
        raise ValueError(
            f"smcscale: a sweep of {bound.num_steps} rows needs a kept path as long and particles "
            f"beside it; got {len(kept.states) - 1} rows and num_particles = {num_particles}."
        )
    fixed = 0 if kept is None else 1
    split = jax.random.split(keys.initial(key), num_particles - fixed)
    start = weighted(jax.vmap(model.initial)(split))
    states = _joined(None if kept is None else kept.states[0], start.state)
    begun = _increments(start, num_particles - fixed, None if kept is None else kept.increments[0])
    evidence, lw = _recentred(np.array(begun), "at the start")
    cost: dict[str, float] = {}
    rows: list[tuple[np.ndarray, np.ndarray]] = []  # ancestors, increments
    history = [states]
    fired = 0
    for time in range(bound.num_steps):
        row = row_at(bound, jnp.asarray(time))
        fire, ancestors, move_keys = _drawn(
            pf.trigger, pf.resampling, key, jnp.asarray(time), jnp.asarray(lw), fixed
        )
        ancestors = np.asarray(ancestors)
        if fire:
            evidence, lw, fired = evidence + _log_mean(lw), np.zeros_like(lw), fired + 1
        previous = jax.tree.map(lambda x, a=ancestors: x[a], states)
        free = jax.tree.map(lambda x: x[fixed:], previous)
        returned = weighted(wait_for(model.transition(move_keys, free, row)))
        moved = checked(returned.state, free)
        old = None if kept is None else kept.increments[time + 1]
        increments = _increments(returned, num_particles - fixed, old)
        states = _joined(None if kept is None else kept.states[time + 1], moved)
        potential = wait_for(model.log_potential(previous, states, row))
        gained = increments + np.asarray(scores("log_potential", potential, (num_particles,)))
        level, lw = _recentred(lw + gained, f"at row {time}")
        evidence += level
        if model.cost is not None:
            for name, spent in model.cost(free, moved, row).items():
                cost[name] = cost.get(name, 0.0) + float(np.sum(spent))
        rows.append((ancestors, increments))
        history.append(states)
    chosen = int(jax.random.categorical(keys.readout(key), jnp.asarray(lw)))
    path = _traced(history, begun, rows, chosen)
    told = (evidence + _log_mean(lw), fired, cost)
    return HostSweep(states, jnp.asarray(lw), path, *told)


def _increments(drawn: Weighted, count: int, kept: float | None) -> np.ndarray:
    """Of the particles that moved, after that of the kept one."""
    own = np.asarray(scores("log_increment", drawn.log_increment, (count,)))
    return own if kept is None else np.concatenate([np.asarray([kept], own.dtype), own])


def _recentred(lw: np.ndarray, where: str) -> tuple[float, np.ndarray]:
    """The largest log-weight, and all less it: float32 keeps small ones apart."""
    if np.isnan(lw).any() or (lw == np.inf).any() or (lw == -np.inf).all():
        what = "all -inf" if (lw == -np.inf).all() else "NaN or +inf"
        raise FloatingPointError(f"smcscale: the log-weights are {what} {where}.")
    return float(lw.max()), lw - lw.max()


def _traced(history: list, begun: np.ndarray, rows: list, chosen: int) -> Path:
    """The path that ends in one particle of the last row."""
    taken, increments = [chosen], []
    for ancestors, gained in reversed(rows):
        increments.append(float(gained[taken[-1]]))
        taken.append(int(ancestors[taken[-1]]))
    at = zip(history, reversed(taken), strict=True)
    states = [jax.tree.map(lambda x, i=index: x[i], row) for row, index in at]
    return Path(states, [float(begun[taken[-1]]), *increments[::-1]])


def _joined(first: Any, others: Any) -> Any:
    """One state before those of others `(M, ...)`; None adds nothing."""
    if first is None:
        return others
    return jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, others)


@eqx.filter_jit
def _drawn(
    trigger: Any, kernel: Any, key: Array, time: Any, log_weights: Array, fixed: int
) -> tuple[Array, Array, Array]:
    """Whether to resample, ancestors `(N,)`, of which the first is its own where `fixed`, and keys of the rest."""
    n, step_key = log_weights.shape[0], keys.step(key, time)
    fire = jnp.asarray(trigger(log_weights, time))
    draw = form_of(kernel) if fixed else None
    own = jnp.arange(n, dtype=jnp.int32)

    def resampled() -> Array:
        drawn = keys.resampling(step_key)
        if draw is None:
            return kernel(drawn, log_weights, n)
        return draw(drawn, log_weights, n, 0, 0)

    ancestors = jax.lax.cond(fire, resampled, lambda: own)
    return fire, ancestors, jax.random.split(keys.move(step_key), n - fixed)


def _log_mean(log_weights: np.ndarray) -> float:
    most = log_weights.max()
    return float(most + np.log(np.mean(np.exp(log_weights - most, dtype=np.float64))))
