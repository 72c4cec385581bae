"""What a run spent: counters filled inside the compiled run.

A program says what a step costs with `spend(tokens=...)`; the engine sums it over particles and
runs, beside what it counts itself (`particle_steps`, `resampled_particles`). `SMC.cost` and
`print_summary` show the totals.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.primitives import apply_stack


def spend(**amounts: ArrayLike) -> None:
    """Count what this step of a program cost; a no-op outside an smcscale run.

    Args:
        **amounts: scalars of one particle by name, for example `tokens=12`; the same name may be
            counted several times in a step.
    """
    # NumPyro's own handlers ignore a message type that they do not know
    message: dict[str, Any] = {
        "type": "spend",
        "fn": lambda: None,
        "args": (),
        "kwargs": {},
        "value": amounts,
    }
    apply_stack(message)


def add(total: dict, amounts: dict) -> dict:
    """The sum of two dictionaries of counts."""
    out = dict(total)
    for name, amount in amounts.items():
        value = jnp.asarray(amount, jnp.float32)
        out[name] = out[name] + value if name in out else value
    return out
