"""Room for compiled programs in a process that makes many."""

import gc
from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")


def make_room() -> None:
    """Drop compiled programs before they fill the 65530 memory maps that Linux gives a process.

    XLA maps several regions for each; beyond the limit it crashes while it compiles.
    """
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
