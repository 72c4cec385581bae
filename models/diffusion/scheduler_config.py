"""Schedules of published models: `scheduler_config.json` as the `diffusers` library writes it.

    published = read_scheduler_config("model/scheduler", num_steps=50)      # folder, file or dict
    smc.run(key, published.denoiser(network), published.schedule, Steering(reward), shape=...)

| class | becomes | the network is told |
|---|---|---|
| `DDPMScheduler`, `DDIMScheduler` | variance-preserving levels at its timesteps | the timestep |
| `EulerDiscreteScheduler` | the same, at its (fractional) timesteps | the timestep |
| `EDMEulerScheduler` | `edm` levels, and a `Preconditioned` network | `log(sigma) / 4` |
| `FlowMatchEulerDiscreteScheduler` | rectified flow, shifted | `1000 sigma` |

A file says which levels a model knows, not how it must be walked: any sampler of `samplers.py` runs on
them. `DDIM(0.0)` on the levels of `EulerDiscreteScheduler` is that scheduler's Euler step (its state is
ours over alpha), and on those of `FlowMatchEulerDiscreteScheduler` likewise. What is not listed is
refused by name. `clip_sample` cuts predictions as `Denoiser(clip=...)` does, where the noise is what is
left (`use_clipped_model_output=True` in `DDIMScheduler`).

Where the steps divide the training timesteps, `DDIM` walks as `DDIMScheduler` does. Where they do not, that
scheduler moves to other timesteps than it next asks the network at; here they are the same.

Source: `diffusers`, the schedulers of the table; the rescaling of betas from Lin et al. 2023,
algorithm 1.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smcscale.models.diffusion import predictors
from smcscale.models.diffusion.predictors import Denoiser, Parameterization, Preconditioned
from smcscale.models.diffusion.schedules import Schedule, as_schedule, edm, ve

_PREDICTS = {
    "epsilon": predictors.eps,
    "sample": predictors.x0,
    "v_prediction": predictors.v,
}
#: options that change the numbers and have no counterpart here
_REFUSED = (
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


class Published(NamedTuple):
    """What a `scheduler_config.json` says.

    Attributes:
        schedule: K + 1 levels.
        predicts: what the network gives; `x0` for a preconditioned one.
        clip: bound of the data, or None.
        sigma_data: standard deviation of the data for a preconditioned network, else None.
        sign: of that network's output, see `Preconditioned`.
    """

    schedule: Schedule
    predicts: Parameterization
    clip: float | None = None
    sigma_data: float | None = None
    sign: float = 1.0

    def denoiser(self, network: Callable[..., Any], *, condition: Any = None) -> Denoiser:
        """A network of this model, `(x, tau)` or `(x, tau, condition)`, as a `Denoiser`."""
        if self.sigma_data is not None:
            network = Preconditioned(network, self.sigma_data, self.sign)
        return Denoiser(network, self.predicts, condition=condition, clip=self.clip)


def read_scheduler_config(
    source: str | Path | dict, num_steps: int, *, shift: float | None = None
) -> Published:
    """Read a `scheduler_config.json` of `diffusers` layout.

    Args:
        source: the file, a folder that holds it, or its contents.
        num_steps: K, moves of the sampler.
        shift: for flow models with `use_dynamic_shifting`: exponential of their `mu`, or their `mu` itself
            where `time_shift_type` is "linear".
    Raises:
        NotImplementedError: for a class or an option without a counterpart, by name.
        ValueError: for num_steps above the timesteps of the model.
    """
    config = source if isinstance(source, dict) else json.loads(_file(Path(source)).read_text())
    name = config.get("_class_name", "without a _class_name")
    readers: dict[str, Callable[..., Published]] = {
        "DDPMScheduler": _timesteps,
        "DDIMScheduler": _timesteps,
        "EulerDiscreteScheduler": _euler,
        "EDMEulerScheduler": _edm,
        "FlowMatchEulerDiscreteScheduler": _flow,
    }
    if name not in readers:
        raise NotImplementedError(
            f"smcscale: scheduler {name} is not known.\n  try: one of {', '.join(readers)}, "
            "or a Schedule of your own (`schedules.as_schedule`)."
        )
    for option in _REFUSED:
        if config.get(option):
            raise NotImplementedError(
                f"smcscale: option {option}={config[option]!r} of {name} has no counterpart here.\n"
                "  try: the config without it, or a Schedule of your own."
            )
    if not 1 <= num_steps <= config.get("num_train_timesteps", 1000):
        raise ValueError(
            f"smcscale: num_steps must be between 1 and the {config.get('num_train_timesteps', 1000)} "
            f"timesteps of the model, got {num_steps}."
        )
    if shift is not None and not config.get("use_dynamic_shifting"):
        raise ValueError(
            f"smcscale: `shift` was given for a config of {name} without use_dynamic_shifting.\n"
            "  try: none; a fixed shift is read from the config."
        )
    return readers[name](config, num_steps, shift)


def _file(path: Path) -> Path:
    return path / "scheduler_config.json" if path.is_dir() else path


def _timesteps(config: dict, num_steps: int, shift: float | None) -> Published:
    """DDPM, DDIM: integer timesteps of the training walk."""
    kept = _kept_signal(config)
    times = np.round(_spaced(config, num_steps, "leading")).astype(int)
    to_one = config["_class_name"] == "DDPMScheduler" or config.get("set_alpha_to_one", True)
    kept_at = np.append(1.0 if to_one else kept[0], kept[times])
    schedule = _of_kept(kept_at, np.append(0, times), 1.0)
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None
    return Published(schedule, _predicts(config), clip)


def _euler(config: dict, num_steps: int, shift: float | None) -> Published:
    """EulerDiscrete: its sigma is ours over alpha; timesteps may be fractions."""
    _only(config, "timestep_type", "discrete")
    _only(config, "interpolation_type", "linear")
    _only(config, "final_sigmas_type", "zero")
    _only(config, "rescale_betas_zero_snr", False)
    kept = _kept_signal(config)
    ratios = np.sqrt((1 - kept) / kept)
    times = _spaced(config, num_steps, "linspace")
    sigmas = np.interp(times, np.arange(len(ratios)), ratios)
    if config.get("use_karras_sigmas"):
        low, high = config.get("sigma_min") or sigmas[0], config.get("sigma_max") or sigmas[-1]
        sigmas = np.linspace(low ** (1 / 7), high ** (1 / 7), num_steps) ** 7
        times = np.interp(np.log(sigmas), np.log(ratios), np.arange(len(ratios)))
    kept_at = np.append(1.0, 1 / (1 + sigmas**2))
    leading = config.get("timestep_spacing", "linspace") == "leading"
    scale = 1.0 if leading else np.sqrt(1 - kept_at[-1])
    return Published(_of_kept(kept_at, np.append(0, times), scale), _predicts(config))


def _edm(config: dict, num_steps: int, shift: float | None) -> Published:
    _only(config, "final_sigmas_type", "zero")
    low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
    if config.get("sigma_schedule", "karras") == "karras":
        schedule = edm(num_steps, sigma_min=low, sigma_max=high, rho=config.get("rho", 7.0))
    else:
        schedule = ve(num_steps, sigma_min=low, sigma_max=high)
    scale = np.sqrt(schedule.sigma[-1] ** 2 + 1)
    schedule = as_schedule(
        schedule.alpha,
        schedule.sigma,
        schedule.tau,
        schedule.alpha_rate,
        schedule.sigma_rate,
        scale,
    )
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    kind = config.get("prediction_type", "epsilon")
    if kind not in signs:
        _only(config, "prediction_type", "epsilon")
    sigma_data = config.get("sigma_data", 0.5)
    return Published(schedule, predictors.x0, None, sigma_data, signs[kind])


def _flow(config: dict, num_steps: int, shift: float | None) -> Published:
    """FlowMatchEuler: the shift acts on the training levels, and on those chosen from them again."""
    trained = config.get("num_train_timesteps", 1000)
    dynamic = bool(config.get("use_dynamic_shifting"))
    if dynamic and shift is None:
        raise ValueError(
            "smcscale: this config has use_dynamic_shifting, so its levels depend on the image size.\n"
            "  try: shift=exp(mu), mu as the model's pipeline computes it."
        )
    _only(config, "use_karras_sigmas", False)
    fixed = config.get("shift", 1.0)
    ends = np.array([1 / trained, 1.0])
    ends = ends if dynamic else _shifted(ends, fixed)
    # from noise: a single step starts at the top
    sigma = np.linspace(ends[1], ends[0], num_steps)[::-1]
    sigma = np.append(0.0, _shifted(sigma, shift if shift is not None else fixed))
    one = np.ones_like(sigma)
    # the network is told the timestep and gives the slope by sigma
    schedule = as_schedule(1 - sigma, sigma, trained * sigma, -one, one, 1.0)
    return Published(schedule, predictors.velocity)


def _shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _kept_signal(config: dict) -> np.ndarray:
    """`alpha^2` at every timestep of the training walk, float64."""
    size = config.get("num_train_timesteps", 1000)
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    elif kind == "linear":
        betas = np.linspace(low, high, size)
    elif kind == "scaled_linear":
        betas = np.linspace(low**0.5, high**0.5, size) ** 2
    elif kind == "squaredcos_cap_v2":
        ends = np.cos((np.arange(size + 1) / size + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - ends[1:] / ends[:-1], 0.999)
    else:
        raise NotImplementedError(
            f"smcscale: beta_schedule {kind!r} is not known.\n"
            '  try: "linear", "scaled_linear", "squaredcos_cap_v2", or trained_betas.'
        )
    kept = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise NotImplementedError(
                "smcscale: with rescale_betas_zero_snr the last level has no signal, so a network that "
                "predicts noise says nothing of the data there.\n  try: a network that predicts v."
            )
        root = np.sqrt(kept)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        kept = root**2
    return kept


def _spaced(config: dict, num_steps: int, default: str) -> np.ndarray:
    """Timesteps `(K,)`, increasing."""
    size = config.get("num_train_timesteps", 1000)
    spacing = config.get("timestep_spacing", default)
    if spacing == "linspace":
        # from noise: a single step starts at the top
        return np.linspace(size - 1, 0, num_steps)[::-1]
    if spacing == "leading":
        return np.arange(num_steps) * (size // num_steps) + config.get("steps_offset", 0)
    if spacing == "trailing":
        return np.round(size - np.arange(num_steps) * size / num_steps)[::-1] - 1
    raise NotImplementedError(
        f"smcscale: timestep_spacing {spacing!r} is not known.\n"
        '  try: "linspace", "leading" or "trailing".'
    )


def _of_kept(kept: np.ndarray, times: np.ndarray, scale: float) -> Schedule:
    zero = np.zeros(len(kept))
    return as_schedule(np.sqrt(kept), np.sqrt(1 - kept), times, zero, zero, scale)


def _predicts(config: dict) -> Parameterization:
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTS:
        raise NotImplementedError(
            f"smcscale: prediction_type {kind!r} is not known.\n  try: {', '.join(_PREDICTS)}."
        )
    return _PREDICTS[kind]


def _only(config: dict, option: str, value: Any) -> None:
    """Refuse an option with another value."""
    if config.get(option, value) != value:
        raise NotImplementedError(
            f"smcscale: {option}={config[option]!r} of {config['_class_name']} has no counterpart "
            f"here.\n  try: {option}={value!r}, or a Schedule of your own."
        )
