"""Choosing one answer from weighted answers."""

import dataclasses
from fractions import Fraction

import equinox as eqx
import jax
import numpy as np
import pytest
import scipy.stats

from smcscale.models.reasoning import answers
from support.montecarlo import assert_mean

ANSWERS = ["7", "8", "8", None, "9"]
LOG_WEIGHTS = np.log([0.45, 0.2, 0.2, 0.9, 0.15])
RUN = {"texts": list("abcde"), "log_probs": [-1.0] * 5, "num_tokens": [3] * 5, "steps": [1] * 5}
NO_ANSWERS = lambda question, hint: [None]
RULES = [
    answers.weighted_majority, answers.majority, answers.argmax, answers.score_vote,
    answers.BestOfMajority(), answers.IslandVote((5,)), answers.FirstFinish(),
    answers.PerplexityConsistency(), answers.HintMarginal(NO_ANSWERS, ""),
    answers.UpTo(answers.weighted_majority, str),
    answers.UpTo(answers.PerplexityConsistency(per_token=False, prune=False), str),
]  # fmt: skip


def with_run(rule):
    """The rule with what it needs of the run above."""
    return eqx.Partial(rule, **{name: RUN[name] for name in getattr(rule, "needs", ())})


def test_each_rule_chooses_what_it_says():
    assert answers.weighted_majority(ANSWERS, LOG_WEIGHTS) == "7"
    assert answers.majority(ANSWERS, LOG_WEIGHTS) == "8"
    assert answers.argmax(ANSWERS, LOG_WEIGHTS) == "7"
    assert answers.argmax(ANSWERS, LOG_WEIGHTS, scores=[0, 0, 0, 1, 0.5]) == "9"
    assert answers.score_vote(ANSWERS, LOG_WEIGHTS, [0.5, 0.3, 0.3, 0.9, 0.55]) == "8"
    assert answers.score_vote(ANSWERS, LOG_WEIGHTS, [0.5, 0.3, 0.1, 0.9, 0.55]) == "9"


def test_weights_may_be_far_from_one_and_dead():
    assert answers.weighted_majority(["1", "2"], [-2000.0, -2001.0]) == "1"
    assert answers.weighted_majority(["1", "2"], [-np.inf, 5000.0]) == "2"
    assert answers.weighted_majority(["1", None], [-2000.0, 0.0]) == "1"


@pytest.mark.parametrize("rule", RULES)
def test_without_any_answer_there_is_none(rule):
    assert with_run(rule)([None] * 5, np.zeros(5), np.ones(5), jax.random.key(0)) is None
    assert answers.sample([None], [0.0], key=jax.random.key(0)) is None


@pytest.mark.parametrize("rule", RULES)
def test_rules_share_one_signature_and_are_values(rule):
    found = with_run(rule)(ANSWERS, LOG_WEIGHTS, np.full(5, 0.5), jax.random.key(0))
    assert found in ("7", "8", "9")
    if dataclasses.is_dataclass(rule):
        same = dataclasses.replace(rule)
        assert same is not rule and same == rule and hash(same) == hash(rule)


@pytest.mark.statistical
def test_sampling_follows_the_weights():
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = [answers.sample(ANSWERS, LOG_WEIGHTS, key=key) for key in keys]
    share = np.mean([d == "7" for d in drawn])
    assert abs(share - 0.45) < 4 * np.sqrt(0.45 * 0.55 / 300)
    assert None not in drawn


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="5 answers but log-weights of shape"):
        answers.weighted_majority(ANSWERS, [0.0])
    with pytest.raises(ValueError, match="draws at random"):
        answers.sample(ANSWERS, LOG_WEIGHTS)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or"):
            answers.masses(["7", "8"], [0.0, bad])
    with pytest.raises(ValueError, match="score_vote needs `scores`"):
        answers.score_vote(ANSWERS, LOG_WEIGHTS)
    with pytest.raises(ValueError, match="BestOfMajority needs `scores`.*with NaN"):
        answers.BestOfMajority()(ANSWERS, LOG_WEIGHTS, [0, 0, 0, np.nan, 0])
    with pytest.raises(ValueError, match="FirstFinish needs `steps`"):
        answers.FirstFinish()(ANSWERS, LOG_WEIGHTS)
    with pytest.raises(ValueError, match="needs `num_tokens`"):
        answers.PerplexityConsistency()(ANSWERS, LOG_WEIGHTS, log_probs=[-1.0] * 5)
    with pytest.raises(ValueError, match="needs `texts`"):
        answers.PerplexityConsistency(False)(ANSWERS, LOG_WEIGHTS, log_probs=[-1.0] * 5)
    with pytest.raises(ValueError, match=r"islands of \(2, 2\) but 5 answers"):
        answers.IslandVote((2, 2))(ANSWERS, LOG_WEIGHTS)
    for bad in ([1.0, 1.0], [1.0, 0.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="positive values"):
            answers.fit_weibull_mixture(bad)


def test_masses():
    found = answers.masses(ANSWERS, LOG_WEIGHTS)
    assert list(found) == ["7", "8", "9"]
    np.testing.assert_allclose(list(found.values()), [0.45, 0.4, 0.15])
    assert answers.masses(["7", "8", "8", None]) == pytest.approx({"7": 1 / 3, "8": 2 / 3})
    assert answers.masses(["7", "8"], [0.0, -np.inf]) == {"7": 1.0}
    assert answers.masses([None], [0.0]) == {} == answers.masses([], [])


def test_best_of_majority_leaves_rare_answers_out():
    given = ["1"] * 6 + ["2"] * 3 + ["3"]
    scores = [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4, 0.4, 0.1, 0.9]
    top = lambda floor, k: answers.BestOfMajority(floor).top(given, np.zeros(10), scores, k)
    assert top(0.0, 3) == ["3", "2", "1"]
    assert top(0.1, 1) == ["3"]  # a share of exactly the floor is enough
    assert top(0.11, 3) == ["2", "1"]  # the mean of 2 is above that of 1, though not its maximum
    assert top(0.31, 3) == ["1"]
    assert top(0.7, 3) == ["1"]  # none is frequent enough
    assert answers.BestOfMajority(0.11)(given, np.zeros(10), scores) == "2"


def test_best_of_majority_counts_mass_or_particles():
    weights, scores = np.log([0.4, 0.05, 0.05, 0.5]), [0.2, 0.6, 0.8, 0.0]
    given = ["1", "2", "2", None]
    assert answers.BestOfMajority(0.2)(given, weights, scores) == "1"
    assert answers.BestOfMajority(0.2, weighted=False)(given, weights, scores) == "2"
    assert answers.BestOfMajority(0.3, weighted=False)(given, weights, scores) == "2"
    assert answers.BestOfMajority(0.45)(given, weights, scores) == "1"
    # the mean is by weight too
    assert answers.BestOfMajority(0.0)(["1", "1", "2"], np.log([9, 1, 5]), [0.9, 0.0, 0.6]) == "1"


def test_each_island_has_one_vote():
    given = ["1", "2", "2", "3", "3", None]
    weights = np.array([0.0, -0.5, 900.0, 899.0, -3.0, -1.0])
    # shares: 1: 0.62, 2: 0.38 | 2: 0.73, 3: 0.27 | 3: 0.12, nobody 0.88
    assert answers.IslandVote((2, 2, 2))(given, weights) == "2"
    assert answers.IslandVote((2, 0, 2, 2))(given, weights) == "2"
    assert answers.IslandVote((1, 5))(given, weights) == "1"
    assert (
        answers.IslandVote((4, 1, 1))(["1"] * 4 + ["2"] * 2, np.zeros(6)) == "2"
    )  # size is no vote
    dead = np.where(np.arange(6) < 2, -np.inf, weights)
    assert answers.IslandVote((2, 2, 2))(given, dead) == "2"
    # an island that is mostly silent has little to say
    assert answers.IslandVote((2, 1))(["1", None, "2"], [0.0, 0.1, 0.0]) == "2"


def test_the_first_to_finish():
    finish = answers.FirstFinish()
    given, weights = ["1", "2", "3", None, "3"], np.log([0.5, 0.2, 0.15, 0.05, 0.1])
    assert finish(given, weights, steps=[4, 3, 5, 1, 3]) == "2"
    assert finish(given, weights, steps=[4, 5, 3, 1, 3]) == "3"
    assert finish(["1", "2", "3", "3"], np.log([0.1, 0.3, 0.2, 0.2]), steps=[9, 2, 2, 2]) == "3"
    assert finish(["1", "2"], [-np.inf, 0.0], steps=[1, 2]) == "2"  # the dead do not finish
    assert finish(["1"], [-np.inf], steps=[1]) is None


@pytest.mark.statistical
def test_a_planted_weibull_mixture_is_found():
    share, shapes, scales, n, runs = 0.6, np.array([12.0, 4.0]), np.array([0.8, 0.35]), 300, 24
    planted = np.array([share, *np.log(shapes), *np.log(scales)])
    found, better = [], []
    for i in range(runs):
        rng = np.random.default_rng([0, i])
        part = (rng.random(n) >= share).astype(int)
        values = scales[part] * rng.weibull(shapes[part])
        fit = answers.fit_weibull_mixture(values)
        found.append([fit.share, *np.log(fit.shapes), *np.log(fit.scales)])
        truth = answers.WeibullMixture(share, shapes, scales)
        logs = [np.logaddexp(*mixture.log_terms(values)).sum() for mixture in (fit, truth)]
        better.append(2 * (logs[0] - logs[1]))
    # bias of order 1 / n: a tenth of the error of one fit
    spread = np.std(found, axis=0, ddof=1)
    error = np.abs(np.mean(found, 0) - planted)
    assert np.all(error < 0.15 * spread + 4 * spread / np.sqrt(runs)), error / spread
    # twice the log likelihood ratio is chi-square with 5 degrees of freedom
    assert min(better) > 0
    assert abs(np.mean(better) - 5) < 4 * np.sqrt(10 / runs)


def test_the_mixture_is_two_weibull_densities():
    mixture = answers.WeibullMixture(0.3, np.array([2.0, 1.5]), np.array([3.0, 0.5]))
    values = np.array([0.1, 1.0, 7.0])
    terms = [s * scipy.stats.weibull_min.pdf(values, k, scale=c)
             for s, k, c in ((0.3, 2.0, 3.0), (0.7, 1.5, 0.5))]  # fmt: skip
    np.testing.assert_allclose(np.exp(mixture.log_terms(values)), terms)
    np.testing.assert_allclose(mixture.is_high(values), terms[0] / np.sum(terms, axis=0))
    rng = np.random.default_rng(0)
    values = np.concatenate([0.9 * rng.weibull(20, 200), 0.1 * rng.weibull(3, 100)])
    fits = [answers.fit_weibull_mixture(unit * values) for unit in (1.0, 1e-9)]
    np.testing.assert_allclose(fits[0].scales, 1e9 * fits[1].scales, rtol=1e-3)
    assert fits[0].scales[0] > fits[0].scales[1] and abs(fits[0].share - 2 / 3) < 0.01


def test_the_component_with_the_larger_mean_comes_first():
    # the wide component has the larger mean (0.66 to 0.49) though most of its values are small
    rng = np.random.default_rng(0)
    wide = rng.random(1000) < 0.7
    values = np.where(wide, 0.2 * rng.weibull(0.4, 1000), 0.5 * rng.weibull(20, 1000))
    fit = answers.fit_weibull_mixture(values)
    assert fit.shapes[0] < 1 < fit.shapes[1]
    assert abs(fit.share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 1000)


def test_perplexity_consistency_counts_each_text_once():
    given = ["1", "1", "1", "2", "2", None]
    texts = ["a", "a", "a", "b", "c", "d"]
    run = {"texts": texts, "log_probs": np.log([0.5, 0.5, 0.5, 0.4, 0.3, 0.9]) * 10,
           "num_tokens": [10] * 6}  # fmt: skip
    rule = answers.PerplexityConsistency()
    assert rule(given, np.zeros(6), **run) == "2"
    assert rule.confidence(given, np.zeros(6), **run) == pytest.approx({"1": 5 / 12, "2": 7 / 12})
    dead = np.array([0, 0, 0, 0, -np.inf, 0])
    assert rule(given, dead, **run) == "1"
    dead = np.array([-np.inf, 0, 0, 0, 0, 0])  # a copy of the text still lives
    assert rule.confidence(given, dead, **run) == pytest.approx({"1": 5 / 12, "2": 7 / 12})


def test_perplexity_is_per_token_and_probability_is_not():
    given, run = ["1", "2"], {"texts": "ab", "log_probs": [-2.0, -3.0], "num_tokens": [2, 6]}
    tokens = answers.PerplexityConsistency().confidence(given, [0, 0], **run)
    assert tokens["1"] / tokens["2"] == pytest.approx(np.exp(-1 + 0.5))
    whole = answers.PerplexityConsistency(per_token=False).confidence(given, [0, 0], **run)
    assert whole["1"] / whole["2"] == pytest.approx(np.exp(1))
    far = answers.PerplexityConsistency(per_token=False)
    assert far(["1", "2"], [0, 0], texts="ab", log_probs=[-9000.0, -9001.0]) == "1"


def test_pruning_leaves_unlikely_texts_out():
    rng = np.random.default_rng(1)
    high, low = 0.9 * rng.weibull(30, 30), 0.45 * rng.weibull(12, 70)
    p = np.concatenate([high, low])  # the low component has the larger sum
    given = ["1"] * 30 + ["2"] * 70
    run = {"texts": list(map(str, p)), "log_probs": np.log(p), "num_tokens": np.ones(100)}
    kept = answers.PerplexityConsistency().confidence(given, np.zeros(100), **run)
    assert kept == pytest.approx({"1": 1.0})
    assert answers.PerplexityConsistency(prune=False)(given, np.zeros(100), **run) == "2"


def test_pruning_keeps_what_lies_above_the_mean():
    rng = np.random.default_rng(2)
    p = np.concatenate([0.5 * rng.weibull(100, 40), 0.3 * rng.weibull(2, 59), [0.9]])
    mixture = answers.fit_weibull_mixture(p)
    assert mixture.is_high(p)[-1] < 0.01  # the high component is narrow
    given = ["1"] * 40 + ["2"] * 59 + ["3"]
    run = {"texts": list(map(str, p)), "log_probs": np.log(p), "num_tokens": np.ones(100)}
    kept = answers.PerplexityConsistency().confidence(given, np.zeros(100), **run)
    assert kept["3"] / kept["1"] == pytest.approx(0.9 / p[:40].sum(), rel=0.05)


KERNEL = {  # answers to a question with each answer as a hint
    "1": ["1", "1", "2", None],
    "2": ["2", "2", "2", "3"],
    "3": ["2", "1"],
}


def test_hints_are_summed_over():
    matrix = np.array([[2 / 3, 1 / 3, 0], [0, 3 / 4, 1 / 4], [1 / 2, 1 / 2, 0]])
    start = np.array([0.8, 0.0, 0.2])
    asked = []

    def ask(question, hint):
        assert question == "how many?"
        asked.append(hint)
        return KERNEL[hint]

    for rounds in range(4):
        rule = answers.HintMarginal(ask, "how many?", rounds)
        found = rule.distribution(["1", "3"], np.log([0.8, 0.2]))
        exact = start @ np.linalg.matrix_power(matrix, rounds)
        assert found == pytest.approx({y: m for y, m in zip("123", exact, strict=True) if m > 0})
        assert len(asked) == len(set(asked))  # once for each hint
        asked.clear()
    assert answers.HintMarginal(ask, "how many?", 0)(["1", "3"], np.log([0.8, 0.2])) == "1"
    assert answers.HintMarginal(ask, "how many?", 3)(["1", "3"], np.log([0.8, 0.2])) == "2"
    silent = answers.HintMarginal(NO_ANSWERS, "?", 2).distribution(["1", "3"], np.log([0.8, 0.2]))
    assert silent == pytest.approx({"1": 0.8, "3": 0.2})


@pytest.mark.statistical
def test_one_round_of_hints_is_unbiased():
    rng = np.random.default_rng(2)
    exact = {"1": {"1": 0.3, "2": 0.7}, "2": {"1": 0.6, "2": 0.4}}
    ask = lambda _, hint: rng.choice(["1", "2"], 3, p=list(exact[hint].values())).tolist()
    found = [
        answers.HintMarginal(ask, "?").distribution(["1", "2"], np.log([0.9, 0.1])).get("1", 0)
        for _ in range(4000)
    ]
    assert_mean(found, 0.9 * 0.3 + 0.1 * 0.6, family=1, smallest_bias=0.03)


def test_answers_of_one_form_count_as_one():
    given = ["12.0", "7", "7", "12", " 1,2", "24/2", None]
    weights = np.log([0.1, 0.2, 0.15, 0.2, 0.2, 0.15, 0.9])
    assert answers.weighted_majority(given, weights) == "7"
    merged = answers.UpTo(answers.weighted_majority, answers.numeric)
    assert merged(given, weights) == "12.0"
    assert merged.merged(given) == ["12.0", "7", "7", "12.0", " 1,2", "12.0", None]
    first = answers.UpTo(answers.FirstFinish(), answers.numeric)
    assert first.needs == ("steps",)
    assert first(given, weights, steps=[3, 3, 3, 1, 2, 2, 0]) == "12.0"


@pytest.mark.parametrize(
    "text, value",
    [
        ("12", 12), (" +12.50 ", Fraction(25, 2)), ("-1,234,567.", -1234567), (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)), ("-6/08", Fraction(-3, 4)), ("007", 7),
        ("1/0", "1/0"), ("12,34", "12,34"), ("1e9", "1e9"), (" x ", "x"), ("", ""), ("١٢", "١٢"),
        ("9" * 65, "9" * 65), ("1.2/3", "1.2/3"), ("--1", "--1"),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text, value):
    assert answers.numeric(text) == value
