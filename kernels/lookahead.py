"""Tilts by the future: `(log_weights, states, input, time) -> log_weights (N,)`.

| look-ahead | resampled with |
|---|---|
| `LookAhead(log_eta)` | weights times any positive function of state and next row |

Particles that the next row will favour get more offspring; the engine divides the function out
again. Read next: `tilts.py`.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smcscale.types import Input, LogWeights, State, States, Time


class LookAhead(eqx.Module):
    """Look-ahead: weights times `eta(state, next row)`, the auxiliary particle filter.

    The best eta is the predictive likelihood of the next row; a rough guess of it is as unbiased.

    Attributes:
        log_eta: `(state, input) -> ()`, ONE particle (for a program: the loop's carry), nats; finite
            wherever a particle lives.
            Networks and data belong into its leaves (`eqx.Module`), not into a closure.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        states: leaves `(N, ...)`.
        input: the next row.
        time: that row's index; not used.
    Returns:
        log_weights: `(N,)`, unnormalised; the dead stay dead whatever eta says of them.
    Properties: evidence unbiased; gradient: exact through the weights.
    Source: Pitt & Shephard 1999, section 3.
    """

    log_eta: Callable[[State, Input], Float[Array, ""]]

    def __call__(
        self, log_weights: LogWeights, states: States, input: Input, time: Time
    ) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        log_eta = jax.vmap(self.log_eta, in_axes=(0, None))(states, input)
        dead = log_weights == -jnp.inf
        return jnp.where(dead, log_weights, log_weights + jnp.where(dead, 0, log_eta))
