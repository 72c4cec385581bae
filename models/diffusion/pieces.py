"""Network calls in pieces: a bound on the memory of a large network, whatever the number of particles.

A filter calls the denoiser for all particles of all runs at once. `Pieces` calls it for a few at a
time; the numbers stay the same, and so does their count.

    denoiser = Pieces(denoiser, 16)                            # at most 16 states at a time
    denoiser = in_pieces(denoiser, schedule, (3, 64, 64))      # as many as half of the memory holds

Put it outermost: `Pieces(Sloped(denoiser, steering), 16)` bounds the gradient's memory too, and
`Sloped(eqx.filter_checkpoint(denoiser), steering)` trades it for a second pass through the network. A
`Corrected` walk that needs no divergence (`target_score`) takes `Composed((Pieces(denoiser, 16),), ...)`.
"""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import Network
from smcscale.models.diffusion.schedules import Level, Schedule


class Pieces(eqx.Module):
    """A denoiser that, mapped over states, is called for at most `size` of them at once.

    Not differentiable: wrap what takes the gradient (`Sloped`), not what it is taken of.

    Attributes:
        denoiser: `(x, level) -> Prediction`.
        size: states in a piece.
    """

    denoiser: Network
    size: int = eqx.field(static=True)

    def __check_init__(self):
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(
                f"smcscale: `size` of Pieces must be a whole number above 0, got {self.size!r}."
            )

    def __call__(self, x: Float[Array, "..."], level: Level) -> Prediction:
        """The prediction for one state."""
        arrays, static = eqx.partition(self.denoiser, eqx.is_array)

        def one(arrays: Any, x: Array, level: Level) -> Prediction:
            return eqx.combine(arrays, static)(x, level)

        @custom_vmap
        def single(arrays: Any, x: Array, level: Level) -> Prediction:
            return one(arrays, x, level)

        @custom_vmap
        def many(arrays: Any, x: Array, level: Level) -> Prediction:
            """`x` and the leaves of `level` have one leading axis."""
            return jax.lax.map(lambda row: one(arrays, *row), (x, level), batch_size=self.size)

        @single.def_vmap
        def _(count: int, mapped: Any, arrays: Any, x: Array, level: Level):
            x, level = _spread(count, mapped, arrays, x, level)
            found = many(arrays, x, level)
            return found, jax.tree.map(lambda _: True, found)

        @many.def_vmap
        def _(count: int, mapped: Any, arrays: Any, x: Array, level: Level):
            x, level = _spread(count, mapped, arrays, x, level)
            rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (x, level))
            found = many(arrays, *rows)
            shaped = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), found)
            return shaped, jax.tree.map(lambda _: True, shaped)

        @jax.custom_jvp
        def whole(arrays: Any, x: Array, level: Level) -> Prediction:
            return single(arrays, x, level)

        @whole.defjvp
        def _(primals: Any, tangents: Any):
            raise TypeError(
                "smcscale: a Pieces cannot be differentiated through.\n"
                "  try: Pieces around what takes the gradient, such as Pieces(Sloped(denoiser, ...), n)."
            )

        return whole(arrays, x, level)


def _spread(count: int, mapped: Any, arrays: Any, x: Array, level: Level) -> tuple[Array, Level]:
    """State and level with a leading axis each; the network is one for all."""
    in_arrays, in_x, in_level = mapped
    if any(jax.tree.leaves(in_arrays)):
        raise TypeError(
            "smcscale: Pieces was mapped over networks; it takes pieces of states.\n"
            "  try: Pieces for each network, outside the map."
        )
    return jax.tree.map(
        lambda a, has: a if has else jnp.broadcast_to(a, (count, *jnp.shape(a))),
        (x, level),
        (in_x, in_level),
    )


def in_pieces(
    denoiser: Network, schedule: Schedule, shape: tuple[int, ...], *, limit: int | None = None
) -> Pieces:
    """`Pieces` as large as a limit of memory allows, by what the compiler says of the network.

    Args:
        denoiser: `(x, level) -> Prediction`; it is compiled, not run.
        schedule: its top level serves as an example.
        shape: of a state.
        limit: bytes for what the network holds on the way; None: half of what is free on the
            accelerator, or half of the machine's memory.
    Raises:
        ValueError: a limit that does not hold one state, or a backend that says nothing of memory.
    """
    given, limit = limit is not None, _memory() // 2 if limit is None else limit
    level = schedule.level(-1)
    arrays, static = eqx.partition(denoiser, eqx.is_array)

    def batched(arrays: Any, x: Array) -> Prediction:
        return jax.vmap(lambda x: eqx.combine(arrays, static)(x, level))(x)

    def held(count: int) -> int:
        states = jax.ShapeDtypeStruct((count, *shape), level.alpha.dtype)
        found: Any = jax.jit(batched).lower(arrays, states).compile().memory_analysis()
        if found is None:
            raise ValueError(
                "smcscale: this backend does not say what memory a network takes.\n"
                "  try: Pieces(denoiser, size)."
            )
        return found.temp_size_in_bytes + found.output_size_in_bytes

    each = max((held(32) - held(16)) // 16, 1)
    if each > limit:
        raise ValueError(
            f"smcscale: one state takes {each} bytes in the network, "
            f"{'`limit` is' if given else 'half of the free memory is'} {limit}.\n"
            "  try: a larger limit, or eqx.filter_checkpoint for gradients."
        )
    return Pieces(denoiser, limit // each)


def _memory() -> int:
    """Bytes that are free on an accelerator, or all of the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
