"""Network parameters on disk: safetensors files and the JSON beside them, without pickle.

| name | what it is |
|---|---|
| `Checkpoint(path)` | `{name: array}`, each tensor read when asked for; one file or many shards |
| `load(path)` | all of it at once |
| `assemble(shape, dtype, parts)` | one array from parts that come one at a time, without a copy |
| `Placement(mesh, rules)` | how arrays lie over devices, by pattern of their names |
| `save(path, tensors)` | write one file |
| `read_json(path)` | the configuration beside it |

Names and layouts are the network's business (`models/reasoning/transformer.py` maps Hugging Face
names to its own).  Every error names the file and the cure.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
#: JAX takes over host memory that begins at such an address, without a copy
ALIGNMENT = 64


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors of a safetensors file, or of the shards in a folder; read when asked for.

    A folder's shards are those that its `model.safetensors.index.json` names, else all its
    `.safetensors` files.  Only their headers are read at first.  A tensor is a fresh array at each
    access, and nothing is kept.
    """

    def __init__(self, path: str | Path, dtype: Any = None):
        """Look into the files.

        Args:
            path: a `.safetensors` file, or a folder that holds one or more of them.
            dtype: the floating type of what is read; None: as stored. Integers keep theirs.
        Raises:
            FileNotFoundError: no such file, a folder without any, or a shard is missing.
            ValueError: a file is not a safetensors file or was cut short, or the index is wrong.
        """
        path = Path(path)
        self.dtype = dtype
        if path.is_dir() and (path / INDEX).is_file():
            self._files = _indexed(path)
        else:
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            if not files or not all(file.is_file() for file in files):
                raise FileNotFoundError(
                    f"smcscale: no safetensors weights at {path}. Expected a `.safetensors` file "
                    "or a folder in the Hugging Face layout (config.json, model.safetensors, "
                    "tokenizer.json)."
                )
            self._files = {name: file for file in files for name in _names(file)}

    def __getitem__(self, name: str) -> np.ndarray:
        # opened for each tensor: a file left open keeps its pages in memory
        with _opened(self._files[name]) as file:
            tensor = file.get_tensor(name)
        return tensor if self.dtype is None else _as_float(tensor, self.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load(path: str | Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, or of every shard in a folder, converted to `dtype`.

    Args, Raises: see `Checkpoint`.
    """
    return dict(Checkpoint(path, dtype))


def _indexed(folder: Path) -> dict[str, Path]:
    """The file of each tensor, as the index of the shards says, held to their headers."""
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in named.values()
    ):
        raise ValueError(
            f"smcscale: {folder / INDEX} has no `weight_map` from tensors to files beside it."
        )
    held = {}
    for file in sorted(set(named.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"smcscale: {folder} lacks the shard {file}, which its {INDEX} names.\n"
                "  try: download the folder again."
            )
        held[file] = set(_names(folder / file))
    for name, file in named.items():
        if name not in held[file]:
            raise ValueError(
                f"smcscale: {folder / file} has no tensor {name!r}, which {INDEX} says it holds.\n"
                "  try: download the folder again."
            )
    return {name: folder / file for name, file in named.items()}


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"smcscale: {file} is not a complete safetensors file ({error}). "
            "Download or write it again."
        ) from error


@dataclass(frozen=True)
class Placement:
    """How the arrays of a network lie over the devices of a mesh.

    Attributes:
        mesh: the devices; its axes are used as automatic ones, whatever their type.
        rules: `(pattern, spec)`: arrays whose whole name matches the regular expression are cut as
            the `PartitionSpec` says; the first match counts; without one every device has all.
    """

    mesh: Mesh
    rules: tuple[tuple[str, PartitionSpec], ...]

    def __call__(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the array of this name and shape lies.

        Raises:
            ValueError: its rule names an axis that the mesh lacks, or cuts it unevenly.
        """
        spec = next((s for p, s in self.rules if re.fullmatch(p, name)), PartitionSpec())
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names)
        sizes = dict(mesh.shape)
        for size, axes in zip(shape, spec, strict=False):
            axes = axes if isinstance(axes, tuple) else (axes,) if axes is not None else ()
            missing = set(axes) - sizes.keys()
            parts = math.prod(sizes.get(axis, 1) for axis in axes)
            if missing or size % parts or len(spec) > len(shape):
                raise ValueError(
                    f"smcscale: {name!r} {shape} cannot be laid over a mesh of {sizes} as {spec}: "
                    "the axes must be there and divide the sizes.\n"
                    "  try: another mesh, or a rule of your own for it."
                )
        return NamedSharding(mesh, spec)


def assemble(
    shape: tuple[int, ...],
    dtype: Any,
    parts: Iterable[tuple[Any, np.ndarray]],
    sharding: NamedSharding | None = None,
    plus: float = 0.0,
) -> jax.Array:
    """One array, filled part by part on the host; each device receives what it holds.

    Args:
        shape, dtype: of the result.
        parts: `(index, values)`: an index of the first axis and what belongs there, or `...` and
            the whole; asked for one at a time.
        sharding: which device holds what; None: the default device.
        plus: added to every value.
    """
    every = (tuple(slice(0, size) for size in shape),)
    if sharding is not None:
        every = sharding.addressable_devices_indices_map(shape).values()
    pieces = {}
    for index in every:
        bounds = _bounds(index, shape)
        pieces.setdefault(bounds, _room(tuple(stop - start for start, stop in bounds), dtype))
    for at, values in parts:
        for bounds, piece in pieces.items():
            cut = tuple(slice(*ends) for ends in bounds)
            if at is ...:
                np.copyto(piece, values[cut], casting="unsafe")
            elif bounds[0][0] <= at < bounds[0][1]:
                np.copyto(piece[at - bounds[0][0]], values[cut[1:]], casting="unsafe")
        del values  # before the next part is asked for
    for piece in pieces.values():
        if plus:
            piece += plus
    if sharding is None:
        return jax.device_put(*pieces.values())
    return jax.make_array_from_callback(shape, sharding, lambda at: pieces[_bounds(at, shape)])


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Slices as pairs of numbers, which can be looked up."""
    ends = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in ends)


def _room(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialized host memory that begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def save(path: str | Path, tensors: Mapping[str, Any], dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write `{name: array}` to one safetensors file; floating arrays are stored as `dtype`."""
    stored = {
        name: np.require(_as_float(np.asarray(tensor), dtype), requirements="C")
        for name, tensor in tensors.items()
    }
    save_file(stored, str(path), metadata={"format": "pt"})


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"smcscale: {path} does not exist. Expected a folder in the Hugging Face layout "
            "(config.json, model.safetensors, tokenizer.json)."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"smcscale: {path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 (the file is wrong, not the argument's type)
            f"smcscale: {path} holds a {type(value).__name__}, expected an object."
        )
    return value


def _as_float(tensor: np.ndarray, dtype: Any) -> np.ndarray:
    return tensor.astype(dtype) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor
