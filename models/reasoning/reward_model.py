"""A process reward model: how good each step of a solution is, a number in [0, 1].

    prm = ProcessRewardModel.from_pretrained(path)
    prm.score(prompt, steps)            (num_steps,)
    judged = prm.start()                nothing read yet (prm given a prompt)
    judged = prm.read(judged, state)    after the newest step of a text; judged.score

The backbone is a language model's; a linear head reads the hidden state at the last token of a
step (`score.weight`, `score.bias`: the `ForTokenClassification` layout).  A head of width 1 gives
the sigmoid, one of width 2 the probability of the second label.  A folder may add
`score.confidence`, `(labels, 2)`: two more inputs of the head, how likely the backbone itself, read
as a language model, finds the text so far (log probability of its tokens, and the lowest of them;
the first token, which follows the prompt, is not counted).  `read` runs only the newest step
against its own cache; under `vmap` it becomes one batched pass.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int32

from smcscale.models.reasoning import cache
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.decode import Prompted
from smcscale.models.reasoning.language_model import (
    LanguageModel,
    TextState,
    check_tokens,
    load_backbone,
)
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer


class Judged(eqx.Module):
    """What a reward model made of one text so far.

    Attributes:
        score: of the newest step, in [0, 1]; 1 before the first.
        previous: of the step before it.
        length: tokens read.
        hidden: `(D,)`, hidden state of the last token read.
        confidence: `(2,)`, log probability of the text to the backbone, and the lowest of a token.
        cache: suffix keys and values `(L, kv, C, head)`.
    """

    score: Float[Array, "..."]
    previous: Float[Array, "..."]
    length: Int32[Array, "..."]
    hidden: Float[Array, "..."]
    confidence: Float[Array, "..."]
    cache: KeysValues


class ProcessRewardModel(eqx.Module):
    """A transformer with a value head; a pytree of weights.

    Attributes:
        weights: the backbone's arrays; head, bias: `(labels, D)`, `(labels,)`.
        confidence: `(labels, 2)`, else None.
        prompt: what `given` read, else None.
    """

    weights: Any
    head: Float[Array, "labels D"]
    bias: Float[Array, " labels"]
    confidence: Float[Array, "labels 2"] | None
    prompt: Prompted | None
    graph: Any = eqx.field(static=True)
    config: Config = eqx.field(static=True)
    tokenizer: Tokenizer | None = eqx.field(static=True)

    def __init__(
        self,
        model: Transformer,
        head: Any,
        bias: Any,
        tokenizer: Tokenizer | None,
        confidence: Any = None,
    ):
        self.config = model.config
        self.head = jnp.asarray(head, jnp.float32)
        self.bias = jnp.asarray(bias, jnp.float32)
        width = model.config.hidden_size
        if self.head.shape not in ((1, width), (2, width)):
            raise ValueError(
                f"smcscale: the reward head has shape {self.head.shape}; expected (1, {width}) "
                f"(a logit) or (2, {width}) (bad, good).\n  try: a model with one or two labels."
            )
        if self.bias.shape != self.head.shape[:1]:
            raise ValueError(
                f"smcscale: the reward head's bias has shape {self.bias.shape}, expected "
                f"{self.head.shape[:1]}."
            )
        self.confidence = None if confidence is None else jnp.asarray(confidence, jnp.float32)
        if self.confidence is not None and self.confidence.shape != (len(self.head), 2):
            raise ValueError(
                f"smcscale: the reward head's confidence has shape {self.confidence.shape}, expected "
                f"{(len(self.head), 2)}."
            )
        self.graph, self.weights = nnx.split(model)
        self.tokenizer = tokenizer
        self.prompt = None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ProcessRewardModel":
        """Read a folder with `config.json`, `model.safetensors` and `tokenizer.json`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture that is not in `architecture.FAMILIES`, no head, or one of
                another width.
        """
        model, tokenizer, tensors = load_backbone(path, writes=False)
        if "score.weight" not in tensors:
            raise ValueError(
                f"smcscale: {path} has no tensor 'score.weight': it is no process reward model.\n"
                "  try: a `ForTokenClassification` folder with one or two labels."
            )
        head = tensors["score.weight"]
        bias = tensors.get("score.bias", np.zeros(len(head)))
        return cls(model, head, bias, tokenizer, tensors.get("score.confidence"))

    @property
    def model(self) -> Transformer:
        """The backbone."""
        return nnx.merge(self.graph, self.weights)

    def value(
        self, hidden: Float[ArrayLike, "... D"], confidence: Float[ArrayLike, "... 2"] | None = None
    ) -> Float[Array, "..."]:
        """Score in [0, 1] of hidden states, and of how likely the texts are to the backbone.

        Raises:
            ValueError: the head reads the confidence and none is given.
        """
        logits = jnp.asarray(hidden) @ self.head.T + self.bias
        if self.confidence is not None:
            if confidence is None:
                raise ValueError(
                    "smcscale: this reward head also reads how likely the text is, and `value` was "
                    "given hidden states alone.\n  try: prm.value(hidden, confidence), as "
                    "`readings` returns them, or prm.score(prompt, steps)."
                )
            logits += jnp.asarray(confidence) @ self.confidence.T
        if self.head.shape[0] == 1:
            return jax.nn.sigmoid(logits[..., 0])
        return jax.nn.softmax(logits, axis=-1)[..., 1]

    def score(
        self, prompt: str, steps: Sequence[str], *, complete: bool | None = None
    ) -> Float[Array, " num_steps"]:
        """Scores of the steps of a solution, each given the prompt and the steps before it.

        Args:
            prompt: the question, as the language model is given it.
            steps: lines of the solution; a missing newline is added.
            complete: whether the last step ends the solution (with the end token in place of the
                newline); by default, whether it says `Answer:`.
        Returns:
            `(num_steps,)` in [0, 1].
        Raises:
            ValueError: the texts exceed the model's positions.
        """
        if self.tokenizer is None:
            raise ValueError("smcscale: a reward model without tokenizer cannot read text.")
        if isinstance(steps, str):
            raise TypeError(
                "smcscale: `steps` is one string; prm.score needs a list, one string a step.\n"
                '  try: text.split("\\n").'
            )
        if complete is None:
            complete = bool(steps) and re.search(r"Answer\s*:", steps[-1]) is not None
        tokens = self.tokenizer.encode_prompt(prompt)
        begin, ends = len(tokens), []
        for number, step in enumerate(steps):
            final = complete and number == len(steps) - 1 and self.tokenizer.end_tokens
            line = step.rstrip("\n")
            tokens += self.tokenizer.encode(line if final else line + "\n")
            tokens += self.tokenizer.end_tokens[:1] if final else ()
            ends.append(len(tokens) - 1)
        if len(tokens) > self.config.max_length:
            raise ValueError(
                f"smcscale: prompt and steps have {len(tokens)} tokens, the reward model has "
                f"{self.config.max_length} positions."
            )
        if not ends:
            return jnp.zeros(0)
        padded = np.zeros(cache.bucketed(len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        return _values(self, jnp.asarray(padded), jnp.asarray(begin))[jnp.asarray(ends)]

    def given(self, prompt: Any) -> "ProcessRewardModel":
        """This model with a prompt read, one copy for all particles.

        Args:
            prompt: text, token ids, or one already read (by this reward model).
        """
        read = prompt if isinstance(prompt, Prompted) else self.prompted(prompt)
        return eqx.tree_at(lambda prm: prm.prompt, self, read, is_leaf=lambda x: x is None)

    def prompted(self, prompt: Any) -> Prompted:
        """A prompt (text or token ids) run through the backbone."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("smcscale: a reward model without tokenizer reads token ids.")
            prompt = self.tokenizer.encode_prompt(prompt)
        row = check_tokens(prompt, self.config)
        length = row.shape[0]
        tokens = jnp.zeros(cache.bucketed(length), jnp.int32).at[:length].set(row)
        return _read(self.graph, self.weights, tokens, jnp.asarray(length, jnp.int32))

    def start(self, lm: LanguageModel) -> Judged:
        """The state before any step, with room for the texts of `lm`."""
        one = jnp.ones(())
        nothing = jnp.zeros((), jnp.int32)
        room = cache.empty(self.config, lm.max_tokens)
        return Judged(one, one, nothing, jnp.zeros(self.config.hidden_size), jnp.zeros(2), room)

    def read(self, judged: Judged, state: TextState, step_tokens: int) -> Judged:
        """Judge the newest step of a text, of at most `step_tokens` tokens.

        A text without a newer step than the last one read keeps its scores.
        """
        if self.prompt is None:
            raise ValueError("smcscale: give the reward model the prompt first: prm.given(prompt).")
        written = state.written
        count = jnp.clip(written.length - judged.length, 0, step_tokens)
        padded = jnp.concatenate([written.tokens, jnp.zeros(step_tokens, jnp.int32)])
        tokens = jax.lax.dynamic_slice(padded, (judged.length,), (step_tokens,))
        hidden, suffix = cache.extend(
            self.model,
            jax.tree.map(lambda x: x[:, None], self.prompt.cache),
            self.prompt.length[None],
            jax.tree.map(lambda x: x[None], judged.cache),
            judged.length[None],
            tokens[None],
            count[None],
        )
        hidden = hidden[0]
        confidence = judged.confidence
        if self.confidence is not None:
            before = jnp.concatenate([judged.hidden[None], hidden[:-1]])
            place = jnp.arange(step_tokens)
            counted = (place < count) & (judged.length + place > 0)
            told = jnp.where(counted, log_probabilities(self.model, before, tokens), 0.0)
            lowest = jnp.minimum(confidence[1], jnp.min(told))
            confidence = jnp.stack([confidence[0] + jnp.sum(told), lowest])
        last = hidden[jnp.maximum(count - 1, 0)]
        new = count > 0
        return Judged(
            jnp.where(new, self.value(last, confidence), judged.score),
            jnp.where(new, judged.score, judged.previous),
            judged.length + count,
            jnp.where(new, last, judged.hidden),
            confidence,
            jax.tree.map(lambda x: x[0], suffix),
        )


def log_probabilities(
    model: Transformer, before: Float[Array, "... S D"], tokens: Int32[Array, "... S"]
) -> Float[Array, "... S"]:
    """Log probability of each token to a language model, from the hidden state before it."""
    told = jax.nn.log_softmax(model.logits(before), axis=-1)
    return jnp.take_along_axis(told, tokens[..., None], axis=-1)[..., 0]


def readings(
    model: Transformer, tokens: Int32[Array, "B S"], begin: Int32[Array, " B"]
) -> tuple[Float[Array, "B S D"], Float[Array, "B S 2"]]:
    """What a head reads at every token of whole texts, whose prompts have `begin` tokens.

    Returns:
        hidden states, and the confidence (see the module docstring) up to each token.
    """
    hidden = model(tokens)
    told = log_probabilities(model, hidden[:, :-1], tokens[:, 1:])
    told = jnp.pad(told, ((0, 0), (1, 0)))
    told = jnp.where(jnp.arange(tokens.shape[1]) > begin[:, None], told, 0.0)
    so_far = (jnp.cumsum(told, axis=1), jax.lax.cummin(told, axis=1))
    return hidden, jnp.stack(so_far, axis=-1)


@eqx.filter_jit
def _values(prm: ProcessRewardModel, tokens, begin):
    hidden, confidence = readings(prm.model, tokens[None], begin[None])
    return prm.value(hidden, confidence)[0]


@eqx.filter_jit
def _read(graph, weights, tokens, length) -> Prompted:
    return Prompted(tokens, length, cache.read(nnx.merge(graph, weights), tokens))
