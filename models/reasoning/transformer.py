"""A decoder-only transformer in the Qwen2 and Llama layouts: configuration, parameters, forward.

    config = Config.from_hf(json)                    config.json of a Hugging Face folder
    model = Transformer(config, rngs=nnx.Rngs(0))    Flax NNX; parameters of all layers stacked
    hidden = model(tokens)                           (B, S) -> (B, S, D)
    logits = model.logits(hidden)                    (B, S, V)

RMSNorm, rotary positions, grouped-query attention, SwiGLU; biases on q, k, v for Qwen2.  The
layers are stacked on a leading axis and looped over by `lax.scan`, which keeps compile times
short.  `queries_keys_values` and `after_attention` are the two halves of a layer; `cache.py` and
`decode.py` put cached attention between them.  Everything is computed in float32.

Source: Qwen2 (Yang et al. 2024) and Llama 3 (Grattafiori et al. 2024) as laid out in
`transformers` (`modeling_qwen2.py`, `modeling_llama.py`); held to them by parity tests.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

_ARCHITECTURES = {"Qwen2": True, "Llama": False}  # family -> bias on q, k, v


@dataclass(frozen=True)
class Config:
    """Shape of a transformer; hashable, so that it can be static under jit."""

    family: str
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, float, float, int] | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    max_length: int = 2048
    end_tokens: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "Config":
        """The configuration in a Hugging Face `config.json`.

        Raises:
            ValueError: for an architecture other than Qwen2 or Llama, a missing entry, or an
                option that this transformer does not have (sliding windows, other activations).
        """
        architecture = (raw.get("architectures") or [f"{raw.get('model_type')}"])[0]
        family = next(
            (f for f in _ARCHITECTURES if str(architecture).lower().startswith(f.lower())), None
        )
        if family is None:
            raise ValueError(
                f"smcscale: {where} describes a {architecture!r}; this transformer reads the "
                "Qwen2 and Llama layouts only."
            )
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            sizes = {
                "vocabulary_size": int(raw["vocab_size"]),
                "hidden_size": hidden,
                "num_layers": int(raw["num_hidden_layers"]),
                "num_heads": heads,
                "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
                "head_size": int(raw.get("head_dim") or hidden // heads),
                "mlp_size": int(raw["intermediate_size"]),
            }
        except KeyError as error:
            raise ValueError(f"smcscale: {where} has no entry {error}.") from error
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"smcscale: {where} asks for {raw['hidden_act']!r}; only silu is known."
            )
        if raw.get("use_sliding_window"):
            raise ValueError(
                f"smcscale: {where} asks for sliding windows, which are not supported."
            )
        if raw.get("mlp_bias") or (family == "Llama" and raw.get("attention_bias")):
            raise ValueError(f"smcscale: {where} asks for biases that the {family} layout lacks.")
        rope = raw.get("rope_parameters") or {}
        scaling = raw.get("rope_scaling") or rope
        ends = raw.get("eos_token_id")
        return cls(
            family=family,
            **sizes,
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rope_scaling=_rope_scaling(scaling, where),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            max_length=int(raw.get("max_position_embeddings", 2048)),
            end_tokens=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        )

    def to_hf(self, head: str = "ForCausalLM") -> dict[str, Any]:
        """The entries of `config.json` (without rope scaling, which no shipped model has)."""
        return {
            "architectures": [f"{self.family}{head}"],
            "model_type": self.family.lower(),
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.mlp_size,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_length,
            "eos_token_id": list(self.end_tokens),
            "torch_dtype": "bfloat16",
        }


def _rope_scaling(raw: Mapping[str, Any], where: str):
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"smcscale: {where} asks for rope scaling {kind!r}; only llama3 is known.")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(raw[name] for name in names)


def rope_frequencies(config: Config) -> np.ndarray:
    """`(head_size / 2,)` angle per position, llama3-scaled where the configuration says so."""
    size = config.head_size
    frequency = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * math.pi)  # full turns over the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    return frequency.astype(np.float32)


class Layers(nnx.Module):
    """Parameters of all layers, stacked: every array has a leading axis of `num_layers`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c, n = config, config.num_layers
        queries, keys = c.num_heads * c.head_size, c.num_kv_heads * c.head_size

        def matrix(rows: int, columns: int, scale: float = 1.0) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (n, rows, columns), jnp.float32)
            return nnx.Param(draw * (scale / math.sqrt(rows)))

        self.input_norm = nnx.Param(jnp.ones((n, c.hidden_size)))
        self.q = matrix(c.hidden_size, queries)
        self.k = matrix(c.hidden_size, keys)
        self.v = matrix(c.hidden_size, keys)
        if _ARCHITECTURES[c.family]:
            self.q_bias = nnx.Param(jnp.zeros((n, queries)))
            self.k_bias = nnx.Param(jnp.zeros((n, keys)))
            self.v_bias = nnx.Param(jnp.zeros((n, keys)))
        residual = 1.0 / math.sqrt(2 * n)
        self.o = matrix(queries, c.hidden_size, residual)
        self.mlp_norm = nnx.Param(jnp.ones((n, c.hidden_size)))
        self.gate = matrix(c.hidden_size, c.mlp_size)
        self.up = matrix(c.hidden_size, c.mlp_size)
        self.down = matrix(c.mlp_size, c.hidden_size, residual)


class Transformer(nnx.Module):
    """The decoder: token ids to hidden states to logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocabulary_size, config.hidden_size)
        self.embedding = nnx.Param(0.05 * jax.random.normal(rngs.params(), shape))
        self.layers = Layers(config, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(config.hidden_size))
        if not config.tied:
            self.head = nnx.Param(0.05 * jax.random.normal(rngs.params(), shape))

    def __call__(self, tokens: jax.Array, *, keys_values: bool = False, unroll: int = 1) -> Any:
        """Hidden states of token ids under causal attention.

        Args:
            tokens: `(B, S)` int32; padding belongs at the end, where nothing attends to it.
            keys_values: also return the keys and values of every layer.
            unroll: how many layers to unroll in the loop (training is faster unrolled).
        Returns:
            hidden `(B, S, D)`; with `keys_values` also `(k, v)`, each `(L, B, S, kv, head)`.
        """
        config = self.config
        positions = jnp.arange(tokens.shape[1])
        rotation = rotations(config, positions)
        causal = positions[:, None] >= positions[None, :]

        def layer(hidden, weights):
            q, k, v = queries_keys_values(config, weights, hidden, rotation)
            attended = _causal_attention(q, k, v, causal)
            hidden = after_attention(config, weights, hidden, attended)
            return hidden, (k, v) if keys_values else None

        hidden = jnp.take(self.embedding[...], tokens, axis=0)
        hidden, cached = jax.lax.scan(layer, hidden, self.stacked(), unroll=unroll)
        hidden = rms_norm(hidden, self.norm[...], config.norm_eps)
        return (hidden, cached) if keys_values else hidden

    def stacked(self) -> dict[str, Any]:
        """The layers' parameters as a dictionary of arrays `(L, ...)`, ready for `lax.scan`.

        Shapes only, where the model itself is one of shapes (`nnx.eval_shape`).
        """
        return nnx.to_pure_dict(nnx.state(self.layers))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`(..., D)` hidden states to `(..., V)` logits."""
        return hidden @ (self.embedding if self.config.tied else self.head)[...].T


def _causal_attention(q, k, v, causal):
    """Attended values `(B, S, kv, r, head)`; batched matrix products without odd layouts."""
    batch, length, groups, repeats, size = q.shape
    rows = (batch, groups, repeats * length, size)  # the queries that share keys, stacked
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows) / math.sqrt(size)
    scores = (q @ k.transpose(0, 2, 3, 1)).reshape(batch, groups, repeats, length, length)
    share = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    share = share.reshape(batch, groups, repeats * length, length)
    attended = (share @ v.transpose(0, 2, 1, 3)).reshape(batch, groups, repeats, length, size)
    return attended.transpose(0, 3, 1, 2, 4)


def rotations(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `(..., head / 2)` of the rotary angles at integer `positions`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def queries_keys_values(config: Config, weights, hidden, rotation):
    """First half of a layer, for hidden states `(..., D)`.

    Args:
        weights: one layer's parameters.
        rotation: `rotations(config, positions)`, broadcastable to `(..., head / 2)`.
    Returns:
        q `(..., kv, heads / kv, head)`, k and v `(..., kv, head)`; q and k rotated.
    """
    x = rms_norm(hidden, weights["input_norm"], config.norm_eps)
    q, k, v = (x @ weights[name] for name in "qkv")
    if "q_bias" in weights:
        q, k, v = q + weights["q_bias"], k + weights["k_bias"], v + weights["v_bias"]
    groups, size = config.num_kv_heads, config.head_size
    q = q.reshape(*q.shape[:-1], groups, config.num_heads // groups, size)
    k, v = (x.reshape(*x.shape[:-1], groups, size) for x in (k, v))
    cos, sin = rotation
    return (
        _rotate(q, cos[..., None, None, :], sin[..., None, None, :]),
        _rotate(k, cos[..., None, :], sin[..., None, :]),
        v,
    )


def _rotate(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def after_attention(config: Config, weights, hidden, attended):
    """Second half of a layer: output projection, then the gated MLP, both residual.

    Args:
        attended: `(..., kv, heads / kv, head)`.
    Returns:
        hidden `(..., D)`.
    """
    flat = attended.reshape(*attended.shape[:-3], config.num_heads * config.head_size)
    hidden = hidden + flat @ weights["o"]
    x = rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
    return hidden + (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


_HF_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def to_hf(model: Transformer) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names, matrices `(out, in)`."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(model.embedding[...]),
        "model.norm.weight": np.asarray(model.norm[...]),
    }
    for name, stacked in model.stacked().items():
        for index, array in enumerate(np.asarray(stacked)):
            tensors[f"model.layers.{index}.{_HF_NAMES[name]}"] = array.T  # 1-d: unchanged
    if not model.config.tied:
        tensors["lm_head.weight"] = np.asarray(model.head[...])
    return tensors


def from_hf(
    config: Config, tensors: Mapping[str, np.ndarray], where: str = "weights"
) -> Transformer:
    """A transformer from parameters under their Hugging Face names.

    Raises:
        ValueError: a tensor is missing or has another shape than the configuration says.
    """

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = tensors.get(name)
        if found is None:
            raise ValueError(
                f"smcscale: {where} has no tensor {name!r}, which config.json implies."
            )
        if found.shape != shape:
            raise ValueError(
                f"smcscale: {where}: {name!r} has shape {found.shape}, config.json implies {shape}."
            )
        return found

    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    wide = (config.vocabulary_size, config.hidden_size)
    model.embedding = nnx.Param(jnp.asarray(tensor("model.embed_tokens.weight", wide)))
    model.norm = nnx.Param(jnp.asarray(tensor("model.norm.weight", (config.hidden_size,))))
    for name, stacked in model.stacked().items():
        rows = [
            tensor(f"model.layers.{i}.{_HF_NAMES[name]}", stacked.shape[:0:-1]).T
            for i in range(config.num_layers)
        ]
        setattr(model.layers, name, nnx.Param(jnp.asarray(np.stack(rows))))
    if not config.tied:
        model.head = nnx.Param(jnp.asarray(tensor("lm_head.weight", wide)))
    return model
