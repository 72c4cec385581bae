"""The transformer equals `transformers`: live where torch is installed, else by stored logits."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from smcscale.models import parameters
from smcscale.models.reasoning import cache, transformer
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.solve import shipped
from smcscale.models.reasoning.transformer import Config, Transformer

HERE = Path(__file__).parent
TOLERANCE = 1e-4


def reference(index):
    raw = json.loads((HERE / "references.json").read_text())[index]
    tensors = load_file(HERE / "references.safetensors")
    mine = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{index}/")}
    tokens, logits = mine.pop("tokens"), mine.pop("logits")
    return transformer.from_hf(Config.from_hf(raw), mine), tokens, logits


def shipped_reference():
    tensors = load_file(HERE / "references.safetensors")
    lm = LanguageModel.from_pretrained(shipped("reasoner"))
    return lm.model, tensors["shipped/tokens"], tensors["shipped/logits"]


def cached_logits(model, tokens, prompt_length=5):
    """Logits after every token beyond the prompt, one token at a time through the cache."""
    padded = jnp.zeros(32, jnp.int32).at[:prompt_length].set(tokens[:prompt_length])
    prompt = jax.tree.map(lambda x: x[:, None], cache.read(model, padded))
    suffix = jax.tree.map(lambda x: x[None], cache.empty(model.config, 40))
    out = []
    one = jnp.ones(1, jnp.int32)
    for index, token in enumerate(tokens[prompt_length:]):
        length = jnp.full(1, index, jnp.int32)
        hidden, suffix = cache.extend(
            model, prompt, prompt_length * one, suffix, length, jnp.full((1, 1), token), one
        )
        out.append(model.logits(hidden[0, 0]))
    return np.asarray(jnp.stack(out))


@pytest.mark.parametrize("case", [*range(5), "shipped"])
def test_logits_equal_stored_logits_of_transformers(case):
    model, tokens, expected = shipped_reference() if case == "shipped" else reference(case)
    full = model.logits(model(jnp.asarray(tokens)[None])[0])
    np.testing.assert_allclose(full, expected, atol=TOLERANCE)
    np.testing.assert_allclose(cached_logits(model, tokens), expected[5:], atol=TOLERANCE)


@pytest.mark.parametrize("index", range(5))
def test_logits_equal_transformers(index):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = json.loads((HERE / "references.json").read_text())[index]
    torch.manual_seed(100 + index)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**raw)).float().eval()
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    ours = transformer.from_hf(Config.from_hf(raw), tensors)
    tokens = torch.randint(0, raw["vocab_size"], (1, 30))
    with torch.no_grad():
        expected = theirs(tokens).logits[0].numpy()
    full = ours.logits(ours(jnp.asarray(tokens.numpy()))[0])
    np.testing.assert_allclose(full, expected, atol=TOLERANCE)


def test_a_written_folder_reads_back(tmp_path):
    config = Config("Llama", 11, 8, 2, 2, 1, 4, 12, tied=False, end_tokens=(1,))
    model = Transformer(config, rngs=nnx.Rngs(3))
    parameters.save(tmp_path / "model.safetensors", transformer.to_hf(model), np.float32)
    again = transformer.from_hf(config, parameters.load(tmp_path))
    tokens = jnp.arange(7)[None]
    np.testing.assert_array_equal(model.logits(model(tokens)), again.logits(again(tokens)))
    assert Config.from_hf(config.to_hf()) == Config(
        "Llama", 11, 8, 2, 2, 1, 4, 12, tied=False, end_tokens=(1,)
    )


def test_llama3_rope_scaling_keeps_fast_and_slows_slow_angles():
    config = Config("Llama", 11, 64, 1, 1, 1, 64, 8, 500_000.0, (8.0, 1.0, 4.0, 8192))
    plain = transformer.rope_frequencies(Config("Llama", 11, 64, 1, 1, 1, 64, 8, 500_000.0))
    scaled = transformer.rope_frequencies(config)
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


QWEN2 = Config("Qwen2", 11, 8, 1, 2, 1, 4, 12).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "Qwen2 and Llama layouts only"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only llama3"),
        ({"vocab_size": None}, None),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(change, message):
    raw = QWEN2 | change
    if message is None:
        del raw["vocab_size"]
        message = "no entry 'vocab_size'"
    with pytest.raises(ValueError, match=message):
        Config.from_hf(raw)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    config = Config.from_hf(QWEN2)
    tensors = transformer.to_hf(Transformer(config, rngs=nnx.Rngs(0)))
    missing = {k: v for k, v in tensors.items() if not k.endswith("up_proj.weight")}
    with pytest.raises(ValueError, match="no tensor 'model.layers.0.mlp.up_proj.weight'"):
        transformer.from_hf(config, missing)
    wrong = tensors | {"model.norm.weight": np.ones(9, np.float32)}
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(9,\)"):
        transformer.from_hf(config, wrong)


def test_a_folder_that_is_broken_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        LanguageModel.from_pretrained(tmp_path)
    tensors = transformer.to_hf(Transformer(Config.from_hf(QWEN2), rngs=nnx.Rngs(0)))
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        LanguageModel.from_pretrained(tmp_path)
