"""Masked diffusion: evidence and law against enumeration of all sequences, and planted mistakes."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.stats

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.models.diffusion import guidance, masked, potentials, reveal, token_steering
from smcscale.models.diffusion.masked import unmask
from smcscale.models.diffusion.reveal import blank, even_levels
from smcscale.models.diffusion.token_steering import TokenSteering
from support.rules import OneRule
from support.sequences import assert_sequences, sequence_masses

V, L, RUNS = 3, 3, 4000
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
RNG = np.random.default_rng(4)
JOINT, OTHER = (RNG.dirichlet(np.full(V**L, 0.7)).reshape((V,) * L) for _ in range(2))
REWARD = 0.8 * RNG.normal(size=(V,) * L) - 0.5
LIKELIHOOD = RNG.uniform(0.05, 0.95, size=(V,) * L)


class Table(eqx.Module):
    """A function of whole sequences, by table."""

    values: jax.Array

    def __call__(self, tokens):
        return self.values[tuple(tokens)]


class LogLikelihood(eqx.Module):
    """The exact classifier `log E[p(z | x) | tokens shown]`, and `distort` times itself before the end."""

    log_joint: jax.Array
    log_likelihood: jax.Array
    distort: float = 1.0

    def __call__(self, tokens, level):
        fits = jnp.all((tokens == V) | (jnp.asarray(SEQUENCES) == tokens), axis=1)
        joint = jnp.where(fits, self.log_joint.reshape(-1), -jnp.inf)
        exact = jax.nn.logsumexp(joint + self.log_likelihood.reshape(-1)) - jax.nn.logsumexp(joint)
        return exact * jnp.where(jnp.any(tokens == V), self.distort, 1.0)


NETWORK = masked.ExactMasked(jnp.log(jnp.asarray(JOINT)))
NETWORK_OTHER = masked.ExactMasked(jnp.log(jnp.asarray(OTHER)))
REWARDS = Table(jnp.asarray(REWARD))
LEVELS = even_levels(L)
#: comparisons of evidence and chi-squares of law in this file, slow ones included
FAMILY = 60


def tables_of(joint, tokens):
    """Exact conditionals `(L, V)` of a joint law given the tokens shown, in NumPy."""
    given = joint.copy()
    for axis, token in enumerate(tokens):
        if token != V:
            keep = np.arange(V) == token
            given = given * keep.reshape([V if k == axis else 1 for k in range(L)])
    sums = [given.sum(tuple(k for k in range(L) if k != axis)) for axis in range(L)]
    return np.array(sums) / given.sum()


def chain_law(shown_of, tables=lambda tokens: tables_of(JOINT, tokens), rows=L, weight=None):
    """Mass of every sequence after a chain of rows, by enumeration of all `(V + 1)^L` states.

    `shown_of(tables, tokens, row)` lists pairs of probability and `shown (L,)`; `weight(tables)` is
    what a token shown counts with besides its probability.
    """
    law = {(V,) * L: 1.0}
    for row in range(rows):
        after: dict = {}
        for tokens, mass in law.items():
            found = tables(tokens)
            counted = found if weight is None else found * weight(tokens)
            for chance, shown in shown_of(found, tokens, row):
                options = []
                for k, token in enumerate(tokens):
                    if token != V:
                        options.append([(token, 1.0)])
                    else:
                        kept = [(V, 1 - shown[k])]
                        options.append([(v, shown[k] * counted[k, v]) for v in range(V)] + kept)
                for choice in itertools.product(*options):
                    value = mass * chance * np.prod([p for _, p in choice])
                    if value > 0:
                        new = tuple(t for t, _ in choice)
                        after[new] = after.get(new, 0.0) + value
        law = after
    return np.array([law.get(tuple(x), 0.0) for x in SEQUENCES]).reshape((V,) * L)


def shown_ancestral(rows):
    return lambda tables, tokens, row: [(1.0, np.full(L, 1 / (rows - row)))]


def shown_random(tables, tokens, row):
    masks = [k for k in range(L) if tokens[k] == V]
    return [(1 / len(masks), np.eye(L)[k]) for k in masks]


def shown_confident(tables, tokens, row):
    masks = np.array(tokens) == V
    return [(1.0, np.eye(L)[np.argmax(np.where(masks, tables.max(1), -1))])]


def shown_first(tables, tokens, row):
    return [(1.0, np.eye(L)[next(k for k in range(L) if tokens[k] == V)])]


ORDERS = {
    reveal.in_random_order: shown_random,
    reveal.left_to_right: shown_first,
    reveal.most_confident: shown_confident,
}


def replicates(num_particles=4, num_runs=RUNS, seed=7, start=None, levels=LEVELS, **options):
    """Unnormalized mass `(R, V^L)` that each run gives every sequence; its sum is the evidence."""
    kernels = {k: options.pop(k) for k in ("trigger", "annealing", "resampling") if k in options}
    network = options.pop("network", NETWORK)
    smc = SMC(
        ParticleFilter(unmask, store="last", **{"trigger": triggers.always, **kernels}),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(
        jax.random.key(seed), network, blank(L, V) if start is None else start, levels, **options
    )
    return sequence_masses(smc, L, V)


def assert_target(mass, target, bias=0.06):
    assert_sequences(mass, target, family=FAMILY, smallest_bias=bias)


# ---- the kernel


def test_the_exact_network_is_the_conditional_law():
    for tokens in [(V, V, V), (1, V, V), (V, 2, 0), (0, V, 1)]:
        ours = jax.nn.softmax(NETWORK(jnp.array(tokens)))
        np.testing.assert_allclose(ours, tables_of(JOINT, tokens), atol=2e-6)


def test_the_transition_is_a_density_over_the_next_tokens():
    tokens, shown = jnp.array([V, 1, V]), jnp.array([0.3, 0.9, 1.0])
    log_probs = jax.nn.log_softmax(NETWORK(tokens))
    law = reveal.transition(log_probs, tokens, shown)
    every = jnp.array(list(itertools.product(range(V + 1), repeat=L)))
    log_prob = np.asarray(law.log_prob(every), np.float64)
    table = np.exp(np.asarray(log_probs, np.float64))
    for x, found in zip(np.asarray(every), log_prob, strict=True):
        exact = (0.7 if x[0] == V else 0.3 * table[0, x[0]]) * (x[1] == 1)
        exact *= 0.0 if x[2] == V else table[2, x[2]]
        np.testing.assert_allclose(np.exp(found), exact, atol=1e-6)
    drawn = np.asarray(law.sample(jax.random.key(0), (4000,)))
    counts = np.bincount(drawn @ (V + 1) ** np.arange(L)[::-1], minlength=len(log_prob))
    live = log_prob > -np.inf
    assert counts[~live].sum() == 0
    expected = np.exp(log_prob[live]) / np.exp(log_prob[live]).sum() * 4000
    assert scipy.stats.chisquare(counts[live], expected).pvalue > 1e-4


@pytest.mark.parametrize("order", ORDERS)
def test_one_token_a_row_has_the_joint_law_in_any_order(order):
    np.testing.assert_allclose(chain_law(ORDERS[order]), JOINT, atol=1e-12)


def test_several_tokens_a_row_have_another_law():
    """The factorized kernel is biased, less with more rows."""
    distances = [
        0.5 * np.abs(chain_law(shown_ancestral(rows), rows=rows) - JOINT).sum()
        for rows in (1, 2, 4, 8)
    ]
    assert distances[0] > 0.1
    assert all(b < 0.75 * a for a, b in itertools.pairwise(distances))


@pytest.mark.statistical
@pytest.mark.parametrize("order", [reveal.in_random_order, reveal.most_confident])
def test_the_program_has_the_law_of_its_rule(order):
    assert_target(replicates(1, 4 * RUNS, reveal=order), JOINT)


@pytest.mark.statistical
def test_a_prompt_is_kept():
    start = blank(L, V).at[1].set(2)
    given = JOINT * (np.arange(V) == 2)[None, :, None]
    mass = replicates(1, 4 * RUNS, start=start, reveal=reveal.in_random_order)
    assert_target(mass, given / given.sum())


# ---- steering

TILTED = JOINT * np.exp(0.9 * REWARD)


@pytest.mark.statistical
@pytest.mark.parametrize(("which", "bias"), list(enumerate((0.06, 0.06, 0.2, 0.2))))
def test_every_rule_has_the_same_target(which, bias):
    steering = TokenSteering(REWARDS, 0.9, OneRule(jnp.asarray(which)))
    mass = replicates(reveal=reveal.in_random_order, steering=steering)
    assert_target(mass, TILTED, bias)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "kernels",
    [
        {"trigger": triggers.ess_below(0.7), "resampling": resampling.multinomial},
        pytest.param({"annealing": annealing.Fixed(0.5)}, marks=pytest.mark.slow),
        pytest.param({"annealing": annealing.ESSFloor(0.7)}, marks=pytest.mark.slow),
        pytest.param({"resampling": resampling.ssp}, marks=pytest.mark.slow),
    ],
)
def test_any_kernel_runs_it_unchanged(kernels):
    scored = potentials.Interval(start=2, every=2)
    steering = TokenSteering(REWARDS, 0.9, potentials.maximum, estimate=_mean, scored=scored)
    mass = replicates(reveal=reveal.left_to_right, steering=steering, **kernels)
    assert_target(mass, TILTED)


def _mean(rewards, strength):
    return jnp.mean(rewards)


@pytest.mark.statistical
def test_rows_of_several_tokens_target_the_chains_own_law():
    steering = TokenSteering(REWARDS, 0.9)
    mass = replicates(levels=even_levels(2), steering=steering)
    law = chain_law(shown_ancestral(2), rows=2)
    assert_target(mass, law * np.exp(0.9 * REWARD))


@pytest.mark.statistical
def test_an_event_has_its_probability_as_evidence():
    mass = replicates(
        num_runs=25_000, reveal=reveal.in_random_order,
        steering=token_steering.event(_ends_alike, num_guesses=3),
    )  # fmt: skip
    alike = SEQUENCES[:, 0] == SEQUENCES[:, -1]
    assert_target(mass, JOINT.reshape(-1) * alike)


def _ends_alike(tokens):
    return tokens[0] == tokens[-1]


# ---- guidance


def power(*pairs):
    return np.prod([law**exponent for law, exponent in pairs], axis=0)


GUIDED = [
    (guidance.classifier_free(NETWORK_OTHER, 1.6), power((JOINT, -0.6), (OTHER, 1.6))),
    (guidance.annealed(2.0), power((JOINT, 2.0))),
    (guidance.Heated(0.5), JOINT),
    (guidance.multiplied(NETWORK_OTHER), power((JOINT, 1.0), (OTHER, 1.0))),
]


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("guidance", "target"),
    [*GUIDED[:2], *(pytest.param(*c, marks=pytest.mark.slow) for c in GUIDED[2:])],
)
def test_guidance_with_weights_has_the_stated_target(guidance, target):
    mass = replicates(8, reveal=reveal.in_random_order, guidance=guidance)
    assert_target(mass, target, bias=0.1)


def guided_table(tokens):
    """The normalized table that `classifier_free(NETWORK_OTHER, 1.6)` draws from."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = tables_of(JOINT, tokens) ** -0.6 * tables_of(OTHER, tokens) ** 1.6
    found = np.where(tables_of(JOINT, tokens) > 0, found, 0.0)
    return found / found.sum(1, keepdims=True)


@pytest.mark.statistical
def test_guidance_without_weights_targets_its_own_chain():
    law = guidance.classifier_free(NETWORK_OTHER, 1.6, corrected=False)
    mass = replicates(1, 4 * RUNS, reveal=reveal.left_to_right, guidance=law)
    np.testing.assert_allclose(mass.sum(1), 1.0, atol=1e-5)
    assert_target(mass, chain_law(shown_first, guided_table))
    with pytest.raises(AssertionError, match="chi-square"):
        exact = power((JOINT, -0.6), (OTHER, 1.6))
        assert_target(mass, exact / exact.sum())


@pytest.mark.statistical
def test_composed_laws_of_several_tokens_a_row_are_products_of_path_laws():
    law = guidance.annealed(2.0)
    mass = replicates(8, levels=even_levels(2), guidance=law)
    target = chain_law(shown_ancestral(2), rows=2, weight=lambda tokens: tables_of(JOINT, tokens))
    assert_target(mass, target)


@pytest.mark.statistical
@pytest.mark.parametrize("scale", [1.5, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_classifiers_guidance_has_the_tilted_target(scale):
    classifier = LogLikelihood(NETWORK.log_joint, jnp.log(LIKELIHOOD), 0.7)
    mass = replicates(
        reveal=reveal.in_random_order, **token_steering.classifier_guidance(classifier, scale)
    )
    assert_target(mass, JOINT * LIKELIHOOD**scale)


def test_an_exact_classifier_at_scale_one_gives_equal_weights():
    """The optimal proposal with the optimal potential: every run has the evidence itself."""
    classifier = LogLikelihood(NETWORK.log_joint, jnp.log(LIKELIHOOD))
    for order in (reveal.in_random_order, reveal.most_confident):
        mass = replicates(2, 50, reveal=order, **token_steering.classifier_guidance(classifier))
        evidence = (JOINT * LIKELIHOOD).sum()
        np.testing.assert_allclose(mass.sum(1), evidence, rtol=2e-5)


# ---- mistakes of others, planted


def at_the_end_as_before(steering, seen, tokens, guesses, move):
    """The last row weighs by the rule itself, as the released max and sum do."""
    return weigh(steering, seen, tokens, guesses, move, end=steering.rule)


def start_at_minus_one(steering, seen, tokens, guesses, move):
    seen = seen._replace(log_product=jnp.where(move.made == 1, -1.0, seen.log_product))
    return weigh(steering, seen, tokens, guesses, move)


def first_weight_left_out(steering, seen, tokens, guesses, move):
    seen, value = weigh(steering, seen, tokens, guesses, move)
    return seen, jnp.where(move.made == 1, 0.0, value)


def clipped(steering, seen, tokens, guesses, move):
    seen, value = weigh(steering, seen, tokens, guesses, move)
    return seen, jnp.minimum(value, jnp.log(1.2))


def drawn_again(steering, seen, tokens, guesses, move):
    """The reward of the row before is not kept with the particle but drawn anew."""
    law = reveal.transition(jnp.full((L, V), -jnp.log(V)), tokens, jnp.ones(L))
    again = numpyro.sample("again", law)
    known, value = weigh(steering, seen, tokens, guesses, move)
    redrawn = seen.log_product + steering.strength * steering.reward(again)
    return known._replace(log_product=jnp.where(move.last, known.log_product, redrawn)), value


def weigh(steering, seen, tokens, guesses, move, end=potentials.difference):
    reward = steering.estimate(jax.vmap(steering.reward)(guesses), steering.strength)
    reward = jnp.where(move.last, steering.reward(tokens), reward)
    highest = jnp.maximum(seen.maximum, reward)
    known = potentials.Seen(reward, highest, seen.total + reward, seen.log_product)
    ways = [rule(known, jnp.asarray(0.9)) for rule in (end, steering.rule)]
    value = jnp.where(move.last, *ways)
    return known._replace(log_product=seen.log_product + value), value


MISTAKES = {
    "max ends with the running value": (at_the_end_as_before, potentials.maximum),
    "sum ends with the running value": (at_the_end_as_before, potentials.total),
    "differences start at -1": (start_at_minus_one, potentials.difference),
    "no weight at the start": (first_weight_left_out, potentials.difference),
    "weights clipped": (clipped, potentials.difference),
    "a score drawn again": (drawn_again, potentials.difference),
}


@pytest.mark.statistical
@pytest.mark.parametrize(
    "name",
    [None, "max ends with the running value",
     *(pytest.param(name, marks=pytest.mark.slow) for name in list(MISTAKES)[1:])],
)  # fmt: skip
def test_planted_mistakes_of_potentials_are_caught(name, monkeypatch):
    broken, rule = MISTAKES.get(name, (weigh, potentials.difference))
    monkeypatch.setattr(TokenSteering, "weigh", broken)
    # a new function, so that no program compiled before is found again
    steering = TokenSteering(REWARDS, 0.9, lambda seen, strength: rule(seen, strength))
    mass = replicates(num_runs=2000, reveal=reveal.left_to_right, steering=steering)
    if name is None:  # the copy above without a mistake
        assert_target(mass, TILTED, bias=0.2)
        return
    with pytest.raises(AssertionError, match="standard errors"):
        assert_target(mass, TILTED, bias=9.0)


@pytest.mark.statistical
def test_a_temperature_without_its_weight_is_caught():
    law = guidance.Heated(0.5, corrected=False)
    mass = replicates(1, RUNS, reveal=reveal.left_to_right, guidance=law)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_target(mass, JOINT)


@pytest.mark.statistical
def test_several_tokens_a_row_taken_for_the_joint_law_are_caught():
    mass = replicates(1, RUNS, levels=even_levels(1))
    with pytest.raises(AssertionError, match="chi-square"):
        assert_target(mass, JOINT)


# ---- the rest


def test_a_large_reward_does_not_saturate():
    steering = TokenSteering(Table(REWARDS.values + 60.0), 0.9)
    smc = SMC(ParticleFilter(unmask, store="last"), num_particles=500, progress_bar=False)
    smc.run(jax.random.key(0), NETWORK, blank(L, V), LEVELS, steering=steering)
    law = chain_law(shown_ancestral(L), rows=L)
    exact = np.log((law * np.exp(0.9 * REWARD)).sum()) + 54.0
    np.testing.assert_allclose(smc.log_evidence, exact, atol=0.2)


def test_the_ledger_counts_calls():
    smc = SMC(ParticleFilter(unmask, store="last"), num_particles=5, progress_bar=False)
    smc.run(jax.random.key(0), NETWORK, blank(L, V), even_levels(4))
    assert smc.cost["denoiser_calls"] == 5 * 4
    steering = TokenSteering(REWARDS, num_guesses=3, scored=potentials.Interval(every=2))
    smc.run(jax.random.key(0), NETWORK, blank(L, V), even_levels(4), steering=steering)
    assert smc.cost["denoiser_calls"] == 5 * 3  # and one before the loop, shared
    assert smc.cost["reward_calls"] == 5 * (3 + 1)


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    smc = SMC(ParticleFilter(unmask), num_particles=2, progress_bar=False)
    with pytest.raises(ValueError, match=r"`start` of unmask must be one sequence"):
        smc.run(jax.random.key(0), NETWORK, jnp.zeros((2, L), jnp.int32), LEVELS)
    with pytest.raises(ValueError, match=r"`levels` of unmask must be \(T \+ 1,\)"):
        smc.run(jax.random.key(0), NETWORK, blank(L, V), jnp.ones(1))
    with pytest.raises(ValueError, match="`num_guesses` of TokenSteering must be at least 1"):
        TokenSteering(REWARDS, num_guesses=0)
    with pytest.raises(ValueError, match=r"`strength` of TokenSteering must be a scalar.*\(2,\)"):
        TokenSteering(REWARDS, jnp.ones(2))
    with pytest.raises(TypeError, match="`reward` of TokenSteering must be a function, got 3.0"):
        TokenSteering(3.0)
    for steering, message in (
        (
            TokenSteering(lambda tokens: tokens * 1.0),
            r"the reward of one particle has shape \(3,\)",
        ),
        (REWARDS, "`steering` of unmask cannot be a Table"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            smc.run(jax.random.key(0), NETWORK, blank(L, V), LEVELS, steering=steering)
    with pytest.raises(ValueError, match="`exponents` of Product has 0 numbers for 1 networks"):
        guidance.Product(1.0, (NETWORK,))


def test_levels_rise_from_noise_to_data():
    for levels in (even_levels(7), reveal.cosine_levels(7)):
        assert levels.shape == (8,)
        assert levels[0] == 0.0 and levels[-1] == 1.0
        assert np.all(np.diff(levels) > 0)
