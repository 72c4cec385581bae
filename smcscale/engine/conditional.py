"""One sweep of conditional SMC: a particle filter with one path kept, drawn from it a new path.

The path sits in slot 0 of every row and is followed, not drawn. Resampling is of the form given its
ancestor (`kernels/resampling/conditional.py`); with ancestor sampling that ancestor is drawn anew, by how
well each particle would go on as the path does, over all rows that are left: programs may look back as
far as they like. A sweep leaves the law of the filter's target unchanged, with any number of
particles.

Source: Andrieu, Doucet & Holenstein 2010, section 4.3; Lindsten, Jordan & Schön 2014, section 4 (models
that are not Markov).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smcscale import keys
from smcscale.engine import mutate
from smcscale.engine.bound import Bound, Plan, bind, make_plan
from smcscale.engine.compiled import row_at
from smcscale.feynman_kac import FeynmanKac
from smcscale.kernels.resampling.conditional import form_of

#: `(carry, time) -> ({site: value}, log density | None)`: the kept path's latents of a row, after
#: the carry of any particle, and what the transition says of them (None: the sites are asked)
Follow = Callable[[Any, Array], tuple[dict, Any]]


class Sweep(NamedTuple):
    """What a sweep leaves.

    Attributes:
        states: the last row's, leaves `(N, ...)`; that of the kept path is first.
        log_weights: `(N,)`, the largest is 0.
        chosen: the particle whose path is the new one, drawn by weight.
        num_resamplings: of the rows.
        cost: what drawing spent, by name.
        followed: what following the kept path did, with ancestor sampling from each particle.
    """

    states: Any
    log_weights: Float[Array, " N"]
    chosen: Int32[Array, ""]
    num_resamplings: Int32[Array, ""]
    cost: dict
    followed: dict


def check(pf: Any) -> None:
    """Refuse what a conditional sweep cannot run.

    Raises:
        TypeError: a program that is no NumPyro program.
        ValueError: a guide, a proposal, a look-ahead, annealing or a tilt, or a resampling kernel
            without a conditional form.
    """
    if isinstance(pf.program, FeynmanKac):
        raise TypeError(
            "smcscale: a path of a FeynmanKac model cannot be followed.\n"
            "  try: a NumPyro program, whose sites say what is random."
        )
    check_kernels(pf)


def check_kernels(pf: Any) -> None:
    """Refuse kernels that no conditional sweep can use.

    Raises:
        ValueError: as `check`.
    """
    for name in ("guide", "proposal", "lookahead", "annealing", "tilt"):
        if getattr(pf, name) is not None:
            raise ValueError(
                f"smcscale: conditional SMC takes no {name}.\n  try: a filter without."
            )
    form_of(pf.resampling)


def sweep(
    pf: Any,
    key: Array,
    args: tuple,
    kwargs: dict,
    follow: Follow,
    num_particles: int,
    *,
    ancestor_sampling: bool,
) -> Sweep:
    """Run one sweep; to be called inside `jit`, and under `vmap` for several chains.

    Args:
        pf: the filter; its trigger and resampling kernel are used, see `check`.
        key: consumed.
        args: of the program.
        kwargs: of the program.
        follow: the kept path.
        num_particles: N, the kept one counted; 2 or more.
        ancestor_sampling: whether the kept path's ancestor is drawn anew at every resampling.
    Raises:
        ValueError: latent sites before the loop.
    """
    bound, plan, free = _opened(pf, key, args, kwargs, num_particles - 1)
    form = form_of(pf.resampling)
    # the law of the first state has no latents: all particles are alike
    carried = [jnp.concatenate([x[:, :1], x], axis=1) for x in free]

    def one_row(state: tuple, time: Array) -> tuple:
        carried, lw = state
        step_key = keys.step(key, time)
        fire = jnp.asarray(pf.trigger(lw, time))

        def resampled() -> tuple:
            kept, spent = jnp.zeros((), jnp.int32), None
            if ancestor_sampling:
                rest, spent = _rest(bound, plan, follow, carried, time)
                kept = jax.random.categorical(keys.ancestor(step_key), lw + rest).astype(jnp.int32)
            ancestors = form(keys.resampling(step_key), lw, num_particles, kept, 0)
            moved = [jnp.take(x, ancestors, axis=1) for x in carried]
            return moved, jnp.zeros_like(lw), spent

        def same() -> tuple:
            spent = jax.eval_shape(resampled)[2]
            return carried, lw, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spent)

        carried, lw, spent = jax.lax.cond(fire, resampled, same)
        row = row_at(bound, time)
        frontier = plan.mutation.noise(keys.move(step_key)[None])
        drawn = plan.mutation.apply(frontier, plan.full([x[:, 1:] for x in carried]), row)
        leaves, weight, _, cost = _followed(bound, plan, follow, [x[:, :1] for x in carried], time)
        made = [drawn.leaves[i] for i in plan.packed]
        carried = [jnp.concatenate(pair, axis=1) for pair in zip(leaves, made, strict=True)]
        lw += jnp.concatenate([weight, drawn.log_weights[0]])
        if spent is not None:
            cost = {name: cost[name] + spent[name] for name in cost}
        told = ({n: c[0] for n, c in drawn.costs.items()}, cost, fire)
        return (carried, lw - jnp.max(lw)), told

    times = jnp.arange(bound.num_steps, dtype=jnp.int32)
    start = (carried, jnp.zeros(num_particles))
    (carried, lw), (cost, followed, fired) = jax.lax.scan(one_row, start, times)
    chosen = jax.random.categorical(keys.readout(key), lw).astype(jnp.int32)
    total = lambda spent: {name: jnp.sum(x) for name, x in spent.items()}
    states = jax.tree.map(lambda x: x[0], plan.state(carried))
    return Sweep(states, lw, chosen, jnp.sum(fired), total(cost), total(followed))


def path_log_density(
    pf: Any, key: Array, args: tuple, kwargs: dict, follow: Follow
) -> Float[Array, ""]:
    """Log density of a path under the target, up to its normalizer: transitions and potentials.

    Args:
        pf, args, kwargs, follow: as for `sweep`.
        key: of no consequence.
    """
    bound, plan, free = _opened(pf, key, args, kwargs, 1)
    return _rest(bound, plan, follow, free, jnp.zeros((), jnp.int32))[0][0]


def _opened(pf: Any, key: Array, args: tuple, kwargs: dict, count: int) -> tuple[Bound, Plan, list]:
    """A program bound to its rows, its plan, and carried leaves `(1, count, ...)` of the first state."""
    bound = bind(pf, args, kwargs, None)
    row = jax.tree.map(lambda x: x[0], bound.inputs)
    leaves, _, structure = mutate.draw_initial(bound.model, row, keys.initial(key)[None], count)
    before = jax.tree.unflatten(structure, leaves).before
    if before:
        raise ValueError(
            f"smcscale: conditional SMC keeps a path of the loop, and {sorted(before)} are drawn before "
            "it.\n  try: `condition` on them."
        )
    plan = make_plan(pf, bound, leaves, structure, 1, key.dtype)
    return bound, plan, [leaves[i] for i in plan.packed]


def _followed(bound: Bound, plan: Plan, follow: Follow, carried: list, time: Array) -> tuple:
    """The row of the kept path after every particle: leaves, log-weights, log densities, cost.

    Leaves are `(1, N, ...)` before and after; costs are sums over particles.
    """
    assert bound.lowered is not None
    lowered, row = bound.lowered, row_at(bound, time)

    def one(*leaves: Array) -> tuple:
        previous = jax.tree.unflatten(plan.structure, leaves)
        values, told = follow(previous.carry, time)
        made, own = lowered.follow(previous, values, row)
        new = jax.tree.leaves(made.state)
        cost = {name: jnp.asarray(x, jnp.float32) for name, x in made.cost.items()}
        packed = [jnp.asarray(new[i], leaves[i].dtype) for i in plan.packed]
        return packed, made.log_weight, own if told is None else told, cost

    leaves, weights, density, cost = jax.vmap(one)(*(x[0] for x in plan.full(carried)))
    sums = {name: jnp.sum(x) for name, x in cost.items()}
    return [x[None] for x in leaves], weights, density, sums


def _rest(bound: Bound, plan: Plan, follow: Follow, carried: list, time: Array) -> tuple:
    """How well each particle goes on as the kept path does from row `time`: `(N,)`, nats; the cost."""

    def one_row(row: Array, state: tuple) -> tuple:
        carried, total, spent = state
        carried, weights, density, cost = _followed(bound, plan, follow, carried, row)
        # where the path cannot be followed, its potentials say nothing
        gain = jnp.where(density == -jnp.inf, -jnp.inf, weights + density)
        return carried, total + gain, {name: spent[name] + cost[name] for name in spent}

    told = jax.eval_shape(lambda: _followed(bound, plan, follow, carried, time)[3])
    spent = {name: jnp.zeros(x.shape, x.dtype) for name, x in told.items()}
    start = (carried, jnp.zeros(carried[0].shape[1]), spent)
    _, total, spent = jax.lax.fori_loop(time, bound.num_steps, one_row, start)
    return total, spent
