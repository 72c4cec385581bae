"""Laws of coverage against enumeration and known parameters."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from smcscale.models.reasoning import scaling
from support.montecarlo import assert_mean

RNG = np.random.default_rng


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            right = np.arange(n) < c
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = np.mean([right[list(s)].any() for s in subsets])
                np.testing.assert_allclose(scaling.pass_at_k(n, c, k), share, atol=1e-12)
    assert scaling.pass_at_k([10, 4], [3, 2], 4).shape == (2,)


@pytest.mark.statistical
def test_pass_at_k_is_unbiased_and_so_is_its_squared_error():
    p, n, k, problems, runs = RNG(0).beta(0.5, 1.5, 400), 8, 5, 40, 4000
    chosen = RNG(1).choice(p, (runs, problems))
    found = [scaling.coverage(n, RNG([2, i]).binomial(n, row), k) for i, row in enumerate(chosen)]
    values = np.array([f.value for f in found])
    assert_mean(values, np.mean(1 - (1 - p) ** k), family=2, smallest_bias=0.01)
    counts = np.arange(n + 1)
    each = scaling.pass_at_k(n, counts, k)
    moments = [np.mean(scipy.stats.binom.pmf(counts, n, p[:, None]) @ each**m) for m in (1, 2)]
    variance = (moments[1] - moments[0] ** 2) / problems
    squares = np.array([f.standard_error**2 for f in found])
    assert_mean(squares / variance, 1.0, family=2, smallest_bias=0.05)


def test_counts_that_cannot_be_are_refused():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError, match="fit_beta"):
            scaling.pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="two coverages"):
        scaling.fit_power_law([1, 2], [0.5, 1.0])
    with pytest.raises(ValueError, match="right and wrong"):
        scaling.fit_beta([8, 8], [0, 0])
    with pytest.raises(ValueError, match="two samples"):
        scaling.fit_beta([1, 1], [0, 1])
    with pytest.raises(ValueError, match="three budgets"):
        scaling.fit_saturation([1, 2, 2], [0.1, 0.2, 0.2])


def test_curves_without_noise_are_found_again():
    k = 2.0 ** np.arange(10)
    law = scaling.fit_power_law(k, np.exp(-1.7 * k**-0.4))
    np.testing.assert_allclose([law.a, law.b], [-1.7, -0.4], rtol=1e-6)
    for ceiling, gap, rate in ((0.8, 0.5, 0.6), (0.95, 0.3, 0.15), (0.5, 0.4, 2.0)):
        for unit in (1.0, 1000.0):  # budgets in particles or tokens
            curve = scaling.fit_saturation(k * unit, ceiling - gap * k**-rate)
            found = [curve.ceiling, curve.gap * unit**-curve.rate, curve.rate]
            np.testing.assert_allclose(found, [ceiling, gap, rate], rtol=1e-4)


def test_beta_coverage_is_the_integral_and_tends_to_its_power_law():
    law = scaling.BetaLaw(0.3, 2.5, np.eye(2))
    density = scipy.stats.beta(0.3, 2.5)
    for k in (1, 7, 200):
        # by parts, since the density has a pole at 0
        exact = scipy.integrate.quad(
            lambda p, k=k: k * (1 - p) ** (k - 1) * density.sf(p), 0, 1, limit=200
        )[0]
        np.testing.assert_allclose(law.coverage(k).value, exact, rtol=1e-6)
    missed, tail = 1 - law.coverage(1e9).value, law.power_law()
    np.testing.assert_allclose(missed, -tail.a * 1e9**tail.b, rtol=1e-3)
    np.testing.assert_allclose(missed, -np.log(tail.coverage(1e9)), rtol=1e-3)


@pytest.mark.statistical
@pytest.mark.parametrize("alpha, beta, far", [(0.4, 1.5, 300), (3.0, 2.0, 4)])
def test_fit_beta_finds_the_parameters_within_its_standard_error(alpha, beta, far):
    problems, runs = 400, 200
    n = np.where(np.arange(problems) % 2, 12, 40)
    exact = scaling.BetaLaw(alpha, beta, np.eye(2)).coverage(far).value
    scores, errors = [], []
    for i in range(runs):
        p = RNG([3, i]).beta(alpha, beta, problems)
        fit = scaling.fit_beta(n, RNG([4, i]).binomial(n, p))
        reached = fit.coverage(far)
        found = np.array([fit.alpha, fit.beta])
        scores.append([*((found - [alpha, beta]) / np.sqrt(np.diag(fit.covariance))),
                       (reached.value - exact) / reached.standard_error])  # fmt: skip
        errors.append(np.log(found) - np.log([alpha, beta]))
    # maximum likelihood is biased by about its variance, the square of 0.08 at most
    assert np.all(np.abs(np.mean(errors, 0)) < 0.01 + 4 * np.std(errors, 0) / np.sqrt(runs))
    spread = np.std(scores, axis=0, ddof=1)
    assert np.all(np.abs(spread - 1) < 4 / np.sqrt(2 * runs)), spread


def test_fit_beta_agrees_with_a_search_over_the_likelihood():
    n, c = np.array([5, 9, 12, 3, 20, 20, 7]), np.array([0, 4, 12, 1, 2, 17, 0])
    fit = scaling.fit_beta(n, c)
    best = scipy.stats.betabinom(n, fit.alpha, fit.beta).logpmf(c).sum()
    for a, b in itertools.product(*(np.geomspace(0.8, 1.25, 9) * x for x in (fit.alpha, fit.beta))):
        assert scipy.stats.betabinom(n, a, b).logpmf(c).sum() <= best + 1e-9
    same = scaling.fit_beta(20, np.tile([9, 10, 11], 30))  # less spread than binomial counts
    assert same.alpha / (same.alpha + same.beta) == pytest.approx(0.5)
    assert same.alpha > 1e4


@pytest.mark.statistical
@pytest.mark.parametrize("abstain", [False, True])
def test_verified_accuracy_is_that_of_the_procedure(abstain):
    p, t, f, n, runs = 0.3, 0.8, 0.25, 4, 40_000
    rng = RNG(5)
    right = rng.random((runs, n)) < p
    accepted = rng.random((runs, n)) < np.where(right, t, f)
    order = rng.random((runs, n)) + 10 * ~accepted  # an accepted one at random, else any
    handed_in = np.take_along_axis(right, order.argmin(1)[:, None], axis=1)[:, 0]
    handed_in &= accepted.any(1) | (not abstain)
    exact = scaling.verified_accuracy(p, t, f, n, abstain=abstain)
    assert_mean(handed_in, exact, family=2, smallest_bias=0.02)


def test_verified_accuracy_has_the_ceiling_of_bayes_rule():
    ceiling = scaling.verified_accuracy([0.3, 0.0, 1.0], 0.8, 0.25, np.inf)
    np.testing.assert_allclose(ceiling, [0.24 / (0.24 + 0.175), 0.0, 1.0])
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.8, 0.25, 200), ceiling[0])
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.8, 0.25, 1), 0.3)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 1.0, 0.0, 6), 1 - 0.7**6)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.0, 0.0, np.inf), 0.3)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 1.0, 1.0, np.inf), 0.3)
