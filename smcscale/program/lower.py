"""A NumPyro program (and its guide or proposal) as a `FeynmanKac` model of one particle.

One body gives everything: it is run to simulate (latents drawn), to score a transition (latents
given, their densities summed) and to weigh (latents given, observed densities summed). A filter
runs it once a row for all of that: XLA would not merge loops inside it, as of a network's layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from smcscale.feynman_kac import Advanced, FeynmanKac, Weighted
from smcscale.noise import depends
from smcscale.program import scan
from smcscale.program.guide import align, same_sites
from smcscale.program.missing import joint_dims, scored_elements
from smcscale.program.scan import Row
from smcscale.program.state import ProgramState, arrays, kept, latents_of, log_density
from smcscale.program.tail import tail_of


class Lowered(NamedTuple):
    """A program bound to its arguments.

    Attributes:
        model: the Feynman-Kac model.
        inputs: rows, leaves `(T, ...)`.
        num_steps: T.
        advance: `(key, previous, input) -> Advanced`, transition, potential and cost in one go.
        follow: `(previous, latents, input) -> (Advanced, log density)`, the step to given latents of
            the row by site, and what the transition says of them.
        observed: names of the observed sites of a row.
        explain: `(key, previous, state, input) -> {site: log potential}` of one particle.
        readout: `state -> (sites before the loop, sites after it)`, deterministics included.
        has_readout: whether `readout` has more to tell than the state.
        missing: `() -> {site: (any NaN (T,), part of a joint event NaN (T,))}` of observed sites.
        forecast: `(key, state, Row) -> (state, {site: value})`, observed sites drawn too.
    """

    model: FeynmanKac
    inputs: Row
    num_steps: int
    advance: Callable[..., Advanced]
    follow: Callable[..., tuple[Advanced, Array]]
    observed: tuple[str, ...]
    explain: Callable
    readout: Callable
    has_readout: bool
    missing: Callable[[], dict]
    forecast: Callable


def lower(
    function: Callable,
    args: tuple,
    kwargs: dict,
    *,
    guide: Callable | None = None,
    proposal: Any = None,
    nan_is_missing: bool = False,
) -> Lowered:
    """Lower a program with its arguments.

    Args:
        function: NumPyro program with one `numpyro.contrib.control_flow.scan`.
        args: its arguments; arrays may be tracers.
        kwargs: its keyword arguments.
        guide: a second program with the same latent sites inside the loop; sites before the loop
            that it omits are drawn from the prior.
        proposal: an object with `sample(key, carry, row) -> {site: value}` and
            `log_prob(carry, values, row)`, in place of a guide.
        nan_is_missing: mask NaN elements of observations.
    Raises:
        ValueError, NotImplementedError: what cannot be run, by site name, with the remedy.
    """

    def head(key: Any, given: dict) -> scan.Visited:
        return scan.before(function, args, kwargs, key, given)

    def guide_head(key: Any, given: dict) -> scan.Visited:
        assert guide is not None
        return scan.before(guide, args, kwargs, key, given)

    def opening(key: Any) -> scan.Visited:
        """The program up to its loop, latents drawn by the guide where it has them."""
        return head(key, {} if guide is None else latents_of(guide_head(key, {})))

    dummy = jax.random.key(0)
    visited = opening(dummy)
    loop = visited.loop
    latents = list(latents_of(visited))
    _refuse_random_rows(lambda key: opening(key).loop.xs, function)
    guide_rows = None
    if guide is not None:
        guide_loop = guide_head(dummy, {}).loop
        if guide_loop.length != loop.length:
            raise ValueError(
                f"smcscale: the guide's loop has {guide_loop.length} rows, the program's "
                f"{loop.length}.\n  try: scan over inputs of the same length."
            )
        guide_rows = guide_loop.xs
    num_steps = int(loop.length)
    inputs = Row(
        jnp.arange(num_steps, dtype=jnp.int32),
        jax.tree.map(jnp.asarray, loop.xs),
        jax.tree.map(jnp.asarray, guide_rows),
        jnp.arange(num_steps) == num_steps - 1,
    )
    first = jax.tree.map(lambda leaf: leaf[0], inputs)

    def body(key: Any, previous: ProgramState, at: Row, given: dict) -> scan.Visited:
        return scan.row(
            function,
            args,
            kwargs,
            key,
            previous.before,
            previous.carry,
            at,
            given,
            nan_is_missing=nan_is_missing,
        )

    def guide_body(key: Any, previous: ProgramState, at: Row) -> scan.Visited:
        assert guide is not None
        return scan.row(
            guide, args, kwargs, key, previous.before, previous.guide, at._replace(row=at.guide), {}
        )

    # ---- the carry's type and the sites of a row, from abstract evaluation
    kinds: dict[str, str] = {}

    def first_row(key: Any) -> tuple[scan.Visited, scan.Visited]:
        start = opening(key)
        previous = ProgramState(latents_of(start), start.loop.init, None, {})
        given: dict = {}
        if guide is not None:
            proposed = guide_head(key, {}).loop.init
            given = latents_of(
                guide_body(key, ProgramState(previous.before, None, proposed, {}), first)
            )
        return start, body(key, previous, first, given)

    def probe(key: Any) -> tuple:
        start, seen = first_row(key)
        kinds.update({n: s.kind for n, s in seen.sites.items()})
        return start.loop.init, seen.carry, seen.output, latents_of(start), kept(seen.sites)

    found = jax.eval_shape(probe, dummy)
    init_type, carry_type, output_type, before_type, sites_type = found
    row_latents = [n for n, kind in kinds.items() if kind == "latent"]
    if guide is not None:
        align(guide_head, guide_body, opening, first_row, latents, row_latents, first, dummy)
    carry_type = _carry_type(init_type, carry_type)

    def as_carry(carry: Any) -> Any:
        return jax.tree.map(lambda v, t: jnp.asarray(v).astype(t.dtype), carry, carry_type)

    def blank_sites() -> dict:
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), sites_type)

    # ---- after the loop
    outputs_type = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct((num_steps, *t.shape), t.dtype), output_type
    )
    tail = tail_of(function, args, kwargs, before_type, carry_type, outputs_type, set(kinds))

    def initial(key: Any) -> Weighted:
        increment = jnp.zeros(())
        guide_carry = None
        given: dict = {}
        if guide is not None:
            proposed = guide_head(jax.random.fold_in(key, 0), {})  # site keys count from 1
            guide_carry = arrays(proposed.loop.init)
            given = latents_of(proposed)
            increment -= log_density(proposed.sites, "latent")
        start = head(key, given)
        sites = start.sites
        increment += log_density({n: sites[n] for n in given}, "latent")
        increment += log_density(sites, "observed")
        before = {n: sites[n].value for n in latents}
        state = ProgramState(before, as_carry(start.loop.init), guide_carry, blank_sites())
        return Weighted(state, increment)

    def moved(key: Any, previous: ProgramState, at: Row) -> tuple[Weighted, scan.Visited]:
        if guide is None and proposal is None:
            seen = body(key, previous, at, {})
            state = ProgramState(previous.before, as_carry(seen.carry), None, kept(seen.sites))
            return Weighted(state, jnp.zeros(())), seen
        guide_carry = None
        if guide is not None:
            proposed = guide_body(key, previous, at)
            guide_carry = arrays(proposed.carry)
            drawn = latents_of(proposed)
            log_q = log_density(proposed.sites, "latent")
        else:
            drawn = proposal.sample(key, previous.carry, at.row)
            same_sites("the proposal", drawn, row_latents)
            log_q = proposal.log_prob(previous.carry, drawn, at.row)
        seen = body(None, previous, at, drawn)
        state = ProgramState(previous.before, as_carry(seen.carry), guide_carry, kept(seen.sites))
        return Weighted(state, log_density(seen.sites, "latent") - log_q), seen

    def transition(key: Any, previous: ProgramState, at: Row) -> ProgramState | Weighted:
        out, _ = moved(key, previous, at)
        return out.state if guide is None and proposal is None else out

    def missing() -> dict:
        def look(at: Row) -> dict:
            start = opening(dummy)
            carry = as_carry(start.loop.init)
            seen = scan.row(function, args, kwargs, dummy, latents_of(start), carry, at, drawn_row)
            found = {}
            for name, site in seen.sites.items():
                dtype = getattr(site.value, "dtype", jnp.int32)
                if site.kind == "observed" and jnp.issubdtype(dtype, jnp.inexact):
                    absent = jnp.isnan(site.value) & scored_elements(site.fn)
                    events = tuple(range(-joint_dims(site.fn), 0))
                    part = jnp.any(absent, axis=events) & ~jnp.all(absent, axis=events)
                    found[name] = (jnp.any(absent), jnp.any(part))
            return found

        drawn_row = latents_of(first_row(dummy)[1])
        return jax.lax.map(look, inputs)

    def forecast(key: Any, state: ProgramState, at: Row) -> tuple[ProgramState, dict]:
        seen = scan.row(
            function, args, kwargs, key, state.before, state.carry, at, {}, forecast=True
        )
        drawn = {n: arrays(s.value) for n, s in seen.sites.items() if s.kind != "observed"}
        shown = {n: drawn[n] for n in state.sites}
        return ProgramState(state.before, as_carry(seen.carry), state.guide, shown), drawn

    def replay(previous: ProgramState, state: ProgramState, at: Row) -> scan.Visited:
        return body(None, previous, at, {n: state.sites[n] for n in row_latents})

    def scored(seen: scan.Visited, state: ProgramState, at: Row) -> Array:
        total = log_density(seen.sites, "observed")
        if tail is not None and tail.observed:
            total += jax.lax.cond(
                at.last, tail.log_potential, lambda _: jnp.zeros_like(total), state
            )
        return total

    def log_potential(previous: ProgramState, state: ProgramState, at: Row) -> Array:
        return scored(replay(previous, state, at), state, at)

    def advance(key: Any, previous: ProgramState, at: Row) -> Advanced:
        out, seen = moved(key, previous, at)
        return Advanced(out.state, out.log_increment + scored(seen, out.state, at), seen.costs)

    def follow(previous: ProgramState, given: dict, at: Row) -> tuple[Advanced, Array]:
        same_sites("the kept path", given, row_latents)
        seen = body(None, previous, at, given)
        state = ProgramState(previous.before, as_carry(seen.carry), None, kept(seen.sites))
        made = Advanced(state, scored(seen, state, at), seen.costs)
        return made, log_density(seen.sites, "latent")

    def log_transition(previous: ProgramState, state: ProgramState, at: Row) -> Array:
        return log_density(replay(previous, state, at).sites, "latent")

    def cost(previous: ProgramState, state: ProgramState, at: Row) -> dict:
        return replay(previous, state, at).costs

    def explain(key: Any, previous: ProgramState, state: ProgramState, at: Row | None) -> dict:
        if at is None:
            sites = head(key, state.before).sites
        else:
            sites = replay(previous, state, at).sites
        return {n: s.log_prob() for n, s in sites.items() if s.kind == "observed" and s.log_prob}

    def readout(state: ProgramState) -> tuple[dict, dict]:
        start = head(None, state.before)
        return kept(start.sites), {} if tail is None else tail.deterministics(state)

    model = FeynmanKac(
        initial,
        transition,
        log_potential,
        log_transition=log_transition,
        heavy=heavy_names(sites_type),
        record=lambda state: state.sites,
        cost=cost,
    )
    deterministic = any(s.kind == "deterministic" for s in visited.sites.values())
    return Lowered(
        model,
        inputs,
        num_steps,
        advance,
        follow,
        tuple(n for n, kind in kinds.items() if kind == "observed"),
        explain,
        readout,
        deterministic or tail is not None,
        missing,
        forecast,
    )


def heavy_names(sites: dict) -> tuple[str, ...] | None:
    """Paths of the leaves that a site's value declares heavy (its class attribute `heavy`)."""
    names: list[str] = []
    for value in sites.values():
        names += getattr(type(value), "heavy", ())
    return tuple(names) or None


def _refuse_random_rows(rows: Callable, function: Callable) -> None:
    if depends(rows, jax.eval_shape(lambda: jax.random.key(0))):
        name = getattr(function, "__name__", type(function).__name__)
        raise NotImplementedError(
            f'smcscale: the rows that program "{name}" scans over depend on latent sites.\n'
            "  try: draw inside the loop's body, or read the latent by its index from the closure."
        )


def _carry_type(init: Any, out: Any) -> Any:
    """The carry's type after one row, checked against the initial one."""
    if jax.tree.structure(init) != jax.tree.structure(out):
        raise TypeError(
            "smcscale: the loop's body returns a carry of another structure than it was given.\n"
            f"  given: {jax.tree.structure(init)}\n  returned: {jax.tree.structure(out)}\n"
            "  try: return the carry first, the output second."
        )
    for path_and_leaf, leaf in zip(
        jax.tree_util.tree_leaves_with_path(init), jax.tree.leaves(out), strict=True
    ):
        path, given = path_and_leaf
        if given.shape != leaf.shape:
            raise TypeError(
                f"smcscale: the loop's carry{jax.tree_util.keystr(path)} has shape {given.shape} "
                f"before the loop and {leaf.shape} after a row.\n"
                "  try: an initial carry of the final shape."
            )
        if not _holds(leaf.dtype, given.dtype):
            raise TypeError(
                f"smcscale: the loop's carry{jax.tree_util.keystr(path)} is {given.dtype} before the "
                f"loop and {leaf.dtype} after a row.\n  try: an initial carry of the final dtype."
            )
    return out


def _holds(dtype: Any, other: Any) -> bool:
    """Whether values of dtype `other` keep their meaning as `dtype`: floats not as integers."""
    order = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)

    def rank(d: Any) -> int:
        return next((i for i, kind in enumerate(order) if jnp.issubdtype(d, kind)), -1)

    return rank(other) <= rank(dtype) if min(rank(dtype), rank(other)) >= 0 else dtype == other
