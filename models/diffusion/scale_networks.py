"""The shipped next-scale network of digits, and its folder.

| name | what it is |
|---|---|
| `ScaleMLP` | logits of all tokens from the image so far, the scale and the class |
| `ScaleModel` | such a network with its codec: what `draw_scales` asks for |
| `load_scales(folder)`, `save_scales(folder, network, codec)` | the folder |

Read next: `train_scales.py`.

Source: Tian et al. 2024, "Visual autoregressive modeling" (arXiv 2404.02905), section 3.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from smcscale.models import parameters
from smcscale.models.diffusion.autoregressive import PatchCodec
from smcscale.models.diffusion.networks import Residual
from smcscale.models.diffusion.predictors import Frozen


@dataclass(frozen=True)
class Shape:
    """Sizes of a `ScaleMLP`.

    Attributes:
        size: pixels of an image.
        counts: tokens of each scale.
        vocabulary: V.
        width: of the hidden layers.
        num_layers: residual layers.
        num_classes: C, labels 0 to C - 1.
    """

    size: int = 64
    counts: tuple[int, ...] = (1, 4, 16, 64)
    vocabulary: int = 32
    width: int = 128
    num_layers: int = 3
    num_classes: int = 10


class ScaleMLP(nnx.Module):
    """Logits of all tokens from the image so far: residual layers told the scale and the class.

    Args:
        shape: the sizes.
        rngs: of the first parameters.
    """

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.shape = shape
        length, width = sum(shape.counts), shape.width
        self.enter = nnx.Linear(shape.size, width, rngs=rngs)
        self.scale = nnx.Embed(len(shape.counts), width, rngs=rngs)
        self.label = nnx.Embed(shape.num_classes + 1, width, rngs=rngs)  # the last: no label
        self.layers = nnx.List([Residual(width, rngs) for _ in range(shape.num_layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.leave = nnx.Linear(width, length * shape.vocabulary, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "*batch size"],
        scale: Int[Array, "*batch"],
        label: Int[Array, "*batch"],
    ) -> Float[Array, "*batch L V"]:
        """Logits; a label outside the classes: any class."""
        classes = self.shape.num_classes
        told = self.scale(scale) + self.label(
            jnp.where((label < 0) | (label >= classes), classes, label)
        )
        hidden = self.enter(image)
        for layer in self.layers:
            hidden = layer(hidden, told)
        logits = self.leave(self.norm(hidden))
        return logits.reshape(*logits.shape[:-1], -1, self.shape.vocabulary)


class ScaleModel(eqx.Module):
    """A network of images with the codec that makes them: a `Network` of tokens."""

    network: Callable[..., Array]
    codec: PatchCodec

    def __call__(
        self, tokens: Int[Array, " L"], scale: Int[Array, ""], label: Int[Array, ""]
    ) -> Float[Array, "L V"]:
        """Logits `(L, V)`; what the network knows of coarser tokens is their image."""
        return self.network(self.codec.decode(tokens), scale, label)


def save_scales(folder: str | Path, network: ScaleMLP, codec: PatchCodec) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16); the folder is made if not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "scale_mlp", **asdict(network.shape)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    tensors: dict[str, Any] = {_name(path): value[...] for path, value in flat}
    tensors |= {f"codebook.{k}": book for k, book in enumerate(codec.codebooks)}
    parameters.save(folder / "model.safetensors", tensors)


def load_scales(folder: str | Path) -> ScaleModel:
    """What `save_scales` wrote.

    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short or of another kind.
    """
    folder = Path(folder)
    config = parameters.read_json(folder / "config.json")
    if config.get("model_type") != "scale_mlp":
        raise ValueError(
            f"smcscale: {folder / 'config.json'} is of model_type {config.get('model_type')!r}.\n"
            "  try: a folder of save_scales; any other network is a callable of one's own."
        )
    if lacking := sorted(asdict(Shape()).keys() - config.keys()):
        raise ValueError(f"smcscale: {folder / 'config.json'} lacks {', '.join(lacking)}.")
    sizes: dict[str, Any] = {name: config[name] for name in asdict(Shape())}
    shape = Shape(**{**sizes, "counts": tuple(sizes["counts"])})
    graph, state = nnx.split(nnx.eval_shape(lambda: ScaleMLP(shape, nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    expected = {_name(path): value.shape for path, value in flat}
    for k, count in enumerate(shape.counts):
        expected[f"codebook.{k}"] = (shape.vocabulary, shape.size // count)
    tensors = parameters.load(folder / "model.safetensors")
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise ValueError(
            f"smcscale: {folder / 'model.safetensors'} does not hold the tensors that its "
            f"config.json describes ({len(tensors)} there, {len(expected)} expected).\n"
            "  try: save it again."
        )
    loaded = [(path, value.replace(jnp.asarray(tensors[_name(path)]))) for path, value in flat]
    books = tuple(jnp.asarray(tensors[f"codebook.{k}"]) for k in range(len(shape.counts)))
    network = nnx.merge(graph, nnx.from_flat_state(loaded))
    return ScaleModel(Frozen(network), PatchCodec(books, round(shape.size**0.5)))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
