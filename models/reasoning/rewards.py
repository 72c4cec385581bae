"""Scores of steps without a reward model: a function of the text, or the writer's own opinion.

    RewardFunction(function)            (state) -> score, any JAX function of a `TextState`
    SelfCertainty(lm)                   how likely the step was to the model that wrote it
    SelfCertainty(lm, entropy=True)     how sure the model was at each token of the step
    self_evaluation(lm, ...)            the model is asked whether the text is right so far

All have the face that `reason` asks of a `ProcessRewardModel`:

| name | gives |
|---|---|
| `tokenizer` | its own, or None |
| `prompted(prompt)`, `given(prompt)` | a prompt read; the model with it |
| `start(lm, max_steps)` | state before any step, with `score` (1) and `spent` (tokens run) |
| `read(judged, state, step_tokens)` | that state after the newest step |
| `score(prompt, steps)` | `(num_steps,)`, for text |

None of these knows whether the text is right: a sure model may be wrong.

Source: Kadavath et al. 2022 (arXiv 2207.05221), "P(True)", section 3; self-certainty as the mean
log probability of a step's tokens, and as their mean entropy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning import cache
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.decode import Prompted, Written
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.reward_forms import PLAIN, Form, inside, known_token, lay_out, trims
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.tokenizer import Tokenizer


class Opinion(eqx.Module):
    """What was thought of the newest step.

    Attributes:
        score: in [0, 1]; 1 before the first step.
        spent: tokens run through a model for it.
    """

    score: Float[Array, "..."]
    spent: Int32[Array, "..."]


class RewardFunction(eqx.Module):
    """A function of the text as reward.

    Attributes:
        function: `(state) -> score`, of a `TextState` (`state.written.tokens`, `.length`,
            `.begin`, `state.finished`); `()` in [0, 1], by JAX operations. Arrays in it (of an
            `eqx.Module`) are leaves.
        tokenizer: only `score` needs it (static).
    """

    function: Callable[[TextState], Any]
    tokenizer: Tokenizer | None = eqx.field(static=True, default=None)

    def prompted(self, prompt: Any) -> None:
        """Nothing: the function reads what is written after the prompt."""

    def given(self, prompt: Any) -> "RewardFunction":
        """Itself."""
        return self

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Opinion:
        """The state before any step."""
        return _nothing_read()

    def read(self, judged: Opinion, state: TextState, step_tokens: int) -> Opinion:
        """Judge a text with a new step; another keeps its score."""
        score = jnp.asarray(self.function(state), jnp.float32)
        if score.shape != ():
            raise ValueError(
                f"smcscale: the reward function returned an array of shape {score.shape}; a text's "
                "score is one number."
            )
        new = state.step_length > 0
        return Opinion(jnp.where(new, score, judged.score), jnp.zeros((), jnp.int32))

    def score(
        self, prompt: str, steps: Sequence[str], *, complete: bool | None = None
    ) -> Float[Array, " num_steps"]:
        """Scores of the steps of a solution; arguments as `ProcessRewardModel.score`."""
        laid = lay_out(self.tokenizer, PLAIN, prompt, steps, complete)
        if not len(laid.ends):
            return jnp.zeros(0)
        tokens, ends = jnp.asarray(laid.tokens[0, laid.begin :]), laid.ends - laid.begin
        ended = self.tokenizer is not None and tokens[ends[-1] - 1] in self.tokenizer.end_tokens
        no_cache = KeysValues(jnp.zeros(0), jnp.zeros(0))
        found = []
        for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            over = jnp.asarray(ended and number == len(ends) - 1)
            so_far = jnp.where(jnp.arange(len(tokens)) < end, tokens, 0)
            written = Written(so_far, jnp.int32(end), jnp.int32(begin), over, no_cache)
            found.append(jnp.asarray(self.function(TextState(written)), jnp.float32))
        return jnp.stack(found)


class SelfCertainty(eqx.Module):
    """The score of a step is how sure the language model was of it.

    `exp(mean log probability of the step's tokens)`, which was counted as they were drawn, or with
    `entropy` `exp(-mean entropy)` of the model's law at each of them, for which the step is run
    once more against the writer's own cache.  Both are of the model itself, at temperature 1.

    Attributes:
        lm: the model that writes.
        entropy: which of the two (static).
    """

    lm: LanguageModel
    entropy: bool = eqx.field(static=True, default=False)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The language model's."""
        return self.lm.tokenizer

    def prompted(self, prompt: Any) -> Prompted:
        """A prompt read by the language model."""
        return self.lm.read(prompt)

    def given(self, prompt: Any) -> "SelfCertainty":
        """This score with a prompt read."""
        return SelfCertainty(self.lm.given(prompt), self.entropy)

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Opinion:
        """The state before any step."""
        return _nothing_read()

    def read(self, judged: Opinion, state: TextState, step_tokens: int) -> Opinion:
        """Judge the newest step of a text; a text without one keeps its score."""
        count = state.step_length
        told = self._negative_entropy(state, step_tokens) if self.entropy else state.step_log_prob
        score = jnp.exp(told / jnp.maximum(count, 1))
        spent = count if self.entropy else jnp.zeros_like(count)
        return Opinion(jnp.where(count > 0, score, judged.score), spent)

    def _negative_entropy(self, state: TextState, step_tokens: int) -> Float[Array, ""]:
        """Sum over the tokens of the newest step, nats."""
        prompt, written = self.lm.prompt_of(state), state.written
        before = prompt.tokens[prompt.length - 1]
        whole = jnp.concatenate([before[None], written.tokens, jnp.zeros(step_tokens, jnp.int32)])
        tokens = jax.lax.dynamic_slice(whole, (written.begin,), (step_tokens,))
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        hidden, _ = cache.extend(
            self.lm.model,
            jax.tree.map(lambda x: x[:, None], prompt.cache),
            (prompt.length - 1)[None],
            one(written.cache),
            written.begin[None],
            tokens[None],
            jnp.zeros(1, jnp.int32),  # the writer remembers them already
        )
        told = _negative_entropies(self.lm.model.logits(hidden[0]))
        return jnp.sum(jnp.where(jnp.arange(step_tokens) < state.step_length, told, 0.0))

    def score(
        self, prompt: str, steps: Sequence[str], *, complete: bool | None = None
    ) -> Float[Array, " num_steps"]:
        """Scores of the steps of a solution; arguments as `ProcessRewardModel.score`."""
        size = self.lm.config.max_length
        laid = lay_out(self.tokenizer, PLAIN, prompt, steps, complete, size)
        if not len(laid.ends):
            return jnp.zeros(0)
        tokens = jnp.asarray(laid.tokens[0, : laid.ends[-1]])
        logits = self.lm.logits(tokens[:-1])
        if self.entropy:
            told = _negative_entropies(logits)
        else:
            told = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
        begins = [laid.begin, *laid.ends[:-1]]  # the token at place k is told at k - 1
        pieces = [told[a - 1 : b - 1] for a, b in zip(begins, laid.ends, strict=True)]
        return jnp.exp(jnp.stack([jnp.mean(piece) for piece in pieces]))


def self_evaluation(
    lm: LanguageModel, question: str, *, yes: str = " yes", no: str = " no"
) -> ProcessRewardModel:
    """The language model as its own judge: asked `question` after each step, how likely is `yes`.

    The share of `yes` against `no` among the next tokens.  Question and answer are taken back: the
    text goes on without them.

    Args:
        lm: the model; its weights are shared, its cache is not.
        question: what to append, with the words that lead to the answer.
        yes, no: one token each, in the place where they are asked for.
    Raises:
        ValueError: no tokenizer, an empty question, or answers that are not one token.
    """
    if lm.tokenizer is None:
        raise ValueError("smcscale: self_evaluation needs a language model with a tokenizer.")
    mark = inside(lm.tokenizer, question)
    if not mark:
        raise ValueError("smcscale: self_evaluation needs a question, got an empty one.")
    good, bad = (known_token(lm.tokenizer, word, continues=True) for word in (yes, no))
    form = Form(mark, len(mark), False, trims(lm.tokenizer), (good, bad))
    model = lm.model
    rows = (model.embedding if lm.config.tied else model.head)[...]
    return ProcessRewardModel(
        model, rows[jnp.array([bad, good])], jnp.zeros(2), lm.tokenizer, form=form
    )


def _nothing_read() -> Opinion:
    return Opinion(jnp.ones(()), jnp.zeros((), jnp.int32))


def _negative_entropies(logits: Float[Array, "S V"]) -> Float[Array, " S"]:
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -1e30), axis=-1)  # no 0 * -inf
