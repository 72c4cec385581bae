"""A model bound to its rows, and the plan of a step that its shapes decide.

Both are made anew in each trace, from the arguments of the compiled program; nothing traced is kept
between calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smcscale.engine import mutate
from smcscale.engine.mutate import Mutation
from smcscale.engine.step import Scheme
from smcscale.feynman_kac import FeynmanKac, Weighted
from smcscale.program.lower import Lowered, ProgramState, lower


class Bound(NamedTuple):
    """A model with its rows: what both kinds of program come down to."""

    model: FeynmanKac
    inputs: Any
    num_steps: int
    lowered: Lowered | None


def bind(pf: Any, args: tuple, kwargs: dict, num_steps: int | None) -> Bound:
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
    own = pf.program.num_steps
    if own is not None:
        if num_steps not in (None, own):
            raise ValueError(
                f"smcscale: this model has {own} rows, and the run asks for {num_steps}; its target "
                "would be another.\n  try: run(key), or a model of so many rows."
            )
        num_steps = own
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
        num_steps=model.num_steps,
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
    pf: Any,
    bound: Bound,
    leaves: list,
    structure: Any,
    num_islands: int,
    key_dtype: Any,
) -> Plan:
    """Plan the step for states like `leaves`, `(R, N, ...)` arrays or abstract."""
    one = [jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for x in leaves]
    advance = None if bound.lowered is None else bound.lowered.advance
    step = mutate.mutation(
        bound.model, leaves, structure, bound.inputs, bound.num_steps, key_dtype, advance
    )
    # a leaf that nobody reads and that equals an earlier one is carried once
    packed = tuple(i for i, first in enumerate(step.aliases) if first == i or step.reads[i])
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
        tuple(step.passed[i] for i in packed),
        heavy,
        view,
    )
    return Plan(step, scheme, structure, packed, unpack, parameters)


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


def recorder(bound: Bound, plan: Plan) -> Callable[[list], list]:
    return lambda carried: jax.tree.leaves(
        moment_tree(recorded(bound, plan, carried), bound.lowered is not None)
    )
