"""The text of `print_summary`."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import summary
from smcscale.result import filter, get_samples


def test_numbers_of_the_table(chain_result):
    run = chain_result(0, 4, 500)
    text = summary.summary_text(run)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert text.splitlines()[1].split() == ["mean", "std", "median", "5.0%", "95.0%"]
    table = filter(run)
    for t in range(4):
        mean, std = float(rows[f"x[t={t}]"][0]), float(rows[f"x[t={t}]"][1])
        assert mean == pytest.approx(float(table.mean["x"][t]), abs=1e-4)
        assert std == pytest.approx(float(table.std["x"][t]), abs=1e-4)
        assert rows[f"x[t={t}]"][2:] == [f"{q:.4f}" for q in (round(mean), 0, 1)]
    samples, log_weights = get_samples(run, weighted=True)
    w = np.exp(log_weights) / np.exp(log_weights).sum()
    assert float(rows["twice"][0]) == pytest.approx(float((w * samples["twice"]).sum()), abs=1e-4)
    assert "500 x 4 runs, 4 steps, store=paths" in text
    assert "between 4 runs (ESS over runs" in text
    assert "warning       a static parameter degenerates" in text
    assert "seconds 0.50" in text and "particle_steps 8,000" in text


def test_earlier_steps_have_no_quantiles_without_paths(chain_result):
    rows = summary.summary_text(chain_result(0, 2, 50, store="last")).splitlines()
    assert len(next(r for r in rows if "x[t=0]" in r).split()) == 3
    assert len(next(r for r in rows if "x[t=3]" in r).split()) == 6


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_runs": 1}, "from the genealogy of one run"),
        ({"num_runs": 2, "biases": ["no target: beam"]}, "beam leaves no target distribution"),
        ({"num_runs": 2, "biases": ["asymptotic: metropolis"]}, "metropolis: evidence and means"),
        ({"num_runs": 3, "kill": [1]}, "1 run, first at step 0"),
        ({"num_runs": 2, "kill": [0, 1]}, "every particle of every run is dead"),
    ],
)
def test_doubts_are_said(chain_result, options, found):
    assert found in summary.summary_text(chain_result(1, num_particles=400, **options))


def test_steps_and_rows_on_demand(chain_result):
    run = chain_result(2, 2, 20)
    assert summary.summary_text(run, times=1).count("x[t=") == 1
    assert summary.summary_text(run, times=[1, 2]).count("x[t=") == 3
    with pytest.raises(ValueError, match="0..3"):
        summary.summary_text(run, times=[9])
    wide = eqx.tree_at(lambda r: r.after, run, {"map": jnp.ones((2, 20, 5, 6))})
    text = summary.summary_text(wide, max_rows=3)
    assert "map[0,2]" in text and "map[0,3]" not in text and "map +27" in text
    assert "map[4,5]" in summary.summary_text(wide, max_rows=None)


def test_leaves_that_are_no_numbers_are_skipped(chain_result):
    run = chain_result(3, 2, 6, store="last")
    keys = jax.random.split(jax.random.key(0), (2, 6))
    run = eqx.tree_at(lambda r: r.after, run, {"key": keys, "double": jnp.ones((2, 6))})
    text = summary.summary_text(run)
    assert "double" in text and "key" not in text


def test_it_prints_to_a_file(chain_result):
    out = io.StringIO()
    summary.print_summary(chain_result(4, 2, 20), file=out)
    assert "log evidence" in out.getvalue()
