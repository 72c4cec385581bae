"""Adaptive weighted rejection sampling: a token that obeys a predicate, in few calls of it.

    draw = awrs(rng, log_probs, lambda token: obeys([*tokens, token]))
    draw.token, draw.log_weight             E[exp(log_weight) 1[token = x]] = p(x) 1[x accepted]

| name | |
|---|---|
| `awrs` | any Python predicate; takes the estimator that needs fewer calls |
| `recursive_awrs` | draws without replacement; the token after the accepted one tells what is left |
| `geometric_awrs` | draws until some were accepted; the count of rejections tells what is left |
| `traced_awrs` | the recursive one under `jit`, for a predicate that JAX can trace |

The weight is random, with the right mean, so a particle filter that adds it to the log-weight keeps
its evidence unbiased.  Where the predicate can be asked about all tokens at once, as an automaton
can, `constraints.restricted` has the same mean and no variance.

Source: Lipkin et al. 2025, "Fast Controlled Generation from Language Models with Adaptive Weighted
Rejection Sampling" (arXiv 2504.05410).  Masses not yet rejected are summed from the small end, so
that the published early exit at a rejected mass of 1 - 1e-5 is not needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray


class Draw(NamedTuple):
    """A token and its weight: `E[exp(log_weight) 1[token = x]] = p(x) 1[x is accepted]`.

    Attributes:
        token: its id; of a draw of weight zero, any.
        log_weight: nats; a random increment, `-inf` when no token was accepted.
        checks: how often the predicate was called.
    """

    token: Any
    log_weight: Any
    checks: Any


def awrs(
    rng: np.random.Generator,
    log_probs: Any,
    accepts: Callable[[int], bool],
    *,
    max_accepts: int = 2,
    max_rejects: int | None = None,
) -> Draw:
    """A token that a Python predicate accepts, by the estimator that needs fewer calls of it.

    `recursive_awrs`, but `geometric_awrs` where one token has 2/3 of the mass (it is then drawn
    again at no cost) or more than two accepted draws are asked for.

    Args:
        rng: consumed.
        log_probs: `(V,)`, nats, `-inf` for what is known to be forbidden; need not be normalized:
            what is missing (a mask put on beforehand) is part of the weight.
        accepts: `token -> bool`; of a text so far `lambda token: obeys([*tokens, token])`.
        max_accepts: accepted draws that the geometric estimator waits for, at least 2; more of them
            lower its variance.
        max_rejects: rejections after which the draw is given up with weight zero; None for as many
            as there are tokens.
    Raises:
        ValueError: log probabilities that are no row of them, or counts out of range.
    Source: Lipkin et al. 2025, algorithms 2 and 3.
    """
    peak = np.max(_mass(log_probs)[0], initial=0.0)
    if max_accepts == 2 and peak < 2 / 3:
        return recursive_awrs(rng, log_probs, accepts, max_rejects=max_rejects)
    return geometric_awrs(rng, log_probs, accepts, max_accepts=max_accepts, max_rejects=max_rejects)


def recursive_awrs(
    rng: np.random.Generator,
    log_probs: Any,
    accepts: Callable[[int], bool],
    *,
    max_rejects: int | None = None,
) -> Draw:
    """Draw without replacement until a token is accepted; the next one tells how much is left.

    With mass `m` not yet rejected and an accepted token of mass `p`, the weight is `m` if the next
    token of the order is accepted too, else `p`; after the last chance it is `m`.  Arguments as
    `awrs`.
    """
    _check_count("max_rejects", max_rejects, 1)
    mass, log_total = _mass(log_probs)
    possible = np.flatnonzero(mass)
    order = possible[np.argsort(-np.log(mass[possible]) - rng.gumbel(size=len(possible)))]
    # summed from the end: exact where `1 - rejected` would cancel
    left = np.cumsum(mass[order][::-1])[::-1]
    tries = len(order) if max_rejects is None else min(max_rejects, len(order))
    for index, token in enumerate(order[:tries].tolist()):
        if not accepts(token):
            continue
        if index == tries - 1:
            return Draw(token, log_total + np.log(left[index]), index + 1)
        weight = left[index] if accepts(int(order[index + 1])) else mass[token]
        return Draw(token, log_total + np.log(weight), index + 2)
    return Draw(0, -np.inf, tries)


def geometric_awrs(
    rng: np.random.Generator,
    log_probs: Any,
    accepts: Callable[[int], bool],
    *,
    max_accepts: int = 2,
    max_rejects: int | None = None,
) -> Draw:
    """Draw until `max_accepts` were accepted; the count of rejections tells the accepted mass.

    No token is asked about twice: one that was rejected is not drawn again, how often it would have
    been is drawn instead.  The first accepted token is returned, with the estimate of the mass from
    the other draws (negative binomial).  Arguments as `awrs`.
    """
    _check_count("max_accepts", max_accepts, 2)
    _check_count("max_rejects", max_rejects, 1)
    most = np.inf if max_rejects is None else max_rejects
    mass, log_total = _mass(log_probs)
    known: dict[int, bool] = {}
    token, accepted, rejected = None, 0, 0
    while accepted < max_accepts and rejected < most and (left := mass.sum()) > 0:
        rejected += int(rng.geometric(min(left, 1.0))) - 1  # draws of tokens rejected before
        if rejected >= most:
            break
        drawn = int(rng.choice(len(mass), p=mass / left))
        if drawn not in known:
            known[drawn] = bool(accepts(drawn))
        if known[drawn]:
            accepted += 1
            token = drawn if token is None else token
        else:
            rejected += 1
            mass[drawn] = 0.0
    if token is None:
        return Draw(0, -np.inf, len(known))
    share = min(max_accepts - 1, accepted) / (accepted + min(rejected, most) - 1)
    return Draw(token, log_total + np.log(share), len(known))


def traced_awrs(
    key: PRNGKeyArray,
    log_probs: Float[Array, " V"],
    accepts: Callable[[Int32[Array, ""]], Bool[Array, ""]],
    *,
    max_rejects: int | None = None,
) -> Draw:
    """`recursive_awrs` with a predicate that JAX can trace, one token at a time.

    For a predicate too dear to be asked about all tokens; where it is not, `restricted` has no
    variance.  Give the weight to the engine as the increment of a transition (`Weighted`).

    Args:
        key: consumed.
        log_probs: `(V,)`, nats, need not be normalized.
        accepts: `token () -> bool ()`.
        max_rejects: as in `awrs` (static).
    """
    _check_count("max_rejects", max_rejects, 1)
    size = log_probs.shape[0]
    log_total = jax.nn.logsumexp(log_probs)
    order = jnp.argsort(-(log_probs + jax.random.gumbel(key, (size,)))).astype(jnp.int32)
    mass = jnp.exp(log_probs - log_total)[order]
    mass = jnp.where(log_total == -jnp.inf, 0.0, mass)
    left = jnp.cumsum(mass[::-1])[::-1]
    tries = jnp.minimum(size if max_rejects is None else max_rejects, jnp.sum(mass > 0))

    def ask(carry):
        asked, _ = carry
        return asked + 1, jnp.asarray(accepts(order[asked]), bool)

    asked, found = jax.lax.while_loop(
        lambda carry: ~carry[1] & (carry[0] < tries),
        ask,
        (jnp.zeros((), jnp.int32), jnp.zeros((), bool)),
    )
    index, more = jnp.maximum(asked - 1, 0), found & (asked < tries)
    next_too = more & accepts(order[jnp.minimum(asked, size - 1)])
    weight = jnp.where(next_too | ~more, left[index], mass[index])
    log_weight = jnp.where(found, log_total + jnp.log(weight), -jnp.inf)
    return Draw(order[index], log_weight, asked + more)


def _mass(log_probs: Any) -> tuple[np.ndarray, float]:
    """Probabilities `(V,)`, normalized, float64, and the log of what they summed to."""
    log_probs = np.array(log_probs, np.float64)
    if log_probs.ndim != 1 or np.any(np.isnan(log_probs) | (log_probs == np.inf)):
        raise ValueError(
            f"smcscale: `log_probs` must be one row of finite numbers or -inf, got shape "
            f"{log_probs.shape}."
        )
    peak = np.max(log_probs, initial=-np.inf)
    if peak == -np.inf:
        return np.zeros_like(log_probs), -np.inf
    mass = np.exp(log_probs - peak)
    return mass / mass.sum(), float(peak + np.log(mass.sum()))


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"smcscale: {name} must be at least {least}, got {value}.")
