"""A reward model's folder: which network, which head, which form; refused where it does not say.

`read_folder(path) -> Folder`, from which `ProcessRewardModel.from_pretrained` is made.  The head is
known by its tensors, the form by the architecture's name:

| architecture ends with | head | form |
|---|---|---|
| `ForTokenClassification` | `score` | `token_classification` |
| `ForSequenceClassification` | `score` | `outcome` |
| `ForProcessRewardModel` | `score.0`, `score.2` | `qwen_math_prm` |
| `ForRewardModel` | `score.0`, `score.2` | `outcome` |
| `ForPrmModel`, or any with this head | `v_head.summary` or `v_head` | `skywork` |
| `ForCausalLM` | none | must be told: `math_shepherd`, `rlhflow` |

A language model's folder is no reward model: read as one, it would give a number for every word of
the vocabulary in place of one or two labels.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from smcscale.models import parameters
from smcscale.models.parameters import Checkpoint, Placement
from smcscale.models.reasoning import transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.reward_forms import (
    Form,
    MakeForm,
    outcome,
    qwen_math_prm,
    skywork,
    token_classification,
)
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer

#: tensors that make a reward model of a language model
HEADS = ("score.weight", "score.2.weight", "v_head.summary.weight", "v_head.weight")
ENDINGS: dict[str, MakeForm] = {
    "ForTokenClassification": token_classification,
    "ForSequenceClassification": outcome,
    "ForRewardModel": outcome,
    "ForProcessRewardModel": qwen_math_prm,
    "ForPrmModel": skywork,
}


class Folder(NamedTuple):
    """What a folder holds: the arguments of `ProcessRewardModel`, linear layers as pairs."""

    model: Transformer
    head: np.ndarray
    bias: np.ndarray
    tokenizer: Tokenizer
    confidence: np.ndarray | None
    inner: tuple[np.ndarray, np.ndarray] | None
    form: Form


def read_folder(
    path: str | Path,
    form: MakeForm | Form | None = None,
    dtype: Any = "float32",
    sharding: Placement | None = None,
) -> Folder:
    """Read a folder; arguments and errors as `ProcessRewardModel.from_pretrained`."""
    path, where = Path(path), str(path)
    raw, tensors = parameters.read_json(path / "config.json"), _tensors(path)
    named = str((raw.get("architectures") or [raw.get("model_type")])[0])
    heads = [name for name in HEADS if name in tensors]
    if len(heads) > 1:
        raise ValueError(f"smcscale: {where} has several reward heads: {', '.join(heads)}.")
    if not heads and form is None:
        raise ValueError(
            f"smcscale: {where} has no reward head (no tensor {', '.join(map(repr, HEADS))}): it is "
            f"a plain {named}.\n  try: a folder with a head; for a model that answers with + and - "
            "tokens, from_pretrained(path, form=math_shepherd) or form=rlhflow."
        )
    config = _config(path, raw)
    tokenizer = Tokenizer.from_file(path / "tokenizer.json", config.end_tokens)
    form = known_form(named, heads[0], where) if form is None else form
    form = form if isinstance(form, Form) else form(tokenizer)
    if bool(heads) == (form.candidates is not None):
        raise ValueError(
            f"smcscale: {where} has {f'the head {heads[0]!r}' if heads else 'no reward head'}, but "
            f"`form` reads {'token logits' if heads else 'a head'}.\n  try: another form."
        )
    if config.tied or "lm_head.weight" not in tensors:
        config, rows = replace(config, tied=True), "model.embed_tokens.weight"
    else:  # all logits are needed only where the head reads the confidence
        rows = "lm_head.weight"
        config = replace(config, tied="score.confidence" not in tensors)
    model = transformer.from_hf(config, tensors, where, dtype=jnp.dtype(dtype), sharding=sharding)
    if form.candidates is not None:
        good, bad = form.candidates
        return Folder(
            model, tensors[rows][[bad, good]], np.zeros(2), tokenizer, None, None, form
        )  # fmt: skip
    inner = None
    if heads[0] == "score.2.weight":
        inner = _layer(tensors, "score.0.weight", where)
    told = tensors.get("score.confidence")
    return Folder(model, *_layer(tensors, heads[0], where), tokenizer, told, inner, form)


def known_form(architecture: str, head: str, where: str) -> MakeForm:
    """The form of a folder, from the name of its architecture and its head's tensor.

    Raises:
        ValueError: when they do not say.
    """
    for ending, form in ENDINGS.items():
        if architecture.endswith(ending):
            return form
    if head.startswith("v_head"):
        return skywork
    names = ", ".join(form.__name__ for form in dict.fromkeys(ENDINGS.values()))
    raise ValueError(
        f"smcscale: {where} does not say how its steps are marked (architecture {architecture!r}, "
        f"head {head!r}).\n  try: from_pretrained(path, form=...) with one of {names}."
    )


def _tensors(path: Path) -> Mapping[str, np.ndarray]:
    """All tensors; the wrapper of a value head may have put its own name before the rest."""
    wrapper, found = "pretrained_model.", Checkpoint(path)
    if not any(name.startswith(wrapper) for name in found):
        return found
    return {name.removeprefix(wrapper): tensor for name, tensor in found.items()}


def _config(path: Path, raw: Mapping[str, Any]) -> Config:
    """The network inside, with the end tokens of the generation configuration."""
    named = re.sub("For(ProcessReward|Reward|Prm)Model$", "ForCausalLM", _architecture(raw))
    inside = {**raw, "architectures": [named] if named else []}
    config = Config.from_hf(inside, str(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.is_file():
        config = config.with_end_tokens(parameters.read_json(generation).get("eos_token_id"))
    return config


def _architecture(raw: Mapping[str, Any]) -> str:
    return str((raw.get("architectures") or [""])[0])


def _layer(
    tensors: Mapping[str, np.ndarray], weight: str, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a linear layer; a missing bias is zero."""
    if weight not in tensors:
        raise ValueError(f"smcscale: {where} has no tensor {weight!r}, which its head implies.")
    found = tensors[weight]
    bias = tensors.get(weight.removesuffix("weight") + "bias")
    return found, np.zeros(len(found), np.float32) if bias is None else bias
