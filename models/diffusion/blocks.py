"""Semi-autoregressive writing with a masked model: `write`, blocks left to right, best tokens first.

A row draws a candidate for every mask, and a schedule keeps some of those in the current block; when a
block has no mask left, the next one is opened.

    smc = SMC(ParticleFilter(write, store="last"), num_particles=30)
    smc.run(key, network, blank(L, V), [Fixed(8), Fixed(16)], num_steps=L, steering=steering)

| schedule | its blocks | what it keeps of a block |
|---|---|---|
| `Fixed` | of one size | the k most confident candidates (LLaDA) |
| `Adaptive` | up to the surest delimiter ahead, else of one size | all above a confidence, at least one (AdaBlock) |
| `Local` | of one size | anchors above a confidence, and around them all above a lower one (LocalLeap) |

Confidence is `of_law`, the probability of the likeliest token, or `of_drawn`, that of the candidate
(published; the default).  Only `of_law` with one token a row, at temperature 1, has the network's
joint law. Any other schedule b has a law p_b of its own: a candidate that looks sure is kept more
often, and tokens kept together are drawn independently.

Several schedules are a mixture: each particle draws its own (site `schedule`, uniform, in the first
row), so with B of them and a `steering` of reward r and strength l

    target:  sum_b p_b(x) exp(l r(x)) / B,    Z = its sum

Without a steering the weights are equal and `vote` over the particles' answers is HEX, with equal
counts of schedules in expectation. Exactly equal counts are B filters of one schedule each, put
together by `pooled`, which weighs a particle by `Z_b W_i`: one vote for each filter (`W_i` alone) has
another target. Greedy choices of the published methods (temperature 0) are candidates drawn at a
temperature near 0; they have no evidence of their own but 1.

Source: Nie et al. 2025, LLaDA (arXiv 2502.09992); Lu et al. 2025, AdaBlock-dLLM (arXiv
2509.26432); Kong et al. 2025, LocalLeap (arXiv 2510.07081); Lee et al. 2025, HEX (arXiv
2510.05040).  HEX reports majority over 5 block sizes with 6 seeds each; its gain over 30 seeds of one
schedule is not published.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int
from numpyro.contrib.control_flow import scan

from smcscale.models.diffusion.potentials import Seen, nothing_seen
from smcscale.models.diffusion.reveal import Move, transition
from smcscale.models.diffusion.token_steering import TokenSteering, steer
from smcscale.program.spend import spend


class Schedule(Protocol):
    """Where a block ends, and what a row keeps of it."""

    def block(self, log_probs: Float[Array, "L V"], begin: Int[Array, ""]) -> Int[Array, ""]:
        """Size of the block that begins at a position, the first mask."""
        ...

    def keep(self, confidence: Float[Array, " L"], active: Bool[Array, " L"]) -> Bool[Array, " L"]:
        """Which masks of the block are filled; `active` are its masks, one at least is kept."""
        ...


def of_drawn(log_probs: Float[Array, "L V"], drawn: Int[Array, " L"]) -> Float[Array, " L"]:
    """Probability of the candidate: LLaDA's low-confidence remasking; the law is biased by it."""
    places = jnp.minimum(drawn, log_probs.shape[1] - 1)[:, None]
    return jnp.exp(jnp.take_along_axis(log_probs, places, axis=1)[:, 0])


def of_law(log_probs: Float[Array, "L V"], drawn: Int[Array, " L"]) -> Float[Array, " L"]:
    """Probability of the likeliest token, whatever was drawn."""
    return jnp.exp(jnp.max(log_probs, axis=1))


def margin_of_law(log_probs: Float[Array, "L V"], drawn: Int[Array, " L"]) -> Float[Array, " L"]:
    """Probability of the likeliest token less that of the second, whatever was drawn."""
    best = jax.lax.top_k(jnp.exp(log_probs), 2)[0]
    return best[:, 0] - best[:, 1]


def _ranked(confidence: Array, active: Array, count: int) -> Bool[Array, " L"]:
    """The `count` most confident of the active, the earlier of equals first."""
    order = jnp.argsort(jnp.where(active, -confidence, jnp.inf), stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
    return active & (rank < count)


class Fixed(eqx.Module):
    """Blocks of one size; the most confident tokens of a block first.

    Attributes:
        size: tokens of a block.
        count: tokens kept in a row.
    """

    size: int = eqx.field(static=True, default=32)
    count: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _positive(self, "size", "count")

    def block(self, log_probs: Float[Array, "L V"], begin: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.full_like(begin, self.size)

    def keep(self, confidence: Float[Array, " L"], active: Bool[Array, " L"]) -> Bool[Array, " L"]:
        return _ranked(confidence, active, self.count)


class Adaptive(eqx.Module):
    """Blocks that end with a delimiter that the network is sure of; sure tokens together.

    Attributes:
        delimiters: tokens that end a unit of meaning, such as a newline.
        size: of a block without one.
        window: how many tokens ahead a delimiter is looked for.
        delimiter_threshold: least probability of the delimiter.
        threshold: tokens above this confidence are kept together; else the surest one.
    """

    delimiters: tuple[int, ...] = eqx.field(static=True)
    size: int = eqx.field(static=True, default=32)
    window: int = eqx.field(static=True, default=64)
    delimiter_threshold: float = 0.3
    threshold: float = 0.9

    def __check_init__(self):
        _positive(self, "size", "window")

    def block(self, log_probs: Float[Array, "L V"], begin: Int[Array, ""]) -> Int[Array, ""]:
        ahead = jnp.arange(log_probs.shape[0]) - begin
        ends = jnp.isin(jnp.argmax(log_probs, axis=1), jnp.asarray(self.delimiters, int))
        inside = (ahead >= 0) & (ahead < self.window)
        surety = jnp.where(ends & inside, jnp.exp(jnp.max(log_probs, axis=1)), -1.0)
        best = jnp.argmax(surety)
        found = jnp.where(surety[best] >= self.delimiter_threshold, best - begin + 1, self.size)
        return found.astype(begin.dtype)

    def keep(self, confidence: Float[Array, " L"], active: Bool[Array, " L"]) -> Bool[Array, " L"]:
        return _ranked(confidence, active, 1) | (active & (confidence >= self.threshold))


class Local(eqx.Module):
    """Blocks of one size; sure tokens are anchors, near which less is asked.

    Attributes:
        size: tokens of a block.
        anchor: least confidence of an anchor; without any the surest token is kept.
        relaxed: least confidence near an anchor.
        radius: how near, in tokens.
    """

    size: int = eqx.field(static=True, default=32)
    anchor: float = 0.9
    relaxed: float = 0.75
    radius: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        _positive(self, "size")

    def block(self, log_probs: Float[Array, "L V"], begin: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.full_like(begin, self.size)

    def keep(self, confidence: Float[Array, " L"], active: Bool[Array, " L"]) -> Bool[Array, " L"]:
        anchors = active & (confidence >= self.anchor)
        places = jnp.arange(active.shape[0])
        near = jnp.abs(places[:, None] - places) <= self.radius
        around = jnp.any(near & anchors, axis=1) & (confidence >= self.relaxed)
        return _ranked(confidence, active, 1) | anchors | (active & around)


def _positive(schedule: Any, *names: str) -> None:
    for name in names:
        if getattr(schedule, name) < 1:
            raise ValueError(
                f"smcscale: `{name}` of {type(schedule).__name__} must be at least 1, got "
                f"{getattr(schedule, name)}."
            )


class Draft(NamedTuple):
    """What one particle carries.

    Attributes:
        tokens: `(L,)`, masks included.
        end: `()` int32, where the current block ends.
        schedule: `()` int32, which schedule writes it; -1 before the first row.
        log_probs: the table at `tokens`, where the steering's guesses need it.
        seen: rewards so far, None without steering.
    """

    tokens: Int[Array, "..."]
    end: Int[Array, "..."]
    schedule: Int[Array, "..."]
    log_probs: Any
    seen: Seen | None


def write(
    network: Callable[..., Array],
    start: Int[Array, " L"],
    schedules: Schedule | Sequence[Schedule],
    *,
    num_steps: int | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    confidence: Callable[..., Array] = of_drawn,
    steering: TokenSteering | None = None,
) -> None:
    """The program: draw candidates, keep the surest of the current block, weigh.

    Args:
        network: `(tokens, level) -> (L, V)` logits; `level` is the share of tokens shown.
        start: `(L,)` int, from `blank`; tokens that are not V are kept.
        schedules: one, or several, of which each particle draws one.
        num_steps: rows, L by default, enough for any schedule; the last one keeps all that is left,
            and rows after the end change nothing.
        temperature: of the candidates' softmax.
        confidence: `(log_probs, candidates) -> (L,)`, of the network at temperature 1.
        steering: a reward.
    Sites:
        schedule: `()` int32; candidates: `(L,)`; tokens: `(L,)` after the row (deterministic);
        guesses, steering: as in `unmask`.
    Raises:
        ValueError: without a schedule or a row.
    """
    several = list(schedules) if isinstance(schedules, Sequence) else [schedules]
    start = jnp.asarray(start, jnp.int32)
    length = start.shape[0]
    num_steps = length if num_steps is None else num_steps
    if not several or num_steps < 1:
        raise ValueError(
            f"smcscale: `write` needs a schedule and a row, got {len(several)} schedules and "
            f"num_steps={num_steps}.\n  try: write(network, start, Fixed(32))."
        )
    carried = steering is not None and steering.guesses > 0

    mask = jax.eval_shape(lambda tokens: network(tokens, jnp.zeros(())), start).shape[1]

    def read(tokens: Array) -> Array:
        log_probs = jax.nn.log_softmax(
            network(tokens, jnp.mean(jnp.where(tokens == mask, 0.0, 1.0)))
        )
        known = jnp.where(jnp.arange(mask) == tokens[:, None], 0.0, -jnp.inf)
        return jnp.where((tokens == mask)[:, None], log_probs, known)

    def step(draft: Draft, move: Move) -> tuple[Draft, None]:
        tokens = draft.tokens
        log_probs = draft.log_probs if carried else read(tokens)
        masked = tokens == mask
        # the schedule is drawn in the first row; later it is what it was, with probability one
        ids = jnp.arange(len(several))
        same = jnp.where((draft.schedule < 0) | (ids == draft.schedule), 0.0, -jnp.inf)
        own: Any = numpyro.sample("schedule", dist.CategoricalLogits(same, validate_args=False))
        heated = jax.nn.log_softmax(log_probs / temperature)
        law = transition(heated, tokens, jnp.ones(length))
        candidates: Any = numpyro.sample("candidates", law)
        surety = confidence(log_probs, candidates)
        places = jnp.arange(length)

        def choose(schedule: Schedule) -> tuple[Array, Array]:
            done = ~jnp.any(masked & (places < draft.end))
            begin = jnp.argmax(masked).astype(jnp.int32)
            end = jnp.where(done, begin + schedule.block(log_probs, begin), draft.end)
            active = masked & (places < end)
            kept = schedule.keep(surety, active) & active
            return end, kept

        ends, kept = jax.tree.map(lambda *x: jnp.stack(x), *[choose(s) for s in several])
        shown = jnp.where(move.last, masked, kept[own])
        new: Any = numpyro.deterministic("tokens", jnp.where(shown, candidates, tokens))
        if carried:
            log_probs = jax.lax.cond(move.last, lambda: log_probs, lambda: read(new))
        spend(denoiser_calls=jnp.where(move.last, 0, 1) if carried else 1)
        seen = draft.seen
        if steering is not None:
            seen = steer(steering, seen, log_probs if carried else None, new, move)
        end = jnp.minimum(ends[own], length)
        table = log_probs if carried else None
        return Draft(new, end, own.astype(jnp.int32), table, seen), None

    opening = Draft(
        start,
        jnp.zeros((), jnp.int32),
        jnp.full((), -1, jnp.int32),
        read(start) if carried else None,
        None if steering is None else nothing_seen(),
    )
    made = jnp.arange(1, num_steps + 1, dtype=jnp.int32)
    levels = jnp.arange(num_steps + 1) / num_steps
    scan(step, opening, Move(levels[:-1], levels[1:], made, made == num_steps))


# ---- votes


def pooled(log_weights: Sequence[Any], log_evidences: Any) -> np.ndarray:
    """Log-weights of the particles of several filters put together: `log (Z_b W_i)`.

    Args:
        log_weights: of each filter, `(N_b,)`, unnormalised.
        log_evidences: of each filter, `()`.
    Returns:
        `(sum of N_b,)` float64; their `log sum exp` less `log B` estimates the mixture's evidence.
    Raises:
        ValueError: for lists of different lengths.
    """
    if len(log_weights) != len(log_evidences):
        raise ValueError(
            f"smcscale: `pooled` got {len(log_weights)} filters and {len(log_evidences)} evidences."
        )
    parts = []
    for found, evidence in zip(log_weights, log_evidences, strict=True):
        found = np.asarray(found, np.float64).reshape(-1)
        with np.errstate(invalid="ignore"):
            shares = found - np.logaddexp.reduce(found)
        # a filter whose particles are all dead has evidence 0
        parts.append(np.where(np.isneginf(found), -np.inf, shares + float(evidence)))
    return np.concatenate(parts)


def vote(
    answers: Sequence[Hashable],
    log_weights: Any = None,
    *,
    sizes: Sequence[int] | None = None,
) -> tuple[Hashable, dict[Hashable, float]]:
    """The answer with most weight, and every answer's share.

    Args:
        answers: of each particle; None is no answer and has no vote.
        log_weights: `(N,)`, unnormalised; None counts heads, as HEX does.
        sizes: of each particle's blocks; a tie goes to the answer with the smallest, as in HEX, and
            without them to the one met first.
    Returns:
        answer: None if there is none.
        shares: by answer, summing to 1: unbiased for the mixture's probabilities where heads are
            counted and every particle has an answer.
    Raises:
        ValueError: for lists of different lengths.
    Source: Lee et al. 2025 (arXiv 2510.05040).
    """
    count = len(answers)
    logs = np.zeros(count) if log_weights is None else np.asarray(log_weights, np.float64)
    if logs.shape != (count,) or (sizes is not None and len(sizes) != count):
        raise ValueError(
            f"smcscale: `vote` got {count} answers, log-weights of shape {logs.shape} and "
            f"{'no' if sizes is None else len(sizes)} sizes.\n  try: one of each for a particle."
        )
    totals: dict[Hashable, float] = {}
    smallest: dict[Hashable, int] = {}
    top = logs.max(initial=-np.inf)
    for i, answer in enumerate(answers):
        if answer is None or np.isneginf(logs[i]):
            continue
        totals[answer] = totals.get(answer, 0.0) + float(np.exp(logs[i] - top))
        size = 0 if sizes is None else int(sizes[i])
        smallest[answer] = min(smallest.get(answer, size), size)
    if not totals:
        return None, {}
    whole = sum(totals.values())
    shares = {answer: value / whole for answer, value in totals.items()}
    best = max(shares.values())
    ties = [answer for answer, share in shares.items() if share >= best * (1 - 1e-9)]
    return min(ties, key=lambda answer: smallest[answer]), shares
