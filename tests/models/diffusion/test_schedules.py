"""Levels against their defining equations, and published models' configs against known numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.models.diffusion import predictors, scheduler_config, schedules
from smcscale.models.diffusion.predictors import preserving_level, straight_level
from smcscale.models.diffusion.scheduler_config import read_scheduler_config

K = 12
SCHEDULES = {
    "vp_linear": schedules.vp_linear(K),
    "vp_cosine": schedules.vp_cosine(K),
    "ve": schedules.ve(K),
    "edm": schedules.edm(K),
    "rectified_flow": schedules.rectified_flow(K, shift=3.0),
    "interpolant": schedules.interpolant(
        lambda t: jnp.cos(t * jnp.pi / 2), lambda t: jnp.sin(t * jnp.pi / 2), np.linspace(0, 0.99, K + 1)
    ),
}  # fmt: skip
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_run_from_data_to_noise(name):
    schedule = SCHEDULES[name]
    assert schedule.num_steps == K
    np.testing.assert_allclose((schedule.alpha[0], schedule.sigma[0]), (1, 0), atol=1e-6)
    ratio = np.asarray(schedule.sigma / schedule.alpha)
    assert (np.diff(ratio) > 0).all()
    assert (np.diff(schedule.tau) > 0).all()
    walk = schedule.walk()
    np.testing.assert_array_equal(walk.high.index, np.arange(K, 0, -1))
    np.testing.assert_array_equal(walk.low.index, np.arange(K - 1, -1, -1))
    np.testing.assert_array_equal(walk.made, np.arange(1, K + 1))
    np.testing.assert_array_equal(walk.last, np.arange(1, K + 1) == K)
    np.testing.assert_array_equal(walk.low.sigma, schedule.sigma[::-1][1:])
    for value in jax.tree.leaves(schedule):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "interpolant"])
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)


def test_levels_have_their_formulas():
    tau = np.linspace(0, 1, K + 1)
    beta = 0.1 + tau * 19.9
    integral = np.array([np.trapezoid(beta[: i + 1], tau[: i + 1]) for i in range(K + 1)])
    np.testing.assert_allclose(SCHEDULES["vp_linear"].alpha, np.exp(-integral / 2), rtol=1e-5)
    cosine = SCHEDULES["vp_cosine"]
    angle = (np.asarray(cosine.tau) + 0.008) / 1.008 * np.pi / 2
    np.testing.assert_allclose(cosine.alpha, np.cos(angle) / np.cos(angle[0]), atol=1e-6)
    np.testing.assert_allclose(cosine.alpha[-1], 1e-3, rtol=1e-3)
    i = np.arange(K)
    karras = (80 ** (1 / 7) + i / (K - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(SCHEDULES["edm"].sigma[:0:-1], karras, rtol=1e-5)
    ratios = np.asarray(SCHEDULES["ve"].sigma[2:] / SCHEDULES["ve"].sigma[1:-1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    np.testing.assert_allclose(
        SCHEDULES["rectified_flow"].sigma, 3 * tau / (1 + 2 * tau), rtol=1e-6
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_derivatives(name):
    """By finite differences of a schedule with levels close together."""
    fine = {
        "vp_linear": lambda: schedules.vp_linear(4096),
        "vp_cosine": lambda: schedules.vp_cosine(4096),
        "ve": lambda: schedules.ve(4096),
        "edm": lambda: schedules.edm(4096),
        "rectified_flow": lambda: schedules.rectified_flow(4096, shift=3.0),
        "interpolant": lambda: schedules.interpolant(
            lambda t: jnp.cos(t * jnp.pi / 2), lambda t: jnp.sin(t * jnp.pi / 2), np.linspace(0, 0.99, 4097)
        ),
    }  # fmt: skip
    with jax.enable_x64(True):
        found = fine[name]()
        inside = slice(400, -400)
        for value, rate in ((found.alpha, found.alpha_rate), (found.sigma, found.sigma_rate)):
            slope = np.gradient(np.asarray(value), np.asarray(found.tau))
            np.testing.assert_allclose(slope[inside], np.asarray(rate)[inside], atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bridge_is_the_posterior_of_the_forward_walk(name):
    """Mean and variance of `x_low` by conditioning the joint normal law of both states."""
    with jax.enable_x64(True):
        schedule = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), SCHEDULES[name])
        for high, low in ((K, K - 1), (5, 2), (1, 0)):
            up, down = schedule.level(high), schedule.level(low)
            found = schedules.bridge(up, down)
            # x_high = factor x_low + noise, given x_0
            factor = up.alpha / down.alpha
            gain = factor * down.sigma**2 / up.sigma**2
            np.testing.assert_allclose(found.state, gain, rtol=1e-9, atol=1e-15)
            np.testing.assert_allclose(found.data, down.alpha - gain * up.alpha, rtol=1e-9)
            exact = down.sigma**2 - gain * factor * down.sigma**2
            np.testing.assert_allclose(found.variance, exact, rtol=1e-7, atol=1e-15)
            added = schedules.added_noise(up, down)
            np.testing.assert_allclose(factor**2 * down.sigma**2 + added, up.sigma**2, rtol=1e-9)


@pytest.mark.parametrize(
    ("level_at", "name"), [(straight_level, "rectified_flow"), (preserving_level, "vp_linear")]
)
def test_a_level_is_found_by_its_ratio(level_at, name):
    schedule = SCHEDULES[name]
    inside = schedule.level(jnp.arange(1, K))
    found = level_at(inside.alpha / inside.sigma)
    for field in ("alpha", "sigma", "tau", "alpha_rate", "sigma_rate"):
        np.testing.assert_allclose(getattr(found, field), getattr(inside, field), rtol=1e-3)


def test_a_schedule_of_unequal_arrays_is_refused():
    with pytest.raises(ValueError, match="num_steps \\+ 1"):
        schedules.as_schedule([1, 0.5], [0, 1, 2], [0, 1], [0, 0], [0, 0], 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        schedules.vp_linear(0)


# ---- scheduler_config.json


def test_a_config_of_stable_diffusion(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(STABLE_DIFFUSION))
    found = read_scheduler_config(tmp_path, 50)
    np.testing.assert_array_equal(found.schedule.tau[1:], np.arange(1, 982, 20))
    # its known ends: sqrt(1 - a) / sqrt(a) is 0.0292 at timestep 0 and 14.61 at 999
    every = read_scheduler_config(STABLE_DIFFUSION | {"steps_offset": 0}, 1000).schedule
    ratio = np.asarray(every.sigma / every.alpha)
    np.testing.assert_allclose(ratio[[1, -1]], (0.0292, 14.6146), rtol=2e-3)
    np.testing.assert_allclose(found.schedule.alpha[0] ** 2, 1 - 0.00085, rtol=1e-6)
    assert found.clip is None and found.predicts is predictors.eps
    to_one = read_scheduler_config(STABLE_DIFFUSION | {"set_alpha_to_one": True}, 50).schedule
    assert to_one.sigma[0] == 0


@pytest.mark.parametrize(
    ("spacing", "times"), [("leading", [0, 250, 500, 750]), ("trailing", [249, 499, 749, 999])]
)
def test_timestep_spacings(spacing, times):
    config = {"_class_name": "DDPMScheduler", "timestep_spacing": spacing}
    found = read_scheduler_config(config, 4)
    np.testing.assert_array_equal(found.schedule.tau[1:], times)
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)[times]
    np.testing.assert_allclose(found.schedule.alpha[1:] ** 2, kept, rtol=1e-5)
    assert found.clip == 1.0 and found.schedule.sigma[0] == 0


def test_a_config_of_the_euler_scheduler():
    config = STABLE_DIFFUSION | {"_class_name": "EulerDiscreteScheduler"}
    found = read_scheduler_config(config, 4).schedule
    np.testing.assert_allclose(found.tau[1:], [0, 333, 666, 999], rtol=1e-6)
    np.testing.assert_allclose((found.sigma / found.alpha)[-1], 14.6146, rtol=1e-4)
    np.testing.assert_allclose(found.initial_scale, 14.6146 / np.sqrt(1 + 14.6146**2), rtol=1e-5)
    karras = read_scheduler_config(config | {"use_karras_sigmas": True}, 5).schedule
    ratio = np.asarray(karras.sigma / karras.alpha)[1:]
    np.testing.assert_allclose(np.diff(ratio ** (1 / 7)), np.diff(ratio ** (1 / 7))[0], rtol=1e-3)


def test_a_config_of_edm_scales_its_network():
    found = read_scheduler_config({"_class_name": "EDMEulerScheduler", "sigma_data": 0.7}, 6)
    np.testing.assert_allclose(found.schedule.sigma, schedules.edm(6).sigma)
    np.testing.assert_allclose(found.schedule.initial_scale, np.sqrt(80**2 + 1), rtol=1e-6)
    # the raw network that makes the whole one the exact denoiser of N(0, 0.7^2) is 0
    level = found.schedule.level(3)
    prediction = found.denoiser(lambda x, tau: 0 * x)(jnp.array([2.0]), level)
    exact = 2.0 * 0.49 / (0.49 + level.sigma**2)
    np.testing.assert_allclose(prediction.x0, exact, rtol=1e-6)
    seen = {}
    found.denoiser(lambda x, tau: seen.update(x=x, tau=tau) or x)(jnp.array([2.0]), level)
    np.testing.assert_allclose(seen["tau"], jnp.log(level.sigma) / 4, rtol=1e-6)
    np.testing.assert_allclose(seen["x"], 2.0 / np.sqrt(0.49 + level.sigma**2), rtol=1e-6)


def test_a_config_of_flow_matching():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    found = read_scheduler_config(config, 3)
    low = 3 * 0.001 / (1 + 2 * 0.001)
    line = np.array([low, (1 + low) / 2, 1])
    np.testing.assert_allclose(found.schedule.sigma[1:], 3 * line / (1 + 2 * line), rtol=1e-6)
    np.testing.assert_allclose(found.schedule.tau, 1000 * found.schedule.sigma, rtol=1e-6)
    # the network gives eps - x_0
    level = found.schedule.level(2)
    data, noise = jnp.array([0.3]), jnp.array([-1.2])
    x = level.alpha * data + level.sigma * noise
    prediction = found.denoiser(lambda x, tau: noise - data)(x, level)
    np.testing.assert_allclose(prediction.x0, data, rtol=1e-5)
    np.testing.assert_allclose(prediction.eps, noise, rtol=1e-5)
    moving = config | {"use_dynamic_shifting": True}
    with pytest.raises(ValueError, match="exp\\(mu\\)"):
        read_scheduler_config(moving, 3)
    shifted = read_scheduler_config(moving, 3, shift=2.0).schedule
    line = np.linspace(0.001, 1, 3)
    np.testing.assert_allclose(shifted.sigma[1:], 2 * line / (1 + line), rtol=1e-6)


def test_without_signal_at_the_end_noise_cannot_be_predicted():
    config = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(NotImplementedError, match="rescale_betas_zero_snr"):
        read_scheduler_config(config, 4)
    found = read_scheduler_config(config | {"prediction_type": "v_prediction"}, 4)
    np.testing.assert_allclose(found.schedule.alpha[-1], 0, atol=1e-7)
    assert found.predicts is predictors.v


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({"thresholding": True}, "thresholding"),
        ({"beta_schedule": "wild"}, "wild"),
        ({"prediction_type": "wild"}, "wild"),
        ({"timestep_spacing": "wild"}, "wild"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, match):
    with pytest.raises(NotImplementedError, match=match):
        read_scheduler_config(STABLE_DIFFUSION | change, 4)


def test_wrong_use_of_a_config_is_refused():
    with pytest.raises(ValueError, match="num_steps"):
        read_scheduler_config(STABLE_DIFFUSION, 1001)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        read_scheduler_config(STABLE_DIFFUSION, 10, shift=2.0)
    assert "PNDM" not in (scheduler_config.__doc__ or "")
