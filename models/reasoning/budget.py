"""What decoding costs, what a run spent, and how to spend a budget.

| name | what it is |
|---|---|
| `num_parameters`, `token_step`, `decode_cost` | FLOPs and bytes of a decoder, before a run |
| `Metered`, `Spent` | a reward that counts the work of both models, and what a run spent |
| `attended`, `forward_flops` | tokens looked at, and the FLOPs of tokens that pass a network once |
| `plan` | method and number of particles for a budget, from a pilot run |
| `allocate` | particles for each problem, given its evidence and the entropy of its answers |

FLOPs are those that the task needs: `2 x parameters` a token for the matrix products and
`4 x heads x head size` for every token that a token looks at in a layer.  Norms, rotations and the
softmax are left out (below a percent), and so is what padding wastes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.program import Prompt, Reward
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.models.reasoning.scaling import Estimate
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.program.spend import spend


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


class Spent(NamedTuple):
    """What a run spent on one question.

    Attributes:
        tokens: drawn, those of texts that were dropped later too.
        prompt_tokens: of the question as the language model read it, once for all particles.
        flops: of the language model, attention counted; kept texts that were read again too.
        prm_tokens: run through the reward model for steps, marks counted.
        prm_prompt_tokens: of the question as the reward model read it.
        prm_passes: steps that the reward model judged.
        prm_flops: of the reward model, attention counted.
    """

    tokens: int
    prompt_tokens: int
    flops: float
    prm_tokens: int
    prm_prompt_tokens: int
    prm_passes: int
    prm_flops: float


def attended(config: Config, first: Any, count: Any) -> Any:
    """How many tokens `count` tokens look at, from position `first` on, summed over layers.

    A token at position p looks at `p + 1` tokens, itself counted, or at those of the layer's window.

    Args:
        config: of the network.
        first: position of the first of them, `()` or `(...)`.
        count: how many pass.
    Returns:
        float32 of that shape: a sum of products, so no digits cancel.
    """
    first, count = jnp.asarray(first, jnp.float32), jnp.asarray(count, jnp.float32)
    total = jnp.zeros(())
    for window, layers in Counter(config.windows or (0,) * config.num_layers).items():
        growing = jnp.clip(window - first, 0.0, count) if window else count
        seen = growing * first + growing * (growing + 1) / 2 + (count - growing) * window
        total += layers * seen
    return total


def forward_flops(config: Config, num_tokens: Any, num_attended: Any, *, logits: bool) -> Any:
    """FLOPs of tokens that pass the network once each.

    Args:
        config: of the network.
        num_tokens: that pass.
        num_attended: what they look at, as `attended` counts it.
        logits: whether each also asks for the law of the next token.
    """
    head = 0 if logits else config.vocabulary_size * config.hidden_size
    products = 2.0 * (num_parameters(config, multiplied=True) - head) * num_tokens
    return products + 4.0 * config.num_heads * config.head_size * num_attended


class Metered(eqx.Module):
    """A reward that counts what both models do; otherwise the reward it holds.

    `reason` with it spends, beside its own, `prm_passes`, `writer_attended` and `judge_attended`.

        prompt = read_prompt(lm, prm, text)
        metered = Metered.of(lm, prm, prompt)
        smc.run(key, lm, metered, prompt, max_steps=12)
        metered.spent(smc.cost)

    Attributes:
        reward: what judges.
        prompt_length, judge_length: tokens of the prompt to either model.
        writer, judge: their shapes; the judge's None for a reward that is no network (static).
    """

    reward: Any
    prompt_length: Int32[Array, ""]
    judge_length: Int32[Array, ""]
    writer: Config = eqx.field(static=True)
    judge: Config | None = eqx.field(static=True)

    @classmethod
    def of(cls, lm: LanguageModel, reward: Reward, prompt: Prompt) -> "Metered":
        """A reward that counts, for a prompt that both models have read."""
        known = isinstance(reward, ProcessRewardModel)
        read = prompt.judge.length if known else jnp.zeros((), jnp.int32)
        config = reward.config if known else None
        return cls(reward, prompt.writer.length, read, lm.config, config)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The reward's."""
        return self.reward.tokenizer

    def prompted(self, prompt: Any) -> Any:
        """A prompt read by the reward."""
        return self.reward.prompted(prompt)

    def given(self, prompt: Any) -> "Metered":
        """This with a prompt read."""
        return eqx.tree_at(lambda m: m.reward, self, self.reward.given(prompt))

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Any:
        """The reward's state before any step."""
        return self.reward.start(lm, max_steps)

    def read(self, judged: Any, state: TextState, step_tokens: int) -> Any:
        """The reward's state after the newest step, counted."""
        after = self.reward.read(judged, state, step_tokens)
        # a token is drawn by the pass of the one before it, the first by that of the prompt's last
        first = self.prompt_length - 1 + state.written.begin
        spend(
            prm_passes=after.spent > 0,
            writer_attended=attended(self.writer, first, state.step_length),
        )
        if self.judge is not None:
            first = self.judge_length + judged.length
            spend(judge_attended=attended(self.judge, first, after.spent))
        return after

    def spent(self, cost: Mapping[str, float]) -> Spent:
        """What a run's counters come to.

        The prompt's last token passes the language model once for each text, as in the decoder, so
        the prompt is priced without it; only tokens that draw another one need logits, and, in
        the reward model, those whose probability its head reads.
        """
        tokens, judged, passes = (int(cost[n]) for n in ("tokens", "prm_tokens", "prm_passes"))
        prompt, question = int(self.prompt_length), int(self.judge_length)
        looked = float(attended(self.writer, 0, prompt - 1))
        flops = forward_flops(self.writer, prompt - 1, looked, logits=False)
        passed = tokens + cost.get("read_tokens", 0.0)
        flops += forward_flops(self.writer, passed, cost["writer_attended"], logits=True)
        prm_flops = 0.0
        if self.judge is not None:
            looked = float(attended(self.judge, 0, question))
            prm_flops = forward_flops(self.judge, question, looked, logits=False)
            reads = self.reward.confidence is not None
            looked = cost["judge_attended"]
            prm_flops += forward_flops(self.judge, judged, looked, logits=reads)
        return Spent(tokens, prompt, flops, judged, question, passes, prm_flops)


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
