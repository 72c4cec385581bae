"""What `python -m smcscale bench reasoning` does.

| function | does |
|---|---|
| `bench_reasoning` | methods against budgets on a file of problems: rows, tables, picture |
| `generate_problems` | such a file, of the shipped task |

Wrong input is a `ValueError`, `ImportError` or `OSError` whose text says what to do.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smcscale.models.reasoning import bench, grading, problem_files, report
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.solve import MAX_STEPS, shipped


def generate_problems(file: str, count: int, *, seed: int = 0) -> None:
    """Write held-out problems of the shipped task, as many of each level (number of steps)."""
    try:
        problem_files.write_problems(file, problem_files.generated(count, seed))
    except FileExistsError as error:
        raise ValueError(f"{file} is there already; choose another name.") from error
    print(f"{count} problems: {file}\nnext: python -m smcscale bench reasoning {file}")


def bench_reasoning(
    file: str,
    *,
    methods: Sequence[str],
    budgets: Sequence[int] = (1, 4, 16),
    seeds: Sequence[int] = (0,),
    lm: str | None = None,
    prm: str | None = None,
    out: str | None = None,
    picture: str | None = None,
    max_steps: int = MAX_STEPS,
    instruction: str | None = None,
    **options: Any,
) -> list[report.Row]:
    """Run methods on the problems of a file, print accuracy against budget, draw it.

    Rows that the file of results has already are not run again.

    Args:
        file: of problems; see `problem_files.read_problems`.
        methods: names in `bench.METHODS`; the others are compared with the first.
        budgets: numbers of texts.
        seeds: of the random keys.
        lm, prm: folders in the Hugging Face layout; the shipped models when both are None. Without
            `prm` the texts of `lm` can only vote.
        out: where the rows go.
        picture: where a picture goes; None draws none.
        max_steps: of a text.
        instruction: added to each question for the language model.
        **options: of `LanguageModel.from_pretrained`.
    Returns:
        rows: of the methods, budgets and seeds asked for.
    Raises:
        ValueError, ImportError: by option, before any long work.
    """
    problems = problem_files.read_problems(file)
    path = Path(out or f"{Path(file).stem}_results.jsonl")
    for target in (path, *([Path(picture)] if picture else [])):
        if not target.absolute().parent.is_dir():
            raise ValueError(f"the folder of {target} does not exist.")
    if prm is not None and lm is None:
        raise ValueError("--prm belongs to a model of your own; add --lm FOLDER.")
    folder = shipped("reasoner") if lm is None else Path(lm)
    judge = shipped("reasoner-prm") if lm is None else Path(prm) if prm else None
    dtype = options.get("dtype", "float32")
    bench.check_methods(methods, judged=judge is not None)
    told = {"lm": _fingerprint(folder), "prm": _fingerprint(judge) if judge else None}
    reward = ProcessRewardModel.from_pretrained(judge, dtype=dtype) if judge else None
    with contextlib.ExitStack() as stack:
        verify = None
        if any(grading.needs_verifier(problem.answer) for problem in problems):
            verify = stack.enter_context(contextlib.closing(grading.Verifier()))
        runner = bench.Runner(
            LanguageModel.from_pretrained(folder, **options), reward, max_steps, instruction, verify,
            told | {name: options[name] for name in ("delimiter", "dtype") if name in options},
        )  # fmt: skip
        rows = bench.run(problems, runner, path, methods=methods, budgets=budgets, seeds=seeds)
    asked = [
        row for method in methods for row in rows
        if (row["method"], row["budget"] in budgets, row["seed"] in seeds) == (method, True, True)
    ]  # fmt: skip
    report.print_report(asked)
    print(f"rows: {path}")
    if picture:
        report.draw(asked).figure.savefig(picture, dpi=150)
        print(f"picture: {picture}")
    return asked


def _fingerprint(folder: Path) -> str:
    """Name of a model's folder, and a digest of its files: all of small ones, ends of large ones."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of a model; a Hugging Face layout is needed.")
    digest, end = hashlib.sha256(), 1 << 20
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(end))
            file.seek(max(size - end, 0))
            digest.update(file.read(end))
    return f"{folder.resolve().name} {digest.hexdigest()[:12]}"
