"""README tables come from result files."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, **entries) -> None:
    (folder / "speed.json").write_text(json.dumps(entries), encoding="utf-8")


def test_a_marked_place_is_filled_and_stays_filled(report, tmp_path):
    write(
        tmp_path,
        table={"columns": ["", "N = 10"], "rows": [["ours", "1.0"]]},
        date="2026-11-21",
        machine={"cores": 2, "cpu": "a CPU"},
    )
    page = "before\n<!-- benchmark: speed -->\nold\n<!-- end -->\nafter\n"
    filled = report.filled(page, tmp_path)
    assert "| ours | 1.0 |" in filled and "old" not in filled
    assert "`benchmarks/results/speed.json`, 2026-11-21, 2 cores, a CPU." in filled
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert report.filled(filled, tmp_path) == filled


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "not in benchmarks/results"),
        ({}, 'holds no "table"'),
        ({"table": {"columns": ["a", "b"], "rows": [["1"]]}}, "does not fit its columns"),
    ],
)
def test_a_result_without_a_table_is_refused(report, tmp_path, entries, message):
    if entries is not None:
        write(tmp_path, **entries)
    with pytest.raises(ValueError, match=message):
        report.table("speed", tmp_path)


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README yet")
def test_the_readme_is_up_to_date(report):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.filled(text) == text, "run: python benchmarks/report.py"
