"""Labels for a reward model: how often does the language model get to the answer from a prefix?

`label` lets the model write a solution of each training story, picks line ends in it, and lets the
model finish `completions` times from each.  Every one of these texts is a roll-out, right or wrong,
and a prefix is labelled with the share of right ones among the roll-outs from the first picked
line end that has this prefix: an unbiased Monte Carlo estimate of the chance to get there.

Source: Wang et al. 2024, "Math-Shepherd", section 3.3 (soft estimation). They label the picked
line ends only; here all line ends of all roll-outs are prefixes with a label, which costs no more.
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
    """Texts and the labels of their prefixes.

    Attributes:
        tokens: `(n, S)` int32, prompt and solution, zeros after them.
        labels: `(n, S)` float16 in [0, 1]: of the prefix that ends with this token; NaN where it
            ends no line, or belongs to the part that a text shares with another row.
        begin: `(n,)` int32, length of the prompt.
    """

    tokens: np.ndarray
    labels: np.ndarray
    begin: np.ndarray


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
    return [results[index] for index in range(len(prefixes))]


def label(
    model: Transformer,
    tokenizer: Tokenizer,
    rng: random.Random,
    key,
    *,
    stories: int,
    positions: int,
    completions: int,
) -> tuple[Labelled, dict]:
    """Labelled roll-outs of fresh training stories, and what was seen on the way.

    Args:
        model: the language model that writes and completes.
        rng: source of the stories and of the picked line ends.
        key: for the samples.
        stories: how many stories; one solution is written for each.
        positions: line ends picked in each solution.
        completions: roll-outs from each of them.
    """
    newline = tokenizer.encode("\n")[0]
    told, prompts = [], []
    while len(told) < stories:
        story = tasks.problem(rng, "train")
        prompt = tokenizer.encode(story.question + "\n")
        if len(prompt) + LONGEST_SOLUTION <= LONGEST_PROMPT + 16:
            told.append(story)
            prompts.append(prompt)
    written = [w[0] for w in complete(model, prompts, 1, jax.random.fold_in(key, 0))]
    prefixes, owners = [], []
    for number, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
        breaks = [i for i, token in enumerate(text) if token == newline]
        breaks = [i for i in breaks if len(prompt) + i + 1 <= LONGEST_PROMPT]
        for at in sorted(rng.sample(breaks, min(positions, len(breaks)))):
            prefixes.append(prompt + text[: at + 1])
            owners.append(number)
    completed = complete(model, prefixes, completions, jax.random.fold_in(key, 1))

    def right(number: int, text: list[int]) -> float:
        ended = text[-1] == tokenizer.end_tokens[0]
        return float(ended and tasks.grade(tokenizer.decode(text), told[number]))

    width = LONGEST_PROMPT + LONGEST_SOLUTION
    tokens, labels, begins = [], [], []

    def add(number: int, row: list[int], marks: np.ndarray) -> None:
        ids = np.zeros(width, np.int32)
        ids[: len(row)] = row[:width]
        label = np.full(width, np.nan, np.float16)
        label[: len(marks)] = marks[:width]
        label[~np.isin(ids, (newline, tokenizer.end_tokens[0]))] = np.nan
        tokens.append(ids)
        labels.append(label)
        begins.append(len(prompts[number]))

    branches: dict[int, list[tuple[int, list[list[int]]]]] = {n: [] for n in range(stories)}
    for number, prefix, texts in zip(owners, prefixes, completed, strict=True):
        branches[number].append((len(prefix), texts))
    right_lines = lines = solved = 0
    for number, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
        own = right(number, text)
        marks = np.full(len(prompt) + len(text), np.nan)
        begin = len(prompt)
        for end, texts in branches[number]:
            head = (prompt + text)[len(prompt) : end]
            good = [right(number, head + rest) for rest in texts]
            marks[begin:end] = np.mean([own, *good])
            begin = end
            for rest, outcome in zip(texts, good, strict=True):
                branch = np.full(end + len(rest), np.nan)
                branch[end:] = outcome
                add(number, prompt + head + rest, branch)
        marks[begin:] = own
        add(number, prompt + text, marks)
        solved += own
        seen = _leading_right(tokenizer.decode(text), told[number])
        right_lines += seen[0]
        lines += seen[1]
    seen = {"solved": solved / stories, "right step": right_lines / max(lines, 1)}
    return Labelled(np.stack(tokens), np.stack(labels), np.asarray(begins, np.int32)), seen


def _leading_right(text: str, story: tasks.Problem) -> tuple[int, int]:
    """Steps up to the first wrong one: how many are right, how many were tried."""
    marks = tasks.right_steps(text, story)
    right = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    return right, min(right + 1, len(marks))
