"""Steps judged by where they lead: the score is that of the greedy continuation, the target stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC
from smcscale.models.reasoning import beds, methods
from smcscale.models.reasoning.foresight import Foresight
from smcscale.models.reasoning.program import read_prompt
from support.montecarlo import assert_mean
from support.reasoning import tiny


def written_on(bed, tokens, steps):
    """A text and `steps` more of its likeliest tokens."""
    tokens = list(tokens)
    for _ in range(steps):
        over = len(tokens) == bed.lm.max_tokens or tokens[-1] in bed.lm.config.end_tokens
        if over:
            break
        room = jnp.zeros(bed.lm.max_tokens, jnp.int32).at[: len(tokens)].set(jnp.array(tokens))
        tokens.append(int(jnp.argmax(bed.lm.law(room, jnp.int32(len(tokens))))))
    return tokens


def score(bed, tokens):
    """What the reward says of a text."""
    places = np.arange(len(tokens))
    return np.exp(np.asarray(bed.reward.function.log_likelihoods)[places, tokens].sum())


def run(bed, reward, method, num_runs, num_particles=8):
    smc = SMC(method.filter, num_particles=num_particles, num_runs=num_runs, progress_bar=False)
    prompt = read_prompt(bed.lm, reward, ())
    options = {"potential": beds.EXACT} | method.options
    smc.run(jax.random.key(1), bed.lm, reward, prompt, max_steps=bed.max_steps, **options)
    return smc


@pytest.mark.parametrize("steps", [0, 2])
def test_scores_are_those_of_the_likeliest_continuation(steps):
    bed = beds.markov_texts(0, 1)[0]
    seen = Foresight(bed.reward, bed.lm, steps)
    state, judged = bed.lm.start(), seen.start(bed.lm, bed.max_steps)
    told = []
    for key in jax.random.split(jax.random.key(3), 3):
        state = bed.lm.next_step(state).sample(key)
        judged = seen.read(judged, state, 1)
        tokens = np.asarray(state.written.tokens)[: int(state.written.length)]
        told.append(len(tokens))
        expected = score(bed, written_on(bed, tokens, steps))
        np.testing.assert_allclose(judged.score, expected, rtol=1e-5)
    assert told[0] == 1  # something was judged before the end


@pytest.mark.statistical
def test_the_target_stays_and_what_is_thrown_away_counts():
    bed = beds.markov_texts(0, 1)[0]
    plain = run(bed, bed.reward, methods.particle_filter(), 3000)
    smc = run(bed, Foresight(bed.reward, bed.lm), methods.particle_filter(), 3000)
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    assert_mean(evidence / bed.evidence, 1.0, family=4, smallest_bias=0.06)
    assert smc.cost["tokens"] > 1.2 * plain.cost["tokens"]


def test_a_network_writes_on_from_its_own_cache():
    lm, prm = tiny.language_model(max_tokens=8), tiny.reward_model()
    seen = Foresight(prm, lm, 1)
    prompt = read_prompt(lm, seen, tiny.PROMPT)
    given, judge = lm.given(prompt.writer), seen.given(prompt.judge)
    state = jax.jit(given.next_step(given.start()).sample)(jax.random.key(2))
    judged = judge.read(judge.start(lm, 4), state, lm.step_tokens)
    # the continuation by hand: the likeliest token until the step ends
    text = list(np.asarray(state.written.tokens)[: int(state.written.length)])
    own = [*text]
    for _ in range(lm.step_tokens):
        logits = lm.logits([*tiny.PROMPT, *own])[-1]
        own.append(int(jnp.argmax(logits)))
        if own[-1] in (tiny.STOP, tiny.BREAK):
            break
    if bool(state.finished):
        own = text
    opinion = judge.reward.read(judge.reward.start(lm, 4), state, lm.step_tokens)
    rest = given.next_step(state).follow(
        jnp.zeros(lm.step_tokens, jnp.int32).at[: len(own) - len(text)].set(
            jnp.array(own[len(text) :], jnp.int32)
        ),
        jnp.int32(len(own) - len(text)),
    )[0]  # fmt: skip
    expected = judge.reward.read(opinion, rest, lm.step_tokens).score
    np.testing.assert_allclose(judged.score, expected, rtol=1e-4)


def test_it_writes_on_after_the_prompt_of_the_writer():
    lm, prm = tiny.language_model(max_tokens=8), tiny.reward_model()
    seen = Foresight(prm, lm, 1)
    prompt = read_prompt(lm, seen, tiny.PROMPT, question=[tiny.B, tiny.A])
    np.testing.assert_array_equal(prompt.judge.writer.tokens, prompt.writer.tokens)
    judge = prm.prompted([tiny.B, tiny.A])
    np.testing.assert_array_equal(prompt.judge.judge.tokens, judge.tokens)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="negative"):
        Foresight(tiny.reward_model(), tiny.language_model(), -1)
