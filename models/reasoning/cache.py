"""Keys and values of what was read: the prompt stored once, a suffix for every sequence.

A prompt's keys and values are `(L, 1, kv, P, head)`: one copy that all sequences attend to (or
`(L, B / m, kv, P, head)`: m sequences in a row share one).  A suffix is `(B, L, kv, C, head)`
between steps, with room for C tokens, `length` of them used; sequences lead so that a resampling
moves whole rows.  Slots lie next to the head size: attention then needs no transposed copies.
`read` runs a prompt, `extend` runs the same number of new tokens for every sequence (scoring),
`decode.py` runs one token at a time (writing).

Position of suffix slot s is `visible + s`, where `visible` is how many prompt tokens count.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smcscale.models.reasoning import transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.transformer import Transformer

BUCKET = 32
#: stands for minus infinity in attention scores, so that an empty row stays finite
MASKED = -1e30


class KeysValues(eqx.Module):
    """Keys and values of all layers; which layout, the owner says.

    `heavy` names the leaves that the particle engine should move only when it must.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]
    heavy: ClassVar[tuple[str, ...]] = ("cache",)


def empty(config: Config, capacity: int, dtype: Any = jnp.float32) -> KeysValues:
    """The suffix of one sequence with nothing written: `(L, kv, C, head)`."""
    shape = (config.num_layers, config.num_kv_heads, capacity, config.head_size)
    return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def bucketed(length: int) -> int:
    """The padded length of a prompt: few lengths, hence few compilations."""
    return max(BUCKET, -(-length // BUCKET) * BUCKET)


def read(model: Transformer, tokens: Int32[Array, " P"]) -> KeysValues:
    """Keys and values of a padded prompt, `(L, kv, P, head)`."""
    return jax.tree.map(lambda x: x[:, 0], read_batch(model, tokens[None]))


def read_batch(model: Transformer, tokens: Int32[Array, "B P"]) -> KeysValues:
    """Keys and values of padded prompts, `(L, B, kv, P, head)`."""
    _, (keys, values) = model(tokens, keys_values=True)
    return KeysValues(jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3))


def attend(config: Config, q, parts):
    """Attention over several stretches of keys, as if they were one.

    Args:
        config: scales and caps the scores.
        q: `(B, S, kv, r, head)`.
        parts: `(keys, values, mask)` each; keys and values `(B / m, kv, K, head)`, where m
            sequences in a row share them; `mask` bool, broadcastable to `(B, S, K)`.
    Returns:
        `(B, S, kv, r, head)`.
    """
    batch, length, groups, repeats, _size = q.shape
    dtype, accumulated = q.dtype, transformer.wide(q.dtype)
    q = jnp.moveaxis(q * config.scale, 2, 1)  # (B, kv, S, r, head)

    def rows(x, shared):
        """`(B, kv, S, r, _)` as `(shared, kv, m S r, _)`."""
        x = x.reshape(shared, batch // shared, *x.shape[1:])
        return jnp.moveaxis(x, 2, 1).reshape(shared, groups, -1, x.shape[-1])

    def unrows(x, shared):
        x = x.reshape(shared, groups, batch // shared, length, repeats, x.shape[-1])
        return jnp.moveaxis(x, 2, 1).reshape(batch, groups, length, repeats, x.shape[-1])

    scores = []
    for keys, _, mask in parts:
        # this order of operands is the fast one on CPU: no transposed copy of the keys
        score = jnp.einsum(
            "pgkh,pgqh->pgkq", keys, rows(q, keys.shape[0]), preferred_element_type=accumulated
        )
        score = transformer.capped(score, config.attention_cap)
        score = unrows(jnp.swapaxes(score, 2, 3), keys.shape[0])
        scores.append(jnp.where(mask[:, None, :, None], score, MASKED))
    share = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    total, start = 0.0, 0
    for keys, values, _ in parts:
        piece = rows(share[..., start : start + keys.shape[2]].astype(dtype), keys.shape[0])
        start += keys.shape[2]
        found = jnp.einsum("pgqk,pgkh->pgqh", piece, values, preferred_element_type=accumulated)
        total += unrows(found, keys.shape[0])
    return jnp.moveaxis(total, 1, 2).astype(dtype)


def extend(
    model: Transformer,
    prompt: KeysValues,
    visible: Int32[Array, " B"],
    suffix: KeysValues,
    length: Int32[Array, " B"],
    tokens: Int32[Array, "B S"],
    count: Int32[Array, " B"],
    unroll: int = 1,
) -> tuple[Float[Array, "B S D"], KeysValues]:
    """Run S new tokens of every sequence through the model and remember them.

    Args:
        prompt: `(L, B / m, kv, P, head)`.
        visible: how many prompt tokens count, `(B,)` or `(1,)`.
        suffix: `(B, L, kv, C, head)`.
        length: `(B,)`, used slots of the suffix.
        tokens: `(B, S)`; only the first `count` of a row are remembered.
        count: `(B,)`, at most S.
    Returns:
        hidden `(B, S, D)` (rows beyond `count` are meaningless) and the new suffix.
    """
    config = model.config
    capacity = suffix.keys.shape[3]
    offsets = jnp.arange(tokens.shape[1])
    before = jnp.arange(prompt.keys.shape[3])
    written = visible[:, None] + jnp.arange(capacity)
    positions = (visible + length)[:, None] + offsets
    rotation = transformer.rotations(config, positions)
    in_prompt = (before < visible[:, None])[:, None]
    in_suffix = (jnp.arange(capacity) < length[:, None])[:, None]
    causal = (offsets[:, None] >= offsets[None, :])[None]

    def layer(hidden, xs):
        weights, kind, prompt_k, prompt_v, suffix_k, suffix_v = xs
        angles = transformer.turned(rotation, kind)
        q, k, v = transformer.queries_keys_values(config, weights, hidden, angles)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        parts = [
            (prompt_k, prompt_v, in_prompt & transformer.near(kind, positions, before)),
            (suffix_k, suffix_v, in_suffix & transformer.near(kind, positions, written)),
            (k, v, causal & transformer.near(kind, positions, positions)),
        ]
        attended = attend(config, q, parts)
        return transformer.after_attention(config, weights, hidden, attended), (k, v)

    hidden = model.embed(tokens)
    by_layer = (jnp.moveaxis(suffix.keys, 1, 0), jnp.moveaxis(suffix.values, 1, 0))
    xs = (model.stacked(), transformer.kinds(config), prompt.keys, prompt.values, *by_layer)
    hidden, new = jax.lax.scan(layer, hidden, xs, unroll=unroll)
    hidden = transformer.rms_norm(hidden, model.norm[...], config.norm_eps)
    # out of range where a token does not count: dropped by the scatter
    slots = jnp.where(offsets < count[:, None], length[:, None] + offsets, capacity)
    rows = jnp.arange(tokens.shape[0])[:, None]

    def write(cache, value):
        # value (L, B, kv, S, head); indexing puts sequences and slots first
        value = jnp.transpose(value, (1, 3, 0, 2, 4)).astype(cache.dtype)
        return cache.at[rows, :, :, slots].set(value, mode="drop")

    return hidden, KeysValues(write(suffix.keys, new[0]), write(suffix.values, new[1]))
