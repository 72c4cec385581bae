"""A program's lowered pieces along one simulated path, against NumPyro's density of that path."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.util import log_density

from smcscale.feynman_kac import weighted
from smcscale.program.lower import Lowered, ProgramState, lower


class Path(NamedTuple):
    """One particle's path.

    Attributes:
        lowered: the program, lowered.
        before: values of latent sites before the loop.
        sites: values of the loop's sites, leaves `(T, ...)`.
        last: the final state.
        increments: `(T + 1,)`, of the initial law and of the transitions.
        potentials: `(T,)`.
        transitions: `(T,)`, log transition densities.
    """

    lowered: Lowered
    before: dict
    sites: dict
    last: ProgramState
    increments: np.ndarray
    potentials: np.ndarray
    transitions: np.ndarray


def draw_path(program: Callable, *args: Any, seed: int = 0, options: Any = None, **kwargs: Any):
    """Simulate one particle of a program through its loop, and score it."""
    lowered = lower(program, args, kwargs, **(options or {}))
    model = lowered.model

    @jax.jit
    def simulate(key: Any) -> tuple:
        start, opening = weighted(model.initial(jax.random.fold_in(key, 0)))

        def step(state: Any, given: tuple) -> tuple:
            time, row = given
            new, increment = weighted(
                model.transition(jax.random.fold_in(key, 1 + time), state, row)
            )
            potential = model.log_potential(state, new, row)
            transition = model.log_transition(state, new, row)
            return new, (new.sites, jnp.asarray(increment), potential, transition)

        times = jnp.arange(lowered.num_steps)
        last, out = jax.lax.scan(step, start, (times, lowered.inputs))
        return start.before, last, opening, out

    before, last, opening, (sites, increments, potentials, transitions) = simulate(
        jax.random.key(seed)
    )
    increments = np.append(np.asarray(opening), np.asarray(increments))
    return Path(lowered, before, sites, last, increments, np.asarray(potentials), transitions)


def total(path: Path) -> float:
    """Log density of everything but the sites before the loop, which the initial law draws."""
    return float(path.increments.sum() + path.potentials.sum() + path.transitions.sum())


def numpyro_total(program: Callable, path: Path, *args: Any, **kwargs: Any) -> float:
    """The same by NumPyro alone."""
    seeded = handlers.seed(program, 0)
    latents: list[str] = []

    def look() -> None:
        drawn = handlers.trace(seeded).get_trace(*args, **kwargs)
        latents[:] = [n for n, s in drawn.items() if s["type"] == "sample" and not s["is_observed"]]

    jax.eval_shape(look)
    found = {**path.before, **path.sites}

    @jax.jit
    def score(values: dict) -> Any:
        joint, trace = log_density(seeded, args, kwargs, values)
        for name in path.before:
            site = trace[name]
            scale = 1.0 if site["scale"] is None else site["scale"]
            joint -= scale * jnp.sum(site["fn"].log_prob(site["value"]))
        return joint

    return float(score({n: found[n] for n in latents if n in found}))
