"""Log potentials of a step of text from the scores of a reward model.

A potential is a plain function of two numbers, the aggregate of the scores before the step and
with it (`aggregates.py`; 1 before the first step), and gives `log G_t`:

    def steep(previous, score):
        return 5.0 * (score - previous)

    smc.run(key, lm, prm, prompt, max_steps=12, potential=steep)
    ...                           potential=Potential(difference, aggregate=aggregates.minimum)

`reason` takes the function itself (its aggregate is then `last`), or a `Potential`, which adds the
aggregate and a softmax temperature.  With `A_t` the aggregate of the scores `r_1 .. r_t`, `p` the
language model's law, `l` the last step of a text and `o(a) = a / (1 - a)`:

| function | G_t | target, up to Z | Z = E[evidence estimate] |
|---|---|---|---|
| `difference` | `A_t / A_(t-1)` | `p(y) A_l(y)`: the last, least, largest or mean score, or the product | `E_p[A]`, in (0, 1) |
| `product` | `A_t` | `p(y) prod_t A_t`; with `last` `p(y) prod_t r_t` | `E_p[prod_t A_t]`, falls with length |
| `odds_ratio` | `o(A_t) / o(A_(t-1))`, `o(A_0) = 1` | `p(y) o(A_l(y))` | `E_p[o(A)]`, not bounded by 1 |
| `odds` | `o(A_t)` | `p(y) prod_t o(A_t)` | `E_p[prod_t o(A_t)]`, not bounded by 1 |

Temperature: every row with `G^(1 / temperature)` in place of `G`; `p` is untouched, Z is that of
the new target.  `difference` with the aggregate `product` has the target of `product` with `last`.
Of these, `odds` with resampling at every step is the filter of Puri et al. (2025).  A text that
finished: see `finished` in `program.py`; the table is that of "absorb".

Source: Puri et al. 2025, "Rollout Roulette" (arXiv 2502.01618), algorithm 1; every row's target
and Z are enumerated in `tests/models/reasoning/test_potentials.py`.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from smcscale.models.reasoning.aggregates import last


def difference(previous: ArrayLike, score: ArrayLike) -> Float[Array, ""]:
    """Telescoping potential `log A_t - log A_(t-1)`: only the last aggregate is in the target."""
    # an aggregate of 0 stays 0: no quotient of zeros
    return jnp.where(jnp.asarray(previous) > 0, jnp.log(score) - jnp.log(previous), -jnp.inf)


def product(previous: ArrayLike, score: ArrayLike) -> Float[Array, ""]:
    """`log A_t`: the aggregate of every step counts; long texts are punished."""
    return jnp.log(score)


def odds(previous: ArrayLike, score: ArrayLike) -> Float[Array, ""]:
    """`logit A_t`: every step's odds count, as in Puri et al. (2025)."""
    return jnp.log(score) - jnp.log1p(-jnp.asarray(score))


def odds_ratio(previous: ArrayLike, score: ArrayLike) -> Float[Array, ""]:
    """Telescoping potential `logit A_t - logit A_(t-1)`: only the last odds are in the target."""
    previous = jnp.asarray(previous)
    # only before the first step is an aggregate exactly 1
    before = jnp.where(previous == 1, 0.0, odds(previous, previous))
    return jnp.where(previous > 0, odds(previous, score) - before, -jnp.inf)


class Potential(eqx.Module):
    """A potential with its aggregate of the scores and a softmax temperature.

    Attributes:
        weigh: `(previous aggregate, aggregate) -> log potential`, all `()`.
        aggregate: `(aggregate, score, count) -> aggregate`, see `aggregates.py`.
        temperature: the potential is raised to `1 / temperature`; large: scores count less. As an
            array, other values compile nothing.
    """

    weigh: Callable[[Array, Array], Array] = eqx.field(static=True)
    aggregate: Callable[[Array, Array, Array], Array] = eqx.field(static=True, default=last)
    temperature: ArrayLike = 1.0

    def __check_init__(self):
        traced = isinstance(self.temperature, Tracer)
        if not (traced or float(np.asarray(self.temperature)) > 0):
            raise ValueError(
                f"smcscale: temperature of a Potential must be positive, got {self.temperature}."
            )

    def __call__(self, previous: ArrayLike, score: ArrayLike) -> Float[Array, ""]:
        """Log potential of a step, nats.

        Args:
            previous: aggregate before the step, `()`; 1 before the first.
            score: aggregate with the step, `()`.
        """
        return self.weigh(previous, score) / self.temperature  # pyright: ignore
