"""Random configurations of every family of transformers, and their `transformers` models."""

import copy
from typing import Any

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# hidden, layers, heads, kv heads, head size, mlp, vocabulary, tied, rope theta
SHAPES = [
    (32, 2, 4, 2, 8, 48, 50, True, 10_000.0),
    (24, 1, 2, 1, 12, 40, 37, False, 1_000_000.0),
    (48, 4, 6, 2, 8, 64, 61, True, 10_000.0),
    (16, 3, 2, 2, 16, 24, 29, False, 500.0),
    (40, 2, 5, 1, 8, 56, 300, True, 100_000.0),
]
#: what each family adds to a shape, by index; windows are shorter than the texts that are tried
EXTRAS: dict[str, Any] = {
    "Llama": lambda i: {"rope_scaling": LLAMA3 if i % 2 else None},
    "Mistral": lambda i: {"sliding_window": None if i == 0 else 3 + 2 * i},
    "Qwen2": lambda i: (
        {}
        if i < 3
        else {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 4 - i}
    ),
    "Qwen3": lambda i: (
        {}
        if i < 2
        else {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": i % 2}
    ),
    "Gemma2": lambda i: {
        "sliding_window": 4 + i,
        "query_pre_attn_scalar": 4 * (i + 1),
        "attn_logit_softcapping": 2.0 * i + 1.0,
        "final_logit_softcapping": 3.0 + i,
    },
    "Gemma3": lambda i: {
        "sliding_window": 3 + i,
        "query_pre_attn_scalar": 6 * (i + 1),
        "sliding_window_pattern": 2 + i % 2,
        "rope_local_base_freq": 100.0 * (i + 1),
        "rope_scaling": {"rope_type": "linear", "factor": 4.0} if i % 2 else None,
    },
}


def configuration(family: str, index: int) -> dict:
    """A `config.json` of a family, as checkpoints on the Hub have it."""
    hidden, layers, heads, kv, head, mlp, vocabulary, tied, theta = SHAPES[index]
    activation = (
        {"hidden_activation": "gelu_pytorch_tanh"}
        if family.startswith("Gemma")
        else {"hidden_act": "silu"}
    )
    if not family.startswith("Gemma") and family != "Qwen3":
        head = hidden // heads
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": "gemma3_text" if family == "Gemma3" else family.lower(),
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head, "intermediate_size": mlp,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "rope_theta": theta,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "eos_token_id": 1,
        "pad_token_id": 0, "bos_token_id": 2,
    } | activation | EXTRAS[family](index)  # fmt: skip


def random_model(raw: dict, seed: int) -> Any:
    """A random `transformers` model; biases and norms are random too."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = raw["architectures"][0].removesuffix("ForCausalLM")
    configured = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(
        configured(**copy.deepcopy(raw), attn_implementation="eager")  # it edits what it is given
    )
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            centre = 0.0 if kind.startswith("Gemma") else 1.0  # of weights of norms, as stored
            parameter.copy_(centre + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model
