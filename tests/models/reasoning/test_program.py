"""`reason` on a language model small enough to enumerate: evidence, law, finished texts."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import resampling
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import program
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.program import reason
from support.montecarlo import assert_mean
from support.reasoning import tiny

STEPS = 3
RUNS = 4000
LM = tiny.language_model()
PRM = tiny.reward_model()
TEXTS = tiny.texts(LM, STEPS)
PROBABILITY = np.exp([tiny.log_probability(LM, tokens) for tokens, _ in TEXTS])
SCORES = [np.asarray(tiny.scores(PRM, tokens, ends)) for tokens, ends in TEXTS]


def finished(tokens):
    return tokens[-1] == tiny.STOP or len(tokens) == LM.max_tokens


def weight(scores, tokens, potential, rule):
    """The product of potentials of one text, straight from the table of `program.py`."""
    again = STEPS - len(scores) if rule == "reweigh" and finished(tokens) else 0
    if potential is program.difference:
        return scores[-1]
    terms = scores if potential is program.product else scores / (1 - scores)
    return np.prod(terms) * terms[-1] ** again


CASES = [  # potential, finished, trigger (None: the default), smallest bias to see
    pytest.param(program.difference, "absorb", None, 0.03, marks=pytest.mark.slow),
    (program.difference, "absorb", always, 0.03),
    pytest.param(program.product, "absorb", always, 0.03, marks=pytest.mark.slow),
    pytest.param(program.odds, "absorb", None, 0.03, marks=pytest.mark.slow),
    (program.odds, "reweigh", always, 0.05),
]


def run(key, potential, rule, trigger, num_particles=8, num_runs=RUNS, store="last"):
    options = {} if trigger is None else {"trigger": trigger}
    smc = SMC(
        ParticleFilter(reason, resampling=resampling.systematic, store=store, **options),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    prompt = program.read_prompt(LM, PRM, tiny.PROMPT)
    smc.run(key, LM, PRM, prompt, max_steps=STEPS, potential=potential, finished=rule)
    return smc


def test_the_texts_are_all_there():
    assert abs(PROBABILITY.sum() - 1) < 1e-5
    spread = np.concatenate(SCORES)
    assert spread.min() < 0.4 and spread.max() > 0.6  # a reward that says something


@pytest.mark.statistical
@pytest.mark.parametrize(("potential", "rule", "trigger", "bias"), CASES)
def test_evidence_and_law_are_exact(potential, rule, trigger, bias):
    smc = run(jax.random.key(11), potential, rule, trigger)
    weights = np.array(
        [weight(s, t, potential, rule) for s, (t, _) in zip(SCORES, TEXTS, strict=True)]
    )
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    exact = float(PROBABILITY @ weights)
    assert_mean(evidence / exact, 1.0, family=2 * len(CASES), smallest_bias=bias)

    # the unnormalized share of texts that ended by themselves
    samples, log_weights = smc.get_samples(weighted=True)
    written = samples["step"].written
    tokens, length = np.asarray(written.tokens), np.asarray(written.length)
    last = np.take_along_axis(tokens, np.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    pooled = np.exp(np.asarray(log_weights, np.float64))
    pooled = (pooled / pooled.sum() * (last == tiny.STOP)).reshape(RUNS, -1)
    replicates = evidence.sum() * pooled.sum(axis=1)
    ended = np.array([tokens[-1] == tiny.STOP for tokens, _ in TEXTS])
    wanted = float(PROBABILITY @ (weights * ended))
    assert_mean(replicates / wanted, 1.0, family=2 * len(CASES), smallest_bias=2 * bias)


def test_scores_are_those_of_a_full_pass_and_tokens_are_counted():
    smc = run(jax.random.key(2), program.difference, "absorb", None, num_particles=6, num_runs=1)
    samples, _ = smc.get_samples(weighted=True)
    written = samples["step"].written
    tokens, length = np.asarray(written.tokens), np.asarray(written.length)
    table = {text: scores for (text, _), scores in zip(TEXTS, SCORES, strict=True)}
    for row, n, score in zip(tokens, length, np.asarray(samples["score"]), strict=True):
        np.testing.assert_allclose(score, table[tuple(row[:n].tolist())][-1], atol=1e-5)
    assert smc.cost["tokens"] == smc.cost["prm_tokens"] >= length.sum() - LM.max_tokens * 6
    assert smc.cost["tokens"] > 0


def test_text_and_read_prompts_give_the_same_numbers():
    prompt = program.read_prompt(LM, PRM, tiny.PROMPT)
    smc = SMC(ParticleFilter(reason), num_particles=4, progress_bar=False)
    found = []
    for given in (prompt, tiny.PROMPT):
        smc.run(jax.random.key(0), LM, PRM, given, max_steps=2)
        found.append(float(smc.log_evidence[0]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_plain_numpyro_runs_the_program():
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(
            lambda: reason(LM, PRM, jnp.asarray(tiny.PROMPT), max_steps=2)
        ).get_trace()
    assert trace["score"]["value"].shape == (2,)


def test_another_kernel_serves_as_well():
    smc = SMC(
        ParticleFilter(reason, resampling=resampling.multinomial, trigger=always),
        num_particles=4,
        num_runs=2,
        progress_bar=False,
    )
    smc.run(jax.random.key(0), LM, PRM, program.read_prompt(LM, PRM, tiny.PROMPT), max_steps=2)
    assert np.isfinite(np.asarray(smc.log_evidence)).all()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match='"absorb" or "reweigh"'):
        reason(LM, PRM, tiny.PROMPT, max_steps=2, finished="drop")
    with pytest.raises(ValueError, match='"keep" or "drop"'):
        reason(LM, PRM, tiny.PROMPT, max_steps=2, unfinished="absorb")
    with pytest.raises(ValueError, match="at least 1"):
        reason(LM, PRM, tiny.PROMPT, max_steps=0)


@pytest.mark.slow  # `test_sampling.py` has the same of several laws
@pytest.mark.statistical
def test_texts_drawn_at_another_temperature_are_weighed_back():
    def heated(prior):
        return LanguageModel(
            tiny.backbone(), None, np.asarray(LM.ends_step), temperature=1.6, prior=prior,
            step_tokens=LM.step_tokens, max_tokens=LM.max_tokens,
        )  # fmt: skip

    hot = heated("model")
    smc = SMC(ParticleFilter(reason), num_particles=16, num_runs=RUNS, progress_bar=False)
    prompt = program.read_prompt(hot, PRM, tiny.PROMPT)
    smc.run(jax.random.key(4), hot, PRM, prompt, max_steps=STEPS)
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    exact = PROBABILITY @ np.array([scores[-1] for scores in SCORES])
    assert_mean(evidence / exact, 1.0, family=1, smallest_bias=0.03)
    # without the correction it would be another number
    smc.run(jax.random.key(4), heated("proposal"), PRM, prompt, max_steps=STEPS)
    other = np.mean(np.exp(np.asarray(smc.log_evidence, np.float64)))
    assert abs(other / exact - 1) > 0.03
