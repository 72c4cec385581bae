"""Resampling kernels without a sum over the weights: `(key, log_weights, n) -> ancestors (n,)`.

Each slot runs its own short chain, so nothing but one maximum is shared between particles: for
very many particles on parallel hardware, and mild weights.

| kernel | rule | bias |
|---|---|---|
| `Metropolis(iterations)`, `metropolis` | a Metropolis chain over indices | "asymptotic" |
| `Rejection(tries)`, `rejection` | propose until accepted with probability w / max w | none |

Read next: `schemes.py`, the default choices.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from smcscale.kernels.resampling.schemes import redraw
from smcscale.types import Ancestors, Key, LogWeights


class Metropolis(eqx.Module):
    """Metropolis resampling: every slot walks over indices for a fixed number of iterations.

    Args (of the call):
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, unordered.
    Properties: biased; the law of a slot is within `(1 - mean w / max w) ** iterations` of the
        weights in total variation, so use `iterations = log(0.01) / log(1 - mean / max)` and
        another kernel when few particles hold most weight; O(n iterations); gradient: zero
        through `ancestors`.
    Source: Murray, Lee & Jacob 2016, section 3.1 and eq. 3.
    """

    iterations: int = 32
    bias: ClassVar[str] = "asymptotic"

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""

        def move(ancestors, key):
            for_proposal, for_acceptance = jax.random.split(key)
            proposed = jax.random.randint(for_proposal, (n,), 0, log_weights.size, jnp.int32)
            # the log of a uniform that is never 0, so that no dead particle is accepted
            log_uniforms = -jax.random.exponential(for_acceptance, (n,), log_weights.dtype)
            accepted = log_uniforms + log_weights[ancestors] <= log_weights[proposed]
            return jnp.where(accepted, proposed, ancestors), None

        start = jnp.arange(n, dtype=jnp.int32) % log_weights.size
        ancestors, _ = lax.scan(move, start, jax.random.split(key, self.iterations))
        # a chain that never left the dead goes to the best particle: the bound still holds
        best = jnp.argmax(log_weights).astype(jnp.int32)
        return jnp.where(log_weights[ancestors] == -jnp.inf, best, ancestors)


class Rejection(eqx.Module):
    """Rejection resampling: propose an index until it is accepted with probability w / max w.

    Slots still open after `tries` rounds are drawn from the cumulative weights, which leaves the
    law exact and the time bounded.

    Args (of the call):
        key: consumed.
        log_weights: `(N,)`, unnormalised, nats; `-inf` marks a dead particle.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, unordered.
    Properties: unbiased; `max w / mean w` rounds expected per slot, the slowest slot sets the
        time; variance below multinomial's (the first proposals are spread evenly); gradient: zero
        through `ancestors`.
    Source: Murray, Lee & Jacob 2016, section 3.2; the bound on the rounds is ours.
    """

    tries: int = 64

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""
        size = log_weights.size
        for_start, for_tries, for_rest = jax.random.split(key, 3)
        log_accept = log_weights - jnp.max(log_weights)

        def accepts(key, proposed):
            return -jax.random.exponential(key, (n,), log_weights.dtype) <= log_accept[proposed]

        def attempt(carry):
            count, key, ancestors, vacant = carry
            key, for_proposal, for_acceptance = jax.random.split(key, 3)
            proposed = jax.random.randint(for_proposal, (n,), 0, size, jnp.int32)
            ancestors = jnp.where(vacant, proposed, ancestors)
            return count + 1, key, ancestors, vacant & ~accepts(for_acceptance, proposed)

        # rotated, or n < N would favour the first particles
        for_rotation, for_acceptance = jax.random.split(for_start)
        rotation = jax.random.randint(for_rotation, (), 0, size, jnp.int32)
        start = (jnp.arange(n, dtype=jnp.int32) + rotation) % size
        carry = (jnp.int32(1), for_tries, start, ~accepts(for_acceptance, start))
        _, _, ancestors, vacant = lax.while_loop(
            lambda carry: (carry[0] < self.tries) & jnp.any(carry[3]), attempt, carry
        )
        return lax.cond(
            jnp.any(vacant),
            lambda: redraw(for_rest, log_weights, ancestors, vacant),
            lambda: ancestors,
        )


#: `Metropolis()`: 32 iterations.
metropolis = Metropolis()
#: `Rejection()`: 64 tries.
rejection = Rejection()
