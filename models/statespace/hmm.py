"""Exact answers for programs with finitely many states: forward sums and forward-backward.

The convention of every program here: `x_0` is drawn before the loop, then each row moves the
state and observes it. All arithmetic is on logarithms, so impossible moves and observations
(probability 0) are legal.

| function | gives |
|---|---|
| `log_emissions` | log-likelihood of each state at each row, from a table and symbols |
| `hmm_filter` | filtered probabilities, log evidence |
| `hmm_smoother` | probabilities given all rows, and of pairs of neighbouring states |

Read next: `zoo.py` for the same model as a program.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Float, Int


class HiddenMarkov(eqx.Module):
    """A hidden Markov model with `K` states; all fields are array leaves.

    Attributes:
        initial: `(K,)`, probabilities of `x_0`.
        transition: `(K, K)`, row i holds the probabilities of the next state after state i.
        emission: `(K, M)`, row i holds the probabilities of the `M` symbols in state i.
    """

    initial: Float[Array, " K"]
    transition: Float[Array, "K K"]
    emission: Float[Array, "K M"]


class FilteredStates(NamedTuple):
    """What the forward sums know after each row.

    Attributes:
        log_evidence: `()`, `log p(y)` in nats; `-inf` if the data are impossible.
        log_increments: `(T,)`, `log p(y_t | y before t)`.
        log_probs: `(T, K)`, `log P(x_t = k | y up to t)`.
        initial_log_probs: `(K,)`, of `x_0` given its own observation, if any.
        initial_log_increment: `()`, log probability of the observation of `x_0`, else 0.
    """

    log_evidence: Float[Array, ""]
    log_increments: Float[Array, " T"]
    log_probs: Float[Array, "T K"]
    initial_log_probs: Float[Array, " K"]
    initial_log_increment: Float[Array, ""]


class SmoothedStates(NamedTuple):
    """What all rows together say about each state.

    Attributes:
        probs: `(T, K)`, `P(x_t = k | y)`.
        pair_probs: `(T, K, K)`, `P(x_{t-1} = j, x_t = k | y)`; its first entry is with `x_0`.
        initial_probs: `(K,)`, `P(x_0 = k | y)`.
    """

    probs: Float[Array, "T K"]
    pair_probs: Float[Array, "T K K"]
    initial_probs: Float[Array, " K"]


def log_emissions(
    emission: Float[Array, "K M"], symbols: Int[ArrayLike, "..."]
) -> Float[Array, "... K"]:
    """Log-likelihood of every state, from a table of symbol probabilities.

    Args:
        emission: `(K, M)`, probabilities of the `M` symbols in each state.
        symbols: `(T,)` or `()`, in `[0, M)`; -1 marks a missing symbol (log-likelihood 0).
    """
    symbols = jnp.asarray(symbols)
    rows = jnp.log(emission).T[symbols]
    return jnp.where(symbols[..., None] < 0, 0.0, rows)


def hmm_filter(
    initial: Float[Array, " K"],
    transition: Float[Array, "K K"],
    log_likelihoods: Float[Array, "T K"],
    *,
    initial_log_likelihood: Float[Array, " K"] | None = None,
) -> FilteredStates:
    """Filtered probabilities and exact log evidence of a model with finitely many states.

    Args:
        initial: `(K,)`, probabilities of `x_0`.
        transition: `(K, K)`, rows sum to one.
        log_likelihoods: `(T, K)`, `log p(y_t | x_t = k)`; a missing row is all zeros.
        initial_log_likelihood: `(K,)`, of an observation of `x_0` itself; None if there is none.
    Source: Rabiner 1989, section III.A, on logarithms.

    >>> emission = jnp.array([[0.8, 0.2], [0.3, 0.7]])
    >>> seen = log_emissions(emission, jnp.array([0, 1, 1, 0]))
    >>> filtered = hmm_filter(jnp.array([0.6, 0.4]), jnp.array([[0.9, 0.1], [0.2, 0.8]]),
    ...     seen[1:], initial_log_likelihood=seen[0])
    >>> round(float(filtered.log_evidence), 4)
    -3.2072
    """
    log_transition = jnp.log(transition)
    log_prior = jnp.log(initial)
    zero = jnp.zeros((), log_prior.dtype)
    first = jnp.zeros_like(log_prior) if initial_log_likelihood is None else initial_log_likelihood
    log_probs, increment = _normalised(log_prior + first)
    increment = zero if initial_log_likelihood is None else increment

    def step(log_probs, log_likelihood):
        ahead = logsumexp(log_probs[:, None] + log_transition, axis=0)
        log_probs, increment = _normalised(ahead + log_likelihood)
        return log_probs, (log_probs, increment)

    _, (all_log_probs, increments) = lax.scan(step, log_probs, log_likelihoods)
    return FilteredStates(
        increment + jnp.sum(increments), increments, all_log_probs, log_probs, increment
    )


def hmm_smoother(
    transition: Float[Array, "K K"],
    log_likelihoods: Float[Array, "T K"],
    filtered: FilteredStates,
) -> SmoothedStates:
    """Probabilities of every state, and of neighbouring pairs, given all rows.

    Args:
        transition: `(K, K)`, as in `hmm_filter`.
        log_likelihoods: `(T, K)`, as in `hmm_filter`.
        filtered: what `hmm_filter` returned for them.
    Source: Rabiner 1989, sections III.A and III.C (forward-backward).
    """
    log_transition = jnp.log(transition)
    before = jnp.concatenate([filtered.initial_log_probs[None], filtered.log_probs[:-1]])

    def step(log_future, row):
        log_before, log_likelihood, increment = row
        # log_future[k] = log p(rows after t | x_t = k) - log p(rows after t | rows up to t)
        arrived = log_transition + log_likelihood + log_future - increment
        pair = jnp.exp(log_before[:, None] + arrived)
        return logsumexp(arrived, axis=1), pair

    rows = (before, log_likelihoods, filtered.log_increments)
    last = jnp.zeros_like(filtered.initial_log_probs)
    _, pairs = lax.scan(step, last, rows, reverse=True)
    return SmoothedStates(pairs.sum(axis=1), pairs, pairs[0].sum(axis=1))


def _normalised(log_weights):
    """Log-probabilities and their log total; if all are impossible, they stay `-inf`."""
    total = logsumexp(log_weights)
    return log_weights - jnp.where(jnp.isneginf(total), 0.0, total), total
