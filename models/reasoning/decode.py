"""Write one step of every sequence: a token loop over the whole batch, joined to `vmap` by hand.

`write_step(keys, model, prompt, ..., states)` is native over groups x members: group g draws
with key g.  A `while_loop` under `vmap` would copy every cache at every token, so the function
is a `custom_vmap` whose rule folds each mapped axis into groups (where keys differ) or members
(where one key serves all) and calls itself: any nesting of `vmap` reaches one loop.  Batched
weights are refused.  Decoding is not differentiable.

Inside the loop the layers stand one after the other, each with its own cache, which takes the new
token's keys and values in place before it is attended; a `lax.scan` over the layers compiles faster,
but on CPU it copies every layer's weights and cache at every token (1.4 to 1.9 times slower on the
shipped model).  Each token is drawn from the law q that `sampling.py` makes of the model's p; both
log probabilities are summed on the way.
"""

import functools
import operator
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from smcscale.models.reasoning import cache, transformer
from smcscale.models.reasoning.cache import KeysValues
from smcscale.models.reasoning.sampling import Sampling
from smcscale.models.reasoning.transformer import Transformer

#: up to so many bytes of weights the layers are cut apart once a step: a second copy meanwhile
CUT_BEFORE_LOOP = 4 << 30


class Written(eqx.Module):
    """What one sequence has written.

    Attributes:
        tokens: `(C,)`, everything since the prompt.
        length: how many tokens count.
        begin: where the newest step begins; `begin == length` if nothing was added.
        finished: the end token was written, or the room is full.
        cache: suffix keys and values `(L, kv, C, head)` of the prompt's last token and of all
            tokens but the newest, which is still pending.
        log_prob, log_proposal: log probability of the text so far, nats, float32: to the model (p,
            at temperature 1, nothing cut off), and to the law it was drawn from (q).
        begin_log_prob, begin_log_proposal: the same, of the text before the newest step.
    """

    tokens: Int32[Array, "..."]
    length: Int32[Array, "..."]
    begin: Int32[Array, "..."]
    finished: Bool[Array, "..."]
    cache: KeysValues
    log_prob: Float[Array, "..."]
    log_proposal: Float[Array, "..."]
    begin_log_prob: Float[Array, "..."]
    begin_log_proposal: Float[Array, "..."]

    def __init__(self, tokens: Any, length: Any, begin: Any, finished: Any, cache: Any, *sums: Any):
        """The four log probabilities are zeros unless given, in the order above."""
        self.tokens, self.length, self.begin, self.finished = tokens, length, begin, finished
        self.cache = cache
        sums = sums or (jnp.zeros(jnp.shape(length), jnp.float32),) * 4
        self.log_prob, self.log_proposal, self.begin_log_prob, self.begin_log_proposal = sums


class Prompted(NamedTuple):
    """A prompt that was read: padded tokens `(P,)`, their number, keys and values."""

    tokens: Int32[Array, "..."]
    length: Int32[Array, "..."]
    cache: KeysValues


class TextState(eqx.Module):
    """The text of one particle; the value of `lm.next_step(state)`.

    Attributes:
        written: tokens so far, their number, where the newest step begins, whether the text is
            finished, and the cache (heavy).
        prompt: the prompt, when the model was not `given` one; else None.
    """

    written: Written
    prompt: Prompted | None = None
    heavy: ClassVar[tuple[str, ...]] = ("cache",)
    ndim: ClassVar[int] = 0  # plain NumPyro asks a value for these two
    shape: ClassVar[tuple[int, ...]] = ()

    @property
    def finished(self) -> Bool[Array, ""]:
        """Whether the end token was written, or the room is full."""
        return self.written.finished

    @property
    def step_length(self) -> Int32[Array, ""]:
        """How many tokens the newest step has; 0 if nothing was added."""
        return self.written.length - self.written.begin

    @property
    def step_log_prob(self) -> Float[Array, "..."]:
        """Log probability of the newest step to the model itself (p), nats."""
        return self.written.log_prob - self.written.begin_log_prob

    @property
    def step_log_proposal(self) -> Float[Array, "..."]:
        """Log probability of the newest step to the law it was drawn from (q), nats."""
        return self.written.log_proposal - self.written.begin_log_proposal


def draw_tokens(
    uniforms: Float[Array, " B"], logits: Float[Array, "B V"], block: int = 128
) -> Int32[Array, " B"]:
    """One token of every row by two-level inverse CDF: choose a block by its sum, then inside it.

    Args:
        uniforms: `(B,)` in [0, 1).
        logits: `(B, V)`; `-inf` forbids a token.
    Returns:
        `(B,)` int32; a token of probability zero is never drawn.
    """
    return scored_draw(uniforms, logits, block)[0]


def scored_draw(
    uniforms: Float[Array, " B"], logits: Float[Array, "B V"], block: int = 128
) -> tuple[Int32[Array, " B"], Float[Array, " B"]]:
    """As `draw_tokens`, with the log probabilities `(B,)` of the tokens, which cost nothing more."""
    rows, width = logits.shape
    most = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.exp(logits - most)
    if width > 2 * block:
        mass = jnp.pad(mass, ((0, 0), (0, -width % block))).reshape(rows, -1, block)
        sums = jnp.sum(mass, axis=-1)
        total = jnp.sum(sums, axis=-1)
        chosen, left = _inverse(uniforms * total, sums)
        inside = jnp.take_along_axis(mass, chosen[:, None, None], axis=1)[:, 0]
        tokens = chosen * block + _inverse(left, inside)[0]
    else:
        total = jnp.sum(mass, axis=-1)
        tokens = _inverse(uniforms * total, mass)[0]
    return tokens, _taken(logits, tokens) - most[:, 0] - jnp.log(total)


def _taken(rows, tokens):
    """The entry of each row `(B, V)` at its token `(B,)`."""
    return jnp.take_along_axis(rows, tokens[:, None], axis=-1)[:, 0]


def _inverse(target, mass):
    """Index of the cell of `mass (B, K)` that `target (B,)` falls in, and how far into it."""
    cumulative = jnp.cumsum(mass, axis=-1)
    # rounding can put the target at the very end: stay at or below the last cell with mass
    last = jnp.argmax(jnp.where(mass > 0, jnp.arange(mass.shape[-1]), -1), axis=-1)
    index = jnp.minimum(jnp.sum(cumulative <= target[:, None], axis=-1), last)
    before = jnp.take_along_axis(cumulative - mass, index[:, None], axis=-1)[:, 0]
    return index.astype(jnp.int32), jnp.maximum(target - before, 0.0)


@functools.cache
def _native(graph: Any, step_tokens: int, end_tokens: tuple[int, ...]):
    """The sampler of one network shape; cached, so that equal calls trace to equal programs."""

    @custom_vmap
    def write(keys, weights, prompt, states):
        arrays, ends_step, sampling = weights
        bundle = (nnx.merge(graph, arrays), ends_step, sampling)
        return _write(bundle, step_tokens, end_tokens, keys, prompt, states)

    @write.def_vmap
    def rule(size, batched, keys, weights, prompt, states):
        keys_in, weights_in, prompt_in, states_in = batched
        if any(jax.tree.leaves(weights_in)):
            raise NotImplementedError(
                "smcscale: the language model's weights or temperature are mapped by `vmap`; "
                "decoding needs one set for all sequences.\n"
                "  try: map over keys, states or prompts only."
            )
        fold, unfold = folding(size, keys_in, jax.tree.leaves(states)[0].shape, states_in)
        states = fold_tree(fold, size, states, states_in)
        prompt = _fold_prompt(size, keys_in, prompt, prompt_in, states.length.shape)
        if keys_in:
            keys = keys.reshape(-1)
        out = jax.tree.map(unfold, write(keys, weights, prompt, states))
        return out, jax.tree.map(lambda _: True, out)

    return write


def folding(size: int, into_groups: bool, shape: tuple, batched: Any):
    """Functions that fold a mapped axis of `(size, G, M, ...)` leaves away, and back."""
    mapped = any(jax.tree.leaves(batched))
    groups, members = shape[1:3] if mapped and jax.tree.leaves(batched)[0] else shape[:2]

    def fold(x):
        if into_groups:
            return x.reshape(size * groups, members, *x.shape[3:])
        return jnp.moveaxis(x, 0, 1).reshape(groups, size * members, *x.shape[3:])

    def unfold(x):
        if into_groups:
            return x.reshape(size, groups, members, *x.shape[2:])
        return jnp.moveaxis(x.reshape(groups, size, members, *x.shape[2:]), 1, 0)

    return fold, unfold


def fold_tree(fold, size: int, tree: Any, batched: Any):
    """Give every leaf the mapped axis, then fold it."""

    def one(leaf, is_batched):
        return fold(leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape)))

    return jax.tree.map(one, tree, batched)


def _fold_prompt(size: int, into_groups: bool, prompt: Prompted, batched: Any, shape: tuple):
    """Fold the mapped axis of prompts `(1 or G, 1 or M, ...)`; a shared copy stays shared.

    `shape` is `(G, M)` of the states after folding.
    """
    mapped = any(jax.tree.leaves(batched))
    groups, members = shape

    def one(leaf, is_batched):
        copies = leaf.shape[1:3] if is_batched else leaf.shape[:2]
        rest = leaf.shape[3:] if is_batched else leaf.shape[2:]
        if not mapped and (copies[0] == 1 if into_groups else copies[1] == 1):
            return leaf
        leaf = leaf if is_batched else jnp.broadcast_to(leaf, (size, *leaf.shape))
        if into_groups:
            leaf = jnp.broadcast_to(leaf, (size, groups // size, copies[1], *rest))
            return leaf.reshape(groups, copies[1], *rest)
        leaf = jnp.broadcast_to(leaf, (size, groups, members // size, *rest))
        return jnp.moveaxis(leaf, 0, 1).reshape(groups, members, *rest)

    return jax.tree.map(one, prompt, batched)


def write_step(
    key: PRNGKeyArray,
    graph: Any,
    weights: Any,
    prompt: Prompted,
    state: Written,
    ends_step: Bool[Array, " V"],
    sampling: Sampling,
    *,
    step_tokens: int,
    end_tokens: tuple[int, ...],
) -> Written:
    """One sequence's next step; under `vmap`, every sequence's in one loop.

    Args:
        key: one for all mapped sequences, or one for each.
        graph: static part of the network (`nnx.split`).
        weights: its arrays.
        prompt: what was read.
        state: what was written; a finished one is returned with an empty newest step.
        ends_step: tokens that end a step.
        sampling: the law that tokens are drawn from.
        step_tokens: a step has at most so many tokens (static).
        end_tokens: tokens that end the text (static).
    Raises:
        NotImplementedError: under `vmap` over the weights.
    """
    sampler = _native(graph, step_tokens, end_tokens)
    one = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None, None])
    written = sampler(key[None], (weights, ends_step, sampling), one(prompt), one(state))
    return jax.tree.map(lambda x: x[0, 0], written)


def _write(bundle, step_tokens, end_tokens, keys, prompt, states) -> Written:
    model, ends_step, sampling = bundle
    groups, members = states.length.shape
    batch = groups * members
    flat = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), states)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (members, step_tokens)))(keys)
    uniforms = uniforms.reshape(batch, step_tokens)
    if prompt.length.shape[1] > 1:  # one for each sequence; else one for all or for each group
        full = lambda x: jnp.broadcast_to(x, (groups, members, *x.shape[2:]))
        prompt = jax.tree.map(full, prompt)
    prompt = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), prompt)
    prompt_cache = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), prompt.cache)
    out = token_loop(model, ends_step, sampling, end_tokens, uniforms, prompt, prompt_cache, flat)
    return jax.tree.map(lambda x: x.reshape(groups, members, *x.shape[1:]), out)


def _apart(stacked: Any, num_layers: int) -> list[Any]:
    """One tree for each layer, of a tree whose leaves have them on their first axis."""
    return [jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(num_layers)]


def token_loop(
    model: Transformer, ends_step, sampling, end_tokens, uniforms, prompt, prompt_cache, states
) -> Written:
    """The loop itself, over B sequences; see `write_step`.

    Args:
        sampling: the law that tokens are drawn from; a temperature `()` stands for the one with it.
        uniforms: `(B, S)`, one for each token; S is the longest step.
        prompt: tokens `(B / m, P)`, length `(B / m,)`; m sequences in a row share one.
        prompt_cache: `(L, B / m, kv, P, head)`.
        states: leaves `(B, ...)`.
    """
    config = model.config
    sampling = Sampling.of(sampling)
    batch, room = states.tokens.shape
    rows = jnp.arange(batch)
    stacked = (model.stacked(), transformer.kinds(config), prompt_cache.keys, prompt_cache.values)
    large = sum(x.nbytes for x in jax.tree.leaves(stacked)) > CUT_BEFORE_LOOP
    layers = None if large else _apart(stacked, config.num_layers)
    visible = prompt.length - 1  # the prompt's last token is the first pending one
    last = jnp.take_along_axis(prompt.tokens, visible[:, None], axis=1)[:, 0]
    visible, last = (jnp.repeat(x, batch // x.shape[0]) for x in (visible, last))
    before = jnp.arange(prompt.tokens.shape[1])
    written = visible[:, None] + jnp.arange(room)
    in_prompt = (before < visible[:, None])[:, None]
    newest = jnp.take_along_axis(states.tokens, jnp.maximum(states.length - 1, 0)[:, None], axis=1)[
        :, 0
    ]
    pending = jnp.where(states.length == 0, last, newest)

    def unfinished(carry):
        index, _, _, _, done, *_ = carry
        return (index < uniforms.shape[1]) & ~jnp.all(done)

    def one_token(carry):
        index, pending, tokens, length, done, finished, log_prob, log_proposal, keys, values = carry
        position = (visible + length)[:, None]
        rotation = transformer.rotations(config, position)
        # the pending token sees itself
        in_suffix = (jnp.arange(room) <= length[:, None])[:, None]
        slot = jnp.where(done, room, length)
        hidden = model.embed(pending)[:, None]
        caches = []
        each = layers or _apart(stacked, config.num_layers)
        for (weights, kind, prompt_k, prompt_v), *suffix in zip(each, keys, values, strict=True):
            angles = transformer.turned(rotation, kind)
            q, *new = transformer.queries_keys_values(config, weights, hidden, angles)
            suffix = [
                cached.at[rows, :, slot].set(x[:, 0].astype(cached.dtype), mode="drop")
                for cached, x in zip(suffix, new, strict=True)
            ]
            parts = [
                (prompt_k, prompt_v, in_prompt & transformer.near(kind, position, before)),
                (*suffix, in_suffix & transformer.near(kind, position, written)),
            ]
            attended = cache.attend(config, q, parts)
            hidden = transformer.after_attention(config, weights, hidden, attended)
            caches.append(suffix)
        keys, values = (tuple(x) for x in zip(*caches, strict=True))
        hidden = transformer.rms_norm(hidden[:, 0], model.norm[...], config.norm_eps)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, index, axis=1, keepdims=False)
        logits = model.logits(hidden)
        token, drawn = scored_draw(uniform, sampling(logits))
        known = drawn  # to the model itself
        if not sampling.plain:
            known = _taken(logits, token) - jax.nn.logsumexp(logits, axis=-1)
        log_prob += jnp.where(done, 0.0, known)
        log_proposal += jnp.where(done, 0.0, drawn)
        tokens = tokens.at[rows, slot].set(token, mode="drop")
        length = length + ~done
        over = jnp.isin(token, jnp.asarray(end_tokens, jnp.int32)) | (length >= room)
        finished = finished | (~done & over)
        done = done | ends_step[token] | over
        sums = (log_prob, log_proposal)
        return index + 1, token, tokens, length, done, finished, *sums, keys, values

    start = (
        jnp.zeros((), jnp.int32), pending, states.tokens, states.length, states.finished,
        states.finished, states.log_prob, states.log_proposal,
        *(tuple(jnp.moveaxis(x, 1, 0)) for x in jax.tree.leaves(states.cache)),
    )  # fmt: skip
    _, _, tokens, length, _, finished, log_prob, log_proposal, keys, values = jax.lax.while_loop(
        unfinished, one_token, start
    )
    suffix = KeysValues(jnp.stack(keys, 1), jnp.stack(values, 1))
    sums = (log_prob, log_proposal, states.log_prob, states.log_proposal)
    return Written(tokens, length, states.length, finished, suffix, *sums)
