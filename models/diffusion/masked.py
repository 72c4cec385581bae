"""Masked diffusion over sequences: `unmask`, a program whose steps of time show tokens.

A sequence has L tokens in `[0, V)`; the value V is the mask.  A network is any callable
`network(tokens, level) -> (L, V)` logits of the clean tokens given those shown.  `level` is the
share that is shown, 0 at noise and 1 at data (the package's `alpha`, not its index k).  One row moves
from `level` to `next_level`; the last one shows what is left.

    from smcscale.models.diffusion.reveal import blank, even_levels, in_random_order
    from smcscale.models.diffusion.token_steering import TokenSteering

    steering = TokenSteering(reward, strength=2.0)
    smc = SMC(ParticleFilter(unmask, store="last"), num_particles=64)
    smc.run(key, network, blank(L, V), even_levels(L), reveal=in_random_order, steering=steering)

| `reveal` | which masked positions are shown in a row | law of the end |
|---|---|---|
| `independently` | each with probability `(next - level) / (1 - level)` | the chain's own p |
| `in_random_order` | one, uniform (site `position`) | the network's p, exactly |
| `left_to_right` | the first | the same |
| `most_confident` | the one whose likeliest token is likeliest | the same |

Tokens shown in one row are drawn independently, so a network with exact marginals has its joint
law only at one token a row, at temperature 1.  A position rule may read the state in any way, but
not the tokens about to be drawn (`blocks.py` has rules that do, with laws of their own).

With p the law of the unsteered chain, every method is a factor in the same program:

| argument | target, up to Z | Z |
|---|---|---|
| `steering=TokenSteering(r, l)` | `p(x) exp(l r(x))`, for every rule | `E_p[exp(l r)]` |
| `steering=event(A)` | `p(x) 1[x in A]` | `P(A)` |
| `guidance=annealed(b)`, `classifier_free(q, a)`, `multiplied(q)` | `p^b`, `p^(1-a) q^a`, `p q`, of paths | its sum; over x at one token a row |
| `guidance=Heated(c)` | `p(x)`, drawn at temperature c and corrected | 1 |
| `classifier_guidance(l, a)` | `p(x) p(z | x)^a` | `E_p[p(z | x)^a]` |

`corrected=False` gives the published guided samplers, whose weights are dropped: they target the
law of the guided chain itself (a product of conditionals normalized one by one), evidence 1.

Source: Sahoo et al. 2024 (arXiv 2406.07524), Shi et al. 2024 (arXiv 2406.04329) for the kernel;
Singhal et al. 2025 (arXiv 2501.06848) for steering; Lee et al. 2025 (arXiv 2502.06079)
for guidance with weights.  Read next: `ctmc.py`, `blocks.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float, Int
from numpyro.contrib.control_flow import scan

from smcscale.models.diffusion.guidance import Guided
from smcscale.models.diffusion.potentials import Seen, nothing_seen
from smcscale.models.diffusion.reveal import Move, Network, independently, transition
from smcscale.models.diffusion.token_steering import TokenSteering, steer
from smcscale.program.spend import spend


class Canvas(NamedTuple):
    """What one particle carries.

    Attributes:
        tokens: `(L,)`, masks included.
        reading: the tables at `tokens`, where completions need them before the next row does.
        seen: rewards so far, None without steering.
    """

    tokens: Int[Array, "..."]
    reading: Any
    seen: Seen | None


class Reading(NamedTuple):
    """The network's table `(L, V)` at a sequence, and what guidance made of it."""

    log_probs: Float[Array, "..."]
    guided: Guided | None


def unmask(
    network: Network,
    start: Int[Array, "..."],
    levels: Float[Array, "..."],
    *,
    reveal: Callable[..., Array] = independently,
    guidance: Callable[..., Guided] | None = None,
    steering: TokenSteering | None = None,
) -> None:
    """The program: choose positions, draw their tokens, weigh.

    A path costs one network call a row (with completions, the first is shared by all particles).

    Args:
        network: `(tokens, level) -> (L, V)` logits.
        start: `(L,)` int, from `blank`; tokens that are not V are kept.
        levels: `(T + 1,)`, share of tokens shown, from 0 to 1; `reveal` rules of one token a row
            need a row for each mask.
        reveal: `(log_probs, tokens, move) -> (L,)` probabilities to be shown, see the table above;
            it may sample.
        guidance: `guidance.annealed`, `Heated`, `Lookahead`, or one's own.
        steering: a reward.
    Sites:
        tokens: `(L,)` after the row; position: of `in_random_order`; guesses: `(M, L)`
            completions; guidance, steering: the potentials.
    Raises:
        ValueError: for `start` or `levels` of another shape.
        TypeError: for a steering of another kind.
    """
    start, levels = jnp.asarray(start, jnp.int32), jnp.asarray(levels)
    if start.ndim != 1:
        raise ValueError(
            f"smcscale: `start` of unmask must be one sequence (L,), got shape {start.shape}.\n"
            "  try: blank(length, vocabulary); a sequence for each run is not supported."
        )
    if levels.ndim != 1 or levels.shape[0] < 2:
        raise ValueError(
            f"smcscale: `levels` of unmask must be (T + 1,) with T at least 1, got {levels.shape}.\n"
            "  try: even_levels(num_steps)."
        )
    if not isinstance(steering, TokenSteering | None):
        raise TypeError(
            f"smcscale: `steering` of unmask cannot be a {type(steering).__name__}.\n"
            "  try: TokenSteering(reward)."
        )
    calls = 1 + getattr(guidance, "calls", 0)

    def read(tokens: Array, level: Array) -> Reading:
        log_probs = jax.nn.log_softmax(network(tokens, level))
        return Reading(log_probs, None if guidance is None else guidance(log_probs, tokens, level))

    carried = steering is not None and steering.guesses > 0

    def step(canvas: Canvas, move: Move) -> tuple[Canvas, None]:
        tokens = canvas.tokens
        reading = canvas.reading if carried else read(tokens, move.level)
        shown = jnp.where(move.last, 1.0, reveal(reading.log_probs, tokens, move))
        proposal = reading.log_probs if reading.guided is None else reading.guided.proposal
        new: Any = numpyro.sample("tokens", transition(proposal, tokens, shown))
        if reading.guided is not None:
            numpyro.factor("guidance", _correction(reading.guided, tokens, new))
        if carried:
            # the next row draws from this table too: one call serves both
            reading = jax.lax.cond(move.last, lambda: reading, lambda: read(new, move.next_level))
        spend(denoiser_calls=jnp.where(move.last, 0, calls) if carried else calls)
        seen = canvas.seen
        if steering is not None:
            seen = steer(steering, seen, reading.log_probs, new, move)
        return Canvas(new, reading if carried else None, seen), None

    opening = Canvas(
        start,
        read(start, levels[0]) if carried else None,
        None if steering is None else nothing_seen(),
    )
    made = jnp.arange(1, levels.shape[0], dtype=jnp.int32)
    scan(step, opening, Move(levels[:-1], levels[1:], made, made == levels.shape[0] - 1))


def _correction(guided: Guided, before: Array, after: Array) -> Float[Array, ""]:
    """Log ratio of target to proposal of the tokens that a row has shown."""
    mask = guided.proposal.shape[1]
    ratio = jnp.where(jnp.isneginf(guided.proposal), -jnp.inf, guided.target - guided.proposal)
    chosen = jnp.take_along_axis(ratio, jnp.minimum(after, mask - 1)[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where((before == mask) & (after != mask), chosen, 0.0))


class ExactMasked(eqx.Module):
    """The network of a given joint law, by enumeration: for tests and first steps.

    Attributes:
        log_joint: `(V, ..., V)`, L axes, log-probabilities of all sequences.
    """

    log_joint: Float[Array, "..."]

    def __call__(self, tokens: Int[Array, " L"], level: Any = None) -> Float[Array, "L V"]:
        """Log-probabilities `(L, V)` of each token given those shown."""
        length, vocabulary = self.log_joint.ndim, self.log_joint.shape[0]
        sequences = jnp.indices(self.log_joint.shape).reshape(length, -1).T
        fits = jnp.all((tokens == vocabulary) | (sequences == tokens), axis=1)
        given = jax.nn.softmax(jnp.where(fits, self.log_joint.reshape(-1), -jnp.inf))
        return jnp.log(jnp.einsum("n,nlv->lv", given, jax.nn.one_hot(sequences, vocabulary)))
