"""The Kalman filter and smoother against statsmodels, one dense Gaussian and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.models.statespace import (
    LinearGaussian,
    autoregression_model,
    coupled_model,
    local_level_model,
    nile,
)
from smcscale.models.statespace import kalman_filter as eager_filter
from smcscale.models.statespace import kalman_smoother as eager_smoother

kalman_filter, kalman_smoother = jax.jit(eager_filter), jax.jit(eager_smoother)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_model(seed: int, d: int, p: int) -> LinearGaussian:
    rng = np.random.default_rng(seed)

    def covariance(n):
        root = rng.normal(size=(n, n))
        return root @ root.T + 0.3 * np.eye(n)

    return LinearGaussian(
        initial_mean=jnp.asarray(rng.normal(size=d)),
        initial_cov=jnp.asarray(covariance(d)),
        transition=jnp.asarray(0.5 * rng.normal(size=(d, d))),
        transition_cov=jnp.asarray(covariance(d)),
        observation=jnp.asarray(rng.normal(size=(p, d))),
        observation_cov=jnp.asarray(covariance(p)),
    )


def dense(model: LinearGaussian, num_steps: int):
    """Mean and covariance of (x_0, ..., x_T) as one Gaussian, and the map to (y_0, ..., y_T)."""
    m = [np.asarray(leaf, float) for leaf in jax.tree.leaves(model)]
    mean0, cov0, move, move_cov, show, show_cov = m
    d, times = len(mean0), num_steps + 1
    # x = L e with independent e_0 ~ N(mean0, cov0), e_t ~ N(0, move_cov)
    lower = np.zeros((times * d, times * d))
    for t in range(times):
        for s in range(t + 1):
            power = np.linalg.matrix_power(move, t - s)
            lower[t * d : (t + 1) * d, s * d : (s + 1) * d] = power
    noise = np.kron(np.eye(times), move_cov)
    noise[:d, :d] = cov0
    mean = lower[:, :d] @ mean0
    return mean, lower @ noise @ lower.T, np.kron(np.eye(times), show), show_cov


def condition(mean, cov, show, show_cov, y):
    """Posterior of a dense Gaussian given the finite elements of `y`, and their log density."""
    seen = np.isfinite(y)
    noise = np.kron(np.eye(len(y) // len(show_cov)), show_cov)[np.ix_(seen, seen)]
    show, y = show[seen], y[seen]
    total = show @ cov @ show.T + noise
    gain = cov @ show.T @ np.linalg.inv(total)
    log_density = scipy.stats.multivariate_normal(show @ mean, total).logpdf(y)
    return mean + gain @ (y - show @ mean), cov - gain @ show @ cov, log_density


@pytest.mark.parametrize("first_seen", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("d", "p"), [(1, 1), (3, 2), (2, 3)])
def test_equals_one_dense_gaussian(x64, d, p, holes, first_seen):
    model, num_steps = random_model(d + 10 * p, d, p), 5
    rng = np.random.default_rng(3)
    y = rng.normal(size=(num_steps + 1, p))
    if holes:
        y[2] = np.nan  # a whole row
        y[4, 0] = np.nan  # one element, its noise correlated with the others
    if not first_seen:
        y[0] = np.nan
    means, covs, log_density = condition(*dense(model, num_steps), y.reshape(-1))
    first = jnp.asarray(y[0]) if first_seen else None
    filtered = kalman_filter(model, jnp.asarray(y[1:]), initial_observation=first)
    smoothed = kalman_smoother(model, filtered)
    np.testing.assert_allclose(filtered.log_evidence, log_density, rtol=1e-9)
    np.testing.assert_allclose(smoothed.initial_mean, means[:d], atol=1e-9)
    np.testing.assert_allclose(smoothed.initial_cov, covs[:d, :d], atol=1e-9)
    np.testing.assert_allclose(smoothed.means, means[d:].reshape(-1, d), atol=1e-9)
    blocks = covs.reshape(num_steps + 1, d, num_steps + 1, d)
    for t in range(num_steps):
        np.testing.assert_allclose(smoothed.covs[t], blocks[t + 1, :, t + 1], atol=1e-9)
        np.testing.assert_allclose(smoothed.lag_one_covs[t], blocks[t, :, t + 1], atol=1e-9)
    for t in range(1, num_steps + 1):  # the filter sees rows up to t only
        past = np.where(np.arange(num_steps + 1)[:, None] <= t, y, np.nan)
        means, covs, _ = condition(*dense(model, num_steps), past.reshape(-1))
        np.testing.assert_allclose(
            filtered.means[t - 1], means[t * d : (t + 1) * d], atol=1e-9, err_msg=f"row {t - 1}"
        )
        block = covs[t * d : (t + 1) * d, t * d : (t + 1) * d]
        np.testing.assert_allclose(filtered.covs[t - 1], block, atol=1e-9)


def test_equals_statsmodels_on_the_nile(x64):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    flow = nile().values.astype(float)
    level_var, noise_var, mean0, var0 = 1469.1, 15099.0, 1000.0, 250.0**2
    reference = UnobservedComponents(flow, "llevel", loglikelihood_burn=0)
    # statsmodels starts at the level that the first row shows: one move after x_0
    reference.initialize_known(np.array([mean0]), np.array([[var0 + level_var]]))
    theirs = reference.smooth([noise_var, level_var])
    model = local_level_model(
        level_scale=level_var**0.5,
        noise_scale=noise_var**0.5,
        initial_mean=mean0,
        initial_scale=var0**0.5,
    )
    filtered = kalman_filter(model, flow)
    smoothed = kalman_smoother(model, filtered)
    np.testing.assert_allclose(filtered.log_evidence, theirs.llf, rtol=1e-10)
    np.testing.assert_allclose(filtered.log_increments, theirs.llf_obs, rtol=1e-9)
    np.testing.assert_allclose(filtered.means[:, 0], theirs.filtered_state[0], rtol=1e-9)
    np.testing.assert_allclose(filtered.covs[:, 0, 0], theirs.filtered_state_cov[0, 0], rtol=1e-9)
    np.testing.assert_allclose(smoothed.means[:, 0], theirs.smoothed_state[0], rtol=1e-9)
    np.testing.assert_allclose(smoothed.covs[:, 0, 0], theirs.smoothed_state_cov[0, 0], rtol=1e-9)
    lag_one = theirs.smoother_results.smoothed_state_autocov[0, 0]
    # theirs: Cov(x_{t+1}, x_t) at t; ours at row t is with the row before
    np.testing.assert_allclose(smoothed.lag_one_covs[1:, 0, 0], lag_one[:-1], rtol=1e-8)


def test_equals_statsmodels_on_a_coupled_model_with_holes(x64):
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    d, num_steps = 4, 30
    model = coupled_model(d)
    y = np.random.default_rng(0).normal(size=(num_steps, d))
    y[5:9] = np.nan
    y[12, 1:3] = np.nan
    reference = KalmanSmoother(k_endog=d, k_states=d, k_posdef=d)
    reference.bind(y.copy())
    reference["design"] = reference["selection"] = reference["obs_cov"] = np.eye(d)
    reference["state_cov"] = np.eye(d)
    reference["transition"] = move = np.asarray(model.transition)
    reference.initialize_known(np.zeros(d), move @ move.T + np.eye(d))
    theirs = reference.smooth()
    filtered = kalman_filter(model, y)
    smoothed = kalman_smoother(model, filtered)
    np.testing.assert_allclose(filtered.log_evidence, theirs.llf, rtol=1e-10)
    np.testing.assert_allclose(filtered.means, theirs.filtered_state.T, atol=1e-9)
    np.testing.assert_allclose(smoothed.means, theirs.smoothed_state.T, atol=1e-9)
    covs = np.moveaxis(theirs.smoothed_state_cov, -1, 0)
    np.testing.assert_allclose(smoothed.covs, covs, atol=1e-9)


def test_published_random_walk():
    model = local_level_model(level_scale=0.3, noise_scale=1.0)
    filtered = kalman_filter(model, jnp.array([1.5, 1.2, 1.6, 1.4, 1.5]))
    smoothed = kalman_smoother(model, filtered)
    np.testing.assert_allclose(filtered.means[-1, 0], 1.2998, atol=5e-5)
    np.testing.assert_allclose(filtered.covs[-1, 0, 0], 0.27564, atol=5e-6)
    np.testing.assert_allclose(filtered.log_evidence, -6.51701, atol=1e-5)
    means = [1.1328, 1.1933, 1.2531, 1.2818, 1.2998]
    np.testing.assert_allclose(smoothed.initial_mean, [1.0392], atol=5e-5)
    np.testing.assert_allclose(smoothed.means[:, 0], means, atol=6e-5)
    np.testing.assert_allclose(smoothed.lag_one_covs[-1, 0, 0], 0.2104, atol=5e-5)
    np.testing.assert_allclose(smoothed.means.sum(), 6.1608, atol=5e-5)


def test_published_walk_whose_first_state_is_seen():
    model = local_level_model(level_scale=1.0, noise_scale=1.0)
    filtered = kalman_filter(model, jnp.array([0.7]), initial_observation=-1.3)
    np.testing.assert_allclose(filtered.initial_log_increment, -1.68801, atol=1e-5)
    np.testing.assert_allclose(filtered.log_increments[0], -1.74158, atol=1e-5)
    np.testing.assert_allclose(filtered.means[0, 0], 0.16, atol=1e-6)
    np.testing.assert_allclose(filtered.covs[0, 0, 0], 0.6, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "noise_scale", "mean", "var", "log_evidence"),
    [
        ([4.0], 0.5, 3.2, 0.2, -7.43051),
        ([2.0, 2.0], 1.0, 4 / 3, 1 / 3, -3.72052),
        ([2.0, 2.0, 2.0, 2.0], 1.0, 1.6, 0.2, -6.08047),
        ([1.5, 2.0, 1.0], 1.0, 1.125, 0.25, -4.54371),
    ],
)
def test_published_conjugate_answers_as_a_state_that_never_moves(
    y, noise_scale, mean, var, log_evidence
):
    model = local_level_model(level_scale=0.0, noise_scale=noise_scale)
    filtered = kalman_filter(model, jnp.array(y))
    np.testing.assert_allclose(filtered.means[-1, 0], mean, atol=2e-6)
    np.testing.assert_allclose(filtered.covs[-1, 0, 0], var, atol=2e-6)
    np.testing.assert_allclose(filtered.log_evidence, log_evidence, atol=1e-5)


def test_published_pair_of_coupled_coordinates(x64):
    eye = jnp.eye(2)
    both = LinearGaussian(jnp.zeros(2), eye, eye, 0 * eye, eye, eye)
    filtered = kalman_filter(both, jnp.zeros((0, 2)), initial_observation=jnp.array([1.0, -0.5]))
    pair = LinearGaussian(
        filtered.initial_mean,
        filtered.initial_cov,
        eye,
        0 * eye,
        jnp.array([[1.0, -1.0]]),
        jnp.ones((1, 1)),
    )
    joined = kalman_filter(pair, jnp.zeros((1, 1)))
    # exp(-(x_1 - x_2)² / 2) is sqrt(2 pi) times a Gaussian density
    log_evidence = filtered.log_evidence + joined.log_evidence + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(log_evidence, -3.33072, atol=1e-5)
    np.testing.assert_allclose(joined.means[0], [0.3125, -0.0625], atol=1e-9)
    np.testing.assert_allclose(joined.covs[0], [[0.375, 0.125], [0.125, 0.375]], atol=1e-9)


def test_autoregression_starts_stationary(x64):
    model = autoregression_model(coefficient=0.9, state_scale=1.0, noise_scale=0.2)
    filtered = kalman_filter(model, jnp.full(3, jnp.nan))
    np.testing.assert_allclose(filtered.covs[:, 0, 0], 1 / (1 - 0.81), rtol=1e-12)
    assert filtered.log_evidence == 0.0


def test_float32_stays_close_to_float64_over_a_long_series():
    y = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    with jax.enable_x64(False):
        single = kalman_filter(coupled_model(3), y)
    with jax.enable_x64(True):
        double = kalman_filter(coupled_model(3), y.astype(np.float64))
    assert single.means.dtype == jnp.float32
    assert double.means.dtype == jnp.float64
    np.testing.assert_allclose(single.means, double.means, atol=2e-5)
    np.testing.assert_allclose(single.log_evidence, double.log_evidence, rtol=1e-5)


def test_gradient_by_finite_differences(x64):
    y = nile().values.astype(float)

    def log_evidence(log_scale):
        model = local_level_model(
            level_scale=jnp.exp(log_scale),
            noise_scale=120.0,
            initial_mean=1000.0,
            initial_scale=9.0,
        )
        return kalman_filter(model, y).log_evidence

    at, h = 3.5, 1e-5
    slope = (log_evidence(at + h) - log_evidence(at - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(log_evidence)(at), slope, rtol=1e-6)


def test_rows_of_the_wrong_width_are_refused():
    with pytest.raises(ValueError, match=r"pass an array of shape \(T, 3\)"):
        kalman_filter(coupled_model(3), jnp.zeros((5, 2)))
