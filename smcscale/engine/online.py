"""The filter row by row: for streams, and for loops of the user's own that jit or scan it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from smcscale import keys
from smcscale.engine.bound import Bound, bind
from smcscale.engine.compiled import Sizes, initial_population, one_step, plan_again
from smcscale.engine.step import Population
from smcscale.program.scan import Row


class _Static(eqx.Module):
    """Arguments that are not arrays, compared by value."""

    value: Any = eqx.field(static=True)


class OnlineState(eqx.Module):
    """A population between two rows, for use row by row; a pytree that jits and scans.

    Attributes:
        population: the engine's population, with a run axis of 1.
        arguments: the program's array arguments.
        static: its other arguments.
    """

    population: Population
    arguments: Any
    static: _Static
    structure: Any = eqx.field(static=True)
    unpack: tuple[int, ...] = eqx.field(static=True)

    @property
    def states(self) -> PyTree:
        """The particles' states, leaves `(N, ...)`."""
        carried = self.population.leaves
        return jax.tree.unflatten(self.structure, [carried[i][0] for i in self.unpack])

    @property
    def log_weights(self) -> Array:
        """`(N,)`, scaled so that their logmeanexp is 0."""
        return self.population.log_weights[0]

    @property
    def log_evidence(self) -> Array:
        """`()`, nats, of all rows so far."""
        return self.population.log_evidence[0]

    @property
    def time(self) -> Array:
        """`()` int32, the next row."""
        return self.population.time


class OnlineInfo(NamedTuple):
    """What one online step tells.

    Attributes:
        ess: `()`, after weighing.
        resampled: `()` bool, whether the population was resampled before the move.
        ancestors: `(N,)` int32.
        log_evidence_increment: `()`, nats, log predictive density of the row.
        code: `()` int32, `smcscale.status` code, 0 while all is well.
    """

    ess: Array
    resampled: Array
    ancestors: Array
    log_evidence_increment: Array
    code: Array


def init(pf: Any, key: Array, num_particles: int, args: tuple, kwargs: dict) -> OnlineState:
    """The initial population as `ParticleFilter.init` returns it."""
    dynamic, static = eqx.partition((args, kwargs), eqx.is_array)
    return _init(pf, key, num_particles, dynamic, _Static(static))


@eqx.filter_jit
def _init(pf: Any, key: Array, num_particles: int, dynamic: Any, static: _Static) -> OnlineState:
    args, kwargs = eqx.combine(dynamic, static.value)
    bound = bind(pf, args, kwargs, 1)
    population, _, plan = initial_population(
        pf, bound, key[None], Sizes(num_particles, 1, 1, 1), False
    )
    return OnlineState(population, dynamic, static, plan.structure, plan.unpack)


@eqx.filter_jit
def step(pf: Any, key: Array, state: OnlineState, input: Any) -> tuple[OnlineState, OnlineInfo]:
    args, kwargs = eqx.combine(state.arguments, state.static.value)
    bound = bind(pf, args, kwargs, 1)
    population = state.population
    sizes = Sizes(population.log_weights.shape[1], 1, 1, 1)
    step_keys = key[None]
    plan = plan_again(pf, bound, step_keys, sizes)
    row = input
    if bound.lowered is not None:
        row = _online_row(bound, population.time, input, pf.guide is not None)
    frontier = plan.mutation.noise(jax.vmap(keys.move)(step_keys))
    new, info = one_step(bound, plan, population, step_keys, frontier, row)
    told = OnlineInfo(
        info.ess[0],
        info.resampled[0],
        info.ancestors[0],
        new.log_evidence[0] - population.log_evidence[0],
        new.status.code[0],
    )
    return OnlineState(new, state.arguments, state.static, state.structure, state.unpack), told


def _online_row(bound: Bound, time: Array, input: Any, guided: bool) -> Row:
    """A program's row from one row of its scanned inputs."""
    expected = jax.tree.map(lambda x: x[0], bound.inputs)
    _check_row(input, expected.row)
    row = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), input, expected.row)
    guide = row if guided else None
    if guided and jax.tree.structure(guide) != jax.tree.structure(expected.guide):
        raise ValueError(
            "smcscale: the guide scans over other inputs than the program, so one row does not "
            "serve both.\n  try: the same scanned inputs in program and guide."
        )
    return Row(time, row, guide, jnp.asarray(False))


def _check_row(input: Any, expected: Any) -> None:
    if jax.tree.structure(input) != jax.tree.structure(expected):
        raise ValueError(
            f"smcscale: `input` has structure {jax.tree.structure(input)}; the loop scans over "
            f"{jax.tree.structure(expected)}.\n  try: one row of the scanned inputs."
        )
    for got, like in zip(jax.tree.leaves(input), jax.tree.leaves(expected), strict=True):
        if jnp.shape(got) != like.shape:
            raise ValueError(
                f"smcscale: `input` has a leaf of shape {jnp.shape(got)}; a row has {like.shape}.\n"
                "  try: one row, without the time axis."
            )
