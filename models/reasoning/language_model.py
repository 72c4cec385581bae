"""A language model as a distribution over the next step of a text.

    lm = LanguageModel.from_pretrained(path)      a folder in the Hugging Face layout
    lm.logits(token_ids)                          (length, vocabulary)
    state = lm.start(prompt)                      nothing written yet
    lm.next_step(state)                           NumPyro distribution; its value is a `TextState`
    lm.text(state)                                what was written

A step ends with a token that contains the delimiter (a newline), with the end token, or after
`step_tokens` tokens.  The model is a pytree: its weights pass through `jit` as arguments.
`lm.given(prompt)` keeps the prompt's keys and values in the model, one copy for all particles;
without it the prompt travels in the state.  Read next: `decode.py`, `program.py`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from smcscale.models import parameters
from smcscale.models.reasoning import cache, decode, transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.decode import Prompted, Written
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer


class TextState(eqx.Module):
    """The text of one particle; the value of `lm.next_step(state)`.

    Attributes:
        written: tokens so far, their number, where the newest step begins, whether the text is
            finished, and the cache (heavy).
        prompt: the prompt, when the model was not `given` one; else None.
    """

    written: Written
    prompt: Prompted | None = None
    heavy: ClassVar[tuple[str, ...]] = ("cache",)
    ndim: ClassVar[int] = 0  # plain NumPyro asks a value for these two
    shape: ClassVar[tuple[int, ...]] = ()

    @property
    def finished(self) -> Bool[Array, ""]:
        """Whether the end token was written, or the room is full."""
        return self.written.finished

    @property
    def step_length(self) -> Int32[Array, ""]:
        """How many tokens the newest step has; 0 if nothing was added."""
        return self.written.length - self.written.begin


class LanguageModel(eqx.Module):
    """A decoder-only transformer with its tokenizer; a pytree of weights.

    Attributes:
        weights: the network's arrays (`nnx.State`).
        ends_step: `(V,)` bool, tokens that end a step.
        temperature: `()`; of the distribution `next_step`.
        prompt: what `given` read, else None.
        step_tokens, max_tokens: at most so many tokens in a step, in a text (static).
    """

    weights: Any
    ends_step: Bool[Array, " V"]
    temperature: Float[Array, ""]
    prompt: Prompted | None
    graph: Any = eqx.field(static=True)
    config: Config = eqx.field(static=True)
    tokenizer: Tokenizer | None = eqx.field(static=True)
    step_tokens: int = eqx.field(static=True)
    max_tokens: int = eqx.field(static=True)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        ends_step: Any,
        *,
        temperature: float = 1.0,
        step_tokens: int = 32,
        max_tokens: int = 192,
    ):
        if not temperature > 0:
            raise ValueError(f"smcscale: temperature must be positive, got {temperature}.")
        if not 1 <= step_tokens <= max_tokens:
            raise ValueError(
                f"smcscale: step_tokens must be in [1, max_tokens={max_tokens}], got {step_tokens}."
            )
        if jnp.shape(ends_step) != (model.config.vocabulary_size,):
            raise ValueError(
                f"smcscale: `ends_step` has shape {jnp.shape(ends_step)}; the vocabulary has "
                f"{model.config.vocabulary_size} tokens."
            )
        self.graph, self.weights = nnx.split(model)
        self.config = model.config
        self.tokenizer = tokenizer
        self.ends_step = jnp.asarray(ends_step, bool)
        self.temperature = jnp.asarray(temperature, jnp.float32)
        self.step_tokens = step_tokens
        self.max_tokens = max_tokens
        self.prompt = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, delimiter: str = "\n", **options: Any
    ) -> "LanguageModel":
        """Read a folder with `config.json`, `model.safetensors` and `tokenizer.json`.

        A `generation_config.json` beside them adds its end tokens.

        Args:
            path: the folder.
            delimiter: tokens that contain it end a step.
            **options: `temperature`, `step_tokens`, `max_tokens`; `config.json` may say other
                defaults under the key "smcscale".
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture that is not in `architecture.FAMILIES`, broken or misshapen
                files.
        """
        model, tokenizer, _ = load_backbone(path)
        options = parameters.read_json(Path(path) / "config.json").get("smcscale", {}) | options
        mask = tokenizer.ends_step(delimiter, model.config.vocabulary_size)
        return cls(model, tokenizer, mask, **options)

    @property
    def model(self) -> Transformer:
        """The network."""
        return nnx.merge(self.graph, self.weights)

    def logits(self, token_ids: Any) -> Float[Array, "length vocabulary"]:
        """Logits of the next token after every prefix, by one full pass.

        Args:
            token_ids: `(length,)` integers.
        Raises:
            ValueError: not one row of token ids, or ids outside the vocabulary.
        """
        tokens = check_tokens(token_ids, self.config)
        if tokens.shape[0] == 0:
            return jnp.zeros((0, self.config.vocabulary_size))
        return _logits(self.graph, self.weights, tokens)

    def read(self, prompt: Any) -> Prompted:
        """Run a prompt (text, token ids, or one already read) through the model."""
        if isinstance(prompt, Prompted):
            return prompt
        tokens, length = self.encode(prompt)
        return _read(self.graph, self.weights, tokens, length)

    def encode(self, prompt: Any) -> tuple[Int32[Array, " P"], Int32[Array, ""]]:
        """Token ids of a prompt, padded to its bucket, and their number."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("smcscale: a model without tokenizer reads token ids, not text.")
            prompt = self.tokenizer.encode_prompt(prompt)
        tokens = check_tokens(prompt, self.config)
        length = tokens.shape[0]
        if length == 0:
            raise ValueError("smcscale: the prompt is empty; a text starts from at least a token.")
        if length + self.max_tokens > self.config.max_length:
            raise ValueError(
                f"smcscale: a prompt of {length} tokens and max_tokens={self.max_tokens} exceed "
                f"the model's {self.config.max_length} positions.\n"
                "  try: a shorter prompt or a smaller max_tokens."
            )
        padded = jnp.zeros(cache.bucketed(length), jnp.int32).at[:length].set(tokens)
        return padded, jnp.asarray(length, jnp.int32)

    def given(self, prompt: Any) -> "LanguageModel":
        """This model with a prompt read: states then hold only what is written after it."""
        return eqx.tree_at(
            lambda lm: lm.prompt, self, self.read(prompt), is_leaf=lambda x: x is None
        )

    def start(self, prompt: Any = None) -> TextState:
        """The state before anything is written.

        Args:
            prompt: text, token ids or a prompt already read; None for the one `given`.
        """
        if prompt is None and self.prompt is None:
            raise ValueError("smcscale: start() needs a prompt.\n  try: lm.start(prompt).")
        zero = jnp.zeros((), jnp.int32)
        written = Written(
            jnp.zeros(self.max_tokens, jnp.int32),
            zero,
            zero,
            jnp.zeros((), bool),
            cache.empty(self.config, self.max_tokens),
        )
        return TextState(written, None if prompt is None else self.read(prompt))

    def next_step(self, state: TextState) -> "NextStep":
        """The distribution of the state one step on."""
        return NextStep(self, state)

    def prompt_of(self, state: TextState) -> Prompted:
        """The prompt that a state continues."""
        prompt = self.prompt if state.prompt is None else state.prompt
        if prompt is None:
            raise ValueError(
                "smcscale: this state was started by a model that was given a prompt.\n"
                "  try: the same model, lm.given(prompt)."
            )
        return prompt

    def text(self, state: TextState) -> str:
        """What one state has written, without the prompt."""
        return self.decode(np.asarray(state.written.tokens)[: int(state.written.length)])

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Text of token ids."""
        if self.tokenizer is None:
            raise ValueError("smcscale: a model without tokenizer has no text, only tokens.")
        return self.tokenizer.decode(tokens)


class NextStep(dist.Distribution):
    """Distribution of the next step of a text: `sample(key) -> TextState`, `log_prob(state)`.

    Under `vmap` all sequences are written in one token loop (see `decode.py`); with one key for
    all mapped states each still draws its own tokens.  A finished text stays as it is, with
    probability one.  Not differentiable.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  as in NumPyro
    support = dist.constraints.real  # pyright: ignore  NumPyro allows a class attribute

    def __init__(self, lm: LanguageModel, state: TextState):
        self.lm, self.state = lm, state
        super().__init__(batch_shape=(), event_shape=(), validate_args=False)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """The `TextState` after one step, drawn from the model.

        Raises:
            NotImplementedError: for a `sample_shape`; use `jax.vmap` over keys.
        """
        if sample_shape != ():
            raise NotImplementedError(
                "smcscale: next_step draws one step at a time.\n  try: jax.vmap over keys."
            )
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        lm, state = self.lm, self.state
        written = decode.write_step(
            key,
            lm.graph,
            lm.weights,
            lm.prompt_of(state),
            state.written,
            lm.ends_step,
            lm.temperature,
            step_tokens=lm.step_tokens,
            end_tokens=lm.config.end_tokens,
        )
        return TextState(written, state.prompt)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, ""]:
        """Log probability `()` of the newest step of `value` (a `TextState`) after this state, nats.

        `-inf` for what the sampler cannot produce: a step that stops early or runs on past its
        end, or that continues a finished text.
        """
        lm, before, after = self.lm, self.state.written, value.written
        prompt = lm.prompt_of(self.state)
        size = lm.step_tokens
        count = after.length - before.length
        padded = jnp.concatenate([after.tokens, jnp.zeros(size, jnp.int32)])
        tokens = jax.lax.dynamic_slice(padded, (before.length,), (size,))
        newest = jnp.where(
            before.length == 0,
            prompt.tokens[prompt.length - 1],
            before.tokens[jnp.maximum(before.length - 1, 0)],
        )
        inputs = jnp.concatenate([newest[None], tokens[:-1]])
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        hidden, _ = cache.extend(
            lm.model,
            jax.tree.map(lambda x: x[:, None], prompt.cache),
            (prompt.length - 1)[None],
            one(before.cache),
            before.length[None],
            inputs[None],
            count[None],
        )
        log_probs = jax.nn.log_softmax(lm.model.logits(hidden[0]) / lm.temperature)
        chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
        inside = jnp.arange(size) < count
        over = lm.ends_step[tokens] | jnp.isin(tokens, jnp.asarray(lm.config.end_tokens, int))
        last = jnp.arange(size) == count - 1
        complete = jnp.any(over & last) | (count == size) | (after.length == lm.max_tokens)
        possible = (count >= 1) & (count <= size) & complete & ~jnp.any(over & inside & ~last)
        written = jnp.sum(jnp.where(inside, chosen, 0.0))
        return jnp.where(
            before.finished,
            jnp.where(count == 0, 0.0, -jnp.inf),
            jnp.where(possible, written, -jnp.inf),
        )


def load_backbone(
    path: str | Path, *, writes: bool = True
) -> tuple[Transformer, Tokenizer, dict[str, np.ndarray]]:
    """The transformer, the tokenizer and all tensors of a model folder.

    Unless it `writes`, the network may lack the matrix that makes logits.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"smcscale: {path} is not a folder. Expected a model folder in the Hugging Face "
            "layout (config.json, model.safetensors, tokenizer.json)."
        )
    config = Config.from_hf(parameters.read_json(path / "config.json"), str(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.is_file():  # chat models add the token that ends a turn here
        config = config.with_end_tokens(parameters.read_json(generation).get("eos_token_id"))
    tensors = parameters.load(path)
    if not writes and "lm_head.weight" not in tensors:
        config = replace(config, tied=True)
    model = transformer.from_hf(config, tensors, str(path))
    return model, Tokenizer.from_file(path / "tokenizer.json", config.end_tokens), tensors


def check_tokens(token_ids: Any, config: Config) -> Int32[Array, " S"]:
    """Token ids as an int32 row.

    Raises:
        ValueError: not one row of integers, or (outside jit) ids beyond the vocabulary.
    """
    if not isinstance(token_ids, Tracer):
        token_ids = np.asarray(token_ids, None if np.size(token_ids) else np.int32)
    if token_ids.ndim != 1 or not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(
            f"smcscale: token ids must be one row of integers, got shape {token_ids.shape} of "
            f"{token_ids.dtype}."
        )
    if isinstance(token_ids, np.ndarray) and np.any(
        (token_ids < 0) | (token_ids >= config.vocabulary_size)
    ):
        raise ValueError(
            f"smcscale: token ids must be in [0, {config.vocabulary_size}), got "
            f"{token_ids.min()} to {token_ids.max()}."
        )
    return jnp.asarray(token_ids, jnp.int32)


@eqx.filter_jit
def _logits(graph, weights, tokens):
    model = nnx.merge(graph, weights)
    return model.logits(model(tokens[None])[0])


@eqx.filter_jit
def _read(graph, weights, tokens, length) -> Prompted:
    return Prompted(tokens, length, cache.read(nnx.merge(graph, weights), tokens))
