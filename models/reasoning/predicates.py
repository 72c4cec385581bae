"""Texts that a Python predicate accepts, token by token, with the right weights.

    def can_be_right(text, finished):                          # may this text still become one that obeys?
        return finished_equations_hold(text)

    program = obeying(lm, can_be_right, prompt)
    smc = SMC(ParticleFilter(program, store="last"), num_particles=64)
    smc.run(key)
    smc.log_evidence                                           # log probability that the model obeys

A token is a step of time. It is drawn by adaptive weighted rejection sampling (`awrs.py`), which asks the
predicate about few tokens and gives a weight of the right mean; the particle filter spends its particles
where texts go on. The target is `p(y) 1[y obeys]`. A predicate that refuses early what cannot become right
keeps particles alive; one that says yes until the end has the same target and more variance. What a
regular expression can say runs compiled and asks nobody (`constraints.constrained`).

Source: Lipkin et al. 2025 (arXiv 2504.05410).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcscale.feynman_kac import Capabilities, FeynmanKac, Weighted
from smcscale.models.reasoning.awrs import awrs
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.constraints import append, next_logits
from smcscale.models.reasoning.language_model import LanguageModel, TextState


class Obeying(NamedTuple):
    """One particle, or `(M,)` of them.

    Attributes:
        step: the text.
        calls: of the predicate, for the newest token.
    """

    step: TextState
    calls: Any


class Writing(NamedTuple):
    """The transition: a token more for every text."""

    lm: LanguageModel
    accepts: Callable[[str, bool], bool]
    room: int

    def __call__(self, keys: Array, previous: Obeying, row: Any) -> Weighted:
        """States `(M,)` one token on, and the log-weights of the draws; finished ones wait."""
        text = previous.step
        log_probs, suffix = _ahead(self.lm, text)
        over = np.asarray(text.written.finished)
        written, lengths = np.asarray(text.written.tokens), np.asarray(text.written.length)
        seeds, laws = np.asarray(jax.random.key_data(keys)), np.asarray(log_probs, np.float64)
        tokens, calls = np.zeros(len(over), np.int32), np.zeros(len(over), np.int32)
        log_weights = np.zeros(len(over), np.float32)
        for i in np.flatnonzero(~over):
            accepts = functools.partial(self.accepted, written[i, : lengths[i]].tolist())
            draw = awrs(np.random.default_rng(seeds[i]), laws[i], accepts)
            tokens[i], log_weights[i], calls[i] = draw.token, draw.log_weight, draw.checks
        step = _appended(self.lm, text, jnp.asarray(tokens), suffix, log_probs, self.room)
        return Weighted(Obeying(step, jnp.asarray(calls)), jnp.asarray(log_weights))

    def accepted(self, tokens: list[int], token: int) -> bool:
        """Whether the predicate lets a text go on by a token."""
        finished = token in self.lm.config.end_tokens
        words = tokens if finished else [*tokens, token]
        return bool(self.accepts(self.lm.decode(words), finished or len(tokens) + 1 == self.room))

    def cost(self, previous: Obeying, state: Obeying, row: Any) -> dict[str, np.ndarray]:
        """Tokens written and calls of the predicate, `(M,)`."""
        return {
            "tokens": np.asarray(state.step.written.length - state.step.written.begin),
            "predicate_calls": np.asarray(state.calls),
        }


@eqx.filter_jit
def _ahead(lm: LanguageModel, texts: TextState) -> tuple[Float[Array, "M V"], KeysValues]:
    """Log probabilities of the next tokens under the prior, and the caches with the newest one read."""
    logits, suffix = jax.vmap(lambda text: next_logits(lm, text))(texts)
    return jax.nn.log_softmax(logits if lm.prior == "model" else lm.sampling(logits)), suffix


@eqx.filter_jit
def _appended(
    lm: LanguageModel, texts: TextState, tokens: Array, suffix: Any, log_probs: Array, room: int
) -> TextState:
    known = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
    return jax.vmap(lambda *one: append(lm, *one, room=room))(texts, tokens, suffix, known, known)


def _nothing_written(lm: LanguageModel, key: Array) -> Obeying:
    return Obeying(lm.start(), jnp.zeros((), jnp.int32))


def _kept(state: Obeying) -> dict[str, TextState]:
    return {"step": state.step}


def obeying(
    lm: LanguageModel,
    accepts: Callable[[str, bool], bool],
    prompt: Any,
    *,
    num_tokens: int | None = None,
) -> FeynmanKac:
    """The program: move a text by one token that the predicate lets pass, weigh it for the others.

    Args:
        lm: writes, with a tokenizer; p is its law under `lm.prior`, its steps do not count.
        accepts: `(text, finished) -> bool`: whether a text so far may still become one that obeys, and
            of a finished one (its end token is not in the text) whether it does. A text that fills the
            room is finished. Of byte-level tokens, a text so far may end inside a character, as U+FFFD;
            special tokens other than the end do not show.
        prompt: text, token ids, or `lm.read(prompt)`; the predicate does not see it.
        num_tokens: the most tokens of a text, and rows of the run; by default `lm.max_tokens`.
    Raises:
        TypeError, ValueError: by argument name.
    """
    room = lm.max_tokens if num_tokens is None else num_tokens
    if not 1 <= room <= lm.max_tokens:
        raise ValueError(
            f"smcscale: num_tokens must be in [1, max_tokens={lm.max_tokens}], got {num_tokens}."
        )
    if lm.tokenizer is None:
        raise ValueError(
            "smcscale: this language model has no tokenizer, so there is no text to accept.\n"
            "  try: `constrained` with an automaton of token ids."
        )
    if not callable(accepts):
        raise TypeError(f"smcscale: `accepts` must be a function, got {type(accepts).__name__}.")
    given = lm.given(prompt)
    writing = Writing(given, accepts, room)
    return FeynmanKac(
        eqx.Partial(_nothing_written, given),
        writing,
        lambda previous, states, row: np.zeros(len(states.calls), np.float32),
        heavy=TextState.heavy,
        capabilities=Capabilities(host=True, differentiable=False),
        record=_kept,
        cost=writing.cost,
        num_steps=room,
    )
