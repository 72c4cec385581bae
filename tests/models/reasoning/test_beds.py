"""Beds against enumeration, and every method that has a target against the exact answers of beds."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale import SMC
from smcscale.kernels import resampling
from smcscale.kernels.annealing import ESSFloor, FromEntropy, FromESS, FromProgress
from smcscale.kernels.resampling import FanOut, Rejection
from smcscale.kernels.tilts import Optimal
from smcscale.kernels.triggers import always
from smcscale.models.reasoning import beds, countdown, mazes, methods
from smcscale.models.reasoning.beds import STOP
from smcscale.models.reasoning.decode import TextState, Written
from smcscale.models.reasoning.known_model import KnownModel, MarkovLaw
from smcscale.models.reasoning.misleading import RIGHT, SURE, WRONG, misleading
from smcscale.models.reasoning.program import read_prompt
from support.montecarlo import assert_mean
from support.sequences import assert_sequences

PARTICLES, RUNS = 8, 4000
NUMBERS, TARGET = (2, 3, 4, 6), 24


@functools.cache
def bed(name):
    return {
        "markov": lambda: beds.markov_texts(0, 1)[0],
        "net": lambda: beds.chains(1, 1)[0],
        "automaton": lambda: beds.weighted_automata(0, 1)[0],
        "maze": lambda: mazes.mazes(0, 1)[0],
        "noisy maze": lambda: mazes.mazes(0, 1, noise=1.0)[0],
        "countdown": lambda: countdown.countdown(NUMBERS, TARGET),
        "misled": lambda: misleading(overconfident=0.25, false_positives=0.25, depth=4, errors=2),
    }[name]()


def enumerated(lm, reward):
    """Every text with its tokens, length, probability and last score, by the law alone."""
    room, size = lm.max_tokens, lm.config.vocabulary_size
    tokens = np.array(list(itertools.product(range(size), repeat=room)), np.int32)
    ends = np.isin(tokens, lm.config.end_tokens)
    lengths = np.where(ends.any(1), ends.argmax(1) + 1, room)
    rest = np.arange(room) >= lengths[:, None]
    whole = (np.where(rest, 0, tokens) == tokens).all(1)  # copies differ after the end only
    tokens, lengths = tokens[whole], lengths[whole]

    @eqx.filter_jit
    @functools.partial(eqx.filter_vmap, in_axes=(None, None, 0, 0))
    def told(law, function, tokens, length):
        rows = jax.vmap(law, in_axes=(None, 0))(tokens, jnp.arange(room))
        chosen = rows[jnp.arange(room), tokens]
        start = lm.start().written
        state = Written(tokens, length, length - 1, jnp.asarray(True), start.cache)
        counted = jnp.where(jnp.arange(room) < length, chosen, 0.0)
        return jnp.sum(counted), function(TextState(state))

    logs, scores = told(lm.law, reward.function, jnp.asarray(tokens), jnp.asarray(lengths))
    return tokens, lengths, np.exp(np.asarray(logs, np.float64)), np.asarray(scores, np.float64)


def answered(bed, tokens, lengths, mass):
    return np.bincount(bed.answers(tokens, lengths), mass, minlength=len(bed.posterior))


# ---- the exact answers


@pytest.mark.parametrize("name", ["markov", "net", "automaton", "maze", "noisy maze", "misled"])
def test_evidence_and_posterior_are_those_of_all_texts(name):
    given = bed(name)
    tokens, lengths, probability, score = enumerated(given.lm, given.reward)
    np.testing.assert_allclose(probability.sum(), 1.0, atol=1e-5)
    mass = probability * score
    np.testing.assert_allclose(mass.sum(), given.evidence, rtol=1e-5)
    posterior = answered(given, tokens, lengths, mass) / mass.sum()
    np.testing.assert_allclose(posterior, given.posterior, atol=1e-5)
    assert given.log_evidence == np.log(given.evidence)
    assert 0 < score[probability > 0].max() <= 1


@pytest.mark.parametrize(("numbers", "target"), [((2, 5, 7), 14), ((6, 6, 4), 20), ((9, 8, 1), 50)])
def test_countdown_is_that_of_all_texts(numbers, target):
    given = countdown.countdown(numbers, target)
    tokens, lengths, probability, score = enumerated(given.lm, given.reward)
    np.testing.assert_allclose(probability.sum(), 1.0, atol=1e-5)
    np.testing.assert_allclose(probability @ score, given.evidence, atol=1e-6)
    solved = (probability > 0) & (score == 1)
    assert solved.sum() == countdown.solvable(numbers, target)
    for text, length in zip(tokens[probability > 0], lengths[probability > 0], strict=True):
        right = countdown.check(given.text(text[:length]), numbers, target)
        row = (tokens == text).all(1)
        assert right == bool(score[row][0] == 1)
    if given.evidence:
        found = answered(given, tokens, lengths, probability * score)
        np.testing.assert_allclose(found / found.sum(), given.posterior, atol=1e-5)
    else:
        assert np.isnan(given.posterior[:-1]).all() and given.log_evidence == -np.inf


def expressions(numbers):
    """Every value that some of the numbers can make, by trees instead of texts."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for size in range(1, len(numbers)):
        for part in itertools.combinations(range(len(numbers)), size):
            rest = [n for k, n in enumerate(numbers) if k not in part]
            for a in expressions([numbers[k] for k in part]):
                for b in expressions(rest):
                    made = (countdown.applied(a, b, sign) for sign in countdown.SIGNS)
                    found |= {value for value in made if value is not None}
    return found


@pytest.mark.parametrize("numbers", [(2, 3, 7), (1, 5, 5), (3, 4, 9, 25)])
def test_solvability_is_that_of_all_expressions(numbers):
    sets = (s for k in range(1, len(numbers) + 1) for s in itertools.combinations(numbers, k))
    reached = set().union(*(expressions(list(s)) for s in sets))
    for target in range(1, 120):
        if target not in numbers:
            assert (countdown.solvable(numbers, target) > 0) == (target in reached)


def test_the_checker_takes_only_what_is_left():
    right = lambda text: countdown.check(text, (2, 3, 4, 6), 24)
    assert right("6 * 4 = 24")
    assert right("3 - 2 = 1\n6 * 1 = 6\n6 * 4 = 24\n")
    assert right("6 / 3 = 2\n2 * 2 = 4\n4 + 4 = 8") is False  # not the target
    assert not right("6 * 4 = 24\n6 - 3 = 3\n24 + 3 = 27\n27 - 3 = 24")  # 6 is used
    assert not right("4 * 4 = 16\n16 + 6 = 22\n22 + 2 = 24")  # one 4 only
    assert not right("2 * 12 = 24")  # 12 was never made
    assert not right("6 * 4 = 25") and not right("4 - 6 = 24") and not right("")
    assert not right("6 * 4 = 24 ok") and not right("6 * 4 = 24\nso it is 24")
    assert not countdown.check("0 / 0 = 24", (0, 0), 24)


def test_random_countdowns_can_be_solved_but_not_at_once():
    for numbers, target in countdown.countdowns(3, 4, size=4):
        assert countdown.solvable(numbers, target) > 0
        assert all(countdown.applied(a, b, s) != target
                   for a, b in itertools.combinations(numbers, 2) for s in countdown.SIGNS)  # fmt: skip
    assert countdown.countdowns(3, 2) == countdown.countdowns(3, 4)[:2]


def test_walks_are_counted_by_hand_and_by_enumeration():
    square = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]) / 2
    # 0 -> {1, 2} -> 3 in two moves; in four moves one detour over 0
    assert mazes.num_walks(square, 0, 3, 2) == 2
    assert mazes.num_walks(square, 0, 3, 4) == 2 + 4
    given = mazes.navigation(square, 0, 3, num_moves=4)
    assert given.evidence == 0.5 + 0.25
    _, _, probability, score = enumerated(given.lm, given.reward)
    assert ((probability > 0) & (score == 1)).sum() == 6
    assert given.text([1, 3]) == "0 -> 1 -> 3"


def test_a_chain_with_one_variable_known_is_bayes_rule():
    moves = np.array([[[0.9, 0.1], [0.2, 0.8]]])
    given = beds.bayes_net([0.3, 0.7], moves, [[1.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(given.evidence, 0.3 * 0.1 + 0.7 * 0.8)
    np.testing.assert_allclose(given.posterior, np.array([0.03, 0.56]) / 0.59)
    assert given.text([0, 1]) == "X1 = 0\nX2 = 1"


def test_what_is_no_bed_is_refused():
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        beds.bayes_net([0.5, 0.5], np.full((1, 2, 2), 0.5), [[1.0, 2.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="must be probabilities"):
        MarkovLaw.of([0.5, 0.6], np.full((1, 2, 2), 0.5))
    with pytest.raises(ValueError, match="largest sum"):
        beds.weighted_automaton([1.0], [[1.0]], [1.0], [[[2.0]]], [2.0], room=2)
    with pytest.raises(ValueError, match="none of them"):
        countdown.countdown((3, 4), 4)
    with pytest.raises(ValueError, match="same node"):
        mazes.navigation(np.eye(2), 1, 1, num_moves=2)
    with pytest.raises(TypeError, match="no network"):
        bed("markov").lm.model  # noqa: B018
    with pytest.raises(ValueError, match="not possible"):
        countdown.written((2, 3), [countdown.SIGNS.index("/")])


# ---- the model


@functools.cache
def in_steps(prior="proposal", **sampling):
    """A bed whose steps have up to two tokens, and another law to draw from."""
    rng = np.random.default_rng(4)
    table, first = rng.dirichlet(np.ones(4), 4), rng.dirichlet(np.full(4, 2.0))
    likelihoods = rng.uniform(0.2, 0.9, (4, 4))
    given = beds.markov_text(first, table, likelihoods, place=1, breaks=(1,), step_tokens=2)
    lm = KnownModel(
        given.lm.law, 4, max_tokens=4, end_tokens=(STOP,), step_tokens=2,
        ends_step=given.lm.ends_step, prior=prior, **sampling,
    )  # fmt: skip
    return given._replace(lm=lm)


def test_steps_are_drawn_with_the_probability_they_say():
    lm = in_steps(temperature=1.5).lm

    @jax.jit
    @jax.vmap
    def two_steps(key):
        first = lm.next_step(lm.start()).sample(key)
        law = lm.next_step(first)
        second = law.sample(jax.random.fold_in(key, 1))
        wrong = Written(
            second.written.tokens, second.written.length + 1, *jax.tree.leaves(second.written)[2:4],
            second.written.cache,
        )  # fmt: skip
        return first.written, second, law.log_prob(second), law.log_prob(TextState(wrong))

    first, second, told, wrong = two_steps(jax.random.split(jax.random.key(0), 300))
    np.testing.assert_allclose(told, second.step_log_proposal, atol=1e-5)
    assert np.all(np.asarray(wrong) == -np.inf)
    p = np.asarray(jax.vmap(lm.correction)(second))
    assert np.all(p == 0)  # the law drawn from is the model, unless prior="model"
    tokens, length = np.asarray(first.tokens), np.asarray(first.length)
    ends = np.isin(tokens, (STOP, 1))
    np.testing.assert_array_equal(length, np.where(ends[:, 0], 1, 2))
    over = np.asarray(first.finished)
    added = np.asarray(second.written.length - second.written.begin)
    assert np.all(added[over] == 0) and over.any()
    assert np.all(np.asarray(told)[over] == 0)
    text = np.asarray(second.written.tokens)[~over][0]
    plain = in_steps().lm
    logits = np.asarray(plain.logits(text))
    np.testing.assert_allclose(np.exp(logits).sum(1), 1.0, atol=1e-5)
    rows = np.asarray(plain.law.moves)[np.arange(3), text[:3]]
    np.testing.assert_allclose(logits[:3], rows, atol=1e-6)


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ({}, [WRONG, WRONG, WRONG, WRONG]),
        ({"overconfident": 1.0}, [SURE, SURE, WRONG, WRONG]),
        ({"false_positives": 1.0}, [RIGHT, RIGHT, RIGHT, SURE]),
    ],
)
def test_a_judge_is_misled_as_its_knobs_say(knob, told):
    given = misleading(depth=4, errors=2, **knob)
    for text, expected in (((1, 0, 2, 0), told), ((0, 0, 0, 0), [RIGHT] * 4)):
        start = given.lm.start().written
        scores = [
            given.reward.function(TextState(Written(
                jnp.array(text), jnp.asarray(n), jnp.asarray(n - 1), jnp.asarray(n == 4), start.cache
            )))
            for n in range(1, 5)
        ]  # fmt: skip
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
    answers = given.answers(np.array([[0, 0, 0, 0], [1, 0, 2, 0], [0, 2, 1, 1]]), np.full(3, 4))
    assert answers.tolist() == [0, 1, 4]
    with pytest.raises(ValueError, match="shares of all errors"):
        misleading(overconfident=0.7, false_positives=0.5)


# ---- properly weighted methods

SCHEMES = ("multinomial", "stratified", "residual", "ssp", "killing")
MARKOV = {"filter": methods.particle_filter(), "entropic": methods.entropic_filter(5)}
SLOW_MARKOV = {
    "steering": methods.steering(4, 2),
    "best of n": methods.best_of_n(),
    "look-ahead": methods.look_ahead(2),
    "entropic, entropy": methods.entropic_filter(5, FromEntropy()),
    "entropic, progress": methods.entropic_filter(5, FromProgress()),
    "ess floor": methods.particle_filter(trigger=always, annealing=ESSFloor(0.8)),
    "beams drawn": methods.particle_filter(
        trigger=always, resampling=FanOut(resampling.multinomial, 4)
    ),
    "beams without replacement": methods.particle_filter(
        trigger=always, resampling=FanOut(resampling.systematic, 4), tilt=Optimal(2)
    ),
    "rejection": methods.particle_filter(trigger=always, resampling=Rejection()),
} | {
    scheme: methods.particle_filter(trigger=always, resampling=getattr(resampling, scheme))
    for scheme in SCHEMES
}
OTHERS = ("net", "automaton", "noisy maze", "countdown", "misled")
SLOW_OTHERS = list(itertools.product((*OTHERS, "maze"), ("look-ahead", "entropic, entropy")))
FAMILY = 2 * (len(MARKOV) + len(SLOW_MARKOV) + len(OTHERS) + len(SLOW_OTHERS) + 3)


def run(bed, method, num_particles=PARTICLES, num_runs=RUNS, seed=7):
    smc = SMC(
        method.filter, num_particles=num_particles, num_runs=num_runs,
        num_islands=method.num_islands, progress_bar=False,
    )  # fmt: skip
    prompt = read_prompt(bed.lm, bed.reward, ())
    options = {"potential": beds.EXACT} | method.options
    smc.run(jax.random.key(seed), bed.lm, bed.reward, prompt, max_steps=bed.max_steps, **options)
    return smc


def shares(bed, smc):
    """Weight `(R, K)` of each answer in each run; zeros where all particles are dead."""
    log_weights = np.asarray(smc.result.log_weights, np.float64)
    top = log_weights.max(1, keepdims=True)
    weights = np.exp(log_weights - np.where(np.isfinite(top), top, 0.0))
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
    return np.einsum("rn,rnk->rk", weights, said(bed, smc))


def said(bed, smc):
    """`(R, N, K)`, the answer of each particle as a row with a one."""
    samples, _ = smc.get_samples(weighted=True)
    written = samples["step"].written
    given = bed.answers(np.asarray(written.tokens), np.asarray(written.length))
    return np.eye(len(bed.posterior))[given].reshape(*smc.result.log_weights.shape, -1)


def assert_exact(bed, method, smallest_bias, **options):
    smc = run(bed, method, **options)
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    mass = shares(bed, smc) * evidence[:, None]
    target = bed.evidence * bed.posterior
    assert_sequences(mass, target, family=FAMILY, smallest_bias=smallest_bias)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "name", [*MARKOV, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MARKOV)]
)
def test_evidence_and_answers_of_markov_texts_are_exact(name):
    num_runs = 3 * RUNS if name.startswith("beams") else RUNS  # two survivors: more variance
    assert_exact(bed("markov"), (MARKOV | SLOW_MARKOV)[name], 0.05, num_runs=num_runs)


#: particles, and the smallest bias of the evidence to see with them
SETTINGS = {
    "net": (8, 0.04), "automaton": (8, 0.03), "maze": (8, 0.1), "noisy maze": (8, 0.1),
    "countdown": (32, 0.15), "misled": (8, 0.06),
}  # fmt: skip


@pytest.mark.statistical
@pytest.mark.parametrize("name", OTHERS)
def test_the_filter_is_exact_on_every_bed(name):
    size, bias = SETTINGS[name]
    assert_exact(bed(name), MARKOV["filter"], bias, num_particles=size)


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(("name", "method"), SLOW_OTHERS)
def test_other_methods_are_exact_on_every_bed(name, method):
    size, bias = SETTINGS[name]
    assert_exact(bed(name), SLOW_MARKOV[method], 1.5 * bias, num_particles=size)


@pytest.mark.slow
@pytest.mark.statistical
def test_steps_of_several_tokens_and_another_proposal_keep_the_target():
    assert_exact(in_steps(), MARKOV["filter"], 0.05)
    assert_exact(in_steps("model", temperature=1.5), MARKOV["filter"], 0.05)
    # as a proposal that is not corrected it has another evidence
    heated = run(in_steps(temperature=1.5), MARKOV["filter"])
    found = np.exp(np.asarray(heated.log_evidence, np.float64))
    error = found.std(ddof=1) / np.sqrt(RUNS)
    assert abs(found.mean() - in_steps().evidence) > 5 * error


# ---- as published


@functools.cache
def judged():
    """A Markov bed whose odds are mild, its texts, and the score of each row of each text."""
    rng = np.random.default_rng(2)
    first, table = rng.dirichlet(np.full(3, 3.0)), rng.dirichlet(np.ones(3), 3)
    likelihoods = rng.uniform(0.5, 0.95, (4, 3))
    likelihoods[:, STOP] = rng.uniform(0.35, 0.7, 4)
    given = beds.markov_text(first, table, likelihoods, place=1)
    tokens, lengths, probability, _ = enumerated(given.lm, given.reward)
    rows = np.arange(4)
    told = np.where(rows < lengths[:, None], likelihoods[rows, tokens], 1.0)
    # a finished text shows its last score again
    return given, tokens, lengths, probability, np.cumprod(told, axis=1)


@pytest.mark.statistical
def test_the_published_filter_has_the_target_that_its_table_says():
    given, tokens, lengths, probability, scores = judged()
    odds = scores / (1 - scores)
    mass = probability * odds.prod(1)  # the last again at every row left: o^(T - l + 1)
    target = answered(given, tokens, lengths, mass)
    smc = run(given, methods.published_filter())
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    found = shares(given, smc) * evidence[:, None]
    assert_sequences(found, target, family=FAMILY, smallest_bias=0.2)
    # and that is neither the posterior nor the target of odds that count once
    once = answered(given, tokens, lengths, probability * odds[:, -1])
    for other in (given.posterior, once / once.sum()):
        assert abs(target / target.sum() - other).max() > 0.03


def chosen(bed, method, smc):
    """How often each answer was handed in, `(K,)`."""
    samples, _ = smc.get_samples(weighted=True)
    shape = smc.result.log_weights.shape
    scores = np.asarray(samples["score"], np.float64).reshape(shape)
    numbers = said(bed, smc).argmax(2)
    weights = np.asarray(smc.result.log_weights)
    found = [
        int(method.select([str(a) for a in row], w, s))
        for row, w, s in zip(numbers, weights, scores, strict=True)
    ]
    return np.bincount(found, minlength=len(bed.posterior))


def p_value(counts, law):
    """Of a chi-square test that counts come from a law."""
    assert counts[law == 0].sum() == 0
    live = law > 0
    return scipy.stats.chisquare(counts[live], counts.sum() * law[live] / law.sum()).pvalue


@pytest.mark.statistical
def test_the_best_of_n_has_the_law_of_a_maximum():
    given, tokens, lengths, probability, scores = judged()
    smc = run(given, methods.best_of_n(), num_runs=3000)
    counts = chosen(given, methods.best_of_n(), smc)
    last = np.round(scores[:, -1], 6)
    below = np.array([probability[last < level].sum() for level in last])
    same = np.array([probability[last == level].sum() for level in last])
    best = probability / same * ((below + same) ** PARTICLES - below**PARTICLES)
    np.testing.assert_allclose(best.sum(), 1.0, atol=1e-5)
    assert p_value(counts, answered(given, tokens, lengths, best)) > 1e-3 / FAMILY
    assert p_value(counts, given.posterior) < 1e-9


@pytest.mark.slow
@pytest.mark.statistical
def test_beam_search_does_not_sample_the_posterior():
    given = judged()[0]
    method = methods.beam_search(2)
    smc = run(given, method, num_runs=3000)
    counts = chosen(given, method, smc)
    assert p_value(counts, given.posterior) < 1e-9
    # nor does it meet the posterior with more particles, as the filter does
    many = run(given, method, num_particles=256, num_runs=200)
    share = chosen(given, method, many) / 200
    assert abs(share - given.posterior).max() > 0.2


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("schedule", [FromESS(), FromProgress()], ids=["ess", "progress"])
def test_entropic_filtering_as_published_loses_what_annealing_takes(schedule):
    """Many particles: `p prod G^(1 / temperature)`, temperatures from the laws of the rows before."""
    given, tokens, lengths, probability, scores = judged()
    # cubed odds: few texts hold the weight, so annealing acts
    steep = lambda previous, score: 3.0 * (jnp.log(score) - jnp.log1p(-score))
    logs = 3.0 * np.log(scores / (1 - scores))
    rows, law, acted = logs.shape[1], probability.copy(), []
    for row in range(rows - 1):
        factor = np.exp(logs[:, row])
        effective = (law @ factor) ** 2 / (law @ factor**2) / law.sum()
        progress = (row + 1) / rows
        temperature = 1.0
        if effective < 0.5 and progress < 0.5:
            temperature = {
                FromESS: max(1, (1 - progress) / effective), FromProgress: 2 - progress,
            }[type(schedule)]  # fmt: skip
        assert abs(effective - 0.5) > 0.05 or progress >= 0.5
        acted.append(temperature > 1.05)
        law = law * factor ** (1 / temperature)
        law /= law.sum()
    assert any(acted)
    limit = answered(given, tokens, lengths, law * np.exp(logs[:, -1]))
    limit /= limit.sum()
    untempered = answered(given, tokens, lengths, probability * np.exp(logs.sum(1)))
    untempered /= untempered.sum()
    method = methods.published_entropic_filter(rows, schedule)
    method = methods.Method(method.filter, {"potential": steep, "finished": "reweigh"})
    smc = run(given, method, num_particles=4000, num_runs=300)
    found = shares(given, smc)
    live = limit > 1e-3
    assert_mean(found[:, live], limit[live], family=2 * len(limit), smallest_bias=0.02)
    assert abs(found.mean(0) - untempered).max() > 0.03
    with pytest.raises(ValueError, match="target"):
        smc.log_evidence  # noqa: B018
