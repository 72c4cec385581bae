"""phi-decoding: choose each step by the text it would lead to, without a reward model.

    found = phi_decoding(key, foreseeing(lm, prompt), budget=Budget(tokens=8000))
    majority([final_answer(text) for text in found.texts])

Every round lengthens B texts by one step (log probabilities are means over tokens, nats):

| stage | what is done |
|---|---|
| 1 | R next steps of each text; the improbable ones are dropped (`kept_by_width`) |
| 2 | foresight: each kept step is rolled out to the end of the text, F its log probability |
| 3 | B steps are drawn without replacement by `selection_weights`: advantage and agreement |

The advantage of a step is F minus the F of the step it follows (0 at first); agreement is the share
of foresights in the same cluster.  When one cluster has nearly all, or after `foresights` rounds,
each text is finished as it comes.  A text that ends earlier is put aside, and one fewer goes on.

Departures from the published program: foresights are clustered by TF-IDF of tokens, not words, and
by a k-means that starts from points far apart instead of random ones (`clustered`), which needs no
scikit-learn; steps without advantage are not dropped before clustering; all texts are returned,
none is drawn from them.  No target distribution, no evidence.

Source: Xu et al. 2025, "phi-Decoding" (arXiv 2503.13288), sections 3.2 to 3.4, and its program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from smcscale.keys import as_key
from smcscale.models.reasoning.decode import TextState
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.search_problem import (
    Budget,
    Found,
    SearchProblem,
    Tree,
    expanded,
    found,
    num_rows,
)


class Foresight(NamedTuple):
    """What phi-decoding works on.

    Attributes:
        step: a problem whose children are one step longer.
        finish: a problem whose children are finished texts.  The score of a child of either is the
            exponential of the mean log probability of the tokens added, 1 if none was.
        words: token ids of a state's text.
    """

    step: SearchProblem
    finish: SearchProblem
    words: Callable[[Any], np.ndarray]


class _Beam(NamedTuple):
    node: int
    state: Any
    foreseen: float


def phi_decoding(
    key: Any,
    problem: Foresight,
    *,
    budget: Budget,
    beams: int = 4,
    rollouts: int = 4,
    foresights: int = 8,
    clusters: int = 3,
    temperature: float = 0.1,
    spread: float = 1.0,
    agreement: float = 0.69,
    least_foresights: int = 4,
) -> Found:
    """Texts whose steps were chosen by foresight.

    Args:
        key: random key.
        problem: `foreseeing(lm, prompt, batch=beams * rollouts)`.
        budget: never exceeded; a round is begun only if the texts can be finished after it.
        beams, rollouts: B texts, R next steps of each.
        foresights: rounds at most.
        clusters: of foresights.
        temperature: of the advantages.
        spread: steps are dropped that many standard deviations below the mean.
        agreement: share of the largest cluster at which foresight ends.
        least_foresights: not before so many rounds.
    Returns:
        `Found`: finished texts, `scores` their probabilities per token (geometric mean) from the
        last choice on, `tree` the steps tried in stage 1, scored likewise.
    Raises:
        ValueError: a budget without end, or too small to finish one text; too small a batch.
    """
    key = as_key(key)
    budget.check()
    size = beams * rollouts
    if not 1 <= size <= min(problem.step.batch, problem.finish.batch):
        raise ValueError(
            f"smcscale: {beams} beams of {rollouts} rollouts need a batch of {size}, the problem's "
            f"is {problem.step.batch}.\n  try: foreseeing(lm, prompt, batch={size})."
        )
    spent: dict[str, float] = {}
    if budget.rows(spent, problem.finish.most) == 0:
        raise ValueError(f"smcscale: {budget} cannot pay for one text.\n  try: a larger budget.")
    parents, scores = [-1], [np.nan]
    live = [_Beam(0, problem.step.root, 0.0)] * beams
    ended: list[tuple[int, Any, float]] = []
    for depth in range(foresights):
        if not live or budget.rows(spent, _round(problem, len(live), rollouts)) < 1:
            break
        step_key, prune_key, look_key, draw_key = jax.random.split(
            jax.random.fold_in(key, depth), 4
        )
        asked = [beam for beam in live for _ in range(rollouts)]
        steps = expanded(problem.step, step_key, [beam.state for beam in asked], spent)
        first = len(parents)
        parents += [beam.node for beam in asked]
        scores += [score for _, score, _ in steps]
        probable = np.log([score for _, score, _ in steps])
        kept = kept_by_width(prune_key, probable, len(live), temperature, spread)

        futures = expanded(problem.finish, look_key, [steps[i][0] for i in kept], spent)
        said = [problem.words(steps[i][0]) for i in kept]
        ahead = [problem.words(state)[len(w) :] for (state, *_), w in zip(futures, said)]
        foreseen = np.array([
            np.log(score) if len(words) else probable[i]  # a step that ends the text speaks for itself
            for (_, score, _), words, i in zip(futures, ahead, kept)
        ])  # fmt: skip
        advantages = foreseen - [asked[i].foreseen for i in kept]

        labels = clustered(tf_idf(ahead), clusters)
        weights = selection_weights(advantages, labels, temperature)
        drawn = jax.random.choice(
            draw_key, len(kept), (len(live),), replace=False, p=jnp.asarray(weights)
        )
        live = []
        for place in np.asarray(drawn):
            number = kept[place]
            state, score, over = steps[number]
            if over:
                ended.append((first + number, state, score))
            else:
                live.append(_Beam(first + number, state, float(foreseen[place])))
        if depth + 1 >= least_foresights and np.bincount(labels).max() >= agreement * len(kept):
            break
    live = sorted(live, key=lambda beam: -beam.foreseen)[: budget.rows(spent, problem.finish.most)]
    if live:
        last_key = jax.random.fold_in(key, foresights)
        finished = expanded(problem.finish, last_key, [beam.state for beam in live], spent)
        for beam, (state, score, _) in zip(live, finished, strict=True):
            ended.append((len(parents), state, score))
            parents.append(beam.node)
            scores.append(score)
    actions = np.where(np.asarray(parents) < 0, -1, 0).astype(np.int32)
    tree = Tree(np.asarray(parents, np.int32), actions, np.asarray(scores))
    states = {node: state for node, state, _ in ended}
    return found(problem.finish, tree, [node for node, *_ in ended], states, spent)


def _round(problem: Foresight, live: int, rollouts: int) -> dict[str, float]:
    """The most that a round and the end after it can cost."""
    each = live * rollouts
    most = {"expansions": 2.0 * each + live}
    for name in problem.step.most | problem.finish.most:
        step, finish = problem.step.most.get(name, 0.0), problem.finish.most.get(name, 0.0)
        most[name] = each * step + (each + live) * finish
    return most


def kept_by_width(
    key: Any, probable: np.ndarray, least: int, temperature: float, spread: float
) -> list[int]:
    """Steps within `spread` standard deviations below the mean log probability, or above it.

    At least `least`: what is missing is drawn from the others, without replacement, by
    `softmax(probable / temperature)`.
    """
    probable = np.asarray(probable, float)
    good = probable > probable.mean() - spread * probable.std()
    kept, dropped = np.flatnonzero(good), np.flatnonzero(~good)
    missing = min(max(least - len(kept), 0), len(dropped))
    if missing:
        weights = _softmax(probable[dropped] / temperature)
        more = jax.random.choice(key, dropped, (missing,), replace=False, p=jnp.asarray(weights))
        kept = np.append(kept, np.asarray(more))
    return sorted(int(i) for i in kept)


def tf_idf(texts: list[np.ndarray]) -> np.ndarray:
    """Rows `(n, words)` of unit length: counts of tokens, the rarer ones heavier (smoothed idf)."""
    vocabulary = np.unique(np.concatenate([*texts, np.zeros(0, np.int32)]))
    counts = np.stack([(text[:, None] == vocabulary).sum(0) for text in texts]).astype(float)
    shares = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    rows = counts * shares
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def clustered(rows: np.ndarray, clusters: int, iterations: int = 50) -> np.ndarray:
    """Cluster of each row by k-means; fewer clusters if there are fewer distinct rows.

    The first center is the row nearest to the mean, each next one the row farthest from all before.
    """
    centers = rows[[np.argmin(_distances(rows, rows.mean(0, keepdims=True))[:, 0])]]
    while len(centers) < clusters:
        nearest = _distances(rows, centers).min(axis=1)
        if nearest.max() <= 1e-12:
            break
        centers = np.append(centers, rows[[np.argmax(nearest)]], axis=0)
    labels = np.argmin(_distances(rows, centers), axis=1)
    for _ in range(iterations):
        centers = np.stack([
            rows[labels == i].mean(0) if (labels == i).any() else centers[i]
            for i in range(len(centers))
        ])  # fmt: skip
        before, labels = labels, np.argmin(_distances(rows, centers), axis=1)
        if (before == labels).all():
            break
    return labels


def selection_weights(advantages: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Chances of steps: half by `softmax(advantage / temperature)`, half by softmax of the share
    of foresights in the same cluster."""
    shares = np.bincount(labels)[labels] / len(labels)
    return (_softmax(np.asarray(advantages) / temperature) + _softmax(shares)) / 2


def _distances(rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return ((rows[:, None] - centers) ** 2).sum(-1)


def _softmax(values: np.ndarray) -> np.ndarray:
    shares = np.exp(values - np.max(values))
    return shares / shares.sum()


def foreseeing(lm: LanguageModel, prompt: Any, *, batch: int = 16) -> Foresight:
    """A language model as phi-decoding wants it.

    Args:
        lm: writes; the paper's temperature is 0.6.  Probabilities are the model's own, at
            temperature 1.
        prompt: text or token ids.
        batch: texts in one call; beams times rollouts.
    """
    lm = lm.given(prompt)

    def problem(steps: int, most: int) -> SearchProblem:
        return SearchProblem(
            root=lm.start(),
            expand=lambda key, states, count: _lengthened(
                key, lm, states, jnp.asarray(count), steps
            ),
            finished=lambda states: states.written.finished,
            batch=batch,
            most={"tokens": float(most)},
            text=lm.text,
        )

    def words(state: TextState) -> np.ndarray:
        return np.asarray(state.written.tokens)[: int(state.written.length)]

    return Foresight(problem(1, lm.step_tokens), problem(lm.max_tokens, lm.max_tokens), words)


@eqx.filter_jit
def _lengthened(key, lm: LanguageModel, states: TextState, count: Int32[Array, ""], steps: int):
    """Texts after so many more steps, with the probability of a token and what was written."""
    before = states.written
    padding = jnp.arange(num_rows(states)) >= count
    texts = eqx.tree_at(lambda t: t.written.finished, states, before.finished | padding)

    def going(carry):
        number, texts = carry
        return (number < steps) & ~jnp.all(texts.written.finished)

    def one_step(carry):
        number, texts = carry
        draw = jax.random.fold_in(key, number)
        return number + 1, jax.vmap(lambda text: lm.next_step(text).sample(draw))(texts)

    _, texts = jax.lax.while_loop(going, one_step, (jnp.zeros((), jnp.int32), texts))
    length = texts.written.length - before.length
    mean = (texts.written.log_prob - before.log_prob) / jnp.maximum(length, 1)
    return texts, jnp.exp(mean), {"tokens": length}
