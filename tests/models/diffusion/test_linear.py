"""The conjugate proposal for linear observations, against integrals and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import mixtures, schedules
from smcscale.models.diffusion.linear import LinearProblem
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.samplers import ancestral
from support.compilations import compilations
from support.montecarlo import assert_mean

LINE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5], [1.0]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)  # fmt: skip
PLANE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5, 0.5], [1.0, -0.5]]),
    jnp.asarray([[[0.3, 0.0], [0.0, 0.3]], [[0.2, 0.05], [0.05, 0.3]]]),
)  # fmt: skip
MATRIX = np.asarray([[1.0, 0.4], [-0.2, 0.7]])
SIGNAL = np.asarray([1, 0.97, 0.85, 0.6, 0.3, 0.1, 0.02])  # alpha squared


def coarse() -> schedules.Schedule:
    zero = np.zeros(7)
    return schedules.as_schedule(
        np.sqrt(SIGNAL), np.sqrt(1 - SIGNAL), np.arange(7.0), zero, zero, 1.0
    )


def run(problem, mixture, num_particles, num_runs, seed=0):
    smc = SMC(
        ParticleFilter(denoise, store="last"), num_particles=num_particles, num_runs=num_runs,
        progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), **problem.arguments(mixtures.ExactDenoiser(mixture)))
    return smc


@pytest.mark.statistical
def test_evidence_on_a_grid():
    """`E[Z] = E[g(x_2)]` under the sampler's own walk, y seen at level 2, K = 4 particles."""
    schedule, kappa = coarse(), 0.2
    scale = np.sqrt(0.64 * 0.15 / 0.85)
    problem = LinearProblem([[0.8]], [0.4], scale, schedule, kappa=kappa)
    np.testing.assert_array_equal(problem.until, [2])
    grid = np.linspace(-9, 9, 3001)
    values = np.exp(-((grid - np.sqrt(0.85) * 0.5) ** 2) / (2 * kappa)) / np.sqrt(2 * np.pi * kappa)

    @jax.jit
    def moments(x, high, low):
        def one(x):
            found = mixtures.ExactDenoiser(LINE)(x[None], high)._replace(variance=None)
            law = ancestral(None, x[None], found, high, low)
            return law.mean[0], law.variance[0]

        return jax.vmap(one)(x)

    for k in range(3, 7):
        mean, variance = (
            np.asarray(a, np.float64)[:, None]
            for a in moments(jnp.asarray(grid), schedule.level(k), schedule.level(k - 1))
        )
        kernel = np.exp(-((grid - mean) ** 2) / (2 * variance))
        values = kernel @ values / kernel.sum(axis=1)
    start = np.exp(-(grid**2) / 2)
    expected = start @ values / start.sum()
    found = np.exp(np.asarray(run(problem, LINE, 4, 60_000).log_evidence, np.float64))
    assert_mean(found, expected, family=1, smallest_bias=0.02 * expected)
    constant = 0.5 * np.log(0.85) - np.log(0.8)
    np.testing.assert_allclose(problem.log_constant, constant, atol=1e-5)


@pytest.mark.statistical
@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_posterior_of_two_coordinates(scale):
    """Mean and evidence of a mixture seen through a matrix; each coordinate has its own level."""
    y, kappa = np.asarray([0.6, -0.2]), 1e-3
    # so many steps that the walk is nearly the reverse walk whose law the mixture is
    problem = LinearProblem(MATRIX, y, scale, schedules.vp_linear(300), kappa=kappa)
    smc = run(problem, PLANE, 4000, 50)  # weights have heavy tails: fewer miss the rare large ones
    # what the particles target: each coordinate seen at its level, through a potential of width kappa
    alpha, sigma = (
        np.asarray(a)[problem.until] for a in (problem.schedule.alpha, problem.schedule.sigma)
    )
    width = np.sqrt(sigma**2 + kappa) / alpha
    exact = PLANE.tilted(
        mixtures.gaussian_likelihood(problem.basis / width[:, None], problem.target / width, 1.0)
    )
    log_evidence = float(exact.log_normalizer) - np.log(width * alpha).sum()
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64) - log_evidence)
    assert_ratio(ratio, np.ones_like(ratio), 1.0)
    weights = jax.nn.softmax(smc.result.log_weights, axis=1)
    means = jnp.einsum("rn,rnd->rd", weights, problem.data(smc.result.final["x"]))
    for axis in range(2):
        assert_ratio(ratio * np.asarray(means[:, axis]), ratio, exact.mixture.mean[axis])
    assert (problem.until[0] != problem.until[1]) == (scale > 0)
    if scale:  # and with the constant that is p(y), but for the nearest of 300 levels and kappa
        truth = PLANE.tilted(mixtures.gaussian_likelihood(MATRIX, y, scale)).log_normalizer
        np.testing.assert_allclose(log_evidence + problem.log_constant, truth, atol=0.01)


def assert_ratio(above, below, expected):
    """Runs' mean of `above` over that of `below` within four standard errors (delta method)."""
    found = above.mean() / below.mean()
    error = (above - found * below).std() / below.mean() / np.sqrt(len(above))
    assert abs(found - expected) < 4 * error, f"{found} ± {error} for {expected}"


@pytest.mark.compile
def test_another_problem_of_the_same_size_compiles_nothing():
    problems = [
        LinearProblem(MATRIX, [y, -0.2], scale, schedules.vp_linear(5), kappa=1e-2)
        for y, scale in ((0.6, 0.3), (0.1, 0.2))
    ]
    run(problems[0], PLANE, 8, 1)
    assert compilations(lambda: run(problems[1], PLANE, 8, 1)) == 0


def test_what_is_not_seen_is_left_alone():
    """One row, three coordinates: two of them move freely, and the constant is that of one number."""
    problem = LinearProblem([[3.0, 0.0, 4.0]], [2.0], 0.5, schedules.vp_linear(20))
    np.testing.assert_array_equal(np.asarray(problem.until) == 21, [False, True, True])
    np.testing.assert_allclose(np.abs(problem.target[0]), 2 / 5, rtol=1e-5)
    x = jnp.asarray([[0.3, -0.2, 0.9]])
    np.testing.assert_allclose(problem.data(x @ problem.basis.T), x, atol=1e-5)


def test_more_observations_than_coordinates():
    """The part of y that no x explains is charged as noise."""
    matrix, y = np.asarray([[1.0], [1.0]]), np.asarray([0.5, 0.9])
    problem = LinearProblem(matrix, y, 0.4, schedules.vp_linear(400))
    # p(y) = p(mean of y | x) p(difference): 0.4 sd each way along the second singular vector
    away = (0.9 - 0.5) / np.sqrt(2)
    rest = -(away**2) / (2 * 0.4**2) - np.log(0.4 * np.sqrt(2 * np.pi))
    level = problem.schedule.level(int(problem.until[0]))
    first = float(jnp.log(level.alpha)) - np.log(np.sqrt(2))
    np.testing.assert_allclose(problem.log_constant, first + rest, atol=1e-4)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": [1.0, 2.0]}, "shape"),
        ({"y": [np.nan]}, "`y` has values"),
        ({"matrix": [[np.inf]]}, "`matrix` has values"),
        ({"scale": -1.0}, "scale"),
        ({"kappa": 0.0}, "kappa"),
        ({"schedule": schedules.edm(5)}, "variance-preserving"),
        ({"matrix": [[1.0], [1.0]], "y": [0.0, 1.0], "scale": 0.0}, "matrix @ x"),
    ],
    ids=["shapes", "y", "matrix", "scale", "kappa", "schedule", "noiseless"],
)
def test_refusals(given, message):
    usual = {
        "matrix": [[1.0]],
        "y": [0.3],
        "scale": 0.1,
        "schedule": schedules.vp_linear(5),
        "kappa": 0.1,
    }
    usual |= given
    kappa = usual.pop("kappa")
    with pytest.raises(ValueError, match=message):
        LinearProblem(*usual.values(), kappa=kappa)
