"""Readouts of a result against the exact answer of a two-state chain."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import readout
from smcscale import result as results
from smcscale.result import Moments, Result

MANY = 20_000


def test_exact_numbers_are_those_of_the_algorithm_notes(chain_exact):
    log_evidence, filtered, smoothed = chain_exact
    assert log_evidence == pytest.approx(-3.20722, abs=1e-5)
    np.testing.assert_allclose(smoothed, [0.44111, 0.63267, 0.62104, 0.38778], atol=1e-5)
    assert filtered[-1] == pytest.approx(smoothed[-1])


@pytest.mark.statistical
def test_pooling_by_evidence_removes_the_bias_that_one_vote_per_run_keeps(
    chain_result, chain_exact
):
    """Few particles, many runs: the pooled estimate is right, the mean of means is not."""
    _, filtered, smoothed = chain_exact
    run = chain_result(0, MANY, 4)
    table = results.filter(run)
    votes = np.asarray(run.moments.mean["x"])
    share = np.exp(np.asarray(run.diagnostics.log_evidence))
    share = share / share.mean(0)
    for t in range(4):
        pooled = float(table.mean["x"][t])
        around = share[:, t] * (votes[:, t] - pooled)
        error = around.std(ddof=1) / np.sqrt(MANY)
        assert 6 * error < 0.05
        assert abs(pooled - filtered[t]) < 4 * error
    error = votes[:, 3].std(ddof=1) / np.sqrt(MANY)
    assert abs(votes[:, 3].mean() - filtered[3]) > 4 * error, "the bias to be removed is seen"
    # whole paths: the smoothing law
    samples = results.get_samples(run)
    assert samples["x"].shape == (MANY * 4, 4)
    assert samples["twice"].shape == samples["double"].shape == (MANY * 4,)
    np.testing.assert_allclose(np.mean(samples["x"], 0), smoothed, atol=0.04)


def test_a_path_keeps_what_was_drawn_before_and_after_the_loop(chain_result):
    run = chain_result(1, 3, 50)
    samples = results.get_samples(run)
    np.testing.assert_array_equal(samples["double"], 2 * samples["x"][:, -1])
    np.testing.assert_array_equal(samples["twice"], 2 * samples["x"][:, 0])


def test_draws_are_the_same_at_each_call_and_in_random_order(chain_result):
    run = chain_result(2, 3, 500)
    index = results.Result(
        **{f: getattr(run, f) for f in Result.__dataclass_fields__ if f != "final"},
        final={"x": jnp.arange(1500).reshape(3, 500)},
    )
    index = eqx.tree_at(lambda r: r.history, index, None)
    first, again = results.get_samples(index)["x"], results.get_samples(index)["x"]
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first[:200] // 500)) == 3, "any slice sees all runs"
    weights = np.exp(results.pooled_log_weights(run)).reshape(-1)
    expected = 1500 * weights / weights.sum()
    counts = np.bincount(first, minlength=1500)
    assert (abs(counts - expected) < 1 + 1e-6).all()


def test_weighted_samples_carry_the_evidence(chain_result):
    run = chain_result(3, 4, 30)
    samples, log_weights = results.get_samples(run, weighted=True)
    assert samples["x"].shape == (120, 4)
    total = np.logaddexp.reduce(np.asarray(log_weights)) - np.log(4)
    assert total == pytest.approx(results.pooled_log_evidence(run), abs=1e-5)
    mean = np.sum(np.exp(log_weights) * samples["x"][:, -1]) / np.sum(np.exp(log_weights))
    assert mean == pytest.approx(float(results.filter(run).mean["x"][-1]), abs=1e-5)


def test_store_changes_the_time_axis_only(chain_result):
    kept, last = chain_result(4, 2, 40), chain_result(4, 2, 40, store="last")
    np.testing.assert_array_equal(
        results.get_samples(kept)["x"][:, -1], results.get_samples(last)["x"]
    )
    assert last.store == "last" and kept.store == "paths"


def test_a_dead_run_counts_as_zero(chain_result):
    run, alive = chain_result(5, 4, 100, kill=[1]), chain_result(5, 4, 100)
    keep = np.array([0, 2, 3])
    log_evidence = np.asarray(alive.log_evidence)[keep]
    assert results.pooled_log_evidence(run) == pytest.approx(
        np.logaddexp.reduce(log_evidence) - np.log(4), rel=1e-6
    )
    assert np.isfinite(results.filter(run).mean["x"]).all()
    assert np.isfinite(results.filter(run).variance["x"]).all()
    assert np.isfinite(results.filter(run).quantiles(0.5)["x"]).all()
    draws = readout.systematic_indices(
        jax.random.key(0), results.pooled_log_weights(run).reshape(-1)
    )
    assert not ((draws >= 100) & (draws < 200)).any()


def test_all_runs_dead(chain_result):
    run = chain_result(6, 2, 10, kill=[0, 1])
    assert results.pooled_log_evidence(run) == -np.inf
    with pytest.raises(ValueError, match="nothing to sample from"):
        results.get_samples(run)
    _, log_weights = results.get_samples(run, weighted=True)
    assert (np.asarray(log_weights) == -np.inf).all()


def test_no_target_refuses_the_evidence_by_name_and_gives_each_run_one_vote(chain_result):
    run = chain_result(7, 3, 20, biases=("asymptotic: metropolis", "no target: top_k"))
    with pytest.raises(ValueError, match="top_k chooses particles without a target"):
        results.pooled_log_evidence(run)
    with pytest.raises(ValueError, match="top_k"):
        results.require_evidence(run)
    shares = np.exp(results.pooled_log_weights(run)).sum(1)
    np.testing.assert_allclose(shares, 1, rtol=1e-5)
    results.require_evidence(chain_result(7, 3, 20, biases=("asymptotic: metropolis",)))


def test_filter_quantiles(chain_result):
    run = chain_result(8, 3, 200)
    table = results.filter(run)
    three = table.quantiles([0.05, 0.5, 0.95])["x"]
    assert three.shape == (3, 4)
    np.testing.assert_array_equal(table.quantiles(0.5)["x"], three[1])
    assert results.filter(run, per_run=True).quantiles([0.1, 0.9])["x"].shape == (2, 3, 4)
    assert results.filter(run, per_run=True).quantiles(0.1)["x"].shape == (3, 4)
    # state 1 has probability p: the quantile jumps from 0 to 1 at 1 - p
    p = np.asarray(table.mean["x"])
    for t in range(4):
        assert table.quantiles(1 - p[t] - 0.01, [t])["x"][0] == 0
        assert table.quantiles(1 - p[t] + 0.01, [t])["x"][0] == 1
    with pytest.raises(ValueError, match=r'store="paths"'):
        results.filter(chain_result(8, 3, 20, store="last")).quantiles(0.5)
    with pytest.raises(ValueError, match="0, 1"):
        table.quantiles(5)


def test_pooled_variance_has_the_spread_between_runs(chain_result):
    """Law of total variance: for a state in {0, 1} it must be p (1 - p)."""
    table = results.filter(chain_result(9, 5, 7))
    np.testing.assert_allclose(
        table.variance["x"], table.mean["x"] * (1 - table.mean["x"]), atol=1e-6
    )


def test_weighted_quantiles_against_repeated_values():
    values = np.array([3.0, 1.0, 2.0, 9.0])
    weights = np.array([2, 1, 1, 0]) / 4
    repeated = np.array([3, 3, 1, 2])
    q = np.array([0, 0.1, 0.25, 0.26, 0.5, 0.51, 1.0])
    expected = np.quantile(repeated, q, method="inverted_cdf")
    np.testing.assert_array_equal(readout.weighted_quantiles(values, weights, q), expected)


def test_plain_states_and_other_leaves_are_tolerated(chain_result):
    """A plain Feynman-Kac state is returned as it is, keys and token blocks included."""
    run = chain_result(10, 2, 6, store="last")
    keys = jax.random.split(jax.random.key(0), (2, 6))
    state = {"tokens": jnp.zeros((2, 6, 5), jnp.int32), "key": keys}
    parts = {f: getattr(run, f) for f in Result.__dataclass_fields__}
    parts |= {"before": {}, "after": {}, "final": (state, jnp.ones((2, 6)))}
    parts["moments"] = Moments(mean=None, variance=None)
    got, ones = results.get_samples(Result(**parts))
    assert got["tokens"].shape == (12, 5) and got["key"].shape == (12,) and ones.shape == (12,)
    assert set(results.sites(parts["final"])) == {"0.key", "0.tokens", "1"}
