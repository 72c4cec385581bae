"""A process reward model: how good each step of a solution is, a number in [0, 1].

    prm = ProcessRewardModel.from_pretrained(path)
    prm.score(prompt, steps)            (num_steps,)
    judged = prm.start(lm)              nothing read yet (prm given a prompt)
    judged = prm.read(judged, state)    after the newest step of a text; judged.score

The backbone is a language model's; a head reads its hidden state at one token of each step, which
one and after which mark says the form (`reward_forms.py`):

| tensors of the folder | head |
|---|---|
| `score.weight`, `score.bias` | linear: `ForTokenClassification`, `ForSequenceClassification` |
| `score.0.*`, `score.2.*` | two layers with a ReLU between: `ForProcessRewardModel` |
| `v_head.summary.*` | linear: a value head beside a language model |
| none of these, and a `form` with candidates | two rows of the language model's own head |

A head of width 1 gives the sigmoid, one of width 2 the probability of the second label; it is
float32.  A folder may add `score.confidence`, `(labels, 2)`: two more inputs of the head, how likely
the backbone itself, read as a language model, finds the text so far (log probability of its
tokens, and the lowest of them; the first token, which follows the prompt, is not counted).

`read` runs only the newest step and its mark, once, against its own cache; under `vmap` it becomes
one batched pass.  A score depends on the text up to its step alone: it is the same number whether
the prefix is scored by itself or inside a longer text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int32

from smcscale.models.parameters import Placement
from smcscale.models.reasoning import cache, transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.decode import Prompted
from smcscale.models.reasoning.language_model import LanguageModel, TextState, check_tokens
from smcscale.models.reasoning.reward_folder import read_folder
from smcscale.models.reasoning.reward_forms import PLAIN, Form, MakeForm, lay_out, rendered
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer


class Judged(eqx.Module):
    """What a reward model made of one text so far.

    Attributes:
        score: of the newest step, in [0, 1]; 1 before the first.
        seen: tokens of the text that were judged.
        length: used slots of the cache; marks count, tokens that a mark stands for do not.
        spent: tokens run through the model for the newest step.
        hidden: `(D,)`, hidden state of the last token in the cache.
        confidence: `(2,)`, log probability of the text to the backbone, and the lowest of a token.
        cache: suffix keys and values `(L, kv, C, head)`.
    """

    score: Float[Array, "..."]
    seen: Int32[Array, "..."]
    length: Int32[Array, "..."]
    spent: Int32[Array, "..."]
    hidden: Float[Array, "..."]
    confidence: Float[Array, "..."]
    cache: KeysValues


class Layer(NamedTuple):
    """A linear layer: weight `(out, in)`, bias `(out,)`."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]


class ProcessRewardModel(eqx.Module):
    """A transformer with a value head; a pytree of weights.

    Attributes:
        weights: the backbone's arrays; head, bias: `(labels, H)`, `(labels,)`.
        inner: the layer `(H, D)` before the head, with a ReLU, else None (H is then D).
        confidence: `(labels, 2)`, else None.
        prompt: what `given` read, else None.
        form: layout of texts (static).
    """

    weights: Any
    head: Float[Array, "labels H"]
    bias: Float[Array, " labels"]
    inner: Layer | None
    confidence: Float[Array, "labels 2"] | None
    prompt: Prompted | None
    graph: Any = eqx.field(static=True)
    config: Config = eqx.field(static=True)
    tokenizer: Tokenizer | None = eqx.field(static=True)
    form: Form = eqx.field(static=True)

    def __init__(
        self,
        model: Transformer,
        head: Any,
        bias: Any,
        tokenizer: Tokenizer | None,
        confidence: Any = None,
        *,
        inner: tuple[Any, Any] | None = None,
        form: Form = PLAIN,
    ):
        self.config = model.config
        self.head = jnp.asarray(head, jnp.float32)
        self.bias = jnp.asarray(bias, jnp.float32)
        self.inner = None if inner is None else Layer(*(jnp.asarray(x, jnp.float32) for x in inner))
        width = model.config.hidden_size
        if self.inner is not None:
            if (
                self.inner.weight.shape[1:] != (width,)
                or self.inner.bias.shape != (self.inner.weight.shape[:1])
            ):
                raise ValueError(
                    f"smcscale: the reward head's first layer has shapes {self.inner.weight.shape} "
                    f"and {self.inner.bias.shape}; expected (H, {width}) and (H,)."
                )
            width = self.inner.weight.shape[0]
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
        if not 0 <= form.place <= len(form.mark) or (form.trims and not form.place):
            raise ValueError(
                f"smcscale: `form` reads token {form.place} of a mark of {len(form.mark)} tokens; "
                "tokens are trimmed only where a mark is read in their place."
            )
        if self.confidence is not None and form.mark:
            raise ValueError("smcscale: a reward head that reads the confidence takes no marks.")
        self.graph, self.weights = nnx.split(model)
        self.tokenizer = tokenizer
        self.form = form
        self.prompt = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        form: MakeForm | Form | None = None,
        dtype: Any = "float32",
        sharding: Placement | None = None,
    ) -> "ProcessRewardModel":
        """Read a folder with `config.json`, safetensors weights and `tokenizer.json`.

        Args:
            path: the folder.
            form: how steps are marked and read: a function of `reward_forms.py` (called with the
                folder's tokenizer), or a `Form`; None where the folder says it.
            dtype, sharding: of the backbone, as `LanguageModel.from_pretrained`.
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture that is not in `architecture.FAMILIES`, no head (a plain
                language model), one of another width, several, or a folder that does not say how
                its steps are marked.
        """
        folder = read_folder(path, form, dtype, sharding)
        return cls(*folder[:5], inner=folder.inner, form=folder.form)

    @property
    def model(self) -> Transformer:
        """The backbone."""
        return nnx.merge(self.graph, self.weights)

    def whole(self) -> "ProcessRewardModel":
        """This model judging the whole partial answer as one step, with one mark at its end.

        Marks are taken back once they were read ("model" aggregation, Puri et al. 2025): another
        function of the text than the scores of its steps, so never mix the two in one run.
        """
        return ProcessRewardModel(
            self.model,
            self.head,
            self.bias,
            self.tokenizer,
            self.confidence,
            inner=self.inner,
            form=self.form.whole,
        )

    def value(
        self, hidden: Float[ArrayLike, "... D"], confidence: Float[ArrayLike, "... 2"] | None = None
    ) -> Float[Array, "..."]:
        """Score in [0, 1] of hidden states, and of how likely the texts are to the backbone.

        Raises:
            ValueError: the head reads the confidence and none is given.
        """
        hidden = jnp.asarray(hidden, jnp.float32)
        if self.inner is not None:
            hidden = jax.nn.relu(hidden @ self.inner.weight.T + self.inner.bias)
        logits = hidden @ self.head.T + self.bias
        if self.form.candidates is not None:
            logits = transformer.capped(logits, self.config.logit_cap)
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
            prompt: the question, as the language model is given it; the form's template is put
                around it.
            steps: lines of the solution; a missing newline is added.
            complete: whether the last step ends the solution (with the end token in place of the
                newline); by default, whether it says `Answer:`.
        Returns:
            `(num_steps,)` in [0, 1].
        Raises:
            ValueError: the texts exceed the model's positions.
        """
        laid = lay_out(self.tokenizer, self.form, prompt, steps, complete, self.config.max_length)
        if not len(laid.place):
            return jnp.zeros(0)
        begin = jnp.full(len(laid.tokens), laid.begin)
        return _values(self, jnp.asarray(laid.tokens), begin)[laid.row, laid.place]

    def given(self, prompt: Any) -> "ProcessRewardModel":
        """This model with a prompt read, one copy for all particles.

        Args:
            prompt: text, token ids, or one already read (by this reward model).
        """
        read = prompt if isinstance(prompt, Prompted) else self.prompted(prompt)
        return eqx.tree_at(lambda prm: prm.prompt, self, read, is_leaf=lambda x: x is None)

    def prompted(self, prompt: Any) -> Prompted:
        """A prompt run through the backbone: text in the form's template, token ids as they are."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("smcscale: a reward model without tokenizer reads token ids.")
            prompt = self.tokenizer.encode_prompt(rendered(self.form, prompt))
        row = check_tokens(prompt, self.config)
        length = row.shape[0]
        tokens = jnp.zeros(cache.bucketed(length), jnp.int32).at[:length].set(row)
        return _read(self.graph, self.weights, tokens, jnp.asarray(length, jnp.int32))

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Judged:
        """The state before any step, with room for the texts of `lm` and marks for `max_steps`.

        Without `max_steps` there is room for a mark after every token.
        """
        room = lm.max_tokens
        if self.form.kept:
            room += len(self.form.mark) * (lm.max_tokens if max_steps is None else max_steps)
        nothing = jnp.zeros((), jnp.int32)
        return Judged(
            jnp.ones(()),
            nothing,
            nothing,
            nothing,
            jnp.zeros(self.config.hidden_size),
            jnp.zeros(2),
            cache.empty(self.config, room, self.model.embedding[...].dtype),
        )

    def read(self, judged: Judged, state: TextState, step_tokens: int) -> Judged:
        """Judge the newest step of a text, of at most `step_tokens` tokens.

        A text without a newer step than the last one read keeps its score.
        """
        if self.prompt is None:
            raise ValueError("smcscale: give the reward model the prompt first: prm.given(prompt).")
        form, written = self.form, state.written
        new = written.length > judged.seen
        # a newline that a mark stood for while it was read, now back in the text
        late = 0 if form.kept or not form.trims else 1
        begin = judged.seen if form.kept else judged.length
        count = jnp.clip(written.length - begin, 0, step_tokens + late)
        width = step_tokens + late
        padded = jnp.concatenate([written.tokens, jnp.zeros(width, jnp.int32)])
        tokens = jax.lax.dynamic_slice(padded, (begin,), (width,))
        trimmed = jnp.isin(tokens[count - 1], jnp.asarray(form.trims, jnp.int32)) & (count > 0)
        body = count - trimmed
        if form.mark:
            place = jnp.arange(width + len(form.mark))
            mark = jnp.asarray(form.mark, jnp.int32)[jnp.clip(place - body, 0, len(form.mark) - 1)]
            tokens = jnp.pad(tokens, (0, len(form.mark)))
            tokens = jnp.where(place < body, tokens, mark)
        whole = body + len(form.mark)
        remembered = jnp.where(new, whole if form.kept else body, 0)
        hidden, suffix = cache.extend(
            self.model,
            jax.tree.map(lambda x: x[:, None], self.prompt.cache),
            self.prompt.length[None],
            jax.tree.map(lambda x: x[None], judged.cache),
            judged.length[None],
            tokens[None],
            remembered[None],
        )
        after = jnp.concatenate(
            [judged.hidden[None], hidden[0].astype(jnp.float32)]
        )  # [k]: once k tokens are read
        confidence = judged.confidence
        if self.confidence is not None:
            place = jnp.arange(step_tokens)
            counted = (place < remembered) & (judged.length + place > 0)
            told = jnp.where(counted, log_probabilities(self.model, after[:-1], tokens), 0.0)
            lowest = jnp.minimum(confidence[1], jnp.min(told))
            confidence = jnp.stack([confidence[0] + jnp.sum(told), lowest])
        score = self.value(after[body + form.place], confidence)
        return Judged(
            jnp.where(new, score, judged.score),
            jnp.where(new, written.length, judged.seen),
            judged.length + remembered,
            jnp.where(new, whole, 0),
            after[remembered],
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
    hidden, confidence = readings(prm.model, tokens, begin)
    return prm.value(hidden, confidence)


@eqx.filter_jit
def _read(graph, weights, tokens, length) -> Prompted:
    return Prompted(tokens, length, cache.read(nnx.merge(graph, weights), tokens))
