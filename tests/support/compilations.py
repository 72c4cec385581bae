"""How often XLA compiles, counted through JAX's own monitoring."""

from collections.abc import Callable

import jax

_COMPILED = []


def _listen(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations(action: Callable[[], object]) -> int:
    """How many programs are compiled by an action."""
    before = len(_COMPILED)
    action()
    return len(_COMPILED) - before
