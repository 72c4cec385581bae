"""A language model as a distribution over the next step of a text.

    lm = LanguageModel.from_pretrained(path)      a folder in the Hugging Face layout
    lm.logits(token_ids)                          (length, vocabulary)
    state = lm.start(prompt)                      nothing written yet
    lm.next_step(state)                           NumPyro distribution; its value is a `TextState`
    lm.correction(state)                          log-weight of the newest step under its prior
    lm.text(state)                                what was written
    lm.chat(messages)                             token ids of a conversation

A step ends with a token that contains the delimiter (a newline), with the end token, or after
`step_tokens` tokens.  The model is a pytree: its weights pass through `jit` as arguments.
`lm.given(prompt)` keeps the prompt's keys and values in the model, one copy for all particles;
without it the prompt travels in the state.

Tokens are drawn from q, which `sampling.py` makes of the model's own law p by temperature and
truncation.  Which of the two a particle filter targets is `prior`:

| prior | log-weight of a step | target, up to Z, with potentials G |
|---|---|---|
| "proposal" (default) | 0 | `q(y) G(y)`: the tempered, truncated model is the model |
| "model" | `sum log p - log q` | `p(y) G(y)` where q is positive |

Under "model", texts that a truncation made impossible (q = 0 < p) cannot be weighed in: the
evidence then estimates the smaller mass `E_p[G 1(q > 0)]`.  `floor=eps` draws from
`(1 - eps) q + eps p`, which leaves nothing out, and bounds a token's weight by `1 / eps`.
Temperature alone leaves nothing out either.  `p` at temperature 0.8 is renormalized token by token;
it is not `p(y)^(1 / 0.8)`.

Read next: `next_step.py`, `decode.py`, `sampling.py`, `program.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from smcscale.models import parameters
from smcscale.models.parameters import Placement
from smcscale.models.reasoning import cache
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.decode import Prompted, TextState, Written
from smcscale.models.reasoning.folder import load_backbone
from smcscale.models.reasoning.next_step import NextStep
from smcscale.models.reasoning.sampling import Sampling, from_generation_config
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer


class LanguageModel(eqx.Module):
    """A decoder-only transformer with its tokenizer; a pytree of weights.

    Attributes:
        weights: the network's arrays (`nnx.State`).
        ends_step: `(V,)` bool, tokens that end a step.
        sampling: the law that tokens are drawn from.
        prompt: what `given` read, else None.
        prior: "proposal" or "model", see the module docstring (static).
        step_tokens, max_tokens: at most so many tokens in a step, in a text (static).
    """

    weights: Any
    ends_step: Bool[Array, " V"]
    sampling: Sampling
    prompt: Prompted | None
    graph: Any = eqx.field(static=True)
    config: Config = eqx.field(static=True)
    tokenizer: Tokenizer | None = eqx.field(static=True)
    prior: str = eqx.field(static=True)
    step_tokens: int = eqx.field(static=True)
    max_tokens: int = eqx.field(static=True)

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        ends_step: Any,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        floor: float | None = None,
        prior: str = "proposal",
        step_tokens: int = 32,
        max_tokens: int = 192,
    ):
        """A model from its network.

        Args:
            model: the network.
            tokenizer: None if only token ids are read and written.
            ends_step: `(V,)` bool, tokens that end a step.
            temperature, top_p, top_k, min_p, floor: make q of p, see `sampling.py`.
            prior: "proposal" or "model": what the particle filter targets, see the module
                docstring.
            step_tokens, max_tokens: at most so many tokens in a step, in a text.
        Raises:
            ValueError: an option outside its range.
        """
        if prior not in ("proposal", "model"):
            raise ValueError(f'smcscale: prior must be "proposal" or "model", got {prior!r}.')
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
        self.sampling = Sampling(temperature, top_p, top_k, min_p, floor)
        self.prior = prior
        self.step_tokens = step_tokens
        self.max_tokens = max_tokens
        self.prompt = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        delimiter: str = "\n",
        dtype: Any = "float32",
        sharding: Placement | None = None,
        sampling: str | None = None,
        **options: Any,
    ) -> "LanguageModel":
        """Read a folder with `config.json`, safetensors weights and `tokenizer.json`.

        Weights are `model.safetensors` or the shards that `model.safetensors.index.json` names,
        read tensor by tensor.  A `generation_config.json` adds its end tokens; its temperature and
        truncations are applied only if asked for by `sampling`, since they would change the law
        that the particle filter targets without a word.  A chat template in
        `tokenizer_config.json` serves `chat`.

        Args:
            path: the folder.
            delimiter: tokens that contain it end a step.
            dtype: "float32" or "bfloat16", of weights, activations and caches; norms, softmax and
                logits are float32 in both.
            sharding: how to lay the weights over devices, such as
                `transformer.tensor_parallel(mesh)`; None: one device.
            sampling: "generation_config" to draw as that file says; None: as `options` say.
            **options: `temperature`, `top_p`, `top_k`, `min_p`, `floor`, `prior`, `step_tokens`,
                `max_tokens`; `config.json` may say other defaults under the key "smcscale".
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an architecture that is not in `architecture.FAMILIES`, broken or misshapen
                files, or a `sampling` that is not there.
        """
        path = Path(path)
        if sampling not in (None, "generation_config"):
            raise ValueError(
                f'smcscale: sampling must be None or "generation_config", got {sampling!r}.'
            )
        model, tokenizer, _ = load_backbone(path, dtype=dtype, sharding=sharding)
        defaults = parameters.read_json(path / "config.json").get("smcscale", {})
        if sampling is not None:
            file = path / "generation_config.json"
            defaults |= from_generation_config(parameters.read_json(file), str(file))
        mask = tokenizer.ends_step(delimiter, model.config.vocabulary_size)
        return cls(model, tokenizer, mask, **(defaults | options))

    @property
    def model(self) -> Transformer:
        """The network."""
        return nnx.merge(self.graph, self.weights)

    @property
    def temperature(self) -> Float[Array, ""]:
        """Of the distribution `next_step`."""
        return jnp.ones(()) if self.sampling.temperature is None else self.sampling.temperature

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
            cache.empty(self.config, self.max_tokens, self.model.embedding[...].dtype),
        )
        return TextState(written, None if prompt is None else self.read(prompt))

    def next_step(self, state: TextState) -> NextStep:
        """The distribution of the state one step on."""
        return NextStep(self, state)

    def correction(self, state: TextState) -> Float[Array, "..."]:
        """Log-weight increment `()` of the newest step that makes `prior` the target, nats.

        `log p - log q` over all its tokens, the one that ends it included, with q renormalized
        after truncation; 0 under `prior="proposal"`, for a finished text that waits, and where q is
        p.  A program adds it once a step: `numpyro.factor("prior", lm.correction(text))`.
        """
        if self.prior == "proposal" or self.sampling.plain:
            return jnp.zeros_like(state.step_log_prob)
        return state.step_log_prob - state.step_log_proposal

    def prompt_of(self, state: TextState) -> Prompted:
        """The prompt that a state continues."""
        prompt = self.prompt if state.prompt is None else state.prompt
        if prompt is None:
            raise ValueError(
                "smcscale: this state was started by a model that was given a prompt.\n"
                "  try: the same model, lm.given(prompt)."
            )
        return prompt

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        trusted: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, as the model's chat template writes it.

        Args:
            messages: such as `[{"role": "user", "content": "..."}]`.
            add_generation_prompt: end with the opening of the model's turn.
            trusted: read special tokens in the messages too; else they are plain text, so that
                nobody who writes a message can end a turn or open another.
            **variables: further ones that the template knows, such as `tools`.
        Returns:
            Ids that `start`, `given` and `read_prompt` take; `lm.tokenizer.chat_text` gives the text.
        Raises:
            ValueError: no template, a broken one, or one that refuses these messages.
        """
        if self.tokenizer is None:
            raise ValueError("smcscale: a model without tokenizer has no chat template.")
        return self.tokenizer.encode_chat(
            messages, add_generation_prompt, trusted=trusted, **variables
        )

    def text(self, state: TextState) -> str:
        """What one state has written, without the prompt."""
        return self.decode(np.asarray(state.written.tokens)[: int(state.written.length)])

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Text of token ids."""
        if self.tokenizer is None:
            raise ValueError("smcscale: a model without tokenizer has no text, only tokens.")
        return self.tokenizer.decode(tokens)


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
