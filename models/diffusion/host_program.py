"""`host_denoise`: diffusion with a network or a reward that runs Python, as a host `FeynmanKac`.

    published = read_scheduler_config("model/scheduler", num_steps=50)
    program, rows = host_denoise(network, published, Steering(reward, strength=2.0), shape=(3, 64, 64))
    smc = SMC(ParticleFilter(program, store="last"), num_particles=8)
    smc.run(key, rows)
    smc.result.final["x"]                            # (1, 8, 3, 64, 64): runs, particles, the data

For a PyTorch model of the `diffusers` library, a network behind a server, a reward that is a Python
function: what `denoise` cannot trace. Samplers, rules of steering and the target are those of `denoise`;
network and reward are called with NumPy arrays of all particles of all runs, the network in pieces of
`batch_size`. K calls of the network for each particle.

    def network(x, tau):                          # x (B, 3, 64, 64), tau (B,), both float32
        with torch.inference_mode():
            return unet(torch.from_numpy(x), torch.from_numpy(tau)).sample.numpy()

The initial noise is scored with the first move, so that resampling comes one step later than in
`denoise`; the target is the same. Source: that of `denoise`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcscale.feynman_kac import Capabilities, FeynmanKac, Weighted
from smcscale.models.diffusion.potentials import Seen, Steering, log_mean_exp, nothing_seen, score
from smcscale.models.diffusion.predictors import Denoiser, Prediction
from smcscale.models.diffusion.program import as_prediction
from smcscale.models.diffusion.samplers import Proposed, ancestral
from smcscale.models.diffusion.scheduler_config import Published
from smcscale.models.diffusion.schedules import Level, Schedule, Walk

HostNetwork = Callable[[np.ndarray, np.ndarray], Any]


class HostState(NamedTuple):
    """One particle, or `(M,)` of them.

    Attributes:
        x: the state.
        prediction: of the network for it; the data itself at the end.
        seen: rewards so far.
    """

    x: Array
    prediction: Prediction
    seen: Seen


def host_denoise(
    network: HostNetwork,
    published: Published | tuple[Schedule, Any],
    steering: Steering | None = None,
    *,
    shape: tuple[int, ...],
    sampler: Callable[..., Any] = ancestral,
    batch_size: int | None = None,
) -> tuple[FeynmanKac, Walk]:
    """The program `denoise` for functions that cannot be traced.

    Args:
        network: `(x (B, *shape), tau (B,)) -> (B, *shape)`, NumPy float32.
        published: of `read_scheduler_config`; or a schedule and what the network predicts, such as
            `(vp_linear(50), predictors.eps)`.
        steering: whose `reward` is called with predicted data of all particles at once, `(B, *shape)
            -> (B,)`, NumPy float32; None samples the model.
        shape: of a state.
        sampler: as in `denoise`; one that calls the network itself is refused.
        batch_size: states that the network gets at once; None: all.
    Returns:
        the model, and the rows to run it on.
    Raises:
        TypeError: a steering or a schedule of another kind.
        ValueError: a sampler with calls of its own, a steering with `value`, or a batch size below 1.
    """
    if getattr(sampler, "extra_calls", 0):
        raise ValueError(
            "smcscale: this sampler calls the network inside a step, which a host network cannot do.\n"
            "  try: ancestral, DDIM, EulerMaruyama, FlowSDE or churn without Heun's second call."
        )
    if not isinstance(steering, Steering | None):
        raise TypeError(
            f"smcscale: `steering` cannot be a {type(steering).__name__}.\n  try: Steering(reward)."
        )
    if steering is not None and steering.value is not None:
        raise ValueError(
            "smcscale: `value` of a Steering is traced; a host program reads states by its reward.\n"
            "  try: Steering(reward), with num_guesses if the mean is too crude."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"smcscale: `batch_size` must be at least 1, got {batch_size}.")
    if isinstance(published, Schedule):
        raise TypeError(
            "smcscale: `published` needs to know what the network predicts.\n"
            "  try: (schedule, predictors.eps)."
        )
    if not isinstance(published, Published):
        published = Published(*published)
    walking = Walking(published.denoiser(InPieces(network, batch_size)), steering, sampler)
    program = FeynmanKac(
        eqx.Partial(_start, published.schedule.initial_scale, shape),
        walking,
        lambda previous, states, row: np.zeros(len(states.x), np.float32),
        capabilities=Capabilities(host=True, differentiable=False),
        record=_record,
        cost=walking.cost,
    )
    return program, published.schedule.walk()


class InPieces(NamedTuple):
    """A host network, called with at most `batch_size` states."""

    network: HostNetwork
    batch_size: int | None

    def __call__(self, x: Array, tau: Array) -> Array:
        """All states `(M, ...)` at one level `()`."""
        states = np.array(x, np.float32)  # a copy that may be written to, which PyTorch asks for
        taus = np.full(len(states), np.asarray(tau), np.float32)
        size = self.batch_size or len(states)
        pieces = [slice(i, i + size) for i in range(0, len(states), size)]
        found = [self.network(states[part], taus[part]) for part in pieces]
        answers = [
            _answer("network", output, states[part].shape)
            for output, part in zip(found, pieces, strict=True)
        ]
        return jnp.asarray(np.concatenate(answers))


def _answer(name: str, value: Any, shape: tuple) -> np.ndarray:
    """What a host function returned, of the right shape."""
    value = np.asarray(value, np.float32)
    if value.shape != shape:
        raise TypeError(
            f"smcscale: the {name} was given {shape[0]} states and returned shape {value.shape}.\n"
            f"  try: shape {shape}."
        )
    return value


class Walking(NamedTuple):
    """The transition: move a level down, predict, score."""

    denoiser: Denoiser
    steering: Steering | None
    sampler: Callable[..., Any]

    def __call__(self, keys: Array, previous: HostState, row: Walk) -> Weighted:
        """States `(M,)` one level lower, with the log potentials `(M,)` of what was scored."""
        for_first, for_move, for_score = jnp.moveaxis(_three(keys), 1, 0)
        log_weights = jnp.zeros(len(previous.x))
        if int(row.made) == 1:
            previous = previous._replace(prediction=self.denoiser(previous.x, row.high))
            opening = row._replace(low=row.high, made=row.made - 1, last=jnp.zeros_like(row.last))
            seen, log_weights = self.scored(for_first, previous, opening)
            previous = previous._replace(seen=seen)
        x, owed = _moved(self.sampler, for_move, previous, row)
        last = bool(row.last)
        prediction = as_prediction(x, previous.prediction) if last else self.denoiser(x, row.low)
        state = HostState(x, prediction, previous.seen)
        seen, log_potentials = self.scored(for_score, state, row)
        return Weighted(state._replace(seen=seen), log_weights + owed + log_potentials)

    def scored(self, keys: Array, state: HostState, row: Walk) -> tuple[Seen, Array]:
        """Rewards with those of states just reached, and log potentials `(M,)`."""
        steering, count = self.steering, len(state.x)
        if steering is None or not bool(steering.due(row.made, row.last)):
            return state.seen, jnp.zeros(count)
        data = state.prediction.x0[:, None]
        if steering.num_guesses and not bool(row.last):
            data = _guesses(steering, keys, state, row.low)
        flat: Any = np.array(data.reshape(-1, *data.shape[2:]), np.float32)
        rewards = _answer("reward", steering.reward(flat), flat.shape[:1])
        return _weighed(steering, state.seen, jnp.asarray(rewards.reshape(count, -1)), row)

    def cost(self, previous: HostState, state: HostState, row: Walk) -> dict[str, np.ndarray]:
        """Calls of network and reward for each particle, `(M,)`."""
        first, rewards = int(row.made) == 1, 0
        if self.steering is not None:
            rewards = int(self.steering.calls(row.made, row.last))
            if first:
                rewards += int(self.steering.calls(row.made - 1, jnp.zeros_like(row.last)))
        calls = {"denoiser_calls": first + (not row.last), "reward_calls": rewards}
        return {name: np.full(len(state.x), float(value)) for name, value in calls.items()}


@jax.jit
def _three(keys: Array) -> Array:
    return jax.vmap(lambda key: jax.random.split(key, 3))(keys)


def _start(scale: Array, shape: tuple[int, ...], key: Array) -> HostState:
    x = scale * jax.random.normal(key, shape)
    return HostState(x, Prediction(jnp.zeros_like(x), jnp.zeros_like(x)), nothing_seen())


def _record(state: HostState) -> dict[str, Array]:
    return {"x": state.x, "reward": state.seen.last}


@eqx.filter_jit
def _moved(sampler: Any, keys: Array, previous: HostState, row: Walk) -> tuple[Array, Array]:
    """States drawn at the lower level, and the log-weights that their proposal owes."""

    def one(key: Array, state: HostState) -> tuple[Array, Array]:
        law = sampler(None, state.x, state.prediction, row.high, row.low)
        if not isinstance(law, Proposed):
            return law.sample(key), jnp.zeros(())
        x: Any = law.distribution.sample(key)
        return x, law.log_weight(x)

    return jax.vmap(one)(keys, previous)


@eqx.filter_jit
def _guesses(steering: Steering, keys: Array, state: HostState, level: Level) -> Array:
    """Draws of the data behind each state, `(M, num_guesses, ...)`."""

    def one(key: Array, state: HostState) -> Array:
        law = steering.guess(state.x, state.prediction, level)
        return law.sample(key, (steering.num_guesses,))

    return jax.vmap(one)(keys, state)


@eqx.filter_jit
def _weighed(
    steering: Steering, seen: Seen, rewards: Float[Array, "M guesses"], row: Walk
) -> tuple[Seen, Array]:
    """Rewards with new ones, and log potentials `(M,)`."""
    reward = rewards[:, 0]
    if rewards.shape[1] > 1:
        reward = log_mean_exp(rewards, jnp.asarray(steering.strength))
    strength = steering.strength_at(row.made, row.last)
    return jax.vmap(lambda s, r: score(s, r, steering.rule, strength, row.last))(seen, reward)
