"""Remake the shipped language model and process reward model from a seed.

    python -m smcscale.models.reasoning.train --out FOLDER --steps 4500

Three stages, each from the result of the one before: (1) the language model learns to continue
training stories with worked solutions, loss on the solution only, short stories first; (2) it
samples solutions of fresh training stories and, from prefixes of them, `--completions` ways to
go on: the share that reaches the right answer labels the prefix; (3) a value head on the same
network, frozen, learns these shares from what the network tells at the end of each line: its hidden
state, and how likely it found the text itself.  No test story is ever used.

The head reads that likelihood because 0.8 M parameters did not learn to check their own arithmetic:
fine-tuned on the same labels they told hard stories from easy ones, but not right solutions of one
story from wrong ones.

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
from smcscale.models.reasoning import reward_model, rollouts, tasks, transformer
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.rollouts import Labelled
from smcscale.models.reasoning.tokenizer import Tokenizer, word_level

FIRST_HELD_OUT = range(31, 40)  # numbers that the first part of training avoids
SHORT = (3, 4, 5)  # story lengths of the first part of training
PADDED = {3: 112, 4: 136, 5: 160, 6: 184, 7: 208, 8: 228, 9: 248, 10: 272}


def configuration(vocabulary_size: int) -> Config:
    """The shipped shape: Qwen2 layout, 0.8 M parameters."""
    return Config(
        family="Qwen2", vocabulary_size=vocabulary_size, hidden_size=128, num_layers=4,
        num_heads=4, num_kv_heads=2, head_size=32, mlp_size=384, max_length=512, end_tokens=(2,),
    )  # fmt: skip


def batch(rng: random.Random, tokenizer: Tokenizer, num_steps: int, size: int, held_out):
    """Stories with solutions: tokens `(size, S)` int32 and the mask of solution tokens.

    Stories that do not fit `PADDED[num_steps]` tokens are replaced.
    """
    length = PADDED[num_steps]
    tokens = np.zeros((size, length), np.int32)
    solution = np.zeros((size, length), bool)
    row = 0
    while row < size:
        story = tasks.problem(rng, "train", num_steps, held_out)
        prompt, rest = tokenizer.encode_batch([story.question + "\n", story.solution])
        ids = [*prompt, *rest, tokenizer.end_tokens[0]]
        if len(ids) <= length:
            tokens[row, : len(ids)] = ids
            solution[row, len(prompt) : len(ids)] = True
            row += 1
    return tokens, solution


def train_language_model(
    args, model, tokenizer: Tokenizer, part: int, log=print
) -> transformer.Transformer:
    """Stage 1, in two parts with one learning schedule each.

    Part 1 starts with short stories and avoids a wider range of numbers; its schedule is meant
    for `args.steps`, of which `args.first` are taken.  Part 2 takes `args.second` more, with the
    learning rate falling to zero.  Checkpoints go into `args.out`.
    """
    graph, weights = nnx.split(model)
    if part == 1:
        steps, offset, held_out = args.first, 0, FIRST_HELD_OUT
        short_until = args.steps * args.short_part
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, args.learning_rate, 100, args.steps, 0.05 * args.learning_rate
        )
    else:
        steps, offset, held_out = args.second, args.first, tasks.HELD_OUT_NUMBERS
        short_until = 0
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, args.second_rate, 30, args.second, 0.02 * args.second_rate
        )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01)
    )
    state = optimizer.init(weights)

    def loss(weights, tokens, solution):
        model = nnx.merge(graph, weights)
        logits = model.logits(model(tokens[:, :-1], unroll=model.config.num_layers))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        mask = solution[:, 1:]
        right = (jnp.argmax(logits, -1) == tokens[:, 1:]) & mask
        return jnp.sum(losses * mask) / jnp.sum(mask), jnp.sum(right) / jnp.sum(mask)

    @jax.jit
    def step(weights, state, tokens, solution):
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(weights, tokens, solution)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value, right

    name = "smcscale language model" if part == 1 else "smcscale language model, part 2"
    rng = random.Random(f"{name} {args.seed}")
    start = time.time()
    for index in range(steps):
        num_steps = rng.choice(SHORT if index < short_until else list(tasks.STEPS))
        tokens, solution = batch(rng, tokenizer, num_steps, args.batch_size, held_out)
        weights, state, value, right = step(weights, state, tokens, solution)
        if index % 50 == 0:
            log(
                f"language model {offset + index:5d}: loss {float(value):.4f}, tokens right "
                f"{float(right):.4f}, {time.time() - start:.0f} s",
                flush=True,
            )
        if (index + 1) % args.checkpoint_every == 0:
            parameters.save(
                Path(args.out) / f"step_{offset + index + 1:05d}.safetensors",
                transformer.to_hf(nnx.merge(graph, weights)),
            )
    return nnx.merge(graph, weights)


def fit_reward_model(args, model, labelled: Labelled, log=print) -> tuple:
    """Stage 3: the head `(1, D)`, its bias `(1,)` and its weights of the confidence `(1, 2)`.

    A logistic regression of the labels on what the frozen network tells at each line end, by L-BFGS.
    """
    inputs, labels = _readings(model, labelled)
    log(
        f"reward model: {len(labels)} labelled line ends, mean label {labels.mean():.3f}",
        flush=True,
    )
    center, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    inputs = jnp.asarray((inputs - center) / scale)

    def loss(fitted):
        logits = inputs @ fitted[0] + fitted[1]
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        return jnp.mean(losses) + args.ridge * jnp.sum(fitted[0] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(fitted, state):
        value, gradient = value_and_grad(fitted, state=state)
        updates, state = solver.update(
            gradient, state, fitted, value=value, grad=gradient, value_fn=loss
        )
        return optax.apply_updates(fitted, updates), state, value

    fitted = (jnp.zeros(inputs.shape[1]), jnp.zeros(()))
    state = solver.init(fitted)
    for index in range(args.reward_steps):
        fitted, state, value = step(fitted, state)
        if (index + 1) % 100 == 0:
            log(f"reward model, step {index + 1}: loss {float(value):.4f}", flush=True)
    weights = np.asarray(fitted[0]) / scale
    bias = float(fitted[1]) - float(weights @ center)
    return weights[None, :-2], np.asarray([bias]), weights[None, -2:]


def _readings(model, labelled: Labelled, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(m, D + 2)` and labels `(m,)` of a head at the m labelled line ends."""
    graph, weights = nnx.split(model)

    @jax.jit
    def read(weights, tokens, begin):
        return reward_model.readings(nnx.merge(graph, weights), tokens, begin)

    lengths = np.asarray([np.flatnonzero(row)[-1] + 1 for row in labelled.tokens])
    inputs, labels = [], []
    for rows in np.array_split(np.argsort(lengths), -(-len(lengths) // batch)):
        width = min(-(-int(lengths[rows].max()) // 32) * 32, labelled.tokens.shape[1])
        padded = np.resize(rows, batch)  # one shape for the compiler; the copies are dropped
        tokens = jnp.asarray(labelled.tokens[padded, :width])
        read_so_far = read(weights, tokens, jnp.asarray(labelled.begin[padded]))
        found = labelled.labels[rows, :width].astype(np.float32)
        used = ~np.isnan(found)
        both = [np.asarray(x)[: len(rows)][used] for x in read_so_far]
        inputs.append(np.concatenate(both, axis=1))
        labels.append(found[used])
    return np.concatenate(inputs), np.concatenate(labels)


def save_model(
    folder: Path, model: transformer.Transformer, tokenizer: Tokenizer, head: tuple | None = None
) -> None:
    """Write a model folder in the Hugging Face layout.

    `head` is a reward model's (weight, bias, confidence), see `reward_model.py`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = transformer.to_hf(model)
    config = model.config.to_hf() | {
        "smcscale": {"temperature": 1.0, "step_tokens": 20, "max_tokens": 160}
    }
    if head is not None:
        names = ("score.weight", "score.bias", "score.confidence")
        tensors |= dict(zip(names, head, strict=True))
        config = model.config.to_hf("ForTokenClassification") | {
            "num_labels": 1,
            "id2label": {"0": "good"},
            "label2id": {"good": 0},
        }
    parameters.save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")
    # or `transformers` takes the tokenizer of the architecture, which splits words otherwise
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    told |= {"eos_token": "<end>", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m smcscale.models.reasoning.train")
    parser.add_argument("--out", default="trained", help="folder for both models and checkpoints")
    parser.add_argument("--steps", type=int, default=4500, help="length of the learning schedule")
    parser.add_argument("--first", type=int, default=2751, help="steps taken of that schedule")
    parser.add_argument("--second", type=int, default=1300, help="steps of the second part")
    parser.add_argument("--second-rate", type=float, default=1.5e-3)
    parser.add_argument("--first-done", default=None, help="skip part 1; a .safetensors file")
    parser.add_argument("--language-done", default=None, help="skip stage 1; a .safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--short-part", type=float, default=0.35)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--stories", type=int, default=3072, help="stories with roll-outs")
    parser.add_argument(
        "--positions", type=int, default=3, help="line ends picked in each solution"
    )
    parser.add_argument("--completions", type=int, default=4, help="roll-outs from each line end")
    parser.add_argument("--labels-done", default=None, help="skip stage 2; a labels.npz file")
    parser.add_argument("--reward-steps", type=int, default=400, help="of L-BFGS")
    parser.add_argument("--ridge", type=float, default=1e-5)
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = word_level(tasks.words())
    config = configuration(tokenizer.vocabulary_size)
    done = args.language_done or args.first_done
    if done:
        model = transformer.from_hf(config, parameters.load(done))
    else:
        model = transformer.Transformer(config, rngs=nnx.Rngs(args.seed))
        model = train_language_model(args, model, tokenizer, part=1)
    if not args.language_done:
        model = train_language_model(args, model, tokenizer, part=2)
    save_model(out / "reasoner", model, tokenizer)
    # the reward model learns from the samples of the model as it is shipped, rounded to bfloat16
    model = transformer.from_hf(model.config, parameters.load(out / "reasoner"))
    if args.labels_done:
        with np.load(args.labels_done) as stored:
            labelled = Labelled(**stored)
    else:
        labelled = label_in_chunks(args, model, tokenizer)
    head = fit_reward_model(args, model, labelled)
    save_model(out / "reasoner-prm", model, tokenizer, head)


def label_in_chunks(args, model, tokenizer: Tokenizer, log=print, chunk: int = 192) -> Labelled:
    """Stage 2, in chunks so that it can be watched; the roll-outs are kept in `labels.npz`."""
    rng = random.Random(f"smcscale roll-outs {args.seed}")
    parts: list[Labelled] = []
    start = time.time()
    for number in range(-(-args.stories // chunk)):
        part, seen = rollouts.label(
            model, tokenizer, rng, jax.random.fold_in(jax.random.key(args.seed), number),
            stories=chunk, positions=args.positions, completions=args.completions,
        )  # fmt: skip
        parts.append(part)
        log(
            f"stories {(number + 1) * chunk}: solved {seen['solved']:.3f}, right step "
            f"{seen['right step']:.3f}, mean label {np.nanmean(part.labels, dtype=np.float32):.3f}, "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
    labelled = Labelled(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    np.savez_compressed(Path(args.out) / "labels.npz", **labelled._asdict())
    return labelled


if __name__ == "__main__":
    main()
