"""Arithmetic of finished populations, in NumPy and float64: from weights to draws and quantiles.

| function | what comes out |
|---|---|
| `normalized` | weights that sum to one |
| `weighted_quantiles` | quantiles of weighted values |
| `systematic_indices` | equally weighted draws from weighted particles |
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def normalized(log_weights: np.ndarray, axis: int | None) -> np.ndarray:
    """Weights that sum to one along an axis; NaN where all are dead."""
    largest = np.max(log_weights, axis, keepdims=True)
    alive = np.isfinite(largest)
    scaled = np.exp(log_weights - np.where(alive, largest, 0))
    total = np.sum(scaled, axis, keepdims=True)
    return np.where(alive, scaled / np.where(alive, total, 1), np.nan)


def weighted_quantiles(values: Any, weights: Any, q: Any) -> np.ndarray:
    """Inverse of the weighted distribution function, exact for ties and zero weights.

    Args:
        values: `(K, ...)`.
        weights: `(K,)`, sum to one; all NaN for a dead population.
        q: `(Q,)`, in `[0, 1]`.
    Returns:
        quantiles: `(Q, ...)`: the smallest value with at least `q` of the weight at or below it.
    """
    values, weights = np.asarray(values), np.asarray(weights, np.float64)
    if not np.isfinite(weights).all():
        return np.full((len(q), *values.shape[1:]), np.nan)
    alive = weights > 0
    values, weights = values[alive], weights[alive]
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    out = np.empty((len(q), flat.shape[1]), flat.dtype)
    for j in range(flat.shape[1]):
        order = np.argsort(flat[:, j], kind="stable")
        total = np.cumsum(weights[order])
        # the last sum may miss 1 by rounding, and q = 1 must still find the largest value
        at = np.searchsorted(total, np.asarray(q) * total[-1] * (1 - 1e-12))
        out[:, j] = flat[order[np.minimum(at, len(order) - 1)], j]
    return out.reshape(len(q), *values.shape[1:])


def systematic_indices(key: Array, log_weights: np.ndarray) -> np.ndarray:
    """As many equally weighted draws as there are weights, in random order, float64 throughout.

    Args:
        key: consumed.
        log_weights: `(K,)`, not all `-inf`.
    Returns:
        indices: `(K,)` int.
    """
    size = len(log_weights)
    total = np.cumsum(normalized(log_weights, axis=None))
    offset = float(jax.random.uniform(key))
    bounds = np.ceil(size * (total / total[-1]) - offset).astype(np.int64).clip(0, size)
    last = np.flatnonzero(np.isfinite(log_weights))[-1]
    bounds[last:] = size  # rounding must not reach a dead particle at the end
    offspring = np.diff(bounds, prepend=0)
    indices = np.repeat(np.arange(size), offspring)
    # sorted draws would make any slice of them come from the first runs only
    order = np.random.Generator(np.random.Philox(int(jax.random.bits(key, dtype=jnp.uint32))))
    return order.permutation(indices)
