"""The program run on beyond the data: observed sites are drawn, not scored."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from smcscale import keys
from smcscale.noise import depends
from smcscale.program.lower import lower
from smcscale.program.scan import Row


@eqx.filter_jit
def forecast(
    function: Any,
    guide: Any,
    particle_keys: Any,
    indices: Any,
    states: Any,
    args: tuple,
    kwargs: dict,
    num_steps: int,
    xs: Any,
) -> dict:
    """Paths of all sites beyond the data, `{site: (K, num_steps, ...)}`.

    Args:
        function: NumPyro program.
        guide: its guide, which only shapes the state.
        particle_keys: `(K,)` keys, one for each forecast path.
        indices: `(K,)` which particles the paths start from.
        states: their states, leaves `(R * N, ...)`.
        args: the program's arguments.
        kwargs: its keyword arguments.
        num_steps: rows beyond the data.
        xs: rows of the scanned inputs, leaves `(num_steps, ...)`, or None.
    Raises:
        ValueError: when the program reads rows that are not given, or they do not fit.
    """
    lowered = lower(function, args, kwargs, guide=guide)
    last = jax.tree.map(lambda x: x[-1], lowered.inputs)
    chosen = jax.tree.map(lambda x: x[indices], states)
    if xs is None:
        one = jax.tree.map(lambda x: x[0], chosen)

        def drawn(row: Any) -> Any:
            state, sites = lowered.forecast(particle_keys[0], one, last._replace(row=row))
            return state.carry, sites

        if last.row is not None and depends(drawn, jax.eval_shape(lambda: last.row)):
            raise ValueError(
                "smcscale: the program computes with the rows it scans over (not only observes "
                "them), so forecasts need them.\n"
                "  try: predict(key, num_steps, xs=rows), or carry the value that "
                "numpyro.sample(..., obs=y) returns instead of y."
            )
        xs = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_steps, *jnp.shape(x))), last.row)
    _check_rows(xs, last.row, num_steps)
    times = lowered.num_steps + jnp.arange(num_steps, dtype=jnp.int32)

    def one_path(path_key: Any, state: Any) -> dict:
        def step(state: Any, row: tuple) -> tuple:
            time, x = row
            at = Row(time, x, None, jnp.asarray(False))
            return lowered.forecast(keys.predict(path_key, time), state, at)

        return jax.lax.scan(step, state, (times, xs))[1]

    return jax.vmap(one_path)(particle_keys, chosen)


def _check_rows(xs: Any, row: Any, num_steps: int) -> None:
    if jax.tree.structure(xs) != jax.tree.structure(row):
        raise ValueError(
            f"smcscale: `xs` has structure {jax.tree.structure(xs)}; the loop scans over "
            f"{jax.tree.structure(row)}.\n  try: rows like those of `run`, observations of any value."
        )
    for got, like in zip(jax.tree.leaves(xs), jax.tree.leaves(row), strict=True):
        if jnp.shape(got) != (num_steps, *like.shape):
            raise ValueError(
                f"smcscale: `xs` has a leaf of shape {jnp.shape(got)}; {num_steps} rows have shape "
                f"{(num_steps, *like.shape)}.\n  try: leaves (num_steps, ...)."
            )
