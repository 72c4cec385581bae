"""A decoder-only transformer in the Llama, Mistral, Qwen and Gemma layouts.

    config = Config.from_hf(json)                    `architecture.py`
    model = Transformer(config, rngs=nnx.Rngs(0))    Flax NNX; parameters of all layers stacked
    hidden = model(tokens)                           (B, S) -> (B, S, D)
    logits = model.logits(hidden)                    (B, S, V)

RMSNorm, rotary positions, grouped-query attention, a gated MLP; what else a layout has is in
`architecture.FAMILIES`.  The layers are stacked on a leading axis and looped over by `lax.scan`,
which keeps compile times short; what differs between them goes along as `kinds(config)`.
`queries_keys_values` and `after_attention` are the two halves of a layer; `cache.py` and `decode.py`
put cached attention between them.

Hidden states have the dtype of the weights, float32 or bfloat16; norms, rotations, softmax and
logits are computed in float32, and weights of norms stay float32.  `from_hf` reads tensor by tensor
into the place of each; `tensor_parallel(mesh)` says how to lay the parameters over several devices.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from smcscale.models import parameters
from smcscale.models.parameters import Placement
from smcscale.models.reasoning.architecture import Config, rope_frequencies


class Kind(NamedTuple):
    """What sets a layer apart; of all layers, with a leading axis, for `lax.scan`.

    Attributes:
        window: positions it sees back, its own counted; None when every layer sees all.
        local: 1 where its rotary positions are the local ones; None when all have the same.
    """

    window: Int[Array, "..."] | None
    local: Int[Array, "..."] | None


def kinds(config: Config) -> Kind:
    """The kinds of all layers `(L,)`."""
    windows = np.asarray(config.windows or (0,) * config.num_layers, np.int32)
    some = windows > 0
    far = np.where(some, windows, np.iinfo(np.int32).max)
    return Kind(
        jnp.asarray(far) if some.any() else None,
        jnp.asarray(some, jnp.int32) if config.local_rope is not None else None,
    )


def near(kind: Kind, queries: Int[Array, "... S"], keys: Int[Array, "... K"]) -> Any:
    """Whether a query position may look back to a key position `(..., S, K)`; True if all may."""
    if kind.window is None:
        return True
    return queries[..., :, None] - keys[..., None, :] < kind.window


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
        if c.layout.biases:
            self.q_bias = nnx.Param(jnp.zeros((n, queries)))
            self.k_bias = nnx.Param(jnp.zeros((n, keys)))
            self.v_bias = nnx.Param(jnp.zeros((n, keys)))
        residual = 1.0 / math.sqrt(2 * n)
        self.o = matrix(queries, c.hidden_size, residual)
        if c.layout.head_norms:
            self.q_norm = nnx.Param(jnp.ones((n, c.head_size)))
            self.k_norm = nnx.Param(jnp.ones((n, c.head_size)))
        if c.layout.gemma:
            self.attended_norm = nnx.Param(jnp.ones((n, c.hidden_size)))
            self.out_norm = nnx.Param(jnp.ones((n, c.hidden_size)))
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

        def layer(hidden, xs):
            weights, kind = xs
            q, k, v = queries_keys_values(config, weights, hidden, turned(rotation, kind))
            seen = causal & near(kind, positions, positions)
            attended = _causal_attention(config, q, k, v, seen)
            hidden = after_attention(config, weights, hidden, attended)
            return hidden, (k, v) if keys_values else None

        hidden = self.embed(tokens)
        xs = (self.stacked(), kinds(config))
        hidden, cached = jax.lax.scan(layer, hidden, xs, unroll=unroll)
        hidden = rms_norm(hidden, self.norm[...], config.norm_eps)
        return (hidden, cached) if keys_values else hidden

    def stacked(self) -> dict[str, Any]:
        """The layers' parameters as a dictionary of arrays `(L, ...)`, ready for `lax.scan`.

        Shapes only, where the model itself is one of shapes (`nnx.eval_shape`).
        """
        return nnx.to_pure_dict(nnx.state(self.layers))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids `(...)` to the hidden states `(..., D)` that enter the first layer."""
        hidden = jnp.take(self.embedding[...], tokens, axis=0)
        return hidden * math.sqrt(self.config.hidden_size) if self.config.layout.gemma else hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`(..., D)` hidden states to `(..., V)` logits, float32."""
        head = (self.embedding if self.config.tied else self.head)[...]
        logits = jnp.matmul(hidden, head.T, preferred_element_type=wide(hidden.dtype))
        return capped(logits, self.config.logit_cap)


def capped(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`; with cap 0 `x` as it is."""
    return cap * jnp.tanh(x / cap) if cap else x


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: float32, or a wider one."""
    return jnp.promote_types(dtype, jnp.float32)


def _causal_attention(config, q, k, v, causal):
    """Attended values `(B, S, kv, r, head)`; batched matrix products without odd layouts."""
    batch, length, groups, repeats, size = q.shape
    dtype = q.dtype
    rows = (batch, groups, repeats * length, size)  # the queries that share keys, stacked
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows) * config.scale
    scores = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=wide(dtype))
    scores = scores.reshape(batch, groups, repeats, length, length)
    scores = capped(scores, config.attention_cap)
    share = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    share = share.reshape(batch, groups, repeats * length, length).astype(dtype)
    attended = (share @ v.transpose(0, 2, 1, 3)).reshape(batch, groups, repeats, length, size)
    return attended.transpose(0, 3, 1, 2, 4)


def rotations(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles at integer `positions (...)`.

    Both `(..., head / 2)`, or `(2, ..., head / 2)`, then local, where the layers differ: see `turned`.
    """
    ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
    places = positions[..., None].astype(jnp.float32)
    angles = jnp.stack([places * rope_frequencies(rope, config.head_size) for rope in ropes])
    angles = angles[0] if config.local_rope is None else angles
    return jnp.cos(angles), jnp.sin(angles)


def turned(rotation: tuple[jax.Array, jax.Array], kind: Kind) -> tuple[jax.Array, jax.Array]:
    """The part of `rotations` that a layer uses, each `(..., head / 2)`."""
    if kind.local is None:
        return rotation
    return rotation[0][kind.local], rotation[1][kind.local]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis."""
    dtype, x = x.dtype, x.astype(wide(x.dtype))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return x.astype(dtype)


def queries_keys_values(config: Config, weights, hidden, rotation):
    """First half of a layer, for hidden states `(..., D)`.

    Args:
        weights: one layer's parameters.
        rotation: cosine and sine, broadcastable to `(..., head / 2)`; see `turned`.
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
    if "q_norm" in weights:
        q = rms_norm(q, weights["q_norm"], config.norm_eps)
        k = rms_norm(k, weights["k_norm"], config.norm_eps)
    cos, sin = rotation
    return (
        _rotate(q, cos[..., None, None, :], sin[..., None, None, :]),
        _rotate(k, cos[..., None, :], sin[..., None, :]),
        v,
    )


def _rotate(x, cos, sin):
    first, second = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def after_attention(config: Config, weights, hidden, attended):
    """Second half of a layer: output projection, then the gated MLP, both residual.

    Args:
        attended: `(..., kv, heads / kv, head)`.
    Returns:
        hidden `(..., D)`.
    """
    flat = attended.reshape(*attended.shape[:-3], config.num_heads * config.head_size)
    hidden = hidden + _normed(config, weights, "attended_norm", flat @ weights["o"])
    x = rms_norm(hidden, weights["mlp_norm"], config.norm_eps)
    activation = jax.nn.gelu if config.layout.gemma else jax.nn.silu
    out = (activation(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]
    return hidden + _normed(config, weights, "out_norm", out)


def _normed(config: Config, weights, name: str, x):
    return rms_norm(x, weights[name], config.norm_eps) if name in weights else x


_HF_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_GEMMA_NAMES = _HF_NAMES | {
    "attended_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "out_norm": "post_feedforward_layernorm.weight",
}


def _stored_names(config: Config) -> dict[str, str]:
    return _GEMMA_NAMES if config.layout.gemma else _HF_NAMES


def _taken_off(config: Config, name: str) -> float:
    """What a file's values are less than ours: Gemma stores the weights of norms less one."""
    return float(config.layout.gemma and name.endswith("norm"))


def to_hf(model: Transformer) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names, matrices `(out, in)`."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(model.embedding[...]),
        "model.norm.weight": np.asarray(model.norm[...]) - _taken_off(model.config, "norm"),
    }
    for name, stacked in model.stacked().items():
        stored, less = _stored_names(model.config)[name], _taken_off(model.config, name)
        for index, array in enumerate(np.asarray(stacked)):
            tensors[f"model.layers.{index}.{stored}"] = array.T - less  # 1-d: unchanged
    if not model.config.tied:
        tensors["lm_head.weight"] = np.asarray(model.head[...])
    return tensors


def tensor_parallel(mesh: Mesh, axis: str = "model") -> Placement:
    """Heads of attention, columns of the MLP and words cut over one axis of a mesh.

    Args:
        mesh: must have the axis; others are not used.
        axis: its size divides the sizes of heads, MLP and vocabulary.
    Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    columns, rows = PartitionSpec(None, None, axis), PartitionSpec(None, axis, None)
    rules = (
        (r"layers\.(q|k|v|gate|up)", columns),
        (r"layers\.(q|k|v)_bias", PartitionSpec(None, axis)),
        (r"layers\.(o|down)", rows),
        (r"embedding|head", PartitionSpec(axis, None)),
    )
    return Placement(mesh, rules)


def from_hf(
    config: Config,
    tensors: Mapping[str, np.ndarray],
    where: str = "weights",
    *,
    dtype: Any = jnp.float32,
    sharding: Placement | None = None,
) -> Transformer:
    """A transformer from parameters under their Hugging Face names.

    Tensors are asked for one at a time and written into their final place at once, so a mapping
    that reads on demand (`parameters.Checkpoint`) needs room for the network and one tensor.

    Args:
        dtype: of the weights, but those of norms, which stay float32.
        sharding: how to lay the parameters over devices, named "embedding", "layers.q" (as in
            `Layers`), "norm", "head"; None: one device.
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

    def whole(stored: str, shape: tuple[int, ...]):
        yield ..., tensor(stored, shape)

    def layers(stored: str, shape: tuple[int, ...]):
        for index in range(config.num_layers):
            yield index, tensor(f"model.layers.{index}.{stored}", shape).T

    def parameter(name: str, shape: tuple[int, ...], parts: Any) -> nnx.Param:
        kept = jnp.float32 if name.endswith("norm") else dtype
        less = _taken_off(config, name)
        placed = None if sharding is None else sharding(name, shape)
        return nnx.Param(parameters.assemble(shape, kept, parts, placed, plus=less))

    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    table, hidden = (config.vocabulary_size, config.hidden_size), (config.hidden_size,)
    model.embedding = parameter("embedding", table, whole("model.embed_tokens.weight", table))
    model.norm = parameter("norm", hidden, whole("model.norm.weight", hidden))
    for name, stacked in model.stacked().items():
        parts = layers(_stored_names(config)[name], stacked.shape[:0:-1])
        setattr(model.layers, name, parameter(f"layers.{name}", stacked.shape, parts))
    if not config.tied:
        model.head = parameter("head", table, whole("lm_head.weight", table))
    return model
