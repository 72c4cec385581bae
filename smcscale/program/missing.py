"""Missing observations: which elements of an observed site are scored."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist


def is_auxiliary(msg: Any) -> bool:
    return bool((msg["infer"] or {}).get("is_auxiliary"))


def mask_missing(msg: Any) -> None:
    """NaN elements of an observation count as missing: masked, and scored as a number."""
    value = msg["value"]
    if not jnp.issubdtype(getattr(value, "dtype", jnp.int32), jnp.inexact):
        return
    present = ~jnp.isnan(value)
    msg["_with_nan"] = value
    msg["value"] = jnp.where(present, value, 0.0)
    msg["fn"] = masked(msg["fn"], present)


def masked(fn: Any, present: Any) -> Any:
    if isinstance(fn, dist.Independent):
        return dist.Independent(masked(fn.base_dist, present), fn.reinterpreted_batch_ndims)
    return fn.mask(jnp.all(present, axis=tuple(range(-fn.event_dim, 0))))


def scored_elements(fn: Any) -> Any:
    """Which elements of a value a density looks at, by its masks; broadcasts to the value."""
    if isinstance(fn, dist.MaskedDistribution):
        mask = jnp.asarray(fn._mask)
        return mask.reshape(*mask.shape, *(1,) * fn.event_dim) & scored_elements(fn.base_dist)
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        return scored_elements(fn.base_dist)
    return jnp.asarray(True)


def joint_dims(fn: Any) -> int:
    """Trailing dimensions of a value that a density takes as one event, independent ones apart."""
    return joint_dims(fn.base_dist) if isinstance(fn, dist.Independent) else fn.event_dim
