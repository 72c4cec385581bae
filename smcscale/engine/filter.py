"""`ParticleFilter`: what is run, and the three compiled programs: start, block, online step.

The compiled programs are keyed, as in `jax.jit`, on the program function (by identity), kernels and
options (by value) and the shapes of the arguments. Each of them runs the front end again on its own
arguments, so no jaxpr is stored between calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from smcscale import keys, status
from smcscale.engine import mutate
from smcscale.engine.mutate import Mutation
from smcscale.engine.step import Info, Population, Resampled, Scheme, resample, weigh
from smcscale.engine.store import Kept
from smcscale.feynman_kac import FeynmanKac, Weighted, weighted
from smcscale.kernels import resampling as resampling_kernels
from smcscale.kernels.triggers import ess_below
from smcscale.program.lower import Lowered, ProgramState, lower
from smcscale.program.scan import Row

_STORES = ("auto", "last", "ancestry", "paths")


class ParticleFilter(eqx.Module):
    """The particle filter of a program: bootstrap, guided, auxiliary, with annealed resampling.

    Args:
        program: NumPyro program with one `numpyro.contrib.control_flow.scan`, or `FeynmanKac`.
        guide: a second program with the same latent sites, as proposal.
        proposal: `sample(key, previous, input)` and `log_prob(previous, state, input)`; excludes
            `guide`. For a program, `previous` is the loop's carry and a state is
            `{site: value}`; for a `FeynmanKac` model its state, and `log_transition` is needed.
        resampling: kernel `(key, log_weights, n) -> ancestors`.
        trigger: `(log_weights, time) -> bool`, whether to resample before the next move.
        annealing: tilt `(log_weights, time) -> log_weights` by an inverse temperature.
        lookahead: tilt `(log_weights, states, input, time) -> log_weights` by the next row.
        tilt: a further tilt (soft, optimal, stop-gradient).
        move: reserved for rejuvenation; must be None.
        store: "last", "ancestry", "paths", or "auto": paths up to 512 MB, else last.
        nan_is_missing: mask NaN elements of observed sites.
    Raises:
        TypeError, ValueError: for what cannot be combined, by argument name.

    Source: Gordon, Salmond & Smith (1993); Pitt & Shephard (1999); Doucet & Johansen (2011).
    """

    program: Any
    guide: Any
    proposal: Any
    resampling: Any
    trigger: Any
    annealing: Any
    lookahead: Any
    tilt: Any
    store: str = eqx.field(static=True)
    nan_is_missing: bool = eqx.field(static=True)

    def __init__(
        self,
        program: Callable[..., Any] | FeynmanKac,
        *,
        guide: Callable[..., Any] | None = None,
        proposal: Any = None,
        resampling: Any = resampling_kernels.systematic,
        trigger: Any = ess_below(0.5),  # noqa: B008 (compared by value)
        annealing: Any = None,
        lookahead: Any = None,
        tilt: Any = None,
        move: Any = None,
        store: str = "auto",
        nan_is_missing: bool = False,
    ):
        if not (callable(program) or isinstance(program, FeynmanKac)):
            raise TypeError(
                f"smcscale: `program` must be a NumPyro program or a FeynmanKac model, got "
                f"{type(program).__name__}."
            )
        if guide is not None and proposal is not None:
            raise ValueError(
                "smcscale: `guide` and `proposal` are two ways to say the same.\n  try: one of them."
            )
        if isinstance(program, FeynmanKac):
            if guide is not None:
                raise ValueError(
                    "smcscale: a FeynmanKac model takes no `guide`.\n  try: `proposal=`."
                )
            if program.capabilities.host:
                raise NotImplementedError(
                    "smcscale: this FeynmanKac model declares Capabilities(host=True); the compiled "
                    "particle filter cannot run Python in a step.\n  try: a traced transition."
                )
            if proposal is not None and program.log_transition is None:
                raise ValueError(
                    "smcscale: a proposal needs the model's transition density, which it lacks.\n"
                    "  try: FeynmanKac(..., log_transition=...)."
                )
        for name, value in (
            ("resampling", resampling),
            ("trigger", trigger),
            ("annealing", annealing),
            ("lookahead", lookahead),
            ("tilt", tilt),
            ("guide", guide),
        ):
            required = name in ("resampling", "trigger")
            if not callable(value) and (required or value is not None):
                raise TypeError(
                    f"smcscale: `{name}` must be a kernel (a function), got {value!r}.\n"
                    f"  try: an object of smcscale.kernels, for example "
                    f"{_EXAMPLES[name]}."
                )
        if move is not None:
            raise NotImplementedError(
                "smcscale: `move` inside ParticleFilter is not available yet.\n  try: move=None."
            )
        if store not in _STORES:
            raise ValueError(
                f"smcscale: `store` must be one of {', '.join(_STORES)}, got {store!r}."
            )
        self.program = program
        self.guide = guide
        self.proposal = proposal
        self.resampling = resampling
        self.trigger = trigger
        self.annealing = annealing
        self.lookahead = lookahead
        self.tilt = tilt
        self.store = store
        self.nan_is_missing = nan_is_missing

    @property
    def biases(self) -> tuple[str, ...]:
        """What the chosen kernels declare, such as `"asymptotic: metropolis"`."""
        pieces = (self.resampling, self.lookahead, self.annealing, self.tilt)
        return tuple(
            f"{piece.bias}: {getattr(piece, '__name__', type(piece).__name__)}"
            for piece in pieces
            if getattr(piece, "bias", None)
        )

    def init(
        self, key: Array, num_particles: int, *args: Any, **kwargs: Any
    ) -> "OnlineState":
        """Draw the initial population, for use row by row.

        Args:
            key: consumed.
            num_particles: N.
            *args: the program's arguments as in `SMC.run`; the scanned leaves only show shape and
                dtype (one row is enough) and are not consumed.
            **kwargs: the program's keyword arguments.
        Returns:
            `OnlineState`, a pytree that jits and scans.
        """
        dynamic, static = eqx.partition((args, kwargs), eqx.is_array_like)
        return _online_init(self, keys.as_key(key), num_particles, dynamic, _Static(static))

    def step(
        self, key: Array, state: "OnlineState", input: Any = None
    ) -> tuple["OnlineState", "OnlineInfo"]:
        """One row: resample if the trigger fires, move, weigh.

        Args:
            key: consumed; another one for each step.
            state: from `init` or `step`.
            input: one row of the scanned inputs.
        Returns:
            the new state, and `OnlineInfo`.
        """
        return _online_step(self, keys.as_key(key), state, input)


_EXAMPLES = {
    "resampling": "resampling.systematic",
    "trigger": "triggers.ess_below(0.5)",
    "annealing": "annealing.ESSFloor(0.5)",
    "lookahead": "lookahead.LookAhead(log_eta)",
    "tilt": "tilts.Soft(0.5)",
    "guide": "a NumPyro program with the same latent sites",
}


class Bound(NamedTuple):
    """A model with its rows: what both kinds of program come down to."""

    model: FeynmanKac
    inputs: Any
    num_steps: int
    lowered: Lowered | None


def bind(pf: ParticleFilter, args: tuple, kwargs: dict, num_steps: int | None) -> Bound:
    """Lower a program with its arguments, or take the rows of a Feynman-Kac model."""
    if not isinstance(pf.program, FeynmanKac):
        lowered = lower(
            pf.program,
            args,
            kwargs,
            guide=pf.guide,
            proposal=pf.proposal,
            nan_is_missing=pf.nan_is_missing,
        )
        return Bound(lowered.model, lowered.inputs, lowered.num_steps, lowered)
    if len(args) > 1 or kwargs:
        raise TypeError(
            f"smcscale: a FeynmanKac model takes its rows as one argument, got {len(args)} "
            f"arguments and keywords {sorted(kwargs)}.\n  try: run(key, inputs)."
        )
    inputs = jax.tree.map(jnp.asarray, args[0]) if args else None
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(inputs)}
    if len(lengths) > 1:
        raise ValueError(
            f"smcscale: leaves of `inputs` have different numbers of rows: {sorted(lengths)}.\n"
            "  try: leaves of shape (T, ...)."
        )
    if lengths:
        num_steps = lengths.pop()
    if not num_steps or num_steps < 1:
        raise ValueError(
            "smcscale: the number of steps is not known.\n"
            "  try: run(key, inputs) with rows, or run(key, num_steps=T)."
        )
    return Bound(_proposed(pf.program, pf.proposal), inputs, num_steps, None)


def _proposed(model: FeynmanKac, proposal: Any) -> FeynmanKac:
    """A Feynman-Kac model with its transition drawn from a proposal instead."""
    if proposal is None:
        return model
    log_transition = model.log_transition
    assert log_transition is not None

    def transition(key: Any, previous: Any, input: Any) -> Weighted:
        state = proposal.sample(key, previous, input)
        ratio = log_transition(previous, state, input) - proposal.log_prob(previous, state, input)
        return Weighted(state, ratio)

    return FeynmanKac(
        model.initial,
        transition,
        model.log_potential,
        log_transition=log_transition,
        heavy=model.heavy,
        capabilities=model.capabilities,
        record=model.record,
        cost=model.cost,
    )


class Plan(NamedTuple):
    """Everything about a bound model that its shapes decide, made anew in each trace.

    Attributes:
        mutation: the batched step.
        scheme: the kernels.
        structure: of the state.
        packed: indices of the state leaves that are carried.
        unpack: for each state leaf, its place among the carried ones.
        parameters: sites before the loop that the body computes with.
    """

    mutation: Mutation
    scheme: Scheme
    structure: Any
    packed: tuple[int, ...]
    unpack: tuple[int, ...]
    parameters: tuple[str, ...]

    def full(self, carried: list) -> list:
        """All state leaves, from the carried ones."""
        return [carried[i] for i in self.unpack]

    def state(self, carried: list) -> Any:
        """The state pytree, leaves `(R, N, ...)`."""
        return jax.tree.unflatten(self.structure, self.full(carried))


def make_plan(
    pf: ParticleFilter,
    bound: Bound,
    leaves: list,
    structure: Any,
    num_particles: int,
    num_islands: int,
    key_dtype: Any,
) -> Plan:
    """Plan the step for states like `leaves`, `(R, N, ...)` arrays or abstract."""
    one = [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in leaves]
    row = jax.tree.map(lambda x: x[0], bound.inputs)
    step = mutate.mutation(bound.model, one, structure, row, num_particles, key_dtype)
    # a leaf that nobody reads and that equals an earlier one is carried once
    packed = tuple(
        i for i, first in enumerate(step.aliases) if first == i or step.reads[i]
    )
    unpack = tuple(
        packed.index(i) if i in packed else packed.index(first)
        for i, first in enumerate(step.aliases)
    )
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure, one))
    ]
    heavy_names = bound.model.heavy or ()
    heavy = tuple(any(name in paths[i] for name in heavy_names) for i in packed)
    parameters: tuple[str, ...] = ()
    if bound.lowered is not None:
        marks: ProgramState = jax.tree.unflatten(structure, list(step.uses))
        parameters = tuple(n for n, used in marks.before.items() if any(jax.tree.leaves(used)))
    tilts = tuple(t for t in (pf.annealing, pf.tilt) if t is not None)
    corrected = all(getattr(t, "corrected", True) for t in (*tilts, pf.lookahead))

    def view(carried: list, next_row: Any) -> tuple:
        state = jax.tree.unflatten(structure, [carried[i] for i in unpack])
        if bound.lowered is None:
            return state, next_row
        return state.carry, next_row.row

    scheme = Scheme(
        pf.resampling,
        pf.trigger,
        pf.lookahead,
        tilts,
        corrected,
        num_islands,
        tuple(step.reads[i] for i in packed),
        heavy,
        view,
    )
    return Plan(step, scheme, structure, packed, unpack, parameters)


class Meta(NamedTuple):
    """Static facts of a run that the host needs.

    Attributes:
        num_steps: T.
        first: first row that a transition makes: 0, or 1 with `inputs_at_start`.
        chunk: steps whose noise is drawn at once.
        state_bytes: bytes of one particle's recorded state.
        carried_bytes: bytes of one particle's carried state.
        parameters: sites before the loop that the body computes with.
        observed: observed sites of a row.
        record_structure: of the recorded pytree.
        moments_structure: of the moments' pytree, see `moment_leaves`.
        has_readout: whether sites before or after the loop need another evaluation.
    """

    num_steps: int
    first: int
    chunk: int
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


def recorded(bound: Bound, plan: Plan, carried: list) -> Any:
    """The pytree that results keep of the states, leaves `(R, N, ...)`."""
    state = plan.state(carried)
    return state if bound.model.record is None else bound.model.record(state)


def moment_tree(record: Any, lowered: bool) -> Any:
    """The part of a record whose filter moments are kept: real arrays (of sites that are arrays)."""

    def real(x: Any) -> bool:
        return hasattr(x, "dtype") and (
            jnp.issubdtype(x.dtype, jnp.floating)
            or jnp.issubdtype(x.dtype, jnp.integer)
            or x.dtype == jnp.bool_
        )

    if lowered:
        return {n: v for n, v in record.items() if real(v)}
    return jax.tree.map(lambda x: x if real(x) else None, record)


def _recorder(bound: Bound, plan: Plan) -> Callable[[list], list]:
    return lambda carried: jax.tree.leaves(
        moment_tree(recorded(bound, plan, carried), bound.lowered is not None)
    )


class _Static(eqx.Module):
    """Arguments that are not arrays, compared by value."""

    value: Any = eqx.field(static=True)


@eqx.filter_jit
def start(
    pf: ParticleFilter, run_keys: Array, sizes: Sizes, args: tuple, kwargs: dict, eve: bool
) -> tuple[Population, Info, Meta, Any]:
    """Draw the initial population of every run: population, its info, static facts, record."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    population, info, plan = _start(pf, bound, run_keys, sizes, eve)
    first = int(bound.model.capabilities.inputs_at_start)
    record = recorded(bound, plan, population.leaves)
    bytes_of = lambda tree: sum(  # noqa: E731
        x.size * x.dtype.itemsize // (x.shape[0] * x.shape[1]) for x in jax.tree.leaves(tree)
    )
    meta = Meta(
        bound.num_steps,
        first,
        plan.mutation.chunk,
        bytes_of(record),
        bytes_of([x for x in population.leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]),
        plan.parameters,
        () if bound.lowered is None else bound.lowered.observed,
        bound.lowered is not None and bound.lowered.has_readout,
    )
    return population, info, meta, record


def _start(
    pf: ParticleFilter, bound: Bound, run_keys: Array, sizes: Sizes, eve: bool
) -> tuple[Population, Info, Plan]:
    num_runs, n = run_keys.shape[0], sizes.num_particles
    row = jax.tree.map(lambda x: x[0], bound.inputs)
    leaves, log_weights, structure = mutate.draw_initial(
        bound.model, row, jax.vmap(keys.initial)(run_keys), n
    )
    plan = make_plan(pf, bound, leaves, structure, n, sizes.num_islands, run_keys.dtype)
    carried = [leaves[i] for i in plan.packed]
    first = int(bound.model.capabilities.inputs_at_start)
    zeros = jnp.zeros(num_runs, log_weights.dtype)
    slots = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (num_runs, n))
    empty = Population(
        carried,
        jnp.zeros_like(log_weights),
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
        empty, unmoved, mutate.Mutated(carried, log_weights, {}), _recorder(bound, plan)
    )
    return population, info, plan


@eqx.filter_jit(donate="all-except-first")
def block(
    fixed: tuple, population: Population
) -> tuple[Population, Info, Kept | None]:
    """A block of steps: a scan over chunks, whose noise is drawn at once, of scans over steps.

    Args:
        fixed: `(pf, run_keys, sizes, args, kwargs, (chunks, keep), stop)`; rows up to `stop` (a
            traced number) are made, the rest of the block is skipped.
        population: donated.
    """
    pf, run_keys, sizes, args, kwargs, (num_chunks, keep), stop = fixed
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = _plan_again(pf, bound, run_keys, sizes)
    chunk = plan.mutation.chunk
    first = population.time

    def advance(pop: Population, step_keys: Array, frontier: tuple) -> tuple:
        pop, info = one_step(bound, plan, pop, step_keys, frontier, _row(bound, pop.time))
        kept = None
        if keep:
            leaves = jax.tree.leaves(recorded(bound, plan, pop.leaves))
            kept = Kept(leaves, info.ancestors, pop.log_weights)
        return pop, (info._replace(ancestors=None), kept)

    def one(pop: Population, given: tuple) -> tuple:
        step_keys, frontier = given
        skipped = jax.eval_shape(lambda p: advance(p, step_keys, frontier)[1], pop)
        return jax.lax.cond(
            pop.time < stop,
            lambda p: advance(p, step_keys, frontier),
            lambda p: (p, jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), skipped)),
            pop,
        )

    def chunk_of_steps(pop: Population, index: Array) -> tuple:
        times = first + index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        step_keys = jax.vmap(lambda t: jax.vmap(lambda k: keys.step(k, t))(run_keys))(times)
        frontier = jax.vmap(lambda ks: plan.mutation.noise(jax.vmap(keys.move)(ks)))(step_keys)
        return jax.lax.scan(one, pop, (step_keys, frontier))

    population, out = jax.lax.scan(
        chunk_of_steps, population, jnp.arange(num_chunks, dtype=jnp.int32)
    )
    info, kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    return population, info, kept


def one_step(
    bound: Bound, plan: Plan, population: Population, step_keys: Array, frontier: tuple, row: Any
) -> tuple[Population, Info]:
    """Resample, mutate, weigh: one row for all runs."""
    resampled = resample(plan.scheme, population, step_keys, row)
    mutated = plan.mutation.apply(frontier, plan.full(resampled.leaves), row)
    mutated = mutated._replace(leaves=[mutated.leaves[i] for i in plan.packed])
    return weigh(population, resampled, mutated, _recorder(bound, plan))


@eqx.filter_jit
def resize(
    pf: ParticleFilter,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population,
    num_particles: int,
) -> Population:
    """Join two segments of a schedule: resample every run from N to `num_particles`."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = _plan_again(pf, bound, run_keys, sizes)
    step_keys = jax.vmap(lambda k: keys.step(k, population.time))(run_keys)
    row = _row(bound, population.time)
    moved = resample(plan.scheme, population, step_keys, row, num_particles=num_particles)
    return population._replace(
        leaves=moved.leaves,
        log_weights=moved.log_weights,
        eve=moved.eve,
        num_resamplings=population.num_resamplings + 1,
    )


@eqx.filter_jit
def finish(
    pf: ParticleFilter,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population,
    evaluate: bool,
) -> tuple[dict, Any, dict]:
    """Sites before the loop, of the last row, and after the loop, leaves `(R, N, ...)`."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = _plan_again(pf, bound, run_keys, sizes)
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
    pf: ParticleFilter,
    run_keys: Array,
    sizes: Sizes,
    args: tuple,
    kwargs: dict,
    population: Population | None,
) -> dict:
    """Log potentials by site `(R, N)` of the step after `population` (None: the initial law)."""
    bound = bind(pf, args, kwargs, sizes.num_steps)
    if population is None:
        leaves, log_weights, structure = mutate.draw_initial(
            bound.model,
            jax.tree.map(lambda x: x[0], bound.inputs),
            jax.vmap(keys.initial)(run_keys),
            sizes.num_particles,
        )
        if bound.lowered is None:
            return {"log_potential": log_weights}
        state = jax.tree.unflatten(structure, leaves)
        told = jax.vmap(jax.vmap(lambda s: bound.lowered.explain(None, s, s, None)))(state)
        return told or {"log_weight": log_weights}
    plan = _plan_again(pf, bound, run_keys, sizes)
    time = population.time
    step_keys = jax.vmap(lambda k: keys.step(k, time))(run_keys)
    row = _row(bound, time)
    resampled = resample(plan.scheme, population, step_keys, row)
    frontier = plan.mutation.noise(jax.vmap(keys.move)(step_keys))
    previous = plan.full(resampled.leaves)
    mutated = plan.mutation.apply(frontier, previous, row)
    if bound.lowered is None:
        return {"log_potential": mutated.log_weights}
    lowered, structure = bound.lowered, plan.structure
    told = jax.vmap(jax.vmap(lambda p, s: lowered.explain(None, p, s, row)))(
        jax.tree.unflatten(structure, previous), jax.tree.unflatten(structure, mutated.leaves)
    )
    return told or {"log_weight": mutated.log_weights}


def _plan_again(pf: ParticleFilter, bound: Bound, run_keys: Array, sizes: Sizes) -> Plan:
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
    return make_plan(
        pf, bound, leaves, structure[0], sizes.num_particles, sizes.num_islands, run_keys.dtype
    )


def _row(bound: Bound, time: Array) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, time, keepdims=False), bound.inputs
    )


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


@eqx.filter_jit
def _online_init(
    pf: ParticleFilter, key: Array, num_particles: int, dynamic: Any, static: _Static
) -> OnlineState:
    args, kwargs = eqx.combine(dynamic, static.value)
    bound = bind(pf, args, kwargs, 1)
    population, _, plan = _start(pf, bound, key[None], Sizes(num_particles, 1, 1, 1), False)
    return OnlineState(population, dynamic, static, plan.structure, plan.unpack)


@eqx.filter_jit
def _online_step(
    pf: ParticleFilter, key: Array, state: OnlineState, input: Any
) -> tuple[OnlineState, OnlineInfo]:
    args, kwargs = eqx.combine(state.arguments, state.static.value)
    bound = bind(pf, args, kwargs, 1)
    population = state.population
    sizes = Sizes(population.log_weights.shape[1], 1, 1, 1)
    step_keys = key[None]
    plan = _plan_again(pf, bound, step_keys, sizes)
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


def observations(pf: ParticleFilter, args: tuple, kwargs: dict) -> dict:
    """Missing values by observed site: `{site: (any NaN (T,), partly NaN event (T,))}`."""
    bound = bind(pf, args, kwargs, None)
    assert bound.lowered is not None
    return bound.lowered.missing()


__all__ = ["OnlineInfo", "OnlineState", "ParticleFilter", "weighted"]
