"""Searches for a high reward: they spend network calls where it pays, and target no law.

A particle filter with a `Steering` draws from `p(x_0) exp(lambda r(x_0))`. The methods here return what
scores best, and say nothing of its probability: no weights, no evidence. All count their calls alike.

| search | what it does |
|---|---|
| `random_search` | N noises, the whole walk from each; the best |
| `zero_order` | a noise, moved a little again and again, the walk from each; the best |
| `over_paths` | N walks, noised up and walked down again a few times on the way; the best |
| `local_search` | one walk; every few steps M candidates, the best predicted one goes on (SVDD, CoDe) |
| `rollover` | one walk; candidates until one beats the best so far, unused ones are kept for later (RBF) |

    found = random_search(key, denoiser, vp_linear(50), reward, shape=(64,), num_noises=16)
    found.x, found.reward, found.cost["denoiser_calls"]

Best-of-N with a sampler of one's own is a filter that never resamples: `ParticleFilter(denoise,
trigger=triggers.never)`.

Source: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps" (arXiv
2501.09732) for the first three; Li et al. 2024 (SVDD, arXiv 2408.08252); Kim et al. 2025, "Inference-time
scaling for flow models" (arXiv 2503.19385) for `rollover`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import DDIM, Network, ancestral
from smcscale.models.diffusion.schedules import Level, Schedule, added_noise

Reward = Callable[[Array], Array]


class Found(NamedTuple):
    """What a search came back with.

    Attributes:
        x: data, the shape that was asked for.
        reward: `()`, of `x`.
        trace: rewards in the order they were seen, for a picture; its length is the method's.
        cost: "denoiser_calls" and "reward_calls", `()` int32 each.
    """

    x: Float[Array, "..."]
    reward: Float[Array, ""]
    trace: Float[Array, "..."]
    cost: dict[str, Int32[Array, ""]]


def walked(
    key: Any,
    denoiser: Network,
    schedule: Schedule,
    sampler: Callable[..., Any],
    x: Float[Array, "..."],
    top: int,
    bottom: int = 0,
) -> Float[Array, "..."]:
    """A state walked down from level `top` to level `bottom`: `top - bottom` network calls."""

    def step(x: Array, index: Array) -> tuple[Array, None]:
        high, low = schedule.level(index), schedule.level(index - 1)
        law = sampler(denoiser, x, denoiser(x, high), high, low)
        return law.sample(jax.random.fold_in(key, index)), None

    return lax.scan(step, x, jnp.arange(top, bottom, -1, dtype=jnp.int32))[0]


@eqx.filter_jit
def random_search(
    key: Key[Array, ""],
    denoiser: Network,
    schedule: Schedule,
    reward: Reward,
    *,
    shape: tuple[int, ...],
    num_noises: int,
    sampler: Callable[..., Any] = DDIM(0.0),  # noqa: B008 (compared by value)
) -> Found:
    """Walk down from N noises and keep the best: best-of-N, over noises alone if the walk draws none.

    Args:
        key: consumed.
        denoiser: `(x, level) -> Prediction`.
        schedule: K + 1 levels.
        reward: `(x_0) -> ()`.
        shape: of a state.
        num_noises: N.
        sampler: of the walk; the default draws nothing.
    """
    for_noise, for_walk = jax.random.split(key)
    noise = schedule.initial_scale * jax.random.normal(for_noise, (num_noises, *shape))
    data = _walk_all(for_walk, denoiser, schedule, sampler, noise)
    rewards = jax.vmap(reward)(data)
    best = jnp.argmax(rewards)
    calls = num_noises * schedule.num_steps
    return Found(data[best], rewards[best], rewards, _cost(calls, num_noises))


@eqx.filter_jit
def zero_order(
    key: Key[Array, ""],
    denoiser: Network,
    schedule: Schedule,
    reward: Reward,
    *,
    shape: tuple[int, ...],
    num_rounds: int,
    num_candidates: int,
    radius: float = 0.3,
    sampler: Callable[..., Any] = DDIM(0.0),  # noqa: B008 (compared by value)
) -> Found:
    """Move the best noise so far a little, in a few directions, and keep what is better.

    Candidates are `sqrt(1 - radius^2) noise + radius z`, standard normal again if the noise was.

    Args:
        key, denoiser, schedule, reward, shape, sampler: as of `random_search`.
        num_rounds: rounds after the first noise.
        num_candidates: of a round.
        radius: in (0, 1]; 1 forgets the best noise.
    Returns:
        `trace` is the best reward after each round, `(num_rounds + 1,)`: it never falls.
    Raises:
        ValueError: radius out of range.
    """
    if not 0 < radius <= 1:
        raise ValueError(f"smcscale: `radius` of zero_order must be in (0, 1], got {radius}.")
    first, for_walk, rest = jax.random.split(key, 3)
    noise = schedule.initial_scale * jax.random.normal(first, (1, *shape))
    data = _walk_all(for_walk, denoiser, schedule, sampler, noise)
    start = (noise[0], data[0], reward(data[0]))

    def one(best: tuple, key: Array) -> tuple[tuple, Array]:
        noise, _, _ = best
        for_noise, for_walk = jax.random.split(key)
        z = schedule.initial_scale * jax.random.normal(for_noise, (num_candidates, *shape))
        near = jnp.sqrt(1 - radius**2) * noise + radius * z
        data = _walk_all(for_walk, denoiser, schedule, sampler, near)
        rewards = jax.vmap(reward)(data)
        top = jnp.argmax(rewards)
        better = rewards[top] > best[2]
        new = (near[top], data[top], rewards[top])
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
        return best, best[2]

    best, trace = lax.scan(one, start, jax.random.split(rest, num_rounds))
    walks = 1 + num_rounds * num_candidates
    trace = jnp.concatenate([start[2][None], trace])
    return Found(best[1], best[2], trace, _cost(walks * schedule.num_steps, walks))


@eqx.filter_jit
def over_paths(
    key: Key[Array, ""],
    denoiser: Network,
    schedule: Schedule,
    reward: Reward,
    *,
    shape: tuple[int, ...],
    num_paths: int,
    num_children: int,
    up: int,
    down: int,
    start: int,
    sampler: Callable[..., Any] = DDIM(0.0),  # noqa: B008 (compared by value)
) -> Found:
    """Walk N paths to a level, then noise each up M times and walk further down, keeping the N best.

    Args:
        key, denoiser, schedule, reward, shape, sampler: as of `random_search`.
        num_paths: N.
        num_children: M.
        up: levels that a child is noised up.
        down: levels that it is then walked down, more than `up`.
        start: level at which the first round begins, `up` below the noise at most.
    Returns:
        `trace` is the best reward of the predicted data after each round, and of the data at the end.
    Raises:
        ValueError: levels that lead nowhere.
    """
    if not (0 < up < down and 0 < start and start + up <= schedule.num_steps):
        raise ValueError(
            f"smcscale: over_paths from level {start}, {up} up and {down} down, does not go down within "
            f"{schedule.num_steps} levels.\n  try: 0 < up < down and start + up <= num_steps."
        )
    for_noise, for_walk, for_rounds = jax.random.split(key, 3)
    x = schedule.initial_scale * jax.random.normal(for_noise, (num_paths, *shape))
    x = _walk_all(for_walk, denoiser, schedule, sampler, x, schedule.num_steps, start)
    calls = num_paths * (schedule.num_steps - start)
    level, trace, scored = start, [], 0
    while level > 0:
        for_rounds, for_noise, for_walk = jax.random.split(for_rounds, 3)
        bottom = max(level + up - down, 0)
        high, low = schedule.level(level + up), schedule.level(level)
        fresh = jax.random.normal(for_noise, (num_paths, num_children, *shape))
        children = high.alpha / low.alpha * x[:, None] + jnp.sqrt(added_noise(high, low)) * fresh
        children = children.reshape(-1, *shape)
        children = _walk_all(for_walk, denoiser, schedule, sampler, children, level + up, bottom)
        calls += len(children) * (level + up - bottom)
        if bottom:
            at = schedule.level(bottom)
            rewards = jax.vmap(lambda c, at=at: reward(denoiser(c, at).x0))(children)
            calls += len(children)
        else:
            rewards = jax.vmap(reward)(children)
        scored += len(children)
        order = jnp.argsort(-rewards)[:num_paths]
        x, level = children[order], bottom
        trace.append(rewards[order[0]])
    return Found(x[0], trace[-1], jnp.stack(trace), _cost(calls, scored))


@eqx.filter_jit
def local_search(
    key: Key[Array, ""],
    denoiser: Network,
    schedule: Schedule,
    reward: Reward,
    *,
    shape: tuple[int, ...],
    num_candidates: int,
    every: int = 1,
    temperature: float = 0.0,
    sampler: Callable[..., Any] = ancestral,
) -> Found:
    """Every few steps draw M candidates, and go on with one that promises much.

    Args:
        key, denoiser, schedule, reward, shape: as of `random_search`.
        num_candidates: M.
        every: levels between choices; 1 is SVDD, more is CoDe's block.
        temperature: the choice is by `exp(reward / temperature)`; 0 takes the best.
        sampler: of the walk; it must draw.
    Returns:
        `trace` is the reward of each chosen candidate's predicted data, the last one of the data.
    """
    for_noise, rest = jax.random.split(key)
    x = schedule.initial_scale * jax.random.normal(for_noise, shape)
    level, trace, calls, scored = schedule.num_steps, [], 0, 0
    while level > 0:
        rest, for_walk, for_choice = jax.random.split(rest, 3)
        bottom = max(level - every, 0)
        copies = jnp.broadcast_to(x, (num_candidates, *shape))
        copies = _walk_all(for_walk, denoiser, schedule, sampler, copies, level, bottom)
        at = schedule.level(bottom)
        rewards = jax.vmap(reward)(
            jax.vmap(lambda c, at=at: denoiser(c, at).x0)(copies) if bottom else copies
        )
        calls += num_candidates * (level - bottom + (bottom > 0))
        scored += num_candidates
        noise = jax.random.gumbel(for_choice, rewards.shape)
        chosen = jnp.argmax(rewards + temperature * noise)
        x, level = copies[chosen], bottom
        trace.append(rewards[chosen])
    return Found(x, trace[-1], jnp.stack(trace), _cost(calls, scored))


class _Rolling(NamedTuple):
    """State of `rollover` within a level."""

    x: Any
    prediction: Prediction
    used: Any
    accepted: Any
    best_x: Any
    best_prediction: Prediction
    best: Any


@eqx.filter_jit
def rollover(
    key: Key[Array, ""],
    denoiser: Network,
    schedule: Schedule,
    reward: Reward,
    *,
    shape: tuple[int, ...],
    num_calls: int,
    num_noises: int = 8,
    sampler: Callable[..., Any] = ancestral,
) -> Found:
    """Rollover budget forcing: at each level draw candidates until one beats the best so far.

    A level has a quota of calls; what it leaves is added to the next one's. If none is better, the best of
    the level goes on. From level 2 all calls that are left propose states of level 1, and the best
    predicted data among them are returned: level 0 is never walked to.

    Args:
        key, denoiser, schedule, reward, shape: as of `random_search`.
        num_calls: of the network, exactly this many.
        num_noises: of them, for the first choice among noises.
        sampler: of the walk; it must draw.
    Returns:
        `trace` is the reward after each level, the last one of the data.
    Raises:
        ValueError: fewer than 2 levels, or a budget with less than one call a level.
    """
    moves = schedule.num_steps - 2
    quota = (num_calls - num_noises) // max(schedule.num_steps, 1)
    if moves < 0 or num_noises < 1 or quota < 1:
        raise ValueError(
            f"smcscale: rollover cannot spend {num_calls} calls on {num_noises} noises and "
            f"{schedule.num_steps} levels.\n  try: num_calls >= num_noises + num_steps, 2 levels or more."
        )
    for_noise, for_moves, for_end = jax.random.split(key, 3)
    noises = schedule.initial_scale * jax.random.normal(for_noise, (num_noises, *shape))
    top = schedule.level(-1)
    predictions = jax.vmap(lambda x: denoiser(x, top))(noises)
    rewards = jax.vmap(reward)(predictions.x0)
    first = jnp.argmax(rewards)
    x, prediction = jax.tree.map(lambda a: a[first], (noises, predictions))

    def proposed(key: Array, x: Array, prediction: Prediction, high: Level, low: Level) -> tuple:
        state = sampler(denoiser, x, prediction, high, low).sample(key)
        found = denoiser(state, low)
        return state, found, reward(found.x0)

    def move(index: Array, carried: tuple) -> tuple:
        x, prediction, best, quota_now, spent, trace = carried
        high = schedule.level(schedule.num_steps - index)
        low = schedule.level(schedule.num_steps - index - 1)
        level_key = jax.random.fold_in(for_moves, index)

        def another(now: _Rolling) -> _Rolling:
            key = jax.random.fold_in(level_key, now.used)
            state, found, value = proposed(key, x, prediction, high, low)
            better = value > now.best
            kept = jax.tree.map(
                lambda a, b: jnp.where(better, a, b),
                (state, found),
                (now.best_x, now.best_prediction),
            )
            return now._replace(
                used=now.used + 1, accepted=value > best, best_x=kept[0], best_prediction=kept[1],
                best=jnp.maximum(now.best, value),
            )  # fmt: skip

        begin = _Rolling(
            x, prediction, jnp.zeros((), jnp.int32), jnp.asarray(False), x, prediction,
            jnp.full_like(best, -jnp.inf),
        )  # fmt: skip
        done = lax.while_loop(lambda n: ~n.accepted & (n.used < quota_now), another, begin)
        left = jnp.where(done.accepted, quota_now - done.used, 0)
        return (
            done.best_x, done.best_prediction, jnp.maximum(best, done.best), quota + left,
            spent + done.used, trace.at[index].set(done.best),
        )  # fmt: skip

    trace = jnp.zeros(moves + 1, rewards.dtype)
    carried = (
        x, prediction, rewards[first], jnp.asarray(quota), jnp.asarray(num_noises), trace,
    )  # fmt: skip
    x, prediction, _, _, spent, trace = lax.fori_loop(0, moves, move, carried)
    high, low = schedule.level(2), schedule.level(1)

    def last(index: Array, best: tuple) -> tuple:
        key = jax.random.fold_in(for_end, index)
        _, found, value = proposed(key, x, prediction, high, low)
        better = value > best[1]
        return jnp.where(better, found.x0, best[0]), jnp.maximum(value, best[1])

    nothing = (prediction.x0, jnp.full_like(rewards[first], -jnp.inf))
    data, value = lax.fori_loop(0, num_calls - spent, last, nothing)
    calls = jnp.asarray(num_calls)
    return Found(data, value, trace.at[moves].set(value), _cost(calls, calls))


def _walk_all(
    key: Any,
    denoiser: Network,
    schedule: Schedule,
    sampler: Callable[..., Any],
    x: Array,
    top: int | None = None,
    bottom: int = 0,
) -> Array:
    """Many states, each walked down with draws of its own."""
    top = schedule.num_steps if top is None else top
    keys = jax.random.split(key, len(x))
    return jax.vmap(lambda k, one: walked(k, denoiser, schedule, sampler, one, top, bottom))(
        keys, x
    )


def _cost(denoiser_calls: Any, reward_calls: Any) -> dict[str, Array]:
    counts = {"denoiser_calls": denoiser_calls, "reward_calls": reward_calls}
    return {name: jnp.asarray(count, jnp.int32) for name, count in counts.items()}
