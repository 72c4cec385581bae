"""Weights on disk: shards, one tensor at a time, placement over devices, broken files."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from smcscale.models import parameters
from smcscale.models.parameters import INDEX, Checkpoint, Placement
from smcscale.models.reasoning import transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.transformer import Transformer

CONFIG = Config("Llama", 24, 16, 3, 4, 2, 4, 32, tied=False, end_tokens=(1,))
TENSORS = transformer.to_hf(Transformer(CONFIG, rngs=nnx.Rngs(0)))
TOKENS = jnp.arange(9)[None]


def logits(model):
    return model.logits(model(TOKENS))


def write_shards(folder, tensors=TENSORS, number=3):
    """Shards that cut layers apart, and their index."""
    names = sorted(tensors)
    files = {
        n: f"model-{i % number + 1:05d}-of-{number:05d}.safetensors" for i, n in enumerate(names)
    }
    for file in set(files.values()):
        held = {n: np.ascontiguousarray(tensors[n]) for n in names if files[n] == file}
        save_file(held, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def test_shards_give_the_same_network_as_one_file(tmp_path):
    write_shards(tmp_path)
    save_file(
        {"model.norm.weight": np.zeros(16, np.float32)}, tmp_path / "consolidated.safetensors"
    )
    again = transformer.from_hf(CONFIG, Checkpoint(tmp_path))
    expected = transformer.from_hf(CONFIG, TENSORS)
    np.testing.assert_array_equal(logits(again), logits(expected))
    assert Checkpoint(tmp_path).keys() == parameters.load(tmp_path).keys() == TENSORS.keys()


def test_a_folder_without_an_index_has_all_its_files(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert parameters.load(tmp_path).keys() == TENSORS.keys()


def test_what_is_read_has_the_type_asked_for(tmp_path):
    stored = {"a": np.arange(4, dtype=ml_dtypes.bfloat16), "n": np.arange(3)}
    save_file(stored, tmp_path / "x.safetensors")
    kinds = {dtype: Checkpoint(tmp_path / "x.safetensors", dtype) for dtype in (None, np.float32)}
    assert kinds[None]["a"].dtype == ml_dtypes.bfloat16
    assert kinds[np.float32]["a"].dtype == np.float32
    assert kinds[np.float32]["n"].dtype == stored["n"].dtype
    assert "b" not in kinds[None] and len(kinds[None]) == 2


class Counting(Mapping):
    """Fresh arrays on demand; knows how many of them live at most at once."""

    def __init__(self, tensors):
        self.tensors, self.alive, self.most = tensors, 0, 0

    def __getitem__(self, name):
        fresh = np.array(self.tensors[name])
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(fresh, self.gone)
        return fresh

    def gone(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_at_a_time_lives_beside_the_network(dtype):
    gc.collect()
    counting = Counting(TENSORS)
    transformer.from_hf(CONFIG, counting, dtype=jnp.dtype(dtype))
    assert (counting.most, counting.alive) == (1, 0)


def test_an_array_takes_over_the_memory_that_was_filled():
    whole = np.arange(32 * 48, dtype=np.float32).reshape(32, 48)
    rooms = []
    room = parameters._room

    def watched(*args):
        rooms.append(room(*args))
        return rooms[-1]

    parameters._room = watched
    try:
        array = parameters.assemble((32, 48), np.float32, enumerate(whole))
    finally:
        parameters._room = room
    np.testing.assert_array_equal(array, whole)
    if jax.default_backend() == "cpu":
        assert array.unsafe_buffer_pointer() == rooms[0].ctypes.data


PEAK = """
import resource, sys, threading, time
import jax, jax.numpy as jnp
from smcscale.models import parameters
from smcscale.models.reasoning import transformer
from smcscale.models.reasoning.architecture import Config

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

config = Config.from_hf(parameters.read_json(sys.argv[1] + "/config.json"))
jnp.zeros(3).block_until_ready()
before, most, over = resident(), 0, False
def watch():
    global most
    while not over:
        most = max(most, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
dtype = jnp.dtype(sys.argv[2])
model = transformer.from_hf(config, parameters.Checkpoint(sys.argv[1]), dtype=dtype)
jax.block_until_ready(model.embedding[...])
over = True
thread.join()
from flax import nnx
held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
print((most - before) / held)
"""


def peak(tmp_path, megabytes, dtype):
    """Peak of the memory that loading takes, over what the network takes then."""
    layers, hidden, mlp = 4, 512, 2048
    each = 2 * (4 * hidden * hidden + 3 * hidden * mlp)
    layers = max(4, megabytes * 2**20 // each)
    config = Config("Llama", 4096, hidden, layers, 8, 8, hidden // 8, mlp)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    rng, files = np.random.default_rng(0), {}
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    fake = {"model.embed_tokens.weight": (4096, hidden), "model.norm.weight": (hidden,)}
    for name, array in shapes.stacked().items():
        for layer in range(layers):
            fake[f"model.layers.{layer}.{transformer._HF_NAMES[name]}"] = array.shape[:0:-1]
    names, shard = list(fake), max(1, len(fake) // 8)
    for start in range(0, len(names), shard):
        file = f"model-{start:05d}.safetensors"
        held = {n: rng.standard_normal(fake[n], np.float32) for n in names[start : start + shard]}
        parameters.save(tmp_path / file, held)
        files |= dict.fromkeys(held, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_room_than_the_network(tmp_path, dtype):
    assert peak(tmp_path, 100, dtype) < 1.25


# ---- several devices


def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


@pytest.mark.multidevice
def test_each_device_holds_what_the_rules_say():
    placed = transformer.tensor_parallel(mesh())
    model = transformer.from_hf(CONFIG, TENSORS, sharding=placed)
    expected = transformer.from_hf(CONFIG, TENSORS)
    for name, axis in {"q": 2, "gate": 2, "o": 1, "down": 1}.items():
        mine, whole = model.stacked()[name], expected.stacked()[name]
        np.testing.assert_array_equal(mine, whole)
        wanted = list(whole.shape)
        wanted[axis] //= 4
        assert {s.data.shape for s in mine.addressable_shards} == {tuple(wanted)}
    assert model.norm[...].sharding.is_fully_replicated


def test_a_rule_that_does_not_fit_is_refused():
    one = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ValueError, match="'layers.q' .* cannot be laid over a mesh"):
        transformer.from_hf(
            CONFIG, TENSORS, sharding=Placement(one, ((".*q", PartitionSpec("x")),))
        )
    placed = transformer.from_hf(CONFIG, TENSORS, sharding=transformer.tensor_parallel(one))
    np.testing.assert_allclose(
        logits(placed), logits(transformer.from_hf(CONFIG, TENSORS)), atol=1e-6
    )


# ---- broken folders


def test_broken_shards_are_refused_by_name(tmp_path):
    files = write_shards(tmp_path)
    first, name = files["model.norm.weight"], "model.norm.weight"
    whole = (tmp_path / first).read_bytes()

    (tmp_path / first).write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {first}"):
        Checkpoint(tmp_path)
    (tmp_path / first).write_bytes(whole)
    for wrong in ({"other": first}, {name: first, "other": first}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match="has no tensor 'other'"):
            Checkpoint(tmp_path)
    for wrong in ({name: "../" + first}, {name: 3}, [name], None):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match="no `weight_map` from tensors to files"):
            Checkpoint(tmp_path)
