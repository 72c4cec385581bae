"""Configs and samplers against runs of the `diffusers` library; a network of its, on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import samplers
from smcscale.models.diffusion.host_program import host_denoise
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.scheduler_config import read_scheduler_config

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
K = 8  # divides 1000: else DDIMScheduler moves to other timesteps than it asks the network at
START = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, tau):
    """Something smooth, of the state and of what it is told about the level; NumPy or JAX."""
    return 0.4 * x + 0.1 * x**2 / (1 + x**2) + 0.0002 * tau


def of_torch(x, tau):
    return torch.from_numpy(np.asarray(network(x.numpy(), float(tau)), np.float32))


def theirs(scheduler, start):
    """A deterministic walk as the library's pipelines make it."""
    scheduler.set_timesteps(K)
    x = torch.from_numpy(start) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)(x, t)
        x = scheduler.step(of_torch(scaled, t), t, x).prev_sample
    return x.numpy()


def ours(config, start, sampler=samplers.DDIM(0.0)):  # noqa: B008 (compared by value)
    published = read_scheduler_config(config, K)
    denoiser, x = published.denoiser(network), jnp.asarray(start) * published.schedule.initial_scale
    for k in range(K, 0, -1):
        high, low = published.schedule.level(k), published.schedule.level(k - 1)
        x = jax.vmap(lambda x, h=high, w=low: sampler(denoiser, x, denoiser(x, h), h, w).mean)(x)
    return np.asarray(x)


DETERMINISTIC = {
    "ddim": ("DDIMScheduler", STABLE | {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim-offset": ("DDIMScheduler", STABLE | {"clip_sample": False, "steps_offset": 1}),
    "ddim-v": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "ddim-x0": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    "ddim-cosine": (
        "DDIMScheduler", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"},
    ),
    "ddim-trailing": (
        "DDIMScheduler", STABLE | {"clip_sample": False, "timestep_spacing": "trailing"},
    ),
    "ddim-zero-snr": (
        "DDIMScheduler",
        STABLE
        | {
            "clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    ),
    "euler": ("EulerDiscreteScheduler", STABLE),
    "euler-leading": (
        "EulerDiscreteScheduler", STABLE | {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "euler-trailing": ("EulerDiscreteScheduler", STABLE | {"timestep_spacing": "trailing"}),
    "euler-karras": ("EulerDiscreteScheduler", STABLE | {"use_karras_sigmas": True}),
    "euler-v": ("EulerDiscreteScheduler", STABLE | {"prediction_type": "v_prediction"}),
    "edm": ("EDMEulerScheduler", {"sigma_data": 0.7}),
    "edm-exponential": ("EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_walk_is_the_librarys(name, tmp_path):
    kind, options = DETERMINISTIC[name]
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.save_config(tmp_path)
    expected = theirs(scheduler, START)
    found = ours(tmp_path, START)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def ancestral_step(denoiser, x, high, low):
    """Mean and standard deviation of the states at `low`."""

    def one(x):
        law = samplers.ancestral(denoiser, x, denoiser(x, high), high, low)
        return law.mean, jnp.sqrt(law.variance)

    return jax.vmap(one)(x)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_an_ancestral_step_is_the_librarys(kind, spacing, tmp_path):
    options = STABLE | {"clip_sample": False, "timestep_spacing": spacing}
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.save_config(tmp_path)
    scheduler.set_timesteps(K)
    published = read_scheduler_config(tmp_path, K)
    denoiser = published.denoiser(network)
    x, extra = torch.from_numpy(START), {"eta": 1.0} if kind == "DDIMScheduler" else {}
    for k, t in zip(range(K, 1, -1), scheduler.timesteps, strict=False):
        generator = torch.Generator().manual_seed(k)
        given = of_torch(x, t)
        moved = scheduler.step(given, t, x, generator=generator, **extra).prev_sample.numpy()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).numpy()
        high, low = published.schedule.level(k), published.schedule.level(k - 1)
        law = ancestral_step(denoiser, jnp.asarray(x.numpy()), high, low)
        np.testing.assert_allclose(law[0] + law[1] * noise, moved, rtol=1e-3, atol=1e-3)
        x = torch.from_numpy(moved)


UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@pytest.mark.slow
def test_a_unet_of_the_library_is_steered(tmp_path):
    """A folder of the library, random weights: one particle walks as in its own DDIM loop."""
    torch.manual_seed(0)
    diffusers.UNet2DModel(**UNET).save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler(**STABLE, clip_sample=False).save_pretrained(tmp_path / "scheduler")

    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    published = read_scheduler_config(tmp_path / "scheduler", K)

    def predict(x, tau):
        with torch.inference_mode():
            return unet(torch.from_numpy(x), torch.from_numpy(tau)).sample.numpy()

    def run(steering, sampler, num_particles):
        program, rows = host_denoise(
            predict, published, steering, shape=(3, 8, 8), sampler=sampler, batch_size=3
        )
        smc = SMC(
            ParticleFilter(program, trigger=triggers.always, store="paths"),
            num_particles=num_particles, progress_bar=False,
        )  # fmt: skip
        smc.run(jax.random.key(0), rows)
        return smc

    still = run(None, samplers.DDIM(0.0), 1).result.history.states["x"][:, 0, 0]
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(K)
    state = torch.from_numpy(np.array(still[0]))[None]
    for t, ours in zip(scheduler.timesteps[1:], still[1:], strict=True):
        # the first move was made from noise that is not kept
        noise = torch.from_numpy(predict(state.numpy(), np.full(1, float(t), np.float32)))
        state = scheduler.step(noise, t, state).prev_sample
        np.testing.assert_allclose(ours, state[0], rtol=1e-3, atol=1e-3)

    brighter = Steering(lambda x: x.mean(axis=(1, 2, 3)), strength=50.0)
    means = [
        float(run(s, samplers.ancestral, 8).result.final["x"].mean()) for s in (None, brighter)
    ]
    assert means[1] > means[0] + 0.02
