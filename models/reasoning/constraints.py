"""Texts that obey a constraint: a token is a step of time, the constraint a potential.

    automaton = from_regex(r"\\d+ apples", vocabulary_of(lm.tokenizer))
    smc = SMC(ParticleFilter(constrained), num_particles=64)
    smc.run(key, lm, automaton, lm.read(prompt))
    smc.log_evidence                 log probability that the model obeys, log p(match)

| name | what it is |
|---|---|
| `constrained` | the NumPyro program: draw an allowed token, weigh it by what it should have had |
| `Constrained`, `NextToken` | its state, and the distribution of the state one token on |
| `next_logits`, `restricted`, `append` | what that is made of, for a program of one's own |

The target is `p(y) 1[y matches]`, and with a reward `p(y) 1[y matches] A(y)`; the evidence is the
probability that a text of at most so many tokens matches.  With temperature or truncation, p is
the law that `lm.prior` says.  Drawing allowed tokens without the weights (constrained decoding) has
another law: it favours texts whose constraint was improbable on the way.

Constraints multiply: `automaton.both` for two of them, `log_reward` for what is not 0 or 1, and
`automaton.read` as a potential in a program of one's own, such as `reason`.

Source: Lew et al. 2023, "Sequential Monte Carlo Steering of Large Language Models" (arXiv
2306.03081).  Tests against enumeration: `tests/models/reasoning/test_constraints.py`.  Read next:
`awrs.py`, for constraints that are Python predicates.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int32
from numpyro.contrib.control_flow import scan

from smcscale.models.reasoning import cache
from smcscale.models.reasoning.automaton import TokenAutomaton
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.decode import Written, draw_tokens
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.program.spend import spend


class Constrained(eqx.Module):
    """A text on its way through an automaton; the value of the program's site "step".

    Attributes:
        text: what is written.
        state: where the automaton is; -1 once the text cannot match any more.
        log_weight: of the newest token, nats: what its prior gives it less what it was drawn from.
    """

    text: TextState
    state: Int32[Array, "..."]
    log_weight: Float[Array, "..."]
    heavy: ClassVar[tuple[str, ...]] = TextState.heavy
    ndim: ClassVar[int] = 0  # as of `TextState`
    shape: ClassVar[tuple[int, ...]] = ()


def constrained(
    lm: LanguageModel,
    automaton: TokenAutomaton,
    prompt: Any,
    *,
    num_tokens: int | None = None,
    log_reward: Callable[[TextState], Array] | None = None,
) -> None:
    """The program: move a text by one allowed token, weigh it by the mass of the allowed ones.

    A token is allowed if a matching text can still be completed in the room that is left.  A text
    that fills the room ends there.  Finished texts wait, with log potential 0.

    Args:
        lm: writes; its `sampling` and `prior` count, its steps do not.
        automaton: the constraint; of several, `automaton.both`.
        prompt: text, token ids, or `lm.read(prompt)`.
        num_tokens: rows of the loop, the most tokens of a text; by default `lm.max_tokens`.
        log_reward: `text -> log A ()` of a text so far.  Only that of the whole text is in the
            target, those before guide the way there (difference potentials, `log A = 0` before the
            first token); once `-inf`, always `-inf`.
    Sites:
        step: `Constrained`, the text after the token.
    Raises:
        ValueError: room that the model does not have, or an automaton over another vocabulary.
    """
    room = lm.max_tokens if num_tokens is None else num_tokens
    if not 1 <= room <= lm.max_tokens:
        raise ValueError(
            f"smcscale: num_tokens must be in [1, max_tokens={lm.max_tokens}], got {num_tokens}."
        )
    check_vocabulary(lm, automaton)
    lm = lm.given(prompt)

    def step(carry, _):
        before, reward = carry
        # the weight is part of the value: whoever knows the step needs no second pass of the model
        after: Any = numpyro.sample("step", NextToken(lm, automaton, before, room))
        numpyro.factor("constraint", after.log_weight)
        if log_reward is not None:
            last, reward = reward, jnp.asarray(log_reward(after.text), jnp.float32)
            dead = last == -jnp.inf
            change = jnp.where(dead, -jnp.inf, reward - jnp.where(dead, 0.0, last))
            numpyro.factor("reward", change)
        spend(tokens=after.text.step_length)
        return (after, reward), None

    start = Constrained(lm.start(), jnp.zeros((), jnp.int32), jnp.zeros(()))
    scan(step, (start, jnp.zeros(())), None, length=room)


def check_vocabulary(lm: LanguageModel, automaton: TokenAutomaton) -> None:
    """Refuse an automaton whose tokens are not the model's.

    Raises:
        ValueError: another number of tokens, or other end tokens.
    """
    size = lm.config.vocabulary_size
    if automaton.next_state.shape[1] != size or set(automaton.end_tokens) != set(
        lm.config.end_tokens
    ):
        raise ValueError(
            f"smcscale: `automaton` is over {automaton.next_state.shape[1]} tokens with end tokens "
            f"{automaton.end_tokens}, the model has {size} and {lm.config.end_tokens}.\n"
            "  try: vocabulary_of(lm.tokenizer, lm.config.vocabulary_size)."
        )


class NextToken(dist.Distribution):
    """Distribution of a text one allowed token on: `sample(key) -> Constrained`, `log_prob(value)`.

    Args:
        lm: writes.
        automaton: allows.
        before: the text so far; a finished one stays as it is, with probability one.
        room: the most tokens of a text (static).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  as in NumPyro
    support = dist.constraints.real  # pyright: ignore  NumPyro allows a class attribute

    def __init__(
        self, lm: LanguageModel, automaton: TokenAutomaton, before: Constrained, room: int
    ):
        self.lm, self.automaton, self.before, self.room = lm, automaton, before, room
        super().__init__(batch_shape=(), event_shape=(), validate_args=False)

    def _laws(self) -> tuple[Array, Array, Array, KeysValues]:
        """Logits, target and log probabilities of every token, and the new cache."""
        logits, suffix = next_logits(self.lm, self.before.text)
        left = self.room - self.before.text.written.length - 1
        allowed = self.automaton.allowed(self.before.state, left)
        return logits, *restricted(self.lm, logits, allowed), suffix

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """The `Constrained` text one token on.

        Raises:
            NotImplementedError: for a `sample_shape`; use `jax.vmap` over keys.
        """
        if sample_shape != ():
            raise NotImplementedError(
                "smcscale: NextToken draws one token at a time.\n  try: jax.vmap over keys."
            )
        before, over = self.before, self.before.text.finished
        logits, target, log_probs, suffix = self._laws()
        token = draw_tokens(jax.random.uniform(key, (1,)), log_probs[None])[0]
        known, drawn = jax.nn.log_softmax(logits)[token], log_probs[token]
        return Constrained(
            append(self.lm, before.text, token, suffix, known, drawn, room=self.room),
            jnp.where(over, before.state, self.automaton.after(before.state, token)),
            jnp.where(over, 0.0, target[token] - drawn),
        )

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, ""]:
        """Log probability `()` of the newest token of a `Constrained` text after this one, nats."""
        before, after = self.before.text.written, value.text.written
        _, _, log_probs, _ = self._laws()
        token = after.tokens[jnp.minimum(before.length, after.tokens.shape[0] - 1)]
        count = after.length - before.length
        written = jnp.where(count == 1, log_probs[token], -jnp.inf)
        return jnp.where(before.finished, jnp.where(count == 0, 0.0, -jnp.inf), written)


def next_logits(lm: LanguageModel, text: TextState) -> tuple[Float[Array, " V"], KeysValues]:
    """Logits of the token that comes next, float32, and the cache with the newest one read.

    Under `vmap` the prompt's keys and values stay one copy.  The cache of a finished text stays as
    it is, and its logits mean nothing.
    """
    prompt, written = lm.prompt_of(text), text.written
    newest = jnp.where(
        written.length == 0,
        prompt.tokens[prompt.length - 1],
        written.tokens[jnp.maximum(written.length - 1, 0)],
    )
    hidden, suffix = cache.extend(
        lm.model,
        jax.tree.map(lambda x: x[:, None], prompt.cache),
        (prompt.length - 1)[None],
        jax.tree.map(lambda x: x[None], written.cache),
        written.length[None],
        newest[None, None],
        jnp.where(written.finished, 0, 1)[None],
    )
    logits = lm.model.logits(hidden[0, 0]).astype(jnp.float32)
    return logits, jax.tree.map(lambda x: x[0], suffix)


def restricted(
    lm: LanguageModel, logits: Float[Array, " V"], allowed: Bool[Array, " V"]
) -> tuple[Float[Array, " V"], Float[Array, " V"]]:
    """What an allowed token should have, and what it is drawn from.

    Under `prior="proposal"` the second is the model's q given that the token is allowed; the weight
    of any token is then the mass of the allowed ones.  Under `"model"` the first is p, and the
    second truncates among the allowed tokens only, so that it cannot leave none.

    Returns:
        target: `(V,)`, log probabilities under the prior, `-inf` for forbidden tokens.
        log_probs: `(V,)`, normalized; draw from it and add `target - log_probs` to the log-weight.
            Where nothing is allowed it is uniform: the weight is then `-inf`.
    """
    if lm.prior == "model":
        prior = jax.nn.log_softmax(logits)
        proposal = lm.sampling(jnp.where(allowed, logits, -jnp.inf))
    else:
        prior = jax.nn.log_softmax(lm.sampling(logits))
        proposal = jnp.where(allowed, prior, -jnp.inf)
    dead = ~jnp.any(proposal > -jnp.inf)
    log_probs = jax.nn.log_softmax(jnp.where(dead, 0.0, proposal))
    return jnp.where(allowed & ~dead, prior, -jnp.inf), log_probs


def append(
    lm: LanguageModel,
    text: TextState,
    token: Int32[Array, ""],
    suffix: KeysValues,
    log_prob: Float[Array, ""],
    log_proposal: Float[Array, ""],
    *,
    room: int | None = None,
) -> TextState:
    """A text with one token more; a finished one as it is.

    Args:
        token: the token drawn.
        suffix: the cache that came with its logits.
        log_prob: of the token to the model itself, nats.
        log_proposal: of the token to the law it was drawn from, nats.
        room: the text is finished when it has so many tokens; by default `lm.max_tokens`.
    """
    written, room = text.written, lm.max_tokens if room is None else room
    over = written.finished
    length = written.length + ~over
    ends = jnp.isin(token, jnp.asarray(lm.config.end_tokens, jnp.int32)) | (length >= room)
    return TextState(
        Written(
            written.tokens.at[jnp.where(over, lm.max_tokens, written.length)].set(
                token, mode="drop"
            ),
            length,
            written.length,
            over | ends,
            suffix,
            written.log_prob + jnp.where(over, 0.0, log_prob),
            written.log_proposal + jnp.where(over, 0.0, log_proposal),
            written.log_prob,
            written.log_proposal,
        ),
        text.prompt,
    )
