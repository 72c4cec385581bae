"""The command line: what it prints, what it refuses."""

import sys

import numpy as np
import pytest

from smcscale.__main__ import main
from smcscale.models import commands


@pytest.fixture
def returns(tmp_path):
    """A CSV file of 60 dated returns, with a column of words."""
    rng = np.random.default_rng(0)
    lines = ["date,return,comment"]
    start = np.datetime64("2020-01-01")
    for i, value in enumerate(rng.normal(size=60)):
        lines.append(f"{start + np.timedelta64(i, 'D')},{value:.4f},{'calm' if i % 2 else 'wild'}")
    path = tmp_path / "returns.csv"
    path.write_text("\n".join(lines))
    return path


def test_the_overview_names_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in ("filter", "solve", "bench reasoning", "get smollm2", "demo"):
        assert f"python -m smcscale {command}" in text


def refused(capsys, *arguments):
    """The one line on standard error of a command that must end with code 2."""
    assert main([str(a) for a in arguments]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("smcscale: ") and streams.err.count("\n") == 1
    return streams.err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["filter"], "required: file"),
        (["filter", "none.csv"], "none.csv"),
        (["filter", "x.csv", "--particles", "0"], "positive whole number, got '0'"),
        (["filter", "x.csv", "--model", "magic"], "try one of stochastic_volatility"),
        (["solve"], "required: question"),
        (["solve", "What is the capital of France?"], "--model FOLDER"),
        (["solve", "How many apples?"], "a number and a question are needed"),
        (["solve", "How many 3?", "--model", "/nowhere"], "/nowhere"),
        (["solve", "How many 3?", "--reward", "/nowhere"], "add --model FOLDER"),
        (["get", "gpt"], "invalid choice: 'gpt'"),
        (["get", "smollm2", "--folder", "."], "holds other files"),
        (["bench"], "required: reasoning"),
        (["bench", "reasoning"], "required: problems"),
        (["bench", "reasoning", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["bench", "reasoning", "x", "--budgets", "1,0"], "positive whole number, got '0'"),
        (["bench", "reasoning", "x", "--seeds", "1,b"], "whole numbers from 0 on"),
        (["bench", "reasoning", "x", "--methods", "a,a"], "different names with commas"),
        (["bench", "reasoning", "/nowhere/x", "--generate", "3"], "/nowhere/x"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(arguments, found, capsys):
    assert found in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "arguments", "found"),
    [
        ("", [], "no rows"),
        ("a,b\n", [], "no rows"),
        ("a,b\nx,y\n", [], "has no numeric column"),
        ("a,b\n1,2\n3,4\n", [], "has 2 numeric columns (a, b); choose one with --column"),
        ("a,b\n1,x\n", ["--column", "c"], 'no column "c"; it has a, b'),
        ("a,b\n1,2\n3,x\n", ["--column", "b"], "row 2: 'x' is no number"),
        ("a\n1\ninf\n", [], "has no numeric column"),
        ("a\n1\n2\n", [], "fewer than 10 numbers"),
        ("a\n" + "1\n" * 20, ["--picture", "/nowhere/x.png"], "folder of the picture"),
        ("a\n" + "0\n" * 20, [], "constant"),
    ],
)
def test_bad_files(text, arguments, found, tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text(text)
    found = "is no number" if "inf" in text else found
    assert found in refused(capsys, "filter", path, *arguments)


def test_a_file_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_bytes(bytes(range(256)))
    assert "not a CSV file" in refused(capsys, "filter", path)


def test_reading_a_column(tmp_path, returns):
    column = commands.read_column(returns)
    assert column.name == "return" and column.values.shape == (60,)
    assert str(column.dates[0]).startswith("2020-01-01") and len(column.dates) == 60
    gaps = tmp_path / "gaps.csv"
    gaps.write_text("y,z\n" + "\n".join(f"{i},\n,{i}" for i in range(12)))
    column = commands.read_column(gaps, "y")
    assert np.isnan(column.values[1::2]).all() and column.dates is None


def test_volatility_mean_gives_returns_their_variance():
    rng = np.random.default_rng(1)
    mu, phi, sigma = -0.4, 0.9, 0.3
    x = mu + sigma / np.sqrt(1 - phi**2) * rng.normal(size=1_000_000)
    y = np.exp(x / 2) * rng.normal(size=x.size)
    assert commands.volatility_mean(y, phi, sigma) == pytest.approx(mu, abs=0.02)


@pytest.mark.parametrize("model", ["stochastic_volatility", "local_level"])
def test_filter_writes_a_table_and_a_picture(model, returns, tmp_path, capsys):
    picture = tmp_path / "out.png"
    arguments = ["filter", returns, "--particles", 100, "--runs", 2, "--picture", picture]
    assert main([str(a) for a in [*arguments, "--model", model]]) == 0
    text = capsys.readouterr().out
    assert f'60 rows of "return" under {model}' in text
    assert "log evidence" in text and f"picture: {picture}" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_filter_skips_missing_cells(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text("y\n" + "\n".join(["0.5", "-1", '""', "0.2", "nan"] * 8))
    picture = tmp_path / "out.png"
    assert main(["filter", str(path), "--particles", "50", "--picture", str(picture)]) == 0
    assert picture.exists()


@pytest.fixture
def problems(tmp_path, capsys):
    """A file of three problems, made by the command."""
    path = tmp_path / "problems.jsonl"
    assert main(["bench", "reasoning", "--generate", "3", str(path)]) == 0
    assert f"python -m smcscale bench reasoning {path}" in capsys.readouterr().out
    assert path.read_text().count("\n") == 3
    return path


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--methods", "magic"], "try some of particle_filter, sharp_filter"),
        (["--prm", "/nowhere"], "add --lm FOLDER"),
        (["--lm", "/nowhere"], '"particle_filter" needs a reward model'),
        (["--lm", "/nowhere", "--prm", "/nowhere"], "/nowhere is not a folder of a model"),
        (["--plot", "/nowhere/a.png"], "the folder of /nowhere/a.png does not exist"),
        (["--temperature", "-1"], "temperature"),
        (["--step-tokens", "500"], "step_tokens"),
        (["--generate", "3"], "is there already"),
    ],
)
def test_wrong_options_of_a_bench_are_one_line(arguments, found, problems, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    line = refused(capsys, "bench", "reasoning", problems, "--out", out, *arguments)
    assert found in line and not out.exists()


def test_answers_that_nothing_can_grade_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "What is half of pi?", "answer": "\\\\frac{\\\\pi}{2}"}\n')
    assert "pip install 'smcscale[grading]'" in refused(capsys, "bench", "reasoning", path)


@pytest.mark.long
def test_a_bench_writes_rows_tables_and_a_picture_and_goes_on(problems, tmp_path, capsys):
    out, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    arguments = ["bench", "reasoning", problems, "--out", out, "--plot", picture]
    arguments = [str(a) for a in [*arguments, "--methods", "best_of_n,self_consistency"]]
    arguments += ["--budgets", "2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "accuracy against budget, 3 problems" in text and f"rows: {out}" in text
    assert "accuracy less that of best_of_n" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    whole = out.read_bytes()
    assert whole.count(b"\n") == 7
    out.write_bytes(whole[:-20])  # killed while it wrote
    assert main(arguments) == 0
    assert out.read_bytes().count(b"\n") == 7
    capsys.readouterr()
    assert "max_steps was 12 and is 13" in refused(capsys, *arguments, "--max-steps", "13")
