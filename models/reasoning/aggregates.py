"""One number from the scores of a text's steps: plain functions with one signature.

    (aggregate, score, count) -> aggregate          all `()`

`aggregate` is the one before this step (1 before the first), `score` that of the newest step in
[0, 1], `count` the steps so far, this one counted (1 at the first).  The value is in [0, 1 - 1e-6]:
below 1, so that its odds are finite.

| function | A_t | a score of exactly 0 |
|---|---|---|
| `last` | `r_t` | counts as 1e-6 |
| `mean` | mean of `r_1 .. r_t` | counts as 1e-6 |
| `maximum` | `max(r_1 .. r_t)` | counts as 1e-6 |
| `minimum` | `min(r_1 .. r_t)` | the text is dead for good |
| `product` | `r_1 ... r_t` | the text is dead for good |

The sixth of the literature, "model" (the whole partial answer judged as one step), is another
reading of the text and not of its scores: `prm.whole()` in `reward_model.py`, with `last`.
Which target an aggregate gives depends on the potential: see `potentials.py`.

Source: Puri et al. 2025 (arXiv 2502.01618), section 3.3, for `product`, `minimum`, `last`.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

#: scores are kept so far from 0 and from 1
CLIP = 1e-6
#: a product stays above this, the smallest number that no device rounds to 0, unless a factor is 0
SMALLEST = 1e-37


def last(aggregate: ArrayLike, score: ArrayLike, count: ArrayLike) -> Float[Array, ""]:
    """The newest score."""
    return clipped(score)


def mean(aggregate: ArrayLike, score: ArrayLike, count: ArrayLike) -> Float[Array, ""]:
    """The mean of all scores."""
    before = jnp.asarray(aggregate)
    return before + (clipped(score) - before) / count


def maximum(aggregate: ArrayLike, score: ArrayLike, count: ArrayLike) -> Float[Array, ""]:
    """The largest score."""
    return jnp.where(count == 1, clipped(score), jnp.maximum(aggregate, clipped(score)))


def minimum(aggregate: ArrayLike, score: ArrayLike, count: ArrayLike) -> Float[Array, ""]:
    """The smallest score; 0 stays 0."""
    return jnp.minimum(aggregate, _above_or_zero(score))


def product(aggregate: ArrayLike, score: ArrayLike, count: ArrayLike) -> Float[Array, ""]:
    """The product of all scores; 0 stays 0."""
    score = _above_or_zero(score)
    dead = (aggregate == 0) | (score == 0)
    return jnp.where(dead, 0.0, jnp.maximum(aggregate * score, SMALLEST))


def clipped(score: ArrayLike) -> Float[Array, "..."]:
    """A score in `[1e-6, 1 - 1e-6]`."""
    return jnp.clip(jnp.asarray(score), CLIP, 1 - CLIP)


def _above_or_zero(score):
    return jnp.where(jnp.asarray(score) == 0, 0.0, clipped(score))
