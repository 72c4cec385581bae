"""Many problems: files that survive a kill, grading, intervals and tests against exact answers."""

import io
import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from smcscale.kernels.triggers import always
from smcscale.models.reasoning import bench, grading, problem_files, report, tasks
from smcscale.models.reasoning.bench import Runner
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.problem_files import Problem
from smcscale.models.reasoning.rewards import RewardFunction
from smcscale.models.reasoning.tokenizer import word_level
from support.reasoning import tiny

PROBLEMS = [Problem(f"é{i}", "How many?" * (i + 1), f"{i}", f"Level {i % 2}") for i in range(3)]


def fake(problem, method, budget, seed):
    """A row that depends on its cell alone."""
    rng = np.random.default_rng([budget, seed, len(method), len(problem.question)])
    spent = dict.fromkeys(report.Spent._fields, budget * 10)
    return {"answer": "ü", "correct": bool(rng.random() < 0.5), **spent, "seconds": 0.5}


def noting(done):
    """The fake runner, which notes its cells."""
    return lambda *cell: done.append(cell[1:]) or fake(*cell)


def run(path, runner=fake, **changes):
    options = {"methods": ["a", "bb"], "budgets": [1, 4], "seeds": [0, 1], "progress_bar": False,
               "configuration": {"max_steps": 12, "sampling": {"temperature": 0.8}}}  # fmt: skip
    return bench.run(changes.pop("problems", PROBLEMS), runner, path, **(options | changes))


# ---- the file


def test_a_run_killed_at_any_byte_ends_with_the_same_file(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = run(path)
    whole = path.read_bytes()
    cells = [(r["problem"], r["method"], r["budget"], r["seed"]) for r in rows]
    assert len(set(cells)) == len(cells) == 2 * 2 * 2 * 3
    assert [json.loads(line) for line in whole.splitlines()[1:]] == rows
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    # every byte of the header's key, some of each line, and both sides of every end of a line
    for cut in {*range(22), *range(0, len(whole), 71), *ends, *(e - 1 for e in ends)}:
        path.write_bytes(whole[:cut])
        done = []
        assert run(path, noting(done)) == rows
        assert path.read_bytes() == whole
        assert len(done) == len(rows) - max(sum(e <= cut for e in ends) - 1, 0)


def test_a_run_that_breaks_off_keeps_what_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"

    def dies(problem, method, budget, seed):
        if (method, budget) == ("bb", 1):
            raise KeyboardInterrupt
        return fake(problem, method, budget, seed)

    with pytest.raises(KeyboardInterrupt):
        run(path, dies)
    assert len(report.read_results(path).rows) == 6
    other = tmp_path / "other.jsonl"
    assert run(path) == run(other) and path.read_bytes() == other.read_bytes()


def test_a_file_takes_further_cells_and_does_none_twice(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, methods=["a"])
    done = []
    rows = run(path, noting(done), seeds=[0, 1, 2])
    assert len(done) == 24 and ("a", 1, 0) not in done
    assert len(rows) == 36


def test_problems_come_in_order_of_their_size(tmp_path):
    rows = run(tmp_path / "out.jsonl", size=lambda problem: -len(problem.question))
    assert [row["problem"] for row in rows[:6]] == ["é2", "é2", "é1", "é1", "é0", "é0"]


def test_a_last_line_of_garbage_is_torn_and_an_earlier_one_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = run(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + b"\0\0\0\n")
    assert run(path) == rows and path.read_bytes() == whole
    path.write_bytes(b"".join(lines[:3]) + b"{}\n" + b"".join(lines[4:]))
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match="line 4 of .*out.jsonl is not one"):
        run(path)
    assert path.read_bytes() == damaged


def test_another_configuration_is_refused_by_name(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path)
    before = path.read_bytes()
    for change, told in (
        ({"configuration": {"max_steps": 20, "sampling": {"temperature": 0.8}}}, "max_steps was 12 and is 20"),
        ({"configuration": {"max_steps": 12, "sampling": {}}}, "sampling was {'temperature': 0.8} and is {}"),
        ({"configuration": {"max_steps": 12, "sampling": {"temperature": 0.8}, "lm": "x"}}, "lm was None and is 'x'"),
        ({"problems": PROBLEMS[:2]}, "problems was"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another configuration") as error:
            run(path, **change)
        assert told in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ['{"problem": "2 + 2?", "answer": "4"}\n', "notes", '{"conf": 1'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="another --out"):
        run(path)
    assert path.read_text() == text


# ---- problems and answers


def test_problems_of_the_known_sets_are_read(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [
        {"problem": "P", "solution": "so \\boxed{4}", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
         "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"},
        {"ID": "2024-II-4", "Problem": "Q", "Solution": "long", "Answer": 33},
        {"question": "R", "answer": "16 - 3 = 13\nso 9 * 2 = <<9*2=18>>18\n#### 1,018"},
        {"problem": "S", "level": "Level 5", "type": "Algebra",
         "solution": "As \\boxed{1} is wrong, \\boxed{\\frac{1}{\\sqrt{2}}}."},
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8-sig")
    assert problem_files.read_problems(path) == [
        Problem("test/precalculus/807.json", "P", "\\left( 3, \\frac{\\pi}{2} \\right)", "2"),
        Problem("2024-II-4", "Q", "33", None),
        Problem("3", "R", "1,018", None),
        Problem("4", "S", "\\frac{1}{\\sqrt{2}}", "Level 5"),
    ]
    assert [grading.needs_verifier(p.answer) for p in problem_files.read_problems(path)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"problem": "a", "answer": "1"}\nnot json', "line 2 is no JSON object"),
        ("[1, 2]", "line 1 is no JSON object"),
        ('{"prompt": "a", "answer": "1"}', 'no "problem" or "question"; it has prompt, answer'),
        ('{"problem": "a"}', 'has no "answer"'),
        ('{"problem": "a", "answer": "the steps, and no number after ####"}', 'has no "answer"'),
        ('{"problem": "a", "answer": ["1"]}', 'has no "answer"'),
        ('{"id": 1, "problem": "a", "answer": 1}\n{"id": "1", "problem": "b", "answer": 2}', "there before"),
        ("\n \n", "has no problems"),
    ],
)  # fmt: skip
def test_bad_problem_files_are_refused_by_line(tmp_path, text, found):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=found.replace("(", r"\(")):
        problem_files.read_problems(path)


def test_generated_problems_are_read_back_and_balanced(tmp_path):
    problems = problem_files.generated(20, seed=4)
    path = tmp_path / "problems.jsonl"
    problem_files.write_problems(path, problems)
    assert problem_files.read_problems(path) == problems == problem_files.generated(20, seed=4)
    assert [p.level for p in problems[:5]] == ["6", "7", "8", "9", "10"]
    assert len({p.question for p in problems}) == 20
    with pytest.raises(FileExistsError):
        problem_files.write_problems(path, problems)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{3} or rather \\boxed{\\frac{a}{b}}, done", "\\frac{a}{b}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{[0, 1\\}}", "[0, 1\\}"),  # an escaped brace is no brace
        ("\\boxed{\\left\\{\\frac{1}{2}", None),  # cut off
        ("\\boxed{\\dfrac{1}{2}\\!}", "\\frac{1}{2}"),
        ("3 * 4 = 12\n#### $1,200\nmore", "1,200"),
        ("Ana: 3 + 4 = 7\nAnswer: 7", "7"),
        ("Answer: 7\nAnswer: 9", "9"),
        ("The final answer is $x^2$.", "x^2"),
        ("Ana: 3 + 4 = 7", None),
        ("\\boxed{" + "9" * 501 + "}", None),
        ("\\boxed{ }", None),
        ("", None),
    ],
)
def test_answers_are_found(text, answer):
    assert grading.read_answer(text) == answer


def test_the_shipped_task_is_read_as_its_own_grader_reads_it():
    for problem in tasks.problems(5, 50):
        assert grading.read_answer(problem.solution) == tasks.final_answer(problem.solution)


def test_numbers_are_compared_without_computer_algebra():
    asked = []

    def verify(right, answer):
        asked.append((right, answer))
        return True

    for answer, right, same in (
        ("1,200.0", "1200", True), ("073", "73", True), ("3/6", "0.5", True), ("12", "13", False),
        ("x + 1", "x + 1", True), ("\\dfrac{1}{2}", "$\\frac{1}{2}$", True), (None, "3", False),
    ):  # fmt: skip
        assert grading.same_answer(answer, right, verify) == same
    assert asked == []
    assert grading.same_answer("1+x", "x+1", verify) and asked == [("x+1", "1+x")]
    assert not grading.same_answer("1+x", "x+1")


STAND_IN = """
import time
class LatexExtractionConfig: pass
def parse(text, extraction_config, parsing_timeout):
    print("noise")
    assert parsing_timeout is None and type(extraction_config[0]) is LatexExtractionConfig
    assert text[0] == text[-1] == "$"
    return [text.strip("$")]
def verify(right, answer, timeout_seconds):
    assert timeout_seconds is None
    if answer[0] == "hang": 10 ** 10 ** 10
    if answer[0] == "memory": bytearray(1 << 34)
    if answer[0] == "exit": raise SystemExit
    if answer[0] == "raise": raise RecursionError
    return right[0] == answer[0][::-1]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package in the place of Math-Verify that can hang, crash and raise."""
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    about = tmp_path / "math_verify-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: math-verify\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_verifier_outlives_what_it_is_given(stand_in):
    verify = grading.Verifier(seconds=1.0, megabytes=1024)
    assert verify.name == "math-verify 9.9"
    try:
        assert verify("abc", "cba") and not verify("abc", "abc")
        first = verify._process
        for bad in ("raise", "memory"):
            assert not verify("abc", bad)
        assert verify("ab", "ba") and verify._process is first
        for bad in ("hang", "exit"):
            assert not verify("abc", bad)
            assert verify("ab", "ba") and not verify("ab", "ab")  # the next ones are not misread
    finally:
        verify.close()
    assert verify._process is None


def test_without_math_verify_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install"):
        grading.Verifier()


def test_math_verify_itself():
    pytest.importorskip("math_verify")
    verify = grading.Verifier(seconds=5.0)
    try:
        for right, answer, same in (
            ("\\frac{3}{4}", "0.75", True), ("(3, \\frac{\\pi}{2})", "\\left(3,\\frac{\\pi}{2}\\right)", True),
            ("x^2 + 2x + 1", "(x+1)^2", True), ("\\frac{3}{4}", "\\frac{4}{3}", False),
            ("\\sqrt{2}", "\\frac{2}{\\sqrt{2}}", True), ("3", "\\frac{{{", False), ("p", "9^{9^{9^{9}}}", False),
        ):  # fmt: skip
            assert verify(right, answer) == same, (right, answer)
    finally:
        verify.close()


# ---- runs


def letters(**options):
    """The tiny model with words: texts of two letters, steps that end with a newline."""
    words = word_level(["a", "b"])
    size = words.vocabulary_size
    ends = words.ends_step(size=size)
    model = tiny.backbone(vocabulary=size)
    return LanguageModel(model, words, ends, step_tokens=2, max_tokens=4, **options)


TRACES = []


def traced(state):
    """A score that notes when it is traced."""
    TRACES.append(1)
    return 0.1 + 0.8 * (state.written.length % 2)


@pytest.mark.compile
def test_problems_of_one_padded_length_compile_once():
    lm = letters()
    runner = Runner(lm, RewardFunction(traced), max_steps=2)
    counts = {}
    for length in (3, 9, 20, 35, 40, 5, 50):
        problem = Problem(f"{length}", " ".join("ab"[i % 2] for i in range(length)), "1")
        before = len(TRACES)
        runner(problem, "best_of_n", 2, length)
        counts.setdefault(runner.size(problem), []).append(len(TRACES) - before)
    assert sorted(counts) == [32, 64]
    for first, *others in counts.values():
        assert first > 0 and others and not any(others)


def test_rows_of_a_runner_repeat_and_say_what_was_done(tmp_path):
    runner = Runner(letters(temperature=0.8), RewardFunction(traced), max_steps=2)
    names = ["best_of_n", "self_consistency", "particle_filter"]
    assert runner.together(names, 2) == [names[:2], names[2:]]
    problems = [Problem("long", "a b " * 9, "1", "2"), Problem("short", "b a", "7")]
    path = tmp_path / "out.jsonl"
    options = {"methods": names[:2], "budgets": [2], "seeds": [0, 1], "progress_bar": False}
    rows = bench.run(problems, runner, path, **options)
    by_cell = {(r["problem"], r["method"], r["seed"]): r for r in rows}
    for problem, seed in itertools.product(("long", "short"), (0, 1)):
        one, other = (by_cell[problem, name, seed] for name in names[:2])
        assert one["tokens"] == other["tokens"] > 0 and one["seconds"] == other["seconds"]
        assert one["log_evidence"] < 0 and other["log_evidence"] is None
        assert not one["correct"] and one["answered"] == 0
    assert by_cell["long", "best_of_n", 0]["prompt_tokens"] > 18
    configuration = report.read_results(path).configuration or {}
    assert configuration["sampling"] == {"temperature": 0.8}
    assert configuration["grader"] == "numbers" and configuration["max_steps"] == 2
    # a run that starts in the middle of a group has the same rows
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    again = bench.run(problems, replace(runner), path, **options)
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in again] == without


def test_what_cannot_be_run_is_refused_before_any_work(tmp_path):
    lm = letters()
    path = tmp_path / "out.jsonl"
    plain, hard = [Problem("1", "a", "3")], [Problem("h", "a", "\\pi")]
    long = [Problem("1", "a " * 100, "3")]
    for problems, prm, method, told in (
        (plain, RewardFunction(traced), "magic", 'no method "magic"; try some of particle_filter'),
        (plain, None, "best_of_n", '"best_of_n" needs a reward model'),
        (hard, None, "self_consistency", 'answer of problem "h", .pi, is no plain number'),
        (long, None, "self_consistency", "a shorter prompt"),
    ):
        with pytest.raises(ValueError, match=told):
            bench.run(problems, Runner(lm, prm), path, methods=[method], budgets=[1])
        assert not path.exists()


# ---- the report


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_the_interval_covers_as_a_bootstrap_of_a_binomial_does(p):
    n, level = 60, 0.95
    counts = np.arange(n + 1)
    found = np.array(
        [report.interval((np.arange(n) < k).astype(float), draws=4000) for k in counts]
    )
    inner = slice(1, n)
    exact = np.array([scipy.stats.binom.ppf([0.025, 0.975], n, k / n) / n for k in counts])
    # an end is a quantile of 4000 draws on a grid of 1 / n
    np.testing.assert_allclose(found[inner], exact[inner], atol=1.01 / n)
    ends = [scipy.stats.binomtest(k, n).proportion_ci(level, "exact") for k in (0, n)]
    np.testing.assert_allclose(found[[0, n]], ends)
    chance = scipy.stats.binom.pmf(counts, n, p)
    coverage = chance @ ((found[:, 0] <= p) & (p <= found[:, 1]))
    assert 0.92 < coverage < 0.97


def test_intervals_of_differences_reach_below_zero():
    low, high = report.interval(np.zeros(20), lowest=-1.0)
    assert low == -high < 0
    low, high = report.interval(np.full(20, -1.0), lowest=-1.0)
    assert low == -1.0 and -1 < high < 0


def test_one_seed_gives_the_exact_test_of_mcnemar():
    for won, lost, ties in itertools.product(range(6), range(6), (0, 3)):
        differences = [1] * won + [-1] * lost + [0] * ties
        exact = scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        np.testing.assert_allclose(report.sign_flip(differences), exact, rtol=1e-12)


def test_several_seeds_give_the_enumeration_of_all_signs():
    rng = np.random.default_rng(0)
    for _ in range(30):
        differences = rng.integers(-3, 4, rng.integers(1, 9))
        sums = [np.dot(s, differences) for s in itertools.product((-1, 1), repeat=len(differences))]
        exact = np.mean(np.abs(sums) >= abs(differences.sum()))
        np.testing.assert_allclose(report.sign_flip(differences), exact, rtol=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(report.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(report.holm([0.5, 0.9]), [1.0, 1.0])
    assert report.holm([]).shape == (0,)


def rows_of(table):
    """Rows of `{(method, budget): {problem: [right for each seed]}}`."""
    spent = dict.fromkeys((*report.Spent._fields, "seconds"), 2.0)
    return [
        {"problem": problem, "level": f"Level {10 - len(problem)}", "method": method,
         "budget": budget, "seed": seed, "correct": bool(right), **spent}
        for (method, budget), cells in table.items()
        for problem, seeds in cells.items()
        for seed, right in enumerate(seeds)
    ]  # fmt: skip


TABLE = {
    ("a", 4): {"p": [1, 1], "qq": [1, 0], "r": [0, 1]},
    ("b", 4): {"p": [0, 0], "qq": [1, 0], "r": [0]},
}


def test_seeds_are_averaged_within_a_problem_and_pairs_are_common_runs():
    rows = rows_of(TABLE)
    first, second = report.accuracies(rows)
    assert (first.method, first.budget, first.num_problems) == ("a", 4, 3)
    assert first.accuracy == pytest.approx(2 / 3) and second.accuracy == pytest.approx(0.5 / 3)
    assert first.cost["tokens"] == 2.0
    found = report.compare(rows, "a", "b", 4)
    assert found is not None
    assert found.difference == pytest.approx(1 / 3) and (found.wins, found.losses) == (1, 0)
    assert found.p_value == 1.0 and found.num_problems == 3
    assert report.compare(rows, "a", "b", 16) is None


def test_the_report_is_complete(tmp_path):
    out = io.StringIO()
    report.print_report(rows_of(TABLE), Console(file=out, width=60))
    text = out.getvalue()
    assert "0.667 [0.500, 1.000]" in text and "less that of a" in text
    assert text.index("Level 8") < text.index("Level 9") and "…" not in text
    report.print_report([], Console(file=out))
    assert "no runs are finished yet" in out.getvalue()
    ax = report.draw(rows_of(TABLE))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    ax.figure.savefig(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("method", "texts", "every_row"),
    [
        ("particle_gibbs", 4, True),  # two sweeps of two
        ("particle_gibbs", 16, False),
        ("parallel_tempering", 16, True),  # four sweeps of two, at two temperatures
    ],
)
def test_chains_of_two_texts_resample_at_every_row(method, texts, every_row):
    """The ESS of two is never below half of two."""
    assert (bench.METHODS[method](texts, 12).filter.trigger is always) == every_row
