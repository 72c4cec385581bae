"""Proposals for tokens: `transformers`' warpers, laws and evidence by enumeration."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.special
import scipy.stats
from numpyro.contrib.control_flow import scan

from smcscale import SMC, ParticleFilter
from smcscale.kernels import resampling
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import decode
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.sampling import Sampling, from_generation_config
from smcscale.models.reasoning.solve import shipped
from support.montecarlo import assert_mean
from support.reasoning import tiny

STEPS = 3
ENDS = np.array([True, True, False, False])


def language_model(vocabulary=4, step_tokens=2, max_tokens=4, **options):
    return LanguageModel(
        tiny.backbone(vocabulary=vocabulary), None, ENDS[:vocabulary],
        step_tokens=step_tokens, max_tokens=max_tokens, **options,
    )  # fmt: skip


TEXTS = tiny.texts(language_model(), STEPS)


def proposal(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, floor=0.0):
    """Probabilities of one row of logits, by sorting, in float64."""
    logits = np.asarray(logits, np.float64)
    q = scipy.special.softmax(logits / temperature)
    if top_k:
        q = np.where(q >= np.sort(q)[-min(top_k, len(q))], q, 0.0)
    q /= q.sum()
    order = np.argsort(q, kind="stable")
    q[order[np.cumsum(q[order]) <= 1 - top_p]] = 0.0
    q /= q.sum()
    q = np.where(q >= min_p * q.max(), q, 0.0)
    return (1 - floor) * q / q.sum() + floor * scipy.special.softmax(logits)


def laws(lm, **options):
    """Probabilities under p and q of every text, by full passes."""
    p, q = [], []
    for tokens, _ in TEXTS:
        start = len(tiny.PROMPT) - 1
        rows = np.asarray(lm.logits([*tiny.PROMPT, *tokens]))[start : start + len(tokens)]
        p.append(np.prod([proposal(r)[t] for r, t in zip(rows, tokens, strict=True)]))
        q.append(np.prod([proposal(r, **options)[t] for r, t in zip(rows, tokens, strict=True)]))
    return np.array(p), np.array(q)


OPTIONS = [
    {"temperature": 0.6},
    {"top_k": 2},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 1, "floor": 0.3},
]


# ---- the law of a token


@pytest.mark.parametrize("options", OPTIONS)
def test_warped_logits_are_those_of_a_sort(options):
    logits = 3 * np.asarray(jax.random.normal(jax.random.key(0), (64, 50)))
    warped = jax.jit(lambda sampling, rows: sampling(rows))(Sampling(**options), logits)
    q = np.asarray(jax.nn.softmax(warped))
    np.testing.assert_allclose(q, [proposal(row, **options) for row in logits], atol=2e-6)


@pytest.mark.parametrize("digits", [None, 0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 3, "top_p": 0.5},
    ],
)
def test_warped_logits_equal_those_of_transformers(options, digits, monkeypatch):
    """With logits rounded to `digits` so that many tie as well.

    Which of the tokens that tie at the edge of top-p go, torch leaves to its sort: made stable here.
    """
    torch = pytest.importorskip("torch")
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, **how: sort(x, dim=-1, stable=True, **how))
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * np.array(jax.random.normal(jax.random.key(1), (200, 97)))
    logits = logits if digits is None else np.round(logits, digits)
    warpers = {
        "temperature": process.TemperatureLogitsWarper, "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper, "min_p": process.MinPLogitsWarper,
    }  # fmt: skip
    expected = torch.as_tensor(logits)
    for name, warper in warpers.items():
        expected = warper(options[name])(None, expected) if name in options else expected
    found, expected = np.asarray(Sampling(**options)(jnp.asarray(logits))), expected.numpy()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=2e-7)


def test_extreme_logits_keep_at_least_a_token():
    rows = jnp.asarray(
        [[0.0, -1e30, -jnp.inf, 1e30], [5.0, 5.0, 5.0, 5.0], [-0.0, 0.0, -1e-45, -3]]
    )
    for options in ({"top_p": 1e-7}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-3}):
        kept = np.isfinite(np.asarray(Sampling(**options)(rows)))
        assert kept.any(axis=1).all()
    one = np.isfinite(np.asarray(Sampling(top_k=1)(rows)))
    assert one[0].tolist() == [False, False, False, True]
    assert one[1].all()  # all tie
    assert one[2].tolist()[:2] == [True, True]  # minus zero is zero


def test_other_numbers_compile_nothing_and_every_platform_takes_it():
    seen = []

    @jax.jit
    def warped(sampling, logits):
        seen.append(sampling)
        return sampling(logits)

    logits = jnp.zeros((3, 300))
    for top_p in (0.5, 0.6):
        warped(Sampling(temperature=top_p, top_p=top_p, top_k=7), logits)
    assert len(seen) == 1
    warped(Sampling(temperature=0.5, top_p=0.5, top_k=8), logits)
    assert len(seen) == 2
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, floor=0.1)
    jax.export.export(jax.jit(lambda x: sampling(x)), platforms=("cpu", "cuda", "tpu"))(logits)


def test_what_is_switched_off_is_the_model():
    assert Sampling().plain and Sampling(1.0, 1.0, 0, 0.0, 0.0).plain
    assert not Sampling(top_k=1).plain
    assert Sampling(0.5, top_k=3) == Sampling(0.5, top_k=3)
    logits = jnp.asarray([[1.0, 2.0]])
    assert Sampling()(logits) is logits


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"floor": 1.0}, r"floor must be in \[0, 1\)"),
        ({"prior": "p"}, 'prior must be "proposal" or "model"'),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        language_model(**options)


# ---- the law of a step


def sampled(lm, number, steps, seed=0):
    """`number` states after `steps` steps."""
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), lm.start())
    step = jax.jit(lambda lm, key, states: jax.vmap(lambda s: lm.next_step(s).sample(key))(states))
    for index in range(steps):
        states = step(lm, jax.random.fold_in(jax.random.key(seed), index), states)
    return states


@pytest.mark.statistical
@pytest.mark.parametrize("options", OPTIONS)
def test_texts_are_drawn_by_the_proposal_and_know_both_probabilities(options):
    number = 20_000
    lm = language_model(**options).given(tiny.PROMPT)
    p, q = laws(lm, **options)
    assert abs(p.sum() - 1) < 1e-6 and abs(q.sum() - 1) < 1e-6
    states = sampled(lm, number, STEPS)
    assert (np.asarray(states.step_log_prob) <= 0).all()
    written = jax.tree.map(np.asarray, states.written)
    where = {text: i for i, (text, _) in enumerate(TEXTS)}
    rows = zip(written.tokens, written.length, strict=True)
    drawn = np.array([where[tuple(row[:n].tolist())] for row, n in rows])
    assert (q[drawn] > 0).all()
    np.testing.assert_allclose(written.log_prob, np.log(p[drawn]), atol=1e-4)
    np.testing.assert_allclose(written.log_proposal, np.log(q[drawn]), atol=1e-4)
    seen, rare = np.bincount(drawn, minlength=len(TEXTS)), q * number < 5
    observed = np.append(seen[~rare], seen[rare].sum())
    wanted = np.append(q[~rare], q[rare].sum()) * number
    keep = wanted > 0
    assert observed[~keep].sum() == 0
    if keep.sum() > 1:
        wanted = wanted[keep] * observed[keep].sum() / wanted[keep].sum()
        limit = 1e-3 / len(OPTIONS)
        assert scipy.stats.chisquare(observed[keep], wanted).pvalue > limit


@pytest.mark.parametrize("options", OPTIONS[2:4])
def test_log_prob_is_that_of_the_proposal_and_sums_to_one(options):
    lm = language_model(**options).given(tiny.PROMPT)
    start, step = lm.start(), jax.jit(lambda lm, key: lm.next_step(lm.start()).sample(key))
    texts = [tokens for tokens, _ in tiny.texts(lm, 1)]
    drawn = step(lm, jax.random.key(3))
    texts.append(tuple(drawn.written.tokens[: int(drawn.written.length)].tolist()))

    def value(tokens, length):
        zero = jnp.zeros((), jnp.int32)
        return type(start)(
            decode.Written(tokens, length, zero, jnp.zeros((), bool), start.written.cache)
        )

    padded = jnp.asarray([(*tokens, *[0] * (4 - len(tokens))) for tokens in texts], jnp.int32)
    lengths = jnp.asarray([len(tokens) for tokens in texts], jnp.int32)
    log_prob = lambda *at: lm.next_step(start).log_prob(value(*at))
    found = np.asarray(jax.jit(jax.vmap(log_prob))(padded, lengths))
    assert abs(np.exp(found[:-1].astype(np.float64)).sum() - 1) < 1e-5
    np.testing.assert_allclose(found[-1], drawn.step_log_proposal, atol=1e-5)


def test_a_finished_text_adds_nothing_and_steps_add_up():
    lm = language_model(temperature=0.5, prior="model").given(tiny.PROMPT)
    step = jax.jit(lambda lm, state, key: lm.next_step(state).sample(key))
    state, total = lm.start(), 0.0
    for index in range(5):
        over = bool(state.finished)
        state = step(lm, state, jax.random.key(index))
        assert not over or float(lm.correction(state)) == 0.0
        total += float(lm.correction(state))
    assert bool(state.finished)
    exact = state.written.log_prob - state.written.log_proposal
    assert total == pytest.approx(float(exact), abs=1e-6)
    assert abs(total) > 0.01
    tempered = language_model(temperature=0.5).given(tiny.PROMPT)
    assert float(tempered.correction(state)) == 0.0
    plain = language_model(prior="model").given(tiny.PROMPT)
    state = step(plain, plain.start(), jax.random.key(0))
    assert float(plain.correction(state)) == 0.0
    assert float(state.written.log_prob) == float(state.written.log_proposal) < 0


# ---- the target of a run


def score(tokens, length):
    """A reward in (0, 1) of a text."""
    values = jnp.asarray([2.5, -2.0, 1.5, -2.5])[tokens] / (1 + jnp.arange(len(tokens)))
    return jax.nn.sigmoid(jnp.sum(jnp.where(jnp.arange(len(tokens)) < length, values, 0.0)))


def write(lm, prompt, *, max_steps):
    """`reason` with a reward of its own, and the prior as a factor."""
    lm = lm.given(prompt)

    def step(text, _):
        before = jnp.where(text.written.length == 0, 1.0, score_of(text))
        text = numpyro.sample("step", lm.next_step(text))
        numpyro.factor("prior", lm.correction(text))
        numpyro.factor("reward", jnp.log(score_of(text)) - jnp.log(before))
        return text, None

    score_of = lambda text: score(text.written.tokens, text.written.length)
    scan(step, lm.start(), None, length=max_steps)


def evidences(lm, num_runs, key=5):
    smc = SMC(
        ParticleFilter(write, resampling=resampling.systematic, trigger=always, store="last"),
        num_particles=8, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(key), lm, jnp.asarray(tiny.PROMPT), max_steps=STEPS)
    return np.exp(np.asarray(smc.log_evidence, np.float64))


SCORES = [float(score(jnp.asarray(tokens), len(tokens))) for tokens, _ in TEXTS]
#: options, prior, runs
TARGETS = [
    ({"temperature": 0.6}, "model", 4000),
    ({"top_k": 2}, "proposal", 4000),
    ({"temperature": 1.5, "top_p": 0.7, "floor": 0.2}, "model", 8000),
]


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("options", "prior", "runs"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in TARGETS[:-1]), TARGETS[-1]],
)
def test_evidence_is_that_of_the_prior(options, prior, runs):
    lm = language_model(prior=prior, **options)
    p, q = laws(lm, **options)
    exact = float((q if prior == "proposal" else p * (q > 0)) @ SCORES)
    found = evidences(lm, runs)
    assert_mean(found / exact, 1.0, family=len(TARGETS), smallest_bias=0.04)
    other = float((p if prior == "proposal" else q) @ SCORES)
    assert abs(other / exact - 1) > 0.04  # mistaking one for the other is seen


@pytest.mark.statistical
@pytest.mark.slow
def test_the_two_likeliest_of_three_tokens_give_the_smaller_mass_and_a_floor_all_of_it():
    """One step of one token; the reward is a function of the token."""
    reward = jnp.asarray([0.9, 0.3, 0.6])

    def write_one(lm):
        def step(state, _):
            state = numpyro.sample("step", lm.next_step(state))
            numpyro.factor("prior", lm.correction(state))
            numpyro.factor("reward", jnp.log(reward[state.written.tokens[0]]))
            return state, None

        scan(step, lm.start(), None, length=1)

    masses = {}
    for name, options in {"cut": {"top_k": 2}, "mixed": {"top_k": 2, "floor": 0.1}}.items():
        lm = language_model(3, 1, 1, prior="model", **options).given(tiny.PROMPT[:1])
        p = scipy.special.softmax(np.asarray(lm.logits(tiny.PROMPT[:1]), np.float64)[-1])
        kept = p >= np.sort(p)[-2] if name == "cut" else np.ones(3, bool)
        masses[name] = float((p * kept) @ np.asarray(reward, np.float64))
        smc = SMC(ParticleFilter(write_one), num_particles=16, num_runs=4000, progress_bar=False)
        smc.run(jax.random.key(1), lm)
        found = np.exp(np.asarray(smc.log_evidence, np.float64))
        assert_mean(found / masses[name], 1.0, family=2, smallest_bias=0.02)
    assert masses["cut"] < 0.95 * masses["mixed"]


# ---- where the options come from


@pytest.fixture
def folder(tmp_path):
    for file in shipped("reasoner").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    return tmp_path


def test_a_generation_config_is_applied_only_when_asked_for(folder):
    assert LanguageModel.from_pretrained(folder).sampling.plain
    asked = LanguageModel.from_pretrained(folder, sampling="generation_config")
    assert asked.sampling == Sampling(0.6, 0.9, 20)
    own = LanguageModel.from_pretrained(folder, sampling="generation_config", temperature=0.9)
    assert own.sampling == Sampling(0.9, 0.9, 20) and own.prior == "proposal"
    with pytest.raises(ValueError, match="\"generation_config\", got 'default'"):
        LanguageModel.from_pretrained(folder, sampling="default")


def test_a_generation_config_that_is_no_sampling_here_is_refused():
    with pytest.raises(ValueError, match="greedy"):
        from_generation_config({"temperature": 0.6}, "file")
    with pytest.raises(ValueError, match="repetition_penalty"):
        from_generation_config({"do_sample": True, "repetition_penalty": 1.1}, "file")
    neutral = {"do_sample": True, "repetition_penalty": 1.0, "suppress_tokens": [], "top_k": 0}
    assert from_generation_config(neutral, "file") == {"top_k": 0}


def test_every_option_goes_through_vmap_over_runs_and_particles():
    lm = language_model(temperature=0.7, top_p=0.9, min_p=0.01, floor=0.1).given(tiny.PROMPT)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), lm.start())
    keys = jax.random.split(jax.random.key(0), 2)
    inner = lambda key, run: jax.vmap(lambda s: lm.next_step(s).sample(key))(run)
    both = jax.jit(jax.vmap(inner))(keys, states)
    for run, particle in itertools.product(range(2), range(3)):
        text = jax.tree.map(lambda x, at=(run, particle): x[at], both)
        tokens = text.written.tokens[: int(text.written.length)].tolist()
        exact = tiny.log_probability(lm, tokens)
        assert float(text.written.log_prob) == pytest.approx(exact, abs=1e-4)
