"""Swappable pieces of a particle filter: small functions on arrays of log-weights.

| room | kind | called with |
|---|---|---|
| `resampling` | who has offspring | `(key, log_weights, n)` |
| `triggers` | when to resample | `(log_weights, time)` |
| `annealing`, `tilts` | with which weights | `(log_weights, time)` |
| `lookahead` | with which weights, seeing the next row | `(log_weights, states, input, time)` |

Shapes and rules of each kind: `smcscale.types`.
"""

from smcscale.kernels import annealing, lookahead, resampling, tilts, triggers

__all__ = ["annealing", "lookahead", "resampling", "tilts", "triggers"]
