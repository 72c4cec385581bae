"""When to stop: pure functions of what the particles have said so far, each returning a bool.

A moment is `(answers, log_weights)` of one time, None where a text has no answer yet; a history is
a sequence of moments or answers, oldest first.

| function | stops when | what it trades |
|---|---|---|
| `agreed` | agreement of the particles stays high | tokens against late changes of mind |
| `concentrated` | entropy of the answers stays low | the same, in nats |
| `steady` | the last answers are equal and sound sure | the same, for one chain that is probed |
| `unbeatable` | no further vote can change the majority | nothing: the answer is that of the full run |
| `likely_majority` | the leader very likely is the most probable answer | `1 - confidence` a look |
| `hopeless` | the evidence is surely below a floor | answers that are rare but could be found |
| `settled` | the evidence is surely above a ceiling | little: one sample is nearly always right |

`certainty`, `entropy` and `evidence_bounds` are the numbers behind them.  Agreement is not
correctness: a model that is wrong the same way each time agrees with itself.  And copies agree with
their parent: right after a resampling look at the answers of independent islands instead.

Source: Fu et al. 2024, "Certaindex / Dynasor" (arXiv 2412.20993) for `certainty` and `steady`;
Aggarwal et al. 2023, "Adaptive-Consistency" (arXiv 2305.11860) for `likely_majority`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import scipy.stats
from scipy.special import betainc, xlogy

from smcscale.models.reasoning.answers import Answers, weighted_majority

Moment = tuple[Answers, Any]
#: words that make an answer unsure; "no" is among them, so drop it where "no" can be the answer
UNSURE = frozenset({"wait", "hold", "but", "okay", "no", "hmm"})


def entropy(answers: Answers, log_weights: Any = None) -> float:
    """Entropy of the answer posterior, nats, in `[0, log N]`.

    A particle without an answer agrees with nobody: it counts as an answer of its own, for nobody
    knows what it will say.

    Args:
        answers: N of them.
        log_weights: `(N,)`, unnormalised; equal when None.
    Raises:
        ValueError: when every particle is dead.
    """
    weights = _weights(answers, log_weights)
    names = [f"{i} is silent" if a is None else f"= {a}" for i, a in enumerate(answers)]
    mass = np.bincount(np.unique(names, return_inverse=True)[1], weights)
    return max(0.0, float(-xlogy(mass, mass).sum()))


def certainty(answers: Answers, log_weights: Any = None) -> float:
    """Agreement of the particles in [0, 1]: `1 - H(answers) / H(weights)`.

    With equal weights the published `1 - H / log N`.  Weights of small entropy look like agreement
    though only few particles speak; they are measured against that entropy.  One particle alone
    agrees with nobody: 0.

    Args, Raises: as for `entropy`.
    """
    weights = _weights(answers, log_weights)
    most = float(-xlogy(weights, weights).sum())
    return max(0.0, 1 - entropy(answers, log_weights) / most) if most > 1e-12 else 0.0


def agreed(history: Sequence[Moment], floor: float = 0.9, window: int = 3) -> bool:
    """Certainty was at least `floor`, with one leading answer, at each of the last moments.

    A lower floor or shorter window saves tokens; more questions then stop before a minority that
    would have grown.

    Args:
        history: of moments.
        floor: in [0, 1].
        window: how many moments.
    """
    return _lasting(history, window, lambda moment: certainty(*moment) >= floor)


def concentrated(history: Sequence[Moment], ceiling: float = 0.3, window: int = 3) -> bool:
    """Entropy was at most `ceiling` nats, with one leading answer, at each of the last moments.

    Unlike certainty the same at every N: 0.3 nats is about 91% for the leader of two answers.

    Args:
        history: of moments.
        ceiling: nats.
        window: how many moments.
    """
    return _lasting(history, window, lambda moment: entropy(*moment) <= ceiling)


def steady(
    answers: Answers,
    texts: Sequence[str] | None = None,
    window: int = 3,
    unsure: Collection[str] = UNSURE,
) -> bool:
    """The last `window` answers are equal and none is missing or unsure.

    For answers probed from one unfinished chain of thought, or the leaders of a population.  Words
    are compared whole: found anywhere, "no" would sit in "known" and "hold" in "threshold", as in
    the published code, which then never stops.

    Args:
        answers: one for each time.
        texts: what was written around each answer; the answers themselves when None.
        window: how many; published: 10, 8, 5, 3, 2 from careful to hasty.
        unsure: words in small letters.
    Raises:
        ValueError: for another number of texts than answers, or a window below 1.
    """
    texts = [a or "" for a in answers] if texts is None else texts
    if len(texts) != len(answers) or window < 1:
        raise ValueError(f"smcscale: {len(answers)} answers, {len(texts)} texts, window {window}.")
    recent = [a.strip() if a else "" for a in answers[-window:]]
    if len(recent) < window or len(set(recent)) > 1 or not recent[0]:
        return False
    words = re.findall(r"[^\W\d_]+", " ".join(texts[-window:]).lower())
    return not set(words) & set(unsure)


def unbeatable(answers: Answers, remaining: int) -> bool:
    """`majority` chooses the same answer whatever the remaining samples say.

    Args:
        answers: samples so far, one vote each.
        remaining: how many are still to come.
    """
    votes = Counter(
        a for a in answers if a is not None
    )  # in order of appearance, which breaks ties
    if not votes:
        return False
    leader = max(votes, key=lambda answer: votes[answer])
    earlier = list(votes)[: list(votes).index(leader)]
    threats = [votes[a] + (a in earlier) for a in votes if a != leader]
    return votes[leader] >= max(threats, default=0) + remaining


def likely_majority(answers: Answers, confidence: float = 0.95) -> bool:
    """The leading answer is more probable than the runner-up, with posterior probability `confidence`.

    Under a uniform prior on the share of the leader among the votes of the two:
    `P(p_1 > p_2) = 1 - I_(1/2)(v_1 + 1, v_2 + 1)`.  For independent samples.  Asked after every
    sample it errs more often than `1 - confidence`.

    Args:
        answers: samples so far, one vote each.
        confidence: in [0, 1).
    """
    first, second = _leaders(answers)
    return first > 0 and 1 - float(betainc(first + 1, second + 1, 0.5)) >= confidence


def evidence_bounds(
    log_evidences: Any, confidence: float = 0.95, looks: int = 1
) -> tuple[float, float]:
    """Lower and upper confidence bound, each alone, of Z from independent estimates of log Z.

    By Student's t on the estimates themselves, whose mean is unbiased (that of their logs is low).
    Equal estimates, as of runs that all died, say nothing about their spread: then the bounds are
    those for numbers in [0, 1].  A t bound is optimistic where few estimates have a heavy tail.

    Args:
        log_evidences: `(R,)` of runs or islands, or the log-weights of R independent samples.
        confidence: of each bound.
        looks: how often it will be asked; the error is divided among them (Bonferroni).
    Returns:
        `(low, high)`, both >= 0.
    Raises:
        ValueError: for fewer than two estimates, NaN or `+inf`.
    """
    log_evidences = np.asarray(log_evidences, float)
    runs = log_evidences.size
    if log_evidences.ndim != 1 or runs < 2 or not (log_evidences < np.inf).all():
        raise ValueError(
            "smcscale: bounds of the evidence need at least two independent estimates, none NaN "
            f"or +inf, got {log_evidences}.\n  try: SMC(..., num_runs=8)."
        )
    error = (1 - confidence) / looks
    top = max(log_evidences.max(), -1e300)  # scaled, so that small evidences keep their spread
    scaled = np.exp(log_evidences - top)
    mean, spread = scaled.mean(), scaled.std(ddof=1) / np.sqrt(runs)
    if spread < 1e-12:
        value, same = float(np.exp(top) * mean), error ** (1 / runs)
        return value * same, value + max(0.0, 1 - value) * (1 - same)
    margin = float(scipy.stats.t.isf(error, runs - 1)) * spread
    return float(np.exp(top) * max(0.0, mean - margin)), float(np.exp(top) * (mean + margin))


def hopeless(
    log_evidences: Any, floor: float = 0.01, confidence: float = 0.95, looks: int = 1
) -> bool:
    """The evidence is surely below `floor`: the model hardly ever writes what the potential wants.

    With the `difference` potential and a calibrated reward model the evidence is the chance that
    one sample is right, so 1/floor samples would find less than one right text on average.  On
    another scale for every potential; across questions comparable for `difference` only.

    Args:
        log_evidences: `(R,)`; with the others see `evidence_bounds`.
        floor: in (0, 1).
    """
    return evidence_bounds(log_evidences, confidence, looks)[1] < floor


def settled(
    log_evidences: Any, ceiling: float = 0.95, confidence: float = 0.95, looks: int = 1
) -> bool:
    """The evidence is surely above `ceiling`: nearly every sample is good, more of them add nothing.

    Not the confidence in the chosen answer (that is its mass), and only as right as the scores.

    Args:
        log_evidences: `(R,)`; with the others see `evidence_bounds`.
        ceiling: in (0, 1).
    """
    return evidence_bounds(log_evidences, confidence, looks)[0] > ceiling


def _weights(answers: Answers, log_weights: Any) -> np.ndarray:
    """Weights `(N,)` that sum to 1, texts without an answer included."""
    given = np.zeros(len(answers)) if log_weights is None else np.asarray(log_weights, float)
    if given.shape != (len(answers),) or not np.isfinite(given.max(initial=-np.inf)):
        raise ValueError(
            f"smcscale: {len(answers)} answers need as many log-weights, none of them NaN or +inf "
            f"and one alive, got {given}."
        )
    weights = np.exp(given - given.max())
    return weights / weights.sum()


def _lasting(history: Sequence[Moment], window: int, good: Callable[[Moment], bool]) -> bool:
    if window < 1:
        raise ValueError(f"smcscale: window must be at least 1, got {window}.")
    recent = history[-window:]
    leaders = {weighted_majority(*moment) for moment in recent}
    return (
        len(recent) == window
        and len(leaders) == 1
        and None not in leaders
        and all(good(moment) for moment in recent)
    )


def _leaders(answers: Answers) -> tuple[int, int]:
    """Votes of the first and the second."""
    votes = [count for _, count in Counter(a for a in answers if a is not None).most_common(2)]
    first, second, *_ = [*votes, 0, 0]
    return first, second
