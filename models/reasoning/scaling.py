"""Accuracy against budget: what more samples buy, what they cost, and how to spend them.

| name | what it is |
|---|---|
| `pass_at_k`, `coverage` | chance that k samples hold a right one: unbiased, with standard error |
| `fit_power_law` | `log c = a k^b` through measured coverage |
| `fit_beta` | beta-binomial law of the problems' difficulty, coverage at any k |
| `fit_saturation` | `ceiling - gap N^-rate` through the accuracy of any method |
| `verified_accuracy` | best-of-N by a verifier that errs, and its limit |
| `num_parameters`, `token_step`, `decode_cost` | FLOPs and bytes of a decoder |
| `plan` | method and number of particles for a budget, from a pilot run |
| `allocate` | particles for each problem, given its evidence and the entropy of its answers |

The laws of coverage need independent samples: copies that resampling made are dependent.

Source: Chen et al. 2021 (arXiv 2107.03374) for pass@k; Brown et al. 2024, "Large Language Monkeys"
(arXiv 2407.21787), and Schaeffer et al. 2025 (arXiv 2502.17578) for the laws; Stroebl et al. 2024
(arXiv 2411.17501) for verifiers that err.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import betaln, digamma, gammaln, polygamma

from smcscale.models.reasoning.architecture import Config


class Estimate(NamedTuple):
    """A value and its standard error, both `()` or `(...)`."""

    value: Any
    standard_error: Any


def pass_at_k(num_samples: Any, num_correct: Any, k: Any) -> np.ndarray:
    """Unbiased estimate of the chance that k samples hold a right one: `1 - C(n-c, k) / C(n, k)`.

    Args:
        num_samples, num_correct, k: integers that broadcast, `c <= n` and `1 <= k <= n`.
    Raises:
        ValueError: for others.
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(x, np.int64) for x in (num_samples, num_correct, k)))
    if (c < 0).any() or (c > n).any() or (k < 1).any() or (k > n).any():
        raise ValueError(
            "smcscale: pass@k needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples.\n"
            "  try: fit_beta(num_samples, num_correct).coverage(k) for a larger k."
        )
    i = np.arange(1, n.max(initial=1) + 1)
    inside = (i > (n - c)[..., None]) & (i <= n[..., None])
    return np.asarray(1 - np.where(inside, 1 - k[..., None] / i, 1.0).prod(-1))


def coverage(num_samples: Any, num_correct: Any, k: Any) -> Estimate:
    """Mean pass@k over problems, of the shape of k, and its standard error.

    The error counts other problems of this kind in: `num_samples`, `num_correct` are `(P,)`, P > 1.
    """
    n, c = np.broadcast_arrays(num_samples, num_correct)
    each = pass_at_k(n, c, np.asarray(k)[..., None])
    return Estimate(each.mean(-1), each.std(-1, ddof=1) / np.sqrt(each.shape[-1]))


@dataclass(frozen=True)
class PowerLaw:
    """Coverage `exp(a k^b)`, a and b negative."""

    a: float
    b: float

    def coverage(self, k: Any) -> np.ndarray:
        """The curve at k."""
        return np.asarray(np.exp(self.a * np.asarray(k, float) ** self.b))


def fit_power_law(k: Any, coverages: Any, standard_errors: Any = None) -> PowerLaw:
    """The power law nearest to measured coverage `(K,)` at `k`, by weighted least squares.

    Values at several k come from the same samples, so residuals tell nothing about the error of
    a and b: fit it again to problems drawn with replacement.

    Raises:
        ValueError: with fewer than two coverages strictly between 0 and 1.
    """
    k, coverages = np.asarray(k, float), np.asarray(coverages, float)
    between = (coverages > 0) & (coverages < 1)
    if between.sum() < 2:
        raise ValueError("smcscale: a power law needs two coverages strictly between 0 and 1.")
    errors = 1.0 if standard_errors is None else np.maximum(standard_errors, 1e-9)
    slope, start = np.polyfit(np.log(k[between]), np.log(-np.log(coverages[between])), 1)

    def residuals(raw: np.ndarray) -> np.ndarray:
        return (np.exp(-np.exp(raw[0]) * k ** raw[1]) - coverages) / errors

    found = least_squares(residuals, [start, slope], x_scale="jac", xtol=1e-12, ftol=1e-12).x
    return PowerLaw(float(-np.exp(found[0])), float(found[1]))


@dataclass(frozen=True)
class BetaLaw:
    """Chances of one sample over problems follow Beta(alpha, beta).

    Attributes:
        covariance: of alpha and beta, `(2, 2)`, inverse observed information; NaN if there is none.
    """

    alpha: float
    beta: float
    covariance: np.ndarray

    def coverage(self, k: Any) -> Estimate:
        """`E[1 - (1-p)^k] = 1 - B(alpha, beta + k) / B(alpha, beta)`, error by the delta method."""
        a, b, k = self.alpha, self.beta, np.asarray(k, float)
        missed = np.exp(betaln(a, b + k) - betaln(a, b))
        shared = digamma(a + b) - digamma(a + b + k)
        slope = missed[..., None] * np.stack([shared, shared + digamma(b + k) - digamma(b)], -1)
        variance = np.einsum("...i,ij,...j->...", slope, self.covariance, slope)
        return Estimate(1 - missed, np.sqrt(np.maximum(variance, 0.0)))

    def power_law(self) -> PowerLaw:
        """What coverage follows for large k: `b = -alpha`, `a = -Gamma(alpha+beta) / Gamma(beta)`."""
        tail = gammaln(self.alpha + self.beta) - gammaln(self.beta)
        return PowerLaw(float(-np.exp(tail)), -self.alpha)


def fit_beta(num_samples: Any, num_correct: Any) -> BetaLaw:
    """Beta law of difficulty by maximum likelihood of beta-binomial counts.

    Coverage beyond the samples rests on the Beta shape near 0, which has no problems that are never
    solved.  Counts `(P,)` that vary less than binomial ones drive alpha and beta up to 1e5.

    Raises:
        ValueError: when no problem has two samples, or all samples are right, or all wrong.
    """
    n, c = (np.asarray(x, float) for x in np.broadcast_arrays(num_samples, num_correct))
    if n.max(initial=0) < 2 or c.sum() in (0, n.sum()):
        raise ValueError(
            "smcscale: a Beta law needs two samples of a problem, and right and wrong ones.\n"
            "  try: more samples, or easier or harder problems."
        )

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = np.exp(raw)
        both = digamma(a + b) - digamma(n + a + b)
        slopes = [digamma(c + a) - digamma(a) + both, digamma(n - c + b) - digamma(b) + both]
        value = np.sum(betaln(c + a, n - c + b) - betaln(a, b))
        return -float(value), -np.array([a * slopes[0].sum(), b * slopes[1].sum()])

    mean = c.sum() / n.sum()
    bounds, options = [(np.log(1e-5), np.log(1e5))] * 2, {"ftol": 1e-14, "gtol": 1e-8}
    start = np.log([2 * mean, 2 * (1 - mean)])
    a, b = np.exp(minimize(loss, start, jac=True, bounds=bounds, options=options).x)
    own = [np.sum(polygamma(1, a) - polygamma(1, c + a))]
    own += [np.sum(polygamma(1, b) - polygamma(1, n - c + b))]
    information = np.diag(own) + np.sum(polygamma(1, n + a + b) - polygamma(1, a + b))
    if np.linalg.eigvalsh(information)[0] <= 0:
        information *= np.nan
    return BetaLaw(float(a), float(b), np.linalg.inv(information))


@dataclass(frozen=True)
class Saturation:
    """Accuracy `ceiling - gap * N^-rate`."""

    ceiling: float
    gap: float
    rate: float

    def accuracy(self, n: Any) -> np.ndarray:
        """The curve at N."""
        return np.asarray(self.ceiling - self.gap * np.asarray(n, float) ** -self.rate)


def fit_saturation(n: Any, accuracies: Any, standard_errors: Any = None) -> Saturation:
    """The saturating curve nearest to accuracies `(K,)` at budgets `n`, by weighted least squares.

    Ceiling in [0, 1], rate in [0.01, 10].  A ceiling far above the largest measured accuracy is a
    guess: fit it again to problems drawn with replacement to see how wild.

    Raises:
        ValueError: with fewer than three different budgets.
    """
    n, accuracies = np.asarray(n, float), np.asarray(accuracies, float)
    if len(np.unique(n)) < 3:
        raise ValueError("smcscale: a curve of three numbers needs three budgets at least.")
    errors = 1.0 if standard_errors is None else np.maximum(standard_errors, 1e-9)
    unit = np.exp(np.log(n).mean())  # budgets in their own unit, so that the gap has size 1

    def residuals(raw: np.ndarray) -> np.ndarray:
        return (raw[0] - raw[1] * (n / unit) ** -raw[2] - accuracies) / errors

    bounds = ([0.0, -1.0, 0.01], [1.0, 1.0, 10.0])
    starts = [[np.clip(accuracies.max(), 0.001, 0.999), 0.2, rate] for rate in (0.1, 0.5, 1.5)]
    fits = [least_squares(residuals, x, bounds=bounds, xtol=1e-12, ftol=1e-12) for x in starts]
    ceiling, gap, rate = min(fits, key=lambda fit: fit.cost).x
    return Saturation(float(ceiling), float(gap * unit**rate), float(rate))


def verified_accuracy(
    p: Any, true_positive: Any, false_positive: Any, n: Any, *, abstain: bool = False
) -> np.ndarray:
    """Accuracy when one of the accepted among n independent samples is handed in, at random.

    With `s = p t + (1-p) f`, the chance that a sample is accepted, and `q = (1-s)^n` that none is,
    `(1-q) p t / s + q p (1-t) / (1-s)`.  It tends to `p t / s`, below 1 as long as f > 0.

    Args:
        p: chance that a sample is right; of several problems, the accuracy is the mean.
        true_positive, false_positive: t, f: chance that a right, a wrong sample is accepted.
        n: number of samples; `np.inf` gives the ceiling.
        abstain: hand nothing in, which counts as wrong, when none is accepted; else any sample.
    """
    p, t, f, n = (np.asarray(x, float) for x in (p, true_positive, false_positive, n))
    accepted = p * t + (1 - p) * f
    none = (1 - accepted) ** n
    with np.errstate(divide="ignore", invalid="ignore"):
        if_some = np.where(accepted > 0, p * t / accepted, 0.0)
        if_none = np.where(accepted < 1, p * (1 - t) / (1 - accepted), 0.0) * (not abstain)
    return np.asarray((1 - none) * if_some + none * if_none)


class Cost(NamedTuple):
    """What decoding takes.

    Attributes:
        flops: multiplications and additions of the matrix products and of attention.
        weight_bytes: read: every parameter once a token-step, whatever the number of particles.
        kv_bytes: read: keys and values, those of a shared prompt once for all particles.
    """

    flops: Any
    weight_bytes: Any
    kv_bytes: Any

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> Any:
        """The roofline: no machine of this speed and bandwidth is faster."""
        moved = self.weight_bytes + self.kv_bytes
        return np.maximum(self.flops / flops_per_second, moved / bytes_per_second)


def num_parameters(config: Config, *, multiplied: bool = False) -> int:
    """Number of parameters; with `multiplied` only those of products with a token (the head's too)."""
    c, layout = config, config.layout
    queries, keys = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    matrices = 2 * c.hidden_size * (queries + keys) + 3 * c.hidden_size * c.mlp_size
    table = c.vocabulary_size * c.hidden_size
    if multiplied:
        return c.num_layers * matrices + table
    norms = (4 if layout.gemma else 2) * c.hidden_size + 2 * c.head_size * layout.head_norms
    biases = (queries + 2 * keys) * layout.biases
    tables = table * (1 if c.tied else 2)
    return c.num_layers * (matrices + norms + biases) + tables + c.hidden_size


def token_step(
    config: Config, length: Any, *,
    num_particles: int = 1, prompt_length: int = 0, bytes_per_number: float = 4.0,
) -> Cost:  # fmt: skip
    """Cost of one token for each of N particles: `2 x parameters + attention` FLOPs a token.

    Args:
        length: tokens since the prompt, the new one included, `()` or `(...)`.
        num_particles: N, decoded together.
        prompt_length: tokens of the prompt, whose keys and values all particles share.
        bytes_per_number: 4.0 for float32, 2.0 for bfloat16.
    """
    c, written = config, np.asarray(length, float)[..., None]
    windows = np.array(c.windows or (0,) * c.num_layers)
    window = np.where(windows > 0, windows, np.inf)
    own = np.minimum(written, window)
    prompt = np.minimum(prompt_length, window - own)
    # a score and its share of the values, each a multiplication and an addition for every number
    attention = 4 * c.num_heads * c.head_size * (own + prompt).sum(-1)
    flops = num_particles * (2.0 * num_parameters(c, multiplied=True) + attention)
    read = (num_particles * own + prompt).sum(-1) * 2 * c.num_kv_heads * c.head_size
    looked_up = 0 if c.tied else c.vocabulary_size * c.hidden_size
    weights = (num_parameters(c) - looked_up) * bytes_per_number
    return Cost(flops, np.full_like(flops, weights), read * bytes_per_number)


def decode_cost(config: Config, num_tokens: int, **options: Any) -> Cost:
    """Cost of writing `num_tokens` for each particle, the prompt read; options of `token_step`."""
    steps = token_step(config, np.arange(1, num_tokens + 1), **options)
    return Cost(*(float(np.sum(part)) for part in steps))


@dataclass(frozen=True)
class Arm:
    """A method at a number of particles, tried on P problems.

    Attributes:
        correct: `(P,)`, share of its runs that were right.
        cost: by unit ("tokens", "flops", "seconds"), `(P,)` each.
    """

    method: str
    num_particles: int
    correct: Any
    cost: Mapping[str, Any]


class Plan(NamedTuple):
    """What to run, and how sure that is.

    Attributes:
        arm: the choice.
        accuracy: of the choice, less what choosing the best of several flatters it by.
        lead: over the next best arm within the budget (NaN if there is none), paired by problem.
        chosen: share of the bootstraps that choose each arm, by its index; the rest found none.
    """

    arm: Arm
    accuracy: Estimate
    lead: Estimate
    chosen: np.ndarray


def plan(
    arms: Sequence[Arm], budget: Mapping[str, float], *, draws: int = 2000, seed: int = 0
) -> Plan:
    """The arm of best accuracy whose mean cost a problem stays within the budget; ties: the cheaper.

    Args:
        arms: of one pilot, on the same problems in the same order.
        budget: mean cost a problem by unit; several units must all hold.
        draws, seed: of the bootstrap over problems.
    Raises:
        ValueError: when arms differ in problems or no arm fits.
    """
    correct = [np.asarray(arm.correct, float) for arm in arms]
    costs = [[np.asarray(arm.cost[unit], float) / budget[unit] for unit in budget] for arm in arms]
    if len({x.shape for x in (*correct, *(x for cost in costs for x in cost))}) != 1:
        raise ValueError("smcscale: arms of a pilot need the same problems, `(P,)` for each array.")
    right, spent = np.array(correct), np.array(costs)  # (A, P), (A, units, P)
    share = np.full(right.shape[1], 1 / right.shape[1])
    counts = np.random.default_rng(seed).multinomial(len(share), share, size=draws)
    weights = np.vstack([share, counts / len(share)])  # the pilot itself is first
    accuracy = weights @ right.T
    load = np.einsum("bp,aup->bau", weights, spent).max(-1)
    rank = np.where(load <= 1, accuracy - 1e-9 * load, -np.inf)
    best = np.where(np.isfinite(rank.max(1)), rank.argmax(1), -1)
    if best[0] < 0:
        raise ValueError(f"smcscale: the cheapest arm takes {load[0].min():.3g} times the budget.")
    drawn, found = np.arange(1, draws + 1)[best[1:] >= 0], best[1:][best[1:] >= 0]
    flattery = np.mean(accuracy[drawn, found] - accuracy[0, found]) if len(found) else 0.0
    chosen = accuracy[:, best[0]]
    others = rank[0].copy()
    others[best[0]] = -np.inf
    lead = chosen - accuracy[:, others.argmax()] if np.isfinite(others.max()) else chosen * np.nan
    return Plan(
        arms[best[0]],
        Estimate(float(chosen[0] - flattery), float(chosen[1:].std(ddof=1))),
        Estimate(float(lead[0]), float(lead[1:].std(ddof=1))),
        np.bincount(found, minlength=len(arms)) / draws,
    )


def allocate(
    total: int, log_evidence: Any, entropy: Any, *, spent: Any = 0, least: int = 0
) -> np.ndarray:
    """Shares out particles among problems where they are worth most.

    The rule: maximize `sum_i H_i (1 - (1 - Z_i)^(s_i + n_i))` over `sum_i n_i <= total`, the number
    of problems with a right sample, each counted by how open its answer still is.  `Z_i` is the
    chance that one sample is right, as the evidence of the `difference` potential estimates it.
    Easy problems are soon done, agreed ones have no weight, hopeless ones gain too little.
    Greedy, which is exact because each further particle of a problem gains less.

    Args:
        total: particles to share out.
        log_evidence: `(P,)`, nats; values above 0 count as 0.
        entropy: `(P,)`, of the answers, on any scale common to all.
        spent: `(P,)` or `()`, particles that a problem has had already.
        least: particles for every problem, whatever they gain.
    Returns:
        n `(P,)` int64; less than `total` altogether when nothing more would be gained.
    """
    log_z = np.minimum(np.asarray(log_evidence, float), 0.0)
    openness = np.broadcast_to(np.asarray(entropy, float), log_z.shape)
    counts = np.full(log_z.shape, least, np.int64)
    if counts.sum() > total:
        raise ValueError(f"smcscale: {least} for each of {len(counts)} problems exceeds {total}.")
    if not (openness >= 0).all() or np.isnan(log_z).any():
        raise ValueError(
            "smcscale: log_evidence and entropy must not be NaN, entropy not negative."
        )
    had = np.broadcast_to(np.asarray(spent), log_z.shape)
    with np.errstate(divide="ignore"):
        log_miss = np.maximum(np.log(-np.expm1(log_z)), -1e6)
        first = np.log(openness) + log_z
    for _ in range(total - int(counts.sum())):
        gain = first + (had + counts) * log_miss
        if not gain.max(initial=-np.inf) > -700:  # nothing that a float could add
            break
        counts[gain.argmax()] += 1
    return counts
