"""The shipped series are the ones they claim to be, and say what to install when missing."""

import sys

import numpy as np
import pytest

from smcscale.models.statespace import nile, sp500_returns


def test_nile():
    series = nile()
    assert series.values.shape == series.times.shape == (100,)
    assert series.times[0] == 1871 and series.times[-1] == 1970
    assert series.values.dtype == np.float32
    np.testing.assert_allclose(series.values.mean(), 919.35, atol=1e-2)
    assert series.values[42] == 456.0  # the drought of 1913


def test_sp500_returns():
    series = sp500_returns()
    assert series.values.shape == series.times.shape == (5030,)
    assert series.times[0] == np.datetime64("1999-01-05")
    assert (np.diff(series.times).astype(int) > 0).all()
    worst = series.times[np.argmin(series.values)]
    assert worst == np.datetime64("2008-10-15")
    np.testing.assert_allclose(series.values.min(), -9.4695, atol=1e-3)


@pytest.mark.parametrize(("load", "package"), [(nile, "statsmodels"), (sp500_returns, "arch")])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, load, package):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*smcscale\[demo\]"):
        load()
