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
    smc.run(
        jax.random.key(seed), problem.denoiser(mixtures.ExactDenoiser(mixture)), problem.schedule,
        problem.potential(), shape=(problem.target.size,), sampler=problem.sampler(),
        start=problem.start(),
    )  # fmt: skip
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
    found = np.exp(np.asarray(run(problem, LINE, 4, 10_000).log_evidence, np.float64))
    assert_mean(found, expected, family=1, smallest_bias=0.05 * expected)
    constant = 0.5 * np.log(0.85) - np.log(0.8)
    np.testing.assert_allclose(problem.log_constant, constant, atol=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_posterior_of_two_coordinates(scale):
    """Mean, and log p(y), of a mixture seen through a matrix; each coordinate has its own level."""
    y = np.asarray([0.6, -0.2])
    problem = LinearProblem(MATRIX, y, scale, schedules.vp_linear(60), kappa=1e-4)
    smc = run(problem, PLANE, 400, 60)
    exact = PLANE.tilted(mixtures.gaussian_likelihood(MATRIX, y, max(scale, 1e-3)))
    weights = jax.nn.softmax(smc.result.log_weights, axis=1)
    means = jnp.einsum("rn,rnd->rd", weights, problem.data(smc.result.final["x"]))
    error = np.asarray(means.std(axis=0) / np.sqrt(len(means)))
    # an observation is met at the nearest of 60 levels, by a walk that is not the true reverse walk
    assert (np.abs(means.mean(axis=0) - exact.mixture.mean) < 4 * error + 0.02).all()
    log_z = np.asarray(smc.log_evidence, np.float64) + float(problem.log_constant)
    pooled = np.logaddexp.reduce(log_z) - np.log(len(log_z))
    # 60 steps: the walk is not the true reverse walk, and log Z is off by some hundredths
    assert abs(pooled - float(exact.log_normalizer)) < 0.25
    assert (problem.until[0] != problem.until[1]) == (scale > 0)


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
        ({"scale": -1.0}, "scale"),
        ({"kappa": 0.0}, "kappa"),
        ({"schedule": schedules.edm(5)}, "variance-preserving"),
        ({"matrix": [[1.0], [1.0]], "y": [0.0, 1.0], "scale": 0.0}, "matrix @ x"),
    ],
    ids=["shapes", "scale", "kappa", "schedule", "noiseless"],
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
