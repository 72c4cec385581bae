"""The small networks of our own checkpoints, and the folders they live in.

| name | what it is |
|---|---|
| `ResidualMLP` | a denoiser of vectors, with class labels or without |
| `load_denoiser(folder, label=...)` | a folder's network as a `Denoiser` |
| `save_denoiser(folder, network, predicts, schedule, clip)` | its counterpart |
| `pretrained(name)` | the folder of a shipped model |

A folder holds `config.json`, `model.safetensors` and a card. Networks of other people need none of
this: `Denoiser` takes any callable. The shipped ones are made by `train.py`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from smcscale.models import parameters
from smcscale.models.diffusion import predictors
from smcscale.models.diffusion.predictors import Denoiser, Parameterization

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
SHIPPED = ("digits", "digits-flow", "digits-judges", "digits-scales", "text")
_PREDICTS = {"x0": predictors.x0, "velocity": predictors.velocity}


@dataclass(frozen=True)
class Shape:
    """Sizes of a `ResidualMLP`.

    Attributes:
        size: D, numbers of a state.
        width: of the hidden layers.
        num_layers: residual layers.
        num_classes: C, labels 0 to C - 1.
        num_frequencies: sines and cosines of tau that the network is told.
    """

    size: int = 64
    width: int = 320
    num_layers: int = 4
    num_classes: int = 10
    num_frequencies: int = 16


class ResidualMLP(nnx.Module):
    """A denoiser of vectors: residual layers, each told the noise level and the class.

    Args:
        shape: the sizes.
        rngs: of the first parameters.
    """

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.shape = shape
        width = shape.width
        self.enter = nnx.Linear(shape.size, width, rngs=rngs)
        self.level = nnx.Linear(2 * shape.num_frequencies, width, rngs=rngs)
        self.label = nnx.Embed(shape.num_classes + 1, width, rngs=rngs)  # the last: no label
        self.layers = nnx.List([Residual(width, rngs) for _ in range(shape.num_layers)])
        self.leave = nnx.Linear(width, shape.size, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*batch size"],
        tau: Float[Array, "*batch"],
        label: Int32[Array, "*batch"] | int | None = None,
    ) -> Float[Array, "*batch size"]:
        """What it predicts, shape of `x`.

        Args:
            x: noisy states.
            tau: noise levels in [0, 1].
            label: 0 to C - 1; None, or a negative number: any class.
        """
        frequencies = jnp.pi * 2.0 ** (jnp.arange(self.shape.num_frequencies) / 2 - 1)
        angles = jnp.asarray(tau)[..., None] * frequencies
        told = self.level(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        classes = self.shape.num_classes
        label = jnp.asarray(-1 if label is None else label)
        told = told + self.label(jnp.where(label < 0, classes, label))
        hidden = self.enter(x)
        for layer in self.layers:
            hidden = layer(hidden, told)
        return self.leave(hidden)


class Residual(nnx.Module):
    """One residual layer."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.told = nnx.Linear(width, width, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, hidden: Array, told: Array) -> Array:
        return hidden + self.inner(jax.nn.gelu(self.norm(hidden) + self.told(told)))


def pretrained(name: str) -> Path:
    """The folder of a shipped model: "digits", "digits-flow", "digits-judges", "digits-scales", "text".

    Raises:
        ValueError: any other name.
    """
    if name not in SHIPPED:
        raise ValueError(
            f"smcscale: no shipped diffusion model is called {name!r}.\n"
            f"  try: one of {', '.join(SHIPPED)}, or the path of a folder of your own."
        )
    return PRETRAINED / name


def save_denoiser(
    folder: str | Path, network: ResidualMLP, predicts: str, schedule: str, clip: float | None
) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16).

    Args:
        folder: made if it is not there.
        network: what to save.
        predicts: "x0" or "velocity".
        schedule: name of the schedule in `schedules.py` whose tau the network was told.
        clip: bound of the data, or None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "residual_mlp",
        **asdict(network.shape),
        "predicts": predicts,
        "schedule": schedule,
        "clip": clip,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters.save(folder / "model.safetensors", _named(network))


def load_denoiser(folder: str | Path, label: int | None = None) -> Denoiser:
    """A folder's network as a `Denoiser` of one particle.

    Args:
        folder: in the layout of `save_denoiser`.
        label: class to make; None: any.
    Returns:
        a `Denoiser`; ask it at the levels of the schedule that `config.json` names.
    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short or of another kind; a label out of
            range.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'smcscale: there is no folder {folder}.\n  try: pretrained("digits") for the shipped model.'
        )
    config = parameters.read_json(folder / "config.json")
    if config.get("model_type") != "residual_mlp" or config.get("predicts") not in _PREDICTS:
        raise ValueError(
            f"smcscale: {folder / 'config.json'} is of model_type {config.get('model_type')!r} "
            f"predicting {config.get('predicts')!r}.\n"
            "  try: a folder of save_denoiser; any other network goes into Denoiser as a callable."
        )
    shape = Shape(**{name: int(config[name]) for name in asdict(Shape())})
    if label is not None and not 0 <= label < shape.num_classes:
        raise ValueError(
            f"smcscale: `label` must be 0 to {shape.num_classes - 1} or None, got {label}."
        )
    graph, state = nnx.split(nnx.eval_shape(lambda: ResidualMLP(shape, nnx.Rngs(0))))
    tensors = parameters.load(folder / "model.safetensors")
    flat = nnx.to_flat_state(state)
    if {n: t.shape for n, t in tensors.items()} != {_name(p): v.shape for p, v in flat}:
        raise ValueError(
            f"smcscale: {folder / 'model.safetensors'} does not hold the tensors that its "
            f"config.json describes ({len(tensors)} there, {len(flat)} expected).\n"
            "  try: save it again."
        )
    loaded = [(path, value.replace(jnp.asarray(tensors[_name(path)]))) for path, value in flat]
    network = nnx.merge(graph, nnx.from_flat_state(loaded))
    predicts: Parameterization = _PREDICTS[config["predicts"]]
    condition = jnp.asarray(-1 if label is None else label, jnp.int32)
    return Denoiser(network, predicts, condition=condition, clip=config["clip"])


def _named(network: nnx.Module) -> dict[str, Any]:
    state = nnx.state(network, nnx.Param)
    return {_name(path): value[...] for path, value in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
