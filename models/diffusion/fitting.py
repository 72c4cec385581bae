"""The loop that all shipped diffusion models were trained by: gradient steps, and an average of them."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import optax
from jaxtyping import Array

Weights = TypeVar("Weights")


def fit(
    weights: Weights,
    loss: Callable[[Weights, Array], Array],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    steps: int,
    average: float,
    log: Callable[..., None] = print,
    every: int = 500,
) -> Weights:
    """Minimize a loss by stochastic gradients; returns the exponential average of the weights.

    Args:
        weights: first ones, a pytree of arrays.
        loss: `(weights, key) -> ()`, of a batch that it draws.
        optimizer: of Optax.
        seed: of the keys.
        steps: how many.
        average: share of the average that each step keeps.
        log: told the mean loss of the newest steps now and then.
        every: how many steps lie between; they are compiled together.
    Raises:
        ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"smcscale: `steps` must be at least 1, got {steps}.")

    def step(state: tuple, key: Array) -> tuple[tuple, Array]:
        weights, averaged, memory = state
        value, gradient = jax.value_and_grad(loss)(weights, key)
        updates, memory = optimizer.update(gradient, memory, weights)
        weights = optax.apply_updates(weights, updates)
        averaged = optax.incremental_update(weights, averaged, 1 - average)
        return (weights, averaged, memory), value

    some_steps = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    state = (weights, weights, optimizer.init(weights))  # pyright: ignore[reportArgumentType]
    start = time.time()
    keys = jax.random.split(jax.random.key(seed), steps)
    for first in range(0, steps, every):
        state, values = some_steps(state, keys[first : first + every])
        log(f"loss {float(values.mean()):.4f}, {time.time() - start:.0f} s", flush=True)
    return state[1]
