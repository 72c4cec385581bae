"""The methods that have a target keep it: evidence and law by enumeration of a tiny model."""

import jax
import numpy as np
import pytest

from smcscale import SMC
from smcscale.kernels.annealing import FromEntropy, FromProgress
from smcscale.models.reasoning import methods
from smcscale.models.reasoning.program import read_prompt
from support.montecarlo import assert_mean
from support.reasoning import tiny

STEPS, RUNS = 3, 3000
LM, PRM = tiny.language_model(), tiny.reward_model()
TEXTS = tiny.texts(LM, STEPS)
PROBABILITY = np.exp([tiny.log_probability(LM, tokens) for tokens, _ in TEXTS])
SCORE = np.array([float(np.asarray(tiny.scores(PRM, t, e))[-1]) for t, e in TEXTS])

PROPER = {
    "best of n": methods.best_of_n(),
    "filter": methods.particle_filter(),
    "sharp": methods.particle_filter(power=1.5),
    "entropic": methods.entropic_filter(2 * STEPS),
    "entropic, entropy": methods.entropic_filter(2 * STEPS, FromEntropy()),
    "entropic, progress": methods.entropic_filter(2 * STEPS, FromProgress()),
    "look-ahead": methods.look_ahead(3),
    "steering": methods.steering(3, 2),
}


def run(method, num_runs):
    smc = SMC(
        method.filter, num_particles=6, num_runs=num_runs, num_islands=method.num_islands,
        progress_bar=False,
    )  # fmt: skip
    prompt = read_prompt(LM, PRM, tiny.PROMPT)
    smc.run(jax.random.key(5), LM, PRM, prompt, max_steps=STEPS, **method.options)
    return smc


#: the others differ from these in a schedule that the kernels' own tests look at
QUICK = ("entropic", "steering", "sharp")


@pytest.mark.statistical
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PROPER]
)
def test_evidence_and_law_are_exact(name):
    smc = run(PROPER[name], RUNS)
    judged = SCORE**1.5 if name == "sharp" else SCORE
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    assert_mean(evidence / (PROBABILITY @ judged), 1.0, family=2 * len(PROPER), smallest_bias=0.03)
    # mass of the texts of one step, which every method meets at another row
    short = np.array([len(ends) == 1 for _, ends in TEXTS])
    samples, log_weights = smc.get_samples(weighted=True)
    weights = np.exp(np.asarray(log_weights, np.float64)).reshape(RUNS, -1)
    begins = np.asarray(samples["step"].written.length).reshape(RUNS, -1)
    one_step = {len(t) for (t, _), s in zip(TEXTS, short, strict=True) if s}
    chosen = np.isin(begins, list(one_step))
    longer = np.array([len(t) in one_step for t, _ in TEXTS])
    share = evidence * (weights * chosen).sum(1) / weights.sum(1)
    expected = PROBABILITY[longer] @ judged[longer]
    assert_mean(share / expected, 1.0, family=2 * len(PROPER), smallest_bias=0.1)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(methods.published_entropic_filter(STEPS), marks=pytest.mark.slow),
        methods.beam_search(2),
        pytest.param(methods.diverse_trees(2), marks=pytest.mark.slow),
        pytest.param(methods.balanced_search(), marks=pytest.mark.slow),
    ],
    ids=["entropic as published", "beam", "trees", "balanced"],
)
def test_searches_have_no_evidence(method):
    smc = run(method, 2)
    with pytest.raises(ValueError, match="target"):
        smc.log_evidence  # noqa: B018


def test_a_power_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="power"):
        methods.particle_filter(0.0)
