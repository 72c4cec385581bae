"""Statistical tests whose tolerance comes from Monte Carlo error, never from the eye."""

from math import sqrt

import numpy as np
import scipy.stats


def assert_mean(replicates, expected, *, family: int, smallest_bias, error_rate: float = 1e-3):
    """Assert that independent unbiased estimates have the expected mean.

    Args:
        replicates: `(R, ...)`, independent runs (never particles of one run).
        expected: `(...)`, exact.
        family: number of all comparisons of this kind in the suite (members x coordinates x
            times), so that one whole suite errs with probability `error_rate` on a fresh seed.
        smallest_bias: `()` or `(...)`, the bias that must not escape: found with probability 0.98.
        error_rate: of the whole family.
    Raises:
        AssertionError: when the mean is off, or when there are too few replicates to tell.
    """
    replicates = np.asarray(replicates, np.float64)
    se = replicates.std(0, ddof=1) / sqrt(len(replicates))
    limit = scipy.stats.t.isf(error_rate / (2 * family), len(replicates) - 1)  # Bonferroni
    visible = (limit + 2) * se
    assert (visible <= smallest_bias).all(), (
        f"too few replicates to see the bias we fear: with {len(replicates)} of them only biases "
        f"above {np.max(visible):.3g} would be seen"
    )
    error = np.abs(replicates.mean(0) - np.asarray(expected, np.float64))
    assert (error <= limit * se).all(), (
        f"mean off by up to {np.max(error / np.maximum(se, 1e-300)):.1f} standard errors "
        f"(limit {limit:.1f}): {replicates.mean(0)} for {np.asarray(expected)}"
    )
