"""Errors of the evidence, against many replicates."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import diagnostics


def test_error_between_runs_is_the_delta_method(chain_result):
    run = chain_result(0, 8, 100)
    z = np.exp(np.asarray(run.log_evidence, np.float64))
    error = diagnostics.log_evidence_error(run)
    assert error.source == "runs" and error.note == ""
    assert float(error) == pytest.approx(z.std(ddof=1) / np.sqrt(8) / z.mean(), rel=1e-6)
    assert diagnostics.ess_over_runs(run) == pytest.approx(z.sum() ** 2 / (z**2).sum(), rel=1e-6)


def test_one_dominating_run_is_told(chain_result):
    run = chain_result(0, 8, 10)
    run = eqx.tree_at(lambda r: r.log_evidence, run, jnp.arange(8.0) * 10)
    error = diagnostics.log_evidence_error(run)
    assert "1.0 of 8 runs carry the evidence" in error.note


@pytest.mark.statistical
@pytest.mark.parametrize("resample", [True, False])
def test_single_run_variance_has_the_right_mean(chain_result, resample):
    """`E[Z^2 V] = Var(Z)`, seen to within 15%; without resampling V is the variance of a mean."""
    runs = chain_result(1, 20_000, 10, resample=resample)
    z = np.exp(np.asarray(runs.log_evidence, np.float64))
    v = diagnostics.genealogical_variance(runs)
    estimates = z**2 * v
    error = np.hypot(estimates.std() / np.sqrt(len(z)), z.var() * np.sqrt(2 / len(z)) * 1.5)
    assert 6 * error < 0.15 * z.var()
    assert abs(estimates.mean() - z.var(ddof=1)) < 4 * error
    if not resample:
        w = np.exp(np.asarray(runs.log_weights))
        np.testing.assert_allclose(v, w.var(1, ddof=1) / 10 / w.mean(1) ** 2, rtol=1e-3)


def test_one_run_uses_its_genealogy_or_says_why_not(chain_result):
    run = chain_result(2, 1, 500)
    error = diagnostics.log_evidence_error(run)
    v = diagnostics.genealogical_variance(run)[0]
    assert error.source == "genealogy" and error.value == pytest.approx(np.sqrt(v))
    bare = eqx.tree_at(lambda r: r.eve, run, None, is_leaf=lambda x: x is None)
    error = diagnostics.log_evidence_error(bare)
    assert error.source == "none" and np.isnan(error.value) and "num_runs" in error.note
    with pytest.raises(ValueError, match="multinomial resampling only"):
        diagnostics.genealogical_variance(bare)
    same = eqx.tree_at(lambda r: r.eve, run, jnp.zeros_like(run.eve))
    error = diagnostics.log_evidence_error(same)
    assert error.value == pytest.approx(1) and "descend from one" in error.note


def test_changing_number_of_particles_is_refused(chain_result):
    run = chain_result(2, 1, 50)
    run = eqx.tree_at(lambda r: r.diagnostics.num_particles, run, np.array([50, 50, 25, 25]))
    with pytest.raises(ValueError, match="constant number of particles"):
        diagnostics.genealogical_variance(run)
    assert diagnostics.log_evidence_error(run).source == "none"


def test_dead_and_targetless_runs(chain_result):
    dead = chain_result(3, 2, 10, kill=[0, 1])
    assert diagnostics.log_evidence_error(dead).source == "none"
    assert diagnostics.ess_over_runs(dead) == 0
    assert np.isnan(diagnostics.genealogical_variance(dead)).all()
    half = chain_result(3, 2, 10, kill=[0])
    assert diagnostics.log_evidence_error(half).value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="beam"):
        diagnostics.log_evidence_error(chain_result(3, 2, 10, biases=("no target: beam",)))


@pytest.mark.statistical
def test_error_of_a_mean(chain_result):
    """The stated error is the spread over replicates of the pooled estimate, within 25%."""
    means, errors = [], []
    for seed in range(200):
        run = chain_result(seed, 20, 20, store="last")
        z = np.exp(np.asarray(run.log_evidence, np.float64))
        per_run = np.asarray(run.moments.mean["x"])[:, -1]
        means.append((z * per_run).sum() / z.sum())
        errors.append(diagnostics.mean_error(run, per_run))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.25)
