"""A row of a model that runs Python: the compiled step, parted at the transition.

A remote language model, a Python reward or a PyTorch network cannot be traced. For a model that
declares `Capabilities(host=True)` resampling and weighing are compiled as for any other; between
them the transition and the potential are called once, with all particles of all runs, so that they
can batch or run requests concurrently.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from smcscale import keys
from smcscale.engine.bound import bind, recorded, recorder
from smcscale.engine.compiled import plan_again, row_at
from smcscale.engine.mutate import Mutated
from smcscale.engine.step import Info, Population, Resampled, resample, weigh
from smcscale.engine.store import Kept
from smcscale.feynman_kac import FeynmanKac, weighted
from smcscale.status import Status


def compiled_part(pf: Any) -> Any:
    """A filter whose compiled programs do not depend on which Python functions it calls."""
    model = pf.program
    stand_in = FeynmanKac(
        model.initial,
        _elsewhere,
        _elsewhere,
        heavy=model.heavy,
        capabilities=model.capabilities,
        record=model.record,
        num_steps=model.num_steps,
    )
    return eqx.tree_at(lambda f: f.program, pf, stand_in)


def _elsewhere(*_: Any) -> Any:
    raise RuntimeError("smcscale: a host model was called inside a compiled program.")


def step(
    model: FeynmanKac, fixed: tuple, population: Population
) -> tuple[Population, Info, Kept | None, Status]:
    """One row for all runs, as `compiled.block` makes many.

    Args:
        model: whose functions are called.
        fixed: as in `compiled.block`, with the filter of `compiled_part`; one step.
        population: after the row before.
    Raises:
        TypeError, ValueError: the functions return other shapes than they should.
    """
    resampled, previous, particle_keys, row = _before(fixed, population)
    returned = weighted(wait_for(model.transition(particle_keys, previous, row)))
    states = checked(returned.state, previous)
    potential = wait_for(model.log_potential(previous, states, row))
    log_weights = scores("log_potential", potential, particle_keys.shape) + scores(
        "log_increment", returned.log_increment, particle_keys.shape
    )
    costs = {} if model.cost is None else model.cost(previous, states, row)
    costs = {n: scores(f"cost['{n}']", c, particle_keys.shape) for n, c in costs.items()}
    return _after(fixed, population, resampled, states, log_weights, costs)


@eqx.filter_jit
def _before(fixed: tuple, population: Population) -> tuple[Resampled, PyTree, Array, PyTree]:
    """Resample; the states to move `(M, ...)`, a key for each, and the row."""
    pf, run_keys, sizes, args, kwargs, _, _ = fixed
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = plan_again(pf, bound, run_keys, sizes)
    step_keys = jax.vmap(lambda k: keys.step(k, population.time))(run_keys)
    row = row_at(bound, population.time)
    resampled = resample(plan.scheme, population, step_keys, row)
    n = population.log_weights.shape[1]
    particle_keys = jax.vmap(lambda k: jax.random.split(keys.move(k), n))(step_keys).reshape(-1)
    states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), plan.state(resampled.leaves))
    return resampled, states, particle_keys, row


@eqx.filter_jit
def _after(
    fixed: tuple,
    population: Population,
    resampled: Resampled,
    states: PyTree,
    log_weights: Array,
    costs: dict,
) -> tuple[Population, Info, Kept | None, Status]:
    """Weigh what the host returned."""
    pf, run_keys, sizes, args, kwargs, (_, keep), _ = fixed
    bound = bind(pf, args, kwargs, sizes.num_steps)
    plan = plan_again(pf, bound, run_keys, sizes)
    by_run = lambda x: x.reshape(*population.log_weights.shape, *x.shape[1:])
    leaves = [by_run(x) for x in jax.tree.leaves(states)]
    sums = {name: jnp.sum(by_run(c), axis=1) for name, c in costs.items()}
    mutated = Mutated([leaves[i] for i in plan.packed], by_run(log_weights), sums)
    population, info = weigh(plan.scheme, population, resampled, mutated, recorder(bound, plan))
    kept = None
    if keep:
        final = jax.tree.leaves(recorded(bound, plan, population.leaves))
        kept = Kept(final, info.ancestors, population.log_weights)
    told = jax.tree.map(lambda x: x[None], (info._replace(ancestors=None), kept))
    return population, *told, population.status


def checked(state: Any, previous: Any) -> Any:
    """New states, in the types of the old ones."""
    if jax.tree.structure(state) != jax.tree.structure(previous):
        raise TypeError(
            "smcscale: the host transition returns states of another structure than it was given.\n"
            f"  given: {jax.tree.structure(previous)}\n  returned: {jax.tree.structure(state)}\n"
            "  try: the same pytree from `initial` and `transition`."
        )

    def one(value: Any, like: Array) -> Array:
        if jnp.shape(value) != like.shape:
            raise TypeError(
                f"smcscale: the host transition returns a leaf of shape {jnp.shape(value)} where it "
                f"was given {like.shape}.\n  try: all particles, in their order."
            )
        return jnp.asarray(value, like.dtype)

    return jax.tree.map(one, state, previous)


def scores(name: str, values: Any, shape: tuple) -> Array:
    """Numbers of a batch as float32, one for each particle."""
    found = np.asarray(values, np.float32)
    if found.shape not in ((), shape):
        raise TypeError(
            f"smcscale: `{name}` of a host model has shape {found.shape}; there are {shape[0]} "
            "particles.\n  try: one number for each, in their order."
        )
    return jnp.broadcast_to(found, shape)


def wait_for(value: Any) -> Any:
    """The value, or what an awaitable gives; a notebook's own event loop is left alone."""
    if not inspect.isawaitable(value):
        return value
    if _inside_event_loop():
        if inspect.iscoroutine(value):
            value.close()
        raise RuntimeError(
            "smcscale: a host function started a run inside its own event loop, which would wait for "
            "itself.\n  try: `await asyncio.to_thread(smc.run, ...)`, or a plain function."
        )
    pending = asyncio.run_coroutine_threadsafe(_coroutine(value), _event_loop())
    try:
        return pending.result()
    except BaseException:
        pending.cancel()
        raise


async def _coroutine(value: Awaitable) -> Any:
    return await value


def _inside_event_loop() -> bool:
    try:
        return asyncio.get_running_loop() is _event_loop()
    except RuntimeError:  # no loop runs here
        return False


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all runs: network clients stay connected to the loop that made them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="smcscale", daemon=True).start()
    return loop
