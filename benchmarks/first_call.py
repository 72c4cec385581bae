"""Where do the seconds of a first call go?

    python benchmarks/first_call.py [--processes 5]

The program and size of `filter.py`'s first call (N = 10,000, T = 1,000) in fresh processes: seconds of
the whole first `SMC.run`, of JAX's tracing, lowering and compiling in it (JAX's own monitoring), and
of the largest compilations. Writes `benchmarks/results/first_call.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from provenance import made_with

HERE = Path(__file__).resolve().parent
PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


def once() -> dict:
    """One first call in this process."""
    import jax

    sys.path[:0] = [str(HERE), str(HERE / "contenders")]
    import filter as bench
    import with_smcscale

    found: dict = dict.fromkeys(PARTS.values(), 0.0) | {"compilations": 0}
    largest: dict[str, float] = {}

    def listen(event: str, seconds: float, **told) -> None:
        if event in PARTS:
            found[PARTS[event]] += seconds
        if PARTS.get(event) == "compiling":
            found["compilations"] += 1
            name = str(told.get("fun_name"))
            largest[name] = largest.get(name, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    size, steps = bench.FIRST_CALL
    run = with_smcscale.prepare(bench.simulate(steps), size)
    started = time.perf_counter()
    run(0)
    found["first call"] = time.perf_counter() - started
    started = time.perf_counter()
    run(1)
    found["second call"] = time.perf_counter() - started
    top = sorted(largest.items(), key=lambda item: -item[1])[:5]
    return found | {f"compiling {name}": seconds for name, seconds in top}


def main() -> None:
    """Fresh processes, medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="one call in this process, as JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once()))
        return
    command = [sys.executable, __file__, "--once"]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(options.processes)
    ]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in names}
    result = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/first_call.py",
        **made_with("jax", "smcscale"),
        "processes": options.processes,
        "median seconds": medians,
    }
    target = HERE / "results" / "first_call.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
