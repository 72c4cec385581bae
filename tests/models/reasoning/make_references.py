"""Write `references.safetensors`: logits of `transformers` for the parity tests.

    python tests/models/reasoning/make_references.py      needs torch and transformers

Ten random configurations of six families (weights, tokens, logits) and the shipped checkpoint on
one problem (tokens, logits), all in float32.  No network is used.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from support.reasoning import families

SHIPPED = HERE.parents[2] / "models" / "pretrained" / "reasoner"
#: family and index of `support.reasoning.families`
CASES = [
    *(("Qwen2", index) for index in range(5)),
    ("Llama", 1), ("Mistral", 3), ("Qwen3", 3), ("Gemma2", 3), ("Gemma3", 3),
]  # fmt: skip


def main() -> None:
    tensors: dict[str, np.ndarray] = {}
    configurations = [families.configuration(*case) for case in CASES]
    for index, raw in enumerate(configurations):
        model = families.random_model(raw, index)
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
    (HERE / "references.json").write_text(json.dumps(configurations, indent=1) + "\n")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
