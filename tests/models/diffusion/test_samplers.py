"""Samplers on normal data, where every step is linear and the law after any number of them is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.models.diffusion import samplers, schedules
from smcscale.models.diffusion.mixtures import ExactDenoiser, ExactReverse, GaussianMixture
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.samplers import DDIM, DDPM, EulerMaruyama, FlowSDE, churn

VARIANCE = 0.5


def mixture():
    """Normal data of mean 0.4."""
    return GaussianMixture(jnp.zeros(1), jnp.array([[0.4]]), jnp.array([[[VARIANCE]]]))


def final_law(sampler, schedule, with_variance=False):
    """Mean and variance of the data that a sampler gives, steps composed as linear maps."""
    denoiser = ExactDenoiser(mixture(), with_variance)

    def step(x, row):
        prediction = denoiser(x, row.high)
        law = sampler(denoiser, x, prediction, row.high, row.low).base_dist
        return law.loc[0], law.scale[0]

    @jax.jit
    def steps(walk):
        start, scale = jax.vmap(lambda row: step(jnp.zeros(1), row))(walk)
        end, _ = jax.vmap(lambda row: step(jnp.ones(1), row))(walk)
        return start, end - start, scale

    shift, slope, scale = (np.asarray(a, np.float64) for a in steps(schedule.walk()))
    mean, variance = 0.0, float(schedule.initial_scale) ** 2
    for b, m, s in zip(shift, slope, scale, strict=True):
        mean, variance = b + m * mean, m**2 * variance + s**2
    return mean, variance


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("eta", "steps", "exact"),
    [(1.0, 5, 0.159), (1.0, 20, 0.334), (1.0, 100, 0.452), (0.0, 5, 0.190), (0.0, 20, 0.398)],
)
def test_a_point_prediction_loses_variance(eta, steps, exact):
    """Numbers found independently, by another program."""
    _, variance = final_law(DDIM(eta), schedules.vp_linear(steps))
    np.testing.assert_allclose(variance, exact, atol=6e-4)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("steps", [3, 10])
def test_with_its_variance_normal_data_are_exact(eta, steps):
    """From the exact law at the top level, at any number of steps."""
    schedule = schedules.vp_linear(steps, beta_max=60.0)  # no signal at the top
    mean, variance = final_law(DDIM(eta), schedule, with_variance=True)
    np.testing.assert_allclose((mean, variance), (0.4, VARIANCE), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 128])
def test_the_exact_kernel_is_exact(steps):
    schedule = schedules.vp_linear(steps, beta_max=60.0)
    row = jax.tree.map(lambda a: a[1], schedule.walk())
    x = jnp.array([0.7])
    exact = ExactReverse(mixture())(None, x, None, row.high, row.low)  # pyright: ignore
    denoiser = ExactDenoiser(mixture(), with_variance=True)
    found = DDIM(1.0)(denoiser, x, denoiser(x, row.high), row.high, row.low)
    np.testing.assert_allclose(found.log_prob(x + 0.1), exact.log_prob(x + 0.1), rtol=1e-6)


FINE = {
    "ancestral": (samplers.ancestral, schedules.vp_linear),
    "flow of DDIM": (DDIM(0.0), schedules.vp_linear),
    "DDPM": (DDPM(), schedules.vp_linear),
    "Euler-Maruyama, VP": (EulerMaruyama(), schedules.vp_linear),
    "Euler-Maruyama, VE": (EulerMaruyama(), schedules.ve),
    "flow": (FlowSDE(0.0), schedules.rectified_flow),
    "flow SDE": (FlowSDE(1.0), schedules.rectified_flow),
    "noisier flow SDE": (FlowSDE(2.0), schedules.rectified_flow),
    "flow SDE, any g": (FlowSDE(lambda level: 3 * level.sigma**2), schedules.rectified_flow),
    "flow SDE of VP levels": (FlowSDE(1.0), schedules.vp_cosine),
}


@pytest.mark.parametrize("name", FINE)
def test_the_error_falls_with_the_steps(name):
    """First order: eight times the steps, about an eighth of the error; in the limit the data."""
    sampler, levels = FINE[name]
    errors = []
    for steps in (128, 1024):
        mean, variance = final_law(sampler, levels(steps))
        errors.append(max(abs(mean - 0.4), abs(variance - VARIANCE)))
    assert errors[1] < 0.02 and errors[1] < 0.3 * errors[0] + 2e-3, errors


@pytest.mark.parametrize("heun", [False, True])
def test_churn_approaches_the_data(heun):
    errors = []
    for steps in (16, 64):
        schedule, sampler = churn(schedules.edm(steps), amount=10.0, noise=1.0, heun=heun)
        mean, variance = final_law(sampler, schedule)
        errors.append(max(abs(mean - 0.4), abs(variance - VARIANCE)))
    assert errors[1] < 0.5 * errors[0] and errors[1] < (0.01 if heun else 0.1), errors


def test_churn_is_the_published_walk():
    """Algorithm 2 of Karras et al., with the same noises, cut where a network is asked."""
    base = schedules.edm(6)
    schedule, sampler = churn(base, amount=4.0, sigma_min=0.05, sigma_max=50.0)
    denoiser = ExactDenoiser(mixture())
    noises = np.array([0.3, -1.0, 0.8, 0.1, -0.4, 1.2])
    sigma = np.append(np.asarray(base.sigma)[:0:-1], 0.0)

    def denoised(x, s):
        return float(
            denoiser(jnp.array([x]), schedule.level(0)._replace(sigma=jnp.asarray(s))).x0[0]
        )

    gamma = min(4.0 / 6, 2**0.5 - 1)
    x, published, raised = 0.7 * sigma[0], [], []
    for i in range(6):
        hat = sigma[i] * (1 + gamma * (0.05 <= sigma[i] <= 50))
        x = x + 1.003 * np.sqrt(hat**2 - sigma[i] ** 2) * noises[i]
        published.append(x)
        raised.append(hat)
        slope = (x - denoised(x, hat)) / hat
        end = x + (sigma[i + 1] - hat) * slope
        if sigma[i + 1] > 0:
            again = (end - denoised(end, sigma[i + 1])) / sigma[i + 1]
            end = x + (sigma[i + 1] - hat) * (slope + again) / 2
        x = end
    np.testing.assert_allclose(schedule.sigma[:0:-1], raised, rtol=1e-6)
    state, walk = jnp.array([published[0]]), schedule.walk()
    for i in range(6):
        high, low = (jax.tree.map(lambda a: a[i], levels) for levels in (walk.high, walk.low))  # noqa: B023
        law = sampler(denoiser, state, denoiser(state, high), high, low).base_dist
        state = law.loc + law.scale * (noises[i + 1] if i < 5 else 0.0)
        np.testing.assert_allclose(state[0], published[i + 1] if i < 5 else x, rtol=1e-5)
    assert law.scale[0] == 0, "nothing is drawn at the last step"


def test_means_and_variances_of_ddpm():
    schedule = schedules.vp_linear(10)
    high, low = schedule.level(6), schedule.level(5)
    x0, eps = jnp.array([0.3]), jnp.array([-0.8])
    x = high.alpha * x0 + high.sigma * eps
    bridge = schedules.bridge(high, low)
    for sampler, variance in (
        (samplers.ancestral, bridge.variance),
        (DDPM(), schedules.added_noise(high, low)),
    ):
        law = sampler(None, x, Prediction(x0, eps), high, low).base_dist
        np.testing.assert_allclose(law.loc, bridge.data * x0 + bridge.state * x, rtol=1e-6)
        np.testing.assert_allclose(law.scale**2, variance, rtol=1e-6)
    # the literature's words: beta of the step, and its posterior form
    kept, before = high.alpha**2, low.alpha**2
    np.testing.assert_allclose(schedules.added_noise(high, low), 1 - kept / before, rtol=1e-6)
    small = (1 - before) / (1 - kept) * (1 - kept / before)
    np.testing.assert_allclose(bridge.variance, small, rtol=1e-6)


def test_the_noise_of_euler_maruyama_is_the_integral():
    """`beta dt` of the VP walk to third order, the change of `sigma^2` of the VE one."""
    schedule = schedules.vp_linear(100)
    high, low = schedule.level(50), schedule.level(49)
    law = EulerMaruyama()(None, jnp.zeros(1), Prediction(*jnp.zeros((2, 1))), high, low)  # pyright: ignore
    beta = 2 * jnp.log(low.alpha / high.alpha)
    np.testing.assert_allclose(law.base_dist.scale**2, beta, rtol=1e-3)
    schedule = schedules.ve(20)
    high, low = schedule.level(12), schedule.level(11)
    law = EulerMaruyama()(None, jnp.zeros(1), Prediction(*jnp.zeros((2, 1))), high, low)  # pyright: ignore
    np.testing.assert_allclose(law.base_dist.scale**2, high.sigma**2 - low.sigma**2, rtol=1e-9)


def test_churn_refuses_levels_that_shrink_the_data():
    with pytest.raises(ValueError, match="alpha 1"):
        churn(schedules.vp_linear(4), amount=1.0)
