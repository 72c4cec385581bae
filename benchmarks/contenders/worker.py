"""Runs one contender in a process of its own: a line of JSON in, a line of JSON out.

    python worker.py CONTENDER

A contender is a module beside this file with `prepare(y, num_particles) -> run(seed) -> log evidence`
and `VERSIONS`; `run` returns when the numbers exist. Requests:

    {"data": "y.npy", "num_steps": 1000, "num_particles": 10000, "seed": 0}

Answers hold `seconds` (wall clock of `run`), `cpu_seconds` (of all its threads), `log_evidence`,
and, at the first request of a size, `prepare_seconds` (what `prepare` took; the first `run` then
includes compilation).
"""

import importlib
import json
import sys
import time


def main() -> None:
    """Answer requests until standard input ends."""
    started = time.perf_counter()
    contender = importlib.import_module(sys.argv[1])
    import numpy as np

    ready = {"versions": contender.VERSIONS, "import_seconds": time.perf_counter() - started}
    print(json.dumps(ready), flush=True)
    prepared = {}
    for line in sys.stdin:
        request = json.loads(line)
        size = (request["num_particles"], request["num_steps"])
        answer = {}
        if size not in prepared:
            y = np.load(request["data"])[: request["num_steps"]]
            started = time.perf_counter()
            prepared[size] = contender.prepare(y, request["num_particles"])
            answer["prepare_seconds"] = time.perf_counter() - started
        started, worked = time.perf_counter(), time.process_time()
        log_evidence = prepared[size](request["seed"])
        answer |= {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - worked,
            "log_evidence": float(log_evidence),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
