"""What a program may not contain: the texts that say so, with the remedy."""

from collections.abc import Callable
from typing import Any


def two_sites(name: str) -> str:
    return f'smcscale: two sites are named "{name}".\n  try: a name for each, or `scope`.'


def whole_path(name: str, fn: Any) -> str:
    return (
        f'smcscale: site "{name}" ({type(fn).__name__}) draws a whole path at once.\n'
        "  try: the same model as a loop over time:\n"
        "    def step(x, y):\n"
        f'        x = numpyro.sample("{name}", dist.Normal(x, scale))\n'
        '        numpyro.sample("y", dist.Normal(x, noise), obs=y)\n'
        "        return x, None\n"
        "    numpyro.contrib.control_flow.scan(step, x0, y)"
    )


def nested_latent(name: str) -> str:
    return (
        f'smcscale: latent site "{name}" is inside a scan inside the loop.\n'
        "  try: a plate, or one loop whose carry holds the inner state."
    )


def no_loop(function: Callable, sites: dict[str, Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return (
        f'smcscale: program "{name}" has no time loop '
        f"(sites: {', '.join(sites) or 'none'}).\n"
        "  try: numpyro.contrib.control_flow.scan over the observations; for a model without time, "
        "NumPyro's MCMC."
    )
