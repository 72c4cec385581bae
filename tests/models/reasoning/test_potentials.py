"""Every potential, aggregate and rule: evidence and law against enumeration of a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import aggregates, potentials, program
from smcscale.models.reasoning.potentials import Potential
from smcscale.models.reasoning.program import reason, tallied
from smcscale.models.reasoning.reward_forms import Form
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.rewards import RewardFunction, SelfCertainty
from support.montecarlo import assert_mean
from support.reasoning import tiny

STEPS = 3
RUNS = 6000
LM = tiny.language_model()
PRM = tiny.reward_model()
TEXTS = tiny.texts(LM, STEPS)
PROBABILITY = np.exp([tiny.log_probability(LM, tokens) for tokens, _ in TEXTS])
SCORES = [np.asarray(tiny.scores(PRM, tokens, ends), np.float64) for tokens, ends in TEXTS]

AGGREGATES = {  # what the scores r_1 .. r_t come to, at every t
    aggregates.last: lambda r: r,
    aggregates.mean: lambda r: np.cumsum(r) / np.arange(1, len(r) + 1),
    aggregates.maximum: np.maximum.accumulate,
    aggregates.minimum: np.minimum.accumulate,
    aggregates.product: np.cumprod,
}


def odds(r):
    return r / (1 - r)


TARGETS = {  # what a text counts in the end, from the aggregates A_1 .. A_l
    potentials.difference: lambda a: a[-1],
    potentials.product: np.prod,
    potentials.odds_ratio: lambda a: odds(a[-1]),
    potentials.odds: lambda a: np.prod(odds(a)),
}


def weight(scores, tokens, rule, finished="absorb", unfinished="keep"):
    """The row of the table for one text: no telescoping, no clipping, no loop."""
    found = AGGREGATES[rule.aggregate](scores)
    value = TARGETS[rule.weigh](found)
    if finished == "reweigh":
        over = tokens[-1] == tiny.STOP or len(tokens) == LM.max_tokens
        last = {potentials.product: found[-1], potentials.odds: odds(found[-1])}[rule.weigh]
        value *= last ** ((STEPS - len(scores)) if over else 0)
    if unfinished == "drop" and tokens[-1] != tiny.STOP:
        value = 0.0
    return value ** (1 / rule.temperature)


def assert_target(weights, prm=PRM, num_particles=2, bias=0.05, trigger=always, **options):
    """Evidence, and the unnormalized mass of every kind of text, have the right mean."""
    smc = SMC(
        ParticleFilter(reason, store="last", trigger=trigger),
        num_particles=num_particles, num_runs=RUNS, progress_bar=False,
    )  # fmt: skip
    prompt = program.read_prompt(LM, prm, tiny.PROMPT)
    smc.run(jax.random.key(5), LM, prm, prompt, max_steps=STEPS, **options)
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    exact = float(PROBABILITY @ weights)
    assert_mean(evidence / exact, 1.0, family=FAMILY, smallest_bias=bias)

    samples, log_weights = smc.get_samples(weighted=True)
    written = samples["step"].written
    rows = zip(np.asarray(written.tokens), np.asarray(written.length), strict=True)
    kinds = np.array([kind(tuple(row[:n].tolist())) for row, n in rows]).reshape(RUNS, -1)
    pooled = np.exp(np.asarray(log_weights, np.float64).reshape(RUNS, -1))
    pooled *= evidence.sum() / pooled.sum()
    replicates = np.stack([(pooled * (kinds == k)).sum(1) for k in range(KINDS)], axis=1)
    of_texts = np.array([kind(tokens) for tokens, _ in TEXTS])
    wanted = [PROBABILITY @ (weights * (of_texts == k)) for k in range(KINDS)]
    assert_mean(replicates / exact, np.array(wanted) / exact, family=FAMILY, smallest_bias=bias)


def kind(tokens):
    """The "answer" of a text: its first token, and whether it came to its end."""
    return 2 * tokens[0] + (tokens[-1] == tiny.STOP)


KINDS = 2 * LM.config.vocabulary_size
CASES = [  # potential, rules, smallest bias to see with two particles
    (Potential(potentials.difference, aggregates.minimum), {}, 0.05),
    (Potential(potentials.difference), {"unfinished": "drop"}, 0.05),
]
SLOW = [
    (Potential(potentials.odds, aggregates.last, temperature=2.0), {"finished": "reweigh"}, 0.05),
    (Potential(potentials.difference, aggregates.maximum), {}, 0.05),
    (Potential(potentials.difference, aggregates.mean), {}, 0.05),
    (Potential(potentials.difference, aggregates.product), {}, 0.05),
    (Potential(potentials.odds_ratio), {}, 0.05),
    (Potential(potentials.odds_ratio, aggregates.minimum), {}, 0.05),
    (Potential(potentials.odds), {}, 0.06),
    (Potential(potentials.product), {}, 0.05),
    (Potential(potentials.product), {"finished": "reweigh"}, 0.05),
    (Potential(potentials.product, aggregates.product), {}, 0.06),
    (Potential(potentials.product, aggregates.mean), {"unfinished": "drop"}, 0.05),
    (Potential(potentials.odds, aggregates.minimum, temperature=0.5), {}, 0.1),
]
FAMILY = (1 + KINDS) * (2 * len(CASES + SLOW) + 4)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("rule", "options", "bias"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_evidence_and_law_are_those_of_the_table(rule, options, bias):
    weights = np.array(
        [weight(s, t, rule, **options) for s, (t, _) in zip(SCORES, TEXTS, strict=True)]
    )
    assert_target(weights, bias=bias, potential=rule, **options)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(("rule", "options", "bias"), CASES + SLOW)
def test_eight_particles_that_resample_now_and_then_have_the_same_target(rule, options, bias):
    weights = np.array(
        [weight(s, t, rule, **options) for s, (t, _) in zip(SCORES, TEXTS, strict=True)]
    )
    trigger = ParticleFilter(reason).trigger  # by ESS
    assert_target(weights, num_particles=8, bias=bias, trigger=trigger, potential=rule, **options)


@pytest.mark.slow
@pytest.mark.statistical
def test_marked_steps_in_the_loop():
    """A mark in place of each step's end, kept in the reward model's cache through resampling."""
    form = Form(mark=(tiny.B, tiny.A), place=1, trims=(tiny.STOP, tiny.BREAK))
    head = 0.3 * jax.random.normal(jax.random.key(2), (2, 16))
    prm = ProcessRewardModel(tiny.backbone(1), head, jnp.zeros(2), None, form=form)
    model, found = prm.model, []
    for tokens, ends in TEXTS:
        read = list(tiny.PROMPT)
        for begin, end in zip((0, *ends), ends, strict=False):
            step = list(tokens[begin:end])
            step = step[:-1] if step[-1] in form.trims else step
            read += [*step, tiny.B, tiny.A]
        padded = jnp.zeros((1, 24), jnp.int32).at[0, : len(read)].set(jnp.asarray(read))
        found.append(float(prm.value(_hidden(model, padded)[0, len(read) - 2])))
    assert np.ptp(found) > 0.3
    assert_target(np.array(found), prm, potential=potentials.difference)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("reward", ["function", "certainty", "entropy"])
def test_other_rewards_in_the_loop(reward):
    found = []
    for tokens, ends in TEXTS:
        begin = (0, *ends)[-2]
        log_probs = np.asarray(jax.nn.log_softmax(LM.logits([*tiny.PROMPT, *tokens])), np.float64)
        place = len(tiny.PROMPT) - 1 + np.arange(begin, len(tokens))
        if reward == "function":
            found.append((1 + np.sum(np.array(tokens) == tiny.A)) / 6)
        elif reward == "certainty":
            found.append(np.exp(log_probs[place, np.array(tokens)[begin:]].mean()))
        else:
            found.append(np.exp(np.sum(np.exp(log_probs) * log_probs, -1)[place].mean()))
    prm = {
        "function": RewardFunction(_letters),
        "certainty": SelfCertainty(LM),
        "entropy": SelfCertainty(LM, entropy=True),
    }[reward]
    assert_target(np.array(found), prm, potential=potentials.difference)


def _letters(state):
    said = (state.written.tokens == tiny.A) & (jnp.arange(LM.max_tokens) < state.written.length)
    return (1 + jnp.sum(said)) / 6


@jax.jit
def _hidden(model, tokens):
    return model(tokens)


def products(scores, rule):
    """`G_1, G_2, ...` of one text as the loop makes them."""
    one = jnp.ones(())
    tally, found = program.Tally(one, one, jnp.zeros((), jnp.int32)), []
    for score in scores:
        tally = tallied(tally, rule, jnp.asarray(score), jnp.asarray(True))
        found.append(float(rule(tally.previous, tally.aggregate)))
    return np.array(found)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("weigh", TARGETS)
def test_steps_multiply_to_the_target(weigh, aggregate):
    scores = np.array([0.6, 0.2, 0.9, 0.3, 0.3])
    for count in range(1, 6):
        found = products(scores[:count], Potential(weigh, aggregate, temperature=1.5))
        expected = TARGETS[weigh](AGGREGATES[aggregate](scores[:count])) ** (1 / 1.5)
        assert np.exp(found.sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weigh", TARGETS)
def test_a_score_of_zero_kills_for_good_where_it_should(weigh):
    for aggregate in (aggregates.product, aggregates.minimum):
        found = products([0.5, 0.0, 0.7], Potential(weigh, aggregate))
        assert found[1] == found[2] == -np.inf  # and never NaN
    for aggregate in (aggregates.last, aggregates.mean, aggregates.maximum):
        found = products([0.0, 0.7, 1.0, 1.0], Potential(weigh, aggregate))
        assert np.isfinite(found).all()


def test_a_long_product_does_not_underflow():
    found = products([1e-5] * 12, Potential(potentials.difference, aggregates.product))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:7], np.log(1e-5), rtol=1e-4)


def test_a_potential_of_ones_own():
    def steep(previous, score):
        return 5.0 * (score - previous)

    found = products([0.5, 0.9], Potential(steep))
    np.testing.assert_allclose(found, [-2.5, 2.0], rtol=1e-5)
    assert Potential(steep, temperature=2.0) == Potential(steep, temperature=2.0)
    assert hash(Potential(steep)) == hash(Potential(steep))


@pytest.mark.refusal
def test_bad_temperatures_are_refused():
    with pytest.raises(ValueError, match="temperature of a Potential must be positive"):
        Potential(potentials.difference, temperature=0.0)
