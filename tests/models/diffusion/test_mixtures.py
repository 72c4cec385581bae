"""Gaussian mixtures against Bayes' rule point by point, and against published closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.models.diffusion import schedules
from smcscale.models.diffusion.mixtures import (
    ExactDenoiser,
    ExactReverse,
    ExactTwist,
    GaussianMixture,
    TwistedReverse,
    gaussian_likelihood,
    quadratic,
    twisted_start,
)

POINTS = np.array([[0.3, -1.2], [1.5, 0.4], [-2.0, 0.1], [0.0, 2.2]])


def mixture():
    """Two correlated components in the plane, in the precision of the moment."""
    covs = [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]]
    return GaussianMixture(
        jnp.log(jnp.array([0.35, 0.65])), jnp.array([[-1.5, 0.3], [1.0, -0.4]]), jnp.array(covs)
    )


def reward():
    return quadratic([[0.7, 0.2], [0.2, 0.4]], [0.4, -0.2], [0.3, 0.1], -0.3)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def over(function):
    return np.asarray(jax.jit(jax.vmap(function))(jnp.asarray(POINTS)))


def noise(x, mean, sigma):
    return scipy.stats.multivariate_normal(np.zeros(2), sigma**2 * np.eye(2)).logpdf(x - mean)


def test_density_and_moments():
    found = mixture()
    exact = np.logaddexp(
        *[
            np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(POINTS)
            for w, m, c in zip([0.35, 0.65], found.means, found.covs, strict=True)
        ]
    )
    np.testing.assert_allclose(over(found.log_prob), exact, rtol=1e-10)
    np.testing.assert_allclose(over(found.distribution().log_prob), exact, rtol=1e-10)
    np.testing.assert_allclose(found.mean, [0.125, -0.155], rtol=1e-10)
    second = 0.35 * (found.covs[0] + jnp.outer(found.means[0], found.means[0]))
    second += 0.65 * (found.covs[1] + jnp.outer(found.means[1], found.means[1]))
    np.testing.assert_allclose(found.cov, second - jnp.outer(found.mean, found.mean), rtol=1e-10)


def test_posterior_is_bayes_rule():
    """`p(x_0 | x) q(x) = p(x_0) N(x; alpha x_0, sigma^2)` at several points."""
    found, alpha, sigma, x = mixture(), 0.8, 0.6, np.array([0.5, -0.7])
    posterior = found.posterior(jnp.asarray(x), alpha, sigma)
    joint = over(found.log_prob) + noise(x, alpha * POINTS, sigma)
    marginal = found.noised(alpha, sigma).log_prob(jnp.asarray(x))
    np.testing.assert_allclose(over(posterior.log_prob), joint - float(marginal), rtol=1e-9)


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_the_tilted_law_has_its_normalizer(strength):
    """`p(x) exp(strength r(x)) / Z` point by point, and a density that integrates to one."""
    found, r = mixture(), reward()
    tilted = found.tilted(r, strength)
    weighed = over(found.log_prob) + strength * over(r)
    np.testing.assert_allclose(
        over(tilted.mixture.log_prob), weighed - float(tilted.log_normalizer), rtol=1e-9
    )
    np.testing.assert_allclose(jnp.sum(jnp.exp(tilted.mixture.log_weights)), 1, rtol=1e-12)


def test_a_linear_reward_moves_the_means():
    slope = np.array([0.4, -0.9])
    tilted = mixture().tilted(quadratic(np.zeros((2, 2)), slope=slope))
    np.testing.assert_allclose(
        tilted.mixture.means, mixture().means + mixture().covs @ slope, rtol=1e-10
    )
    grown = [
        np.log(w) + slope @ m + slope @ c @ slope / 2
        for w, m, c in zip([0.35, 0.65], mixture().means, mixture().covs, strict=True)
    ]
    np.testing.assert_allclose(tilted.log_normalizer, np.logaddexp(*grown), rtol=1e-10)


def test_a_likelihood_has_the_evidence_of_its_observation():
    found, y, scale = mixture(), np.array([0.7]), 0.5
    matrix = np.array([[1.0, -0.6]])
    parts = [
        np.log(w) + scipy.stats.multivariate_normal(matrix @ m, matrix @ c @ matrix.T + scale**2).logpdf(y)
        for w, m, c in zip([0.35, 0.65], np.asarray(found.means), np.asarray(found.covs), strict=True)
    ]  # fmt: skip
    reward = gaussian_likelihood(jnp.asarray(matrix), jnp.asarray(y), scale)
    np.testing.assert_allclose(found.tilted(reward).log_normalizer, np.logaddexp(*parts))


def test_published_closed_forms():
    """The nine-component grid of Kim, Kim & Park 2025; and a one-dimensional task by quadrature."""
    means = jnp.array([[x, y] for x in (-4.0, 0.0, 4.0) for y in (-4.0, 0.0, 4.0)])
    grid = GaussianMixture(jnp.full(9, -jnp.log(9.0)), means, jnp.tile(0.3 * jnp.eye(2), (9, 1, 1)))
    first = grid.tilted(quadratic(jnp.diag(jnp.array([0.02, 2.0]))))
    second = grid.tilted(quadratic(jnp.diag(jnp.array([2.0, 0.2])), [0.0, 1.0]))
    np.testing.assert_allclose(first.log_normalizer, -1.43969, atol=1e-5)
    np.testing.assert_allclose(second.log_normalizer, -2.10195, atol=1e-5)
    by_x = jnp.exp(first.mixture.log_weights).reshape(3, 3).sum(1)
    np.testing.assert_allclose(by_x, [0.31522, 0.36956, 0.31522], atol=1e-5)
    by_y = jnp.exp(second.mixture.log_weights).reshape(3, 3).sum(0)
    np.testing.assert_allclose(by_y, [0.06602, 0.63530, 0.29868], atol=1e-5)
    line = GaussianMixture(
        jnp.log(jnp.array([0.35, 0.65])), jnp.array([[-1.5], [1.0]]), jnp.array([[[0.3]], [[0.2]]])
    )
    normalizer = line.tilted(quadratic([[1.4]], [0.4], constant=-0.3), 1.3).log_normalizer
    np.testing.assert_allclose(jnp.exp(normalizer), 0.319127497607, rtol=1e-11)
    likelihood = gaussian_likelihood(jnp.ones((1, 1)), jnp.array([0.6]), 0.5)
    np.testing.assert_allclose(
        jnp.exp(line.tilted(likelihood).log_normalizer), 0.327017757347, rtol=1e-11
    )


def test_the_denoiser_follows_tweedie():
    found = mixture()
    level = schedules.vp_cosine(10).level(6)
    denoiser = ExactDenoiser(found, with_variance=True)
    marginal = found.noised(level.alpha, level.sigma)
    prediction = jax.vmap(lambda x: denoiser(x, level))(jnp.asarray(POINTS))
    score = over(jax.grad(marginal.log_prob))
    np.testing.assert_allclose(prediction.score(level), score, rtol=1e-7)
    whole = level.alpha * prediction.x0 + level.sigma * prediction.eps
    np.testing.assert_allclose(whole, POINTS, rtol=1e-7, atol=1e-12)
    curvature = over(lambda x: jnp.diagonal(jax.hessian(marginal.log_prob)(x)))
    exact = level.sigma**2 / level.alpha**2 * (1 + level.sigma**2 * curvature)
    np.testing.assert_allclose(prediction.variance, exact, rtol=1e-7)


@pytest.mark.parametrize("low", [2, 0])
def test_the_reverse_kernel_undoes_the_forward_one(low):
    """`q(x_high) p(x_low | x_high) = q(x_low) q(x_high | x_low)` point by point."""
    found, schedule = mixture(), schedules.vp_linear(8)
    high, low = schedule.level(5), schedule.level(low)
    x = np.array([0.4, -0.9])
    law = ExactReverse(found)(None, jnp.asarray(x), None, high, low)  # pyright: ignore
    forward = noise(x, high.alpha / low.alpha * POINTS, np.sqrt(schedules.added_noise(high, low)))
    joint = over(found.noised(low.alpha, low.sigma).log_prob) + forward
    marginal = float(found.noised(high.alpha, high.sigma).log_prob(jnp.asarray(x)))
    np.testing.assert_allclose(over(law.log_prob), joint - marginal, rtol=1e-6)


def test_twisted_pieces_fit_together():
    """`p(x_low | x) h(x_low) = q(x_low | x) h(x)`: the step's ratio is that of the values."""
    found, r, schedule = mixture(), reward(), schedules.vp_linear(8)
    high, low, x = schedule.level(5), schedule.level(2), jnp.array([0.4, -0.9])
    value = ExactTwist(found, r, 1.3)
    step = TwistedReverse(found, r, 1.3)(None, x, None, high, low)  # pyright: ignore
    ratio = over(step.log_weight)
    exact = 1.3 * (value(x, None, high) - over(lambda y: value(y, None, low)))
    np.testing.assert_allclose(ratio, exact, rtol=1e-6)
    start = twisted_start(found, r, 1.3, high)
    normalizer = found.tilted(r, 1.3).log_normalizer
    exact = normalizer - 1.3 * over(lambda y: value(y, None, high))
    np.testing.assert_allclose(over(start.log_weight), exact, rtol=1e-6)
