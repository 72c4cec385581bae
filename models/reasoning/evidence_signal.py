"""Log evidence as a signal: does it tell which problems were solved, and which to leave alone?

    signal = log_mean_evidence(log_evidences)        (P, R) runs -> (P,) values, errors
    auroc(signal.value, correct)
    draw(signal.value, correct)

| name | what it is |
|---|---|
| `log_mean_evidence`, `LogEvidence` | one number for each problem, with its error |
| `auroc`, `auroc_interval` | chance that a solved problem has the higher one, with interval |
| `calibration`, `Calibration` | share solved by the height of a signal, bin by bin |
| `abstention`, `Abstention` | accuracy where only the highest are answered |
| `threshold` | from which signal on to answer, for a wanted accuracy |
| `draw` | both as pictures |

With the `difference` potential the evidence is the mean score of the model's own texts: with
calibrated scores the chance that one text is right, which is a claim about the problem, not about
the chosen answer (that is its mass, `answers.masses`).  Any other signal may stand in its place.
Problems are the units; those whose signals tie are not told apart, whatever their order.

Source: Mann & Whitney 1947 (AUROC as the chance of a right order); El-Yaniv & Wiener 2010
(accuracy against coverage); Guo et al. 2017, section 2 (expected calibration error).
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from smcscale.models.reasoning.report import interval


class LogEvidence(NamedTuple):
    """Log evidence of P problems.

    Attributes:
        value: `(P,)`, nats; `-inf` where all runs died.
        error: `(P,)`, standard error of `value`; infinite where the runs do not tell: a single one,
            or all dead.
    """

    value: np.ndarray
    error: np.ndarray


class Calibration(NamedTuple):
    """Bins of problems, from the lowest signals to the highest.

    Attributes:
        signal: `(B,)`, mean in each bin.
        accuracy, low, high: `(B,)`, share solved, with its 95% interval over problems.
        sizes: `(B,)`, how many problems.
        error: mean distance of signal and accuracy, by problems; a signal that is a probability
            should have 0.
    """

    signal: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sizes: np.ndarray
    error: float


class Abstention(NamedTuple):
    """Accuracy where only the k problems of highest signal are answered, k = 1 .. P.

    Attributes:
        coverage: `(P,)`, `k / P`.
        accuracy: `(P,)`, among those answered; the mean over orders of what ties.
        area: mean accuracy over coverages; that of a signal that says nothing is the accuracy on
            all problems.
        best: the area of a signal that knows the answer.
    """

    coverage: np.ndarray
    accuracy: np.ndarray
    area: float
    best: float


def log_mean_evidence(log_evidences: Any) -> LogEvidence:
    """Log of the mean of runs, with its error by the delta method.

    The mean of estimates is unbiased, their mean log is low; `error` is the standard error of the
    mean over the mean, good where it is well below 1.

    Args:
        log_evidences: `(P, R)`, or `(R,)` of one problem, nats; `-inf` for a run that died.
    Raises:
        ValueError: another shape, no runs, NaN or `+inf`.
    """
    given = np.asarray(log_evidences, np.float64)
    if given.ndim not in (1, 2) or given.shape[-1] == 0 or not (given < np.inf).all():
        raise ValueError(
            "smcscale: `log_evidences` must be (P, R) or (R,), none NaN or +inf, got shape "
            f"{given.shape}.\n  try: smc.log_evidence of each problem, stacked."
        )
    runs = given.shape[-1]
    top = given.max(-1, keepdims=True)
    scaled = np.exp(given - np.where(np.isfinite(top), top, 0.0))
    mean = scaled.mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(mean > 0, np.log(mean) + top[..., 0], -np.inf)
        if runs == 1:
            return LogEvidence(value, np.full_like(value, np.inf))
        error = scaled.std(-1, ddof=1) / np.sqrt(runs) / mean
    return LogEvidence(value, np.where(mean > 0, error, np.inf))


def auroc(signal: Any, correct: Any) -> float:
    """Chance that a solved problem has a higher signal than an unsolved one; ties count half.

    Exact, by ranks.  1: solved and unsolved are told apart, 0.5: the signal says nothing.

    Args:
        signal: `(P,)`; `-inf` is legal.
        correct: `(P,)` bool.
    Raises:
        ValueError: all problems solved, or none; other shapes, NaN.
    """
    signal, correct = _told_apart(signal, correct)
    ranks = scipy.stats.rankdata(signal)
    solved = int(correct.sum())
    above = ranks[correct].sum() - solved * (solved + 1) / 2
    return float(above / (solved * (correct.size - solved)))


def auroc_interval(
    signal: Any, correct: Any, level: float = 0.95, *, draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the AUROC over problems, by percentiles.

    Draws of problems that are all solved, or none, have no AUROC and are left out.  A signal that
    tells all problems apart gives an interval without width: too few problems, not certainty.

    Args:
        signal, correct: as for `auroc`.
        level: of the interval.
        draws, seed: of the bootstrap.
    """
    signal, correct = _told_apart(signal, correct)
    high, low = signal[correct][:, None], signal[~correct][None, :]
    order = np.where(high > low, 1.0, np.where(high == low, 0.5, 0.0))
    rng = np.random.default_rng(seed)
    size = signal.size
    times = rng.multinomial(size, np.full(size, 1 / size), draws).astype(float)
    above = np.sum((times[:, correct] @ order) * times[:, ~correct], axis=1)
    pairs = times[:, correct].sum(1) * times[:, ~correct].sum(1)
    found = above[pairs > 0] / pairs[pairs > 0]
    tail = (1 - level) / 2
    return float(np.quantile(found, tail)), float(np.quantile(found, 1 - tail))


def calibration(signal: Any, correct: Any, *, bins: int = 10) -> Calibration:
    """Share of problems solved, in bins of equally many problems by signal.

    Args:
        signal: `(P,)`, finite; for `error` a probability, such as `exp(value)` of the evidence.
        correct: `(P,)`, bool, or the share of seeds that solved each.
        bins: at most so many; problems that tie share a bin, so there may be fewer.
    Raises:
        ValueError: other shapes, no problems, numbers that are not finite, `bins` below 1.
    """
    signal, correct = _checked(signal, correct)
    if bins < 1 or not np.isfinite(signal).all():
        raise ValueError(
            f"smcscale: calibration needs one bin or more and a finite signal, got bins={bins}."
            "\n  try: np.exp(value), which is 0 where all runs died."
        )
    order = np.argsort(signal, kind="stable")
    # a problem's place is that of the first it ties with
    first = np.searchsorted(signal[order], signal[order])
    _, begins = np.unique(first * bins // len(order), return_index=True)
    parts = np.split(order, begins[1:])
    mean = np.array([signal[part].mean() for part in parts])
    accuracy = np.array([correct[part].mean() for part in parts])
    low, high = np.array([interval(correct[part]) for part in parts]).T
    sizes = np.array([len(part) for part in parts])
    error = float(np.abs(accuracy - mean) @ sizes / len(order))
    return Calibration(mean, accuracy, low, high, sizes, error)


def abstention(signal: Any, correct: Any) -> Abstention:
    """The curve of accuracy against coverage.

    Args:
        signal: `(P,)`; `-inf` is legal.
        correct: `(P,)`, bool, or the share of seeds that solved each.
    Raises:
        ValueError: other shapes, no problems, NaN.
    """
    signal, correct = _checked(signal, correct)
    _, level, size = np.unique(-signal, return_inverse=True, return_counts=True)
    level = level.reshape(-1)
    mean = np.bincount(level, correct) / size  # what a problem among those that tie is worth
    answered = np.arange(1, len(signal) + 1)
    accuracy = np.cumsum(np.repeat(mean, size)) / answered
    best = np.cumsum(-np.sort(-correct)) / answered
    return Abstention(answered / len(signal), accuracy, float(accuracy.mean()), float(best.mean()))


def threshold(signal: Any, correct: Any, accuracy: float) -> float:
    """The lowest signal from which on answered problems have a wanted accuracy; `inf` if none has.

    What was chosen on some problems is too hopeful for them: judge it on others.

    Args:
        signal, correct: as for `abstention`.
        accuracy: in [0, 1].
    Returns:
        the threshold: answer where `signal >= threshold`.
    """
    signal, correct = _checked(signal, correct)
    levels = np.unique(signal)
    good = [float(level) for level in levels if correct[signal >= level].mean() >= accuracy]
    return min(good, default=float("inf"))


def draw(log_evidence: Any, correct: Any, axes: Any = None, *, bins: int = 10) -> Any:
    """Two pictures: share solved against evidence, and accuracy against coverage.

    Args:
        log_evidence: `(P,)`, nats.
        correct: `(P,)` bool.
        axes: two matplotlib axes.
        bins: of the left picture.
    Returns:
        axes: `(2,)`, with labels; the right title says the AUROC and its interval.
    """
    if axes is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "smcscale: pictures need matplotlib.\n  try: pip install 'smcscale[demo]'."
            ) from error
        axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")[1]
    left, right = axes
    told = calibration(np.exp(np.asarray(log_evidence, float)), correct, bins=bins)
    ends = [told.accuracy - told.low, told.high - told.accuracy]
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.errorbar(told.signal, told.accuracy, yerr=ends, marker="o", capsize=3)
    left.set_xlabel("evidence (mean in bin)")
    left.set_ylabel("share of problems solved")
    left.set_title(f"calibration error {told.error:.2f}", fontsize="medium")
    curve = abstention(log_evidence, correct)
    right.plot(curve.coverage, curve.accuracy)
    right.axhline(curve.accuracy[-1], color="0.7", linewidth=1)
    right.set_xlabel("share of problems answered")
    right.set_ylabel("share of answers right")
    area = auroc(log_evidence, correct)
    low, high = auroc_interval(log_evidence, correct)
    right.set_title(f"AUROC {area:.2f} [{low:.2f}, {high:.2f}]", fontsize="medium")
    return axes


def _checked(signal: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    signal, correct = np.asarray(signal, np.float64), np.asarray(correct, np.float64)
    shaped = signal.ndim == 1 and signal.shape == correct.shape and signal.size > 0
    if not shaped or np.isnan(signal).any() or not ((correct >= 0) & (correct <= 1)).all():
        raise ValueError(
            "smcscale: `signal` and `correct` must be a number for each problem, `correct` in "
            f"[0, 1], none NaN; got shapes {signal.shape} and {correct.shape}."
        )
    return signal, correct


def _told_apart(signal: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    signal, correct = _checked(signal, correct)
    if not np.isin(correct, (0, 1)).all() or correct.all() or not correct.any():
        raise ValueError(
            "smcscale: an AUROC needs problems that were solved and problems that were not, got "
            f"{correct.mean():.0%} of {correct.size} solved."
        )
    return signal, correct.astype(bool)
