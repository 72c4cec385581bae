"""Where and with what a result file was made."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def machine() -> dict:
    """Processor, cores and system, and JAX's device if that is another; no name of the machine."""
    import jax  # here, so that importing this costs a fresh process nothing

    model, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": model, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    if jax.default_backend() != "cpu":
        found["device"] = jax.devices()[0].device_kind
    return found


def versions(*packages: str) -> dict:
    """Of Python and of packages."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def made_with(*packages: str) -> dict:
    """`date`, `machine` and `versions` of a result file."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(*packages),
    }
