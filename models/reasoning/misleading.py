"""A bed whose judge misleads, by two knobs: errors that look right for long, and wrong texts that pass.

    bed = misleading(overconfident=0.3)
    smc.run(key, bed.lm, bed.reward, prompt, max_steps=bed.max_steps)
    bed.answers(tokens, lengths)            0 where a text is right

A text has `depth` steps, each right with a fixed chance, else one of several errors; its answer is right if
every step is, else that of its first error. The judge sees the first error of a text. It scores what is right so far `RIGHT`, and after an
error:

| kind of first error | score while it is early | later | at the end |
|---|---|---|---|
| plain | `WRONG` | `WRONG` | `WRONG` |
| over-confident, a share `overconfident` of all | `SURE` | `WRONG` | `WRONG` |
| false positive, a share `false_positives` of all | `RIGHT` | `RIGHT` | `SURE` |

Over-confident errors draw particles away from right texts, before they are seen through: resampling early
then hurts. False positives beat right texts at the end: whoever takes the best of more texts meets more of
them. Which error is of which kind depends on its place and on the word, by a seed, so a judge is the same for
all texts of a problem.

Source: the two failures that process reward models are known for, Giannone et al. 2025 (arXiv 2510.05825)
for early over-confidence, Stroebl, Kapoor & Narayanan 2024 (arXiv 2411.17501) for false positives.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning.beds import Bed
from smcscale.models.reasoning.known_model import KnownModel
from smcscale.models.reasoning.language_model import TextState
from smcscale.models.reasoning.rewards import RewardFunction

#: scores of what is right so far, of errors, of over-confident errors while they are early
RIGHT, WRONG, SURE = 0.8, 0.2, 0.97
#: the word of a right step
GOOD = 0


class EveryStep(eqx.Module):
    """The law of a step: right with one chance, else any error, whatever was written.

    Attributes:
        log_probs: `(V,)`.
    """

    log_probs: Float[Array, " V"]

    def __call__(self, tokens: Int32[Array, " C"], length: Int32[Array, ""]) -> Float[Array, " V"]:
        """Log-probabilities `(V,)` of the next step."""
        return self.log_probs


class Misled(eqx.Module):
    """The score of a text by its first error.

    Attributes:
        table: `(T + 1, T, V)`, after so many steps, of a first error at a place by its word.
    """

    table: Float[Array, "T1 T V"]

    def __call__(self, state: TextState) -> Float[Array, ""]:
        """The score `()` of the text so far."""
        written = state.written
        wrong = (written.tokens != GOOD) & (jnp.arange(written.tokens.shape[0]) < written.length)
        place = jnp.argmax(wrong)
        told = self.table[written.length, place, written.tokens[place]]
        return jnp.where(jnp.any(wrong), told, RIGHT)


def misleading(
    seed: int = 0,
    *,
    overconfident: float = 0.0,
    false_positives: float = 0.0,
    depth: int = 8,
    right: float = 0.75,
    errors: int = 7,
    early: float = 0.6,
) -> Bed:
    """A bed with exact evidence and the exact posterior of its answers.

    Args:
        seed: which errors are of which kind.
        overconfident, false_positives: shares of errors (by place and word), together at most 1.
        depth: steps of a text.
        right: chance that a step is.
        errors: words that are wrong.
        early: share of the steps in which over-confident errors are believed.
    Raises:
        ValueError: shares or chances outside [0, 1].
    """
    if min(overconfident, false_positives) < 0 or overconfident + false_positives > 1:
        raise ValueError(
            "smcscale: overconfident and false_positives are shares of all errors, got "
            f"{overconfident} and {false_positives}."
        )
    if not (0 < right < 1 and 0 <= early <= 1):
        raise ValueError(
            f"smcscale: right and early must be chances, got right={right}, early={early}."
        )
    size = errors + 1
    rank = np.random.default_rng(seed).permutation(depth * errors).reshape(depth, errors)
    kind = (rank + 0.5) / rank.size
    sure, passing = kind < overconfident, kind > 1 - false_positives
    table = np.full((depth + 1, depth, size), WRONG)
    for steps in range(depth + 1):
        if steps <= early * depth:
            table[steps, :, 1:][sure] = SURE
        table[steps, :, 1:][passing] = SURE if steps == depth else RIGHT
    law = np.log(np.array([right] + [(1 - right) / errors] * errors))
    lm = KnownModel(EveryStep(jnp.asarray(law, jnp.float32)), size, max_tokens=depth)
    judge = RewardFunction(Misled(jnp.asarray(table, jnp.float32)))
    # right, or a first error at a place: as many answers
    place = right ** np.arange(depth) * (1 - right) / errors
    mass = np.append(right**depth * RIGHT, place[:, None] * table[depth, :, 1:])
    evidence = float(mass.sum())

    def answers(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        wrong = (tokens != GOOD) & (np.arange(depth) < np.asarray(lengths)[..., None])
        first = wrong.argmax(-1)
        word = np.take_along_axis(tokens, first[..., None], axis=-1)[..., 0]
        return np.where(wrong.any(-1), 1 + first * errors + word - 1, 0)

    def text(tokens: np.ndarray) -> str:
        return " ".join("right" if token == GOOD else f"error{token}" for token in tokens)

    return Bed(lm, judge, depth, evidence, mass / evidence, answers, text)
