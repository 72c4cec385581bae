"""The progress line: what it says, and that it is silent when it should be."""

import sys

import numpy as np
import pytest

from smcscale import progress


def _never():
    raise AssertionError("nothing may be read")


@pytest.mark.parametrize("enabled", [True, False])
def test_silent_and_free_in_non_interactive_output(enabled, capsys):
    with progress.bar(10, enabled) as update:
        update(5, _never)
        update(10, _never)
    assert capsys.readouterr() == ("", "")


def test_terminal_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    with progress.bar(1000, True) as update:
        update(256, lambda: (np.array([50.0, 40.2]), np.array([-3.0, -3.0])))
        update(1000, lambda: (np.array([51.0, 60.0]), np.array([-9.0, -9.5])))
    text = capsys.readouterr().err
    assert text.startswith("\r") and text.endswith("\n")
    assert "256/1000" in text and "ESS 40, log evidence -3.00" in text
    assert "1000/1000" in text and "ESS 51, log evidence -9.22" in text


def test_short_runs_show_nothing_and_redraws_are_rare(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar(3, True) as update:
        for step in range(1, 4):
            update(step, _never)
    assert capsys.readouterr().err == ""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reads = []
    with progress.bar(1000, True) as update:
        for step in range(1, 1000):
            now[0] += 0.01
            update(step, lambda: (reads.append(1), (np.ones(1), np.ones(1)))[1])
    assert 80 <= len(reads) <= 100


def test_notebook_line(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    monkeypatch.setattr(progress, "_screen", lambda: progress._Notebook(display))
    with progress.bar(2, True) as update:
        update(1, lambda: (np.float32(3), np.float32(-1)))
        update(2, lambda: (np.float32(2), np.float32(-2)))
    assert len(shown) == 2 and "2/2" in shown[1] and "ESS 2, log evidence -2.00" in shown[1]
