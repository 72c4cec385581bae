"""Roll-out labels: shares of right roll-outs at line ends, on stories that training may use."""

import random

import jax
import numpy as np
import pytest

from smcscale.models.reasoning import rollouts
from smcscale.models.reasoning.solve import shipped_language_model


@pytest.mark.slow
def test_labels_are_shares_of_the_roll_outs_from_each_line_end():
    lm = shipped_language_model()
    found, seen = rollouts.label(
        lm.model, lm.tokenizer, random.Random(0), jax.random.key(0),
        stories=4, positions=2, completions=3,
    )  # fmt: skip
    assert 0 <= seen["solved"] <= 1
    assert seen["right step"] > 0.5
    used = ~np.isnan(found.labels)
    ends = (lm.tokenizer.encode("\n")[0], lm.tokenizer.end_tokens[0])
    assert np.isin(found.tokens[used], ends).all()
    assert (np.where(used, np.arange(used.shape[1]), 10**6).min(axis=1) >= found.begin).all()
    # a story has its branches, then the solution they leave, whose labels are shares of 1 + 3
    per_story = 1 + 2 * 3
    for start in range(0, 4 * per_story, per_story):
        labels = found.labels[start : start + per_story].astype(float)
        outcomes = [row[~np.isnan(row)][-1] for row in labels]
        assert set(outcomes) <= {0.0, 1.0}
        whole = labels[-1][~np.isnan(labels[-1])]
        shares = [np.mean([outcomes[-1], *outcomes[i : i + 3]]) for i in (0, 3)]
        assert set(np.round(whole, 2)) <= set(np.round([*shares, outcomes[-1]], 2))
        np.testing.assert_allclose(whole[0], shares[0], atol=1e-3)
