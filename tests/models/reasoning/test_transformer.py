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
from smcscale.models.reasoning.architecture import FAMILIES, Config, Rope, rope_frequencies
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.solve import shipped
from smcscale.models.reasoning.transformer import Transformer
from support.reasoning import families

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
    one = jnp.ones(1, jnp.int32)
    graph, weights = nnx.split(model)

    @jax.jit
    def read(weights, suffix, length, token):
        model = nnx.merge(graph, weights)
        hidden, suffix = cache.extend(
            model, prompt, prompt_length * one, suffix, length[None], token[None, None], one
        )
        return model.logits(hidden[0, 0]), suffix

    out = []
    for index, token in enumerate(tokens[prompt_length:]):
        logits, suffix = read(weights, suffix, jnp.asarray(index), jnp.asarray(token))
        out.append(logits)
    return np.asarray(jnp.stack(out))


def ragged_logits(model, rows, lengths, number):
    """Logits after each of the `number` tokens behind prompts of several lengths, in one batch.

    One token at a time through the cache; `(B, number, V)`.
    """
    batch, lengths = len(lengths), np.asarray(lengths)
    padded, places = np.zeros((batch, 32), np.int32), np.arange(rows.shape[1])
    padded[:, : rows.shape[1]] = np.where(places < lengths[:, None], rows, 0)
    prompt = cache.read_batch(model, jnp.asarray(padded))
    one = cache.empty(model.config, number, model.embedding[...].dtype)
    suffix = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), one)
    graph, weights = nnx.split(model)

    @jax.jit
    def read(weights, suffix, length, tokens):
        model, ones = nnx.merge(graph, weights), jnp.ones(batch, jnp.int32)
        hidden, suffix = cache.extend(
            model, prompt, jnp.asarray(lengths), suffix, length * ones, tokens[:, None], ones
        )
        return model.logits(hidden[:, 0]), suffix

    out = []
    for index in range(number):
        tokens = jnp.asarray(rows[np.arange(batch), lengths + index])
        logits, suffix = read(weights, suffix, jnp.asarray(index), tokens)
        out.append(logits)
    return np.asarray(jnp.stack(out, axis=1))


@pytest.mark.parametrize("case", [*range(10), "shipped"])
def test_logits_equal_stored_logits_of_transformers(case):
    model, tokens, expected = shipped_reference() if case == "shipped" else reference(case)
    full = model.logits(model(jnp.asarray(tokens)[None])[0])
    np.testing.assert_allclose(full, expected, atol=TOLERANCE)
    np.testing.assert_allclose(cached_logits(model, tokens), expected[5:], atol=TOLERANCE)


@pytest.mark.parametrize(
    "index", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3, 4))]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, index):
    """Full pass, tokens one by one through the cache, and decoding, with ragged prompts."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    raw = families.configuration(family, index)
    theirs = families.random_model(raw, 100 + index)
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    ours = transformer.from_hf(Config.from_hf(raw), tensors)
    lengths, number = (3, 11, 20), 9  # shorter and longer than the windows
    tokens = torch.randint(3, raw["vocab_size"], (3, 30))
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    rows = tokens.numpy()
    full = ours.logits(ours(jnp.asarray(rows)))
    np.testing.assert_allclose(full, expected, atol=TOLERANCE)
    found = ragged_logits(ours, rows, lengths, number)
    for row, length in enumerate(lengths):
        wanted = expected[row, length : length + number]
        np.testing.assert_allclose(found[row], wanted, atol=TOLERANCE)
    assert transformer.to_hf(ours).keys() <= tensors.keys()
    for name, tensor in transformer.to_hf(ours).items():
        np.testing.assert_allclose(tensor, tensors[name], atol=1e-6)

    # what is written in one loop has the probability that a full pass gives it
    never = np.zeros(raw["vocab_size"], bool)
    lm = LanguageModel(ours, None, never, step_tokens=number, max_tokens=number)
    prompts = [rows[row, :length] for row, length in enumerate(lengths)]
    starts = jax.tree.map(lambda *x: jnp.stack(x), *[lm.start(prompt) for prompt in prompts])
    keys = jax.random.split(jax.random.key(0), len(prompts))
    written = jax.vmap(lambda key, state: lm.next_step(state).sample(key))(keys, starts).written
    for row, prompt in enumerate(prompts):
        mine = np.asarray(written.tokens[row, : written.length[row]])
        text = torch.as_tensor(np.concatenate([prompt, mine]))
        with torch.no_grad():
            told = theirs(text[None]).logits[0].log_softmax(-1).numpy()
        exact = told[np.arange(len(prompt) - 1, len(text) - 1), mine].sum()
        np.testing.assert_allclose(written.log_prob[row], exact, atol=len(mine) * TOLERANCE)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if f != "Gemma3" else []) for f in FAMILIES]
)
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(family):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    raw = families.configuration(family, 2)
    theirs = families.random_model(raw, 7).to(torch.bfloat16)
    tensors = {k: v.detach().float().numpy() for k, v in theirs.state_dict().items()}
    ours = transformer.from_hf(Config.from_hf(raw), tensors, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in ours.stacked().values()} == {"bfloat16", "float32"}
    tokens = torch.randint(3, raw["vocab_size"], (8, 30))
    with torch.no_grad():
        rounded = theirs(tokens).logits.float().numpy()
        exact = theirs.float()(tokens).logits.numpy()
    error = lambda x, at=slice(None): float(np.sqrt(np.mean((x - exact[:, at]) ** 2)))
    full = ours.logits(ours(jnp.asarray(tokens.numpy())))
    assert full.dtype == jnp.float32
    found = ragged_logits(ours, tokens.numpy(), (9,) * 8, 9)
    assert error(rounded) > 1e-3  # there is rounding to be seen
    assert error(np.asarray(full)) < 1.2 * error(rounded)
    assert error(found, slice(9, 18)) < 1.2 * error(rounded[:, 9:18], slice(9, 18))


@pytest.mark.multidevice
def test_a_network_over_several_devices_gives_the_same_logits_and_texts():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    config = Config("Llama", 64, 32, 3, 8, 8, 4, 64, tied=False, end_tokens=(1,))
    tensors = transformer.to_hf(Transformer(config, rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((8,), ("model",))
    never, options = np.zeros(64, bool), {"step_tokens": 6, "max_tokens": 12}
    texts, logits = [], []
    for sharding in (None, transformer.tensor_parallel(mesh)):
        model = transformer.from_hf(config, tensors, sharding=sharding)
        lm = LanguageModel(model, None, never, **options)
        logits.append(lm.logits(np.arange(20)))
        lm = lm.given(np.arange(7))
        states = jax.tree.map(lambda x: jnp.stack([x] * 5), lm.start())
        step = jax.jit(
            lambda lm, s: jax.vmap(lambda s: lm.next_step(s).sample(jax.random.key(0)))(s)
        )
        texts.append(step(lm, step(lm, states)).written)
    assert len(model.layers.q[...].sharding.device_set) == 8
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    np.testing.assert_array_equal(texts[0].tokens, texts[1].tokens)
    np.testing.assert_allclose(texts[0].log_prob, texts[1].log_prob, atol=1e-4)


def test_a_folder_is_read_in_bfloat16():
    lm = LanguageModel.from_pretrained(shipped("reasoner"), dtype="bfloat16")
    full = LanguageModel.from_pretrained(shipped("reasoner"))
    assert lm.model.embedding[...].dtype == lm.start([5]).written.cache.keys.dtype == jnp.bfloat16
    wanted, found = full.logits(np.arange(30)), lm.logits(np.arange(30))
    assert 0 < np.sqrt(np.mean((wanted - found) ** 2)) < 0.02 * np.std(wanted)
    state = lm.next_step(lm.start(np.arange(5, 20))).sample(jax.random.key(0))
    assert state.written.cache.keys.dtype == jnp.bfloat16 and np.isfinite(state.written.log_prob)
    with pytest.raises(ValueError, match='dtype must be "float32" or "bfloat16", got \'int8\''):
        LanguageModel.from_pretrained(shipped("reasoner"), dtype="int8")


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
    plain = rope_frequencies(Rope(500_000.0), 64)
    scaled = rope_frequencies(Rope(500_000.0, 8.0, (1.0, 4.0, 8192)), 64)
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


QWEN2 = Config("Qwen2", 11, 8, 1, 2, 1, 4, 12).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "Gemma3 layouts only"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "describes a 'Qwen2Moe"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "describes a 'Gemma3ForCond"),
        ({"hidden_act": "gelu"}, "has silu only"),
        ({"use_bidirectional_attention": True}, "looks ahead"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only linear and llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no entry 'factor'"),
        ({"quantization_config": {"bits": 8}}, "quantised weights"),
        (
            {"use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "only full_attention and sliding_attention",
        ),
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


def test_what_a_gemma_file_leaves_out():
    """As `transformers` fills it in: the defaults of the class."""
    raw = families.configuration("Gemma3", 0)
    for name in ("sliding_window", "query_pre_attn_scalar", "rope_local_base_freq", "rope_theta"):
        del raw[name]
    config = Config.from_hf(raw)
    assert (config.rope.theta, config.local_rope) == (1_000_000.0, Rope(10_000.0))
    assert (config.windows, config.scale) == ((4096, 0), 256**-0.5)
    nested = raw | {"rope_parameters": {"full_attention": {}, "sliding_attention": None}}
    assert Config.from_hf(nested | {"rope_theta": 5.0}).rope == Rope(5.0)
    raw = families.configuration("Gemma2", 0)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        del raw[name]
    config = Config.from_hf(raw)
    assert (config.attention_cap, config.logit_cap) == (50.0, 30.0)
    assert Config.from_hf(raw | {"attn_logit_softcapping": None}).attention_cap == 0


def test_generation_config_adds_end_tokens(tmp_path):
    source = shipped("reasoner")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ends = LanguageModel.from_pretrained(source).config.end_tokens
    for more, expected in ((5, (*ends, 5)), ([ends[0], 7], (*ends, 7)), (None, ends)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
        assert LanguageModel.from_pretrained(tmp_path).config.end_tokens == expected


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
