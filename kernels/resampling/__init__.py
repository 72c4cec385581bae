"""Resampling kernels: `(key, log_weights, n) -> ancestors (n,) int32`.

`log_weights` `(N,)` are unnormalised, `-inf` marks a dead particle, and `ancestors[i]` is the
parent of new particle i. Unless a kernel carries `bias`, particle i gets `n * weights[i]`
offspring on average, and a dead one none.

| file | members |
|---|---|
| `schemes.py` | multinomial, stratified, systematic, residual, ssp, killing |
| `parallel.py` | metropolis, rejection: no sum over the weights |
| `selection.py` | TopK, BestPerIsland, Balanced: search rules without a target; FanOut |
| `conditional.py` | each scheme given one kept ancestor |
"""

from smcscale.kernels.resampling import conditional as conditional
from smcscale.kernels.resampling.parallel import Metropolis, Rejection, metropolis, rejection
from smcscale.kernels.resampling.schemes import (
    killing,
    multinomial,
    residual,
    ssp,
    stratified,
    systematic,
)
from smcscale.kernels.resampling.selection import Balanced, BestPerIsland, FanOut, TopK

__all__ = [
    "Balanced",
    "BestPerIsland",
    "FanOut",
    "Metropolis",
    "Rejection",
    "TopK",
    "conditional",
    "killing",
    "metropolis",
    "multinomial",
    "rejection",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]
