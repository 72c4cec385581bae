"""One answer from weighted answers: plain functions with one signature.

    (answers, log_weights, scores=None, key=None) -> str | None

`answers` has a string for each particle, None where a text has no answer; `log_weights` `(N,)`
unnormalised, nats.  A text without an answer takes part in no choice.

| function | chooses |
|---|---|
| `weighted_majority` | the answer with the largest posterior mass |
| `majority` | the most frequent answer, weights ignored |
| `argmax` | the answer of the particle with the best last score (without scores: weight) |
| `sample` | the answer of one particle drawn by weight |
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def weighted_majority(
    answers: Sequence[str | None], log_weights: Any, scores: Any = None, key: Any = None
) -> str | None:
    """The answer whose particles carry the most weight; the first of several that tie."""
    return _heaviest(answers, _weights(answers, log_weights))


def majority(
    answers: Sequence[str | None], log_weights: Any = None, scores: Any = None, key: Any = None
) -> str | None:
    """The most frequent answer; the first of several that tie.

    Weights are ignored: on an unresampled population this is the vote of the plain model.
    """
    return _heaviest(answers, np.ones(len(answers)))


def argmax(
    answers: Sequence[str | None], log_weights: Any, scores: Any = None, key: Any = None
) -> str | None:
    """The answer of the particle with the best last score; with the largest weight without scores."""
    by = np.asarray(log_weights if scores is None else scores, float)
    by = np.where([a is None for a in answers], -np.inf, by)
    best = int(np.argmax(by)) if len(by) else 0
    return answers[best] if len(by) else None


def sample(
    answers: Sequence[str | None], log_weights: Any, scores: Any = None, key: Any = None
) -> str | None:
    """The answer of one particle, drawn by weight among those that have one.

    Raises:
        ValueError: without a key.
    """
    if key is None:
        raise ValueError("smcscale: `sample` draws at random.\n  try: solve(..., key=...).")
    weights = _weights(answers, log_weights)
    if weights.sum() == 0:
        return None
    uniform = float(jax.random.uniform(key)) * weights.sum()
    index = int(np.searchsorted(np.cumsum(weights), uniform, side="right"))
    return answers[min(index, int(np.flatnonzero(weights)[-1]))]


def _weights(answers: Sequence[str | None], log_weights: Any) -> np.ndarray:
    log_weights = np.asarray(log_weights, float)
    if log_weights.shape != (len(answers),):
        raise ValueError(
            f"smcscale: {len(answers)} answers but log-weights of shape {log_weights.shape}."
        )
    log_weights = np.where([a is None for a in answers], -np.inf, log_weights)
    top = log_weights.max(initial=-np.inf)
    return np.exp(log_weights - top) if np.isfinite(top) else np.zeros(len(answers))


def _heaviest(answers: Sequence[str | None], weights: np.ndarray) -> str | None:
    mass: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            mass[answer] += float(weight)
    return max(mass, key=lambda answer: mass[answer]) if mass else None
