"""Posteriors of AB-MCTS against closed forms and against the prior weighted by the likelihood."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from smcscale.models.reasoning.thompson import (
    NEW,
    Beta,
    Gaussian,
    Mixed,
    MixedModel,
    NodeAggregation,
    Scores,
    summary,
)
from support.montecarlo import assert_mean

GROUPS = ([0.3, 0.35, 0.1], [0.6, 0.7], [0.9])
DRAWS = 10_000
FAMILY = 30  # comparisons of means in this file


def sums(scores) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return np.array([len(scores), scores.sum(), (scores**2).sum()])


def grouped(groups) -> Scores:
    return summary(np.stack([sums(group) for group in groups]))


SEEN = grouped([*GROUPS, []])


def draws(posterior, scores=SEEN, number=DRAWS, seed=0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(_many(posterior, keys, scores), np.float64)


@eqx.filter_jit  # one compilation for each posterior and shape
def _many(posterior, keys, scores):
    return jax.vmap(lambda key: posterior(key, scores))(keys)


def test_a_summary_has_count_mean_and_squared_deviations():
    for row, group in enumerate(GROUPS):
        expected = (len(group), np.mean(group), np.var(group) * len(group))
        np.testing.assert_allclose([x[row] for x in SEEN], expected, atol=1e-6)
    assert SEEN.count[3] == SEEN.mean[3] == SEEN.squares[3] == 0


def normal_inverse_gamma_by_quadrature(group, prior):
    """Mean and variance of mu, by quadrature of prior times likelihood over mu and sigma^2."""
    mu = np.linspace(-8, 8, 4001)[:, None]
    log_variance = np.linspace(np.log(1e-4), np.log(50), 801)[None]
    variance = np.exp(log_variance)
    log_density = (
        scipy.stats.invgamma.logpdf(variance, prior.nu / 2, scale=prior.nu * prior.tau2 / 2)
        + log_variance  # the grid is even in the log
        + scipy.stats.norm.logpdf(mu, prior.mean, np.sqrt(variance / prior.kappa))
        + sum(scipy.stats.norm.logpdf(y, mu, np.sqrt(variance)) for y in group)
    )
    weight = np.exp(log_density - log_density.max()).sum(axis=1)
    weight /= weight.sum()
    mean = (weight * mu[:, 0]).sum()
    return mean, (weight * (mu[:, 0] - mean) ** 2).sum()


def test_gaussian_parameters_are_those_of_bayes():
    prior = Gaussian(mean=0.2, kappa=1.5, nu=4.0, tau2=0.05)
    mean, kappa, nu, tau2 = (np.asarray(x, np.float64) for x in prior.parameters(SEEN))
    for row, group in enumerate(GROUPS):
        expected = normal_inverse_gamma_by_quadrature(group, prior)
        variance = tau2[row] / kappa[row] * nu[row] / (nu[row] - 2)  # of the Student t
        np.testing.assert_allclose((mean[row], variance), expected, rtol=2e-3)
    empty = (mean[3], kappa[3], nu[3], tau2[3])
    np.testing.assert_allclose(empty, (0.2, 1.5, 4.0, 0.05), rtol=1e-6)


@pytest.mark.statistical
def test_gaussian_draws_follow_the_student_t():
    mean, kappa, nu, tau2 = (np.asarray(x) for x in Gaussian().parameters(SEEN))
    found = draws(Gaussian())
    for row in range(4):
        exact = scipy.stats.t(nu[row], mean[row], np.sqrt(tau2[row] / kappa[row]))
        assert scipy.stats.kstest(found[:, row], exact.cdf).pvalue > 1e-3 / 8


@pytest.mark.statistical
def test_beta_draws_follow_the_beta():
    found = draws(Beta())
    for row, group in enumerate([*GROUPS, []]):
        exact = scipy.stats.beta(0.5 + sum(group), 0.5 + len(group) - sum(group))
        assert scipy.stats.kstest(found[:, row], exact.cdf).pvalue > 1e-3 / 8


def test_the_likelihood_of_the_deviations_is_that_of_one_dense_normal():
    """Scores of all groups together are one normal vector, given both standard deviations."""
    posterior = Mixed(grid=5)
    found, center, precision = (np.asarray(x) for x in posterior.log_likelihood(SEEN))
    scores = np.concatenate(GROUPS)
    group = np.repeat(np.arange(3), [len(g) for g in GROUPS])
    for i, a in enumerate(np.asarray(posterior.deviations()[0])[:, 0]):
        for j, y in enumerate(np.asarray(posterior.deviations()[1])[0]):
            noise = y**2 * np.eye(6) + a**2 * (group[:, None] == group)
            dense = scipy.stats.multivariate_normal(np.full(6, 0.5), noise + 0.2**2)
            assert found[i, j] == pytest.approx(dense.logpdf(scores), abs=2e-3, rel=1e-4)
            weights = np.linalg.solve(noise, np.ones(6))  # of the scores, for mu
            assert precision[i, j] == pytest.approx(0.2**-2 + weights.sum(), rel=1e-4)
            mean = (0.5 / 0.2**2 + weights @ scores) / precision[i, j]
            assert center[i, j] == pytest.approx(mean, abs=1e-4)


@pytest.mark.statistical
def test_mixed_draws_match_the_prior_weighted_by_the_likelihood():
    rng = np.random.default_rng(0)
    number = 600_000
    sigma_a, sigma_y = np.abs(rng.normal(0, 0.2, number)), np.abs(rng.normal(0, 0.3, number))
    sigma_y = np.maximum(sigma_y, 0.01)
    mu = rng.normal(0.5, 0.2, number)
    alpha = mu[:, None] + sigma_a[:, None] * rng.normal(size=(number, 4))
    log_weight = sum(
        scipy.stats.norm.logpdf(y, alpha[:, row], sigma_y)
        for row, group in enumerate(GROUPS)
        for y in group
    )
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    y = alpha + sigma_y[:, None] * rng.normal(size=(number, 4))
    found = draws(Mixed(), number=2 * DRAWS)

    def columns(sample):
        best = np.argmax(sample, axis=1)
        return np.concatenate([sample, sample**2, best[:, None] == np.arange(4)], axis=1)

    ours, theirs = columns(found), columns(y)
    expected = weight @ theirs
    error = np.sqrt((weight[:, None] ** 2 * (theirs - expected) ** 2).sum(0))
    se = np.hypot(error, ours.std(0) / np.sqrt(len(ours)))
    z = (ours.mean(0) - expected) / se
    assert se.max() < 0.01  # biases above a few hundredths are seen
    assert np.abs(z).max() < scipy.stats.norm.isf(1e-3 / (2 * len(z))), z


@pytest.mark.statistical
@pytest.mark.parametrize("posterior", [Gaussian(), Beta(), Mixed()])
def test_padding_changes_nothing(posterior):
    """Groups without scores leave the law of the others as it is."""
    padded = summary(np.concatenate([np.stack([sums(g) for g in GROUPS]), np.zeros((13, 3))]))
    one, other = draws(posterior)[:, :3], draws(posterior, padded, seed=1)[:, :3]
    for row in range(3):
        assert scipy.stats.ks_2samp(one[:, row], other[:, row]).pvalue > 1e-3 / 9


@pytest.mark.parametrize("rule", [NodeAggregation(), NodeAggregation(Beta()), MixedModel()])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_identical_scores_do_not_break(rule, score):
    children = grouped([[score] * 50, [score] * 3, [score], []])
    one = summary(sums([score] * 54))
    found = draws(rule.posterior, children)
    assert np.isfinite(found).all()
    assert np.abs(found[:, 0].mean() - score) < 0.2
    for seed in range(5):
        assert NEW <= int(rule(jax.random.key(seed), one, one, children)) < 3


def test_the_floor_holds_the_noise_of_identical_scores():
    """The likelihood's pole at sigma_y = 0 is cut at the rounding of scores."""
    same = grouped([[0.5] * 30, [0.5] * 30, [], []])
    found = draws(Mixed(), same)
    assert 0.008 < found[:, 0].std() < 0.02
    assert draws(Mixed(floor=0.0), same)[:, 0].std() < 0.008


def expected_best(children):
    """Chance of each group to have the best Gaussian draw, by quadrature over Student t laws."""
    mean, kappa, nu, tau2 = (np.asarray(x, np.float64) for x in Gaussian().parameters(children))
    laws = [scipy.stats.t(nu[i], mean[i], np.sqrt(tau2[i] / kappa[i])) for i in range(len(mean))]

    def chance(best):
        others = [law for i, law in enumerate(laws) if i != best]
        product = lambda u: np.prod([law.cdf(laws[best].ppf(u)) for law in others])
        return scipy.integrate.quad(product, 0, 1, limit=200)[0]

    return np.array([chance(i) for i in range(len(laws))])


@pytest.mark.statistical
def test_choices_of_node_aggregation_have_their_exact_chances():
    children = grouped([[0.2, 0.3], [0.6], [0.5, 0.7, 0.65]])
    made = grouped([[0.2, 0.6, 0.5], [0.3, 0.7, 0.65]])  # here, further down
    pair = expected_best(made)  # new, old
    single = [Scores(*(x[i] for x in made)) for i in range(2)]
    exact = np.array([pair[0], *(pair[1] * expected_best(children))])
    padded = Scores(*(np.pad(x, (0, 1)) for x in children))
    rule = NodeAggregation()
    keys = jax.random.split(jax.random.key(3), 2 * DRAWS)
    chosen = np.asarray(jax.vmap(lambda key: rule(key, *single, padded))(keys))
    indicators = (chosen[:, None] == np.array([NEW, 0, 1, 2])).astype(float)
    assert_mean(indicators, exact, family=FAMILY, smallest_bias=0.03)


@pytest.mark.statistical
def test_choices_of_the_mixed_model_are_the_best_of_its_draws():
    children = grouped(GROUPS)
    found = draws(Mixed(), SEEN, seed=7)
    share = np.bincount(np.argmax(found, axis=1), minlength=4) / len(found)
    keys = jax.random.split(jax.random.key(8), DRAWS)
    none = summary(np.zeros(3))
    padded = Scores(*(np.pad(x, (0, 5)) for x in children))
    chosen = np.asarray(jax.vmap(lambda key: MixedModel()(key, none, none, padded))(keys))
    counts = np.array([(chosen == i).mean() for i in (0, 1, 2, NEW)])
    se = np.sqrt(2 * share * (1 - share) / DRAWS)
    assert (np.abs(counts - share) < scipy.stats.norm.isf(1e-3 / 8) * se).all()
    assert (counts > 0.01).all()  # every choice is seen


@pytest.mark.statistical
@pytest.mark.parametrize("rule", [NodeAggregation(), MixedModel()])
def test_actions_never_tried_are_tried(rule):
    scores = grouped([[0.5] * 8, []])
    keys = jax.random.split(jax.random.key(0), 4000)
    share = np.asarray(jax.vmap(lambda key: rule.action(key, scores))(keys)).mean()
    exact = draws(rule.posterior, scores, seed=1)
    expected = (exact[:, 1] > exact[:, 0]).mean()
    assert abs(share - expected) < 4 * np.sqrt(0.25 * (1 / 4000 + 1 / DRAWS))
    assert 0.05 < share < 0.95


@pytest.mark.compile
def test_compilations_are_counted_in_powers_of_two():
    """A change of counts or scores compiles nothing; another padded size compiles once."""
    traces = []

    class Counting(Gaussian):
        def __call__(self, key, scores):
            traces.append(jnp.shape(scores.count))
            return super().__call__(key, scores)

    rule = NodeAggregation(Counting())
    one = summary(sums([0.5]))
    for size in (2, 4, 8):
        for seed in range(4):
            table = np.random.default_rng(seed).uniform(size=(size, 3))
            rule(jax.random.key(seed), one, one, summary(table))
    assert len(traces) == 3
