"""Search rules in the place of resampling, biased: `(key, log_weights, n) -> ancestors (n,)`.

They keep the best instead of sampling, so a run that uses one has no target distribution:
`bias = "no target"`, and its evidence is refused. `log_weights` are read as scores, and whatever
has score `-inf` is dropped.

| kernel | rule | search it gives |
|---|---|---|
| `TopK(k)` | the best k, n / k copies each | beam search |
| `BestPerIsland(num_islands)` | the best of each island fills it | DVTS |
| `Balanced(temperature)` | copies in proportion to `exp(score / temperature)`, rounded | REBASE |
| `FanOut(kernel, k)` | n / k ancestors of any kernel, k copies each | as `kernel` |

`FanOut` is here for its use; it adds no bias of its own.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from smcscale.types import Ancestors, Key, LogWeights, Resampling
from smcscale.weights import prefix_sum


def _divided(n: int, parts: int, what: str) -> int:
    """`n / parts`, refused when that is not whole."""
    if parts < 1 or n % parts:
        raise ValueError(
            f"smcscale: {what} = {parts} does not divide the {n} ancestors asked for.\n"
            f"  try: a number of particles that is a multiple of {parts}."
        )
    return n // parts


class TopK(eqx.Module):
    """Top-k selection: the k best particles, in order, with `n / k` adjacent copies each.

    Args (of the call):
        key: not used; the rule is deterministic and ties go to the lower index.
        log_weights: `(N,)` scores; `-inf` is never kept.
        n: number of ancestors, a multiple of k.
    Returns:
        ancestors: `(n,)` int32, best first; if fewer than k are alive they share the places.
    Raises:
        ValueError: at trace time, when k does not divide n or exceeds N.
    Properties: biased, no target; gradient: zero through `ancestors`.
    Source: beam search of Snell et al. 2024, section 5.2, without its pruning of finished beams.
    """

    k: int
    bias: ClassVar[str] = "no target"

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""
        copies = _divided(n, self.k, "TopK k")
        if self.k > log_weights.size:
            raise ValueError(
                f"smcscale: TopK keeps {self.k} particles, but there are {log_weights.size}.\n"
                "  try: a smaller k."
            )
        _, best = lax.top_k(log_weights, self.k)
        alive = jnp.maximum(jnp.sum(log_weights[best] > -jnp.inf), 1)
        best = best[jnp.arange(self.k) % alive]
        return jnp.repeat(best.astype(jnp.int32), copies)


class BestPerIsland(eqx.Module):
    """Best of each island: island m of the particles is filled with copies of its best member.

    Args (of the call):
        key: not used; ties go to the lower index.
        log_weights: `(N,)` scores, islands adjacent; `-inf` is never kept.
        n: number of ancestors; the number of islands divides N and n.
    Returns:
        ancestors: `(n,)` int32; an island that is all dead takes the best particle of all.
    Raises:
        ValueError: at trace time, when the islands are not of equal size.
    Properties: biased, no target; gradient: zero through `ancestors`.
    Source: DVTS, Beeching, Tunstall & Rush 2024.
    """

    num_islands: int = 1
    bias: ClassVar[str] = "no target"

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""
        copies = _divided(n, self.num_islands, "num_islands")
        size = _divided(log_weights.size, self.num_islands, "num_islands")
        islands = log_weights.reshape(self.num_islands, size)
        best = jnp.argmax(islands, axis=1) + size * jnp.arange(self.num_islands)
        best = jnp.where(jnp.max(islands, axis=1) > -jnp.inf, best, jnp.argmax(log_weights))
        return jnp.repeat(best.astype(jnp.int32), copies)


class Balanced(eqx.Module):
    """Balanced allocation: copies near `n softmax(score / temperature)`, the best served first.

    From the best score down, each particle takes its share of what is left, rounded up. The scores
    are `log_weights` themselves: weigh by `exp(score)`, not by the score.

    Args (of the call):
        key: not used; ties go to the lower index.
        log_weights: `(N,)` scores; `-inf` gets no copy.
        n: number of ancestors.
    Returns:
        ancestors: `(n,)` int32, best first.
    Properties: biased, no target; favours the best by up to one copy each; gradient: zero through
        `ancestors`.
    Source: REBASE, Wu et al. 2024, section 3.2; shares by suffix sums and clipped, since their
        running difference misses n in float32.
    """

    temperature: float = 0.2
    bias: ClassVar[str] = "no target"

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""
        order = jnp.argsort(-log_weights).astype(jnp.int32)
        sorted_scores = log_weights[order]
        shares = jnp.exp((sorted_scores - sorted_scores[0]) / self.temperature)
        remaining_share = lax.associative_scan(jnp.add, shares, reverse=True)

        def allocate(left, share_and_rest):
            share, rest = share_and_rest
            wanted = jnp.ceil(left * (share / jnp.where(rest > 0, rest, 1))).astype(jnp.int32)
            taken = jnp.clip(wanted, 0, left)
            return left - taken, taken

        _, copies = lax.scan(allocate, jnp.int32(n), (shares, remaining_share))
        return order[_spread(copies, n)]


class FanOut(eqx.Module):
    """Resampling with adjacent copies: `n / k` ancestors of another kernel, k times each.

    Args (of the call):
        key: passed on.
        log_weights: `(N,)`, unnormalised, nats.
        n: number of ancestors, a multiple of k.
    Returns:
        ancestors: `(n,)` int32, copies adjacent.
    Raises:
        ValueError: at trace time, when k does not divide n.
    Properties: as the kernel's, with k times its counts at n / k.
    """

    kernel: Resampling
    k: int

    @property
    def bias(self) -> str | None:
        """The kernel's."""
        return getattr(self.kernel, "bias", None)

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors `(n,)`; see the class."""
        return jnp.repeat(self.kernel(key, log_weights, _divided(n, self.k, "FanOut k")), self.k)


def _spread(copies: Int32[Array, " N"], n: int) -> Int32[Array, " n"]:
    """Index i repeated `copies[i]` times; the copies sum to n."""
    starts = jnp.zeros(n, jnp.int32).at[prefix_sum(copies)[:-1]].add(1, mode="drop")
    return prefix_sum(starts)
