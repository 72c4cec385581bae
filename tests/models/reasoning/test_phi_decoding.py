"""phi-decoding: its stages by hand, its draws by enumeration, its tokens counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.models.reasoning import tasks
from smcscale.models.reasoning.phi_decoding import (
    clustered,
    foreseeing,
    kept_by_width,
    phi_decoding,
    selection_weights,
    tf_idf,
)
from smcscale.models.reasoning.search_problem import Budget
from smcscale.models.reasoning.solve import shipped_language_model
from support.reasoning import tiny

LM = tiny.language_model(step_tokens=1)


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def test_improbable_steps_are_dropped():
    probable = np.array([-0.1, -0.2, -3.0, -0.15])  # mean -0.86, standard deviation 1.24
    key = jax.random.key(0)
    assert kept_by_width(key, probable, 2, 0.1, 1.0) == [0, 1, 3]
    assert kept_by_width(key, probable, 2, 0.1, 2.0) == [0, 1, 2, 3]
    assert kept_by_width(key, probable, 4, 0.1, 1.0) == [0, 1, 2, 3]  # topped up
    assert kept_by_width(key, np.full(4, -1.0), 2, 0.1, 1.0) in [
        sorted(pair) for pair in itertools.combinations(range(4), 2)
    ]  # nothing is above the mean: all drawn


@pytest.mark.statistical
def test_what_is_missing_is_drawn_without_replacement_by_probability():
    probable = np.array([-1.0, -1.05, -1.1])
    # spread < 0 drops all of them but the best, which is kept; so draw one of the other two
    counts = {2: 0, 1: 0}
    for key in jax.random.split(jax.random.key(0), 600):
        kept = kept_by_width(key, probable, 2, 0.1, -1.0)
        assert kept[0] == 0 and len(kept) == 2
        counts[kept[1]] += 1
    chance = softmax(probable[1:] / 0.1)[0]
    assert scipy.stats.binomtest(counts[1], 600, chance).pvalue > 1e-3


def test_rare_tokens_weigh_more_and_rows_have_unit_length():
    texts = [np.array([5, 5, 7]), np.array([5, 9]), np.array([5])]
    rows = tf_idf(texts)
    idf = np.log(4 / (1 + np.array([3, 1, 1]))) + 1  # of 5, 7, 9
    expected = np.array([[2, 1, 0], [1, 0, 1], [1, 0, 0]]) * idf
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected)
    assert tf_idf([np.zeros(0, np.int32)] * 2).shape == (2, 0)
    assert tf_idf([np.zeros(0, np.int32), np.array([3])]).tolist() == [[0.0], [1.0]]


def test_clusters_are_found_and_copies_make_fewer():
    rng = np.random.default_rng(0)
    truth = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    rows = np.eye(3)[truth] + 0.05 * rng.normal(size=(9, 3))
    labels = clustered(rows, 3)
    assert all(
        (labels[i] == labels[j]) == (truth[i] == truth[j])
        for i, j in itertools.combinations(range(9), 2)
    )
    same = clustered(np.ones((4, 2)), 3)
    assert (same == 0).all()
    # of all ways to part seven points in two, none has a smaller sum of squares
    points = np.array([[0.0], [0.1], [0.3], [2.0], [2.2], [2.3], [2.9]])

    def within(labels):
        return sum(
            ((points[labels == i] - points[labels == i].mean()) ** 2).sum() for i in set(labels)
        )

    found = within(clustered(points, 2))
    parts = (np.array(p) for p in itertools.product((0, 1), repeat=7) if len(set(p)) == 2)
    assert found == pytest.approx(min(within(p) for p in parts))


def test_weights_are_half_advantage_and_half_agreement():
    advantages, labels = np.array([0.1, 0.0, -0.2, 0.05]), np.array([0, 0, 0, 1])
    expected = (softmax(advantages / 0.1) + softmax(np.array([0.75, 0.75, 0.75, 0.25]))) / 2
    np.testing.assert_allclose(selection_weights(advantages, labels, 0.1), expected)
    assert selection_weights(advantages, labels, 0.1).sum() == pytest.approx(1)
    assert np.isfinite(selection_weights(1000 * advantages, labels, 0.1)).all()


def tokens_of(state):
    return tuple(np.asarray(state.written.tokens)[: int(state.written.length)].tolist())


def test_scores_of_steps_and_texts_are_probabilities_per_token():
    problem = foreseeing(LM, tiny.PROMPT, batch=6)
    roots = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), problem.step.root)
    steps, first, cost = problem.step.expand(jax.random.key(0), roots, 6)
    texts, rest, more = problem.finish.expand(jax.random.key(1), steps, 4)
    for row in range(4):
        state, step = (jax.tree.map(lambda leaf, row=row: leaf[row], s) for s in (texts, steps))
        whole, begun = tokens_of(state), tokens_of(step)
        assert whole[: len(begun)] == begun and bool(state.finished)
        log_begun, log_whole = (tiny.log_probability(LM, t) for t in (begun, whole))
        assert np.log(first[row]) == pytest.approx(log_begun / len(begun), abs=1e-4)
        added = len(whole) - len(begun)
        assert np.log(rest[row]) == pytest.approx((log_whole - log_begun) / max(added, 1), abs=1e-4)
        assert int(cost["tokens"][row]) == len(begun) and int(more["tokens"][row]) == added
    assert (np.asarray(more["tokens"])[4:] == 0).all()  # padding is not written


def recorded(problem):
    """The problem, and a list of what was written by it."""
    seen = []

    def watched(part):
        def expand(key, states, count):
            children, scores, cost = part.expand(key, states, count)
            seen.append(int((children.written.length - states.written.length)[:count].sum()))
            return children, scores, cost

        return part._replace(expand=expand, text=None)

    return problem._replace(step=watched(problem.step), finish=watched(problem.finish)), seen


@pytest.mark.parametrize("limit", [8, 60, 10_000])
def test_every_token_is_counted_and_the_budget_holds(limit):
    problem, seen = recorded(foreseeing(LM, tiny.PROMPT, batch=4))
    options = {"beams": 2, "rollouts": 2}
    found = phi_decoding(jax.random.key(0), problem, budget=Budget(tokens=limit), **options)
    assert found.cost["tokens"] == sum(seen) <= limit
    assert 1 <= len(found.states) <= 2 and all(bool(state.finished) for state in found.states)
    assert found.tree.depths.max() == (1 if limit == 8 else found.tree.depths.max())
    assert len(seen) == 1 if limit == 8 else len(seen) > 1
    for node, state in zip(found.nodes, found.states, strict=True):
        lengths = len(tokens_of(state))
        assert found.tree.depths[node] <= lengths


def test_small_budgets_and_batches_are_refused():
    problem = foreseeing(LM, tiny.PROMPT, batch=4)
    with pytest.raises(ValueError, match="may never end"):
        phi_decoding(jax.random.key(0), problem, budget=Budget())
    with pytest.raises(ValueError, match="cannot pay for one text"):
        phi_decoding(jax.random.key(0), problem, budget=Budget(tokens=3), beams=2, rollouts=2)
    with pytest.raises(ValueError, match="need a batch of 16"):
        phi_decoding(jax.random.key(0), problem, budget=Budget(tokens=300))


@pytest.mark.slow
def test_the_shipped_model_writes_whole_solutions():
    story = tasks.problems(seed=11, count=4)[3]
    problem = foreseeing(shipped_language_model(), story.question + "\n", batch=4)
    options = {"beams": 2, "rollouts": 2, "foresights": 3, "least_foresights": 2}
    found = phi_decoding(jax.random.key(0), problem, budget=Budget(tokens=4000), **options)
    assert len(found.texts) == 2 and all("Answer:" in text for text in found.texts)
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    written = [int(state.written.length) for state in found.states]
    assert sum(written) < found.cost["tokens"] <= 4000
