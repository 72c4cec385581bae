"""One particle's step split in two: the random numbers it needs, and the rest.

A step is written for one particle with one key. Vmapping it with a key per particle costs 2-3
times the whole filter, and drawing inside the time loop costs as much again. So the step is traced
once and its equations are parted by what they depend on:

* the equations that depend on the key alone (`Split.noise`) are run for all particles at once, each
  `random_bits` drawing one `(N, ...)` array from the one key, and for many steps outside the loop;
* the rest (`Split.rest`) receives those arrays and is vmapped as usual.

Samplers that consume the key in a way that cannot be widened (rejection loops: Gamma, Poisson) get
a key per particle; `jax.custom_batching.custom_vmap` samplers get the one key as it is, so that a
network can decode all particles natively. This is the only module that reads jaxprs.

Matrix factorizations and solves of the rest are run one after the other (`_one_by_one`): on CPU
jaxlib hands each of them, of the size of a population, to one pool of threads and waits on a thread of that
pool, so as many at a time as there are threads wait forever (seen with jaxlib 0.10.2, two threads).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from smcscale import threefry

_CALLS = {"pjit", "jit", "closed_call", "core_call"}
_CALLBACKS = {
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
    "infeed",
    "outfeed",
}
_LINALG = {
    "cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg",
    "householder_product", "lu", "ormqr", "qr", "schur", "svd", "symmetric_product",
    "triangular_solve", "tridiagonal", "tridiagonal_solve",
}  # fmt: skip


class Split(NamedTuple):
    """A step function in two halves.

    Attributes:
        noise: `(key, num_particles) -> tuple of arrays`, the frontier; see `batched`.
        rest: `(frontier, *arguments) -> flat outputs`, for ONE particle.
        batched: per frontier entry, whether it has a leading particle axis.
        elements: frontier elements per particle, those of keys not counted.
        reads: per leaf of `arguments`, whether an output depends on it or is it.
        uses: per leaf of `arguments`, whether something is computed from it.
        aliases: per output, the index of the first output that is the same value.
        passed: per leaf of `arguments`, whether the output of the same index is that leaf itself.
        constant_bytes: bytes of concrete arrays that the step closed over.
    """

    noise: Callable[..., tuple]
    rest: Callable[..., list]
    batched: tuple[bool, ...]
    elements: int
    reads: tuple[bool, ...]
    uses: tuple[bool, ...]
    aliases: tuple[int, ...]
    passed: tuple[bool, ...]
    constant_bytes: int


def split_noise(
    step: Callable[..., list], key_dtype: Any, arguments: list, num_shared: int = 0
) -> Split:
    """Part `step(key, *arguments) -> list of arrays`, written for one particle, by the key.

    Args:
        step: flat function of one particle.
        key_dtype: dtype of the typed key it receives.
        arguments: abstract values (anything with `shape` and `dtype`) of one particle.
        num_shared: how many of the last arguments are the same for all particles.
    Raises:
        NotImplementedError: when the step contains a host callback, by its name.
    """
    abstract = [jax.ShapeDtypeStruct((), key_dtype)]
    abstract += [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in arguments]
    traced = jax.make_jaxpr(step)(*abstract)
    constants = [c for c in traced.consts if not isinstance(c, Tracer)]
    flat = jax.make_jaxpr(lambda *args: _inlined(traced.jaxpr, traced.consts, args))(*abstract)
    jaxpr = flat.jaxpr
    consts = dict(zip(jaxpr.constvars, flat.consts, strict=True))
    key_var, argument_vars = jaxpr.invars[0], jaxpr.invars[1:]

    noise_vars = {key_var}
    other_vars = set(argument_vars)
    noise_eqns, rest_eqns = [], []
    for eqn in jaxpr.eqns:
        _refuse_callback(eqn)
        inputs = [v for v in eqn.invars if isinstance(v, core.Var)]
        # a custom_vmap sampler batches itself: it must meet the engine's vmap, not be widened
        native = eqn.primitive.name == "custom_vmap_call"
        from_key = any(v in noise_vars for v in inputs)
        from_arguments = any(v in other_vars for v in inputs)
        if from_key and not from_arguments and not native:
            noise_vars.update(eqn.outvars)
            noise_eqns.append(eqn)
        else:
            # what depends on neither is a constant: it joins the rest, and the noise where read
            if from_key or from_arguments:
                other_vars.update(eqn.outvars)
            rest_eqns.append(eqn)

    needed = _needed([v for v in jaxpr.outvars if isinstance(v, core.Var)], rest_eqns)
    reads = tuple(v in needed for v in argument_vars)
    rest_eqns = [e for e in rest_eqns if any(v in needed for v in e.outvars)]
    consumed = {v for e in rest_eqns for v in e.invars if isinstance(v, core.Var)}
    uses = tuple(v in consumed for v in argument_vars)
    frontier = [v for v in needed if v in noise_vars]
    noise_needed = _needed(frontier, noise_eqns)
    constant_eqns = [
        e for e in jaxpr.eqns if not any(v in noise_vars or v in other_vars for v in e.outvars)
    ]
    constant_needed = _needed(list(noise_needed), constant_eqns)
    candidates = {id(e): noise_needed for e in noise_eqns}
    candidates |= {id(e): constant_needed for e in constant_eqns}
    noise_eqns = [e for e in jaxpr.eqns if any(v in candidates.get(id(e), ()) for v in e.outvars)]
    fixed = {v for e in jaxpr.eqns for v in e.outvars} - noise_vars - other_vars
    shortcuts = _logs_of_exponentials(rest_eqns, fixed.union(jaxpr.constvars))
    own = {key_var, *argument_vars[: len(argument_vars) - num_shared]}
    for eqn in jaxpr.eqns:
        if any(v in own for v in eqn.invars if isinstance(v, core.Var)):
            own.update(eqn.outvars)
    solves = _one_by_one(rest_eqns, own)
    native_only = _native_keys(frontier, rest_eqns, jaxpr.outvars)
    batched_vars = _batched(noise_eqns, key_var)
    batched = tuple(
        v in batched_vars or (_is_key(v.aval) and v not in native_only) for v in frontier
    )

    def noise(key: jax.Array, num_particles: int) -> tuple:
        env = dict(consts)
        env[key_var] = key
        wide: set = set()
        for eqn in noise_eqns:
            _evaluate_wide(eqn, env, wide, num_particles)
        out = []
        for var, is_batched in zip(frontier, batched, strict=True):
            value = env[var]
            if is_batched and var not in wide:
                value = _split_keys(value, num_particles)
            out.append(value)
        return tuple(out)

    def rest(values: tuple, *args: jax.Array) -> list:
        env = dict(consts)
        env.update(zip(frontier, values, strict=True))
        env.update(zip(argument_vars, args, strict=True))
        for eqn in rest_eqns:
            if id(eqn) in shortcuts:
                factor, exponent = (_read(env, v) for v in shortcuts[id(eqn)])
                _write(eqn, env, [jnp.log(factor) + exponent])
                continue
            inputs = [_read(env, v) for v in eqn.invars]
            if id(eqn) in solves:
                place, before = solves[id(eqn)]
                inputs[place] = _after(inputs[place], _read(env, before))
            _write(eqn, env, _bind(eqn, inputs))
        return [_read(env, v) for v in jaxpr.outvars]

    first: dict = {}
    aliases = tuple(
        first.setdefault(v, i) if isinstance(v, core.Var) else i
        for i, v in enumerate(jaxpr.outvars)
    )
    elements = sum(v.aval.size for v in frontier if not _is_key(v.aval))
    size = sum(getattr(c, "nbytes", 0) for c in constants)
    passed = tuple(a is b for a, b in zip(argument_vars, jaxpr.outvars, strict=False))
    return Split(noise, rest, batched, elements, reads, uses, aliases, passed, size)


def depends(function: Callable, argument: Any) -> bool:
    """Whether any output of `function(argument)` depends on `argument` (a pytree of abstract values)."""
    traced = jax.make_jaxpr(function)(argument)
    flat = jax.make_jaxpr(lambda *args: _inlined(traced.jaxpr, traced.consts, args))(
        *jax.tree.leaves(argument)
    )
    from_argument = set(flat.jaxpr.invars)
    for eqn in flat.jaxpr.eqns:
        if any(v in from_argument for v in eqn.invars if isinstance(v, core.Var)):
            from_argument.update(eqn.outvars)
    return any(v in from_argument for v in flat.jaxpr.outvars if isinstance(v, core.Var))


def _needed(roots: list, eqns: list) -> dict:
    """Variables that the roots depend on through `eqns`, roots first; a dict keeps the order."""
    needed = dict.fromkeys(roots)
    for eqn in reversed(eqns):
        if any(v in needed for v in eqn.outvars):
            needed.update(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
    return needed


def _is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _logs_of_exponentials(eqns: list, constants: set) -> dict[int, tuple]:
    """Equations `log(c * exp(x))`, c a constant, by id: `(c, x)`, to be run as `log(c) + x`.

    The density of a Normal whose scale is an exponential has this form, XLA leaves it as it is, and
    it would be a visible part of a stochastic volatility filter.
    """
    made = {v: eqn for eqn in eqns for v in eqn.outvars}

    def maker(var: Any, name: str) -> Any:
        eqn = made.get(var) if isinstance(var, core.Var) else None
        return eqn if eqn is not None and eqn.primitive.name == name else None

    found = {}
    for eqn in eqns:
        product = maker(eqn.invars[0], "mul") if eqn.primitive.name == "log" else None
        if product is None:
            continue
        for factor, scale in (product.invars, product.invars[::-1]):
            power = maker(scale, "exp")
            constant = isinstance(factor, core.Literal) or factor in constants
            if power is not None and constant and getattr(factor.aval, "shape", None) == ():
                found[id(eqn)] = (factor, power.invars[0])
    return found


def _one_by_one(eqns: list, own: set) -> dict[int, tuple]:
    """Factorizations and solves that must wait for the one before, by id: `(place, variable)`.

    The input at `place` is made to depend on `variable`. Only inputs among `own`, which differ between
    particles: one that they share would become as many as there are particles.
    """

    def inexact(v: Any) -> bool:
        return jnp.issubdtype(v.aval.dtype, jnp.inexact) and v.aval.size > 0

    found, before = {}, None
    for eqn in eqns:
        if not _solves(eqn):
            continue
        places = [
            place
            for place, v in enumerate(eqn.invars)
            if isinstance(v, core.Var) and v in own and inexact(v)
        ]
        if not places:
            continue
        if before is not None:
            found[id(eqn)] = (places[-1], before)
        before = next((v for v in eqn.outvars if inexact(v)), before)
    return found


def _solves(eqn: Any) -> bool:
    return eqn.primitive.name in _LINALG or any(map(_solves, _nested(eqn)))


def _after(value: Any, before: Any) -> Any:
    """`value`, once `before` is known: their sum with a zero that a compiler cannot see."""
    zero = jnp.real(before.reshape(-1)[0]) * 0
    return value + jnp.where(jnp.isfinite(zero), zero, 0).astype(value.dtype)


def _native_keys(frontier: list, eqns: list, outvars: list) -> set:
    """Keys that only `custom_vmap` samplers consume, so that they stay one for all particles."""
    keys = {v for v in frontier if _is_key(v.aval)}
    for eqn in eqns:
        if eqn.primitive.name != "custom_vmap_call":
            keys -= {v for v in eqn.invars if isinstance(v, core.Var)}
    return keys - {v for v in outvars if isinstance(v, core.Var)}


def _kind(eqn: Any, any_wide: bool) -> str:
    """How an equation of the noise half is run for all particles."""
    if any_wide:
        return "vmap"
    if eqn.primitive.name == "random_bits":
        return "widen"
    if all(_is_key(v.aval) for v in eqn.outvars):
        return "once"
    if any(_is_key(v.aval) for v in eqn.invars):
        return "keys"
    return "once"


def _batched(eqns: list, key_var: Any) -> set:
    wide: set = set()
    for eqn in eqns:
        if _kind(eqn, any(isinstance(v, core.Var) and v in wide for v in eqn.invars)) != "once":
            wide.update(eqn.outvars)
    return wide


def _evaluate_wide(eqn: Any, env: dict, wide: set, num_particles: int) -> None:
    values = [_read(env, v) for v in eqn.invars]
    is_wide = [isinstance(v, core.Var) and v in wide for v in eqn.invars]
    kind = _kind(eqn, any(is_wide))
    if kind == "once":
        _write(eqn, env, _bind(eqn, values))
        return
    if kind == "widen":
        shape = (num_particles, *eqn.params["shape"])
        width = eqn.params["bit_width"]
        if threefry.applies(values[0], width, shape):
            drawn = threefry.bits(values[0], shape)
        else:
            drawn = eqn.primitive.bind(*values, bit_width=width, shape=shape)
        _write(eqn, env, [drawn])
    else:
        if kind == "keys":
            is_wide = [_is_key(v.aval) for v in eqn.invars]
            values = [
                _split_keys(value, num_particles) if split else value
                for value, split in zip(values, is_wide, strict=True)
            ]
        axes = [0 if w else None for w in is_wide]
        _write(eqn, env, jax.vmap(lambda *v: _bind(eqn, list(v)), in_axes=axes)(*values))
    wide.update(eqn.outvars)


def _split_keys(keys: jax.Array, num_particles: int) -> jax.Array:
    """A key for each particle: `(...)` keys to `(N, ...)`."""
    flat = jax.vmap(lambda k: jax.random.split(k, num_particles))(keys.reshape(-1))
    return jnp.moveaxis(flat, 0, 1).reshape(num_particles, *keys.shape)


def _read(env: dict, var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else env[var]


def _write(eqn: Any, env: dict, values: list) -> None:
    env.update(zip(eqn.outvars, values, strict=True))


def _bind(eqn: Any, values: list) -> list:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _inlined(jaxpr: Any, consts: Any, args: Any) -> list:
    """Evaluate with nested `jit` calls opened, so that noise inside them can be parted."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [_read(env, v) for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            _write(eqn, env, _inlined(inner.jaxpr, inner.consts, values))
        else:
            _write(eqn, env, _bind(eqn, values))
    return [_read(env, v) for v in jaxpr.outvars]


def _refuse_callback(eqn: Any) -> None:
    if eqn.primitive.name in _CALLBACKS:
        raise NotImplementedError(
            f"smcscale: the program contains a host callback ({eqn.primitive.name}), which a "
            "compiled particle filter cannot run.\n"
            "  try: remove it (jax.debug.print, jax.debug.callback, io_callback, pure_callback)."
        )
    for nested in _nested(eqn):
        _refuse_callback(nested)


def _nested(eqn: Any) -> list:
    """Equations of the functions that an equation calls."""
    inner = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    )
    return [nested for i in inner for nested in getattr(getattr(i, "jaxpr", i), "eqns", ())]
