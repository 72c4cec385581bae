"""One answer from weighted answers: rules with one signature.

    (answers, log_weights, scores=None, key=None) -> str | None

`answers` has a string for each particle, None where a text has no answer; `log_weights` `(N,)`
unnormalised, nats.  A text without an answer takes part in no choice.  Ties go to the answer that
comes first.

| rule | chooses |
|---|---|
| `weighted_majority` | the answer with the largest posterior mass |
| `majority` | the most frequent answer, weights ignored |
| `argmax` | the answer of the particle with the best last score (without scores: weight) |
| `sample` | the answer of one particle drawn by weight |
| `score_vote` | the answer with the largest sum of scores, weights ignored |
| `BestOfMajority` | of the answers that are frequent enough, the one with the best score |
| `IslandVote` | the largest mass when every island (temperature, run) has one vote to share out |
| `FirstFinish` | the answer of the particle that finished in the fewest steps |
| `PerplexityConsistency` | the largest sum of text probabilities, unlikely texts pruned |
| `HintMarginal` | the mode after asking again with earlier answers as hints |
| `UpTo` | what another rule chooses when answers of one form count as one |

`FirstFinish` and `PerplexityConsistency` read more of a run than the four arguments: the keywords
that their `needs` names.  `eqx.Partial(rule, steps=...)` has the common signature.  `masses` is the
posterior of the answers, `numeric` a form for `UpTo`, `fit_weibull_mixture` decides what is pruned.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, gammaln

Answers = Sequence[str | None]
_NUMBER = re.compile(
    r"[+-]?(([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)"
)


def masses(answers: Answers, log_weights: Any = None) -> dict[str, float]:
    """Posterior mass of each answer, in order of appearance; equal log-weights when None.

    Masses sum to 1; there are none when no living particle has an answer.
    """
    log_weights = np.zeros(len(answers)) if log_weights is None else log_weights
    return _normalized(_sums(answers, _weights(answers, log_weights)))


def weighted_majority(answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
    """The answer whose particles carry the most weight; the first of several that tie."""
    return _heaviest(_sums(answers, _weights(answers, log_weights)))


def majority(answers: Answers, log_weights: Any = None, scores=None, key=None) -> str | None:
    """The most frequent answer; the first of several that tie.

    Weights are ignored: on an unresampled population this is the vote of the plain model.
    """
    return _heaviest(_sums(answers, np.ones(len(answers))))


def argmax(answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
    """The answer of the particle with the best last score; with the largest weight without scores."""
    by = np.asarray(log_weights if scores is None else scores, float)
    by = np.where([a is None for a in answers], -np.inf, by)
    return answers[int(np.argmax(by))] if len(by) else None


def sample(answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
    """The answer of one particle, drawn by weight among those that have one.

    Raises:
        ValueError: without a key.
    """
    if key is None:
        raise ValueError("smcscale: `sample` draws at random.\n  try: solve(..., key=...).")
    weights = _weights(answers, log_weights)
    if weights.sum() == 0:
        return None
    uniform = float(jax.random.uniform(key)) * weights.sum()
    index = int(np.searchsorted(np.cumsum(weights), uniform, side="right"))
    return answers[min(index, int(np.flatnonzero(weights)[-1]))]


def score_vote(answers: Answers, log_weights: Any = None, scores=None, key=None) -> str | None:
    """The answer with the largest sum of scores over its particles: weighted best-of-N.

    For independent samples of the plain model.  Their weights under the `difference` potential are
    the scores already; over resampled particles the sum counts each score twice.

    Source: Li et al. 2023, "Making Language Models Better Reasoners with Step-Aware Verifier".
    """
    return _heaviest(_sums(answers, _given("score_vote", "scores", scores, len(answers))))


@dataclass(frozen=True)
class BestOfMajority:
    """Of the answers with enough mass, the one with the best mean score.

    Best-of-N finds texts that fool the reward model, the more of them the larger N; a floor on the
    frequency keeps rare answers out, and a mean does not grow with N as a maximum does.  When no
    answer reaches the floor, those with the largest mass remain.

    Attributes:
        floor: smallest share of all particles, those without an answer included.
        weighted: shares by weight; False counts particles (independent samples, as published).
    Source: Di et al. 2025, "Best-of-Majority" (arXiv 2510.03199), abstract; default and mean ours.
    """

    floor: float = 0.1
    weighted: bool = True

    def __call__(self, answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
        best = self.top(answers, log_weights, scores, 1)
        return best[0] if best else None

    def top(self, answers: Answers, log_weights: Any, scores: Any, k: int) -> list[str]:
        """At most k different answers, best first: what to hand in where k tries count (pass@k)."""
        given = _given("BestOfMajority", "scores", scores, len(answers))
        log_weights = log_weights if self.weighted else np.zeros(len(answers))
        weights = _shares(len(answers), log_weights)
        mass, reward = _sums(answers, weights), _sums(answers, weights * given)
        floor = min(self.floor, max(mass.values(), default=0.0)) * (1 - 1e-9)  # sums are rounded
        kept = [answer for answer, m in mass.items() if m >= floor and m > 0]
        return sorted(kept, key=lambda answer: -reward[answer] / mass[answer])[:k]


@dataclass(frozen=True)
class IslandVote:
    """The answer with the largest mass when each island has one vote, divided by its own weights.

    For islands with different targets (LLM temperatures, potentials, models), whose weights are
    not on one scale.  Islands of one target are better pooled as they are (`weighted_majority` on
    all weights).  The share of an island's texts without an answer goes to nobody.

    Attributes:
        sizes: particles of each island, in the order of `answers`.
    """

    sizes: tuple[int, ...]

    def __call__(self, answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
        if sum(self.sizes) != len(answers):
            raise ValueError(f"smcscale: islands of {self.sizes} but {len(answers)} answers.")
        parts = np.split(np.asarray(log_weights, float), np.cumsum(self.sizes)[:-1])
        shares = [_shares(n, part) for n, part in zip(self.sizes, parts, strict=True)]
        return _heaviest(_sums(answers, np.concatenate(shares)))


@dataclass(frozen=True)
class FirstFinish:
    """The answer of the living particle that finished in the fewest steps, ties by weight.

    Source: Agarwal et al. 2025, "First Finish Search" (arXiv 2505.18149).
    """

    needs: ClassVar[tuple[str, ...]] = ("steps",)

    def __call__(
        self, answers: Answers, log_weights: Any, scores=None, key=None, *, steps: Any = None
    ) -> str | None:
        """The chosen answer; `steps` `(N,)`: after how many steps each particle finished."""
        steps = _given("FirstFinish", "steps", steps, len(answers))
        weights = _weights(answers, log_weights)
        earliest = steps == steps[weights > 0].min(initial=np.inf)
        return _heaviest(_normalized(_sums(answers, np.where(earliest, weights, 0.0))))


class WeibullMixture(NamedTuple):
    """Two Weibull densities, the one with the larger mean first.

    Attributes:
        share: of the first, in [0.2, 0.8].
        shapes, scales: of both, `(2,)`.
    """

    share: float
    shapes: np.ndarray
    scales: np.ndarray

    def log_terms(self, values: Any) -> np.ndarray:
        """Log of share times density of both components, `(2, n)`, at `values` `(n,)`."""
        shapes = self.shapes[:, None]
        powers = shapes * (np.log(values) - np.log(self.scales)[:, None])
        shares = np.log([[self.share], [1 - self.share]])
        return shares + np.log(shapes) + powers - np.log(values) - np.exp(np.minimum(powers, 500.0))

    def is_high(self, values: Any) -> np.ndarray:
        """Posterior probability of the first component, `(n,)`."""
        return expit(np.subtract(*self.log_terms(values)))


def fit_weibull_mixture(values: Any) -> WeibullMixture:
    """Two Weibull components by maximum likelihood: the best maximum from three splits of the values.

    The likelihood has poles where one component sits on one value, so shapes stay in [0.01, 100].

    Raises:
        ValueError: unless `values` `(n,)` are positive, two different ones at least.
    Source: Zhou et al. 2025, "RPC" (arXiv 2502.00511); its code's bounds, for values over their mean.
    """
    values = np.sort(np.asarray(values, float))
    if values.ndim != 1 or not (values > 0).all() or not np.ptp(values) > 0:
        raise ValueError("smcscale: a mixture needs positive values, two different ones at least.")
    logs = np.log(values / values.mean())

    def mixture(raw: np.ndarray) -> WeibullMixture:
        return WeibullMixture(0.2 + 0.6 * expit(raw[0]), np.exp(raw[1:3]), np.exp(raw[3:]))

    def loss(raw: np.ndarray) -> float:
        return -float(np.mean(np.logaddexp(*mixture(raw).log_terms(np.exp(logs)))))

    fits = []
    for share in (0.3, 0.5, 0.7):
        split = min(max(1, round((1 - share) * len(logs))), len(logs) - 1)
        # the log of a Weibull variable has standard deviation pi / (sqrt(6) shape)
        spread = [max(part.std(), 0.05) for part in (logs[split:], logs[:split])]
        shapes = np.clip(np.pi / np.sqrt(6) / np.array(spread), 0.1, 25)
        scales = np.array([logs[split:].mean(), logs[:split].mean()]) + np.euler_gamma / shapes
        start = np.array([np.log((share - 0.2) / (0.8 - share)), *np.log(shapes), *scales])
        bounds = [(-8.0, 8.0), *[(np.log(0.01), np.log(100.0))] * 4]
        start = np.clip(start, *np.transpose(bounds))
        fits.append(minimize(loss, start, method="L-BFGS-B", bounds=bounds))
    best = mixture(min(fits, key=lambda fit: fit.fun).x)
    means = np.log(best.scales) + gammaln(1 + 1 / best.shapes)
    order = np.argsort(-means)
    share = [best.share, 1 - best.share][order[0]]
    return WeibullMixture(float(share), best.shapes[order], values.mean() * best.scales[order])


@dataclass(frozen=True)
class PerplexityConsistency:
    """The answer with the largest sum of the model's own probabilities over its different texts.

    Texts are a set: copies, as resampling makes them, count once, and weights only tell the dead
    from the living.  A text is pruned when it more likely comes from the low component of a
    Weibull mixture of all probabilities and lies below their mean (below 4 different values: never).

    Attributes:
        per_token: probabilities are `exp(log_probs / num_tokens)`, the inverse perplexity (as
            published, a heuristic); False: `exp(log_probs)`, whose sum is a lower bound of the
            answer's probability.
        prune: leave unlikely texts out.
    Source: Zhou et al. 2025, "RPC" (arXiv 2502.00511).
    """

    per_token: bool = True
    prune: bool = True
    needs: ClassVar[tuple[str, ...]] = ("texts", "log_probs", "num_tokens")

    def __call__(self, answers: Answers, log_weights: Any, scores=None, key=None, **run: Any):
        """The chosen answer; for the keyword arguments see `confidence`."""
        return _heaviest(self.confidence(answers, log_weights, **run))

    def confidence(
        self, answers: Answers, log_weights: Any, *, texts=(), log_probs=None, num_tokens=None
    ) -> dict[str, float]:
        """Each answer's share of the probability.

        Args:
            texts: the N completions.
            log_probs: `(N,)`, nats, of each whole completion under the plain model.
            num_tokens: `(N,)`; not read where `per_token` is False.
        Raises:
            ValueError: when one that is needed is missing, of another length, or NaN.
        """
        values = _given("PerplexityConsistency", "log_probs", log_probs, len(answers))
        if self.per_token:
            values /= _given("PerplexityConsistency", "num_tokens", num_tokens, len(answers))
        if len(texts) != len(answers):
            raise ValueError("smcscale: PerplexityConsistency needs `texts`, one for each answer.")
        alive = np.flatnonzero(_weights(answers, log_weights))
        if not len(alive):
            return {}
        chosen = np.array(sorted({texts[i]: i for i in alive[::-1]}.values()))
        p = np.exp(np.maximum(values[chosen] - values[chosen].max(), -600.0))
        if self.prune and len(np.unique(p)) > 3:
            keep = (fit_weibull_mixture(p).is_high(p) >= 0.5) | (p >= p.mean())
            chosen, p = chosen[keep], p[keep]
        return _normalized(_sums([answers[i] for i in chosen], p))


@dataclass(frozen=True)
class HintMarginal:
    """The mode of the answer distribution after rounds of asking with earlier answers as hints.

    `p_(r+1)(y) = sum_y' p(y | question, hint y') p_r(y')`, with `p_0` the masses of the run and
    `p(y | question, hint y')` the shares among the answers that `ask` returns.  The sum over hints
    is exact; a hint is asked about once, so later rounds reuse what it gave.

    Attributes:
        ask: `(question, hint) -> answers`, independent samples, None where a text has no answer.
    Source: Pal et al. 2024, "Refining Answer Distributions" (arXiv 2412.13292), abstract.
    """

    ask: Callable[[str, str], Answers]
    question: str
    rounds: int = 1

    def __call__(self, answers: Answers, log_weights: Any, scores=None, key=None) -> str | None:
        return _heaviest(self.distribution(answers, log_weights))

    def distribution(self, answers: Answers, log_weights: Any) -> dict[str, float]:
        """The masses after the last round; those before where no hint led to an answer."""
        belief = masses(answers, log_weights)
        asked: dict[str, Mapping[str, float]] = {}
        for _ in range(self.rounds):
            asked |= {y: masses(self.ask(self.question, y)) for y in belief if y not in asked}
            terms = [(y, m * share) for h, m in belief.items() for y, share in asked[h].items()]
            belief = _normalized(_sums(*zip(*terms, strict=True))) if terms else belief
        return belief


@dataclass(frozen=True)
class UpTo:
    """Another rule's choice when answers of one form count as one, written as the first of them.

    Attributes:
        rule: with the common signature; further keywords go to it.
        form: equal for answers that mean the same, such as `numeric`.
    """

    rule: Callable[..., str | None]
    form: Callable[[str], Hashable]

    @property
    def needs(self) -> tuple[str, ...]:
        return getattr(self.rule, "needs", ())

    def __call__(self, answers: Answers, log_weights: Any, scores=None, key=None, **run: Any):
        return self.rule(self.merged(answers), log_weights, scores, key, **run)

    def merged(self, answers: Answers) -> list[str | None]:
        """The answers, each replaced by the first of its form."""
        first: dict[Hashable, str] = {}
        return [None if a is None else first.setdefault(self.form(a), a) for a in answers]


def numeric(answer: str) -> Hashable:
    """A plain number as an exact fraction, other text stripped: `"1,200.0"` and `"1200"` agree.

    Signs, commas between thousands, decimals, `a/b`; no exponents: their numbers could fill memory.
    """
    text = answer.strip()
    number = len(text) <= 64 and _NUMBER.fullmatch(text)
    return Fraction(text.replace(",", "")) if number else text


def _weights(answers: Answers, log_weights: Any) -> np.ndarray:
    """Weights `(N,)` over the largest, 0 where there is no answer."""
    log_weights = np.asarray(log_weights, float)
    n, shape = len(answers), log_weights.shape
    if shape != (n,):
        raise ValueError(f"smcscale: {n} answers but log-weights of shape {shape}.")
    if np.isnan(log_weights).any() or (log_weights == np.inf).any():
        raise ValueError("smcscale: log-weights must not be NaN or +inf.")
    log_weights = np.where([a is None for a in answers], -np.inf, log_weights)
    top = log_weights.max(initial=-np.inf)
    return np.exp(log_weights - top) if np.isfinite(top) else np.zeros(n)


def _shares(n: int, log_weights: Any) -> np.ndarray:
    """Weights `(n,)` that sum to 1, texts without an answer included; zeros if all are dead."""
    weights = _weights([""] * n, log_weights)
    return weights / max(weights.sum(), 1.0)  # the largest is 1, if any lives


def _given(rule: str, name: str, values: Any, n: int) -> np.ndarray:
    """A fresh array of one number for each particle."""
    values = np.array([] if values is None else values, float)
    if values.shape != (n,) or np.isnan(values).any():
        raise ValueError(
            f"smcscale: {rule} needs `{name}`, a number for each of {n} answers; got shape "
            f"{values.shape}{' with NaN' * bool(np.isnan(values).any())}."
        )
    return values


def _sums(answers: Answers, values: Any) -> dict[str, float]:
    """The sum of the values of each answer, in order of appearance."""
    sums: dict[str, float] = defaultdict(float)
    for answer, value in zip(answers, values, strict=True):
        if answer is not None:
            sums[answer] += float(value)
    return sums


def _normalized(mass: Mapping[str, float]) -> dict[str, float]:
    total = sum(mass.values())
    return {answer: m / total for answer, m in mass.items() if m > 0}


def _heaviest(mass: Mapping[str, float]) -> str | None:
    return max(mass, key=lambda answer: mass[answer]) if mass else None
