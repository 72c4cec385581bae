"""A method run on one question: its texts, their weights and scores, what it cost.

    run_method(method, key, lm, prm, read_prompt(lm, prm, text), num_particles=16, max_steps=12)

`solve` and `bench` both read this.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from smcscale.models.reasoning import gibbs
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.methods import Method
from smcscale.models.reasoning.program import Prompt, Reward
from smcscale.run import SMC


class Outcome(NamedTuple):
    """What a method left, M texts: N, or those of several sweeps together.

    Attributes:
        tokens: `(M, C)` int32, padded.
        lengths: `(M,)` int32.
        log_probs: `(M,)`, of the texts to the language model, nats.
        scores: `(M,)`, the last of each, in [0, 1].
        log_weights: `(M,)`, unnormalised, nats.
        log_evidence: None under a kernel without a target.
        cost: by name.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray
    log_weights: np.ndarray
    log_evidence: float | None
    cost: dict[str, float]


def run_method(
    method: Method,
    key: Any,
    lm: LanguageModel,
    prm: Reward,
    prompt: Prompt,
    *,
    num_particles: int,
    max_steps: int,
) -> Outcome:
    """Run a method on a prompt that both models have read.

    Args:
        method: see `methods.py`.
        key: random key.
        lm, prm, prompt: as for `reason`.
        num_particles: N, of each sweep where there are several.
        max_steps: rows.
    """
    told = {"max_steps": max_steps, **method.options}
    if method.sweeps is not None:
        read = gibbs.run(
            method.filter, method.sweeps, key, lm, prm, prompt, num_particles=num_particles, **told
        )
        written, scores, log_weights, evidence, cost = read
    else:
        smc = SMC(
            method.filter,
            num_particles=num_particles,
            num_islands=method.num_islands,
            progress_bar=False,
        )
        smc.run(key, lm, prm, prompt, **told)
        samples, log_weights = smc.get_samples(weighted=True)
        written, scores = samples["step"].written, samples["score"]
        if written.tokens.ndim == 3:  # a store of paths: the last row has the whole text
            written, scores = jax.tree.map(lambda x: x[:, -1], (written, scores))
        try:
            evidence = float(smc.log_evidence[0])
        except ValueError:  # a selection kernel left no target
            evidence = None
        cost = dict(smc.cost)
    return Outcome(
        np.asarray(written.tokens),
        np.asarray(written.length),
        np.asarray(written.log_prob),
        np.asarray(scores),
        np.asarray(log_weights),
        evidence,
        cost,
    )
