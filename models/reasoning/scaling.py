"""Accuracy against budget: laws of what more samples buy.

| name | what it is |
|---|---|
| `pass_at_k`, `coverage` | chance that k samples hold a right one: unbiased, with standard error |
| `fit_power_law` | `log c = a k^b` through measured coverage |
| `fit_beta` | beta-binomial law of the problems' difficulty, coverage at any k |
| `fit_saturation` | `ceiling - gap N^-rate` through the accuracy of any method |
| `verified_accuracy` | best-of-N by a verifier that errs, and its limit |

The laws of coverage need independent samples: copies that resampling made are dependent.  What
samples cost, and how to spend a budget: `budget.py`.

Source: Chen et al. 2021 (arXiv 2107.03374) for pass@k; Brown et al. 2024, "Large Language Monkeys"
(arXiv 2407.21787), and Schaeffer et al. 2025 (arXiv 2502.17578) for the laws; Stroebl et al. 2024
(arXiv 2411.17501) for verifiers that err.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import betaln, digamma, gammaln, polygamma


class Estimate(NamedTuple):
    """A value and its standard error, both `()` or `(...)`."""

    value: Any
    standard_error: Any


def pass_at_k(num_samples: Any, num_correct: Any, k: Any) -> np.ndarray:
    """Unbiased estimate of the chance that k samples hold a right one: `1 - C(n-c, k) / C(n, k)`.

    Args:
        num_samples, num_correct, k: integers that broadcast, `c <= n` and `1 <= k <= n`.
    Raises:
        ValueError: for others.
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (num_samples, num_correct, k)))
    if (c < 0).any() or (c > n).any() or (k < 1).any() or (k > n).any():
        raise ValueError(
            "smcscale: pass@k needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples.\n"
            "  try: fit_beta(num_samples, num_correct).coverage(k) for a larger k."
        )
    i = np.arange(1, n.max(initial=1) + 1)
    inside = (i > (n - c)[..., None]) & (i <= n[..., None])
    return np.asarray(1 - np.where(inside, 1 - k[..., None] / i, 1.0).prod(-1))


def coverage(num_samples: Any, num_correct: Any, k: Any) -> Estimate:
    """Mean pass@k over problems, of the shape of k, and its standard error.

    The error counts other problems of this kind in: `num_samples`, `num_correct` are `(P,)`, P > 1.
    """
    n, c = np.broadcast_arrays(num_samples, num_correct)
    each = pass_at_k(n, c, np.asarray(k)[..., None])
    return Estimate(each.mean(-1), each.std(-1, ddof=1) / np.sqrt(each.shape[-1]))


@dataclass(frozen=True)
class PowerLaw:
    """Coverage `exp(a k^b)`, a and b negative."""

    a: float
    b: float

    def coverage(self, k: Any) -> np.ndarray:
        """The curve at k."""
        return np.asarray(np.exp(self.a * np.asarray(k, float) ** self.b))


def fit_power_law(k: Any, coverages: Any, standard_errors: Any = None) -> PowerLaw:
    """The power law nearest to measured coverage `(K,)` at `k`, by weighted least squares.

    Values at several k come from the same samples, so residuals tell nothing about the error of
    a and b: fit it again to problems drawn with replacement.

    Raises:
        ValueError: with fewer than two coverages strictly between 0 and 1.
    """
    k, coverages = np.asarray(k, float), np.asarray(coverages, float)
    between = (coverages > 0) & (coverages < 1)
    if between.sum() < 2:
        raise ValueError("smcscale: a power law needs two coverages strictly between 0 and 1.")
    errors = 1.0 if standard_errors is None else np.maximum(standard_errors, 1e-9)
    slope, start = np.polyfit(np.log(k[between]), np.log(-np.log(coverages[between])), 1)

    def residuals(raw: np.ndarray) -> np.ndarray:
        return (np.exp(-np.exp(raw[0]) * k ** raw[1]) - coverages) / errors

    found = least_squares(residuals, [start, slope], x_scale="jac", xtol=1e-12, ftol=1e-12).x
    return PowerLaw(float(-np.exp(found[0])), float(found[1]))


@dataclass(frozen=True)
class BetaLaw:
    """Chances of one sample over problems follow Beta(alpha, beta).

    Attributes:
        covariance: of alpha and beta, `(2, 2)`, inverse observed information; NaN if there is none.
    """

    alpha: float
    beta: float
    covariance: np.ndarray

    def coverage(self, k: Any) -> Estimate:
        """`E[1 - (1-p)^k] = 1 - B(alpha, beta + k) / B(alpha, beta)`, error by the delta method."""
        a, b, k = self.alpha, self.beta, np.asarray(k, float)
        missed = np.exp(betaln(a, b + k) - betaln(a, b))
        shared = digamma(a + b) - digamma(a + b + k)
        slope = missed[..., None] * np.stack([shared, shared + digamma(b + k) - digamma(b)], -1)
        variance = np.einsum("...i,ij,...j->...", slope, self.covariance, slope)
        return Estimate(1 - missed, np.sqrt(np.maximum(variance, 0.0)))

    def power_law(self) -> PowerLaw:
        """What coverage follows for large k: `b = -alpha`, `a = -Gamma(alpha+beta) / Gamma(beta)`."""
        tail = gammaln(self.alpha + self.beta) - gammaln(self.beta)
        return PowerLaw(float(-np.exp(tail)), -self.alpha)


def fit_beta(num_samples: Any, num_correct: Any) -> BetaLaw:
    """Beta law of difficulty by maximum likelihood of beta-binomial counts.

    Coverage beyond the samples rests on the Beta shape near 0, which has no problems that are never
    solved.  Counts `(P,)` that vary less than binomial ones drive alpha and beta up to 1e5.

    Raises:
        ValueError: when no problem has two samples, or all samples are right, or all wrong.
    """
    n, c = (np.asarray(x, float) for x in np.broadcast_arrays(num_samples, num_correct))
    if n.max(initial=0) < 2 or c.sum() in (0, n.sum()):
        raise ValueError(
            "smcscale: a Beta law needs two samples of a problem, and right and wrong ones.\n"
            "  try: more samples, or easier or harder problems."
        )

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(raw)
        both = digamma(a + b) - digamma(n + a + b)
        slopes = [digamma(c + a) - digamma(a) + both, digamma(n - c + b) - digamma(b) + both]
        value = np.sum(betaln(c + a, n - c + b) - betaln(a, b))
        return -float(value), -np.array([a * slopes[0].sum(), b * slopes[1].sum()])

    mean = c.sum() / n.sum()
    bounds, options = [(np.log(1e-5), np.log(1e5))] * 2, {"ftol": 1e-14, "gtol": 1e-8}
    start = np.log([2 * mean, 2 * (1 - mean)])
    a, b = np.exp(minimize(loss, start, jac=True, bounds=bounds, options=options).x)
    own = [np.sum(polygamma(1, a) - polygamma(1, c + a))]
    own += [np.sum(polygamma(1, b) - polygamma(1, n - c + b))]
    information = np.diag(own) + np.sum(polygamma(1, n + a + b) - polygamma(1, a + b))
    if np.linalg.eigvalsh(information)[0] <= 0:
        information *= np.nan
    return BetaLaw(float(a), float(b), np.linalg.inv(information))


@dataclass(frozen=True)
class Saturation:
    """Accuracy `ceiling - gap * N^-rate`."""

    ceiling: float
    gap: float
    rate: float

    def accuracy(self, n: Any) -> np.ndarray:
        """The curve at N."""
        return np.asarray(self.ceiling - self.gap * np.asarray(n, float) ** -self.rate)


def fit_saturation(n: Any, accuracies: Any, standard_errors: Any = None) -> Saturation:
    """The saturating curve nearest to accuracies `(K,)` at budgets `n`, by weighted least squares.

    Ceiling in [0, 1], rate in [0.01, 10].  A ceiling far above the largest measured accuracy is a
    guess: fit it again to problems drawn with replacement to see how wild.

    Raises:
        ValueError: with fewer than three different budgets.
    """
    n, accuracies = np.asarray(n, float), np.asarray(accuracies, float)
    if len(np.unique(n)) < 3:
        raise ValueError("smcscale: a curve of three numbers needs three budgets at least.")
    errors = 1.0 if standard_errors is None else np.maximum(standard_errors, 1e-9)
    unit = np.exp(np.log(n).mean())  # budgets in their own unit, so that the gap has size 1

    def residuals(raw: np.ndarray) -> np.ndarray:
        return (raw[0] - raw[1] * (n / unit) ** -raw[2] - accuracies) / errors

    bounds = ([0.0, -1.0, 0.01], [1.0, 1.0, 10.0])
    starts = [[np.clip(accuracies.max(), 0.001, 0.999), 0.2, rate] for rate in (0.1, 0.5, 1.5)]
    fits = [least_squares(residuals, x, bounds=bounds, xtol=1e-12, ftol=1e-12) for x in starts]
    ceiling, gap, rate = min(fits, key=lambda fit: fit.cost).x
    return Saturation(float(ceiling), float(gap * unit**rate), float(rate))


def verified_accuracy(
    p: Any, true_positive: Any, false_positive: Any, n: Any, *, abstain: bool = False
) -> np.ndarray:
    """Accuracy when one of the accepted among n independent samples is handed in, at random.

    With `s = p t + (1-p) f`, the chance that a sample is accepted, and `q = (1-s)^n` that none is,
    `(1-q) p t / s + q p (1-t) / (1-s)`.  It tends to `p t / s`, below 1 as long as f > 0.

    Args:
        p: chance that a sample is right; of several problems, the accuracy is the mean.
        true_positive, false_positive: t, f: chance that a right, a wrong sample is accepted.
        n: number of samples; `np.inf` gives the ceiling.
        abstain: hand nothing in, which counts as wrong, when none is accepted; else any sample.
    """
    p, t, f, n = (np.asarray(x, float) for x in (p, true_positive, false_positive, n))
    accepted = p * t + (1 - p) * f
    none = (1 - accepted) ** n
    with np.errstate(divide="ignore", invalid="ignore"):
        if_some = np.where(accepted > 0, p * t / accepted, 0.0)
        if_none = np.where(accepted < 1, p * (1 - t) / (1 - accepted), 0.0) * (not abstain)
    return np.asarray((1 - none) * if_some + none * if_none)
