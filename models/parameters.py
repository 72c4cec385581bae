"""Network parameters on disk: safetensors files and the JSON beside them, without pickle.

`load(path) -> {name: array}` and `save(path, {name: array})`; names and layouts are the
network's business (`models/reasoning/transformer.py` maps Hugging Face names to its own).
`read_json` reads the configuration beside a file.  Every error names the file and the cure.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def load(path: str | Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, or of every shard in a folder, converted to `dtype`.

    Args:
        path: a `.safetensors` file, or a folder that holds one or more of them.
        dtype: the floating type of the result; integer tensors keep theirs.
    Returns:
        `{name: array}` in the names of the file.
    Raises:
        FileNotFoundError: no such file, or a folder without `.safetensors` files.
        ValueError: the file is not a safetensors file, or was cut short.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"smcscale: no safetensors weights at {path}. Expected a `.safetensors` file or a "
            "folder in the Hugging Face layout (config.json, model.safetensors, tokenizer.json)."
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            tensors |= load_file(str(file))
        except SafetensorError as error:
            raise ValueError(
                f"smcscale: {file} is not a complete safetensors file ({error}). "
                "Download or write it again."
            ) from error
    return {name: _as_float(tensor, dtype) for name, tensor in tensors.items()}


def save(path: str | Path, tensors: Mapping[str, Any], dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write `{name: array}` to one safetensors file; floating arrays are stored as `dtype`."""
    stored = {
        name: np.ascontiguousarray(_as_float(np.asarray(tensor), dtype))
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
