"""`solve` with the shipped models."""

import jax
import numpy as np
import pytest

from smcscale import ParticleFilter
from smcscale.kernels import resampling
from smcscale.models.reasoning import majority, reason, solve, tasks

QUESTIONS = [p.question for p in tasks.problems(77, 2)]


def test_a_solution_is_complete_and_repeats():
    first = solve(QUESTIONS[0], num_particles=4, key=jax.random.key(1))
    again = solve(QUESTIONS[0], num_particles=4, key=jax.random.key(1))
    assert first.answer == again.answer and first.texts == again.texts
    assert len(first.texts) == len(first.answers) == len(first.scores) == 4
    assert first.log_weights.shape == (4,)
    assert first.answer in first.answers
    assert first.log_evidence < 0 and first.cost["tokens"] > 0
    assert all(
        (a is None) or t.endswith(f"Answer: {a}") for a, t in zip(first.answers, first.texts)
    )


def test_a_list_of_questions_and_another_method():
    method = ParticleFilter(reason, resampling=resampling.multinomial, store="last")
    found = solve(QUESTIONS, num_particles=4, method=method, select=majority)
    assert len(found) == 2
    assert all(np.isfinite(s.log_weights).any() for s in found)


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="question is empty"):
        solve("  ")
