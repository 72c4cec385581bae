"""How fast is a bootstrap filter, against hand-written JAX and against other libraries?

    python benchmarks/filter.py [--install-peers] [--sizes 1000 10000] [--repeats 7] [--quick]

Stochastic volatility (the program of the README, other parameters), systematic resampling when the
ESS falls below half, float32 in JAX (float64 in NumPy); every contender keeps, per step, log evidence, ESS, mean and
variance, and the last particles. Each runs in a process of its own on the same data; one repeat asks
each in turn, the other processes idle, and times the second of two runs. The first run of a size, which compiles, is apart: a fresh
process, five times. Writes `benchmarks/results/filter.json` and prints the table.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from provenance import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "results" / "filter.json"
#: rows of the data by number of particles; fewer at 1e6, where a peer needs 0.1 s a step
NUM_STEPS = {1_000: 1000, 10_000: 1000, 100_000: 1000, 1_000_000: 100}
FIRST_CALL = (10_000, 1000)
#: contender -> the environment it runs in ("" is this one) and what is installed there
CONTENDERS = {
    "with_smcscale": ("", ()),
    "written_out": ("", ()),
    "handwritten": ("", ()),
    "with_particles": (".venv-particles", ("particles==0.4",)),
    "with_cuthbert": (".venv-cuthbert", ("cuthbert==0.1.1",)),
}
LABELS = {
    "with_smcscale": "smcscale",
    "written_out": "hand-written JAX, generator written out",
    "handwritten": "hand-written JAX, `jax.random.normal`",
    "with_particles": "the library particles",
    "with_cuthbert": "the library cuthbert",
}
PEERS = ("with_particles", "with_cuthbert")


def simulate(num_steps: int, seed: int = 0) -> np.ndarray:
    """Data `(T,)` float32, drawn from the model."""
    rng = np.random.default_rng(seed)
    x, rows = -1.0 + 0.8 * rng.standard_normal(), []
    for _ in range(num_steps):
        x = -1.0 + 0.95 * (x + 1.0) + 0.25 * rng.standard_normal()
        rows.append(np.exp(x / 2) * rng.standard_normal())
    return np.asarray(rows, np.float32)


def interpreter(contender: str) -> Path:
    """The Python that runs a contender; peers may live elsewhere: SMCSCALE_PEERS names a folder."""
    folder = CONTENDERS[contender][0]
    if not folder:
        return Path(sys.executable)
    return Path(os.environ.get("SMCSCALE_PEERS", ROOT)) / folder / "bin" / "python"


def install_peers() -> None:
    """An environment for each peer, since their pins clash with ours or with each other."""
    for contender in PEERS:
        python = interpreter(contender)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
            packages = CONTENDERS[contender][1]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)


class Worker:
    """A contender in its process; `ask` runs it once."""

    def __init__(self, contender: str, data: Path):
        self.data = str(data)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            [interpreter(contender), HERE / "contenders" / "worker.py", contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=tempfile.gettempdir(),  # not the root: its folders would shadow packages
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        self.ready = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.process.args} ended:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def ask(self, num_particles: int, num_steps: int, seed: int) -> dict:
        request = {
            "data": self.data,
            "num_particles": num_particles,
            "num_steps": num_steps,
            "seed": seed,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def spread(values: list[float]) -> dict:
    """Median, quartiles and extremes."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "median": float(middle),
        "quartiles": [float(low), float(high)],
        "range": [min(values), max(values)],
        "repeats": len(values),
    }


def first_calls(contenders: list[str], data: Path, processes: int) -> dict:
    """Seconds of the first run at `FIRST_CALL` in fresh processes, imports apart."""
    found = {name: {"first": [], "imports": []} for name in contenders}
    for _ in range(processes):
        for name in contenders:
            worker = Worker(name, data)
            answer = worker.ask(*FIRST_CALL, seed=0)
            worker.close()
            found[name]["first"].append(answer["prepare_seconds"] + answer["seconds"])
            found[name]["imports"].append(worker.ready["import_seconds"])
    return {name: {k: spread(v) for k, v in times.items()} for name, times in found.items()}


def measure(workers: dict[str, Worker], sizes: list[int], repeats: int) -> list[dict]:
    """One row per size: seconds and log evidence of every contender, interleaved."""
    rows = []
    for size in sizes:
        steps = NUM_STEPS[size]
        seconds = {name: [] for name in workers}
        cpu = {name: [] for name in workers}
        evidence = {name: [] for name in workers}
        for repeat in range(-1, repeats):  # the first, which compiles, is not counted
            for name, worker in workers.items():
                if repeat >= 0:  # its processor and pages have slept while the others ran
                    worker.ask(size, steps, seed=0)
                answer = worker.ask(size, steps, seed=repeat + 1)
                if repeat >= 0:
                    seconds[name].append(answer["seconds"])
                    cpu[name].append(answer["cpu_seconds"])
                    evidence[name].append(answer["log_evidence"])
        row = {
            "num_particles": size,
            "num_steps": steps,
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "cpu_seconds": {name: spread(values) for name, values in cpu.items()},
            "ratio": {},
            "log_evidence": {
                name: {"mean": statistics.fmean(v), "sd": float(np.std(v, ddof=1))}
                for name, v in evidence.items()
            },
        }
        ours = seconds.get("with_smcscale")
        if ours:  # of the same repeat, so that a slow moment of the machine cancels
            for name, theirs in seconds.items():
                ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
                row["ratio"][name] = spread(ratios)
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """Print one size."""
    print(f"\nN = {row['num_particles']:,}, T = {row['num_steps']:,}")
    for name, times in row["seconds"].items():
        ratio = row["ratio"].get(name)
        text = f"{ratio['median']:6.2f} x ours" if ratio else ""
        low, high = times["quartiles"]
        print(
            f"  {LABELS[name]:42s} {times['median'] * 1e3:9.1f} ms  ({low * 1e3:.1f} to "
            f"{high * 1e3:.1f})  {text}   cpu {row['cpu_seconds'][name]['range'][0] * 1e3:.1f} ms at "
            f"best   log Z {row['log_evidence'][name]['mean']:.2f}",
            flush=True,
        )


def table(rows: list[dict], names: list[str]) -> dict:
    """Ratios for the README: time of each contender over that of smcscale, in the same repeat."""
    columns = ["time relative to smcscale, median (quartiles)"]
    columns += [f"N = {row['num_particles']:,}" for row in rows]

    def cell(ratio: dict) -> str:
        low, high = ratio["quartiles"]
        return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"

    others = [name for name in names if name != "with_smcscale"]
    return {
        "columns": columns,
        "rows": [[LABELS[name], *(cell(row["ratio"][name]) for row in rows)] for name in others],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install-peers", action="store_true", help="environments for the peers")
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(NUM_STEPS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--processes", type=int, default=5, help="fresh ones, for the first call")
    parser.add_argument("--quick", action="store_true", help="few repeats, writes nothing")
    options = parser.parse_args()
    if options.install_peers:
        install_peers()
    if options.quick:
        options.repeats, options.processes = min(options.repeats, 3), 1
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "y.npy"
        np.save(data, simulate(max(NUM_STEPS.values())))
        first = first_calls(options.contenders, data, options.processes)
        for name, times in first.items():
            print(
                f"first call, N = {FIRST_CALL[0]:,}, T = {FIRST_CALL[1]:,}: {LABELS[name]:42s}"
                f"{times['first']['median']:6.2f} s, imports {times['imports']['median']:.2f} s"
            )
        workers = {name: Worker(name, data) for name in options.contenders}
        versions = {name: worker.ready["versions"] for name, worker in workers.items()}
        rows = measure(workers, options.sizes, options.repeats)
        for worker in workers.values():
            worker.close()
    if options.quick:
        return
    versions["with_smcscale"] = versions.get("with_smcscale", {}) | {
        "smcscale": importlib.metadata.version("smcscale")
    }
    result = {
        "question": __doc__.splitlines()[0],
        "command": " ".join(["python benchmarks/filter.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions,
        "labels": LABELS,
        "first_call": {"num_particles": FIRST_CALL[0], "num_steps": FIRST_CALL[1]} | first,
        "rows": rows,
    }
    if "with_smcscale" in options.contenders:
        result["table"] = table(rows, options.contenders)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
