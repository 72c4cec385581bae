"""Steps judged by where they lead: each text is written on for a few steps, and the end of that is scored.

    seen = Foresight(prm, lm, steps=2)
    smc.run(key, lm, seen, read_prompt(lm, seen, text), max_steps=12)

The continuation takes the likeliest token each time, is scored by the reward, and is forgotten: the text goes on
without it. With `methods.beam_search` this is lookahead search; under any properly weighted filter with the
potential `difference` the target of texts that end stays `p(y) r(y)`, as a text that has ended is scored
itself; only the order in which weight arrives is another. A text that runs out of steps keeps the score that
was foreseen. Every step costs `steps` more, of both models; what is written and thrown away counts as tokens
(`Metered` counts no FLOPs for it).

Source: Snell et al. 2024 (arXiv 2408.03314), section 5.2, lookahead search.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.program import Prompt
from smcscale.models.reasoning.sampling import Sampling
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.program.spend import spend


class Foreseen(eqx.Module):
    """What was thought of the newest step, by where it leads.

    Attributes:
        score: in [0, 1]; 1 before the first step.
        spent: tokens run through the reward for it.
        own: the reward's state of the text as it is.
    """

    score: Float[Array, "..."]
    spent: Int32[Array, "..."]
    own: Any


class Foresight(eqx.Module):
    """A reward of what a text becomes in `steps` more steps of its likeliest tokens.

    It has the face that `reason` asks of a reward, see `rewards.py`.

    Attributes:
        reward: scores what is written and what would be.
        lm: writes on.
        steps: how far (static); 0 is the reward itself.
    """

    reward: Any
    lm: LanguageModel
    steps: int = eqx.field(static=True)

    def __init__(self, reward: Any, lm: LanguageModel, steps: int = 1):
        if steps < 0:
            raise ValueError(f"smcscale: steps of a Foresight must not be negative, got {steps}.")
        self.reward = reward
        self.lm = eqx.tree_at(
            lambda m: m.sampling, lm, Sampling(top_k=1), is_leaf=lambda x: isinstance(x, Sampling)
        )
        self.steps = steps

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The reward's."""
        return self.reward.tokenizer

    def prompted(self, prompt: Any) -> Prompt:
        """A prompt read by both models; `read_prompt` puts the writer's own in the place of the first."""
        return Prompt(self.lm.read(prompt), self.reward.prompted(prompt))

    def given(self, prompt: Any) -> "Foresight":
        """This with a prompt read."""
        read = prompt if isinstance(prompt, Prompt) else self.prompted(prompt)
        return Foresight(self.reward.given(read.judge), self.lm.given(read.writer), self.steps)

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Foreseen:
        """The state before any step."""
        steps = None if max_steps is None else max_steps + self.steps
        own = self.reward.start(lm, steps)
        return Foreseen(jnp.ones(()), jnp.zeros((), jnp.int32), own)

    def read(self, judged: Foreseen, state: TextState, step_tokens: int) -> Foreseen:
        """Judge the newest step; a text without one keeps its score."""
        own = self.reward.read(judged.own, state, step_tokens)
        ahead, opinion, spent = state, own, own.spent
        for _ in range(self.steps):
            # of the likeliest token alone: the key chooses between ties only
            ahead = self.lm.next_step(ahead).sample(jax.random.key(0))
            opinion = self.reward.read(opinion, ahead, step_tokens)
            spent = spent + jnp.where(ahead.step_length > 0, opinion.spent, 0)
            spend(tokens=ahead.step_length)
        new = state.step_length > 0
        score = jnp.where(new, opinion.score, judged.score)
        return Foreseen(score, jnp.where(new, spent, 0), own)
