"""`reason` for models behind a server: a host `FeynmanKac`, run by the same particle filter.

    program = remote_reason(lm, judge, prompt, max_steps=12)
    smc = SMC(ParticleFilter(program), num_particles=16)
    smc.run(key)
    texts_of(smc)                                              what the particles wrote

`judge` is a `ProcessRewardModel`, a `RemoteRewardModel`, or any `(prompt, texts) -> scores`, also
`async`.  The state of a particle on the device is a number, its text stays on the host, so
resampling moves numbers.  Particles with equal texts share one request where the server gives
several answers to one; all requests of a row are in flight together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale.feynman_kac import Capabilities, FeynmanKac
from smcscale.models.reasoning import judging
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.program import Tally, check_options
from smcscale.models.reasoning.remote import RemoteLanguageModel, all_of


class RemoteState(NamedTuple):
    """One particle, or `(M,)` of them.

    Attributes:
        text: number of its text in the table of the run.
        score: of the newest step; 1 before the first.
        tally: of the scores.
        finished: the end of the text was written.
    """

    text: Any
    score: Any
    tally: Tally
    finished: Any


def _nothing_written(key: Array) -> RemoteState:
    one, zero = jnp.ones(()), jnp.zeros((), jnp.int32)
    return RemoteState(zero, one, Tally(one, one, zero), jnp.zeros((), bool))


def _kept(state: RemoteState) -> dict[str, Array]:
    return {"text": state.text, "score": state.score}


class Writing:
    """The transition of a remote run: writes a step of every text and has it judged.

    Attributes:
        texts: the run's table; a state's `text` is an index into it, 0 the empty text.
        tokens, prompt_tokens: what each text's newest step cost.
    """

    def __init__(
        self, lm: RemoteLanguageModel, judge: Callable[..., Any], prompt: str, rule: Potential
    ):
        self.lm, self.judge, self.prompt, self.rule = lm, judge, prompt, rule
        self.texts = [""]
        self.tokens, self.prompt_tokens = [0.0], [0.0]

    async def __call__(self, keys: Array, previous: RemoteState, row: Any) -> RemoteState:
        """States `(M,)` after one more step; finished ones stay as they are."""
        before, over = np.asarray(previous.text), np.asarray(previous.finished)
        seeds = np.asarray(jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32))(keys)) >> 1
        groups: dict[int, list[int]] = {}
        for place in np.flatnonzero(~over):
            key = int(before[place]) if self.lm.abilities.several else len(groups)
            groups.setdefault(key, []).append(int(place))
        answers = await all_of(
            [
                self.lm.write(
                    self.prompt + self.texts[before[g[0]]], int(seeds[g[0]]), copies=len(g)
                )
                for g in groups.values()
            ]
        )
        text, finished = before.copy(), over.copy()
        for places, completions in zip(groups.values(), answers, strict=True):
            for place, step in zip(places, completions, strict=True):
                text[place] = len(self.texts)
                finished[place] = step.finished
                self.texts.append(self.texts[before[place]] + step.text)
                self.tokens.append(step.tokens)
                self.prompt_tokens.append(step.prompt_tokens)
        return await self._judged(previous, text, finished, ~over)

    async def _judged(
        self, previous: RemoteState, text: np.ndarray, finished: np.ndarray, new: np.ndarray
    ) -> RemoteState:
        """The states with their newest steps judged."""
        scores = np.array(previous.score)
        newest = [self.texts[i] for i in text[new]]
        scores[new] = await judging.scores(self.judge, self.prompt, newest)
        tally = judging.tallies(self.rule, previous.tally, scores, new)
        return RemoteState(text, scores, tally, finished)

    def cost(self, previous: RemoteState, state: RemoteState, row: Any) -> dict[str, np.ndarray]:
        """Tokens written and read for the newest steps, `(M,)` each."""
        text = np.asarray(state.text)
        new = text != np.asarray(previous.text)
        return {
            "tokens": np.where(new, np.asarray(self.tokens)[text], 0.0),
            "prompt_tokens": np.where(new, np.asarray(self.prompt_tokens)[text], 0.0),
        }


def remote_reason(
    lm: RemoteLanguageModel,
    judge: Any,
    prompt: str,
    *,
    max_steps: int,
    potential: Callable[..., Any] = difference,
    finished: str = "absorb",
    unfinished: str = "keep",
) -> FeynmanKac:
    """The program `reason` for a model behind a server, as a host `FeynmanKac`.

    Args:
        lm: writes.
        judge: `ProcessRewardModel`, `RemoteRewardModel`, or `(prompt, texts) -> scores` in [0, 1]
            of the newest steps, `(len(texts),)`; may be `async`.
        prompt: text, as the model is to read it.
        max_steps: rows of the run.
        potential, finished, unfinished: as in `reason`; the targets are the same.
    Raises:
        TypeError, ValueError: by argument name.
    """
    check_options(finished, unfinished, max_steps)
    if not prompt:
        raise ValueError("smcscale: the prompt is empty; a text starts from at least a token.")
    rule = potential if isinstance(potential, Potential) else Potential(potential)
    writing = Writing(lm, judging.judge_of(judge, lm.delimiter), prompt, rule)

    def log_potential(previous: RemoteState, state: RemoteState, row: Any) -> np.ndarray:
        over, done = np.asarray(previous.finished), np.asarray(state.finished)
        weights = judging.weights(rule, state.tally)
        if finished == "absorb":
            weights = np.where(over, 0.0, weights)
        if unfinished == "drop":
            cut = ~done & (np.asarray(state.tally.steps) == max_steps)
            weights = np.where(cut, -np.inf, weights)
        return weights

    return FeynmanKac(
        _nothing_written,
        writing,
        log_potential,
        capabilities=Capabilities(host=True, differentiable=False),
        record=_kept,
        cost=writing.cost,
        num_steps=max_steps,
    )


def texts_of(smc: Any) -> list[str]:
    """What each particle of a finished remote run wrote, runs one after the other."""
    table = smc.algorithm.program.transition.texts
    samples, _ = smc.get_samples(weighted=True)
    return [table[i] for i in np.asarray(samples["text"]).reshape(-1)]
