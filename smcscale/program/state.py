"""What one particle of a program carries, and sums and selections over its sites."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from smcscale.program import scan
from smcscale.program.scan import Site


class ProgramState(eqx.Module):
    """The state of one particle of a program.

    Attributes:
        before: latent values drawn before the loop, by site.
        carry: the loop's carry, which the next row reads.
        guide: the guide's carry, None without a guide.
        sites: latents and deterministics of the row just made, by site.
    """

    before: dict[str, Any]
    carry: PyTree
    guide: PyTree
    sites: dict[str, Any]


def log_density(sites: dict[str, Site], kind: str) -> Array:
    """Summed log density of the sites of a kind."""
    total = jnp.zeros(())
    for site in sites.values():
        if site.kind == kind and site.log_prob is not None:
            total += site.log_prob()
    return total


def latents_of(visited: scan.Visited) -> dict[str, Any]:
    """Values of the latent sites of a visit."""
    return {n: s.value for n, s in visited.sites.items() if s.kind == "latent"}


def kept(sites: dict[str, Site]) -> dict:
    """Values that results show: latents and deterministics."""
    return {n: arrays(s.value) for n, s in sites.items() if s.kind != "observed"}


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)
