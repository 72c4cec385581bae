"""`solve` with the shipped models."""

import jax
import numpy as np
import pytest

from smcscale import ParticleFilter
from smcscale.kernels import resampling
from smcscale.models.reasoning import answers, majority, methods, reason, solve, tasks

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


METHODS = [
    methods.best_of_n(),
    methods.self_consistency(),
    methods.particle_filter(resampling=resampling.stratified),
    methods.published_filter(),
    methods.entropic_filter(12),
    methods.published_entropic_filter(12),
    methods.look_ahead(2),
    methods.steering(2, 2),
    methods.beam_search(2),
    methods.diverse_trees(2),
    methods.balanced_search(),
]


@pytest.mark.slow  # each compiles a filter of its own
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m.filter.resampling).__name__)
def test_every_method_solves(method):
    found = solve(QUESTIONS[0], num_particles=4, method=method, key=jax.random.key(2))
    assert len(found.texts) == 4 and found.cost["tokens"] > 0
    searched = method.filter.biases != ()
    assert (found.log_evidence is None) == searched


@pytest.mark.parametrize("rule", [answers.FirstFinish(), answers.PerplexityConsistency()])
def test_rules_that_read_more_of_a_run(rule):
    found = solve(QUESTIONS[0], num_particles=4, select=rule, key=jax.random.key(1))
    assert found.answer in found.answers


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="question is empty"):
        solve("  ")


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": 5}, "`question` must be text"),
        ({"question": [1, 2]}, "`question` must be text"),
        ({"lm": "gpt2"}, "`lm` of solve cannot be a str"),
        ({"prm": lambda prompt, texts: [0.5] * len(texts)}, "host_reason"),
        ({"method": "best_of_n"}, r"methods.best_of_n\(\)"),
        ({"method": methods.look_ahead}, "with its brackets"),
        ({"select": "majority"}, "answers.py"),
    ],
)
def test_another_kind_is_refused_by_name(arguments, message):
    with pytest.raises(TypeError, match=message):
        solve(**({"question": QUESTIONS[0]} | arguments))
