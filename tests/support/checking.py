"""The run-time check of annotations that tests run under: beartype, with our protocols allowed."""

import typing

import beartype


def checked(function):
    """`function`, its arguments and result checked; the typechecker of jaxtyping's import hook."""
    for hint in getattr(function, "__annotations__", {}).values():
        _allow(hint)
    return beartype.beartype(function)


def _allow(hint) -> None:
    """Lets `isinstance` look for the methods of the protocols in a hint (`Resampling | None`)."""
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for part in typing.get_args(hint):
        if not isinstance(part, list | str | int):
            _allow(part)
