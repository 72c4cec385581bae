"""`solve`: question in, answer out, by a particle filter over the steps of a solution."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from smcscale.engine.filter import ParticleFilter
from smcscale.kernels import resampling
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.methods import Method
from smcscale.models.reasoning.outcome import Outcome, run_method
from smcscale.models.reasoning.program import Reward, read_prompt, reason
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.tasks import final_answer

MAX_STEPS = 12


@dataclass(frozen=True)
class Solution:
    """What the particles say about one question.

    Attributes:
        answer: the selected answer, None if no text has one.
        answers: each particle's answer, None where its text has none.
        log_weights: `(N,)`, unnormalised, nats.
        log_evidence: log of the evidence estimate; with the `difference` potential the log of
            the mean score of the model's own solutions. None under a kernel without a target.
        texts: each particle's solution.
        scores: the last score of each, `(N,)` in [0, 1].
        cost: what was spent, by name.
    """

    answer: str | None
    answers: tuple[str | None, ...]
    log_weights: np.ndarray
    log_evidence: float | None
    texts: tuple[str, ...]
    scores: np.ndarray
    cost: dict[str, float]


Select = Callable[..., str | None]


@overload
def solve(
    question: str,
    *,
    lm: LanguageModel | None = None,
    prm: Reward | None = None,
    num_particles: int = 16,
    method: ParticleFilter | Method | None = None,
    select: Select | None = None,
    key: Any = None,
    max_steps: int = MAX_STEPS,
    answer_of: Callable[[str], str | None] = final_answer,
    options: dict[str, Any] | None = None,
) -> Solution: ...


@overload
def solve(
    question: list[str] | tuple[str, ...],
    *,
    lm: LanguageModel | None = None,
    prm: Reward | None = None,
    num_particles: int = 16,
    method: ParticleFilter | Method | None = None,
    select: Select | None = None,
    key: Any = None,
    max_steps: int = MAX_STEPS,
    answer_of: Callable[[str], str | None] = final_answer,
    options: dict[str, Any] | None = None,
) -> list[Solution]: ...


def solve(
    question: str | Sequence[str],
    *,
    lm: LanguageModel | None = None,
    prm: Reward | None = None,
    num_particles: int = 16,
    method: ParticleFilter | Method | None = None,
    select: Select | None = None,
    key: Any = None,
    max_steps: int = MAX_STEPS,
    answer_of: Callable[[str], str | None] = final_answer,
    options: dict[str, Any] | None = None,
) -> Solution | list[Solution]:
    """Solve a question, or each of a list.

    Args:
        question: text; a newline is added.
        lm: the language model; the shipped one when None.
        prm: the process reward model; the shipped one when None.
        num_particles: N.
        method: one of `methods.py`, or `ParticleFilter(reason, ...)` with the kernels to use;
            systematic resampling below half the ESS when None.
        select: `(answers, log_weights, scores, key) -> answer`, see `answers.py`; that of the method
            when None.
        key: random key; `jax.random.key(0)` when None.
        max_steps: at most so many steps.
        answer_of: reads the answer out of a text.
        options: further keyword arguments of `reason`, such as `potential`, over those of the method.
    Returns:
        `Solution`, or a list of them for a list of questions.
    Raises:
        TypeError, ValueError: by argument name.
    """
    lm = shipped_language_model() if lm is None else lm
    prm = shipped_reward_model() if prm is None else prm
    _check(question, lm, prm, method, select)
    if not isinstance(method, Method):
        method = Method(default_method() if method is None else method)
    options = {**method.options, **(options or {})}
    chosen = method.select if select is None else select
    key = jax.random.key(0) if key is None else key

    def solved(text: str, key: Any) -> Solution:
        if not text.strip():
            raise ValueError("smcscale: the question is empty.")
        run_key, select_key = jax.random.split(key)
        prompt = read_prompt(lm, prm, text.strip() + "\n")
        outcome = run_method(
            replace(method, options=options), run_key, lm, prm, prompt,
            num_particles=num_particles, max_steps=max_steps,
        )  # fmt: skip
        return _read(outcome, lm, chosen, select_key, answer_of)

    if isinstance(question, str):
        return solved(question, key)
    keys = jax.random.split(key, len(question))
    return [solved(each, k) for each, k in zip(question, keys, strict=True)]


def _check(question: Any, lm: Any, prm: Any, method: Any, select: Any) -> None:
    """Refuse what is of another kind, by argument name, before anything runs."""
    texts = [question] if isinstance(question, str) else question
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            "smcscale: `question` must be text or a list of texts.\n"
            "  try: for token ids, such as `lm.chat` gives, SMC(ParticleFilter(reason), ...)."
        )
    wanted = {
        "lm": (isinstance(lm, LanguageModel), lm, "LanguageModel.from_pretrained(folder)"),
        "prm": (
            hasattr(prm, "prompted"), prm,
            "RewardFunction(f) for a JAX function, `host_reason` for a judge in plain Python",
        ),
        "method": (
            method is None or isinstance(method, Method | ParticleFilter), method,
            "methods.best_of_n(), with its brackets, or ParticleFilter(reason)",
        ),
        "select": (select is None or callable(select), select, "a rule of answers.py"),
    }  # fmt: skip
    for name, (fits, given, remedy) in wanted.items():
        if not fits:
            raise TypeError(
                f"smcscale: `{name}` of solve cannot be a {type(given).__name__}.\n  try: {remedy}."
            )


def _read(
    outcome: Outcome, lm: LanguageModel, select: Select, key: Any, answer_of: Callable
) -> Solution:
    """The solution that a method left."""
    tokens, lengths, log_probs, scores, log_weights, evidence, cost = outcome
    texts = tuple(lm.decode(row[:n]) for row, n in zip(tokens, lengths, strict=True))
    answers = tuple(answer_of(text) for text in texts)
    # some rules read more of a run, and say so
    ends = np.asarray(lm.ends_step)
    more = {
        "texts": texts,
        "log_probs": log_probs,
        "num_tokens": lengths,
        "steps": [1 + ends[row[: n - 1]].sum() for row, n in zip(tokens, lengths, strict=True)],
    }
    needed = {name: more[name] for name in getattr(select, "needs", ())}
    answer = select(answers, log_weights, scores, key, **needed)
    return Solution(answer, answers, log_weights, evidence, texts, scores, cost)


def default_method() -> ParticleFilter:
    """Systematic resampling when the ESS falls below half, no history kept."""
    return ParticleFilter(reason, resampling=resampling.systematic, store="last")


def shipped(name: str) -> Path:
    """Folder of a shipped model: "reasoner" or "reasoner-prm"."""
    return Path(str(resources.files("smcscale.models.pretrained") / name))


@functools.cache
def shipped_language_model() -> LanguageModel:
    """The shipped language model, loaded once."""
    return LanguageModel.from_pretrained(shipped("reasoner"))


@functools.cache
def shipped_reward_model() -> ProcessRewardModel:
    """The shipped process reward model, loaded once."""
    return ProcessRewardModel.from_pretrained(shipped("reasoner-prm"))
