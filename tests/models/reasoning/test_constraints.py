"""Constrained texts and rejection sampling against enumeration: evidence, law, weights."""

import functools
import itertools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.stats

from smcscale import SMC, FeynmanKac, ParticleFilter
from smcscale.feynman_kac import Weighted
from smcscale.kernels import resampling
from smcscale.kernels.triggers import always, never
from smcscale.models.reasoning import constraints
from smcscale.models.reasoning.automaton import Vocabulary, both, from_regex
from smcscale.models.reasoning.awrs import (
    awrs,
    geometric_awrs,
    recursive_awrs,
    traced_awrs,
)
from smcscale.models.reasoning.constraints import constrained
from smcscale.models.reasoning.language_model import LanguageModel
from support.montecarlo import assert_mean
from support.reasoning import tiny

PIECES = [None, b"\n", b"a", b"b", b"ab", b"ba"]
WORDS = Vocabulary([PIECES], np.zeros(len(PIECES), np.int32), (tiny.STOP,))
LONGEST = 5
RUNS = 1500
PARTICLES = 8
PATTERN = r"(ab|b)*\n?a{0,2}"


@functools.cache
def language_model(**options) -> LanguageModel:
    ends = np.array([True, True, False, False, False, False])
    return LanguageModel(
        tiny.backbone(3, vocabulary=len(PIECES), sharpness=3.0), None, ends,
        step_tokens=2, max_tokens=LONGEST + 1, **options,
    )  # fmt: skip


@functools.cache
def texts() -> list[tuple[int, ...]]:
    """Every text of at most `LONGEST` tokens, ended or cut off."""
    found = []
    for length in range(LONGEST + 1):
        for body in itertools.product(range(1, len(PIECES)), repeat=length):
            found.append((*body, tiny.STOP) if length < LONGEST else body)
    return found


@functools.cache
def all_logits() -> np.ndarray:
    """Logits after every prefix of every text `(texts, LONGEST, V)`, by full passes."""
    lm = language_model()
    rows = np.zeros((len(texts()), LONGEST), np.int32)
    for row, text in zip(rows, texts(), strict=True):
        row[: len(text)] = text
    tokens = jnp.concatenate([jnp.tile(jnp.asarray(tiny.PROMPT), (len(rows), 1)), rows], axis=1)
    start = len(tiny.PROMPT) - 1
    return np.asarray(jax.jit(lambda t: lm.model.logits(lm.model(t)))(tokens))[:, start:-1]


def probabilities(law) -> np.ndarray:
    """Of every text, when tokens have the law `logits -> logits`."""
    log_probs = np.asarray(jax.nn.log_softmax(law(jnp.asarray(all_logits()))), np.float64)
    found = [sum(row[i, t] for i, t in enumerate(text)) for row, text in zip(log_probs, texts())]
    return np.exp(found)


def written(text) -> str:
    return b"".join(PIECES[token] or b"" for token in text).decode()


def matching(pattern: str) -> np.ndarray:
    return np.array([re.fullmatch(pattern, written(text)) is not None for text in texts()])


def log_reward(text):
    """Likes the letter b alone, and texts of two tokens; sees unfinished texts too."""
    tokens, length = text.written.tokens, text.written.length
    counted = (jnp.arange(tokens.shape[0]) < length) & (tokens == tiny.B)
    return 0.7 * jnp.sum(counted) - 0.5 * jnp.abs(length - 2)


def rewards() -> np.ndarray:
    return np.array([np.exp(0.7 * t.count(tiny.B) - 0.5 * abs(len(t) - 2)) for t in texts()])


@functools.cache
def run(case):
    trigger, kernel, with_reward, twice, options, _ = CASES[case]
    lm, automaton = language_model(**options), from_regex(PATTERN, WORDS)
    smc = SMC(
        ParticleFilter(constrained, resampling=kernel, trigger=trigger, store="last"),
        num_particles=PARTICLES, num_runs=RUNS, progress_bar=False,
    )  # fmt: skip
    smc.run(
        jax.random.key(5), lm, both(automaton, from_regex(SECOND, WORDS)) if twice else automaton,
        lm.read(tiny.PROMPT), num_tokens=LONGEST, log_reward=log_reward if with_reward else None,
    )  # fmt: skip
    return smc


def plain(logits):
    return logits


SECOND = r"([ab\n]{2})*"  # an even number: the last token of a full text is not free
CASES = [  # trigger, kernel, reward, a second pattern, options of the model, the law of the target
    (always, resampling.systematic, False, True, {}, plain),
    (always, resampling.killing, True, False, {"temperature": 0.7, "prior": "model"}, plain),
    (never, resampling.multinomial, True, False, {"top_k": 4, "temperature": 1.5}, None),
]


def test_the_texts_are_all_there():
    assert abs(probabilities(plain).sum() - 1) < 1e-5
    assert 0.5 < probabilities(plain) @ matching(PATTERN) < 0.8
    for text in texts()[2000:2001]:
        exact = tiny.log_probability(language_model(), text)
        assert np.log(probabilities(plain)[texts().index(text)]) == pytest.approx(exact, abs=1e-4)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c > 0 else []) for c in range(len(CASES))],
)
def test_evidence_and_law_are_exact(case):
    _, _, with_reward, twice, options, law = CASES[case]
    law = language_model(**options).sampling if law is None else law
    smc = run(case)
    obeys = matching(PATTERN) & (matching(SECOND) if twice else True)
    exact = probabilities(law) * obeys * (rewards() if with_reward else 1.0)
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    assert_mean(evidence / exact.sum(), 1.0, family=len(CASES), smallest_bias=0.05)

    # of the likeliest texts and of all others: unbiased estimates of the unnormalized law
    samples, log_weights = smc.get_samples(weighted=True)
    state = samples["step"].text.written
    number = {text: i for i, text in enumerate(texts())}
    rows = zip(np.asarray(state.tokens), np.asarray(state.length), strict=True)
    index = np.array([number[tuple(tokens[:length].tolist())] for tokens, length in rows])
    share = np.exp(np.asarray(log_weights, np.float64))
    assert obeys[index[share > 0]].all()
    pooled = (share / share.sum() * evidence.sum()).reshape(RUNS, PARTICLES)
    likely = np.argsort(-exact)[:12]
    cell = np.full(len(texts()), len(likely))
    cell[likely] = np.arange(len(likely))
    cells = cell[index].reshape(RUNS, PARTICLES)
    found = np.stack([(pooled * (cells == c)).sum(1) for c in range(len(likely) + 1)], axis=1)
    wanted = np.append(exact[likely], exact.sum() - exact[likely].sum())
    error = found.mean(0) - wanted
    spread = np.cov(found.T) / RUNS
    statistic = error @ np.linalg.solve(spread, error)
    assert scipy.stats.chi2.sf(statistic, len(wanted)) > 1e-3 / len(CASES)


@pytest.mark.slow
def test_sums_of_log_probabilities_are_those_of_full_passes():
    smc = run(1)
    state = smc.get_samples()["step"].text.written
    known = np.log(probabilities(plain))
    number = {text: i for i, text in enumerate(texts())}
    for row in range(0, RUNS * PARTICLES, 997):
        text = tuple(np.asarray(state.tokens[row])[: int(state.length[row])].tolist())
        assert float(state.log_prob[row]) == pytest.approx(known[number[text]], abs=1e-4)
        assert bool(state.finished[row]) and float(state.log_proposal[row]) > -50
    assert smc.cost["tokens"] < RUNS * PARTICLES * LONGEST  # finished texts cost none


@eqx.filter_jit
def moved(lm, automaton, state, token):
    """The state one given token on, by the program's own pieces."""
    _, suffix = constraints.next_logits(lm, state.text)
    zero = jnp.zeros(())
    text = constraints.append(lm, state.text, token, suffix, zero, zero, room=LONGEST)
    return constraints.Constrained(text, automaton.after(state.state, token), zero)


def walk(lm, automaton, tokens):
    state = constraints.Constrained(lm.start(), jnp.zeros((), jnp.int32), jnp.zeros(()))
    for token in tokens:
        state = moved(lm, automaton, state, jnp.asarray(token))
    return state


@eqx.filter_jit
def law_after(lm, automaton, before):
    """A draw from the law of the next token, and the log probability of every token."""
    law = constraints.NextToken(lm, automaton, before, LONGEST)
    tokens = jnp.arange(len(PIECES))
    ahead = jax.vmap(lambda token: moved(lm, automaton, before, token))(tokens)
    value = law.sample(jax.random.key(1))
    return value, jax.vmap(law.log_prob)(ahead), law.log_prob(value)


def test_the_law_of_a_token_is_that_of_a_full_pass():
    lm = language_model().given(tiny.PROMPT)
    automaton = from_regex(PATTERN, WORDS)
    obeying = [text for text, good in zip(texts(), matching(PATTERN), strict=True) if good]
    for prefix in [(), (4,), (3, 4, 3), (4, 3, 3, 1)]:
        ahead = [
            text for text in obeying if text[: len(prefix)] == prefix and len(text) > len(prefix)
        ]
        logits = all_logits()[texts().index(ahead[0]), len(prefix)]
        left = {text[len(prefix)] for text in ahead}
        masked = np.where(np.isin(np.arange(len(PIECES)), list(left)), logits, -np.inf)
        value, log_probs, _ = law_after(lm, automaton, walk(lm, automaton, prefix))
        np.testing.assert_allclose(log_probs, scipy.special.log_softmax(masked), atol=1e-4)
        mass = scipy.special.logsumexp(masked) - scipy.special.logsumexp(logits)
        assert float(value.log_weight) == pytest.approx(mass, abs=1e-4)
    over = walk(lm, automaton, (4, tiny.STOP))
    stays, _, log_prob = law_after(lm, automaton, over)
    assert float(log_prob) == float(stays.log_weight) == 0.0
    np.testing.assert_array_equal(stays.text.written.tokens, over.text.written.tokens)
    np.testing.assert_array_equal(stays.text.written.cache.keys, over.text.written.cache.keys)


def test_a_text_that_cannot_match_is_dead_for_ever():
    lm = language_model().given(tiny.PROMPT)
    automaton = from_regex("b{9}", WORDS)  # longer than the room
    value, *_ = law_after(lm, automaton, walk(lm, automaton, ()))
    assert float(value.log_weight) == -np.inf
    assert np.isfinite(np.asarray(value.text.written.cache.keys)).all()
    # forbidden, then what the last row of the table allows
    assert int(walk(lm, automaton, (1, tiny.STOP)).state) == -1
    value, *_ = law_after(lm, automaton, walk(lm, automaton, (1, 3)))
    assert float(value.log_weight) == -np.inf and int(value.state) == -1


def test_truncation_among_allowed_tokens_leaves_some_to_the_model():
    likely = int(np.argmax(all_logits()[0, 0]))
    lm = language_model(top_k=1, prior="model").given(tiny.PROMPT)
    allowed = jnp.arange(len(PIECES)) != likely
    logits = jnp.asarray(all_logits()[0, 0])
    target, log_probs = constraints.restricted(lm, logits, allowed)
    assert np.isfinite(log_probs).sum() == 1 and not np.isfinite(log_probs[likely])
    np.testing.assert_allclose(target[allowed], jax.nn.log_softmax(logits)[allowed], atol=1e-6)
    lm = language_model(top_k=1).given(tiny.PROMPT)  # the truncated model is the model: it cannot
    target, log_probs = constraints.restricted(lm, logits, allowed)
    assert not np.isfinite(target).any() and np.isfinite(log_probs).all()


def test_the_prompt_is_never_copied_for_each_particle():
    lm, number = language_model().given(list(range(2, 6)) * 10), 11
    start = constraints.Constrained(lm.start(), jnp.zeros((), jnp.int32), jnp.zeros(()))
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), start)
    forward = jax.make_jaxpr(jax.vmap(lambda s: constraints.next_logits(lm, s.text)))(states)
    room, size = (
        lm.prompt_of(start.text).tokens.shape[0],
        lm.config.num_kv_heads * lm.config.head_size,
    )
    shapes = set(re.findall(r"f32\[([\d,]+)\]", str(forward)))
    widest = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes if str(room) in shape]
    assert widest and max(widest) < number * room * size


def test_plain_numpyro_runs_the_program():
    lm = language_model()
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(
            lambda: constrained(lm, from_regex(PATTERN, WORDS), jnp.asarray(tiny.PROMPT))
        ).get_trace()
    assert trace["step"]["value"].state.shape == (LONGEST + 1,)


def test_bad_options_are_refused():
    lm, automaton = language_model(), from_regex("a", WORDS)
    for number in (0, LONGEST + 2):
        with pytest.raises(ValueError, match="num_tokens must be in"):
            constrained(lm, automaton, tiny.PROMPT, num_tokens=number)
    for pieces, ends in (([None, b"a"], (0,)), (PIECES, (1,))):
        other = from_regex("a", Vocabulary([pieces], np.zeros(len(pieces), np.int32), ends))
        with pytest.raises(ValueError, match="`automaton` is over"):
            constrained(lm, other, tiny.PROMPT)
    lm = lm.given(tiny.PROMPT)
    law = constraints.NextToken(lm, automaton, walk(lm, automaton, ()), LONGEST)
    with pytest.raises(NotImplementedError, match="one token at a time"):
        law.sample(jax.random.key(0), (3,))


# ---- adaptive weighted rejection sampling


class Order(np.random.Generator):
    """A generator whose Gumbel draws put the tokens in a given order."""

    def __init__(self, log_probs, order):
        super().__init__(np.random.PCG64())
        self.draws = np.zeros(len(order))
        self.draws[list(order)] = -np.asarray(log_probs)[list(order)] - np.arange(len(order))

    def gumbel(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return self.draws


def without_replacement(p, order) -> float:
    """Probability of an order (Plackett & Luce)."""
    left = np.cumsum(p[list(order)][::-1])[::-1]
    return float(np.prod(p[list(order)] / left))


DISTRIBUTIONS = [  # the example first; a mask before, random ones
    (np.array([0.45, 0.25, 0.15, 0.1, 0.05]), [1, 3]),
    (np.array([0.9, 0.04, 0.03, 0.02, 0.01]), [0, 4]),
    (np.random.default_rng(0).dirichlet(np.full(6, 0.5))[:5], [0, 1, 2, 4]),
    (np.random.default_rng(1).dirichlet(np.ones(5)), [2]),
]


@pytest.mark.parametrize("case", range(len(DISTRIBUTIONS)))
@pytest.mark.parametrize("max_rejects", [None, 1, 2, 3, 9])
def test_recursive_weights_are_exact_over_all_orders(case, max_rejects):
    p, accepted = DISTRIBUTIONS[case]
    total, checks, chance = np.zeros(5), 0.0, 0.0
    for order in itertools.permutations(range(5)):
        accepts, asked = counting(accepted)
        draw = recursive_awrs(Order(np.log(p), order), np.log(p), accepts, max_rejects=max_rejects)
        probability = without_replacement(p, order)
        assert len(asked) == len(set(asked)) == draw.checks
        total[draw.token] += probability * np.exp(draw.log_weight)
        checks += probability * draw.checks
        chance += probability
    assert chance == pytest.approx(1.0)
    np.testing.assert_allclose(total, p * np.isin(np.arange(5), accepted), atol=1e-12)
    assert checks <= min(5, (max_rejects or 5) + 1)


def counting(accepted):
    """A predicate, and the list of what it was asked."""
    asked: list[int] = []

    def accepts(token):
        asked.append(token)
        return token in accepted

    return accepts, asked


SAMPLERS = {
    "recursive": recursive_awrs,
    "recursive, 2 rejects": functools.partial(recursive_awrs, max_rejects=2),
    "geometric": geometric_awrs,
    "geometric, 4 accepts": functools.partial(geometric_awrs, max_accepts=4),
    "geometric, 3 rejects": functools.partial(geometric_awrs, max_rejects=3),
    "geometric, 1 reject": functools.partial(geometric_awrs, max_accepts=3, max_rejects=1),
    "the cheaper one": awrs,
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("case", [0, 1, 2])
def test_weights_are_unbiased(name, case):
    p, accepted = DISTRIBUTIONS[case]
    rng = np.random.default_rng(case)
    number = 12_000
    weights, checks = np.zeros((number, 5)), np.zeros(number)
    for row in range(number):
        accepts, asked = counting(accepted)
        draw = SAMPLERS[name](rng, np.log(p), accepts)
        weights[row, draw.token] = np.exp(draw.log_weight)
        checks[row] = draw.checks
        assert len(set(asked)) == len(asked) == draw.checks
    wanted = p * np.isin(np.arange(5), accepted)
    ever = weights.any(0)  # a token of constant weight 0 has no spread
    np.testing.assert_array_equal(ever, wanted > 0)
    family = 5 * 3 * len(SAMPLERS)
    assert_mean(weights[:, ever], wanted[ever], family=family, smallest_bias=0.03)
    if name == "the cheaper one" and case == 1:
        # a token of mass 0.9 is accepted: at most 1 + 2 (1 - p) / p tokens are asked about
        error = checks.std() / np.sqrt(number)
        assert checks.mean() - 4 * error <= 1 + 2 * (1 - p[0]) / p[0] < 2


@pytest.mark.statistical
@pytest.mark.parametrize("max_rejects", [None, 2])
def test_traced_weights_are_unbiased(max_rejects):
    p, accepted = DISTRIBUTIONS[2]
    mask = jnp.isin(jnp.arange(5), jnp.asarray(accepted))
    draw = functools.partial(
        traced_awrs, log_probs=jnp.log(jnp.asarray(p)), accepts=lambda token: mask[token],
        max_rejects=max_rejects,
    )  # fmt: skip
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 100_000))
    weights = np.exp(np.asarray(draws.log_weight))[:, None] * np.eye(5)[np.asarray(draws.token)]
    wanted = p * np.asarray(mask)
    ever = wanted > 0
    assert not weights[:, ~ever].any()
    assert_mean(weights[:, ever], wanted[ever], family=10, smallest_bias=0.01)
    assert (
        int(draws.checks.max()) <= min(5, (max_rejects or 5) + 1) and int(draws.checks.min()) >= 1
    )


def test_traced_draws_end_where_nothing_is_left():
    def refuse(token):
        return jnp.zeros((), bool)

    some = jnp.log(jnp.array([0.5, 0.0, 0.5]))
    draw = traced_awrs(jax.random.key(0), some, refuse)
    assert float(draw.log_weight) == -np.inf and int(draw.checks) == 2
    draw = traced_awrs(jax.random.key(0), jnp.full(3, -jnp.inf), lambda token: ~refuse(token))
    assert float(draw.log_weight) == -np.inf and int(draw.checks) == 0
    draw = traced_awrs(jax.random.key(0), jnp.array([-jnp.inf, -2.0, -jnp.inf]), lambda t: t == 1)
    assert (int(draw.token), int(draw.checks)) == (1, 1)
    assert float(draw.log_weight) == pytest.approx(-2.0)


@pytest.mark.statistical
def test_random_weights_keep_the_evidence_of_a_filter():
    """A chain of letters whose every pair must be allowed, drawn by rejection."""
    rng = np.random.default_rng(4)
    law, allowed = rng.dirichlet(np.ones(5), 5), rng.random((5, 5)) < 0.5
    log_law, mask = jnp.log(jnp.asarray(law)), jnp.asarray(allowed)

    def transition(key, previous, _):
        draw = traced_awrs(key, log_law[previous], lambda token: mask[previous, token])
        return Weighted(draw.token, draw.log_weight)

    model = FeynmanKac(lambda key: jnp.zeros((), jnp.int32), transition, lambda *_: jnp.zeros(()))
    smc = SMC(ParticleFilter(model), num_particles=8, num_runs=4000, progress_bar=False)
    smc.run(jax.random.key(0), num_steps=4)
    exact = np.linalg.matrix_power(law * allowed, 4)[0].sum()
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    assert_mean(evidence / exact, 1.0, family=1, smallest_bias=0.05)


@pytest.mark.parametrize("sampler", [recursive_awrs, geometric_awrs, awrs])
def test_draws_that_cannot_be_accepted_have_weight_zero(sampler):
    rng = np.random.default_rng(0)
    draw = sampler(rng, np.log([0.4, 0.3, 0.3]), lambda token: False)
    assert draw.log_weight == -np.inf and draw.checks == 3
    draw = sampler(rng, np.full(3, -np.inf), lambda token: True)
    assert draw.log_weight == -np.inf and draw.checks == 0
    draw = sampler(rng, np.array([-np.inf, -800.0, -np.inf]), lambda token: True)
    assert (draw.token, draw.checks) == (1, 1) and draw.log_weight == pytest.approx(-800.0)


def test_counts_and_log_probabilities_are_checked():
    rng, p = np.random.default_rng(0), np.log([0.5, 0.5])
    with pytest.raises(ValueError, match="max_rejects must be at least 1"):
        recursive_awrs(rng, p, bool, max_rejects=0)
    with pytest.raises(ValueError, match="max_accepts must be at least 2"):
        geometric_awrs(rng, p, bool, max_accepts=1)
    with pytest.raises(ValueError, match="finite numbers or -inf"):
        awrs(rng, [0.1, np.nan], bool)
    with pytest.raises(ValueError, match=r"got shape \(1, 2\)"):
        awrs(rng, p[None], bool)
