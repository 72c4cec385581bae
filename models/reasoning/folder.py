"""A model folder in the Hugging Face layout: `load_backbone(path)`.

`config.json`, `model.safetensors` (or shards and their index), `tokenizer.json`, and where they are
there `generation_config.json` (end tokens) and `tokenizer_config.json` (chat template).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from smcscale.models import parameters
from smcscale.models.parameters import Checkpoint, Placement
from smcscale.models.reasoning import transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.chat import ChatTemplate
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer


def load_backbone(
    path: str | Path,
    *,
    writes: bool = True,
    dtype: Any = "float32",
    sharding: Placement | None = None,
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The transformer, the tokenizer and all tensors of a model folder, read when asked for.

    Unless it `writes`, the network may lack the matrix that makes logits.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"smcscale: {path} is not a folder. Expected a model folder in the Hugging Face "
            "layout (config.json, model.safetensors, tokenizer.json)."
        )
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f'smcscale: dtype must be "float32" or "bfloat16", got {dtype!r}.')
    config = Config.from_hf(parameters.read_json(path / "config.json"), str(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.is_file():  # chat models add the token that ends a turn here
        config = config.with_end_tokens(parameters.read_json(generation).get("eos_token_id"))
    tensors = Checkpoint(path)
    if not writes and "lm_head.weight" not in tensors:
        config = replace(config, tied=True)
    model = transformer.from_hf(
        config, tensors, str(path), dtype=jnp.dtype(dtype), sharding=sharding
    )
    tokenizer = Tokenizer.from_file(
        path / "tokenizer.json", config.end_tokens, ChatTemplate.from_folder(path)
    )
    return model, tokenizer, tensors
