"""How a program says what it costs."""

from typing import Any

from jax.typing import ArrayLike
from numpyro.primitives import apply_stack


def spend(**amounts: ArrayLike) -> None:
    """Count what this step of a program cost; a no-op outside an smcscale run.

    Args:
        **amounts: scalars of one particle by name, for example `tokens=12`; the same name may be
            counted several times in a step.
    """
    # NumPyro's own handlers ignore a message type that they do not know
    message: dict[str, Any] = {
        "type": "spend",
        "fn": lambda: None,
        "args": (),
        "kwargs": {},
        "value": amounts,
    }
    apply_stack(message)
