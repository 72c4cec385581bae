"""The compiled programs of a run: start, block of steps, resize, finish, explain.

They are keyed, as in `jax.jit`, on the program function (by identity), kernels and options (by
value) and the shapes of the arguments, and run the front end again on their own arguments: new data
of the same shape, a rebuilt filter or another seed compile nothing.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from smcscale import keys, status
from smcscale.engine import mutate
from smcscale.engine.bound import Bound, Plan, bind, make_plan, moment_tree, recorded, recorder
from smcscale.engine.step import Info, Population, Resampled, resample, weigh
from smcscale.engine.store import Kept
from smcscale.placement import spread
from smcscale.status import Status


class Meta(NamedTuple):
    """Static facts of a run that the host needs.

    Attributes:
        num_steps: T.
        first: first row that a transition makes: 0, or 1 with `inputs_at_start`.
        chunk: steps whose noise is drawn at once.
        noise_bytes: bytes of random numbers of one particle and step.
        state_bytes: bytes of one particle's recorded state.
        carried_bytes: bytes of one particle's carried state.
        parameters: sites before the loop that the body computes with.
        observed: observed sites of a row.
        has_readout: whether sites before or after the loop need another evaluation.
    """

    num_steps: int
    first: int
    chunk: int
    noise_bytes: int
    state_bytes: int
    carried_bytes: int
    parameters: tuple[str, ...]
    observed: tuple[str, ...]
    has_readout: bool


class Sizes(NamedTuple):
    """Static numbers of a run: particles, runs, islands, steps (None: from the rows)."""

    num_particles: int
    num_runs: int
    num_islands: int
    num_steps: int | None


def _start(
    pf: Any, run_keys: Array, sizes: Sizes, args: tuple, kwargs: dict, eve: bool
) -> tuple[Population, Info, Meta]:
    bound = bind(pf, args, kwargs, sizes.num_steps)
    population, info, plan = initial_population(pf, bound, run_keys, sizes, eve)
    lowered = bound.lowered
    meta = Meta(
        bound.num_steps,
        int(bound.model.capabilities.inputs_at_start),
        plan.mutation.chunk,
        4 * plan.mutation.elements,
        _particle_bytes(recorded(bound, plan, population.leaves)),
        _particle_bytes(population.leaves),
        plan.parameters,
        () if lowered is None else lowered.observed,
        lowered is not None and lowered.has_readout,
    )
    return population, info, meta


#: Draw the initial population of every run: population, its info, static facts.
start = eqx.filter_jit(_start)


def describe(pf: Any, run_keys: Array, sizes: Sizes, args: tuple, kwargs: dict) -> Meta:
    """Static facts of a run, from shapes alone."""
    return eqx.filter_eval_shape(_start, pf, run_keys, sizes, args, kwargs, False)[2]


def _particle_bytes(tree: Any) -> int:
    """Bytes of one particle of leaves `(R, N, ...)`; keys count their data."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        total += leaf.size * leaf.dtype.itemsize // (leaf.shape[0] * leaf.shape[1])
    return total


def initial_population(
    pf: Any, bound: Bound, run_keys: Array, sizes: Sizes, eve: bool
) -> tuple[Population, Info, Plan]:
    num_runs, n = run_keys.shape[0], sizes.num_particles
    row = jax.tree.map(lambda x: x[0], bound.inputs)
    leaves, log_weights, structure = mutate.draw_initial(
        bound.model, row, jax.vmap(keys.initial)(run_keys), n
    )
    leaves, log_weights = spread((leaves, log_weights))
    # weights that are all zero are a constant, which XLA would fold for seconds at large N
    log_weights = jax.lax.optimization_barrier(log_weights)
    plan = make_plan(pf, bound, leaves, structure, sizes.num_islands, run_keys.dtype)
    mutate.warn_of_constants(plan.mutation)
    carried = [leaves[i] for i in plan.packed]
    first = int(bound.model.capabilities.inputs_at_start)
    zeros = jnp.zeros(num_runs, log_weights.dtype)
    slots = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (num_runs, n))
    empty = Population(
        carried,
        jnp.zeros_like(log_weights),
        jnp.zeros(num_runs * sizes.num_islands, bool),
        zeros,
        zeros,
        slots if eve else None,
        jnp.zeros(num_runs, jnp.int32),
        status.start(num_runs),
        jnp.asarray(first - 1, jnp.int32),
    )
    unmoved = Resampled(
        carried,
        jnp.zeros_like(log_weights),
        empty.eve,
        slots,
        jnp.zeros(num_runs, bool),
        jnp.full(num_runs, n, jnp.int32),
        zeros + 1.0,
    )
    population, info = weigh(
        plan.scheme, empty, unmoved, mutate.Mutated(carried, log_weights, {}),
        recorder(bound, plan), first=True,
    )  # fmt: skip
    return population, info, plan


@eqx.filter_jit(donate="all-except-first")
def block(fixed: tuple, population: Population) -> tuple[Population, Info, Kept | None, Status]:
    """A block of steps: a loop over chunks, whose noise is drawn at once, of loops over steps.

    Args:
        fixed: `(pf, run_keys, sizes, args, kwargs, (steps, keep), stop)`; rows up to `stop` (a
            traced number) are made, the rest of the block's `steps` stays zero.
        population: donated.
    Returns:
        the population, its infos and what is kept `(B, ...)`, and a copy of the status that outlives
        the next call.
    """
    pf, run_keys, sizes, args, kwargs, (steps, keep), stop = fixed
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = plan_again(pf, bound, run_keys, sizes)
    chunk = plan.mutation.chunk
    first = population.time

    def make(pop: Population, step_keys: Array, frontier: tuple) -> tuple:
        pop, info = one_step(bound, plan, pop, step_keys, frontier, row_at(bound, pop.time))
        kept = None
        if keep:
            leaves = jax.tree.leaves(recorded(bound, plan, pop.leaves))
            kept = Kept(leaves, info.ancestors, pop.log_weights)
        return pop, (info._replace(ancestors=None), kept)

    def draw(start: Array) -> tuple:
        times = start + jnp.arange(chunk, dtype=jnp.int32)
        step_keys = jax.vmap(lambda t: jax.vmap(lambda k: keys.step(k, t))(run_keys))(times)
        return step_keys, jax.vmap(lambda ks: plan.mutation.noise(jax.vmap(keys.move)(ks)))(
            step_keys
        )

    def chunk_of_steps(index: Array, state: tuple) -> tuple:
        done = index * chunk
        given = draw(first + done)

        def one(i: Array, state: tuple) -> tuple:
            pop, out = state
            pop, told = make(pop, *_at(given, i))
            return pop, jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, done + i, 0), out, told
            )

        return jax.lax.fori_loop(0, jnp.minimum(stop - first - done, chunk), one, state)

    # loops of a traced number of steps, not scans: rows beyond the end are never made
    told = jax.eval_shape(lambda p: make(p, *_at(draw(first), 0))[1], population)
    empty = jax.tree.map(lambda t: jnp.zeros((steps, *t.shape), t.dtype), told)
    population, (info, kept) = jax.lax.fori_loop(
        0, (stop - first + chunk - 1) // chunk, chunk_of_steps, (population, empty)
    )
    now = jax.tree.map(lambda x: x + 0, population.status)
    return population, info, kept, now


def one_step(
    bound: Bound,
    plan: Plan,
    population: Population,
    step_keys: Array,
    frontier: tuple,
    row: Any,
) -> tuple[Population, Info]:
    """Resample, mutate, weigh: one row for all runs."""
    resampled = resample(plan.scheme, population, step_keys, row)
    resampled = resampled._replace(leaves=spread(resampled.leaves))
    mutated = plan.mutation.apply(frontier, plan.full(resampled.leaves), row)
    mutated = mutated._replace(leaves=spread([mutated.leaves[i] for i in plan.packed]))
    return weigh(plan.scheme, population, resampled, mutated, recorder(bound, plan))


@eqx.filter_jit
def resize(
    pf: Any,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population,
    num_particles: int,
) -> Population:
    """Join two segments of a schedule: resample every run from N to `num_particles`."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = plan_again(pf, bound, run_keys, sizes)
    step_keys = jax.vmap(lambda k: keys.step(k, population.time))(run_keys)
    row = row_at(bound, population.time)
    moved = resample(plan.scheme, population, step_keys, row, num_particles=num_particles)
    return population._replace(
        leaves=spread(moved.leaves),
        log_weights=spread(moved.log_weights),
        fire=jnp.zeros_like(population.fire),
        eve=moved.eve,
        num_resamplings=population.num_resamplings + 1,
    )


@functools.partial(jax.jit, static_argnums=2)
def joined(infos: list[Info], opening: Info | None, lengths: tuple[int, ...]) -> tuple:
    """What the steps told, runs first and rows after, and the costs by row.

    Args:
        infos: of the blocks, rows first.
        opening: of a first row that no block made.
        lengths: how many rows of each block count.
    """
    costs = [i.costs for i in infos]
    pieces = [
        jax.tree.map(lambda x, n=n: x[:n], i._replace(costs={}))
        for i, n in zip(infos, lengths, strict=True)
    ]
    if opening is not None:
        pieces = [jax.tree.map(lambda x: x[None], opening), *pieces]
    told = jax.tree.map(lambda *x: jnp.moveaxis(jnp.concatenate(x), 0, 1), *pieces)
    spent = [jax.tree.map(lambda x, n=n: x[:n], c) for c, n in zip(costs, lengths, strict=True)]
    return told, jax.tree.map(lambda *x: jnp.concatenate(x), *spent) if spent else {}


@eqx.filter_jit
def finish(
    pf: Any,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population,
    evaluate: bool,
) -> tuple[dict, Any, dict]:
    """Sites before the loop, of the last row, and after the loop, leaves `(R, N, ...)`."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = plan_again(pf, bound, run_keys, sizes)
    final = recorded(bound, plan, population.leaves)
    if bound.lowered is None:
        return {}, final, {}
    state = plan.state(population.leaves)
    if not evaluate:
        return state.before, final, {}
    before, after = jax.vmap(jax.vmap(bound.lowered.readout))(state)
    return before, final, after


@eqx.filter_jit
def explain(
    pf: Any,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population | None,
) -> tuple[dict, Any]:
    """Log potentials by site `(R, N)` of the step after `population` (None: the initial law).

    Returns them and the new state.
    """
    bound = bind(pf, args, kwargs, sizes.num_steps)
    if population is None:
        leaves, log_weights, structure = mutate.draw_initial(
            bound.model,
            jax.tree.map(lambda x: x[0], bound.inputs),
            jax.vmap(keys.initial)(run_keys),
            sizes.num_particles,
        )
        if bound.lowered is None:
            return {"log_potential": log_weights}, jax.tree.unflatten(structure, leaves)
        state, lowered = jax.tree.unflatten(structure, leaves), bound.lowered
        told = jax.vmap(jax.vmap(lambda s: lowered.explain(None, s, s, None)))(state)
        return told or {"log_weight": log_weights}, {**state.before, "carry": state.carry}
    plan = plan_again(pf, bound, run_keys, sizes)
    time = population.time
    step_keys = jax.vmap(lambda k: keys.step(k, time))(run_keys)
    row = row_at(bound, time)
    resampled = resample(plan.scheme, population, step_keys, row)
    frontier = plan.mutation.noise(jax.vmap(keys.move)(step_keys))
    previous = plan.full(resampled.leaves)
    mutated = plan.mutation.apply(frontier, previous, row)
    if bound.lowered is None:
        new = jax.tree.unflatten(plan.structure, mutated.leaves)
        return {"log_potential": mutated.log_weights}, new
    lowered, structure = bound.lowered, plan.structure
    old, new = (jax.tree.unflatten(structure, x) for x in (previous, mutated.leaves))
    told = jax.vmap(jax.vmap(lambda p, s: lowered.explain(None, p, s, row)))(old, new)
    return told or {"log_weight": mutated.log_weights}, {**new.sites, "carry": new.carry}


def plan_again(pf: Any, bound: Bound, run_keys: Array, sizes: Sizes) -> Plan:
    """The plan from shapes alone, in a trace that does not draw the initial population."""
    row = jax.tree.map(lambda x: x[0], bound.inputs)
    structure: list = []

    def shapes(ks: Array) -> list:
        leaves, _, treedef = mutate.draw_initial(
            bound.model, row, jax.vmap(keys.initial)(ks), sizes.num_particles
        )
        structure[:] = [treedef]
        return leaves

    leaves = jax.eval_shape(shapes, run_keys)
    return make_plan(pf, bound, leaves, structure[0], sizes.num_islands, run_keys.dtype)


def _at(rows: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), rows)


def row_at(bound: Bound, time: Array) -> Any:
    """One row of the inputs."""
    return _at(bound.inputs, time)


@eqx.filter_jit
def final_states(
    pf: Any, run_keys: Array, sizes: Sizes, args: tuple, kwargs: dict, population: Population
) -> Any:
    """The particles' whole states, leaves `(R, N, ...)`."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    return plan_again(pf, bound, run_keys, sizes).state(population.leaves)


@eqx.filter_jit
def missing(pf: Any, args: tuple, kwargs: dict) -> dict:
    """NaN rows by observed site: `{site: (any NaN (T,), part of a joint event NaN (T,))}`."""
    lowered = bind(pf, args, kwargs, None).lowered
    return {} if lowered is None else lowered.missing()


def moments_structure(final: Any, lowered: bool) -> Any:
    """Structure of the pytree whose filter moments are kept, from the final record."""
    return jax.tree.structure(moment_tree(final, lowered))
