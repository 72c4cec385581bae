"""A learned guide: what a noisy state will be worth, by regression on noised data.

    value = fit_value(reward, schedule, images, strength=10.0)
    steering = Steering(reward, strength=10.0, value=value)
    smc.run(key, Sloped(denoiser, steering), schedule, steering, shape=(64,), sampler=Twisted(steering))

A reward at the predicted data forgets that the prediction may be wrong. The best a state can be read for is
`v(x) = log E[exp(lambda r(x_0)) | x] / lambda`, and with it as proposal too (the gradient, `twisted.py`)
weights vary least. `fit_value` learns v as the minimizer of

    E[exp(lambda r(x_0) - lambda v(x)) + lambda v(x)],      x noised from x_0 at a level drawn uniformly,

whose minimum is there. However badly it is learned, target and evidence stay those of the steering.

Source: Singhal et al. 2025 (arXiv 2501.06848), section 4.2 (learned rewards); the loss is the Itakura-Saito
divergence of `exp(lambda v)` from `exp(lambda r)`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.diffusion.fitting import fit
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.schedules import Level, Schedule


class LearnedValue(eqx.Module):
    """Value of a noisy state by a small network, for `Steering(value=...)`.

    Attributes:
        network: `(d + 2,) -> ()`, of the state, its share of signal and its log-ratio of noise.
        offset: `()`, added to it.
    """

    network: eqx.nn.MLP
    offset: Float[Array, ""]

    def __call__(
        self, x: Float[Array, "..."], prediction: Prediction | None, level: Level
    ) -> Float[Array, ""]:
        """Value `()` of a state at a level with noise; the prediction is not looked at."""
        size = jnp.sqrt(level.alpha**2 + level.sigma**2)
        ratio = jnp.log(level.sigma / jnp.maximum(level.alpha, 1e-6))
        told = jnp.stack([level.alpha / size, ratio / 5])
        return self.offset + self.network(jnp.concatenate([x.reshape(-1) / size, told]))


def fit_value(
    reward: Callable[[Array], Array],
    schedule: Schedule,
    data: Float[Array, "n ..."],
    *,
    strength: ArrayLike = 1.0,
    seed: int = 0,
    steps: int = 2000,
    batch: int = 256,
    width: int = 64,
    depth: int = 2,
    learning_rate: float = 2e-3,
    average: float = 0.995,
    log: Callable[..., None] = print,
) -> LearnedValue:
    """Learn what noisy states are worth.

    Args:
        reward: `(x_0) -> ()`.
        schedule: whose levels with noise are learned, all alike.
        data: `(n, ...)`, of the data set or drawn from the model.
        strength: lambda.
        seed: of all that is drawn.
        steps, batch: of Adam with a cosine.
        width, depth: of the network.
        learning_rate: at the start.
        average: share that the average of the weights keeps in a step.
        log: told the loss now and then.
    Raises:
        ValueError: no data, a strength of 0, rewards that are not finite or no scalars.
    """
    data = jnp.asarray(data, float)
    if not data.size or not bool(jnp.isfinite(strength)) or not bool(strength):
        raise ValueError(
            "smcscale: need `data` and a finite `strength` that is not 0, got shape "
            f"{data.shape} and {strength}."
        )
    worth = jnp.asarray(strength) * jax.vmap(reward)(data)
    if worth.shape != (len(data),):
        raise ValueError(
            f"smcscale: the `reward` of one state has shape {worth.shape[1:]}.\n  try: a scalar."
        )
    if not bool(jnp.all(jnp.isfinite(worth))):
        raise ValueError(
            f"smcscale: `reward` must be finite for all `data`, {worth.size} given.\n"
            "  try: leave out what it rules out, or a floor."
        )
    # a first guess without a network: the evidence of the data
    mean = jax.nn.logsumexp(worth) - jnp.log(worth.size)
    network = eqx.nn.MLP(
        data[0].size + 2, "scalar", width, depth, jax.nn.silu, key=jax.random.key(seed)
    )
    weights, fixed = eqx.partition(LearnedValue(network, jnp.zeros(())), eqx.is_inexact_array)
    lowest = int(jnp.argmax(schedule.sigma > 0))

    def loss(weights: Any, key: Array) -> Array:
        which, at, noise = jax.random.split(key, 3)
        row = jax.random.choice(which, len(data), (batch,))
        level = schedule.level(jax.random.randint(at, (batch,), lowest, schedule.num_steps + 1))
        eps = jax.random.normal(noise, (batch, *data.shape[1:]))
        value = eqx.combine(weights, fixed)

        def one(x0: Array, eps: Array, worth: Array, level: Level) -> Array:
            gap = worth - mean - value(level.alpha * x0 + level.sigma * eps, None, level)
            return jnp.exp(gap) - gap - 1

        return jnp.mean(jax.vmap(one)(data[row], eps, worth[row], level))

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
    )
    weights = fit(weights, loss, optimizer, seed=seed, steps=steps, average=average, log=log)
    found = eqx.combine(weights, fixed)
    return _divided(found, mean, jnp.asarray(strength))


def _divided(value: LearnedValue, mean: Array, strength: Array) -> LearnedValue:
    """From `lambda v` less its mean to v."""
    last = value.network.layers[-1]
    weight, bias = last.weight / strength, last.bias / strength  # pyright: ignore[reportOptionalOperand]
    network = eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias), value.network, (weight, bias)
    )
    return LearnedValue(network, (value.offset + mean) / strength)
