"""The rules of potentials as one module, so that a test of each compiles once."""

import equinox as eqx
import jax
import jax.numpy as jnp

from smcscale.models.diffusion import potentials

RULES = (potentials.difference, potentials.maximum, potentials.total, potentials.product)


class OneRule(eqx.Module):
    """A rule chosen by an array.

    Attributes:
        which: `()`, its place in `RULES`.
    """

    which: jax.Array

    def __call__(self, seen, strength):
        """The log-weight by that rule."""
        return jnp.stack([rule(seen, strength) for rule in RULES])[self.which]
