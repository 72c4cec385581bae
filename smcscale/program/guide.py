"""A second program as proposal: its latent sites must be those of the program."""

from collections.abc import Callable
from typing import Any

import jax

from smcscale.program.scan import Row
from smcscale.program.state import ProgramState, latents_of


def align(
    guide_head: Callable,
    guide_body: Callable,
    opening: Callable,
    first_row: Callable,
    latents: list[str],
    row_latents: list[str],
    first: Row,
    key: Any,
) -> None:
    """The guide must have the program's latent sites, in their shapes, by an abstract run."""
    names: dict[str, list[str]] = {}

    def names_of(key: Any) -> None:
        start = guide_head(key, {})
        names["before"] = list(latents_of(start))
        before = latents_of(opening(key))
        seen = guide_body(key, ProgramState(before, None, start.loop.init, {}), first)
        names["row"] = list(latents_of(seen))

    jax.eval_shape(names_of, key)
    extra = [n for n in names["before"] if n not in latents]
    if extra:
        raise ValueError(
            f"smcscale: the guide draws {quoted(extra)} before the loop, which the program does "
            f"not (it has {quoted(latents) or 'none'}).\n  try: the same site names in both."
        )
    same_sites("the guide", names["row"], row_latents)

    def check_shapes(key: Any) -> None:
        for visited in first_row(key):
            for name, site in visited.sites.items():
                shape = getattr(site.value, "shape", None)
                if site.kind == "latent" and shape != site.shape:
                    raise ValueError(
                        f'smcscale: the guide draws site "{name}" in shape {shape}; the program has '
                        f"it in shape {site.shape}.\n  try: the same shapes in both."
                    )

    jax.eval_shape(check_shapes, key)


def same_sites(who: str, found: Any, wanted: list[str]) -> None:
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted]
    if missing or extra:
        what = [f"lacks {quoted(missing)}"] if missing else []
        what += [f"has {quoted(extra)}, which the program lacks"] if extra else []
        raise ValueError(
            f"smcscale: {who} {' and '.join(what)} inside the loop.\n"
            f"  try: the latent sites of the program's body, {quoted(wanted)}."
        )


def quoted(names: list[str]) -> str:
    return ", ".join(f'"{n}"' for n in names)
