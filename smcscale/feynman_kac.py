"""The type that everything lowers to: an initial law, a transition, a log potential.

A Feynman-Kac model moves ONE particle and scores it; the engine runs many. Write one by hand, or
give `ParticleFilter` a NumPyro program, which lowers to this.

    initial(key) -> state
    transition(key, previous, input) -> state | Weighted(state, log_increment)
    log_potential(previous, state, input) -> ()
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree


class Weighted(NamedTuple):
    """A state with a log-weight increment, returned by `initial` or `transition`.

    The increment may itself be random as long as its exponential is unbiased: importance ratios,
    look-ahead corrections, adaptive rejection sampling.

    Attributes:
        state: pytree of one particle.
        log_increment: `()`, nats, added to the log-weight before the log potential.
    """

    state: PyTree
    log_increment: Float[Array, ""]


class Advanced(NamedTuple):
    """A step of one particle made at once, for a model whose parts share work.

    Attributes:
        state: pytree of one particle.
        log_weight: `()`, nats: increment and log potential.
        cost: by name, `()`.
    """

    state: PyTree
    log_weight: Float[Array, ""]
    cost: dict


class Capabilities(eqx.Module):
    """What a model can do; asking for what is missing is refused by name.

    Attributes:
        inputs_at_start: `initial(key, input)` and the potential at the initial law see row 0, and
            the transitions start with row 1.
        differentiable: gradients may be taken through the transition.
        host: transition, potential and cost are Python functions that cannot be traced. They take
            all M particles of all runs at once: `transition(keys (M,), previous, input) -> states`
            or `Weighted(states, log_increment (M,))`, `log_potential(previous, states, input) ->
            (M,)`, `cost(previous, states, input) -> {name: (M,)}`, with leaves `(M, ...)`; the first
            two may be `async`. `initial` is still one particle's, and traced.
    """

    inputs_at_start: bool = eqx.field(static=True, default=False)
    differentiable: bool = eqx.field(static=True, default=True)
    host: bool = eqx.field(static=True, default=False)


class FeynmanKac(eqx.Module):
    """A model of one particle that moves through time and is scored.

    Args:
        initial: `(key) -> state`, the law before the first row; with
            `Capabilities(inputs_at_start=True)` `(key, input)`.
        transition: `(key, previous, input) -> state`, or `Weighted(state, log_increment)`.
        log_potential: `(previous, state, input) -> ()`, nats; `-inf` is a dead particle. At the
            initial law, where there is a row for it, `previous` is `state`.
        log_transition: `(previous, state, input) -> ()`, the density of `transition`; for guided
            proposals and smoothers.
        batched: `(key, previous, input) -> states`, all particles (leaves `(N, ...)`) and one key,
            in place of `transition`.
        heavy: names of state leaves (parts of their path, such as `"cache"`) that are moved in
            place, dead slots only, when the population is resampled.
        capabilities: see `Capabilities`.
        record: `state -> pytree`, what results keep of a state; all of it by default.
        cost: `(previous, state, input) -> {name: ()}`, what the step spent.
        num_steps: rows of every run, where the target depends on it; None leaves it to the run.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> walk = FeynmanKac(
        ...     initial=lambda key: jax.random.normal(key),
        ...     transition=lambda key, x, y: x + jax.random.normal(key),
        ...     log_potential=lambda previous, x, y: -0.5 * (y - x) ** 2,
        ... )

    Source: Del Moral (2004), Feynman-Kac Formulae; Chopin & Papaspiliopoulos (2020), chapter 5.
    """

    initial: Callable[..., Any]
    transition: Callable[..., Any]
    log_potential: Callable[..., Any]
    log_transition: Callable[..., Any] | None = None
    batched: Callable[..., Any] | None = None
    heavy: tuple[str, ...] | None = eqx.field(static=True, default=None)
    capabilities: Capabilities = Capabilities()
    record: Callable[[Any], Any] | None = None
    cost: Callable[..., dict] | None = None
    num_steps: int | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        initial: Callable[..., Any],
        transition: Callable[..., Any],
        log_potential: Callable[..., Any],
        *,
        log_transition: Callable[..., Any] | None = None,
        batched: Callable[..., Any] | None = None,
        heavy: tuple[str, ...] | str | None = None,
        capabilities: Capabilities | None = None,
        record: Callable[[Any], Any] | None = None,
        cost: Callable[..., dict] | None = None,
        num_steps: int | None = None,
    ):
        for name, value in (
            ("initial", initial),
            ("transition", transition),
            ("log_potential", log_potential),
        ):
            if not callable(value):
                raise TypeError(
                    f"smcscale: FeynmanKac's `{name}` must be a function, got "
                    f"{type(value).__name__}."
                )
        if batched is not None and capabilities is not None and capabilities.host:
            raise ValueError(
                "smcscale: a host model's `transition` takes all particles; it has no `batched`.\n"
                "  try: FeynmanKac(initial, transition, log_potential, capabilities=...)."
            )
        self.initial = initial
        self.transition = transition
        self.log_potential = log_potential
        self.log_transition = log_transition
        self.batched = batched
        self.heavy = (heavy,) if isinstance(heavy, str) else heavy
        self.capabilities = Capabilities() if capabilities is None else capabilities
        self.record = record
        self.cost = cost
        self.num_steps = num_steps


def weighted(out: Any) -> Weighted:
    """`out` of a transition as `Weighted`, with increment 0 where it had none."""
    return out if isinstance(out, Weighted) else Weighted(out, jax.numpy.zeros(()))
