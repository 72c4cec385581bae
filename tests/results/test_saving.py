"""Saving and loading results."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from smcscale import saving
from smcscale.engine.store import Ancestry
from smcscale.result import get_samples


class Block(NamedTuple):
    tokens: jax.Array
    key: jax.Array


def test_round_trip(chain_result, tmp_path):
    run = chain_result(0, 3, 20, biases=["asymptotic: metropolis"])
    saving.save(run, tmp_path / "run.safetensors")
    back = saving.load(tmp_path / "run.safetensors")
    assert eqx.tree_equal(run, back)
    assert back.biases == run.biases and back.warnings == run.warnings
    assert isinstance(back.diagnostics.num_particles, np.ndarray)
    assert eqx.tree_equal(get_samples(run), get_samples(back))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"], "nothing else is left"


def test_last_store_ancestry_and_users_classes(chain_result, tmp_path):
    run = chain_result(0, 2, 6, store="last")
    keys = jax.random.split(jax.random.key(0), (2, 6))
    own = eqx.tree_at(lambda r: r.final, run, {"b": Block(jnp.zeros((2, 6, 3), jnp.int32), keys)})
    saving.save(own, tmp_path / "own")
    final = saving.load(tmp_path / "own").final
    assert final["b"]["tokens"].shape == (2, 6, 3)
    np.testing.assert_array_equal(jax.random.key_data(final["b"]["key"]), jax.random.key_data(keys))
    links = [np.zeros((2, 6), np.int32)]
    segments = [[np.arange(16.0).reshape(4, 2, 2)]]
    history = Ancestry(segments, links, jax.tree.structure({"x": 0}))
    old = eqx.tree_at(lambda r: r.history, run, history, is_leaf=lambda x: x is None)
    saving.save(old, tmp_path / "old")
    back = saving.load(tmp_path / "old").history
    everyone = jnp.tile(jnp.arange(6), (2, 1))
    np.testing.assert_array_equal(back.trace(everyone)["x"], history.trace(everyone)["x"])


def test_torn_foreign_and_missing_files(chain_result, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no file"):
        saving.load(path)
    saving.save(chain_result(0, 2, 6), path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no complete safetensors file"):
            saving.load(path)
    path.write_text("hello, this is a text")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        saving.load(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="no saved result"):
        saving.load(path)
    save_file({"a": np.zeros(3)}, path, metadata={"smcscale": '{"format": 99}'})
    with pytest.raises(ValueError, match="format 99"):
        saving.load(path)
    for tree in (
        '{"class": "Result", "fields": {}}',
        '{"class": "os"}',
        "{}",
        "[]",
        '{"list": []}',
    ):
        header = f'{{"format": 1, "tree": {tree}}}'
        save_file({"a": np.zeros(3)}, path, metadata={"smcscale": header})
        with pytest.raises(ValueError, match="damaged description|no result"):
            saving.load(path)


def test_what_cannot_be_saved(chain_result, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder"):
        saving.save(chain_result(0, 2, 6), tmp_path / "none" / "run")
    run = eqx.tree_at(lambda r: r.cost, chain_result(0, 2, 6), {"x": object()})
    with pytest.raises(TypeError, match=r"result\.cost\.x: a object"):
        saving.save(run, tmp_path / "run")
    assert not list(tmp_path.iterdir())
