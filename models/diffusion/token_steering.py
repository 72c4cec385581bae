"""Steering of token sequences: a reward of whole ones, and what it is worth on the way.

| name | what it is |
|---|---|
| `TokenSteering` | which reward, how estimated, when, how strongly |
| `event(predicate)` | sequences with an event; the evidence is its probability |
| `classifier_guidance(l, a)` | `p(x) p(z | x)^a`: steering and guidance together |
| `steer` | one scoring inside a program |

Source: Singhal et al. 2025 (arXiv 2501.06848); Lee et al. 2025 (arXiv 2502.06079).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Float, Int

from smcscale.models.diffusion.guidance import Lookahead
from smcscale.models.diffusion.potentials import Seen, difference, every_step, score
from smcscale.models.diffusion.reveal import Move, transition
from smcscale.program.spend import spend


def exponential_mean(rewards: Float[Array, " M"], strength: Float[Array, ""]) -> Float[Array, ""]:
    """`log mean exp(lambda r) / lambda`, near to what the future will bring."""
    return (logsumexp(strength * rewards) - jnp.log(rewards.shape[0])) / strength


class Frequency(eqx.Module):
    """Log share of completions with an event, smoothed: never `-inf`.

    Attributes:
        prior: completions of each sort that are counted beforehand.
    """

    prior: float = 0.5

    def __call__(self, rewards: Float[Array, " M"], strength: Float[Array, ""]) -> Float[Array, ""]:
        count = jnp.sum(jnp.isfinite(rewards))
        return jnp.log(count + self.prior) - jnp.log(rewards.shape[0] + 2 * self.prior)


class TokenSteering(eqx.Module):
    """Steering of a reward of whole sequences: the `Steering` of `potentials.py` for tokens.

    On the way a sequence is scored by `estimate` of the rewards of its completions, its masks
    filled independently by the network (site `guesses`), or by `value`. The score is kept with the
    particle and never drawn again, so none of it changes the target.

    Attributes:
        reward: `(tokens (L,)) -> ()` of a whole sequence; `-inf` needs an `estimate` that is not.
        strength: lambda; an array changes without a new compilation.
        rule: `difference`, `maximum`, `total`, `product` of `potentials.py`, or one's own.
        num_guesses: completions of a score.
        estimate: `(rewards (M,), strength) -> ()`.
        value: `(tokens, level) -> ()`, a learned reward of partly masked sequences, in place of both.
        scored: `(made) -> bool`, after how many rows; the last is always scored.
    """

    reward: Callable[..., Array]
    strength: ArrayLike = 1.0
    rule: Callable[[Seen, Array], Array] = difference
    num_guesses: int = eqx.field(static=True, default=4)
    estimate: Callable[..., Array] = exponential_mean
    value: Callable[..., Array] | None = None
    scored: Callable[[Array], Array] = every_step

    def __check_init__(self):
        for name in ("reward", "rule", "estimate", "scored"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"smcscale: `{name}` of TokenSteering must be a function, got "
                    f"{getattr(self, name)!r}."
                )
        if np.ndim(self.strength):
            raise ValueError(
                "smcscale: `strength` of TokenSteering must be a scalar, got shape "
                f"{np.shape(self.strength)}."
            )
        if self.num_guesses < 1:
            raise ValueError(
                f"smcscale: `num_guesses` of TokenSteering must be at least 1, got "
                f"{self.num_guesses}.\n  try: value=, or scored=Interval(start=T) for the end alone."
            )

    @property
    def guesses(self) -> int:
        """Completions drawn in a row."""
        return self.num_guesses if self.value is None else 0

    def weigh(
        self, seen: Seen, tokens: Int[Array, " L"], guesses: Int[Array, "M L"] | None, move: "Move"
    ) -> tuple[Seen, Float[Array, ""]]:
        """The rewards with the one of new `tokens`, and the log potential, 0 where not scored.

        In the last row it is what is left of `lambda reward(tokens)`, whatever the rule.
        """
        strength = jnp.asarray(self.strength, seen.last.dtype)
        if guesses is not None:
            reward = self.estimate(jax.vmap(self.reward)(guesses), strength)
        else:
            assert self.value is not None
            reward = self.value(tokens, move.next_level)
        reward = jnp.where(move.last, self.reward(tokens), reward).astype(seen.last.dtype)
        known, log_potential = score(seen, reward, self.rule, strength, move.last)
        due = self.scored(move.made) | move.last
        kept = jax.tree.map(lambda new, old: jnp.where(due, new, old), known, seen)
        return kept, jnp.where(due, log_potential, 0.0)


def event(
    predicate: Callable[..., Array], *, num_guesses: int = 4, prior: float = 0.5
) -> TokenSteering:
    """Steering towards the sequences with an event; the evidence is its probability.

    Args:
        predicate: `(tokens (L,)) -> bool ()` of a whole sequence.
        num_guesses: completions whose share with the event is the score on the way.
        prior: smooths that share, see `Frequency`.
    """
    return TokenSteering(_Indicator(predicate), num_guesses=num_guesses, estimate=Frequency(prior))


class _Indicator(eqx.Module):
    predicate: Callable[..., Array]

    def __call__(self, tokens: Int[Array, " L"]) -> Float[Array, ""]:
        return jnp.where(self.predicate(tokens), 0.0, -jnp.inf)


def classifier_guidance(
    log_likelihood: Callable[..., Array], scale: float | Float[Array, ""] = 1.0
) -> dict[str, Any]:
    """Guidance by a classifier with its weights, as arguments of `unmask`: `**classifier_guidance(l)`.

    Args:
        log_likelihood: `(tokens, level) -> ()`, log `p(z | tokens)`, of any partly masked sequence;
            what it says of whole ones is the target's.
        scale: the exponent a of `p(x) p(z | x)^a`.
    Source: Lee et al. 2025 (arXiv 2502.06079); Nisonoff et al. 2024 (arXiv 2406.01572).
    """
    steering = TokenSteering(_Whole(log_likelihood), scale, value=log_likelihood)
    return {"guidance": Lookahead(log_likelihood, scale), "steering": steering}


class _Whole(eqx.Module):
    log_likelihood: Callable[..., Array]

    def __call__(self, tokens: Int[Array, " L"]) -> Float[Array, ""]:
        return self.log_likelihood(tokens, jnp.ones(()))


def steer(
    steering: TokenSteering,
    seen: Any,
    log_probs: Float[Array, "L V"] | None,
    tokens: Int[Array, " L"],
    move: Move,
) -> Seen:
    """Score new tokens inside a program: the rewards with theirs; a factor, and a site of guesses.

    Args:
        steering: which reward.
        seen: rewards so far.
        log_probs: the network's table at `tokens`; read only where guesses are drawn.
        tokens: `(L,)`.
        move: the row.
    """
    guesses: Any = None
    if steering.guesses:
        assert log_probs is not None
        law = transition(log_probs, tokens, jnp.ones(tokens.shape))
        guesses = numpyro.sample("guesses", law, sample_shape=(steering.guesses,))
    seen, log_potential = steering.weigh(seen, tokens, guesses, move)
    numpyro.factor("steering", log_potential)
    due = jnp.where(steering.scored(move.made), steering.guesses, 0)
    spend(reward_calls=jnp.where(move.last, 1, due))
    return seen
