"""A language model without a network: the law of its next token is a function one can write down.

    lm = KnownModel(law, 4, end_tokens=(0,), max_tokens=6)
    smc.run(key, lm, reward, read_prompt(lm, reward, ()), max_steps=6)

| name | what it is |
|---|---|
| `KnownModel` | `LanguageModel` over `law(tokens, length) -> log-probabilities (V,)` |
| `NextKnownStep` | the distribution of the next step of its text |
| `MarkovLaw` | a law that looks at the newest token and the place only |

Every probability of a text is a sum of `law`, so evidence and answers can be had exactly, by
enumeration or better: `beds.py`, `mazes.py`, `countdown.py`.  There is no prompt, as the law is of one problem.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.decode import Prompted, TextState, Written
from smcscale.models.reasoning.language_model import LanguageModel, check_tokens
from smcscale.models.reasoning.next_step import NextStep
from smcscale.models.reasoning.sampling import Sampling

Law = Callable[[Int32[Array, " C"], Int32[Array, ""]], Float[Array, " V"]]


class KnownModel(LanguageModel):
    """A language model given by the law of its next token; a pytree of what is in the law.

    It has the face that `reason` asks for (`next_step`, `start`, `given`, `correction`), and no
    network, tokenizer or prompt.

    Attributes:
        law: `(tokens (C,), length ()) -> (V,)`, log-probabilities of the token after the first
            `length`; it must not look at the others.  Arrays in it (of an `eqx.Module`) are leaves.
    """

    law: Law

    def __init__(
        self,
        law: Law,
        vocabulary_size: int,
        *,
        max_tokens: int,
        end_tokens: tuple[int, ...] = (),
        step_tokens: int = 1,
        ends_step: Any = None,
        prior: str = "proposal",
        **sampling: Any,
    ):
        """A model from its law.

        Args:
            law: see the class.
            vocabulary_size: V.
            max_tokens: a text with so many is finished.
            end_tokens: tokens that finish a text.
            step_tokens: at most so many tokens in a step.
            ends_step: `(V,)` bool, tokens that end a step; None: all.
            prior: "proposal" or "model", as for `LanguageModel`.
            **sampling: `temperature`, `top_p`, `top_k`, `min_p`, `floor`, see `sampling.py`.
        Raises:
            ValueError: an option outside its range, or tokens outside the vocabulary.
        """
        if prior not in ("proposal", "model"):
            raise ValueError(f'smcscale: prior must be "proposal" or "model", got {prior!r}.')
        if not 1 <= step_tokens <= max_tokens:
            raise ValueError(
                f"smcscale: step_tokens must be in [1, max_tokens={max_tokens}], got {step_tokens}."
            )
        if not all(0 <= token < vocabulary_size for token in end_tokens):
            raise ValueError(
                f"smcscale: end_tokens must be in [0, {vocabulary_size}), got {end_tokens}."
            )
        mask = np.ones(vocabulary_size, bool) if ends_step is None else np.asarray(ends_step, bool)
        if mask.shape != (vocabulary_size,):
            raise ValueError(
                f"smcscale: `ends_step` has shape {mask.shape}; the vocabulary has "
                f"{vocabulary_size} tokens."
            )
        self.law = law
        self.weights, self.graph, self.tokenizer, self.prompt = None, None, None, None
        # the shape of no network: only the vocabulary, the room and the end tokens are read
        self.config = Config(
            "", vocabulary_size, 0, 0, 0, 0, 0, 0, max_length=max_tokens, end_tokens=end_tokens
        )
        self.ends_step = jnp.asarray(mask)
        self.sampling = Sampling(**sampling)
        self.prior = prior
        self.step_tokens = step_tokens
        self.max_tokens = max_tokens

    @property
    def model(self) -> Any:
        """Refused: there is no network."""
        raise TypeError("smcscale: a KnownModel has no network.\n  try: its `law`.")

    def logits(self, token_ids: Any) -> Float[Array, "length vocabulary"]:
        """Log-probabilities of the next token after every prefix, the empty one left out.

        Args:
            token_ids: `(length,)` integers.
        Raises:
            ValueError: not one row of token ids, or ids outside the vocabulary.
        """
        tokens = check_tokens(token_ids, self.config)
        count = tokens.shape[0]
        room = jnp.zeros(max(count, self.max_tokens), jnp.int32).at[:count].set(tokens)
        return jax.vmap(self.law, in_axes=(None, 0))(room, jnp.arange(1, count + 1))

    def read(self, prompt: Any) -> Prompted:
        """Nothing: the law is that of one problem."""
        return Prompted(jnp.zeros(0, jnp.int32), jnp.zeros((), jnp.int32), _no_cache())

    def given(self, prompt: Any) -> "KnownModel":
        """Itself."""
        return self

    def start(self, prompt: Any = None) -> TextState:
        """The state before anything is written."""
        zero = jnp.zeros((), jnp.int32)
        tokens = jnp.zeros(self.max_tokens, jnp.int32)
        return TextState(Written(tokens, zero, zero, jnp.zeros((), bool), _no_cache()))

    def next_step(self, state: TextState) -> Any:
        """The distribution of the state one step on."""
        return NextKnownStep(self, state)

    def laws(self, tokens: Array, length: Array) -> tuple[Float[Array, " V"], Float[Array, " V"]]:
        """Log-probabilities of the next token: to the model (p), and as it is drawn (q)."""
        logits = self.law(tokens, length)
        return jax.nn.log_softmax(logits), jax.nn.log_softmax(self.sampling(logits))

    def closes(self, token: Array, length: Array) -> tuple[Array, Array]:
        """Whether a token, the last of `length`, finishes its text, and whether it ends its step."""
        over = jnp.isin(token, jnp.asarray(self.config.end_tokens, jnp.int32))
        over = over | (length == self.max_tokens)
        return over, over | self.ends_step[token]


class NextKnownStep(NextStep):
    """Distribution of the next step of a text of a `KnownModel`, see `NextStep`."""

    def _write(self, key: Any) -> Written:
        lm, before = self.lm, self.state.written

        def write(carry, key):
            tokens, length, over, going, log_p, log_q = carry
            p, q = lm.laws(tokens, length)
            token = jax.random.categorical(key, q).astype(jnp.int32)
            place = jnp.where(going, length, tokens.shape[0])  # past the end: dropped
            tokens, length = tokens.at[place].set(token, mode="drop"), length + going
            log_p = log_p + jnp.where(going, p[token], 0.0)
            log_q = log_q + jnp.where(going, q[token], 0.0)
            ended, closed = lm.closes(token, length)
            return (tokens, length, over | (going & ended), going & ~closed, log_p, log_q), None

        start = (before.tokens, before.length, before.finished, ~before.finished)
        sums = (before.log_prob, before.log_proposal)
        keys = jax.random.split(key, lm.step_tokens)
        (tokens, length, over, _, log_p, log_q), _ = jax.lax.scan(write, (*start, *sums), keys)
        return Written(tokens, length, before.length, over, before.cache, log_p, log_q, *sums)

    def _told(self, tokens: Array, count: Array) -> tuple[Array, Array, Any]:
        before = self.state.written
        places = before.length + jnp.arange(self.lm.step_tokens)
        text = before.tokens.at[places].set(tokens, mode="drop")
        known, drawn = jax.vmap(self.lm.laws, in_axes=(None, 0))(text, places)
        chosen = jnp.arange(self.lm.step_tokens), tokens
        return drawn[chosen], known[chosen], before.cache


class MarkovLaw(eqx.Module):
    """Law of a token given the one before it and its place.

    Attributes:
        first: `(V,)`, log-probabilities of the first token.
        moves: `(T - 1, V, V)`, `moves[t, i]` those of token t + 1 after token t was i.
    """

    first: Float[Array, " V"]
    moves: Float[Array, "T V V"]

    @classmethod
    def of(cls, first: Any, moves: Any) -> "MarkovLaw":
        """The law of tables of probabilities; rows sum to one.

        Raises:
            ValueError: tables that do not fit each other, negative entries, other sums.
        """
        first, moves = np.asarray(first, np.float64), np.asarray(moves, np.float64)
        size = first.shape[0] if first.ndim == 1 else -1
        if moves.ndim != 3 or moves.shape[1:] != (size, size):
            raise ValueError(
                f"smcscale: `first` must be (V,) and `moves` (T - 1, V, V), got {first.shape} and "
                f"{moves.shape}."
            )
        rows = np.vstack([first[None], moves.reshape(-1, size)])
        if (rows < 0).any() or not np.allclose(rows.sum(1), 1):
            raise ValueError("smcscale: rows of `first` and `moves` must be probabilities.")
        with np.errstate(divide="ignore"):
            logs = np.log(first).astype(np.float32), np.log(moves).astype(np.float32)
        return cls(jnp.asarray(logs[0]), jnp.asarray(logs[1]))

    def __call__(self, tokens: Int32[Array, " C"], length: Int32[Array, ""]) -> Float[Array, " V"]:
        """Log-probabilities `(V,)` of the next token."""
        if self.moves.shape[0] == 0:
            return self.first
        before = jnp.maximum(length - 1, 0)
        return jnp.where(length == 0, self.first, self.moves[before, tokens[before]])


def _no_cache() -> KeysValues:
    return KeysValues(jnp.zeros(()), jnp.zeros(()))  # leaves without elements do not pool
