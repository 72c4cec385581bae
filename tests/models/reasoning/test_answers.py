"""Choosing one answer from weighted answers."""

import jax
import numpy as np
import pytest

from smcscale.models.reasoning import answers

ANSWERS = ["7", "8", "8", None, "9"]
LOG_WEIGHTS = np.log([0.45, 0.2, 0.2, 0.9, 0.15])


def test_each_rule_chooses_what_it_says():
    assert answers.weighted_majority(ANSWERS, LOG_WEIGHTS) == "7"
    assert answers.majority(ANSWERS, LOG_WEIGHTS) == "8"
    assert answers.argmax(ANSWERS, LOG_WEIGHTS) == "7"
    assert answers.argmax(ANSWERS, LOG_WEIGHTS, scores=[0, 0, 0, 1, 0.5]) == "9"


def test_weights_may_be_far_from_one_and_dead():
    assert answers.weighted_majority(["1", "2"], [-2000.0, -2001.0]) == "1"
    assert answers.weighted_majority(["1", "2"], [-np.inf, 5000.0]) == "2"


def test_without_any_answer_there_is_none():
    for rule in (answers.weighted_majority, answers.majority, answers.argmax):
        assert rule([None, None], [0.0, 0.0]) is None
    assert answers.sample([None], [0.0], key=jax.random.key(0)) is None


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
