"""When to resample: `(log_weights, time) -> bool ()`.

`log_weights` `(N,)` are those after a look-ahead and before annealing and tilts; `time` is the row
about to be entered, which is the number of rows made.

| trigger | fires |
|---|---|
| `always` | at every row |
| `never` | at no row: importance sampling, best-of-N |
| `ess_below(fraction)` | when the effective sample size falls below a fraction of N |
| `every(k)` | when k more rows have been made |

Read next: `annealing.py`, which changes what is resampled with.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from smcscale.types import LogWeights, Time
from smcscale.weights import ess


def always(log_weights: LogWeights, time: Time) -> Bool[Array, ""]:
    """True: resample before every row."""
    return jnp.asarray(True)


def never(log_weights: LogWeights, time: Time) -> Bool[Array, ""]:
    """False: never resample, so that the run is importance sampling."""
    return jnp.asarray(False)


class ESSBelow(eqx.Module):
    """Trigger: fires when `ess < fraction * N`, and when the weights are NaN.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        time: not used.
    Returns:
        fires: `()` bool.
    Source: Liu & Chen 1995, section 3.
    """

    fraction: float = 0.5

    def __call__(self, log_weights: LogWeights, time: Time) -> Bool[Array, ""]:
        """Whether to resample; see the class."""
        return ~(ess(log_weights) >= self.fraction * log_weights.size)  # NaN is not enough


class Every(eqx.Module):
    """Trigger: fires before rows k, 2k, 3k, ...; row 0 directly follows the initial law.

    Args (of the call):
        log_weights: not used.
        time: the row about to be entered.
    Returns:
        fires: `()` bool.
    """

    k: int

    def __call__(self, log_weights: LogWeights, time: Time) -> Bool[Array, ""]:
        """Whether to resample; see the class."""
        time = jnp.asarray(time)
        return (time % self.k == 0) & (time > 0)


def ess_below(fraction: float = 0.5) -> ESSBelow:
    """Trigger that fires when the effective sample size falls below `fraction * N`."""
    return ESSBelow(fraction)


def every(k: int) -> Every:
    """Trigger that fires before rows k, 2k, 3k, ..."""
    if k < 1:
        raise ValueError(f"smcscale: every({k}) resamples at no row.\n  try: triggers.never.")
    return Every(k)
