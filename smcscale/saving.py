"""A result on disk: one safetensors file, arrays as tensors and the structure as JSON in its header.

No pickle: loading runs no code from the file. Programs are not saved. Particle states that are
objects of the user's own classes come back as dictionaries of their fields.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smcscale.engine.store import Ancestry, Paths
from smcscale.result import Diagnostics, Initial, Moments, Result

_FORMAT = 1
_CLASSES = {c.__name__: c for c in (Result, Moments, Diagnostics, Initial, Paths, Ancestry)}


def save(result: Result, path: str | Path) -> None:
    """Write a result to one file, complete or not at all.

    Args:
        result: of a run.
        path: of the file; an existing one is replaced.
    Raises:
        FileNotFoundError: when the folder does not exist.
        TypeError: for a particle state that holds something else than arrays.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"smcscale: the folder {path.absolute().parent} does not exist.")
    tensors: dict[str, np.ndarray] = {}
    tree = _describe(result, tensors, "result")
    header = {"smcscale": json.dumps({"format": _FORMAT, "tree": tree})}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, str(unfinished), metadata=header)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | Path) -> Result:
    """Read a result that `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut short, or no result of smcscale, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"smcscale: there is no file {path}.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = (file.metadata() or {}).get("smcscale")
            if header is None:
                raise ValueError(
                    f"smcscale: {path} is a safetensors file, but no saved result.\n"
                    "  try: a file written by SMC.save."
                )
            described = json.loads(header)
            if described.get("format") != _FORMAT:
                raise ValueError(
                    f"smcscale: {path} has format {described.get('format')}, this version reads "
                    f"{_FORMAT}.\n  try: the version of smcscale that wrote it."
                )
            if described["tree"].get("class") != "Result":
                raise ValueError(f"smcscale: {path} holds no result.")
            return _rebuild(described["tree"], file.get_tensor)
    except SafetensorError as error:
        raise ValueError(
            f"smcscale: {path} is no complete safetensors file ({error}).\n"
            "  try: save it again; a copy may have been cut short."
        ) from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"smcscale: {path} holds a damaged description ({error}).") from error


def _describe(value: Any, tensors: dict[str, np.ndarray], name: str) -> Any:
    """The JSON form of a value; its arrays go into `tensors` under `name`."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            tensors[name] = np.array(jax.random.key_data(value), order="C")
            return {"key": name, "kind": str(jax.random.key_impl(value))}
        tensors[name] = np.array(value, order="C")
        return {"jax" if isinstance(value, jax.Array) else "numpy": name}
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"smcscale: cannot save {name}: a dictionary with keys other than str.")
        return {"dict": {k: _describe(v, tensors, f"{name}.{k}") for k, v in value.items()}}
    if isinstance(value, Ancestry):
        leaves = range(value.structure.num_leaves)
        example = jax.tree.unflatten(value.structure, leaves)
        fields = {"segments": value.segments, "links": value.links, "structure": example}
        return {"class": "Ancestry", "fields": _describe(fields, tensors, name)["dict"]}
    ours = _CLASSES.get(type(value).__name__) is type(value)
    names = getattr(value, "_fields", ())
    if ours and not names:
        names = [field.name for field in dataclasses.fields(value)]
    if names:
        described = {k: _describe(getattr(value, k), tensors, f"{name}.{k}") for k in names}
        return {"class": type(value).__name__, "fields": described} if ours else {"dict": described}
    if isinstance(value, tuple | list):
        items = [_describe(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
        return {type(value).__name__: items}
    paths, _ = jax.tree_util.tree_flatten_with_path(value)
    if paths and paths[0][0]:  # a pytree class of the user's: its leaves by name
        named = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}
        return _describe(named, tensors, name)
    raise TypeError(f"smcscale: cannot save {name}: a {type(value).__name__} is no array.")


def _rebuild(tree: dict, get: Callable[[str], np.ndarray]) -> Any:
    """The value of a JSON form."""
    if "value" in tree:
        return tree["value"]
    if "jax" in tree:
        return jnp.asarray(get(tree["jax"]))
    if "numpy" in tree:
        return get(tree["numpy"])
    if "key" in tree:
        return jax.random.wrap_key_data(jnp.asarray(get(tree["key"])), impl=tree["kind"])
    if "dict" in tree:
        return {k: _rebuild(v, get) for k, v in tree["dict"].items()}
    if "list" in tree:
        return [_rebuild(v, get) for v in tree["list"]]
    if "tuple" in tree:
        return tuple(_rebuild(v, get) for v in tree["tuple"])
    fields = {k: _rebuild(v, get) for k, v in tree["fields"].items()}
    if tree["class"] == "Ancestry":
        fields["structure"] = jax.tree.structure(fields["structure"])
    return _CLASSES[tree["class"]](**fields)
