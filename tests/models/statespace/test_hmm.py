"""Forward sums and forward-backward against enumeration of all paths and published numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.models.statespace import HiddenMarkov, hmm_filter, hmm_smoother, log_emissions

PUBLISHED = HiddenMarkov(
    initial=jnp.array([0.6, 0.4]),
    transition=jnp.array([[0.9, 0.1], [0.2, 0.8]]),
    emission=jnp.array([[0.8, 0.2], [0.3, 0.7]]),
)


def random_model(seed: int, states: int, symbols: int) -> HiddenMarkov:
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), states)
    transition[0, 1] = 0.0  # a move that cannot happen
    transition /= transition.sum(1, keepdims=True)
    return HiddenMarkov(
        jnp.asarray(rng.dirichlet(np.ones(states))),
        jnp.asarray(transition),
        jnp.asarray(rng.dirichlet(np.ones(symbols), states)),
    )


def enumerate_paths(model: HiddenMarkov, likelihoods):
    """Probability of every path of states with the data; `likelihoods` (T + 1, K)."""
    initial, transition = np.asarray(model.initial), np.asarray(model.transition)
    paths = list(itertools.product(range(len(initial)), repeat=len(likelihoods)))
    probs = []
    for path in paths:
        p = initial[path[0]] * likelihoods[0, path[0]]
        for t in range(1, len(path)):
            p *= transition[path[t - 1], path[t]] * likelihoods[t, path[t]]
        probs.append(p)
    return np.array(paths), np.array(probs)


@pytest.mark.parametrize("first_seen", [False, True])
@pytest.mark.parametrize("states", [2, 3])
def test_equals_enumeration(states, first_seen):
    with jax.enable_x64(True):
        model = random_model(states, states, 4)
        symbols = np.array([1, 0, 3, -1, 2])  # -1: missing
        seen = log_emissions(model.emission, symbols)
        first = seen[0] if first_seen else None
        likelihoods = np.exp(np.asarray(seen))
        if not first_seen:
            likelihoods[0] = 1.0
        paths, probs = enumerate_paths(model, likelihoods)
        filtered = hmm_filter(
            model.initial, model.transition, seen[1:], initial_log_likelihood=first
        )
        smoothed = hmm_smoother(model.transition, seen[1:], filtered)
    np.testing.assert_allclose(filtered.log_evidence, np.log(probs.sum()), rtol=1e-12)
    posterior = probs / probs.sum()
    for t in range(len(symbols)):
        exact = np.array([posterior[paths[:, t] == k].sum() for k in range(states)])
        ours = smoothed.initial_probs if t == 0 else smoothed.probs[t - 1]
        np.testing.assert_allclose(ours, exact, atol=1e-12)
        past, past_probs = enumerate_paths(model, likelihoods[: t + 1])
        exact = np.array([past_probs[past[:, t] == k].sum() for k in range(states)])
        ours = filtered.initial_log_probs if t == 0 else filtered.log_probs[t - 1]
        np.testing.assert_allclose(np.exp(ours), exact / exact.sum(), atol=1e-12)
    for t in range(1, len(symbols)):
        for j, k in itertools.product(range(states), repeat=2):
            exact = posterior[(paths[:, t - 1] == j) & (paths[:, t] == k)].sum()
            np.testing.assert_allclose(smoothed.pair_probs[t - 1, j, k], exact, atol=1e-12)


def test_published_numbers():
    seen = log_emissions(PUBLISHED.emission, jnp.array([0, 1, 1, 0]))
    filtered = hmm_filter(
        PUBLISHED.initial, PUBLISHED.transition, seen[1:], initial_log_likelihood=seen[0]
    )
    smoothed = hmm_smoother(PUBLISHED.transition, seen[1:], filtered)
    np.testing.assert_allclose(filtered.log_evidence, -3.20722, atol=1e-5)
    ours = jnp.concatenate([smoothed.initial_probs[None], smoothed.probs])[:, 1]
    np.testing.assert_allclose(ours, [0.44111, 0.63267, 0.62104, 0.38778], atol=1e-5)
    np.testing.assert_allclose(jnp.exp(filtered.log_probs[-1, 1]), 0.38778, atol=1e-5)


def test_impossible_data_have_evidence_zero_and_no_nan():
    emission = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    seen = log_emissions(emission, jnp.array([0, 1, 0]))
    filtered = hmm_filter(PUBLISHED.initial, PUBLISHED.transition, seen)
    assert filtered.log_evidence == -jnp.inf
    assert not jnp.isnan(filtered.log_probs).any()


def test_jit_and_vmap_over_series():
    symbols = jnp.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])

    def evidence(row):
        seen = log_emissions(PUBLISHED.emission, row)
        return hmm_filter(PUBLISHED.initial, PUBLISHED.transition, seen).log_evidence

    together = jax.jit(jax.vmap(evidence))(symbols)
    np.testing.assert_allclose(together, [evidence(row) for row in symbols], rtol=1e-6)
