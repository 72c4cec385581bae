"""The shape of a transformer, read from a Hugging Face `config.json`: `Config`.

Six layouts of one network, told apart by `FAMILIES`.  What differs from layer to layer (how far
back it sees, which rotary angles it uses) is in `Config.windows` and `Config.local_rope`.

Source: Llama 3 (Grattafiori et al. 2024), Mistral (Jiang et al. 2023), Qwen2 (Yang et al. 2024),
Qwen3 (Yang et al. 2025), Gemma 2 and 3 (Gemma Team 2024, 2025), as laid out in `transformers`;
held to them by parity tests.  Read next: `transformer.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np


class Family(NamedTuple):
    """What the layers of a layout have.

    Attributes:
        biases: on q, k and v.
        head_norms: RMSNorm on every head's q and k.
        gemma: a norm after each half of a layer too, weights of norms stored less one, embeddings
            times the root of the hidden size, GELU in place of SiLU.
    """

    biases: bool = False
    head_norms: bool = False
    gemma: bool = False


FAMILIES = {
    "Llama": Family(),
    "Mistral": Family(),
    "Qwen2": Family(biases=True),
    "Qwen3": Family(head_norms=True),
    "Gemma2": Family(gemma=True),
    "Gemma3": Family(head_norms=True, gemma=True),
}
_MODEL_TYPES = {"gemma3_text": "Gemma3"} | {name.lower(): name for name in FAMILIES}


class Rope(NamedTuple):
    """Rotary positions.

    Attributes:
        theta: base of the frequencies.
        factor: slows angles by so much: all of them, or with `bounds` the slow ones.
        bounds: llama3 scaling, (low_freq_factor, high_freq_factor, original length), else None.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    bounds: tuple[float, float, int] | None = None


PLAIN = Rope()


@dataclass(frozen=True)
class Config:
    """Shape of a transformer; hashable, so that it can be static under jit.

    Attributes:
        windows: per layer, how many positions it sees back, its own counted; 0: all. Empty: all.
        rope, local_rope: rotary positions; `local_rope` those of layers with a window, if other.
        query_scale: multiplies attention scores; None: `head_size ** -0.5`.
        attention_cap, logit_cap: scores and logits as `cap * tanh(x / cap)`; 0: as they are.
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    rope: Rope = PLAIN
    local_rope: Rope | None = None
    windows: tuple[int, ...] = ()
    query_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    norm_eps: float = 1e-6
    tied: bool = True
    max_length: int = 2048
    end_tokens: tuple[int, ...] = ()

    @property
    def layout(self) -> Family:
        """What its layers have."""
        return FAMILIES[self.family]

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_size**-0.5 if self.query_scale is None else self.query_scale

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "Config":
        """The configuration in a Hugging Face `config.json`.

        Raises:
            ValueError: for an architecture that is not in `FAMILIES`, a missing entry, or an option
                that this transformer does not have (other activations or rope scalings).
        """
        family = _family(raw, where)
        layout = FAMILIES[family]
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
        known = "gelu_pytorch_tanh" if layout.gemma else "silu"
        asked = raw.get("hidden_activation") or raw.get("hidden_act") or known
        if asked != known:
            raise ValueError(f"smcscale: {where} asks for {asked!r}; {family} has {known} only.")
        if raw.get("mlp_bias") or (not layout.biases and raw.get("attention_bias")):
            raise ValueError(f"smcscale: {where} asks for biases that the {family} layout lacks.")
        if raw.get("use_bidirectional_attention"):
            raise ValueError(f"smcscale: {where} asks for attention that looks ahead.")
        if raw.get("quantization_config"):
            raise ValueError(
                f"smcscale: {where} describes quantised weights.\n"
                "  try: the checkpoint they were made from, in bfloat16 or float32."
            )
        rope, local_rope = _ropes(raw, family, where)
        # what a file leaves out has the default of its class in `transformers`; null means none
        scalar = raw.get("query_pre_attn_scalar", 256) if layout.gemma else None
        caps = family == "Gemma2"
        config = cls(
            family=family,
            **sizes,
            rope=rope,
            local_rope=local_rope,
            windows=_windows(raw, family, sizes["num_layers"], where),
            query_scale=None if scalar is None else float(scalar) ** -0.5,
            attention_cap=float(raw.get("attn_logit_softcapping", 50.0) or 0.0) if caps else 0.0,
            logit_cap=float(raw.get("final_logit_softcapping", 30.0 if caps else None) or 0.0)
            if layout.gemma
            else 0.0,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", layout.gemma)),
            max_length=int(raw.get("max_position_embeddings", 2048)),
            end_tokens=(),
        )
        return config.with_end_tokens(raw.get("eos_token_id"))

    def with_end_tokens(self, more: int | Sequence[int] | None) -> "Config":
        """The same shape with more tokens that end a text."""
        given = () if more is None else (more,) if isinstance(more, int) else tuple(more)
        known = self.end_tokens
        return replace(self, end_tokens=known + tuple(t for t in given if t not in known))

    def to_hf(self, head: str = "ForCausalLM") -> dict[str, Any]:
        """The entries of `config.json`, for a network as the project's own scripts train them.

        Raises:
            NotImplementedError: for Gemma, and for windows or scaled rotary positions.
        """
        if self.layout.gemma or self.windows or self.local_rope or self.rope.factor != 1:
            raise NotImplementedError(
                "smcscale: only plain networks are written: no Gemma, no windows, no rope scaling."
            )
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
            "rope_theta": self.rope.theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_length,
            "eos_token_id": list(self.end_tokens),
            "torch_dtype": "bfloat16",
        }


def _family(raw: Mapping[str, Any], where: str) -> str:
    named = (raw.get("architectures") or [None])[0]
    if named is None:
        family = _MODEL_TYPES.get(str(raw.get("model_type")))
    else:  # whole names: a Qwen2Moe is no Qwen2, a Gemma 3 that also sees is no text model
        ends = ("ForCausalLM", "ForTokenClassification", "ForSequenceClassification")
        family = next((f for f in FAMILIES if named in {f + end for end in ends}), None)
    if family is None:
        raise ValueError(
            f"smcscale: {where} describes a {named or raw.get('model_type')!r}; this transformer "
            f"reads the {', '.join(FAMILIES)} layouts only."
        )
    return family


def _windows(raw: Mapping[str, Any], family: str, num_layers: int, where: str) -> tuple[int, ...]:
    """Window of each layer; empty when none has one."""
    qwen = family.startswith("Qwen")
    window = raw.get("sliding_window", 4096)
    if not window or family == "Llama" or (qwen and not raw.get("use_sliding_window")):
        return ()
    kinds = raw.get("layer_types")
    if kinds is None:
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
        every = {"Gemma2": 2, "Gemma3": int(pattern)}.get(family, 0)
        first = int(raw.get("max_window_layers", 28)) if qwen else 0
        sees_all = [(every and (i + 1) % every == 0) or i < first for i in range(num_layers)]
        kinds = ["full_attention" if whole else "sliding_attention" for whole in sees_all]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"smcscale: {where} has `layer_types` {sorted(set(kinds))} for {len(kinds)} of "
            f"{num_layers} layers; only full_attention and sliding_attention are known."
        )
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def _ropes(raw: Mapping[str, Any], family: str, where: str) -> tuple[Rope, Rope | None]:
    """Rotary positions of layers that see all, and of layers with a window if they differ."""
    given = raw.get("rope_parameters") or {}
    nested = "full_attention" in given or "sliding_attention" in given
    if family != "Gemma3":
        if nested:
            raise ValueError(f"smcscale: {where} asks for rotary positions by kind of layer.")
        return _rope(raw.get("rope_scaling") or given, raw, 10_000.0, where), None
    whole = given.get("full_attention") if nested else raw.get("rope_scaling") or given
    local = dict(given.get("sliding_attention") or {}) if nested else {}
    local.setdefault("rope_theta", raw.get("rope_local_base_freq") or 10_000.0)
    return _rope(whole or {}, raw, 1_000_000.0, where), _rope(local, {}, 10_000.0, where)


def _rope(given: Mapping[str, Any], raw: Mapping[str, Any], base: float, where: str) -> Rope:
    """Rotary positions from their own entries, else from the top level, else the default base."""
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or base)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"smcscale: {where} asks for rope scaling {kind!r}; only linear and llama3 are known."
        )
    if kind == "default":
        return Rope(theta)
    original = given.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    try:
        factor = float(given["factor"])
        if kind == "linear":
            return Rope(theta, factor)
        bounds = (float(given["low_freq_factor"]), float(given["high_freq_factor"]))
    except KeyError as error:
        raise ValueError(f"smcscale: {where} has no entry {error} for its rope scaling.") from error
    return Rope(theta, factor, (*bounds, int(original or 0)))


def rope_frequencies(rope: Rope, head_size: int) -> np.ndarray:
    """`(head_size / 2,)` float32 angle per position."""
    frequency = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.bounds is None:
        return (frequency / rope.factor).astype(np.float32)
    low, high, original = rope.bounds
    turns = original * frequency / (2 * math.pi)  # full turns over the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled = (1 - smooth) * frequency / rope.factor + smooth * frequency
    return scaled.astype(np.float32)
