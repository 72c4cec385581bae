"""Scores of texts by a function of their words, for programs that run on the host.

A judge is `(prompt, texts) -> scores`, in [0, 1], one for the newest step of each text; it may be
`async`. `judge_of` makes one of a `ProcessRewardModel`. Texts that are equal are judged once.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale.models.reasoning.potentials import Potential
from smcscale.models.reasoning.program import Tally, tallied
from smcscale.models.reasoning.remote import split_steps
from smcscale.models.reasoning.reward_model import ProcessRewardModel

Judge = Callable[[Any, Sequence[str]], Any]


def judge_of(judge: Any, delimiter: str) -> Judge:
    """A judge as it is, or a reward model on this machine as one.

    Raises:
        TypeError: neither.
    """
    if isinstance(judge, ProcessRewardModel):
        return functools.partial(_judged_here, judge, delimiter)
    if not callable(judge):
        raise TypeError(
            f"smcscale: `judge` must be a reward model or a function, got {type(judge).__name__}."
        )
    return judge


def _judged_here(
    prm: ProcessRewardModel, delimiter: str, prompt: str, texts: Sequence[str]
) -> np.ndarray:
    """Scores by a reward model on this machine, whole texts at once."""
    return np.array([float(prm.score(prompt, split_steps(t, delimiter))[-1]) for t in texts])


async def scores(judge: Judge, prompt: Any, texts: Sequence[str]) -> np.ndarray:
    """One score for each text, `(len(texts),)`.

    Raises:
        TypeError: the judge returns another number of scores than it was given texts.
        ValueError: a score outside [0, 1].
    """
    different = sorted(set(texts))
    if not different:
        return np.zeros(0)
    # in another thread than this loop's: a judge may start a loop, or a run, of its own
    found = await asyncio.to_thread(judge, prompt, different)
    found = np.asarray(await found if inspect.isawaitable(found) else found, float)
    if found.shape != (len(different),):
        raise TypeError(
            f"smcscale: the reward of {len(different)} texts has shape {found.shape}.\n"
            "  try: `(prompt, texts) -> (len(texts),)`."
        )
    wrong = ~((found >= 0) & (found <= 1))
    if wrong.any():
        text = different[int(wrong.argmax())]
        raise ValueError(
            f"smcscale: the judge gives {found[wrong.argmax()]} to {text[-60:]!r}.\n"
            "  try: a score in [0, 1], such as the sigmoid of a logit."
        )
    told = dict(zip(different, found, strict=True))
    return np.array([told[text] for text in texts])


@eqx.filter_jit
def tallies(rule: Potential, tally: Tally, scores: Any, new: Any) -> Tally:
    """Tallies `(M,)` with one more score where there is a new step."""
    return jax.vmap(lambda t, s, n: tallied(t, rule, s, n))(tally, jnp.asarray(scores), new)


def weights(rule: Potential, tally: Tally) -> np.ndarray:
    """Log potentials `(M,)` of the newest steps."""
    return np.array(_weights(rule, tally))


@eqx.filter_jit
def _weights(rule: Potential, tally: Tally) -> Array:
    return jax.vmap(lambda t: rule(t.previous, t.aggregate))(tally)
