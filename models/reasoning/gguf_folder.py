"""A GGUF file as a model folder in the Hugging Face layout.

    from_gguf("model.Q4_1.gguf", "folder")
    LanguageModel.from_pretrained("folder")

Llama architectures with a byte-pair tokenizer. Quantised weights are written out as float32: the
network is that of the file, quantisation and all. Reading needs the `gguf` package, of the llama.cpp
project (the extra `gguf`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from smcscale.models import parameters

#: how text is cut before bytes are paired, by the file's own name for it
_CUTS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _by_words()],
    "gpt-2": lambda: [_by_words()],
}
#: kinds of token in the file: 3 control, 4 user defined; both are never cut
_SPECIAL, _WHOLE = 3, (3, 4)
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def from_gguf(file: str | Path, folder: str | Path) -> Path:
    """Write `config.json`, `model.safetensors` (float32), `tokenizer.json`, `tokenizer_config.json`.

    Args:
        file: a GGUF file of a Llama architecture.
        folder: made if it is not there.
    Returns:
        folder.
    Raises:
        FileNotFoundError: no such file.
        ImportError: the `gguf` package is not installed.
        ValueError: no GGUF file, another architecture, or a tokenizer or tensor that is not known.
    """
    file, folder = Path(file), Path(folder)
    if not file.is_file():
        raise FileNotFoundError(f"smcscale: {file} does not exist.")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            "smcscale: reading a GGUF file needs the package gguf.\n  try: pip install 'smcscale[gguf]'."
        ) from error
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"smcscale: {file} is not a GGUF file ({error}).") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(
            f"smcscale: {file} holds the architecture {fields.get('general.architecture')!r}; only "
            "llama is converted.\n  try: the model's Hugging Face folder."
        )
    config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    words = _tokenizer(fields)
    tensors = {}
    for tensor in reader.tensors:
        name, value = _named(tensor, config)
        tensors[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", _tokenizer_config(fields)),
    ):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    parameters.save(folder / "model.safetensors", tensors, np.float32)
    return folder


def _config(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """`config.json` of a `LlamaForCausalLM`."""
    if any(name.startswith("llama.rope.scaling") for name in fields):
        raise ValueError(
            "smcscale: this file scales its rotary positions, which is not converted.\n"
            "  try: the model's Hugging Face folder."
        )
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_size = fields.get("llama.attention.key_length", width // heads)
    if fields.get("llama.rope.dimension_count", head_size) != head_size:
        raise ValueError(
            "smcscale: this file rotates a part of each head only, which is not converted.\n"
            "  try: the model's Hugging Face folder."
        )
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "hidden_act": "silu",
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": tied,
        "max_position_embeddings": fields["llama.context_length"],
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "torch_dtype": "float32",
    }


def _tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A byte-pair tokenizer with the file's vocabulary, merges and way to cut text."""
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind[0] != "gpt2" or kind[1] not in _CUTS:
        raise ValueError(
            f"smcscale: the file's tokenizer is {kind[0]} with cuts {kind[1]!r}; known are gpt2 with "
            f"{', '.join(_CUTS)}.\n  try: the model's Hugging Face folder."
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    found = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(_CUTS[kind[1]]())
    found.decoder = decoders.ByteLevel()
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in _WHOLE]
    found.add_tokens([AddedToken(t, special=k == _SPECIAL, normalized=False) for t, k in added])
    if fields.get("tokenizer.ggml.add_bos_token"):
        first = fields["tokenizer.ggml.bos_token_id"]
        found.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return found


def _by_words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `transformers` and chat templates want to know."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, ours in names.items():
        index = fields.get(f"tokenizer.ggml.{ours}_token_id")
        if index is not None:
            found[name] = tokens[index]
    if "tokenizer.chat_template" in fields:
        found["chat_template"] = fields["tokenizer.chat_template"]
    return found


def _named(tensor: Any, config: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Name and values of a tensor as `transformers` has them."""
    from gguf.quants import dequantize

    # a copy: float32 tensors are views of the file
    value = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    if tensor.name in _OUTSIDE:
        return _OUTSIDE[tensor.name], value
    parts = tensor.name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _TENSORS or parts[3] != "weight":
        raise ValueError(
            f"smcscale: the file has a tensor {tensor.name}, which a plain Llama has not.\n"
            "  try: the model's Hugging Face folder."
        )
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(parts[2])
    if heads is not None:
        # the file keeps the two numbers of a rotation side by side, transformers half a head apart
        value = value.reshape(config[heads], -1, 2, value.shape[1]).swapaxes(1, 2)
        value = value.reshape(-1, value.shape[-1])
    return f"model.layers.{parts[1]}.{_TENSORS[parts[2]]}.weight", value
