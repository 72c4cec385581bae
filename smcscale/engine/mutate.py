"""One particle's transition and potential, run for all particles of all runs.

States are flat lists of leaves `(R, N, ...)`. Random numbers are parted from the rest of the step
(`smcscale.noise`), so that those of many steps are drawn at once outside the time loop.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smcscale.feynman_kac import Advanced, FeynmanKac, weighted
from smcscale.noise import split_noise

#: elements of noise drawn at once: enough to share the cost of a draw among steps
_CHUNK_ELEMENTS = 3 << 18
#: beyond this many in one step the cost is nothing, and more than two steps leave the cache
_LARGE_STEP = 1 << 16
_CHUNK_STEPS = 128
#: and no more than this over all runs, for memory's sake
_CHUNK_TOTAL = 1 << 22
_LARGE_CONSTANT = 1 << 20


class Mutated(NamedTuple):
    """What a step gave, over runs and particles.

    Attributes:
        leaves: state leaves `(R, N, ...)`.
        log_weights: `(R, N)`, what is added to the log-weights.
        costs: by name, `(R,)` sums over particles.
    """

    leaves: list
    log_weights: Any
    costs: dict


class Mutation(NamedTuple):
    """A batched step.

    Attributes:
        noise: `(keys (R,)) -> frontier`, arrays `(R, N, ...)` (or `(R, ...)` for native samplers).
        apply: `(frontier, leaves, row) -> Mutated`.
        chunk: steps whose noise is drawn at once; a function of N and the program only.
        elements: random numbers of one particle and step.
        reads: per state leaf, whether the step reads the previous one.
        uses: per state leaf, whether something is computed from the previous one.
        aliases: per state leaf, the first leaf that is the same array after a step.
        passed: per state leaf, whether a step leaves it as it is.
        constant_bytes: bytes of arrays that the step closes over.
    """

    noise: Callable[[Any], tuple]
    apply: Callable[[tuple, list, Any], Mutated]
    chunk: int
    elements: int
    reads: tuple[bool, ...]
    uses: tuple[bool, ...]
    aliases: tuple[int, ...]
    passed: tuple[bool, ...]
    constant_bytes: int


def warn_of_constants(mutation: Mutation) -> None:
    """Say, once for each compiled start, that large arrays were closed over."""
    if mutation.constant_bytes > _LARGE_CONSTANT:
        warnings.warn(
            f"smcscale: the program closes over {mutation.constant_bytes / 2**20:.0f} MB of arrays, "
            "which become constants of the compiled program.\n"
            "  try: pass them to `run` as arguments.",
            stacklevel=2,
        )


def draw_initial(model: FeynmanKac, row: Any, keys: Any, num_particles: int) -> tuple:
    """Draw every run's particles from the initial law.

    Args:
        model: the Feynman-Kac model.
        row: row 0, for a model with `inputs_at_start`.
        keys: `(R,)`.
        num_particles: N.
    Returns:
        leaves `(R, N, ...)`, log-weights `(R, N)`, the state's structure.
    """
    at_start = model.capabilities.inputs_at_start
    structure: list = []

    def start(key: Any, *row_leaves: Any) -> list:
        given = jax.tree.unflatten(row_structure, row_leaves)
        out = weighted(model.initial(key, given) if at_start else model.initial(key))
        log_weight = out.log_increment
        if at_start:
            log_weight = log_weight + model.log_potential(out.state, out.state, given)
        leaves, treedef = jax.tree.flatten(out.state)
        structure[:] = [treedef]
        return [log_weight, *map(jnp.asarray, leaves)]

    row_leaves, row_structure = jax.tree.flatten(row if at_start else None)
    split = split_noise(start, keys.dtype, row_leaves, len(row_leaves))
    axes = tuple(0 if b else None for b in split.batched)

    def one_run(key: Any) -> list:
        return jax.vmap(
            lambda values: split.rest(values, *row_leaves),
            in_axes=(axes,),
            axis_size=num_particles,
        )(split.noise(key, num_particles))

    log_weights, *leaves = jax.vmap(one_run)(keys)
    return leaves, log_weights, structure[0]


def mutation(
    model: FeynmanKac,
    states: list,
    structure: Any,
    inputs: Any,
    num_steps: int,
    key_dtype: Any,
    advance: Callable[..., Advanced] | None = None,
) -> Mutation:
    """The transition and potential of `model` for states like `states`, leaves `(R, N, ...)`.

    Args:
        model: the Feynman-Kac model.
        states: leaves `(R, N, ...)`, arrays or abstract.
        structure: of the state.
        inputs: rows, leaves `(T, ...)`.
        num_steps: T.
        key_dtype: of random keys.
        advance: `(key, previous, input) -> Advanced`, all of a step at once; the model's functions
            one after the other when None.
    Raises:
        TypeError: when the transition returns another state type than it was given.
    """
    if model.capabilities.host:
        return _host_mutation(len(states))
    num_runs, num_particles = states[0].shape[:2]
    leaves = [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in states]
    row_leaves, row_structure = jax.tree.flatten(jax.tree.map(lambda x: x[0], inputs))
    names: list[str] = []

    def score(previous: Any, state: Any, given: Any, increment: Any) -> list:
        log_weight = increment + model.log_potential(previous, state, given)
        return told(log_weight, {} if model.cost is None else model.cost(previous, state, given))

    def told(log_weight: Any, costs: dict) -> list:
        if jnp.shape(log_weight) != ():
            raise ValueError(
                f"smcscale: the log potential of one particle has shape {jnp.shape(log_weight)}.\n"
                "  try: a scalar; sum over dimensions."
            )
        names[:] = list(costs)
        return [log_weight, *(jnp.asarray(c, jnp.float32) for c in costs.values())]

    def step(key: Any, *arguments: Any) -> list:
        previous = jax.tree.unflatten(structure, arguments[: len(leaves)])
        given = jax.tree.unflatten(row_structure, arguments[len(leaves) :])
        if advance is not None:
            made = advance(key, previous, given)
            return [*_checked(made.state, structure, leaves), *told(made.log_weight, made.cost)]
        out = weighted(model.transition(key, previous, given))
        new = _checked(out.state, structure, leaves)
        state = jax.tree.unflatten(structure, new)
        return [*new, *score(previous, state, given, out.log_increment)]

    if model.batched is not None:
        return _batched_mutation(model, leaves, structure, score, names)

    split = split_noise(step, key_dtype, [*leaves, *row_leaves], len(row_leaves))
    over_particles = tuple(0 if b else None for b in split.batched)

    def noise(keys: Any) -> tuple:
        return jax.vmap(lambda key: split.noise(key, num_particles))(keys)

    def apply(frontier: tuple, current: list, row: Any) -> Mutated:
        given = jax.tree.leaves(row)

        def one(values: tuple, *state: Any) -> list:
            return split.rest(values, *state, *given)

        axes = (over_particles, *([0] * len(leaves)))
        out = jax.vmap(jax.vmap(one, in_axes=axes))(frontier, *current)
        new, (log_weights, *costs) = out[: len(leaves)], out[len(leaves) :]
        sums = {n: jnp.sum(c, axis=1) for n, c in zip(names, costs, strict=True)}
        return Mutated(new, log_weights, sums)

    chunk = _chunk(split.elements * num_particles, num_runs, num_steps)
    return Mutation(
        noise,
        apply,
        chunk,
        split.elements,
        split.reads[: len(leaves)],
        split.uses[: len(leaves)],
        split.aliases[: len(leaves)],
        split.passed[: len(leaves)],
        split.constant_bytes,
    )


def _chunk(elements: int, num_runs: int, num_steps: int) -> int:
    """Steps whose noise is drawn at once, given the random numbers of one run's step.

    Another chunk may change the last bit of a draw, so it depends on the number of runs or steps
    only where they are extreme.
    """
    if elements == 0:
        return 1
    best = 2 if elements > _LARGE_STEP else min(_CHUNK_STEPS, round(_CHUNK_ELEMENTS / elements))
    return min(num_steps, max(2, min(best, _CHUNK_TOTAL // (elements * num_runs))))


def _batched_mutation(
    model: FeynmanKac, leaves: list, structure: Any, score: Callable, names: list[str]
) -> Mutation:
    """A model that moves all particles itself, with one key for them."""
    assert model.batched is not None
    batched = model.batched

    def apply(frontier: tuple, current: list, row: Any) -> Mutated:
        def one_run(key: Any, *state: Any) -> list:
            previous = jax.tree.unflatten(structure, state)
            out = batched(key, previous, row)
            increment = jnp.zeros(jnp.shape(state[0])[:1])
            if hasattr(out, "log_increment"):
                out, increment = out.state, out.log_increment
            scored = jax.vmap(lambda p, s, i: score(p, s, row, i))(previous, out, increment)
            return [*jax.tree.leaves(out), *scored]

        out = jax.vmap(one_run)(frontier[0], *current)
        new, (log_weights, *costs) = out[: len(leaves)], out[len(leaves) :]
        return Mutated(
            new, log_weights, {n: jnp.sum(c, axis=1) for n, c in zip(names, costs, strict=True)}
        )

    return _opaque_mutation(apply, len(leaves))


def _host_mutation(num_leaves: int) -> Mutation:
    """A model whose step is made outside the compiled program, by `smcscale.engine.host`."""

    def apply(*_: Any) -> Mutated:
        raise NotImplementedError(
            "smcscale: this model runs Python on the host; it has no compiled step.\n"
            "  try: SMC(ParticleFilter(model), ...).run, outside jit, vmap and export."
        )

    return _opaque_mutation(apply, num_leaves)


def _opaque_mutation(apply: Callable, num_leaves: int) -> Mutation:
    """A step that draws for itself and may read every leaf."""
    everything, nothing = (True,) * num_leaves, (False,) * num_leaves
    own = tuple(range(num_leaves))
    return Mutation(lambda keys: (keys,), apply, 1, 0, everything, everything, own, nothing, 0)


def _checked(state: Any, structure: Any, leaves: list) -> list:
    """The leaves of a new state, in the types of the old one."""
    new, treedef = jax.tree.flatten(state)
    if treedef != structure:
        raise TypeError(
            "smcscale: the transition returns a state of another structure than it was given.\n"
            f"  given: {structure}\n  returned: {treedef}\n"
            "  try: the same pytree from `initial` and `transition`."
        )
    out = []
    for value, like in zip(new, leaves, strict=True):
        if jnp.shape(value) != tuple(like.shape):
            raise TypeError(
                f"smcscale: the transition returns a leaf of shape {jnp.shape(value)} where it was "
                f"given {tuple(like.shape)}.\n  try: states of one fixed shape."
            )
        keyed = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        out.append(value if keyed else jnp.asarray(value, like.dtype))
    return out
