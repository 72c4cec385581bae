"""The sites after a program's loop: deterministics, and a last potential."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from smcscale.noise import depends
from smcscale.program import scan
from smcscale.program.refusals import two_sites
from smcscale.program.scan import Site
from smcscale.program.state import ProgramState, log_density


class Tail(NamedTuple):
    observed: bool
    log_potential: Callable[[ProgramState], Array]
    deterministics: Callable[[ProgramState], dict]


def tail_of(
    function: Callable,
    args: tuple,
    kwargs: dict,
    before_type: dict,
    carry_type: Any,
    outputs_type: Any,
    taken: set[str],
) -> Tail | None:
    """The sites after the loop, which may read the final carry but not the stacked outputs."""

    def run(before: dict, carry: Any, ys: Any) -> dict[str, Site]:
        return scan.after(function, args, kwargs, before, carry, ys)

    def zeros(types: Any) -> Any:
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), types)

    def values(before: dict, carry: Any, ys: Any) -> dict:
        sites = run(before, carry, ys)
        return {n: s.log_prob() if s.log_prob else s.value for n, s in sites.items()}

    found = jax.eval_shape(lambda b, c: values(b, c, zeros(outputs_type)), before_type, carry_type)
    if not found:
        return None
    for name in found:
        if name in taken:
            raise ValueError(two_sites(name))
    read = depends(lambda ys: values(zeros(before_type), zeros(carry_type), ys), outputs_type)
    if read:
        raise NotImplementedError(
            f"smcscale: the sites after the loop ({', '.join(found)}) read the loop's stacked "
            "outputs; a particle filter has only the final carry there.\n"
            "  try: keep what they need in the carry."
        )
    names: dict[str, str] = {}

    def kinds(before: dict, carry: Any) -> None:
        names.update({n: s.kind for n, s in run(before, carry, zeros(outputs_type)).items()})

    jax.eval_shape(kinds, before_type, carry_type)

    def sites_of(state: ProgramState) -> dict[str, Site]:
        return run(state.before, state.carry, zeros(outputs_type))

    return Tail(
        "observed" in names.values(),
        lambda state: log_density(sites_of(state), "observed"),
        lambda state: {n: s.value for n, s in sites_of(state).items() if s.kind == "deterministic"},
    )
