"""Stopping rules: hand-made cases, every possible future, and error rates."""

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from smcscale.models.reasoning import stopping
from smcscale.models.reasoning.answers import majority
from support.montecarlo import assert_mean


def test_certainty_is_the_published_one_for_equal_weights():
    answers = ["7", "8", "7", "7", "9", "8"]
    shares = np.array([3, 2, 1]) / 6
    entropy = -np.sum(shares * np.log(shares))
    np.testing.assert_allclose(stopping.entropy(answers), entropy)
    np.testing.assert_allclose(stopping.certainty(answers), 1 - entropy / np.log(6))
    np.testing.assert_allclose(
        stopping.certainty(answers, np.full(6, -40.0)), 1 - entropy / np.log(6)
    )
    assert stopping.certainty(["7"] * 4) == 1 and stopping.entropy(["7"] * 4) == 0
    assert stopping.certainty(list("abcd")) == pytest.approx(0, abs=1e-12)


def test_weights_that_only_one_particle_has_are_no_agreement():
    alone = np.log([1.0, 1e-9, 1e-9])
    assert stopping.entropy(["7", "8", "9"], alone) < 1e-6
    assert stopping.certainty(["7", "8", "9"], alone) < 1e-9
    assert stopping.certainty(["7"], [0.0]) == 0
    weights = np.array([0.5, 0.25, 0.25])
    masses = np.array([0.75, 0.25])
    exact = 1 - np.sum(masses * np.log(masses)) / np.sum(weights * np.log(weights))
    np.testing.assert_allclose(stopping.certainty(["7", "7", "8"], np.log(weights)), exact)


def test_a_particle_without_an_answer_agrees_with_nobody():
    assert stopping.certainty([None, None, None]) == pytest.approx(0, abs=1e-12)
    assert stopping.entropy(["7", "7", None, None]) == pytest.approx(1.5 * np.log(2))
    assert stopping.certainty(["7", None], [0.0, -np.inf]) == 0
    assert stopping.entropy(["7", None], [0.0, -np.inf]) == 0
    with pytest.raises(ValueError, match="one alive"):
        stopping.entropy(["7"], [-np.inf])
    with pytest.raises(ValueError, match="as many log-weights"):
        stopping.certainty(["7"], [0.0, 0.0])


def test_agreement_must_last_and_stay_with_one_leader():
    sure, other, split = ["7"] * 8, ["8"] * 8, ["7"] * 4 + ["8"] * 4
    moments = {"s": (sure, np.zeros(8)), "o": (other, np.zeros(8)), "x": (split, np.zeros(8)),
               "n": ([None] * 8, np.zeros(8))}  # fmt: skip
    for history, expected in {
        "": False, "ss": False, "sss": True, "xsss": True, "sssx": False, "sxss": False,
        "sso": False, "ooo": True, "nnn": False,
    }.items():  # fmt: skip
        seen = [moments[name] for name in history]
        assert stopping.agreed(seen) is expected, history
        assert stopping.concentrated(seen) is expected, history
    assert stopping.agreed([moments["x"]], floor=0.6, window=1)
    assert not stopping.agreed([moments["x"]], floor=0.7, window=1)  # 1 - log 2 / log 8 = 2/3
    assert stopping.concentrated([moments["x"]], ceiling=0.7, window=1)
    with pytest.raises(ValueError, match="window must be at least 1"):
        stopping.agreed([moments["s"]], window=0)


@pytest.mark.parametrize(
    "answers, texts, expected",
    [
        (["7", "7", "7"], None, True),
        (["8", "7", "7", "7"], None, True),
        (["7", "7"], None, False),
        (["7", "7", "7", "8"], None, False),
        (["7", "8", "7"], None, False),
        (["7", None, "7"], None, False),
        (["", "", ""], None, False),
        (["7", " 7", "7 "], None, True),
        (["7"] * 3, ["7", "7, wait", "7"], False),
        (["7"] * 3, ["7", "7", "No. 7"], False),
        (["7"] * 4, ["wait", "7", "7", "7"], True),  # unsure before the window
        (["7"] * 3, ["known threshold", "button 7", "7 notes"], True),  # whole words only
        (["no"] * 3, None, False),
    ],
)
def test_the_window_rule(answers, texts, expected):
    assert stopping.steady(answers, texts) is expected


def test_the_window_rule_for_yes_and_no():
    assert stopping.steady(["no"] * 3, unsure=stopping.UNSURE - {"no"})
    with pytest.raises(ValueError, match="2 texts"):
        stopping.steady(["no"], ["a", "b"])


def test_unbeatable_knows_every_future():
    choices = ["a", "b", "c", None]
    for seen in range(5):
        for remaining in range(3):
            futures = list(itertools.product(choices, repeat=remaining))
            for answers in itertools.product(choices, repeat=seen):
                now = majority(answers)
                fixed = all(majority(answers + future) == now for future in futures)
                # before the first answer nothing is decided, even if nothing follows
                assert stopping.unbeatable(answers, remaining) is (fixed and now is not None)


def test_likely_majority_is_a_posterior_probability():
    for first, second in ((3, 0), (5, 2), (9, 8)):
        density = scipy.stats.beta(first + 1, second + 1)
        exact = scipy.integrate.quad(density.pdf, 0.5, 1)[0]
        votes = ["a"] * first + ["b"] * second + [None]
        assert stopping.likely_majority(votes, exact - 1e-6)
        assert not stopping.likely_majority(votes, exact + 1e-6)
    assert not stopping.likely_majority([None, None], 0.0)


@pytest.mark.statistical
def test_likely_majority_is_right_as_often_as_it_says():
    rng, confidence = np.random.default_rng(0), 0.8
    errors = []
    for _ in range(20_000):
        p = rng.random()  # the prior of the rule
        votes = (rng.random(9) < p).tolist()
        if stopping.likely_majority(["a" if v else "b" for v in votes], confidence):
            errors.append((sum(votes) >= 5) != (p > 0.5))
    decided = [v for v in range(5, 10) if scipy.stats.beta.sf(0.5, v + 1, 10 - v) >= confidence]
    exact = np.mean([scipy.stats.beta.cdf(0.5, v + 1, 10 - v) for v in decided])
    assert exact < 1 - confidence
    assert_mean(errors, exact, family=1, smallest_bias=0.02)


@pytest.mark.statistical
def test_evidence_bounds_hold_as_often_as_they_say():
    rng, runs, error = np.random.default_rng(1), 6, 0.1
    for looks in (1, 4):
        estimates = rng.normal(1.0, 0.2, (6000, runs)).clip(1e-9)
        bounds = np.array(
            [stopping.evidence_bounds(np.log(e) - 800, 1 - error, looks) for e in estimates]
        )
        assert np.all(bounds == 0)  # below the smallest float, not NaN
        bounds = [stopping.evidence_bounds(np.log(e) - 300, 1 - error, looks) for e in estimates]
        low, high = np.exp(np.log(np.maximum(np.array(bounds).T, 1e-320)) + 300)
        assert_mean(low > 1, error / looks, family=4, smallest_bias=0.03)
        assert_mean(high < 1, error / looks, family=4, smallest_bias=0.03)


def test_evidence_bounds_by_hand_and_of_equal_estimates():
    z = np.array([0.2, 0.4, 0.3])
    margin = scipy.stats.t.isf(0.05, 2) * z.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(stopping.evidence_bounds(np.log(z)), (0.3 - margin, 0.3 + margin))
    # R dead runs: the chance to live is below 1 - 0.05^(1/R), at this confidence
    np.testing.assert_allclose(stopping.evidence_bounds([-np.inf] * 8), (0, 1 - 0.05 ** (1 / 8)))
    np.testing.assert_allclose(stopping.evidence_bounds([0.0] * 8), (0.05 ** (1 / 8), 1))
    for bad in ([0.0], [], [0.0, np.nan], [0.0, np.inf]):
        with pytest.raises(ValueError, match="at least two independent estimates"):
            stopping.evidence_bounds(bad)


def test_hopeless_and_settled():
    small, large = np.log([0.001, 0.002, 0.0015, 0.001]), np.log([0.97, 0.98, 0.99, 0.98])
    middle = np.log([0.5, 0.4, 0.6, 0.5])
    assert [stopping.hopeless(x) for x in (small, middle, large)] == [True, False, False]
    assert [stopping.settled(x) for x in (small, middle, large)] == [False, False, True]
    wide = np.log([1e-4, 0.02, 1e-4, 1e-4])  # its mean is below the floor, not surely
    assert not stopping.hopeless(wide)
    assert not stopping.hopeless([-np.inf] * 4) and stopping.hopeless([-np.inf] * 400)
    assert not stopping.hopeless(small, looks=10**6)
