"""Language models as search problems: children by `lm.next_step`, scores by `prm.read`.

    problem = writing(lm, prm, prompt)         nodes are texts, children are one step longer
    problem, = answering(lm, prm, prompt)      nodes are whole answers, children new versions

Each call writes for the whole batch in one compiled program; another prompt of the same padded
length compiles nothing.  `writing` is for A*, `answering` for AB-MCTS (`tree_search.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from smcscale.models.reasoning import cache
from smcscale.models.reasoning.decode import Prompted, TextState, Written
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import Judged, ProcessRewardModel
from smcscale.models.reasoning.search_problem import LOWEST, SearchProblem, num_rows, row_of

# ---- nodes are unfinished texts


def writing(
    lm: LanguageModel, prm: ProcessRewardModel, prompt: Any, *, batch: int = 8
) -> SearchProblem:
    """A problem whose nodes are texts and whose children are one step longer.

    Args:
        lm: writes the steps; `lm.temperature` is that of the search.
        prm: scores each newest step.
        prompt: text or token ids.
        batch: children made in one call.
    Raises:
        ValueError: models whose token ids differ.
    """
    _check_words(lm, prm)
    lm, prm = lm.given(prompt), prm.given(prompt)
    return SearchProblem(
        root=(lm.start(), prm.start(lm)),
        expand=lambda key, states, count: _write(key, lm, prm, states, jnp.asarray(count)),
        finished=lambda states: states[0].written.finished,
        batch=batch,
        most={"tokens": float(lm.step_tokens), "prm_tokens": float(lm.step_tokens + _marks(prm))},
        text=lambda state: lm.text(state[0]),
        identity=_tokens,
    )


def _tokens(state: Any) -> bytes:
    written = state[0].written
    return np.asarray(written.tokens)[: int(written.length)].tobytes()


def _check_words(lm: LanguageModel, prm: ProcessRewardModel) -> None:
    words, judged = lm.tokenizer, prm.tokenizer
    if words is not None and judged is not None and not words.within(judged):
        raise ValueError(
            "smcscale: the language model's token ids mean other words to the reward model.\n"
            "  try: a reward model with the language model's tokenizer."
        )


def _marks(prm: ProcessRewardModel) -> int:
    """How many tokens the reward model may read for a step beside the step's own."""
    return len(prm.form.mark) + 1 if prm.form.mark else 0


@eqx.filter_jit
def _write(key, lm, prm, states, count):
    texts, judged = states
    texts, judged = _step(key, lm, prm, texts, judged, jnp.arange(num_rows(states)) >= count)
    cost = {"tokens": _newest(texts.written), "prm_tokens": judged.spent}
    return (texts, judged), judged.score, cost


def _newest(written: Written):
    """Tokens `(k,)` of the newest steps."""
    return written.length - written.begin


def _step(key, lm, prm, texts, judged, idle):
    """One step of every text that is not `idle`; the idle ones keep their length and scores."""
    was = texts.written.finished
    asleep = eqx.tree_at(lambda t: t.written.finished, texts, was | idle)

    def one(text: Any, judged: Judged):
        text = lm.next_step(text).sample(key)
        return text, prm.read(judged, text, lm.step_tokens)

    texts, judged = jax.vmap(one)(asleep, judged)
    over = jnp.where(idle, was, texts.written.finished)
    return eqx.tree_at(lambda t: t.written.finished, texts, over), judged


# ---- nodes are whole answers


class Answer(eqx.Module):
    """A whole answer, and what its models had made of it after each step.

    Attributes:
        text, judged: after the last step.
        steps: `()`, how many steps it has.
        marks: `Written` and `Judged` without tokens and caches, leaves `(max_steps + 1, ...)`: after
            so many steps.  Rows beyond `steps` mean nothing.
    """

    text: TextState
    judged: Judged
    steps: Int32[Array, "..."]
    marks: tuple[Any, Any]


def _light(written: Written, judged: Judged) -> tuple[Any, Any]:
    """What must be put back to cut a text short: tokens and caches hold up to any earlier length."""
    bare = eqx.tree_at(lambda w: (w.tokens, w.cache), written, (None, None))
    return bare, eqx.tree_at(lambda j: j.cache, judged, None)


def answering(
    lms: LanguageModel | Sequence[LanguageModel],
    prm: ProcessRewardModel,
    prompt: Any,
    *,
    max_steps: int = 12,
    batch: int = 8,
    refine: Callable[[str, str, float], str] | None = None,
    prompt_tokens: int = 256,
) -> tuple[SearchProblem, ...]:
    """Problems whose nodes are whole answers; one for each model, which is an action of AB-MCTS.

    A child of the root is a fresh answer.  What a child of an answer is, `refine` says:

    - a function `(question, answer, score) -> prompt`: the model writes a new answer to that
      prompt; the reward model still judges it as an answer to the question;
    - None: the answer is kept up to the step at which its score fell most (`r_t / r_(t-1)`,
      `r_0 = 1`), and written anew from there.  Small models that cannot read their own mistakes
      refine so; the depth of the tree is then the number of repairs.

    Args:
        lms: one model, or several that differ in temperature; with `refine`, in anything but the
            tokenizer.
        prm: judges; the score of an answer is that of its last step.
        prompt: text or token ids; text with `refine`.
        max_steps: of an answer.
        batch: answers made in one call.
        refine: see above.
        prompt_tokens: room for a prompt that `refine` returns.
    Raises:
        ValueError: models whose token ids differ, or, without `refine`, their weights; prompts that
            are too long.
    """
    models = (lms,) if isinstance(lms, LanguageModel) else tuple(lms)
    if refine is None and any(not _same_network(models[0], lm) for lm in models[1:]):
        raise ValueError(
            "smcscale: `lms` are different networks: one cannot continue what another one wrote.\n"
            "  try: refine=..., or models that differ in temperature only."
        )
    if refine is not None and not isinstance(prompt, str):
        raise ValueError("smcscale: `refine` reads text, so `prompt` must be text.")
    for lm in models:
        _check_words(lm, prm)
    judge = prm.given(prompt)
    return tuple(
        _answering(lm, judge, prompt, max_steps, batch, refine, prompt_tokens) for lm in models
    )


def _answering(lm, prm, prompt, max_steps, batch, refine, prompt_tokens) -> SearchProblem:
    given = lm.given(prompt)
    read_most = lm.max_tokens + max_steps * _marks(prm)
    most = {"tokens": float(lm.max_tokens), "prm_tokens": float(read_most)}

    def expand(key, states, count):
        if refine is None:
            return _rewrite(key, given, prm, states, jnp.asarray(count), None)
        asked = [prompt] * batch
        for row in range(count):
            if states.steps[row] > 0:
                answer = row_of(states, row)
                asked[row] = refine(prompt, lm.text(answer.text), float(answer.judged.score))
        read = _prompts(lm, asked, prompt_tokens)
        children, scores, cost = _rewrite(key, lm, prm, states, jnp.asarray(count), read)
        return children, scores, cost | {"prompt_tokens": read.length}

    text, judged = given.start(), prm.start(lm, max_steps)
    marks = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * (max_steps + 1)), _light(text.written, judged)
    )
    return SearchProblem(
        root=Answer(text, judged, jnp.zeros((), jnp.int32), marks),
        expand=expand,
        finished=lambda states: states.text.written.finished,
        batch=batch,
        most=most,
        text=lambda state: lm.text(state.text),
    )


def _same_network(one: LanguageModel, other: LanguageModel) -> bool:
    mine, theirs = jax.tree.leaves(one.weights), jax.tree.leaves(other.weights)
    return one.config == other.config and all(a is b for a, b in zip(mine, theirs))


def _prompts(lm: LanguageModel, texts: list[str], room: int) -> Prompted:
    """Prompts `(k, ...)` of one padded length."""
    encoded = [lm.encode(text) for text in texts]
    longest = max(int(length) for _, length in encoded)
    room = cache.bucketed(room)
    if longest > room:
        raise ValueError(
            f"smcscale: `refine` returned a prompt of {longest} tokens; prompt_tokens is {room}.\n"
            "  try: a shorter prompt, or a larger prompt_tokens."
        )
    tokens = jnp.stack([jnp.zeros(room, jnp.int32).at[: len(t)].set(t[:room]) for t, _ in encoded])
    return _read_prompts(lm, tokens, jnp.stack([length for _, length in encoded]))


@eqx.filter_jit
def _read_prompts(lm: LanguageModel, tokens, lengths) -> Prompted:
    read = cache.read_batch(lm.model, tokens)
    return Prompted(tokens, lengths, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), read))


@eqx.filter_jit
def _rewrite(key, lm, prm, states: Answer, count, prompts: Prompted | None):
    """New versions of all answers, from their weakest steps on, or (with prompts) from scratch."""
    logs = jnp.log(jnp.maximum(states.marks[1].score, LOWEST))
    size, rows = logs.shape
    fall = logs[:, :-1] - logs[:, 1:]
    fall = jnp.where(jnp.arange(rows - 1) < states.steps[:, None], fall, -jnp.inf)
    kept = jnp.argmax(fall, axis=1).astype(jnp.int32)  # steps before the one that fell
    kept = jnp.where((states.steps > 0) & (prompts is None), kept, 0)

    earlier = jax.tree.map(lambda leaf: leaf[jnp.arange(size), kept], states.marks)
    written, judged = eqx.combine(earlier, (states.text.written, states.judged))
    padding = jnp.arange(size) >= count  # has nothing to write
    written = eqx.tree_at(lambda w: w.finished, written, padding)
    begin = written.length

    def going(carry):
        number, texts, *_ = carry
        return (number < rows - 1) & ~jnp.all(texts.written.finished)

    def one_step(carry):
        number, texts, judged, steps, read, marks = carry
        idle = number < kept  # these rows are still those of the old answer
        texts, judged = _step(jax.random.fold_in(key, number), lm, prm, texts, judged, idle)
        steps += _newest(texts.written) > 0

        def noted(mark, value):
            keep = idle.reshape(-1, *[1] * (value.ndim - 1))
            return mark.at[:, number + 1].set(jnp.where(keep, mark[:, number + 1], value))

        marks = jax.tree.map(noted, marks, _light(texts.written, judged))
        return number + 1, texts, judged, steps, read + judged.spent, marks

    zero = jnp.zeros((), jnp.int32)
    start = (zero, TextState(written, prompts), judged, kept, jnp.zeros_like(kept), states.marks)
    _, texts, judged, steps, read, marks = jax.lax.while_loop(going, one_step, start)
    cost = {"tokens": texts.written.length - begin, "prm_tokens": read}
    return Answer(TextState(texts.written), judged, steps, marks), judged.score, cost
