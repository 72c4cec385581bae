"""Pictures: what is drawn, not how it looks."""

import numpy as np
import pytest

from smcscale import plot

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def _texts(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_filter_bands(chain_result):
    run = chain_result(0, 2, 100)
    ax = plot.filter_bands(run, "x", [0, 1, 1, 0])
    assert _texts(ax) == ["filter, 90%", "filter, mean", "observed"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "x")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), run_mean(run), atol=1e-6)
    last = plot.filter_bands(chain_result(0, 2, 100, store="last"), "x")
    assert _texts(last) == ["filter, 90%", "filter, mean, band from std"]
    with pytest.raises(ValueError, match='no site "z".*\n.*"x"'):
        plot.filter_bands(run, "z")
    with pytest.raises(ValueError, match="needs quantiles"):
        plot.filter_bands(chain_result(0, 2, 9, store="last"), "x", transform=np.exp)
    with pytest.raises(ValueError, match="element"):
        plot.filter_bands(run, "x", element=2)
    _, own = plt.subplots()
    assert plot.filter_bands(run, "x", transform=np.exp, ax=own) is own
    assert "filter, median" in _texts(own)


def run_mean(run):
    from smcscale.result import filter

    return np.asarray(filter(run).mean["x"])


def test_forecast(chain_result):
    run = chain_result(0, 2, 100)
    draws = {"x": np.random.default_rng(0).normal(size=(200, 6)), "y": np.ones((200, 6, 2))}
    ax = plot.forecast(draws, "x", result=run, past=2)
    assert ax.lines[-1].get_xdata().tolist() == [4, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), np.median(draws["x"], 0))
    assert ax.lines[0].get_xdata().tolist() == [2, 3]
    plot.forecast(draws, "y", element=1, observations=[0, 1, 1, 0])
    with pytest.raises(ValueError, match='no site "z"'):
        plot.forecast(draws, "z")


def test_ess_marks_the_weights_that_fired_the_trigger(chain_result):
    run = chain_result(0, 2, 100)
    ax = plot.ess(run, 0)
    assert ax.lines[1].get_xdata().tolist() == [0, 1, 2]
    share = np.asarray(run.diagnostics.ess)[0] / 100
    np.testing.assert_allclose(ax.lines[1].get_ydata(), share[:3], rtol=1e-6)


def test_genealogy(chain_result):
    run = chain_result(0, 2, 100)
    ax = plot.genealogy(run, run=1)
    assert ax.get_title().startswith("60 final particles")
    with pytest.raises(ValueError, match='store="last"'):
        plot.genealogy(chain_result(0, 2, 10, store="last"))
