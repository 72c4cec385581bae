"""Tiny reward models of every form: folders, the layouts as published, and their torch scores."""

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smcscale.models import parameters
from smcscale.models.reasoning import reward_forms
from smcscale.models.reasoning.tokenizer import Tokenizer, word_level

PROMPT = "Ana has 2 pears and buys 3.\n"
STEPS = ("2 + 3 = 5", "5 - 1 = 4", "Answer: 4")
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
JUDGE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SPECIAL = (
    "<extra_0>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>",
)  # fmt: skip
WORDS = ("Ana", "has", "pears", "buys", "Answer", "ки", "yes", "no", "user", "assistant", "right")


class Case(NamedTuple):
    """One form: its folder's architecture and head, and how it is asked for."""

    family: str
    ending: str
    head: str  # "score", "two layers", "value", "none"
    labels: int
    form: Any = None


CASES = {
    "token classification": Case("Qwen2", "ForTokenClassification", "score", 2),
    "separator": Case(
        "Llama", "ForTokenClassification", "score", 2,
        functools.partial(reward_forms.token_classification, separator=";"),
    ),
    "outcome": Case("Llama", "ForSequenceClassification", "score", 1),
    "closed outcome": Case(
        "Qwen2", "ForRewardModel", "two layers", 1,
        functools.partial(reward_forms.outcome, end="<|im_end|>"),
    ),
    "qwen": Case("Qwen2", "ForProcessRewardModel", "two layers", 2),
    "math shepherd": Case("Mistral", "ForCausalLM", "none", 2, reward_forms.math_shepherd),
    "rlhflow": Case("Llama", "ForCausalLM", "none", 2, reward_forms.rlhflow),
    "skywork": Case("Qwen2", "ForCausalLM", "value", 1),
}  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    """Whole words, with the tokens that the forms need."""
    backend = word_level([*WORDS, *"+-=.:;,?\\{}"])._backend
    backend.add_special_tokens(list(SPECIAL[1:]))
    backend.add_tokens([SPECIAL[0]])
    return Tokenizer(backend, (2,))


def configuration(case: Case) -> dict:
    """The `config.json` of a case."""
    return {
        "architectures": [case.family + case.ending], "model_type": case.family.lower(),
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24,
        "vocab_size": tokenizer().vocabulary_size, "tie_word_embeddings": case.family == "Llama",
        "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
        "sliding_window": 7 if case.family == "Mistral" else None, "hidden_act": "silu",
        "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "num_labels": case.labels,
    }  # fmt: skip


def write_folder(path: Path, raw: dict, tensors: dict) -> Path:
    """A folder in the Hugging Face layout."""
    parameters.save(path / "model.safetensors", tensors, np.float32)
    (path / "config.json").write_text(json.dumps(raw))
    tokenizer().save(path / "tokenizer.json")
    return path


def texts(name: str, prompt: str = PROMPT, steps: Any = STEPS) -> list[str]:
    """What each step is scored on, one whole text a step, read at its last token.

    Written out from the published scoring scripts, not from `reward_forms.py`.
    """
    asked = prompt.strip()
    before = range(1, len(steps) + 1)
    system = QWEN.replace("{}<", asked + "<")
    if name == "qwen":
        return [system + "".join(s + "<extra_0>" for s in steps[:t]) for t in before]
    if name == "whole qwen":
        return [system + "\n".join(steps[:t]) + "<extra_0>" for t in before]
    if name == "math shepherd":
        return [f"{asked} " + " ки\n".join(steps[:t]) + " ки" for t in before]
    if name == "rlhflow":
        turns = [USER + f"{asked} {steps[0]}" + JUDGE]
        for step in steps[1:]:
            turns.append(turns[-1] + "+<|eot_id|>" + USER + step + JUDGE)
        return turns
    if name == "skywork":
        return [asked + "\n" + "".join(s + "\n" for s in steps[:t]) for t in before]
    if name == "separator":
        return [prompt + "".join(s + ";" for s in steps[:t]) for t in before]
    if name == "closed outcome":
        return [prompt + "\n".join(steps[:t]) + "<|im_end|>" for t in before]
    return [prompt + "".join(s + "\n" for s in steps[:t]) for t in before]


def torch_model(case: Case, seed: int) -> tuple[dict, dict, Any]:
    """Configuration, tensors of the folder, and `text -> score`, by `transformers` and torch."""
    import torch

    from support.reasoning import families

    raw = configuration(case)
    plain = copy.deepcopy(raw) | {"architectures": [case.family + "ForCausalLM"]}
    model = families.random_model(plain, seed)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    width, first = raw["hidden_size"], torch.nn.Linear(raw["hidden_size"], raw["hidden_size"])
    last = torch.nn.Linear(width, case.labels)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.mul_(3.0)  # so that scores differ
    stored = {}
    if case.head == "none":
        plus, minus = (tokenizer().encode(sign)[0] for sign in "+-")
        head = lambda hidden: model.lm_head(hidden)[..., [minus, plus]]
    elif case.head == "two layers":
        head = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        stored = {"score.0": first, "score.2": last}
    else:
        head, stored = last, {"score" if case.head == "score" else "v_head.summary": last}
    for prefix, layer in stored.items():
        tensors[f"{prefix}.weight"] = layer.weight.detach().numpy()
        tensors[f"{prefix}.bias"] = layer.bias.detach().numpy()
    if case.head not in ("none", "value"):
        tensors.pop("lm_head.weight", None)

    def score(text: str) -> float:
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokenizer().encode(text)])).last_hidden_state
            logits = head(hidden[0, -1])
            if case.labels == 1:
                return float(torch.sigmoid(logits[0]))
            return float(torch.softmax(logits, -1)[1])

    return raw, tensors, score
