"""Particle Gibbs: a sweep leaves the target as it is, chains swap as they should."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale import ParticleFilter
from smcscale.kernels import resampling
from smcscale.kernels.triggers import always, ess_below
from smcscale.models.reasoning import gibbs, methods
from smcscale.models.reasoning.decode import TextState
from smcscale.models.reasoning.gibbs import Sweeps
from smcscale.models.reasoning.known_model import KnownModel
from smcscale.models.reasoning.outcome import run_method
from smcscale.models.reasoning.potentials import Potential, difference, product
from smcscale.models.reasoning.program import read_prompt, reason
from smcscale.models.reasoning.rewards import RewardFunction
from support.reasoning import tiny

#: texts of at most three tokens; 0 ends one
SIZE, ROOM, CHAINS = 3, 3, 60_000
FAMILY = 40


class Remembers(eqx.Module):
    """A law that looks back over the whole text, so that a rest goes badly after another beginning."""

    table: jax.Array

    def __call__(self, tokens, length):
        place = jnp.arange(ROOM)
        code = jnp.sum(jnp.where(place < length, (tokens + 1) * 4**place, 0))
        return self.table[code]


class Scores(eqx.Module):
    """A score of the whole text so far, another for every text."""

    table: jax.Array

    def __call__(self, state):
        place = jnp.arange(ROOM)
        written = state.written
        code = jnp.sum(jnp.where(place < written.length, (written.tokens + 1) * 4**place, 0))
        return self.table[code]


@functools.cache
def model(prior="proposal", temperature=1.0, step_tokens=1):
    rng = np.random.default_rng(3)
    law = Remembers(jnp.asarray(np.log(rng.dirichlet(np.full(SIZE, 1.5), 4**ROOM)), jnp.float32))
    ends = np.array([True] + [step_tokens == 1] * (SIZE - 1))
    ends[1] = True
    lm = KnownModel(
        law, SIZE, max_tokens=ROOM, end_tokens=(0,), step_tokens=step_tokens, ends_step=ends,
        prior=prior, temperature=temperature,
    )  # fmt: skip
    return lm, RewardFunction(Scores(jnp.asarray(rng.uniform(0.05, 0.95, 4**ROOM), jnp.float32)))


def texts():
    found = []
    for a in range(SIZE):
        if a == 0:
            found.append((0,))
            continue
        for b in range(SIZE):
            if b == 0:
                found.append((a, 0))
                continue
            found += [(a, b, c) for c in range(SIZE)]
    return found


def code(text):
    return sum((t + 1) * 4**k for k, t in enumerate(text))


def target(lm, reward, temperature=1.0, each=False):
    """The law of texts under the filter's target, by enumeration."""
    law, score = np.asarray(lm.law.table, np.float64), np.asarray(reward.function.table, np.float64)
    mass = []
    for text in texts():
        logs = sum(law[code(text[:k]), t] for k, t in enumerate(text))
        ends = np.asarray(lm.ends_step)
        stops = [k + 1 for k, t in enumerate(text) if ends[t] or k + 1 == len(text)]
        gain = sum(np.log(score[code(text[:k])]) for k in (stops if each else stops[-1:]))
        mass.append(np.exp(logs + gain / temperature))
    return np.array(mass) / np.sum(mass)


def as_written(lm, chosen):
    """Texts by number, as the filter holds them."""
    rows = np.zeros((len(texts()), ROOM), np.int32)
    for number, text in enumerate(texts()):
        rows[number, : len(text)] = text
    lengths = np.array([len(text) for text in texts()], np.int32)
    start = lm.start().written
    light = gibbs._light(start)
    count = len(chosen)
    full = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), light)
    return eqx.tree_at(
        lambda w: (w.tokens, w.length),
        full,
        (jnp.asarray(rows)[chosen], jnp.asarray(lengths)[chosen]),
    )


def numbers_of(written):
    codes = {code(text): number for number, text in enumerate(texts())}
    tokens, lengths = np.asarray(written.tokens), np.asarray(written.length)
    shape = lengths.shape
    tokens, lengths = tokens.reshape(-1, ROOM), lengths.reshape(-1)
    place = np.arange(ROOM)
    found = np.where(place < lengths[:, None], (tokens + 1) * 4**place, 0).sum(1)
    return np.vectorize(codes.__getitem__)(found).reshape(shape)


@functools.partial(eqx.filter_jit, donate="none")
def _swept(pf, keys, args, options, kept, size, ancestors):
    one = lambda key, text: gibbs.sweep(pf, key, args, options, text, size, ancestors)
    return jax.vmap(one)(keys, kept)


def swept(lm, reward, pf, start, *, num_particles=2, ancestors=True, seed=0, **options):
    """The kept texts of many chains after a sweep, and the weighted texts of the sweep."""
    keys = jax.random.split(jax.random.key(seed), len(start))
    args = (lm, reward, read_prompt(lm, reward, ()))
    told = {"max_steps": ROOM, **options}
    found, _, log_weights, kept, _, broken = _swept(
        pf, keys, args, told, as_written(lm, start), num_particles, ancestors
    )
    assert not np.asarray(broken).any()
    weights = np.asarray(jax.nn.softmax(log_weights, axis=1), np.float64)
    shares = np.zeros((len(start), len(texts())))
    np.add.at(shares, (np.arange(len(start))[:, None], numbers_of(found)), weights)
    return numbers_of(kept), shares


def assert_law(numbers, law):
    counts, live = np.bincount(numbers, minlength=len(law)), law > 1e-3
    if not live.all():  # rare texts together
        counts, law = (np.append(x[live], x[~live].sum()) for x in (counts, law))
    p_value = scipy.stats.chisquare(counts, counts.sum() * law).pvalue
    assert p_value > 1e-3 / FAMILY, (p_value, counts / counts.sum() - law)


def from_target(law, seed=1):
    return np.random.default_rng(seed).choice(len(law), CHAINS, p=law)


CASES = {
    "kept as it is": (False, always, "systematic", 2),
    "ancestors, ess": (True, ess_below(0.8), "residual", 3),
}
SLOW_CASES = {
    "ancestors": (True, always, "systematic", 2),
    "ancestors, multinomial": (True, always, "multinomial", 3),
} | {
    f"{scheme}, {ancestors}": (ancestors, ess_below(0.8), scheme, 4)
    for scheme in ("multinomial", "stratified", "systematic", "residual", "killing")
    for ancestors in (False, True)
}


@pytest.mark.statistical
@pytest.mark.parametrize("potential", [difference, pytest.param(product, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_a_sweep_leaves_the_target_as_it_is(name, potential):
    ancestors, trigger, scheme, size = (CASES | SLOW_CASES)[name]
    lm, reward = model()
    law = target(lm, reward, each=potential is product)
    pf = ParticleFilter(
        reason, resampling=getattr(resampling, scheme), trigger=trigger, store="last"
    )
    start = from_target(law)
    after, shares = swept(
        lm, reward, pf, start, num_particles=size, ancestors=ancestors, potential=potential
    )
    assert_law(start, law)
    assert_law(after, law)
    # the weighted texts of the sweep have that mean, too
    shares, law = shares[:, law > 1e-3], law[law > 1e-3]
    error = (shares.mean(0) - law) / (shares.std(0, ddof=1) / np.sqrt(CHAINS))
    assert np.abs(error).max() < scipy.stats.norm.isf(1e-3 / (2 * FAMILY * len(law)))
    assert (after != start).mean() > 0.1  # and it moves


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("step_tokens", [1, 2])
def test_steps_of_several_tokens_and_a_heated_proposal_keep_the_target(step_tokens):
    lm, reward = model("model", 1.5, step_tokens)
    law = target(lm, reward)
    pf = ParticleFilter(reason, trigger=always, store="last")
    start = from_target(law)
    after, _ = swept(lm, reward, pf, start)
    assert_law(after, law)


@pytest.mark.slow
@pytest.mark.statistical
def test_ancestor_sampling_changes_beginnings_that_stay_otherwise():
    lm, reward = model()
    pf = ParticleFilter(reason, trigger=always, store="last")
    first = np.array([text[0] for text in texts()])
    start = from_target(target(lm, reward))
    moved = [
        (first[swept(lm, reward, pf, start, ancestors=on)[0]] != first[start]).mean()
        for on in (False, True)
    ]
    assert moved[1] > moved[0] + 0.02


def test_the_density_of_a_text_is_that_of_its_words_and_scores():
    lm, reward = model("model", 1.5)
    pf = ParticleFilter(reason, store="last")
    args = (lm, reward, read_prompt(lm, reward, ()))
    kept = as_written(lm, np.arange(len(texts())))
    for temperature in (1.0, 3.0):
        told = gibbs._heated({"max_steps": ROOM}, temperature)
        density = jax.vmap(
            lambda text, told=told: gibbs.text_log_density(pf, jax.random.key(0), args, told, text)
        )(kept)
        law = target(lm, reward, temperature)
        found = np.asarray(density, np.float64)
        np.testing.assert_allclose(found - found[0], np.log(law / law[0]), atol=1e-4)


@pytest.mark.statistical
def test_chains_of_two_temperatures_keep_both_targets_when_they_swap(monkeypatch):
    lm, reward = model()
    pf = ParticleFilter(reason, store="last")
    args = (lm, reward, read_prompt(lm, reward, ()))
    chains = [gibbs._heated({"max_steps": ROOM}, t) for t in (1.0, 4.0)]
    laws = [target(lm, reward, t) for t in (1.0, 4.0)]
    # every pair of texts: how often it swaps decides about both laws exactly
    number = len(texts())
    density = [
        np.asarray(jax.vmap(
            lambda text, told=told: gibbs.text_log_density(pf, jax.random.key(0), args, told, text)
        )(as_written(lm, np.arange(number))), np.float64)
        for told in chains
    ]  # fmt: skip
    monkeypatch.setattr(
        gibbs, "text_log_density",
        lambda pf, key, args, told, text: density[0 if told is chains[0] else 1][text],
    )  # fmt: skip
    pairs = np.stack([from_target(law, seed)[:6000] for seed, law in enumerate(laws)], 1)
    after = []
    for count, pair in enumerate(pairs):
        kept = list(pair)
        gibbs._swap(pf, jax.random.key(count), args, chains, kept)
        after.append(kept)
    after = np.array(after)
    assert 0.05 < (after != pairs).any(1).mean() < 0.95
    for column, law in enumerate(laws):
        assert_law(after[:, column], law)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("method", "seeds"),
    [
        pytest.param(methods.particle_gibbs(2), 20, id="gibbs", marks=pytest.mark.slow),
        pytest.param(methods.parallel_tempering((1.0, 3.0), 2), 2, id="tempering"),
    ],
)
def test_methods_come_near_the_posterior_and_count_what_they_wrote(method, seeds):
    lm, reward = model()
    law = target(lm, reward)
    prompt = read_prompt(lm, reward, ())
    shares = []
    for seed in range(seeds):
        outcome = run_method(
            method, jax.random.key(seed), lm, reward, prompt, num_particles=16, max_steps=ROOM
        )
        assert outcome.lengths.shape == (16,)
        weights = np.exp(outcome.log_weights)
        assert weights.sum() == pytest.approx(1.0)
        place = np.arange(ROOM) < outcome.lengths[:, None]
        codes = np.where(place, (outcome.tokens + 1) * 4 ** np.arange(ROOM), 0).sum(1)
        shares.append([weights[codes == code(text)].sum() for text in texts()])
    if (
        seeds > 10
    ):  # two sweeps are not yet equilibrium: as near as a filter of so many particles is
        error = np.std(shares, axis=0, ddof=1) / np.sqrt(seeds)
        assert (np.abs(np.mean(shares, axis=0) - law) < 5 * error + 0.02).all()
    populations = method.num_populations
    assert outcome.cost["tokens"] >= populations * 15 * 1
    assert outcome.cost["tokens"] <= populations * 16 * ROOM
    assert outcome.cost["read_tokens"] > 0


def test_kept_text_is_followed_by_a_network_as_it_was_written():
    """The steps of a written text, followed one by one, give its state: tokens, sums and cache."""
    lm = tiny.language_model(max_tokens=8).given(tiny.PROMPT)
    written = state = lm.start()
    draw = eqx.filter_jit(lambda lm, state, key: lm.next_step(state).sample(key))
    follow = eqx.filter_jit(lambda lm, state, *step: lm.next_step(state).follow(*step))
    told = eqx.filter_jit(lambda lm, state, after: lm.next_step(state).log_prob(after))
    for key in jax.random.split(jax.random.key(5), 4):
        written = draw(lm, written, key)
    steps = gibbs.steps_of(lm, written.written, 4)
    for row in range(4):
        before = state
        state, density = follow(lm, state, steps.tokens[row], steps.counts[row])
        np.testing.assert_allclose(density, told(lm, before, state), atol=1e-5)
    one, other = state.written, written.written
    length = int(other.length)
    assert int(one.length) == length and bool(one.finished) == bool(other.finished)
    np.testing.assert_array_equal(one.tokens[:length], other.tokens[:length])
    for name in ("log_prob", "log_proposal", "begin_log_prob"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4)
    for mine, theirs in zip(jax.tree.leaves(one.cache), jax.tree.leaves(other.cache), strict=True):
        np.testing.assert_allclose(mine[:, :, :length], theirs[:, :, :length], atol=1e-4)


def test_what_cannot_be_followed_here_has_probability_zero():
    lm, _ = model()
    empty = lm.start()
    dead = lm.next_step(empty).follow(jnp.array([0]), jnp.int32(1))[0]
    assert bool(dead.finished)
    for state, tokens, count in ((dead, [1], 1), (empty, [0], 0), (empty, [1], 2)):
        after, density = lm.next_step(state).follow(jnp.array(tokens), jnp.int32(count))
        assert density == -jnp.inf
        assert isinstance(after, TextState) and after.written.length == state.written.length
    after, density = lm.next_step(dead).follow(jnp.array([0]), jnp.int32(0))
    assert density == 0.0 and bool(after.finished)


@pytest.mark.refusal
def test_bad_input_is_refused_by_name():
    lm, reward = model()
    prompt = read_prompt(lm, reward, ())
    run = functools.partial(
        gibbs.run, key=jax.random.key(0), lm=lm, prm=reward, prompt=prompt, max_steps=ROOM
    )
    with pytest.raises(ValueError, match="burn_in = 4 of 4"):
        Sweeps(4, 4)
    with pytest.raises(ValueError, match="temperatures"):
        Sweeps(4, 1, True, (1.0, 0.0))
    with pytest.raises(ValueError, match="num_particles = 1"):
        run(ParticleFilter(reason), Sweeps(), num_particles=1)
    with pytest.raises(ValueError, match="ssp"):
        run(ParticleFilter(reason, resampling=resampling.ssp), Sweeps(), num_particles=2)
    with pytest.raises(ValueError, match="takes no annealing"):
        run(methods.entropic_filter(3).filter, Sweeps(), num_particles=2)
    with pytest.raises(ValueError, match="another program"):
        run(ParticleFilter(lambda: None), Sweeps(), num_particles=2)
    assert isinstance(Potential(difference, temperature=2.0)(0.5, 0.5), jax.Array)
