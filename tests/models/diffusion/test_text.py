"""The shipped text model: its lines, its card, and steering, events and votes on a learned model."""

import json
import operator
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import text, token_steering, train_text
from smcscale.models.diffusion.blocks import Adaptive, Fixed, Local, vote, write
from smcscale.models.diffusion.masked import unmask
from smcscale.models.diffusion.networks import PRETRAINED
from smcscale.models.diffusion.reveal import (
    even_levels,
    in_random_order,
    independently,
    left_to_right,
)
from smcscale.models.diffusion.text import LENGTH, MASK, STEPS, decode, encode, lines
from smcscale.models.diffusion.token_steering import TokenSteering
from support.montecarlo import assert_mean

LINE = "3+4*2-5+8-6=7,4,9,7,1"
FOLDER = PRETRAINED / "text"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
NETWORK = text.load_text(FOLDER)
#: comparisons of means in this file
FAMILY = 8
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def of_card(words):
    """The number that the card puts before some words, and its standard error."""
    mean, error = re.findall(rf"([\d.]+) ± ([\d.]+) {words}", CARD)[0]
    return float(mean), float(error)


def run(start, *args, program=unmask, particles=1, runs=1, trigger=triggers.never, seed=1, **kw):
    """Tokens `(R, N, 21)`, and the run."""
    smc = SMC(
        ParticleFilter(program, store="last", trigger=trigger),
        num_particles=particles, num_runs=runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), NETWORK, jnp.asarray(start), *args, **kw)
    samples, _ = smc.get_samples(weighted=True)
    return np.asarray(samples["tokens"]).reshape(runs, particles, LENGTH), smc


def share_right(tokens):
    """Share of right steps of each line."""
    flat = jnp.asarray(tokens).reshape(-1, LENGTH)
    return np.asarray(jax.vmap(text.right_steps)(flat)).mean(1).reshape(tokens.shape[:-1])


def gap(one, other):
    """Difference of means of independent values, in standard errors."""
    error = np.sqrt(one.var(ddof=1) / one.size + other.var(ddof=1) / other.size)
    return (one.mean() - other.mean()) / error


# ---- lines


def parsed(line):
    """Which steps of a text are right, by its characters and Python's own arithmetic."""
    question, results = line[: text.PROMPT - 1], line[text.PROMPT - 1 :]
    digits, right = [line[0], *results[1::2]], []
    for k in range(STEPS):
        operation, operand = question[1 + 2 * k : 3 + 2 * k]
        sound = digits[k].isdecimal() and operation in "+-*" and operand in "123456789"
        sound = sound and results[2 * k] == ("=" if k == 0 else ",")
        made = sound and OPERATIONS[operation](int(digits[k]), int(operand)) % 10
        right.append(sound and str(made) == digits[k + 1])
    return right


def test_text_becomes_tokens_and_comes_back():
    assert decode(encode(LINE)) == LINE
    assert decode(text.problem(encode(LINE))) == "3+4*2-5+8-6=_________"
    assert text.answer(encode(LINE)) == 1
    assert text.answer(encode("1+1,")) is None
    assert encode("_").tolist() == [MASK]


def test_the_checker_reads_what_is_written():
    """Against a parser of the characters, on right lines and on ones with two characters changed."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([lines(0, 200), lines(0, 800, "test")])
    for row in range(400, 1000):
        tokens[row, rng.integers(LENGTH, size=2)] = rng.integers(MASK + 1, size=2)
    found = np.asarray(jax.vmap(text.right_steps)(tokens))
    expected = np.array([parsed(decode(row)) for row in tokens])
    np.testing.assert_array_equal(found, expected)
    assert found[:400].all() and 0.1 < found[400:].mean() < 0.9
    one = text.right_steps(encode("3+4*2-5+8-6=7,5,0,8,2"))  # one slip, and right from there
    np.testing.assert_array_equal(one, [True, False, True, True, True])


def test_the_splits_share_no_opening():
    out = text.held_out()
    assert out.sum() == out.size // text.ONE_IN
    openings = [{decode(row)[:5] for row in lines(3, 20000, split)} for split in ("train", "test")]
    assert len(openings[1]) == out.sum() and not openings[0] & openings[1]
    assert not np.array_equal(lines(1, 50), lines(2, 50))
    np.testing.assert_array_equal(lines(1, 50), lines(1, 50))


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"characters that the model does not know: \['a', 'z'\]"):
        encode("1+az")
    with pytest.raises(ValueError, match="unknown `split` 'valid'"):
        lines(0, 1, "valid")


# ---- the network and its folder


def test_a_folder_gives_back_its_network(tmp_path):
    shape = text.Shape(width=8, num_layers=1, num_heads=2, mlp_size=12)
    network = text.TextDenoiser(shape, jax.random.key(0))
    text.save_text(tmp_path, network)
    start = jnp.asarray(encode("3+4*2-5+8-6=7,_,9,7,_"))
    np.testing.assert_allclose(text.load_text(tmp_path)(start), network(start), atol=0.03)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"model_type": "llama"}, "of model_type 'llama'"),
        ({"characters": "ab"}, "with the characters 'ab'"),
        ({"width": 12}, "does not hold the tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            text.load_text(tmp_path)


def test_the_network_sees_both_sides():
    """A result depends on the tokens before it and after it; a table is normalized."""
    table = NETWORK(jnp.asarray(encode("3+4*2-5+8-6=_,_,9,7,1")))
    np.testing.assert_allclose(jax.nn.logsumexp(table, axis=1), 0.0, atol=1e-5)
    for other in ("3+4*3-5+8-6=_,_,9,7,1", "3+4*2-5+8-6=_,_,8,7,1"):
        assert jnp.abs(NETWORK(jnp.asarray(encode(other)))[14] - table[14]).max() > 0.05


@pytest.mark.statistical
def test_the_loss_of_held_out_lines_is_that_of_the_card():
    tokens = jnp.asarray(lines(11, 1500, "test"))
    losses = np.asarray(jax.jit(train_text.loss)(NETWORK, tokens, jax.random.key(2)))
    mean, error = of_card("nats a held-out line")
    own = losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() - mean) < 4 * np.hypot(own, error)


class Uniform(eqx.Module):
    """All tokens alike: the loss is known."""

    def __call__(self, tokens, level):
        return jnp.full((LENGTH, MASK), -jnp.log(float(MASK)))


@pytest.mark.statistical
def test_the_loss_is_an_unbiased_draw():
    tokens = jnp.asarray(lines(1, 64))
    keys = jax.random.split(jax.random.key(0), 400)
    found = jax.jit(jax.vmap(lambda k: train_text.loss(Uniform(), tokens, k).mean()))(keys)
    masked = LENGTH - text.PROMPT
    assert_mean(found, masked * np.log(MASK), family=FAMILY, smallest_bias=1.0)


# ---- orders of writing


@pytest.mark.slow
@pytest.mark.statistical
def test_results_written_one_after_the_other_are_right_and_together_wrong():
    """At the card's share from left to right; three rows for the nine characters break it."""
    rows = []
    for seed, line in enumerate(lines(21, 60, "test")):
        start = text.problem(line)
        options = [(even_levels(9), left_to_right), (even_levels(3), independently)]
        rows.append(
            [
                share_right(run(start, levels, particles=4, seed=seed, reveal=rule)[0]).mean()
                for levels, rule in options
            ]
        )
    one, several = np.array(rows).T
    mean, error = of_card("of the results are right from left to right")
    own = one.std(ddof=1) / np.sqrt(len(one))
    assert abs(one.mean() - mean) < 4 * np.hypot(own, error)
    assert gap(one, several) > 4


@pytest.mark.parametrize(
    "rule", [pytest.param(left_to_right, marks=pytest.mark.slow), in_random_order]
)
def test_infilling_keeps_what_is_given(rule):
    """Both sides of a gap, in `unmask` and in blocks."""
    start = encode("3+4*2-5+8-6=_,4,9__,1")
    given = start != MASK
    tokens, _ = run(start, even_levels(9), particles=4, reveal=rule)
    written, _ = run(start, Fixed(4), program=write, particles=4)
    for found in (tokens, written):
        assert (found[..., given] == start[given]).all() and (found < MASK).all()


# ---- steering


def right_share(tokens):
    return jnp.mean(text.right_steps(tokens).astype(float))


@pytest.mark.slow
@pytest.mark.statistical
def test_steering_by_the_checker_makes_lines_right():
    """A line drawn by weight against a plain one, equal network calls of each particle.

    The best of eight plain lines is as good as the best of eight steered ones on this easy problem.
    """
    start, shares = text.problem(encode(LINE)), {}
    for name, num_guesses, trigger in (
        ("steered", 8, triggers.ess_below(0.5)),
        ("best of N", 1, triggers.never),
    ):
        steering = TokenSteering(right_share, 12.0, num_guesses=num_guesses)
        tokens, smc = run(
            start, even_levels(3), particles=8, runs=80, trigger=trigger, steering=steering
        )
        assert smc.cost["denoiser_calls"] == 80 * 8 * 2
        right = share_right(tokens)
        weights = np.asarray(smc.result.log_weights)
        drawn = (weights + np.random.default_rng(0).gumbel(size=weights.shape)).argmax(1)
        shares[name] = right[np.arange(80), drawn], right.max(1), right.mean(1)
    plain = shares["best of N"][2]
    assert gap(shares["steered"][0], plain) > 4
    assert gap(shares["steered"][1], shares["best of N"][1]) > -4


@pytest.mark.slow
@pytest.mark.statistical
def test_the_evidence_of_an_event_is_its_share_among_plain_samples():
    """The last result is as the first, and the question makes it another one; two rows."""

    def ends_as_it_began(tokens):
        return tokens[-1] == tokens[text.PROMPT]

    start = text.problem(encode(LINE))
    plain, _ = run(start, even_levels(2), particles=4000)
    hits = np.asarray(jax.vmap(ends_as_it_began)(plain[0]))
    _, smc = run(
        start, even_levels(2), particles=16, runs=200, trigger=triggers.ess_below(0.5),
        steering=token_steering.event(ends_as_it_began),
    )  # fmt: skip
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    error = np.hypot(hits.std() / np.sqrt(hits.size), evidence.std(ddof=1) / np.sqrt(evidence.size))
    assert error < 0.1 * hits.mean()
    assert abs(evidence.mean() - hits.mean()) < 4 * error


# ---- votes

SCHEDULES = [
    Fixed(3, 3),
    Adaptive((text.CHARACTERS.index(","),), 4, 4),
    Local(9, 0.9, 0.6, 2),
]


@pytest.mark.slow
@pytest.mark.statistical
def test_votes_over_schedules():
    """Sixty problems in three rows: lines of three schedules, their vote, and the steered one.

    `vote` counts heads, as HEX; of the steered lines it adds weights.  Both find more answers than a
    line does by itself, and the one that knows which steps are right more than the other.
    """
    steering = TokenSteering(right_share, 10.0)
    found = []
    for seed, line in enumerate(lines(31, 60, "test")):
        start, truth = text.problem(line), text.answer(line)
        options = {"program": write, "particles": 15, "num_steps": 3, "seed": seed}
        tokens, smc = run(start, SCHEDULES, **options)
        answers = [text.answer(row) for row in tokens[0]]
        sizes = [SCHEDULES[int(i)].size for i in smc.get_samples(weighted=True)[0]["schedule"]]
        options |= {"trigger": triggers.ess_below(0.5), "steering": steering}
        steered, weighed = run(start, SCHEDULES, **options)
        best, _ = vote([text.answer(row) for row in steered[0]], weighed.result.log_weights[0])
        single = np.mean([answer == truth for answer in answers])
        found.append([single, vote(answers, sizes=sizes)[0] == truth, best == truth])
    single, voted, weighted = np.array(found, float).T
    for better, worse in ((voted, single), (weighted, single)):
        difference = better - worse
        assert difference.mean() > 4 * difference.std(ddof=1) / np.sqrt(len(difference))
    assert weighted.mean() >= voted.mean()
