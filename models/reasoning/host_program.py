"""`reason` with a Python function as judge: a model on this machine, rewards on the host.

    def judge(prompt, texts):                                  # (len(texts),) in [0, 1]
        return [share_of_right_equations(text) for text in texts]

    program = host_reason(lm, judge, prompt, max_steps=12)
    smc = SMC(ParticleFilter(program, store="last"), num_particles=16)
    smc.run(key)
    texts_of(smc, lm)

All particles write their step in one compiled call, then the judge reads all new texts, each once.
Sites and targets are those of `reason`; a reward that JAX can compute runs there, compiled
(`rewards.RewardFunction`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale.feynman_kac import Capabilities, FeynmanKac, Weighted
from smcscale.models.reasoning import judging
from smcscale.models.reasoning.judging import Judge
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.program import Tally, check_options, has_end


class JudgedState(NamedTuple):
    """One particle, or `(M,)` of them.

    Attributes:
        step: the text.
        score: of the newest step; 1 before the first.
        tally: of the scores.
    """

    step: TextState
    score: Any
    tally: Tally


class Writing(NamedTuple):
    """The transition: a step of every text, judged."""

    lm: LanguageModel
    judge: Judge
    prompt: Any
    rule: Potential

    async def __call__(self, keys: Array, previous: JudgedState, row: Any) -> Weighted:
        """States `(M,)` after one more step; finished ones stay as they are."""
        step, correction = _written(self.lm, keys, previous.step)
        new = np.asarray(step.written.length > step.written.begin)
        tokens, lengths = np.asarray(step.written.tokens), np.asarray(step.written.length)
        texts = [self.lm.decode(tokens[i, : lengths[i]]) for i in np.flatnonzero(new)]
        scores = np.array(previous.score)
        scores[new] = await judging.scores(self.judge, self.prompt, texts)
        tally = judging.tallies(self.rule, previous.tally, scores, new)
        return Weighted(JudgedState(step, scores, tally), correction)

    def cost(self, previous: JudgedState, state: JudgedState, row: Any) -> dict[str, np.ndarray]:
        """Tokens written for the newest steps, `(M,)`."""
        written = state.step.written
        return {"tokens": np.asarray(written.length - written.begin)}


@eqx.filter_jit
def _written(lm: LanguageModel, keys: Array, states: TextState) -> tuple[TextState, Array]:
    """Texts with one more step, and the correction of the prior."""
    steps: Any = jax.vmap(lambda key, state: lm.next_step(state).sample(key))(keys, states)
    if lm.prior != "model":
        return steps, jnp.zeros(keys.shape[0])
    return steps, jax.vmap(lm.correction)(steps)


@eqx.filter_jit
def _ended(lm: LanguageModel, states: TextState) -> Array:
    return jax.vmap(lambda state: has_end(lm, state))(states)


def _nothing_written(lm: LanguageModel, key: Array) -> JudgedState:
    one = jnp.ones(())
    return JudgedState(lm.start(), one, Tally(one, one, jnp.zeros((), jnp.int32)))


def _kept(state: JudgedState) -> dict[str, Any]:
    return {"step": state.step, "score": state.score}


def host_reason(
    lm: LanguageModel,
    judge: Any,
    prompt: Any,
    *,
    max_steps: int,
    potential: Callable[..., Any] = difference,
    finished: str = "absorb",
    unfinished: str = "keep",
) -> FeynmanKac:
    """The program `reason` for a judge that cannot be traced, as a host `FeynmanKac`.

    Args:
        lm: writes; with a tokenizer.
        judge: `(prompt, texts) -> scores` in [0, 1] of the newest steps, `(len(texts),)`; may be
            `async`.
        prompt: text, or token ids such as those of `lm.chat`; the judge gets what is given here.
        max_steps: rows of the run.
        potential, finished, unfinished: as in `reason`; the targets are the same.
    Raises:
        TypeError, ValueError: by argument name.
    """
    check_options(finished, unfinished, max_steps)
    if lm.tokenizer is None:
        raise ValueError(
            "smcscale: this language model has no tokenizer, so there are no words to judge.\n"
            "  try: `reason` with a RewardFunction of the token ids."
        )
    if not callable(judge):
        raise TypeError(f"smcscale: `judge` must be a function, got {type(judge).__name__}.")
    rule = potential if isinstance(potential, Potential) else Potential(potential)
    given = lm.given(prompt)
    writing = Writing(given, judge, prompt, rule)

    def log_potential(previous: JudgedState, state: JudgedState, row: Any) -> np.ndarray:
        over = np.asarray(previous.step.written.finished)
        weights = judging.weights(rule, state.tally)
        if finished == "absorb":
            weights = np.where(over, 0.0, weights)
        if unfinished == "drop":
            last = np.asarray(state.step.written.finished) | (
                np.asarray(state.tally.steps) == max_steps
            )
            cut = ~over & last & ~np.asarray(_ended(given, state.step))
            weights = np.where(cut, -np.inf, weights)
        return weights

    return FeynmanKac(
        eqx.Partial(_nothing_written, given),
        writing,
        log_potential,
        heavy=TextState.heavy,
        capabilities=Capabilities(host=True, differentiable=False),
        record=_kept,
        cost=writing.cost,
        num_steps=max_steps,
    )


def texts_of(smc: Any, lm: LanguageModel) -> list[str]:
    """What each particle of a finished run wrote, runs one after the other."""
    samples, _ = smc.get_samples(weighted=True)
    written = samples["step"].written
    rows = zip(np.asarray(written.tokens), np.asarray(written.length), strict=True)
    return [lm.decode(tokens[:length]) for tokens, length in rows]
