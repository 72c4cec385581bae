"""Write `references.safetensors`: logits of `transformers` for the parity tests.

    python tests/models/reasoning/make_references.py      needs torch and transformers

Five random Qwen2 configurations (weights, tokens, logits) and the shipped checkpoint on one
problem (tokens, logits), all in float32.  No network is used.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
SHIPPED = HERE.parents[2] / "models" / "pretrained" / "reasoner"
SHAPES = [  # hidden, layers, heads, kv heads, mlp, vocabulary, tied, rope theta
    (32, 2, 4, 2, 48, 50, True, 10_000.0),
    (24, 1, 2, 1, 40, 37, False, 1_000_000.0),
    (48, 3, 6, 2, 64, 61, True, 10_000.0),
    (16, 2, 2, 2, 24, 29, False, 500.0),
    (40, 2, 5, 1, 56, 300, True, 100_000.0),
]


def configurations() -> list[dict]:
    """The five configurations as `config.json` entries."""
    return [
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "intermediate_size": mlp, "vocab_size": vocabulary, "tie_word_embeddings": tied,
            "rope_theta": theta, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "hidden_act": "silu",
        }
        for hidden, layers, heads, kv, mlp, vocabulary, tied, theta in SHAPES
    ]  # fmt: skip


def random_model(raw: dict, seed: int):
    """A random `transformers` model; biases and norms are random too."""
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**raw)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def main() -> None:
    tensors: dict[str, np.ndarray] = {}
    for index, raw in enumerate(configurations()):
        model = random_model(raw, index)
        tokens = torch.randint(0, raw["vocab_size"], (1, 20))
        with torch.no_grad():
            logits = model(tokens).logits
        for name, tensor in model.state_dict().items():
            if not (raw["tie_word_embeddings"] and name == "lm_head.weight"):
                tensors[f"{index}/{name}"] = tensor.numpy()
        tensors[f"{index}/tokens"] = tokens[0].numpy().astype(np.int32)
        tensors[f"{index}/logits"] = logits[0].numpy()
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"))
    text = "Ana has 14 apples. Then she buys 7 more apples. How many apples does Ana have now?\n"
    ids = tokenizer(text + "Ana: 14 + 7 = 21\nAnswer: 21", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(ids).logits
    tensors["shipped/tokens"] = ids[0].numpy().astype(np.int32)
    tensors["shipped/logits"] = logits[0].numpy()
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, str(HERE / "references.safetensors"))
    (HERE / "references.json").write_text(json.dumps(configurations(), indent=1) + "\n")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
