"""Export to ArviZ."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.arviz_export import to_arviz

pytest.importorskip("arviz")


def test_groups_dims_and_numbers(chain_result):
    run = chain_result(0, 4, 300)
    data = to_arviz(run)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["x"].dims == ("chain", "draw", "time")
    assert posterior["x"].shape == (4, 300, 4)
    assert posterior["twice"].dims == posterior["double"].dims == ("chain", "draw")
    np.testing.assert_array_equal(posterior["double"], 2 * posterior["x"][:, :, -1])
    assert stats["ess"].dims == ("chain", "time")
    np.testing.assert_allclose(stats["log_evidence"], run.log_evidence)
    # draws inside a run have that run's weights: systematic, so counts within one of N W
    named = eqx.tree_at(lambda r: r.before["twice"], run, jnp.tile(jnp.arange(300), (4, 1)))
    for r, drawn in enumerate(to_arviz(named)["posterior"]["twice"].values):
        expected = np.exp(run.log_weights[r])
        assert (abs(np.bincount(drawn, minlength=300) - expected) < 1 + 1e-3).all()
    again = to_arviz(run)["posterior"]
    np.testing.assert_array_equal(again["x"], posterior["x"])


def test_without_paths_there_is_no_time_axis(chain_result):
    data = to_arviz(chain_result(0, 2, 30, store="last"))
    assert data["posterior"]["x"].dims == ("chain", "draw")


def test_dead_runs_are_left_out(chain_result):
    data = to_arviz(chain_result(1, 3, 30, kill=[1]))
    np.testing.assert_array_equal(data["posterior"]["chain"], [0, 2])
    assert data["sample_stats"]["ess"].shape == (2, 4)
    with pytest.raises(ValueError, match="every particle of every run is dead"):
        to_arviz(chain_result(1, 2, 30, kill=[0, 1]))
