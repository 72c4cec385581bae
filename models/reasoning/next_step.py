"""The distribution of the next step of a text: what `LanguageModel.next_step` returns.

A NumPyro distribution whose sampler joins `vmap` by hand, so that all texts are written in one loop.
Read next: `decode.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

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

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, ""]:
        """Log probability `()` of the newest step of `value` (a `TextState`) after this state, nats.

        Under q, by the step's tokens alone; `-inf` for what the sampler cannot produce: a step that
        stops early or runs on past its end, or that continues a finished text.
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
        log_probs = jax.nn.log_softmax(lm.sampling(lm.model.logits(hidden[0])))
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
