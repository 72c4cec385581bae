"""Labels for a reward model: is a prefix right, and how often does the model get there from it?

`sample_solutions` writes a solution for each training story; `label` picks line ends in it,
lets the model finish `completions` times from each, and labels the prefix with the share that
reaches the right answer; the last line is labelled by the answer itself.

`check` compares a solution with the worked one, token by token; `damaged` makes wrong lines for
the reward model to learn what an error looks like before it sees roll-outs.

Source: Wang et al. 2024, "Math-Shepherd", section 3.3 (soft estimation).
"""

import functools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smcscale.models.reasoning import cache, decode, tasks
from smcscale.models.reasoning.decode import Prompted, Written
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.models.reasoning.transformer import Transformer

LONGEST_PROMPT = 288
LONGEST_SOLUTION = 144


class Labelled(NamedTuple):
    """Token rows `(n, S)`, line ends `(n, K)`, their labels `(n, K)`, checks `(n, S)`; NaN: unused."""

    tokens: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    checks: np.ndarray


def check(tokenizer: Tokenizer, story: tasks.Problem, prompt_length: int, text: list[int]):
    """Marks `(prompt_length + len(text),)`: 1 while all numbers agree with the worked solution.

    NaN on the prompt; 0 from the first token that differs on. Names are not compared: a wrong
    name with right numbers can still reach the answer.
    """
    newline, colon = tokenizer.encode("\n")[0], tokenizer.encode(":")[0]
    marks = np.full(prompt_length + len(text), np.nan, np.float32)
    worked = [tokenizer.encode(step) + [newline] for step in story.steps]
    worked[-1][-1] = tokenizer.end_tokens[0]
    line, column, right = 0, None, True
    for index, token in enumerate(text):
        if right and column is not None:
            truth = worked[line]
            at = truth.index(colon) + 1 + column
            right = at < len(truth) and truth[at] == token
            column += 1
        elif right and token in (newline, tokenizer.end_tokens[0]):
            right = False  # a line without a colon
        marks[prompt_length + index] = float(right)
        if token == colon and column is None:
            column = 0
        if token == newline:
            line, column = line + 1, None
            right = right and line < len(worked)
    return marks


def damaged(rng: random.Random, tokenizer: Tokenizer, width: int, num_steps: int):
    """A story, its worked solution up to a line with one wrong digit (or none): tokens and marks."""
    story = tasks.problem(rng, "train", num_steps)
    newline, colon = tokenizer.encode("\n")[0], tokenizer.encode(":")[0]
    prompt = tokenizer.encode(story.question + "\n")
    digits = tokenizer.encode("0123456789")
    lines = [tokenizer.encode(step) + [newline] for step in story.steps]
    lines[-1][-1] = tokenizer.end_tokens[0]
    bad = rng.randrange(len(lines))
    if rng.random() < 0.8:
        line = lines[bad]
        places = [i for i, t in enumerate(line) if t in digits and i > line.index(colon)]
        if rng.random() < 0.6 and "=" in story.steps[bad]:
            after = line.index(tokenizer.encode("=")[0])
            places = [i for i in places if i > after]
        place = rng.choice(places)
        line[place] = rng.choice([d for d in digits if d != line[place]])
    text = [token for line in lines[: bad + 1] for token in line]
    tokens = np.zeros(width, np.int32)
    marks = np.full(width, np.nan, np.float32)
    row = (prompt + text)[:width]
    tokens[: len(row)] = row
    marks[: len(row)] = check(tokenizer, story, len(prompt), text)[:width]
    return tokens, marks


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _complete(graph, weights, tokens, lengths, key, completions, end_tokens):
    model = nnx.merge(graph, weights)
    by_layer = cache.read_batch(model, tokens)
    batch = tokens.shape[0] * completions
    prompt = Prompted(tokens, lengths, by_layer)
    zero = jnp.zeros(batch, jnp.int32)
    blank = jax.vmap(lambda _: cache.empty(model.config, LONGEST_SOLUTION))(zero)
    states = Written(
        jnp.zeros((batch, LONGEST_SOLUTION), jnp.int32), zero, zero, zero.astype(bool), blank
    )
    ends = jnp.zeros(model.config.vocabulary_size, bool).at[jnp.asarray(end_tokens)].set(True)
    uniforms = jax.random.uniform(key, (batch, LONGEST_SOLUTION))
    out = decode.token_loop(
        model, ends, jnp.ones(()), end_tokens, uniforms, prompt, by_layer, states
    )
    return out.tokens, out.length


def complete(model: Transformer, prefixes: list[list[int]], completions: int, key, batch: int = 64):
    """Finish every prefix `completions` times; a list of lists of token rows."""
    graph, weights = nnx.split(model)
    finished = []
    order = np.argsort([-len(p) for p in prefixes], kind="stable")  # alike lengths together
    results: dict[int, list[list[int]]] = {}
    size = batch // completions
    for start in range(0, len(prefixes), size):
        chunk = order[start : start + size]
        tokens = np.zeros((size, LONGEST_PROMPT), np.int32)
        lengths = np.ones(size, np.int32)
        for row, index in enumerate(chunk):
            tokens[row, : len(prefixes[index])] = prefixes[index]
            lengths[row] = len(prefixes[index])
        out, counts = _complete(
            graph, weights, tokens, lengths, jax.random.fold_in(key, start), completions,
            model.config.end_tokens,
        )  # fmt: skip
        out, counts = np.asarray(out), np.asarray(counts)
        for row, index in enumerate(chunk):
            each = range(row * completions, (row + 1) * completions)
            results[int(index)] = [out[b, : counts[b]].tolist() for b in each]
    finished = [results[index] for index in range(len(prefixes))]
    return finished


def label(
    model: Transformer,
    tokenizer: Tokenizer,
    rng: random.Random,
    key,
    *,
    solutions: int,
    positions: int,
    completions: int,
) -> tuple[Labelled, dict]:
    """Labelled solutions of fresh training stories, and what was seen on the way.

    Args:
        model: the language model that writes and completes.
        rng: source of the stories and of the chosen line ends.
        key: for the samples.
        solutions: how many solutions; one for each story.
        positions: line ends labelled by completions in each, besides the last.
        completions: roll-outs from each.
    """
    end = tokenizer.end_tokens[0]
    newline = tokenizer.encode("\n")[0]
    stories, prompts = [], []
    while len(stories) < solutions:
        story = tasks.problem(rng, "train")
        prompt = tokenizer.encode(story.question + "\n")
        if len(prompt) + LONGEST_SOLUTION <= LONGEST_PROMPT + 16:
            stories.append(story)
            prompts.append(prompt)
    written = [w[0] for w in complete(model, prompts, 1, jax.random.fold_in(key, 0))]
    prefixes, owners = [], []
    tokens = np.zeros((solutions, LONGEST_PROMPT + LONGEST_SOLUTION), np.int32)
    ends = np.zeros((solutions, positions + 1), np.int32)
    labels = np.full((solutions, positions + 1), np.nan, np.float32)
    checks = np.full(tokens.shape, np.nan, np.float32)
    right_lines = lines = solved = 0
    for row, (story, prompt, text) in enumerate(zip(stories, prompts, written)):
        tokens[row, : len(prompt) + len(text)] = prompt + text
        marks = check(tokenizer, story, len(prompt), text)
        checks[row, : len(marks)] = marks
        right = text[-1] == end and tasks.grade(tokenizer.decode(text), story)
        ends[row, 0] = len(prompt) + len(text) - 1
        labels[row, 0] = float(right)
        solved += right
        seen = _leading_right(tokenizer.decode(text), story)
        right_lines += seen[0]
        lines += seen[1]
        breaks = [i for i, token in enumerate(text) if token == newline]
        breaks = [i for i in breaks if len(prompt) + i + 1 <= LONGEST_PROMPT]
        for column, at in enumerate(rng.sample(breaks, min(positions, len(breaks))), start=1):
            ends[row, column] = len(prompt) + at
            prefixes.append(prompt + text[: at + 1])
            owners.append((row, column))
    completed = complete(model, prefixes, completions, jax.random.fold_in(key, 1))
    for (row, column), prefix, texts in zip(owners, prefixes, completed):
        head = prefix[len(prompts[row]) :]
        good = [tasks.grade(tokenizer.decode(head + t), stories[row]) for t in texts]
        labels[row, column] = np.mean(good)
    seen = {"solved": solved / solutions, "right step": right_lines / max(lines, 1)}
    return Labelled(tokens, ends, labels, checks), seen


def _leading_right(text: str, story: tasks.Problem) -> tuple[int, int]:
    """Steps up to the first wrong one: how many are right, how many were tried."""
    marks = tasks.right_steps(text, story)
    right = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    return right, min(right + 1, len(marks))
