"""Remake the shipped language model and process reward model from a seed.

    python -m smcscale.models.reasoning.train --out FOLDER --steps 4500

Three stages, each from the result of the one before: (1) the language model learns to continue
training stories with worked solutions, loss on the solution only, short stories first; (2) it
samples solutions of fresh training stories and, from prefixes of them, `--completions` ways to
go on: the share that reaches the right answer labels the prefix; (3) a copy of the network with
a value head learns these shares at the last token of each step.  No test story is ever used.

Source: Wang et al. 2024, "Math-Shepherd" (section 3.3, soft estimation) for stages 2 and 3.
"""

import argparse
import json
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from smcscale.models import parameters
from smcscale.models.reasoning import tasks, transformer
from smcscale.models.reasoning.tokenizer import Tokenizer, word_level

SHORT = (3, 4, 5)  # story lengths of the first part of training
PADDED = {3: 112, 4: 136, 5: 160, 6: 184, 7: 208, 8: 228, 9: 248, 10: 272}


def configuration(vocabulary_size: int) -> transformer.Config:
    """The shipped shape: Qwen2 layout, 0.8 M parameters."""
    return transformer.Config(
        family="Qwen2", vocabulary_size=vocabulary_size, hidden_size=128, num_layers=4,
        num_heads=4, num_kv_heads=2, head_size=32, mlp_size=384, max_length=512, end_tokens=(2,),
    )  # fmt: skip


def batch(rng: random.Random, tokenizer: Tokenizer, num_steps: int, size: int):
    """Stories with solutions: tokens `(size, S)` int32 and the mask of solution tokens.

    Stories that do not fit `PADDED[num_steps]` tokens are replaced.
    """
    length = PADDED[num_steps]
    tokens = np.zeros((size, length), np.int32)
    solution = np.zeros((size, length), bool)
    row = 0
    while row < size:
        story = tasks.problem(rng, "train", num_steps)
        prompt, rest = tokenizer.encode_batch([story.question + "\n", story.solution])
        ids = [*prompt, *rest, tokenizer.end_tokens[0]]
        if len(ids) <= length:
            tokens[row, : len(ids)] = ids
            solution[row, len(prompt) : len(ids)] = True
            row += 1
    return tokens, solution


def train_language_model(args, tokenizer: Tokenizer, log=print) -> transformer.Transformer:
    """Stage 1; writes a checkpoint every `args.checkpoint_every` steps into `args.out`."""
    config = configuration(tokenizer.vocabulary_size)
    model = transformer.Transformer(config, rngs=nnx.Rngs(args.seed))
    graph, weights = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, 100, args.steps, 0.05 * args.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01)
    )
    state = optimizer.init(weights)

    def loss(weights, tokens, solution):
        model = nnx.merge(graph, weights)
        logits = model.logits(model(tokens[:, :-1], unroll=config.num_layers))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        mask = solution[:, 1:]
        right = (jnp.argmax(logits, -1) == tokens[:, 1:]) & mask
        return jnp.sum(losses * mask) / jnp.sum(mask), jnp.sum(right) / jnp.sum(mask)

    @jax.jit
    def step(weights, state, tokens, solution):
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(weights, tokens, solution)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value, right

    rng = random.Random(f"smcscale language model {args.seed}")
    start = time.time()
    for index in range(args.steps):
        short = index < args.steps * args.short_part
        num_steps = rng.choice(SHORT if short else list(tasks.STEPS))
        tokens, solution = batch(rng, tokenizer, num_steps, args.batch_size)
        weights, state, value, right = step(weights, state, tokens, solution)
        if index % 50 == 0:
            log(
                f"language model {index:5d}: loss {float(value):.4f}, tokens right "
                f"{float(right):.4f}, {time.time() - start:.0f} s",
                flush=True,
            )
        if index and index % args.checkpoint_every == 0:
            parameters.save(
                Path(args.out) / f"step_{index:05d}.safetensors",
                transformer.to_hf(nnx.merge(graph, weights)),
            )
    return nnx.merge(graph, weights)


def save_model(folder: Path, model: transformer.Transformer, tokenizer: Tokenizer) -> None:
    """Write a model folder in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters.save(folder / "model.safetensors", transformer.to_hf(model))
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m smcscale.models.reasoning.train")
    parser.add_argument("--out", default="trained", help="folder for both models and checkpoints")
    parser.add_argument("--steps", type=int, default=4500, help="training steps of the language model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--short-part", type=float, default=0.35)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = word_level(tasks.words())
    model = train_language_model(args, tokenizer)
    save_model(out / "reasoner", model, tokenizer)


if __name__ == "__main__":
    main()
