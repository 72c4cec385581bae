"""How the next token is drawn: the proposal q, made of the model's own law p.

    sampling = Sampling(temperature=0.8, top_p=0.95)
    warped = sampling(logits)              (B, V) -> (B, V); softmax of it is q

| option | what it does to p, in this order |
|---|---|
| `temperature` | divides the logits |
| `top_k` | keeps the k most likely tokens, and what ties with the last of them |
| `top_p` | keeps the fewest most likely tokens that hold the share `top_p` |
| `min_p` | keeps tokens at least `min_p` times as likely as the likeliest |
| `floor` | mixes p back in: `(1 - floor) q + floor p`, so that nothing is impossible |

What a truncation removes gets `-inf`, the rest is renormalised.  A particle filter may take q for
the model, or correct for it by the weight `log p - log q`: see `LanguageModel`.  The cut-offs are
found by bisection over the float's bits, exact and on CPU 12 to 16 times faster than a sort.

Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), as in the
logits warpers of `transformers`, held to them by tests; the mixture is the defensive one of
Hesterberg (1995).
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

#: entries of a `generation_config.json` that shape the law of a token, with the value that does not
NEUTRAL = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "num_beams": 1,
    "guidance_scale": 1, "bad_words_ids": None, "suppress_tokens": None, "min_length": 0,
    "begin_suppress_tokens": None, "sequence_bias": None, "min_new_tokens": 0,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "watermarking_config": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip


class Sampling(eqx.Module):
    """The law that tokens are drawn from, as a function of the model's logits.

    Numbers are leaves: another value compiles nothing, switching an option on or off does.

    Attributes:
        temperature: divides the logits; None: 1.
        tail: `1 - top_p`, the share that `top_p` may cut off; None: all tokens stay.
        min_p, floor: see the module docstring; None: not used.
        top_k: static.
    """

    temperature: Float[Array, ""] | None
    tail: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    floor: Float[Array, ""] | None
    top_k: int | None = eqx.field(static=True)

    def __init__(
        self,
        temperature: Any = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        floor: float | None = None,
    ):
        """Options as in the module docstring.

        Args:
            temperature: positive; an array is taken as it is, unchecked.
            top_p: in (0, 1]; 1 or None: off.
            top_k: 1 or more; 0 or None: off.
            min_p: in [0, 1]; 0 or None: off.
            floor: in [0, 1); 0 or None: off.
        Raises:
            ValueError: a number outside its range.
        """
        if isinstance(temperature, jax.Array):
            self.temperature = temperature.astype(jnp.float32)
        else:
            _check("temperature", temperature, 0 < temperature < float("inf"), "positive")
            self.temperature = None if temperature == 1 else jnp.asarray(temperature, jnp.float32)
        _check("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]")
        _check("min_p", min_p, min_p is None or 0 <= min_p <= 1, "in [0, 1]")
        _check("floor", floor, floor is None or 0 <= floor < 1, "in [0, 1)")
        whole = top_k is None or (isinstance(top_k, int) and top_k >= 0)
        _check("top_k", top_k, whole, "a whole number from 0 (off) on")
        self.tail = None if top_p in (None, 1) else jnp.asarray(1 - top_p, jnp.float32)
        self.min_p = jnp.asarray(min_p, jnp.float32) if min_p else None
        self.floor = jnp.asarray(floor, jnp.float32) if floor else None
        self.top_k = top_k or None

    @classmethod
    def of(cls, given: Any) -> "Sampling":
        """What is a `Sampling` already, or the one of a temperature."""
        return given if isinstance(given, cls) else cls(given)

    @property
    def plain(self) -> bool:
        """Whether q is p: no option is used."""
        return not jax.tree.leaves(self) and self.top_k is None

    def __call__(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """Logits of q, not normalised; `-inf` where q is zero.

        Args:
            logits: `(..., V)`; at least one finite in a row.
        Returns:
            `(..., V)` float32.
        """
        logits = logits.astype(jnp.float32)
        if self.plain:
            return logits
        warped = logits if self.temperature is None else logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            warped = jnp.where(_most_likely(warped, self.top_k), warped, -jnp.inf)
        if self.tail is not None:
            warped = jnp.where(_nucleus(warped, self.tail), warped, -jnp.inf)
        if self.min_p is not None:
            warped = jnp.where(_mass(warped) >= self.min_p, warped, -jnp.inf)
        if self.floor is not None:
            q, p = jax.nn.log_softmax(warped), jax.nn.log_softmax(logits)
            warped = jnp.logaddexp(jnp.log1p(-self.floor) + q, jnp.log(self.floor) + p)
        return warped


def from_generation_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of `Sampling` that a `generation_config.json` asks for; only what it says.

    Raises:
        ValueError: it asks for greedy decoding, or for something that `Sampling` does not have.
    """
    other = [name for name, neutral in NEUTRAL.items() if raw.get(name) and raw[name] != neutral]
    if other:
        raise ValueError(
            f"smcscale: {where} asks for {', '.join(other)}, which sampling here does not have.\n"
            "  try: sampling=None and the options you want (temperature, top_p, top_k, min_p)."
        )
    if not raw.get("do_sample"):
        raise ValueError(
            f"smcscale: {where} asks for greedy decoding (do_sample is not true), which is no law "
            "to sample from.\n  try: sampling=None and the options you want, such as temperature."
        )
    names = ("temperature", "top_p", "top_k", "min_p")
    return {name: raw[name] for name in names if raw.get(name) is not None}


def _check(name: str, value: Any, good: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"smcscale: {name} must be {wanted}, got {value}.")


def _mass(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Probabilities up to a factor: the likeliest token has 1."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def _ordered(x: Float[Array, "... V"]) -> Int32[Array, "... V"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0 becomes 0
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _cut(order, weights, bound):
    """The smallest value `(..., 1)` such that the weights up to and with it exceed `bound`."""
    rows = (*order.shape[:-1], 1)
    low = jnp.full(rows, jnp.iinfo(jnp.int32).min)
    high = jnp.max(order, axis=-1, keepdims=True)

    def halve(_, bracket):
        low, high = bracket
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # no overflow
        held = jnp.sum(jnp.where(order <= middle, weights, 0), axis=-1, keepdims=True)
        enough = held > bound
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def _most_likely(logits: Float[Array, "... V"], k: int):
    """Mask of the k largest, and of what ties with the last of them."""
    order = _ordered(logits)
    ones = jnp.ones((), jnp.int32)
    return order >= _cut(order, ones, logits.shape[-1] - k)


def _nucleus(logits: Float[Array, "... V"], tail: Float[Array, ""]):
    """Mask of the tokens left when the least likely are removed, up to the share `tail` in all.

    Of tokens that tie at the edge the first go, as in a stable ascending sort.
    """
    order, mass = _ordered(logits), _mass(logits)
    bound = tail * jnp.sum(mass, axis=-1, keepdims=True)
    cut = _cut(order, mass, bound)
    edge = order == cut
    below = jnp.sum(jnp.where(order < cut, mass, 0.0), axis=-1, keepdims=True)
    each = jnp.max(jnp.where(edge, mass, 0.0), axis=-1, keepdims=True)
    removed = jnp.floor((bound - below) / each)
    return (order > cut) | (edge & (jnp.cumsum(edge, axis=-1) > removed))
