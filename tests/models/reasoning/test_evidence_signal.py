"""Evidence as a signal: closed forms, and sums over all pairs, orders and subsets."""

import itertools

import numpy as np
import pytest
import scipy.stats

from smcscale.models.reasoning import evidence_signal
from smcscale.models.reasoning.evidence_signal import (
    abstention,
    auroc,
    auroc_interval,
    calibration,
    log_mean_evidence,
    threshold,
)

INF = float("inf")


def pairs(signal, correct):
    """AUROC by its definition."""
    told = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, good in zip(signal, correct, strict=True)
        if good
        for b, bad in zip(signal, correct, strict=True)
        if not bad
    ]
    return sum(told) / len(told)


def tied(seed, size=40, values=6):
    rng = np.random.default_rng(seed)
    signal = rng.integers(0, values, size).astype(float)
    correct = rng.random(size) < 0.2 + 0.6 * signal / values
    return signal, correct


# ---- log evidence and its error


def test_log_evidence_of_runs_is_the_log_of_their_mean():
    told = log_mean_evidence(np.log([[1.0, 3.0], [0.5, 0.5]]))
    np.testing.assert_allclose(told.value, np.log([2.0, 0.5]))
    # sd of 1 and 3 is sqrt(2), over sqrt(2) runs and a mean of 2
    np.testing.assert_allclose(told.error, [0.5, 0.0])
    shifted = log_mean_evidence(np.log([1.0, 3.0]) - 1000.0)
    np.testing.assert_allclose([shifted.value, shifted.error], [np.log(2) - 1000, 0.5])


def test_dead_runs_count_as_zeros():
    told = log_mean_evidence([[0.0, -INF], [-INF, -INF]])
    np.testing.assert_allclose(told.value, [np.log(0.5), -INF])
    np.testing.assert_allclose(told.error, [1.0, INF])
    assert log_mean_evidence([[-1.0]]).error == INF


@pytest.mark.statistical
def test_the_error_is_that_of_many_repetitions():
    rng = np.random.default_rng(0)
    told = log_mean_evidence(rng.normal(-3.0, 0.5, (4000, 50)))
    # lognormal: sd / mean = sqrt(exp(s^2) - 1); a log's second order is below 2% here
    exact = np.sqrt(np.expm1(0.25) / 50)
    assert abs(np.mean(told.error) / exact - 1) < 0.05
    spread = told.value.std(ddof=1)
    assert abs(spread / exact - 1) < 0.02 + 4 / np.sqrt(2 * 4000)


# ---- AUROC


@pytest.mark.parametrize("seed", range(6))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    signal, correct = tied(seed)
    assert auroc(signal, correct) == pytest.approx(pairs(signal, correct), abs=1e-12)
    assert auroc(-signal, correct) == pytest.approx(1 - pairs(signal, correct), abs=1e-12)
    assert auroc(np.exp(signal), correct) == auroc(signal, correct)  # order is all that counts


def test_auroc_at_the_ends():
    assert auroc([1.0, 2.0, 3.0, -INF], [False, True, True, False]) == 1.0
    assert auroc([5.0, 5.0, 5.0], [True, False, True]) == 0.5


def test_the_interval_is_the_quantiles_of_all_resamples():
    signal = np.array([0.1, 0.4, 0.4, 0.9, 0.7])
    correct = np.array([False, False, True, True, False])
    exact = []
    for drawn in itertools.product(range(5), repeat=5):
        chosen = list(drawn)
        if 0 < correct[chosen].sum() < 5:
            exact.append(pairs(signal[chosen], correct[chosen]))
    low, high = auroc_interval(signal, correct, 0.8, draws=20_000)
    # the law is discrete: between the exact quantiles just below and just above
    for found, share in ((low, 0.1), (high, 0.9)):
        assert np.quantile(exact, share - 0.02) <= found <= np.quantile(exact, share + 0.02)


@pytest.mark.statistical
def test_the_interval_holds_what_it_says():
    rng, held, trials = np.random.default_rng(1), 0, 250
    exact = scipy.stats.norm.cdf(1 / np.sqrt(2))  # P(N(1, 1) > N(0, 1))
    for _ in range(trials):
        correct = rng.random(120) < 0.5
        low, high = auroc_interval(rng.normal(correct, 1.0), correct, 0.9, draws=300)
        held += low <= exact <= high
    # percentiles are a little narrow at this size: 0.9 less 0.02, and 3 standard errors
    assert 0.88 - 3 * 0.019 < held / trials < 0.9 + 3 * 0.019


# ---- calibration


def test_bins_hold_equally_many_and_ties_stay_together():
    told = calibration(np.arange(12) / 12, np.arange(12) >= 6, bins=4)
    np.testing.assert_array_equal(told.sizes, [3, 3, 3, 3])
    np.testing.assert_allclose(told.signal, np.array([1, 4, 7, 10]) / 12)
    np.testing.assert_array_equal(told.accuracy, [0, 0, 1, 1])
    np.testing.assert_allclose(told.error, np.mean([1, 4, 5, 2]) / 12)
    assert (told.low <= told.accuracy).all() and (told.accuracy <= told.high).all()
    same = calibration([0.5] * 9 + [0.9], [True] * 10, bins=5)
    np.testing.assert_array_equal(same.sizes, [9, 1])


def test_bins_do_not_depend_on_the_order_of_problems():
    signal, correct = tied(3)
    mixed = np.random.default_rng(0).permutation(len(signal))
    one, other = calibration(signal, correct), calibration(signal[mixed], correct[mixed])
    for name in ("signal", "accuracy", "sizes", "error"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-12)


@pytest.mark.statistical
def test_a_calibrated_signal_has_no_error():
    rng = np.random.default_rng(2)
    chance = rng.random(3000)
    told = calibration(chance, rng.random(3000) < chance)
    # ten bins of 300: mean distance up to 0.8 * 0.5 / sqrt(300), and five errors of that mean
    assert told.error < 0.023 + 5 * 0.006
    assert calibration(chance**3, rng.random(3000) < chance).error > 0.2  # E[u - u^3] = 0.25


# ---- abstention


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_the_mean_over_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    signal, correct = rng.integers(0, 3, 6).astype(float), rng.random(6) < 0.5
    curves = []
    for order in itertools.permutations(range(6)):
        falling = signal[list(order)]
        if (np.diff(falling) <= 0).all():
            curves.append(np.cumsum(correct[list(order)]) / np.arange(1, 7))
    told = abstention(signal, correct)
    np.testing.assert_allclose(told.accuracy, np.mean(curves, axis=0))
    np.testing.assert_allclose(told.coverage, np.arange(1, 7) / 6)
    assert told.area <= told.best + 1e-12


def test_areas_in_closed_form():
    right = np.array([True, False, True, False])
    perfect = abstention([4.0, 1.0, 3.0, 2.0], right)
    np.testing.assert_allclose(perfect.accuracy, [1, 1, 2 / 3, 1 / 2])
    assert perfect.area == perfect.best
    np.testing.assert_allclose(abstention(np.zeros(4), right).accuracy, 0.5)


@pytest.mark.parametrize("wanted", [0.0, 0.5, 0.7, 0.9, 1.0])
def test_the_threshold_is_the_lowest_that_is_good_enough(wanted):
    signal, correct = tied(5)
    found = threshold(signal, correct, wanted)
    good = [level for level in set(signal) if correct[signal >= level].mean() >= wanted]
    assert found == (min(good) if good else INF)
    # as good as wanted is good enough
    assert threshold([1.0, 2.0, 3.0, 4.0], [False, True, True, True], 0.75) == 1.0


def test_pictures_show_both():
    signal, correct = tied(1)
    axes = evidence_signal.draw(-1.0 - signal, ~correct, bins=4)
    assert len(axes) == 2 and "AUROC" in axes[1].get_title()
    shown = axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(shown, abstention(-signal, ~correct).accuracy)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="solved and problems that were not"):
        auroc([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match="a number for each problem"):
        abstention([1.0, np.nan], [True, False])
    with pytest.raises(ValueError, match="a number for each problem"):
        abstention([], [])
    with pytest.raises(ValueError, match="finite signal"):
        calibration([-INF, 0.0], [False, True])
    with pytest.raises(ValueError, match="must be"):
        log_mean_evidence([[0.0, np.nan]])
