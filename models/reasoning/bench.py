r"""Many problems, methods, budgets and seeds: one row of a file for each, so that nothing is done twice.

    problems = read_problems("problems.jsonl")
    runner = Runner(lm, prm, max_steps=12)
    run(problems, runner, "results.jsonl", methods=["particle_filter", "best_of_n"], budgets=[1, 4])

| name | what it is |
|---|---|
| `METHODS` | the methods by name, for N texts and at most so many steps |
| `Runner`, `Texts` | one cell: a problem, a method, N, a seed -> its row |
| `run` | all cells that a file does not have yet |

Problem files are those of `problem_files.py`.  With models of one's own, which must say a boxed answer:

    python -m smcscale bench reasoning math500.jsonl --lm FOLDER --prm FOLDER --temperature 0.8 \
        --delimiter '\n\n' --step-tokens 512 --max-tokens 2048 --max-steps 40 \
        --instruction 'Please reason step by step, and put your final answer within \boxed{}.'

The first line of a results file says how the runs were made (`Runner.configuration` and a digest of
the problems); it takes no row of another configuration.  A row is written, flushed and synced when
its cell is finished, and its random key depends on seed and problem alone: a run that is killed and
started again ends with the file of one that was not, but for the seconds.  Methods share the keys,
which pairs them, and those that differ only in the choice of the answer share the texts.

Prompts are padded to lengths of a few sizes (`cache.bucketed`); problems of one size follow each
other and share one compiled program.  Read next: `report.py`, `budget.py`.
"""

import hashlib
import importlib.metadata
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from smcscale.kernels.triggers import always
from smcscale.models.reasoning import answers, methods
from smcscale.models.reasoning.budget import Metered, Spent
from smcscale.models.reasoning.grading import needs_verifier, read_answer, same_answer
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.methods import Method
from smcscale.models.reasoning.outcome import run_method
from smcscale.models.reasoning.problem_files import Problem
from smcscale.models.reasoning.program import Reward, read_prompt
from smcscale.models.reasoning.report import HEADER, Row, read_results
from smcscale.models.reasoning.rewards import RewardFunction


def _children(n: int) -> int:
    """How many children a text has in searches with N texts: 4, or what divides N."""
    return next(k for k in (4, 3, 2, 1) if n % k == 0)


def _sweeps(n: int) -> int:
    """Sweeps that share N texts: up to 4, each of two or more."""
    return max(1, min(4, n // 2))


def _sweep_kernels(n: int, populations: int) -> dict[str, Any]:
    """Kernels of sweeps: two texts resample at every row, as their ESS is never below half of two."""
    return {"trigger": always} if n // populations < 3 else {}


#: `(N, max_steps) -> Method`; N counts the texts of all sweeps, the kept ones too
METHODS: dict[str, Callable[[int, int], Method]] = {
    "particle_filter": lambda n, steps: methods.particle_filter(),
    "sharp_filter": lambda n, steps: methods.particle_filter(power=4),
    "best_of_n": lambda n, steps: methods.best_of_n(),
    "weighted_vote": lambda n, steps: replace(
        methods.best_of_n(), select=answers.weighted_majority
    ),
    "self_consistency": lambda n, steps: methods.self_consistency(),
    "beam_search": lambda n, steps: methods.beam_search(n // _children(n)),
    "diverse_trees": lambda n, steps: methods.diverse_trees(n // _children(n)),
    "balanced_search": lambda n, steps: methods.balanced_search(),
    "look_ahead": lambda n, steps: methods.look_ahead(_children(n)),
    "steering": lambda n, steps: methods.steering(n // _children(n), _children(n)),
    "entropic_filter": lambda n, steps: methods.entropic_filter(steps),
    "particle_gibbs": lambda n, steps: methods.particle_gibbs(
        _sweeps(n), **_sweep_kernels(n, _sweeps(n))
    ),
    "parallel_tempering": lambda n, steps: methods.parallel_tempering(
        (1.0, 2.0) if n > 3 else (1.0,), _sweeps(n // 2), **_sweep_kernels(n, 2 * _sweeps(n // 2))
    ),
    "published_filter": lambda n, steps: methods.published_filter(),
    "published_entropic_filter": lambda n, steps: methods.published_entropic_filter(steps),
}
#: methods that look at no score
UNJUDGED = ("self_consistency",)


def check_methods(methods: Iterable[str], *, judged: bool) -> None:
    """Refuse unknown methods, and without a reward model those that need one.

    Raises:
        ValueError: with the names that there are.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(
                f'smcscale: there is no method "{method}"; try some of {", ".join(METHODS)}.'
            )
        if not judged and method not in UNJUDGED:
            raise ValueError(
                f'smcscale: "{method}" needs a reward model.\n'
                f"  try: --prm FOLDER, or --methods {','.join(UNJUDGED)}."
            )


def _equal(state: Any) -> Any:
    """The score of a text that nobody judges."""
    return jnp.ones(())


class Texts(NamedTuple):
    """What a run of the filter left.

    Attributes:
        answers: of the texts, None where one has none.
        log_weights, scores: `(N,)`.
        log_evidence: None under a kernel without a target.
        key: for the choice of an answer.
        spent: by both models.
        seconds: compilation included.
    """

    answers: list[str | None]
    log_weights: np.ndarray
    scores: np.ndarray
    log_evidence: float | None
    key: Any
    spent: Spent
    seconds: float


@dataclass(frozen=True)
class Runner:
    """Runs one method on one problem.

    Attributes:
        lm: writes; with a chat template it gets the question as a user's message.
        prm: judges; None for methods that need no scores (`UNJUDGED`).
        max_steps: of a text.
        instruction: added to the question for the language model, such as how to give the answer.
        verify: `(right answer, answer) -> bool` for answers that are no plain numbers.
        told: what else belongs to the configuration, such as the names of the models.
    """

    lm: LanguageModel
    prm: Reward | None
    max_steps: int = 12
    instruction: str | None = None
    verify: Callable[[str, str], bool] | None = None
    told: dict[str, Any] = field(default_factory=dict)
    _last: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def configuration(self) -> dict[str, Any]:
        """What must be the same for the rows of one file."""
        lm = self.lm
        law = {name: getattr(lm.sampling, name) for name in lm.sampling.__dataclass_fields__}
        return {
            "smcscale": importlib.metadata.version("smcscale"),
            **self.told,
            "max_steps": self.max_steps,
            "step_tokens": lm.step_tokens,
            "max_tokens": lm.max_tokens,
            "prior": lm.prior,
            "sampling": {name: round(float(x), 6) for name, x in law.items() if x is not None},
            "instruction": self.instruction,
            "grader": "numbers" if self.verify is None else getattr(self.verify, "name", "own"),
        }

    def check(self, problems: Iterable[Problem], methods: Iterable[str]) -> None:
        """Refuse what cannot be run or graded, before any long work.

        Raises:
            ValueError: an unknown method, one that needs a reward model, or answers that are no
                plain numbers and nothing that could grade them.
        """
        check_methods(methods, judged=self.prm is not None)
        if self.verify is None and (found := [p for p in problems if needs_verifier(p.answer)]):
            raise ValueError(
                f'smcscale: the answer of problem "{found[0].id}", {found[0].answer}, is no plain '
                "number, and there is nothing to grade it.\n  try: Runner(..., verify=Verifier())."
            )

    def prompt(self, problem: Problem) -> Any:
        """What the language model reads: text, or token ids in its chat template."""
        parts = [problem.question.strip(), *([self.instruction] if self.instruction else [])]
        asked, words = "\n\n".join(parts), self.lm.tokenizer
        if words is None or words.template is None:
            return asked + "\n"
        return self.lm.chat([{"role": "user", "content": asked}])

    def size(self, problem: Problem) -> int:
        """Padded length of the prompt: problems of one size share a compiled program."""
        return self.lm.encode(self.prompt(problem))[0].shape[0]

    def together(self, methods: Sequence[str], num_particles: int) -> list[list[str]]:
        """Methods in groups that differ in the choice of the answer only: one run serves a group."""
        groups: list[tuple[Method, list[str]]] = []
        for name in methods:
            method = replace(METHODS[name](num_particles, self.max_steps), select=answers.majority)
            alike = [names for other, names in groups if other == method]
            alike[0].append(name) if alike else groups.append((method, [name]))
        return [names for _, names in groups]

    def __call__(self, problem: Problem, method: str, num_particles: int, seed: int) -> Row:
        """The row of one cell; the last run is kept for other methods of its group."""
        chosen = METHODS[method](num_particles, self.max_steps)
        asked = (problem, num_particles, seed, replace(chosen, select=answers.majority))
        if not self._last or self._last[0] != asked:
            self._last[:] = [asked, self._texts(problem, chosen, num_particles, seed)]
        texts: Texts = self._last[1]
        select = answers.UpTo(chosen.select, answers.numeric)
        answer = select(texts.answers, texts.log_weights, texts.scores, texts.key)
        judged = self.prm is not None and method not in UNJUDGED
        cost = texts.spent._asdict()
        return {
            "answer": answer,
            "correct": same_answer(answer, problem.answer, self.verify),
            "answered": sum(each is not None for each in texts.answers) / len(texts.answers),
            "log_evidence": texts.log_evidence if judged else None,
            **{name: x if judged or "prm" not in name else 0 for name, x in cost.items()},
            "seconds": texts.seconds,
        }

    def _texts(self, problem: Problem, chosen: Method, num_particles: int, seed: int) -> "Texts":
        """Run the filter of a method."""
        started = time.perf_counter()
        reward = RewardFunction(_equal) if self.prm is None else self.prm
        question = problem.question.strip() + "\n"
        prompt = read_prompt(self.lm, reward, self.prompt(problem), question=question)
        metered = Metered.of(self.lm, reward, prompt)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(problem.id.encode()) >> 1)
        run_key, select_key = jax.random.split(key)
        outcome = run_method(
            chosen, run_key, self.lm, metered, prompt,
            num_particles=num_particles // chosen.num_populations, max_steps=self.max_steps,
        )  # fmt: skip
        found = [
            read_answer(self.lm.decode(row[:n]))
            for row, n in zip(outcome.tokens, outcome.lengths, strict=True)
        ]
        evidence = None if outcome.log_evidence is None else round(outcome.log_evidence, 5)
        seconds = round(time.perf_counter() - started, 3)
        spent = metered.spent(outcome.cost)
        return Texts(
            found, outcome.log_weights, outcome.scores, evidence, select_key, spent, seconds
        )


def run(
    problems: Sequence[Problem],
    runner: Callable[[Problem, str, int, int], Row],
    path: str | Path,
    *,
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int] = (0,),
    configuration: dict[str, Any] | None = None,
    size: Callable[[Problem], int] | None = None,
    progress_bar: bool = True,
) -> list[Row]:
    """Run every cell that a file of results does not have, and append its row.

    Args:
        problems: with different ids.
        runner: `(problem, method, budget, seed) -> row`, such as a `Runner`.
        path: of the file; made if it is not there.
        methods, budgets, seeds: the cells are all combinations; a file may get further ones later.
        configuration: of the runner; that of a `Runner` when None.
        size: problems are taken in order of it; the padded length of a `Runner` when None.
        progress_bar: shows cells (interactive output only).
    Returns:
        rows: all of the file.
    Raises:
        ValueError: a file of another configuration, by the names that differ, or no such file.
    """
    path = Path(path)
    groups = {budget: [[method] for method in methods] for budget in budgets}
    if isinstance(runner, Runner):
        runner.check(problems, methods)
        groups = {budget: runner.together(methods, budget) for budget in budgets}
        configuration = runner.configuration if configuration is None else configuration
        size = runner.size if size is None else size
    asked = json.dumps([[p.question, p.answer] for p in problems]).encode()
    described = (configuration or {}) | {"problems": hashlib.sha256(asked).hexdigest()[:16]}
    results = read_results(path) if path.exists() else None
    _check_configuration(path, results.configuration if results else None, described)
    rows = list(results.rows) if results else []
    done = {(row["problem"], row["method"], row["budget"], row["seed"]) for row in rows}
    ordered = sorted(problems, key=size) if size else list(problems)
    cells = [
        (problem, method, budget, seed)
        for budget in budgets
        for group in groups[budget]
        for problem in ordered
        for seed in seeds
        for method in group
    ]
    missing = [cell for cell in cells if (cell[0].id, *cell[1:]) not in done]
    bar = tqdm(missing, unit=" runs", disable=None if progress_bar else True)
    with path.open("ab") as file:
        file.truncate(results.size if results else 0)
        if results is None or results.configuration is None:
            _append(file, {HEADER: described})
        before = None
        for problem, method, budget, seed in bar:
            group = next(names for names in groups[budget] if method in names)
            if before not in (None, (group, budget)):
                # its programs are not used again, and each takes some of the 65530 memory maps
                # that Linux gives a process
                jax.clear_caches()
            before = (group, budget)
            bar.set_description(f"{method}, {budget}")
            cell = {"problem": problem.id, "level": problem.level, "method": method}
            row = cell | {"budget": budget, "seed": seed} | runner(problem, method, budget, seed)
            _append(file, row)
            rows.append(row)
    return rows


def _append(file: Any, row: Row) -> None:
    """One line, on the disk before this returns."""
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _check_configuration(path: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Refuse to mix rows that were made in different ways."""
    new = json.loads(json.dumps(new))
    if old is None or old == new:
        return
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = "; ".join(f"{n} was {old.get(n)!r} and is {new.get(n)!r}" for n in names)
    raise ValueError(
        f"smcscale: {path} was made with another configuration: {told}.\n"
        "  try: the same options as before, or another --out."
    )
