"""Real series that ship inside pip packages, loaded without a network.

| function | rows | what | package, extra |
|---|---|---|---|
| `nile` | 100 | yearly flow of the Nile at Aswan, 1871 to 1970 | statsmodels, `[demo]` |
| `sp500_returns` | 5030 | daily returns of the S&P 500 index, 1999 to 2018 | arch, `[demo]` |

Read next: `zoo.py`, for the programs that fit them.
"""

import importlib
from typing import NamedTuple

import numpy as np


class Series(NamedTuple):
    """A series with its time axis, as NumPy arrays.

    Attributes:
        values: `(T,)` float32.
        times: `(T,)`, `datetime64[D]` dates or integer years.
        name: what the values are, with their unit.
    """

    values: np.ndarray
    times: np.ndarray
    name: str


def nile() -> Series:
    """Yearly flow of the Nile at Aswan, 1871 to 1970, in 1e8 cubic metres; 100 rows.

    Raises:
        ModuleNotFoundError: when statsmodels is not installed; names the extra.
    Source: Cobb 1978; `statsmodels.datasets.nile`.
    """
    frame = _imported("statsmodels.datasets.nile", "statsmodels").load_pandas().data
    values = frame["volume"].to_numpy(np.float32)
    return Series(values, frame["year"].to_numpy(np.int64), "flow of the Nile, 1e8 m³ a year")


def sp500_returns() -> Series:
    """Daily returns of the S&P 500 index, 1999 to 2018: 100 times the log-ratio of closes.

    Values are in percent; the first of the 5031 days has no return, so there are 5030 rows.

    Raises:
        ModuleNotFoundError: when arch is not installed; names the extra.
    Source: `arch.data.sp500` (adjusted closes).
    """
    frame = _imported("arch.data.sp500", "arch").load()
    log_price = np.log(frame["Adj Close"].to_numpy(np.float64))
    values = (100 * np.diff(log_price)).astype(np.float32)
    dates = frame.index.to_numpy()[1:].astype("datetime64[D]")
    return Series(values, dates, "daily return of the S&P 500, percent")


def _imported(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"smcscale: this series ships inside the package {package!r}, which is not installed; "
            f"try: pip install 'smcscale[demo]' (or pip install {package})."
        ) from error
