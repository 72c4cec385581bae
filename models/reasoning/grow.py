"""Trees of texts: of a run with all its particles, or of texts alone.

| name | what it is |
|---|---|
| `from_run` | of a run that kept every particle of every row: also the branches that died |
| `from_texts` | of texts alone, such as `solution.texts`: what survived |

A branch is counted by the text up to it.  Read next: `tree.py`, how a tree looks.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smcscale.models.reasoning.decode import TextState
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.tree import Tree
from smcscale.result import Result


@dataclass
class _Branch:
    """A step while it is counted."""

    parent: Hashable
    text: str
    num_particles: int = 0
    num_final: int = 0
    weight: float = 0.0
    scores: list[float] = field(default_factory=list)


def from_run(smc: Any, lm: LanguageModel, run: int = 0, *, question: str = "") -> Tree:
    """The tree of one run of `reason`, or of another program with a `TextState` at its site "step".

    Args:
        smc: a run, or its `Result`, with `store="paths"`.
        lm: the model that wrote; without a tokenizer steps are shown as token ids.
        run: 0-based.
        question: text of the root.
    Returns:
        Scores are those of the site "score", where the program has one.
    Raises:
        ValueError: a run that did not keep all particles.
        TypeError: one that wrote no steps of text.
        IndexError: no such run.
    """
    result = smc if isinstance(smc, Result) else smc.result
    history = result.history
    if history is None or history.kind != "paths":
        raise ValueError(
            "smcscale: a tree of a run needs the particles of every row, also of those that died, "
            f'and this run kept store="{result.store}".\n'
            '  try: ParticleFilter(..., store="paths"), or from_texts for the final texts alone.'
        )
    if not 0 <= run < result.num_runs:
        raise IndexError(f"smcscale: `run` must be in [0, {result.num_runs}), got {run}.")
    sites = history.states if isinstance(history.states, dict) else {}
    step = sites.get("step")
    if not isinstance(step, TextState):
        raise TypeError(
            'smcscale: this run wrote no steps of text: it has no `TextState` at a site "step".\n'
            "  try: a run of `reason`."
        )
    read = lambda leaf: np.asarray(leaf)[:, run]
    written = step.written
    tokens, begins, lengths = read(written.tokens), read(written.begin), read(written.length)
    scores = read(sites["score"]) if "score" in sites else None
    branches: dict[Hashable, _Branch] = {}
    for row, particle in np.ndindex(lengths.shape):
        begin, length = begins[row, particle], lengths[row, particle]
        if begin == length:  # a finished text that waits
            continue
        text = tokens[row, particle, :length].tolist()
        told = _told(lm, text[begin:])
        branch = branches.setdefault(tuple(text), _Branch(tuple(text[:begin]), told))
        branch.num_particles += 1
        if scores is not None:
            branch.scores.append(float(scores[row, particle]))
    ends = [tuple(row[:n].tolist()) for row, n in zip(tokens[-1], lengths[-1], strict=True)]
    weights = _weights(np.asarray(result.log_weights)[run])
    return _grown(question, branches, ends, weights, lengths.shape[1])


def from_texts(
    texts: Sequence[Sequence[str]],
    scores: Sequence[Any] | None = None,
    log_weights: Any = None,
    *,
    question: str = "",
) -> Tree:
    """The tree of some texts, each a sequence of steps.

    Args:
        texts: `N` of them.
        scores: of their steps, a row for each text, such as `prm.score(prompt, steps)`.
        log_weights: `(N,)`, nats; all alike when None.
        question: text of the root.
    Raises:
        ValueError: no texts, or scores and log-weights of another number.
    """
    if not texts:
        raise ValueError("smcscale: a tree needs a text, got none.")
    log_weights = np.zeros(len(texts)) if log_weights is None else np.asarray(log_weights)
    if log_weights.shape != (len(texts),):
        raise ValueError(
            f"smcscale: `log_weights` has shape {log_weights.shape}, there are {len(texts)} texts."
        )
    counts = [len(text) for text in texts]
    if scores is not None and [len(row) for row in scores] != counts:
        raise ValueError("smcscale: `scores` must have one number for each step of each text.")
    branches: dict[Hashable, _Branch] = {}
    for index, text in enumerate(texts):
        for n, step in enumerate(text):
            held = tuple(text[: n + 1])
            branch = branches.setdefault(held, _Branch(held[:-1], step))
            branch.num_particles += 1
            if scores is not None:
                branch.scores.append(float(scores[index][n]))
    ends = [tuple(text) for text in texts]
    return _grown(question, branches, ends, _weights(log_weights), len(texts))


def _grown(
    question: str,
    branches: dict[Hashable, _Branch],
    ends: Sequence[Hashable],
    weights: np.ndarray,
    num_particles: int,
) -> Tree:
    """The tree of branches by the text up to them, and of the texts that final particles hold."""
    for end, weight in zip(ends, weights, strict=True):
        while end != ():
            branch = branches[end]
            branch.num_final += 1
            branch.weight += float(weight)
            end = branch.parent
    children: dict[Hashable, list[Hashable]] = {}
    for held, branch in branches.items():
        children.setdefault(branch.parent, []).append(held)

    def subtrees(held: Hashable) -> tuple[Tree, ...]:
        found = [
            Tree(
                branch.text,
                branch.num_particles,
                branch.num_final,
                branch.weight,
                float(np.mean(branch.scores)) if branch.scores else None,
                subtrees(each),
            )
            for each in children.get(held, [])
            for branch in [branches[each]]
        ]
        return tuple(sorted(found, key=lambda tree: -tree.num_particles))

    return Tree(question, num_particles, len(ends), float(weights.sum()), None, subtrees(()))


def _weights(log_weights: np.ndarray) -> np.ndarray:
    """Shares of the weight `(N,)`; zeros if all are dead."""
    largest = np.max(log_weights)
    if not np.isfinite(largest):
        return np.zeros(len(log_weights))
    weights = np.exp(np.asarray(log_weights, np.float64) - largest)
    return weights / weights.sum()


def _told(lm: LanguageModel, tokens: list[int]) -> str:
    return " ".join(map(str, tokens)) if lm.tokenizer is None else lm.decode(tokens).strip()
