"""`denoise`: a diffusion model as a NumPyro program whose steps of time are steps of denoising.

The initial noise is a latent site, each move to a lower level is a latent site, the steering potential is
a factor; any particle filter of the toolkit runs it:

    smc = SMC(ParticleFilter(denoise), num_particles=16)
    smc.run(key, denoiser, vp_cosine(100), Steering(reward, strength=10.0), shape=(8, 8))
    smc.get_samples()["x"][:, -1]                                # the data

| argument | what it decides |
|---|---|
| `denoiser` | the model: `(x, level) -> Prediction` |
| `schedule` | the noise levels |
| `steering` | the target: `p(x_0) exp(lambda r(x_0))` (`potentials.py`), or `p` alone |
| `sampler` | the proposal: how a state moves a level down (`samplers.py`) |
| kernels of `ParticleFilter` | resampling, trigger, annealing |

The network is called exactly once for each particle and level with noise, K calls in all: the prediction
at a state serves its potential and the move away from it, and is carried between the two (moved with the
particle when the population is resampled). No call is made at level 0. `smc.cost` counts
`denoiser_calls` and `reward_calls`.

Source: Singhal et al. 2025 (arXiv 2501.06848), algorithm 1; its published code scores the prediction that a
state was drawn from, one step late, and weighs by other last potentials for two rules.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array
from numpyro.contrib.control_flow import scan

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Proposed, ancestral
from smcscale.models.diffusion.schedules import Level, Schedule
from smcscale.program.spend import spend


def denoise(
    denoiser: Callable[[Array, Level], Prediction],
    schedule: Schedule,
    steering: Any = None,
    *,
    shape: tuple[int, ...],
    sampler: Callable[..., Any] = ancestral,
    start: Any = None,
) -> None:
    """The program: draw noise; move a level down, predict, weigh, K times.

    Args:
        denoiser: `(x, level) -> Prediction` for one state.
        schedule: K + 1 levels.
        steering: a `Steering`, or what has its face (`LinearProblem.potential()`); None samples the model.
        shape: of a state.
        sampler: `(denoiser, x, prediction, high, low) -> Distribution | Proposed`.
        start: law of the state at level K, a `Distribution` or `Proposed`; by default normal with the
            schedule's `initial_scale`.
    Sites:
        noise: `shape`, before the loop; x: `shape`, the state after each move, the last one the data;
        reward: of the newest scored step (deterministic); guess: where the steering draws guesses.
    Raises:
        TypeError: for an argument of another kind, by name.
    """
    if not isinstance(shape, tuple):
        raise TypeError(f"smcscale: `shape` must be a tuple, got {shape!r}.\n  try: shape=(64,).")
    if steering is not None and not hasattr(steering, "num_guesses"):
        raise TypeError(
            f"smcscale: `steering` cannot be a {type(steering).__name__}.\n  try: Steering(reward)."
        )
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"smcscale: `schedule` cannot be a {type(schedule).__name__}.\n  try: vp_linear(100)."
        )
    walk = schedule.walk()
    top = schedule.level(-1)
    if start is None:
        start = dist.Normal(jnp.zeros(shape), schedule.initial_scale).to_event(len(shape))
    x = drawn("noise", start)
    prediction = denoiser(x, top)
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"smcscale: `denoiser` returned a {type(prediction).__name__}, not a Prediction.\n"
            "  try: Denoiser(network, predictors.eps), or x0, v, score, velocity."
        )
    seen = None
    if steering is not None:
        zero, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
        guesses = guessed("first_guess", steering, x, prediction, top)
        seen, log_potential = steering(steering.start(), x, prediction, guesses, top, zero, no)
        numpyro.factor("first_potential", log_potential)

    def step(state, row):
        x, prediction, seen = state
        x = drawn("x", sampler(denoiser, x, prediction, row.high, row.low))
        prediction = lax.cond(
            row.last,
            lambda: as_prediction(x, prediction),
            lambda: denoiser(x, row.low),
        )
        extra = getattr(sampler, "extra_calls", 0)
        first = jnp.asarray(row.made == 1)  # the call before the loop
        spend(denoiser_calls=first + (~row.last) * (1 + extra))
        if steering is not None:
            guesses = guessed("guess", steering, x, prediction, row.low)
            seen, log_potential = steering(
                seen, x, prediction, guesses, row.low, row.made, row.last
            )
            numpyro.factor("potential", log_potential)
            numpyro.deterministic("reward", seen.last)
            before = jnp.where(first, steering.calls(row.made - 1, jnp.asarray(False)), 0)
            spend(reward_calls=before + steering.calls(row.made, row.last))
        return (x, prediction, seen), None

    scan(step, (x, prediction, seen), walk)


def drawn(name: str, law: Any) -> Any:
    """A latent site of a distribution, with the factor of a `Proposed` one."""
    if not isinstance(law, Proposed):
        return numpyro.sample(name, law)
    value: Any = numpyro.sample(name, law.distribution)
    numpyro.factor(f"{name}_weight", law.log_weight(value))
    return value


def guessed(name: str, steering: Any, x: Array, prediction: Prediction, level: Level) -> Any:
    """Guesses of the data behind `x`, `(num_guesses, ...)`, or None without any."""
    if not steering.num_guesses:
        return None
    law = steering.guess(x, prediction, level)
    return numpyro.sample(name, law, sample_shape=(steering.num_guesses,))


def as_prediction(x: Array, like: Prediction) -> Prediction:
    """What there is to predict of data: the data."""
    return jax.tree.map(jnp.zeros_like, like)._replace(x0=x.astype(like.x0.dtype))
