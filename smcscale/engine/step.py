"""ONE step of the particle filter, for all runs: resample, mutate, weigh, account for evidence.

Weights are carried unnormalised up to one scalar per run: after weighing, `logmeanexp(log_weights)`
is 0 and what was divided out sits in `log_evidence`. Whatever law resampling uses, the quotient of
the weights and that law stays in the weights here, in one place, so the evidence stays unbiased
under annealing, look-ahead, soft and optimal resampling alike (Pitt & Shephard 1999; Doucet &
Johansen 2011, section 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from smcscale import keys, status
from smcscale.engine import gather
from smcscale.engine.mutate import Mutated
from smcscale.status import Status
from smcscale.weights import ess, scale


class Population(NamedTuple):
    """All runs between two steps.

    Attributes:
        leaves: state leaves `(R, N, ...)`.
        log_weights: `(R, N)`, after weighing; `logmeanexp` over N is 0, or all are -inf.
        fire: `(R * M,)` bool, which islands resample before the next row; decided when the weights
            are made, so that the trigger shares their exponentials (ignored with a look-ahead).
        log_evidence: `(R,)`, nats.
        compensation: `(R,)`, of the running sum that the evidence is.
        eve: `(R, N)` int32, the initial ancestor of each particle; None unless it is wanted.
        num_resamplings: `(R,)` int32.
        status: first fault of each run.
        time: `()` int32, the next row.
    """

    leaves: list
    log_weights: Float[Array, "R N"]
    fire: Bool[Array, " RM"]
    log_evidence: Float[Array, " R"]
    compensation: Float[Array, " R"]
    eve: Int32[Array, "R N"] | None
    num_resamplings: Int32[Array, " R"]
    status: Status
    time: Int32[Array, ""]


class Info(NamedTuple):
    """What one step tells, each over runs: see `smcscale.result.Diagnostics`."""

    ess: Float[Array, " R"]
    resampled: Bool[Array, " R"]
    unique_ancestors: Int32[Array, " R"]
    beta: Float[Array, " R"]
    log_evidence: Float[Array, " R"]
    ancestors: Int32[Array, "R N"]
    mean: list
    variance: list
    costs: dict


class Resampled(NamedTuple):
    """A population after the resampling part of a step."""

    leaves: list
    log_weights: Array
    eve: Array | None
    ancestors: Array
    fired: Array
    unique: Array
    beta: Array


class Scheme(NamedTuple):
    """How a population is resampled.

    Attributes:
        resampling: kernel `(key, log_weights, n) -> ancestors`.
        trigger: `(log_weights, time) -> bool`.
        lookahead: `(log_weights, states, input, time) -> log_weights`, or None.
        tilts: `(log_weights, time) -> log_weights`, in order.
        corrected: whether the quotient of weights and resampling law is kept.
        num_islands: M; each island of N / M particles is resampled by itself.
        reads: leaves that the next step reads.
        passed: leaves that a step leaves as they are.
        heavy: leaves that are moved in place.
        view: leaves -> what a look-ahead sees of the states.
    """

    resampling: Any
    trigger: Any
    lookahead: Any
    tilts: tuple
    corrected: bool
    num_islands: int
    reads: tuple[bool, ...]
    passed: tuple[bool, ...]
    heavy: tuple[bool, ...]
    view: Any


def resample(
    scheme: Scheme,
    population: Population,
    step_keys: Key[Array, " R"],
    row: Any,
    *,
    num_particles: int | None = None,
) -> Resampled:
    """Resample the islands whose trigger fires; with `num_particles` all of them, to that number.

    Args:
        scheme: the kernels.
        population: after weighing at the row before.
        step_keys: `(R,)` keys of this step.
        row: the next row, for a look-ahead.
        num_particles: n, None to keep N.
    """
    lw = population.log_weights
    num_runs, before = lw.shape
    after = before if num_particles is None else num_particles
    islands = scheme.num_islands
    n, size = after // islands, before // islands
    grouped = lw.reshape(num_runs * islands, size)
    time = population.time

    viewed = grouped
    if scheme.lookahead is not None:
        states, next_row = scheme.view(
            [x.reshape(num_runs * islands, size, *x.shape[2:]) for x in population.leaves], row
        )
        viewed = jax.vmap(scheme.lookahead, in_axes=(0, 0, None, None))(
            grouped, states, next_row, time
        )
    tilted, beta = viewed, jnp.ones(num_runs * islands, lw.dtype)
    for tilt in scheme.tilts:
        if hasattr(tilt, "beta"):
            beta *= jax.vmap(tilt.beta, in_axes=(0, None))(tilted, time).astype(lw.dtype)
        tilted = jax.vmap(tilt, in_axes=(0, None))(tilted, time)
    keeps_quotient = scheme.corrected and (scheme.lookahead is not None or bool(scheme.tilts))

    if num_particles is None and scheme.lookahead is None and not scheme.tilts:
        alive = fire = population.fire  # only the living fire
    else:
        alive = jnp.any(tilted > -jnp.inf, axis=1)
        fire = jnp.ones(num_runs * islands, bool)
        if num_particles is None and scheme.lookahead is None:
            fire = population.fire & alive
        elif num_particles is None:
            fire = jax.vmap(scheme.trigger, in_axes=(0, None))(viewed, time) & alive
    light = tuple(
        (r or num_particles is not None) and not h
        for r, h in zip(scheme.reads, scheme.heavy, strict=True)
    )

    def same() -> Array:
        return jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (num_runs * islands, size))

    def within_run(ancestors: Array) -> Array:
        offsets = (jnp.arange(num_runs * islands, dtype=jnp.int32) % islands)[:, None] * size
        return (ancestors + offsets).reshape(num_runs, -1)

    def kernel_keys() -> Array:
        found = jax.vmap(keys.resampling)(step_keys)
        if num_particles is not None:
            found = jax.vmap(lambda k: jax.random.fold_in(k, 1))(found)
        if islands > 1:
            found = jax.vmap(
                lambda k: jax.vmap(lambda m: jax.random.fold_in(k, m))(jnp.arange(islands))
            )(found).reshape(-1)
        return found

    def do() -> tuple:
        # one island is here because it fires
        several = len(tilted) > 1 or num_particles is not None
        law = jnp.where((fire & alive)[:, None], tilted, 0.0) if several else tilted
        ancestors = jax.vmap(lambda k, v: scheme.resampling(k, v, n))(kernel_keys(), law)
        if any(scheme.heavy):
            ancestors = jax.vmap(gather.canonical)(ancestors)
        if several and num_particles is None:
            ancestors = jnp.where(fire[:, None], ancestors, same())
        # log-weights after resampling: of each particle, or one number for the island
        if keeps_quotient:
            norm = jax.nn.logsumexp(law, axis=1, keepdims=True) - jnp.log(float(size))
            quotient = jnp.where(tilted > -jnp.inf, grouped - tilted, -jnp.inf)
            new = jnp.take_along_axis(quotient, ancestors, axis=1) + norm
            new = jnp.where(alive[:, None], new, -jnp.inf)
        elif islands > 1 or num_particles is not None:
            new = jax.nn.logsumexp(grouped, axis=1, keepdims=True) - jnp.log(float(size))
        else:  # a run's mean weight is 1 already, an island's is not
            new = jnp.zeros((num_runs, 1), lw.dtype)

        def moved(indices: Array) -> tuple:
            leaves = gather.move(population.leaves, indices, light)
            eve = None
            if population.eve is not None:
                eve = jnp.take_along_axis(population.eve, indices, axis=1)
            chosen = [x for x, w in zip(leaves, light, strict=True) if w]
            return chosen, eve, gather.unique_ancestors(indices)

        indices = within_run(ancestors)
        chosen, eve, unique = gather.from_memory(indices, moved)
        return chosen, new.astype(lw.dtype), eve, indices, unique

    def skip() -> tuple:
        chosen = [x for x, w in zip(population.leaves, light, strict=True) if w]
        unique = jnp.full(num_runs, before, jnp.int32)
        kept = grouped if keeps_quotient else jnp.zeros((num_runs * islands, 1), lw.dtype)
        return chosen, kept, population.eve, within_run(same()), unique

    # a branch copies what it returns: the log-weights that one number replaces stay outside
    if num_particles is None:
        chosen, new, eve, ancestors, unique = jax.lax.cond(jnp.any(fire), do, skip)
        lw = jnp.where(fire[:, None], new, grouped).reshape(num_runs, before)
    else:
        chosen, new, eve, ancestors, unique = do()
        lw = jnp.broadcast_to(new, (num_runs * islands, n)).reshape(num_runs, after)
    moved = iter(chosen)
    leaves = [next(moved) if w else x for x, w in zip(population.leaves, light, strict=True)]
    if num_particles is None:
        leaves = gather.move_in_place(leaves, ancestors, scheme.heavy)
    else:
        leaves = [
            gather.move([x], ancestors, (True,))[0] if h else x
            for x, h in zip(leaves, scheme.heavy, strict=True)
        ]
    fired = jnp.any(fire.reshape(num_runs, islands), axis=1)
    beta = jnp.where(fire, beta, 1.0).reshape(num_runs, islands).min(axis=1)
    return Resampled(leaves, lw, eve, ancestors, fired, unique, beta)


def weigh(
    scheme: Scheme,
    population: Population,
    resampled: Resampled,
    mutated: Mutated,
    record: Any,
    *,
    first: bool = False,
) -> tuple[Population, Info]:
    """Add the step's log-weights, normalise, account for the evidence, measure.

    Args:
        scheme: the kernels, whose trigger decides about the next row here.
        population: before the step.
        resampled: after its resampling.
        mutated: after its transition, with the log-weights to add.
        record: leaves -> the real leaves `(R, N, ...)` whose filter moments are kept.
        first: the initial law: all leaves are new.
    """
    lw = resampled.log_weights + mutated.log_weights.astype(resampled.log_weights.dtype)
    num_particles = lw.shape[1]
    scaled, largest = jax.vmap(scale)(lw)
    total = jnp.sum(scaled, axis=1)
    # a NaN or +inf among the potentials shows in the maximum
    broken = jnp.isnan(largest) | (largest == jnp.inf)
    dead = total == 0
    fire = _decide(scheme, lw, dead, population.time + 1)
    effective = jax.vmap(ess)(lw)
    increment = jnp.where(dead, -jnp.inf, largest + jnp.log(total / num_particles))
    lw = jnp.where(dead[:, None], lw, lw - increment[:, None])
    log_evidence, compensation = _accumulate(
        population.log_evidence, population.compensation, increment
    )
    measured = record(mutated.leaves)
    mean, variance = _moments(scaled, total, measured)
    made = [x for x, p in zip(mutated.leaves, scheme.passed, strict=True) if first or not p]
    nan_state = _nan_states(made, measured, mean, lw.shape[0])
    new = Population(
        mutated.leaves,
        lw,
        fire,
        log_evidence,
        compensation,
        resampled.eve,
        population.num_resamplings + resampled.fired,
        status.update(population.status, population.time, broken, nan_state, dead),
        population.time + 1,
    )
    info = Info(
        effective,
        resampled.fired,
        resampled.unique,
        resampled.beta,
        log_evidence,
        resampled.ancestors,
        mean,
        variance,
        mutated.costs,
    )
    return new, info


def _decide(scheme: Scheme, log_weights: Array, dead: Array, time: Array) -> Array:
    """Which islands resample before row `time`; none that is all dead."""
    islands = log_weights.shape[0] * scheme.num_islands
    grouped = log_weights.reshape(islands, -1)
    if scheme.lookahead is not None:
        return jnp.zeros(islands, bool)
    if scheme.num_islands > 1:
        dead = jnp.all(grouped == -jnp.inf, axis=1)
    return jax.vmap(scheme.trigger, in_axes=(0, None))(grouped, time) & ~dead


def _accumulate(total: Array, compensation: Array, increment: Array) -> tuple[Array, Array]:
    """Compensated running sum: float32 evidence stays exact over many thousand steps."""
    shifted = increment - compensation
    new = total + shifted
    lost = (new - total) - shifted
    return new, jnp.where(jnp.isfinite(new), lost, 0.0)


def _moments(scaled: Array, total: Array, leaves: list) -> tuple[list, list]:
    """Weighted mean and variance of leaves `(R, N, ...)`, in one pass: shifted by a particle.

    `scaled` are weights `(R, N)` up to their sum `total`; NaN for a dead run.
    """
    means, variances = [], []
    for leaf in leaves:
        values = leaf.astype(scaled.dtype)
        shift = values[:, :1]
        centered = values - shift
        norm = total.reshape(-1, *(1,) * (values.ndim - 2))
        # one matrix product: faster on CPU than sums over the particles
        powers = jnp.stack([centered, centered * centered], axis=1)
        both = jnp.einsum("rkn...,rn->rk...", powers, scaled)
        first, second = both[:, 0] / norm, both[:, 1] / norm
        means.append(first + shift[:, 0])
        variances.append(jnp.maximum(second - first**2, 0.0))
    return means, variances


def _nan_states(leaves: list, measured: list, means: list, num_runs: int) -> Array:
    """Whether any inexact leaf of a run holds a NaN `(R,)`.

    A NaN among measured leaves shows in their mean, so they are searched only when it does.
    """
    inexact = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    seen = {id(x) for x in measured}

    def search(group: list) -> Array:
        found = jnp.zeros(num_runs, bool)
        for leaf in group:
            found |= jnp.any(jnp.isnan(leaf), axis=tuple(range(1, leaf.ndim)))
        return found

    covered = [x for x in inexact if id(x) in seen]
    found = search([x for x in inexact if id(x) not in seen])
    suspicious = jnp.zeros((), bool)
    for mean in means:
        suspicious |= jnp.any(jnp.isnan(mean))
    return found | jax.lax.cond(suspicious, lambda: search(covered), lambda: jnp.zeros_like(found))
