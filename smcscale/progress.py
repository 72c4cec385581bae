"""A line that shows how far a run is: step, ESS, log evidence so far.

    with bar(total, enabled) as update:
        update(step, lambda: (ess, log_evidence))     # read only when the line is redrawn

In a terminal the line is rewritten in place, in a notebook it is one output that changes; when
output goes elsewhere, or `enabled` is False, `update` does nothing and reads nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

#: seconds between two redraws
_INTERVAL = 0.1
#: runs shorter than this show nothing
_PATIENCE = 0.5

#: `(step, read)`, where `read()` gives ess `(R,)` or `()` and log evidence of the same shape
Update = Callable[[int, Callable[[], tuple[Any, Any]]], None]


@contextmanager
def bar(total: int, enabled: bool) -> Iterator[Update]:
    """Show a progress line while the block runs.

    Args:
        total: number of steps.
        enabled: whether to show it; it never shows in non-interactive output.
    Yields:
        update: `(step, read)`: steps done, and a function that gives ESS and log evidence when
            the line is redrawn, at most ten times a second.
    """
    screen = _screen() if enabled else None
    if screen is None:
        yield _silent
        return
    line = _Line(total, screen)
    try:
        yield line.update
    finally:
        line.close()


class _Line:
    """One line on a screen, redrawn now and then."""

    def __init__(self, total: int, screen: "_Terminal | _Notebook"):
        self.total = total
        self.screen = screen
        self.started = time.monotonic()
        self.drawn = self.started + _PATIENCE - _INTERVAL
        self.shown = False

    def update(self, step: int, read: Callable[[], tuple[Any, Any]]) -> None:
        now = time.monotonic()
        last = step >= self.total and self.shown
        if now - self.drawn < _INTERVAL and not last:
            return
        ess, log_evidence = (np.asarray(value, np.float64) for value in read())
        # the slowest run's ESS, and the evidence of all runs
        note = f"ESS {ess.min():.0f}, log evidence {_pooled(log_evidence):.2f}"
        text = tqdm.format_meter(
            step, self.total, now - self.started, unit=" steps", postfix=note, ncols=100, ascii=True
        )
        self.screen.show(text)
        self.shown = True
        self.drawn = time.monotonic()

    def close(self) -> None:
        if self.shown:
            self.screen.close()


class _Terminal:
    """Rewrites the current line of standard error."""

    def show(self, text: str) -> None:
        sys.stderr.write("\r" + text)
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")
        sys.stderr.flush()


class _Notebook:
    """One output of the running cell, replaced at every redraw."""

    def __init__(self, display: Callable[..., Any]):
        self.display = display
        self.handle: Any = None

    def show(self, text: str) -> None:
        data = {"text/plain": text}
        if self.handle is None:
            self.handle = self.display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)

    def close(self) -> None:
        pass


def _screen() -> _Terminal | _Notebook | None:
    """Where a line may be shown, or None in non-interactive output."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        return _Notebook(sys.modules["IPython.display"].display)
    if sys.stderr.isatty():
        return _Terminal()
    return None


def _pooled(log_evidence: np.ndarray) -> float:
    return float(np.logaddexp.reduce(log_evidence.reshape(-1))) - float(np.log(log_evidence.size))


def _silent(step: int, read: Callable[[], tuple[Any, Any]]) -> None:
    """Show nothing."""
