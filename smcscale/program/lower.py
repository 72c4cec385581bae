"""A NumPyro program (and its guide or proposal) as a `FeynmanKac` model of one particle.

One body gives everything: it is run to simulate (latents drawn), to score a transition (latents
given, their densities summed) and to weigh (latents given, observed densities summed). XLA merges
what the three have in common.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from smcscale.feynman_kac import FeynmanKac, Weighted
from smcscale.noise import depends
from smcscale.program import scan
from smcscale.program.scan import Row, Site


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


class Lowered(NamedTuple):
    """A program bound to its arguments.

    Attributes:
        model: the Feynman-Kac model.
        inputs: rows, leaves `(T, ...)`.
        num_steps: T.
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
        return head(key, {} if guide is None else _latents(guide_head(key, {})))

    dummy = jax.random.key(0)
    visited = opening(dummy)
    loop = visited.loop
    latents = list(_latents(visited))
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
        previous = ProgramState(_latents(start), start.loop.init, None, {})
        given: dict = {}
        if guide is not None:
            proposed = guide_head(key, {}).loop.init
            given = _latents(
                guide_body(key, ProgramState(previous.before, None, proposed, {}), first)
            )
        return start, body(key, previous, first, given)

    def probe(key: Any) -> tuple:
        start, seen = first_row(key)
        kinds.update({n: s.kind for n, s in seen.sites.items()})
        return start.loop.init, seen.carry, seen.output, _latents(start), _kept(seen.sites)

    found = jax.eval_shape(probe, dummy)
    init_type, carry_type, output_type, before_type, sites_type = found
    row_latents = [n for n, kind in kinds.items() if kind == "latent"]
    if guide is not None:
        _align(guide_head, guide_body, opening, first_row, latents, row_latents, first, dummy)
    carry_type = _carry_type(init_type, carry_type)

    def as_carry(carry: Any) -> Any:
        return jax.tree.map(lambda v, t: jnp.asarray(v).astype(t.dtype), carry, carry_type)

    def blank_sites() -> dict:
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), sites_type)

    # ---- after the loop
    outputs_type = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct((num_steps, *t.shape), t.dtype), output_type
    )
    tail = _tail(function, args, kwargs, before_type, carry_type, outputs_type, set(kinds))

    def initial(key: Any) -> Weighted:
        increment = jnp.zeros(())
        guide_carry = None
        given: dict = {}
        if guide is not None:
            proposed = guide_head(jax.random.fold_in(key, 0), {})  # site keys count from 1
            guide_carry = _arrays(proposed.loop.init)
            given = _latents(proposed)
            increment -= _total(proposed.sites, "latent")
        start = head(key, given)
        sites = start.sites
        increment += _total({n: sites[n] for n in given}, "latent") + _total(sites, "observed")
        before = {n: sites[n].value for n in latents}
        state = ProgramState(before, as_carry(start.loop.init), guide_carry, blank_sites())
        return Weighted(state, increment)

    def transition(key: Any, previous: ProgramState, at: Row) -> ProgramState | Weighted:
        if guide is None and proposal is None:
            seen = body(key, previous, at, {})
            return ProgramState(previous.before, as_carry(seen.carry), None, _kept(seen.sites))
        guide_carry = None
        if guide is not None:
            proposed = guide_body(key, previous, at)
            guide_carry = _arrays(proposed.carry)
            drawn = _latents(proposed)
            log_q = _total(proposed.sites, "latent")
        else:
            drawn = proposal.sample(key, previous.carry, at.row)
            _same_sites("the proposal", drawn, row_latents)
            log_q = proposal.log_prob(previous.carry, drawn, at.row)
        seen = body(None, previous, at, drawn)
        state = ProgramState(previous.before, as_carry(seen.carry), guide_carry, _kept(seen.sites))
        return Weighted(state, _total(seen.sites, "latent") - log_q)

    def missing() -> dict:
        def look(at: Row) -> dict:
            start = opening(dummy)
            carry = as_carry(start.loop.init)
            seen = scan.row(function, args, kwargs, dummy, _latents(start), carry, at, drawn_row)
            found = {}
            for name, site in seen.sites.items():
                dtype = getattr(site.value, "dtype", jnp.int32)
                if site.kind == "observed" and jnp.issubdtype(dtype, jnp.inexact):
                    absent = jnp.isnan(site.value) & scan.scored_elements(site.fn)
                    events = tuple(range(-scan.joint_dims(site.fn), 0))
                    part = jnp.any(absent, axis=events) & ~jnp.all(absent, axis=events)
                    found[name] = (jnp.any(absent), jnp.any(part))
            return found

        drawn_row = _latents(first_row(dummy)[1])
        return jax.lax.map(look, inputs)

    def forecast(key: Any, state: ProgramState, at: Row) -> tuple[ProgramState, dict]:
        seen = scan.row(
            function, args, kwargs, key, state.before, state.carry, at, {}, forecast=True
        )
        drawn = {n: _arrays(s.value) for n, s in seen.sites.items() if s.kind != "observed"}
        kept = {n: drawn[n] for n in state.sites}
        return ProgramState(state.before, as_carry(seen.carry), state.guide, kept), drawn

    def replay(previous: ProgramState, state: ProgramState, at: Row) -> scan.Visited:
        return body(None, previous, at, {n: state.sites[n] for n in row_latents})

    def log_potential(previous: ProgramState, state: ProgramState, at: Row) -> Array:
        total = _total(replay(previous, state, at).sites, "observed")
        if tail is not None and tail.observed:
            total += jax.lax.cond(
                at.last, tail.log_potential, lambda _: jnp.zeros_like(total), state
            )
        return total

    def log_transition(previous: ProgramState, state: ProgramState, at: Row) -> Array:
        return _total(replay(previous, state, at).sites, "latent")

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
        return _kept(start.sites), {} if tail is None else tail.deterministics(state)

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


class _Tail(NamedTuple):
    observed: bool
    log_potential: Callable[[ProgramState], Array]
    deterministics: Callable[[ProgramState], dict]


def _tail(
    function: Callable,
    args: tuple,
    kwargs: dict,
    before_type: dict,
    carry_type: Any,
    outputs_type: Any,
    taken: set[str],
) -> _Tail | None:
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
            raise ValueError(scan.two_sites(name))
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

    return _Tail(
        "observed" in names.values(),
        lambda state: _total(sites_of(state), "observed"),
        lambda state: {n: s.value for n, s in sites_of(state).items() if s.kind == "deterministic"},
    )


def _refuse_random_rows(rows: Callable, function: Callable) -> None:
    if depends(rows, jax.eval_shape(lambda: jax.random.key(0))):
        name = getattr(function, "__name__", type(function).__name__)
        raise NotImplementedError(
            f'smcscale: the rows that program "{name}" scans over depend on latent sites.\n'
            "  try: draw inside the loop's body, or read the latent by its index from the closure."
        )


def _align(
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
        names["before"] = list(_latents(start))
        before = _latents(opening(key))
        seen = guide_body(key, ProgramState(before, None, start.loop.init, {}), first)
        names["row"] = list(_latents(seen))

    jax.eval_shape(names_of, key)
    extra = [n for n in names["before"] if n not in latents]
    if extra:
        raise ValueError(
            f"smcscale: the guide draws {_quoted(extra)} before the loop, which the program does "
            f"not (it has {_quoted(latents) or 'none'}).\n  try: the same site names in both."
        )
    _same_sites("the guide", names["row"], row_latents)

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


def _same_sites(who: str, found: Any, wanted: list[str]) -> None:
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted]
    if missing or extra:
        what = [f"lacks {_quoted(missing)}"] if missing else []
        what += [f"has {_quoted(extra)}, which the program lacks"] if extra else []
        raise ValueError(
            f"smcscale: {who} {' and '.join(what)} inside the loop.\n"
            f"  try: the latent sites of the program's body, {_quoted(wanted)}."
        )


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{n}"' for n in names)


def _total(sites: dict[str, Site], kind: str) -> Array:
    """Summed log density of the sites of a kind."""
    total = jnp.zeros(())
    for site in sites.values():
        if site.kind == kind and site.log_prob is not None:
            total += site.log_prob()
    return total


def _latents(visited: scan.Visited) -> dict[str, Any]:
    """Values of the latent sites of a visit."""
    return {n: s.value for n, s in visited.sites.items() if s.kind == "latent"}


def _kept(sites: dict[str, Site]) -> dict:
    """Values that results show: latents and deterministics."""
    return {n: _arrays(s.value) for n, s in sites.items() if s.kind != "observed"}


def _arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


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
