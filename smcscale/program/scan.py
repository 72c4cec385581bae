"""Run a NumPyro program up to its time loop, one row inside it, or after it, and record the sites.

`numpyro.contrib.control_flow.scan` sends a `control_flow` message through the handler stack. `Visit`
stands outermost, takes that message and calls the loop's body once, in place: the user's own
handlers (`condition`, `mask`, `scope`, `reparam`, plates) are still on the stack and act on the
body's sites as they act on any other. What a handler fixes for the whole path, such as
`condition(data={"x": (T, ...)})`, is sliced to the row. This is the one module that edits messages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger, plate

from smcscale import ledger
from smcscale.program.missing import is_auxiliary, mask_missing
from smcscale.program.refusals import nested_latent, no_loop, two_sites, whole_path

_PATHS = tuple(
    getattr(dist, name)
    for name in ("GaussianRandomWalk", "EulerMaruyama", "GaussianStateSpace")
    if hasattr(dist, name)
)


class Site(NamedTuple):
    """One site of a program as it was met.

    Attributes:
        kind: "latent" (drawn or given), "observed" (a potential) or "deterministic".
        value: the site's value.
        log_prob: `() -> ()`, its log density, evaluated on demand.
        fn: its distribution, None for a deterministic site.
        shape: the shape that its distribution gives a value.
    """

    kind: str
    value: Any
    log_prob: Callable[[], jax.Array] | None
    fn: Any
    shape: tuple[int, ...] = ()


class Loop(NamedTuple):
    """The time loop of a program: body, initial carry, rows, number of rows."""

    body: Callable
    init: Any
    xs: Any
    length: int


class Row(NamedTuple):
    """What one step of a program is given.

    Attributes:
        time: `()` int32, 0-based row.
        row: the row of the scanned inputs, None without any.
        guide: the row of the guide's scanned inputs.
        last: `()` bool, whether this is the last row (sites after the loop are scored then).
    """

    time: Any
    row: Any
    guide: Any
    last: Any


class Visited(NamedTuple):
    """What a visit saw: sites by name, the loop, the carry after the row, what was spent."""

    sites: dict[str, Site]
    loop: Loop
    carry: Any
    output: Any
    costs: dict


class _LoopReached(BaseException):
    """Leaves a program at its loop; not an `Exception`, so that programs do not swallow it."""


def before(function: Callable, args: tuple, kwargs: dict, key: Any, given: dict) -> Visited:
    """Run a program up to its loop.

    Args:
        function: NumPyro program.
        args: its arguments.
        kwargs: its keyword arguments.
        key: random key for the sites that are not given.
        given: values of latent sites by name.
    Raises:
        ValueError, NotImplementedError: what cannot be run is refused by site name.
    """
    visit = Visit(key, given, None, None)
    return _run(visit, function, args, kwargs)


def row(
    function: Callable,
    args: tuple,
    kwargs: dict,
    key: Any,
    static: dict,
    carry: Any,
    at: Row,
    given: dict,
    *,
    nan_is_missing: bool = False,
    forecast: bool = False,
) -> Visited:
    """Run one row of a program's loop: `static` fixes the sites before it, `given` those inside.

    Sites of the result are those of the row only. With `forecast`, observed sites are drawn too.
    """
    visit = Visit(key, static, carry, at, given, nan_is_missing, forecast)
    return _run(visit, function, args, kwargs)


def after(function: Callable, args: tuple, kwargs: dict, static: dict, carry: Any, ys: Any) -> dict:
    """Sites after a program's loop, by name, given its final carry; `ys` are its stacked outputs."""
    visit = Visit(None, static, carry, None, outputs=ys, stop=False)
    with _plates_admit_loops(), visit:
        function(*args, **kwargs)
    if visit.loop is None:
        raise ValueError(no_loop(function, visit.sites))
    return visit.sites


class Visit(Messenger):
    """The outermost handler: draws or fills latent sites, takes over the loop, records sites."""

    def __init__(
        self,
        key: Any,
        static: dict,
        carry: Any,
        at: Row | None,
        given: dict | None = None,
        nan_is_missing: bool = False,
        forecast: bool = False,
        outputs: Any = None,
        stop: bool = True,
    ):
        super().__init__(None)
        self.key = key
        self.given = static
        self.in_row = given
        self.carry = carry
        self.at = at
        self.nan_is_missing = nan_is_missing
        self.forecast = forecast
        self.outputs = outputs
        self.stop = stop
        self.sites: dict[str, Site] = {}
        self.names: set[str] = set()
        self.costs: dict = {}
        self.loop: Loop | None = None
        self.inside = False
        self.nested = 0
        self.count = 0
        self.visited: Visited | None = None

    def process_message(self, msg: Any) -> None:
        kind = msg["type"]
        if kind == "sample":
            self._sample(msg)
        elif kind == "control_flow":
            self._control_flow(msg)
        elif kind == "plate":
            size, subsample = msg["args"]
            if subsample is not None and subsample != size:
                raise NotImplementedError(
                    f'smcscale: plate "{msg["name"]}" subsamples {subsample} of {size}, which makes '
                    "the weights random.\n  try: a plate without subsample_size."
                )
        elif kind == "prng_key" and msg["kwargs"].get("rng_key") is None:
            raise NotImplementedError(
                "smcscale: the program calls numpyro.prng_key(), so its sites are not all of its "
                "randomness and it has no density.\n  try: numpyro.sample."
            )
        elif kind == "spend" and (self.inside or self.loop is None):
            self.costs = ledger.add(self.costs, msg["value"])

    def postprocess_message(self, msg: Any) -> None:
        kind = msg["type"]
        if kind == "deterministic":
            self._record(msg["name"], Site("deterministic", msg["value"], None, None))
        elif kind == "sample":
            latent = msg.get("_latent", False)
            fn, value, scale = msg["fn"], msg["value"], msg["scale"]
            if "_with_nan" in msg:
                msg["value"] = msg["_with_nan"]  # the program itself never computes with a filler

            def log_prob() -> jax.Array:
                total = jnp.sum(fn.log_prob(value))
                return total if scale is None else total * scale

            kind = "latent" if latent else "observed"
            shape = (*msg["kwargs"].get("sample_shape", ()), *fn.shape())
            self._record(msg["name"], Site(kind, value, log_prob, fn, shape))

    def _record(self, name: str, site: Site) -> None:
        if name in self.names:
            raise ValueError(two_sites(name))
        self.names.add(name)
        self.sites[name] = site

    def _next_key(self) -> Any:
        self.count += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.count)

    def _sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        key = self._next_key()
        if isinstance(fn, _PATHS) and msg["value"] is None:
            raise NotImplementedError(whole_path(name, fn))
        if self.nested:
            # a scan inside the body: NumPyro has run it, its sites come by stacked
            if not msg["is_observed"]:
                raise NotImplementedError(nested_latent(name))
            return
        if msg["value"] is not None and msg.get("_created_empty") and self.inside:
            # fixed by the user's condition or substitute, for the whole path
            assert self.at is not None and self.loop is not None
            msg["value"] = _at_row(msg, self.at.time, self.loop.length)
        if msg["value"] is not None:
            if self.inside and self.forecast and not is_auxiliary(msg):
                msg["value"], msg["_latent"] = self._draw(msg, key), True
            elif self.inside and self.nan_is_missing and not is_auxiliary(msg):
                mask_missing(msg)
            return
        given = self.in_row if self.inside else self.given
        if self.loop is not None and not self.inside:
            raise NotImplementedError(
                f'smcscale: site "{name}" is latent and comes after the loop.\n'
                "  try: draw it inside the loop's body, or before the loop."
            )
        msg["_latent"] = True
        if given is not None and name in given:
            msg["value"] = given[name]
        else:
            msg["value"] = self._draw(msg, key)

    def _draw(self, msg: Any, key: Any) -> Any:
        name, fn = msg["name"], msg["fn"]
        if key is None:
            raise ValueError(
                f'smcscale: site "{name}" has no value and there is no key to draw it.'
            )
        try:
            return fn(rng_key=key, sample_shape=msg["kwargs"].get("sample_shape", ()))
        except NotImplementedError as error:
            raise NotImplementedError(
                f'smcscale: latent site "{name}" ({type(fn).__name__}) has no sampler, so particles '
                "cannot be drawn from it.\n  try: a proper distribution, or a guide for this site."
            ) from error

    def _control_flow(self, msg: Any) -> None:
        body, init, xs, length, reverse = msg["args"]
        if self.inside:
            # deterministic inner scans are NumPyro's own; their latents are refused when they come
            self.nested += 1
            msg["kwargs"]["rng_key"] = jax.random.key(0)
            return
        if self.loop is not None:
            raise NotImplementedError(
                "smcscale: the program has two scans over time.\n"
                "  try: one scan whose carry holds both states."
            )
        if reverse:
            raise NotImplementedError(
                "smcscale: the program scans with reverse=True; particles move forward in time.\n"
                "  try: reverse the inputs."
            )
        if msg["kwargs"].get("history", 1) != 1:
            raise NotImplementedError(
                f"smcscale: scan(history={msg['kwargs']['history']}) is not supported.\n"
                "  try: history=1, with older states in the carry."
            )
        self.loop = Loop(body, init, xs, _num_rows(xs, length))
        if not self.stop:
            msg["value"] = ((self.loop.length, None, self.carry), (PytreeTrace({}), self.outputs))
            self.sites = {}
            return
        if self.at is None:
            self.visited = Visited(self.sites, self.loop, init, None, self.costs)
            raise _LoopReached
        self.sites, self.costs, self.inside = {}, {}, True
        with _Guard(self):
            out = body(self.carry, self.at.row)
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise TypeError(
                f"smcscale: the loop's body must return (carry, output), got {type(out).__name__}.\n"
                "  try: return carry, None."
            )
        carry, output = out
        self.visited = Visited(self.sites, self.loop, carry, output, self.costs)
        raise _LoopReached


class _Guard(Messenger):
    """The innermost handler of a row: marks sites created without a value, slices `do`."""

    def __init__(self, visit: Visit):
        super().__init__(None)
        self.visit = visit

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            msg["_created_empty"] = msg["value"] is None

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            return
        if msg["type"] == "sample" and msg.get("_intervener_id") and msg["name"].endswith("__CF"):
            loop, at = self.visit.loop, self.visit.at
            assert loop is not None and at is not None
            msg["value"] = _at_row(msg, at.time, loop.length)


def _run(visit: Visit, function: Callable, args: tuple, kwargs: dict) -> Visited:
    try:
        with _plates_admit_loops(), visit:
            function(*args, **kwargs)
    except _LoopReached:
        assert visit.visited is not None
        return visit.visited
    raise ValueError(no_loop(function, visit.sites))


def _num_rows(xs: Any, length: Any) -> int:
    """T of a loop, checked before anything is traced over it."""
    leaves = jax.tree.leaves(xs)
    if not all(jnp.ndim(leaf) for leaf in leaves):
        raise ValueError(
            "smcscale: the program scans over a number, which has no rows.\n"
            "  try: arrays (T, ...); constants from the closure."
        )
    found = {int(jnp.shape(leaf)[0]) for leaf in leaves}
    if length is not None:
        found.add(int(length))
    if len(found) > 1:
        raise ValueError(
            f"smcscale: the program scans over leaves with different numbers of rows or another "
            f"length: {sorted(found)}.\n  try: leaves (T, ...), length=None."
        )
    if not found or not min(found):
        raise ValueError(
            "smcscale: the program scans over no rows and no length.\n"
            "  try: rows (T, ...) with T at least 1, or scan(..., None, length=T)."
        )
    return found.pop()


def _at_row(msg: Any, time: Any, length: int) -> Any:
    """The row of a value fixed for the whole path; a value of one row serves all rows."""
    value, fn, sample_shape = msg["value"], msg["fn"], msg["kwargs"].get("sample_shape", ())
    if isinstance(value, jax.Array) or jnp.isscalar(value) or hasattr(value, "__array__"):
        like: Any = jax.ShapeDtypeStruct((*sample_shape, *fn.shape()), jnp.result_type(value))
    else:
        like = jax.eval_shape(lambda: fn(rng_key=jax.random.key(0), sample_shape=sample_shape))
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]
    wanted = [leaf.shape for leaf in jax.tree.leaves(like)]
    if [len(s) for s in found] == [len(s) for s in wanted]:
        return value
    if [s[:1] for s in found] == [(length,)] * len(wanted):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[time], value)
    raise ValueError(
        f'smcscale: the value fixed for site "{msg["name"]}" has shape '
        f"{', '.join(map(str, found))}; the loop has {length} rows of shape "
        f"{', '.join(map(str, wanted))}.\n"
        f"  try: one value for each row, ({length}, ...)."
    )


@contextmanager
def _plates_admit_loops() -> Iterator[None]:
    """NumPyro refuses a scan under a plate before outer handlers see it; here it is one joint state."""
    original = plate.process_message

    def process_message(self: Any, msg: Any) -> None:
        if msg["type"] not in ("control_flow", "spend"):
            original(self, msg)

    plate.process_message = process_message  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        plate.process_message = original
