"""Tokens behind masks: the rows of a walk that shows them, and which ones a row shows.

| name | what it is |
|---|---|
| `Network` | logits of the clean tokens given those shown; any callable |
| `Move`, `even_levels`, `cosine_levels`, `blank` | rows, their levels, the sequence of masks |
| `independently`, `in_random_order`, `left_to_right`, `most_confident` | the chance of each mask to be shown |
| `transition` | the exact reverse kernel of masking, a distribution |

Read next: `masked.py`, the program.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int


class Network(Protocol):
    """A model of clean tokens given those shown; any callable."""

    def __call__(self, tokens: Int[Array, " L"], level: Float[Array, ""]) -> Float[Array, "L V"]:
        """Logits of every position; those of shown positions are not used."""
        ...


class Move(NamedTuple):
    """One row of the loop.

    Attributes:
        level: `()`, share of tokens shown before it.
        next_level: `()`, after it; 1 in the last row.
        made: `()` int32, rows made with it.
        last: `()` bool.
    """

    level: Float[Array, "..."]
    next_level: Float[Array, "..."]
    made: Int[Array, "..."]
    last: Bool[Array, "..."]


def blank(length: int, vocabulary: int) -> Int[Array, " L"]:
    """The sequence of masks, `(length,)`; write a prompt or known tokens into it with `.at`."""
    return jnp.full(length, vocabulary, jnp.int32)


def even_levels(num_steps: int) -> Float[Array, " levels"]:
    """Levels `(num_steps + 1,)` from 0 to 1 in equal steps: the log-linear noise of MDLM."""
    return jnp.linspace(0.0, 1.0, num_steps + 1)


def cosine_levels(num_steps: int) -> Float[Array, " levels"]:
    """Levels `(num_steps + 1,)`: few tokens first, `1 - cos(pi s / 2)`.

    Source: Chang et al. 2022, MaskGIT (arXiv 2202.04200).
    """
    rising = 1 - jnp.cos(0.5 * jnp.pi * jnp.linspace(0.0, 1.0, num_steps + 1))
    return rising.at[-1].set(1.0)


def independently(
    log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], move: Move
) -> Float[Array, " L"]:
    """Each position by itself, as the reverse of masking tokens independently."""
    share = (move.next_level - move.level) / (1 - move.level)
    return jnp.broadcast_to(share, tokens.shape)


def in_random_order(
    log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], move: Move
) -> Float[Array, " L"]:
    """One masked position, all alike; a row for each mask."""
    masked = tokens == log_probs.shape[1]
    logits = jnp.where(masked | ~jnp.any(masked), 0.0, -jnp.inf)
    position: Any = numpyro.sample("position", dist.CategoricalLogits(logits, validate_args=False))
    return _one_hot(position, tokens.shape[0])


def left_to_right(
    log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], move: Move
) -> Float[Array, " L"]:
    """The first masked position; a row for each mask."""
    return _one_hot(jnp.argmax(tokens == log_probs.shape[1]), tokens.shape[0])


def most_confident(
    log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], move: Move
) -> Float[Array, " L"]:
    """The masked position whose likeliest token is likeliest; a row for each mask."""
    masked = tokens == log_probs.shape[1]
    confidence = jnp.where(masked, jnp.max(log_probs, axis=1), -jnp.inf)
    return _one_hot(jnp.argmax(confidence), tokens.shape[0])


def _one_hot(position: Array, length: int) -> Float[Array, " L"]:
    return (jnp.arange(length) == position).astype(float)


def transition(
    log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], shown: Float[Array, " L"]
) -> dist.Distribution:
    """Law of the next tokens, `(L,)` in `[0, V]`: a mask is shown with probability `shown`.

    Args:
        log_probs: `(L, V)`, normalized, of the tokens that a mask may become.
        tokens: `(L,)` before the step; those already shown stay.
        shown: `(L,)`, in [0, 1].
    Returns:
        A NumPyro distribution with `sample` and `log_prob`, the exact reverse kernel of masking if
        `log_probs` are the marginals given `tokens`, up to the independence of its tokens.
    """
    mask = log_probs.shape[1]
    becomes = jnp.concatenate(
        [jnp.log(shown)[:, None] + log_probs, jnp.log1p(-shown)[:, None]], axis=1
    )
    stays = jnp.where(jnp.arange(mask + 1) == tokens[:, None], 0.0, -jnp.inf)
    table = jnp.where(tokens[:, None] == mask, becomes, stays)
    return dist.CategoricalLogits(table, validate_args=False).to_event(1)
