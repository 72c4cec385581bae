"""Feynman-Kac steering: log potentials that turn a model's `p(x_0)` into `p(x_0) exp(lambda r(x_0))`.

At every scored step a reward `r` is read off the predicted data; a *rule* turns the rewards seen so far
into a log potential. Whatever was weighed on the way, the last step weighs by what is left:

    log G_last = lambda r(x_0) - log P,        P the product of all potentials before it,

so that for every rule, tempering and choice of steps the target is exactly `p(x_0) exp(lambda r(x_0))`,
and the evidence estimates `E_p[exp(lambda r(x_0))]`, p being the law of the sampler as it is run.

| rule | log potential of a scored step | at the start |
|---|---|---|
| `difference` (default) | `lambda_s r_s - log P`: what changed | `log P = 0` |
| `maximum` | `lambda_s` times the largest `r` so far | -inf |
| `total` | `lambda_s` times the sum of all `r` so far | 0 |
| `product` | `lambda_s r_s` | |

A rule is a plain function `(seen, strength) -> ()`. After `difference` the particles have the law
`p(x_s) exp(lambda_s r_s)` at every step; the other rules count early rewards several times, which favors
particles that looked good early. They weigh more than they should on the way, and the last potential takes
it back: their evidence is right on average and skewed.

A `Steering` says which reward, how read, when, how strongly:

    Steering(reward, strength=10.0, scored=Interval(start=5, stop=30, every=5))
    Steering(reward, tempering=Exponential(0.008))      # lambda grows from 0 to full strength

Steps are counted from noise: `made` moves of K, 0 at the initial noise. A lambda that follows the ESS is
an annealing kernel: `ParticleFilter(..., annealing=ESSFloor(0.5))`.

Source: Singhal et al. 2025, "A general framework for inference-time scaling and steering of diffusion
models" (arXiv 2501.06848); Kim, Kim & Park 2025 (arXiv 2501.05803) for the tempering. The
published code ends `maximum` and `total` with the running value in place of `r(x_0)`, which is another
target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.schedules import Level


class Seen(NamedTuple):
    """The rewards of a particle so far, moved with it when the population is resampled.

    Attributes:
        last: `()`, reward of the newest scored step.
        maximum: `()`, largest reward, -inf before the first.
        total: `()`, sum of the rewards.
        log_product: `()`, nats: log of the product of all potentials.
    """

    last: Float[Array, ""]
    maximum: Float[Array, ""]
    total: Float[Array, ""]
    log_product: Float[Array, ""]


def difference(seen: Seen, strength: Float[Array, ""]) -> Float[Array, ""]:
    """`lambda_s r_s - lambda_(s+) r_(s+)`: only the newest reward is in the target so far."""
    return strength * seen.last - seen.log_product


def maximum(seen: Seen, strength: Float[Array, ""]) -> Float[Array, ""]:
    """`lambda_s max_u r_u`: a particle keeps the credit of its best prediction."""
    return strength * seen.maximum


def total(seen: Seen, strength: Float[Array, ""]) -> Float[Array, ""]:
    """`lambda_s sum_u r_u`: a particle keeps the credit of all its predictions, again and again."""
    return strength * seen.total


def product(seen: Seen, strength: Float[Array, ""]) -> Float[Array, ""]:
    """`lambda_s r_s`: every scored reward counts once until the last step takes it back."""
    return strength * seen.last


def nothing_seen() -> Seen:
    """Before anything is scored."""
    zero = jnp.zeros(())
    return Seen(zero, zero - jnp.inf, zero, zero)


def score(
    seen: Seen,
    reward: Float[Array, ""],
    rule: Callable[[Seen, Array], Array],
    strength: Float[Array, ""],
    last: Bool[Array, ""],
) -> tuple[Seen, Float[Array, ""]]:
    """The rewards with a new one, and its log potential: the rule's, or at the end what is left.

    Args:
        seen: rewards so far.
        reward: of the newest step; of the data itself at the last one.
        rule: `difference`, `maximum`, `total`, `product`.
        strength: lambda of this step.
        last: whether this is the last step.
    Raises:
        ValueError: for a reward of one particle that is no scalar.
    """
    if reward.shape:
        raise ValueError(
            f"smcscale: the reward of one particle has shape {reward.shape}.\n  try: a scalar."
        )
    known = Seen(reward, jnp.maximum(seen.maximum, reward), seen.total + reward, seen.log_product)
    log_potential = jnp.where(last, difference(known, strength), rule(known, strength))
    # a dead particle stays dead: no difference of infinities
    log_potential = jnp.where(jnp.isneginf(seen.log_product), -jnp.inf, log_potential)
    return known._replace(log_product=seen.log_product + log_potential), log_potential


def log_mean_exp(
    rewards: Float[Array, "*batch guesses"], strength: Array
) -> Float[Array, "*batch"]:
    """`log mean exp(lambda r) / lambda` over guesses; their mean where lambda is 0."""
    some = jnp.where(strength == 0, 1, strength)
    mean = jax.nn.logsumexp(some * rewards, axis=-1) - jnp.log(rewards.shape[-1])
    return jnp.where(strength == 0, jnp.mean(rewards, axis=-1), mean / some)


# ---- when to score


def every_step(made: Int32[Array, "..."]) -> Bool[Array, "..."]:
    """Score after every move, and the initial noise."""
    return jnp.ones_like(made, bool)


class Interval(eqx.Module):
    """Score after moves `start, start + every, ...`, up to `stop` (exclusive, None: to the end).

    The last move is scored whatever the interval.
    """

    start: int = 0
    stop: int | None = None
    every: int = 1

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(
                f"smcscale: `every` of an Interval must be positive, got {self.every}."
            )

    def __call__(self, made: Int32[Array, "..."]) -> Bool[Array, "..."]:
        """Whether to score after `made` moves."""
        due = (made >= self.start) & ((made - self.start) % self.every == 0)
        return due if self.stop is None else due & (made < self.stop)


# ---- how strongly


def full(made: Int32[Array, "..."]) -> Float[Array, "..."]:
    """Full strength from the beginning."""
    return jnp.ones(jnp.shape(made))


class Exponential(eqx.Module):
    """Tempering: the share of lambda is `(1 + rate)^made - 1`, at most 1."""

    rate: float = 0.008

    def __call__(self, made: Int32[Array, "..."]) -> Float[Array, "..."]:
        """Share in [0, 1] after `made` moves."""
        return jnp.minimum(jnp.expm1(made * jnp.log1p(self.rate)), 1)


class Polynomial(eqx.Module):
    """Tempering: the share of lambda is `(rate made)^power`, at most 1."""

    rate: float = 0.01
    power: float = 1.0

    def __call__(self, made: Int32[Array, "..."]) -> Float[Array, "..."]:
        """Share in [0, 1] after `made` moves."""
        return jnp.minimum((self.rate * made) ** self.power, 1)


# ---- what is scored


def gaussian_guess(x: Array, prediction: Prediction, level: Level) -> Any:
    """A law of the data given a noisy state: normal around the prediction.

    Its variance is the prediction's, or where that is not known `sigma^2 / (alpha^2 + sigma^2)`, that of
    data with variance 1.
    """
    variance = prediction.variance
    if variance is None:
        variance = level.sigma**2 / (level.alpha**2 + level.sigma**2)
    scale = jnp.sqrt(variance)  # 0 where nothing is left to guess
    return dist.Normal(prediction.x0, scale, validate_args=False).to_event(jnp.ndim(x))


class Steering(eqx.Module):
    """Which reward steers, how it is read off a noisy state, when, how strongly.

    Attributes:
        reward: `(x_0) -> ()`, finite for a predicted `x_0`; of the data itself it may be -inf.
        rule: `difference`, `maximum`, `total`, `product`, or one's own.
        strength: lambda; an array changes without a new compilation.
        tempering: `(made) -> ()`, share of lambda; the last step has all of it.
        scored: `(made) -> bool`; the last step is always scored.
        num_guesses: 0 reads the reward at the predicted mean of the data; M draws M guesses of the data
            and takes `log mean exp(lambda r) / lambda`, nearer to what the future will bring.
        guess: `(x, prediction, level) -> Distribution` of a guess; any law leaves the target as it is.
        value: `(x, prediction, level) -> ()`, what a noisy state is worth, in place of both: a learned
            reward, or a likelihood as broad as the level is noisy (`twisted.NoisyLikelihood`).
    """

    reward: Callable[[Array], Array]
    rule: Callable[[Seen, Array], Array] = difference
    strength: ArrayLike = 1.0
    tempering: Callable[[Array], Array] = full
    scored: Callable[[Array], Array] = every_step
    num_guesses: int = eqx.field(static=True, default=0)
    guess: Callable[[Array, Prediction, Level], Any] = gaussian_guess
    value: Callable[[Array, Prediction, Level], Array] | None = None

    def __check_init__(self):
        for name in ("reward", "rule", "tempering", "scored", "guess"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"smcscale: `{name}` of a Steering must be a function, got {getattr(self, name)!r}."
                    + ("\n  try: scored=Interval(every=5)." if name == "scored" else "")
                )
        if np.ndim(self.strength) or self.num_guesses < 0:
            raise ValueError(
                "smcscale: a Steering needs a scalar `strength` and `num_guesses` of 0 or more, got "
                f"shape {np.shape(self.strength)} and {self.num_guesses}."
            )
        if self.num_guesses and self.value is not None:
            raise ValueError(
                "smcscale: a Steering reads noisy states by `value` or by guesses, not both.\n"
                "  try: num_guesses=0."
            )

    def start(self) -> Seen:
        """Before anything is scored."""
        return nothing_seen()

    def due(self, made: Int32[Array, ""], last: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the state after `made` moves is scored."""
        return self.scored(made) | last

    def strength_at(self, made: Int32[Array, ""], last: Bool[Array, ""]) -> Float[Array, ""]:
        """Lambda after `made` moves, all of it at the last."""
        return jnp.asarray(self.strength) * jnp.where(last, 1, self.tempering(made))

    def read(self, x: Array, prediction: Prediction, level: Level) -> Float[Array, ""]:
        """What a noisy state is worth, without guesses: `value`, or the reward of the predicted data."""
        if self.value is not None:
            return self.value(x, prediction, level)
        return self.reward(prediction.x0)

    def calls(self, made: Int32[Array, ""], last: Bool[Array, ""]) -> Array:
        """Calls of the reward after `made` moves: one, or one for each guess."""
        noisy = max(self.num_guesses, 1) if self.value is None else 0
        return jnp.where(last, 1, jnp.where(self.scored(made), noisy, 0))

    def __call__(
        self,
        seen: Seen,
        x: Float[Array, "..."],
        prediction: Prediction,
        guesses: Float[Array, "guesses ..."] | None,
        level: Level,
        made: Int32[Array, ""],
        last: Bool[Array, ""],
    ) -> tuple[Seen, Float[Array, ""]]:
        """Score a state that has just been reached.

        Args:
            seen: rewards so far.
            x: the state; the data at the last step.
            prediction: of the denoiser for it; `x0` is the data itself at the last step.
            guesses: `(num_guesses, ...)` draws of `guess`, None without any.
            level: of `x`.
            made: moves made.
            last: whether `x` is the data.
        Returns:
            the rewards with this one, and the log potential `()`, 0 where it is not scored.
        """

        def noisy() -> Array:
            if guesses is None:
                return self.read(x, prediction, level)
            return log_mean_exp(jax.vmap(self.reward)(guesses), jnp.asarray(self.strength))

        def read() -> Array:
            # reading the mean needs no second branch: at the last step it is the data
            plain = self.value is None and guesses is None
            return noisy() if plain else lax.cond(last, lambda: self.reward(x), noisy)

        return self.weigh(seen, read, made, last)

    def weigh(
        self,
        seen: Seen,
        read: Callable[[], Array],
        made: Int32[Array, ""],
        last: Bool[Array, ""],
    ) -> tuple[Seen, Float[Array, ""]]:
        """Score by a reward that is read where it is due, however it is read.

        Args:
            seen: rewards so far.
            read: `() -> ()`, the reward of the newest step.
            made: moves made.
            last: whether this is the last step.
        Returns:
            the rewards with this one, and the log potential `()`, 0 where it is not scored.
        Raises:
            ValueError: for a reward of one particle that is no scalar.
            TypeError: for a reward that JAX cannot trace.
        """

        def scored() -> tuple[Seen, Array]:
            reward = jnp.asarray(_traced(read), seen.last.dtype)
            return score(seen, reward, self.rule, self.strength_at(made, last), last)

        if self.scored is every_step:
            return scored()
        # a step is due for all particles or for none, so only due ones call the reward
        return lax.cond(
            self.due(made, last), scored, lambda: (seen, jnp.zeros_like(seen.log_product))
        )


def _traced(read: Callable[[], Array]) -> Array:
    try:
        return read()
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            "smcscale: JAX cannot trace the reward, which asks for values of its argument.\n"
            "  try: jax.numpy in place of NumPy or PyTorch, or `host_denoise`."
        ) from error
