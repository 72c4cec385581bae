"""What a run spent: counters filled inside the compiled run.

A program says what a step costs with `smcscale.spend(tokens=...)`; the engine sums it over
particles and runs, beside what it counts itself (`particle_steps`, `resampled_particles`).
`SMC.cost` and `print_summary` show the totals.
"""

import jax.numpy as jnp


def add(total: dict, amounts: dict) -> dict:
    """The sum of two dictionaries of counts."""
    out = dict(total)
    for name, amount in amounts.items():
        value = jnp.asarray(amount, jnp.float32)
        out[name] = out[name] + value if name in out else value
    return out
