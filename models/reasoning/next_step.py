"""The distribution of the next step of a text: what `LanguageModel.next_step` returns.

A NumPyro distribution whose sampler joins `vmap` by hand, so that all texts are written in one loop.
Read next: `decode.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning import cache, decode
from smcscale.models.reasoning.decode import TextState


class NextStep(dist.Distribution):
    """Distribution of the next step of a text: `sample(key) -> TextState`, `log_prob(state)`.

    Under `vmap` all sequences are written in one token loop (see `decode.py`); with one key for
    all mapped states each still draws its own tokens.  A finished text stays as it is, with
    probability one.  This is the law q that tokens are drawn from, whatever the model's `prior`.
    Not differentiable.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  as in NumPyro
    support = dist.constraints.real  # pyright: ignore  NumPyro allows a class attribute

    def __init__(self, lm: Any, state: TextState):
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
        return TextState(self._write(key), self.state.prompt)

    def _write(self, key: Any) -> decode.Written:
        """The text after one step."""
        lm, state = self.lm, self.state
        return decode.write_step(
            key,
            lm.graph,
            lm.weights,
            lm.prompt_of(state),
            state.written,
            lm.ends_step,
            lm.sampling,
            step_tokens=lm.step_tokens,
            end_tokens=lm.config.end_tokens,
        )

    def _told(
        self, tokens: Int32[Array, " S"], count: Int32[Array, ""]
    ) -> tuple[Float[Array, " S"], Float[Array, " S"], Any]:
        """Log probabilities of given tokens under q and p, and the cache once `count` are written."""
        lm, before = self.lm, self.state.written
        prompt = lm.prompt_of(self.state)
        newest = jnp.where(
            before.length == 0,
            prompt.tokens[prompt.length - 1],
            before.tokens[jnp.maximum(before.length - 1, 0)],
        )
        inputs = jnp.concatenate([newest[None], tokens[:-1]])
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        hidden, suffix = cache.extend(
            lm.model,
            jax.tree.map(lambda x: x[:, None], prompt.cache),
            (prompt.length - 1)[None],
            one(before.cache),
            before.length[None],
            inputs[None],
            count[None],
        )
        logits = lm.model.logits(hidden[0])
        drawn, known = (
            jnp.take_along_axis(jax.nn.log_softmax(law), tokens[:, None], axis=1)[:, 0]
            for law in (lm.sampling(logits), logits)
        )
        return drawn, known, jax.tree.map(lambda x: x[0], suffix)

    def _possible(self, tokens: Int32[Array, " S"], count: Int32[Array, ""]) -> Array:
        """Whether the sampler could stop after these `count` tokens and not before."""
        lm, before = self.lm, self.state.written
        place = jnp.arange(lm.step_tokens)
        over = lm.ends_step[tokens] | jnp.isin(tokens, jnp.asarray(lm.config.end_tokens, int))
        last = place == count - 1
        length = before.length + count
        complete = jnp.any(over & last) | (count == lm.step_tokens) | (length == lm.max_tokens)
        fits = (count >= 1) & (count <= lm.step_tokens) & (length <= lm.max_tokens)
        early = jnp.any(over & (place < count) & ~last)
        return jnp.where(before.finished, count == 0, fits & complete & ~early)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, ""]:
        """Log probability `()` of the newest step of `value` (a `TextState`) after this state, nats.

        Under q, by the step's tokens alone; `-inf` for what the sampler cannot produce: a step that
        stops early or runs on past its end, or that continues a finished text.
        """
        size, before, after = self.lm.step_tokens, self.state.written, value.written
        count = after.length - before.length
        padded = jnp.concatenate([after.tokens, jnp.zeros(size, jnp.int32)])
        tokens = jax.lax.dynamic_slice(padded, (before.length,), (size,))
        drawn, _, _ = self._told(tokens, count)
        total = jnp.sum(jnp.where(jnp.arange(size) < count, drawn, 0.0))
        return jnp.where(self._possible(tokens, count), total, -jnp.inf)

    def follow(
        self, tokens: Int32[Array, " S"], count: Int32[Array, ""]
    ) -> tuple[Any, Float[Array, ""]]:
        """The `TextState` after given tokens instead of drawn ones, and their log probability under q.

        For conditional filters, whose kept text is written again after other beginnings. Where the
        sampler cannot write these tokens here, the text stays as it is and the probability is 0.

        Args:
            tokens: `(step_tokens,)`, the step, padded.
            count: how many count; 0 for a text that is finished.
        """
        lm, before = self.lm, self.state.written
        drawn, known, suffix = self._told(tokens, count)
        inside = jnp.arange(lm.step_tokens) < count
        log_q, log_p = (jnp.sum(jnp.where(inside, told, 0.0)) for told in (drawn, known))
        possible = self._possible(tokens, count) & (log_q > -jnp.inf)
        count = jnp.where(possible, count, 0)
        room = before.tokens.shape[0]
        place = jnp.where(jnp.arange(lm.step_tokens) < count, before.length, room)
        places = jnp.minimum(place + jnp.arange(lm.step_tokens), room)
        written = before.tokens.at[places].set(tokens, mode="drop")
        length = before.length + count
        newest = tokens[jnp.maximum(count - 1, 0)]
        said = jnp.isin(newest, jnp.asarray(lm.config.end_tokens, jnp.int32))
        over = before.finished | ((count > 0) & (said | (length >= lm.max_tokens)))
        sums = (
            before.log_prob + jnp.where(possible, log_p, 0.0),
            before.log_proposal + jnp.where(possible, log_q, 0.0),
        )
        after = decode.Written(
            written,
            length,
            before.length,
            over,
            suffix,
            *sums,
            before.log_prob,
            before.log_proposal,
        )
        return TextState(after, self.state.prompt), jnp.where(possible, log_q, -jnp.inf)
