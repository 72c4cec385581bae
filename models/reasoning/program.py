"""`reason`: an LLM writing step by step, as a NumPyro program whose steps of time are steps of text.

The language model is the transition, the process reward model gives the potential, and any
particle filter of the toolkit runs it:

    smc = SMC(ParticleFilter(reason), num_particles=16)
    smc.run(key, lm, prm, prompt, max_steps=12)

| potential | G_t | target, up to Z | Z |
|---|---|---|---|
| `difference` (default) | `r_t / r_(t-1)`, `r_0 = 1` | `p(y) r_l(y)` | `E_p[r(y)]`, in (0, 1) |
| `product` | `r_t` | `p(y) prod_t r_t` | `E_p[prod r_t]`, falls with length |
| `odds` | `r_t / (1 - r_t)` | `p(y) prod_t odds_t` | not bounded by 1 |

`r_t` is the score of the newest step given all before it, clipped to `[1e-6, 1 - 1e-6]`; `l` is the
last step of a text.  Other potentials, aggregates of several scores, a softmax temperature and how
to write one's own: `potentials.py`.  Rewards that are no reward model: `rewards.py`.

A finished text stays as it is.  Under `finished="absorb"` its log potential is then 0; under
`"reweigh"` its last potential counts again at every row, so the target has `G_l` to the power
`max_steps - l + 1` (the published filter of Puri et al. 2025 with `odds`; it favours short texts
that score well).

A text without an end (unfinished after `max_steps` rows, or out of room) has no answer.  Under
`unfinished="keep"` it stays in the target with what it scored; under `"drop"` its last potential
is multiplied by 0: the target is that of the table on texts that end, and Z includes the chance
to end.

Source: Puri et al. 2025, "Rollout Roulette" (arXiv 2502.01618); targets by enumeration in
`tests/models/reasoning/test_program.py` and `test_potentials.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float, Int32
from numpyro.contrib.control_flow import scan

from smcscale.models.reasoning.decode import Prompted
from smcscale.models.reasoning.language_model import LanguageModel, TextState
from smcscale.models.reasoning.potentials import (
    Potential,
    difference,
    odds,  # noqa: F401  the table above names it
    product,  # noqa: F401
)
from smcscale.models.reasoning.tokenizer import Tokenizer
from smcscale.program.spend import spend


class Reward(Protocol):
    """What `reason` asks of a `ProcessRewardModel`, and of whatever stands in for one."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where any token ids will do."""
        ...

    def prompted(self, prompt: Any) -> Any:
        """A prompt (text or token ids) read."""
        ...

    def given(self, prompt: Any) -> "Reward":
        """This reward with a prompt: text, token ids or what `prompted` gave."""
        ...

    def start(self, lm: LanguageModel, max_steps: int | None = None) -> Any:
        """State before any step: a pytree with `score` 1 and `spent` 0."""
        ...

    def read(self, judged: Any, state: TextState, step_tokens: int) -> Any:
        """State after the newest step: `score` in [0, 1], `spent` tokens run for it."""
        ...


class Prompt(NamedTuple):
    """A prompt read by both models, once, outside the loop over steps."""

    writer: Prompted
    judge: Any


class Tally(NamedTuple):
    """The scores of a text so far: aggregate before the newest step, with it, number of steps."""

    previous: Float[Array, "..."]
    aggregate: Float[Array, "..."]
    steps: Int32[Array, "..."]


def read_prompt(lm: LanguageModel, prm: Reward, prompt: Any, *, question: Any = None) -> Prompt:
    """Run a prompt (text or token ids) through both models.

    `reason` takes text as well; a prompt read beforehand spares it the work in every block, and
    prompts of one padded length share one compiled program.

    Args:
        lm: writes.
        prm: judges.
        prompt: for both.
        question: for the reward model instead, where `prompt` is in the language model's chat
            template and the reward model has its own.
    """
    writer, judge = lm.read(prompt), prm.prompted(prompt if question is None else question)
    if isinstance(judge, Prompt):  # a reward that writes on does so after the writer's own prompt
        judge = judge._replace(writer=writer)
    return Prompt(writer, judge)


def reason(
    lm: LanguageModel,
    prm: Reward,
    prompt: Any,
    *,
    max_steps: int,
    potential: Callable[[Array, Array], Array] = difference,
    finished: str = "absorb",
    unfinished: str = "keep",
) -> None:
    """The program: write a step, judge it, weigh by the potential.

    Args:
        lm: writes.
        prm: judges: a `ProcessRewardModel`, or another reward (`rewards.py`).
        prompt: text, token ids, or `read_prompt(lm, prm, text)`.
        max_steps: rows of the loop; finished texts wait.
        potential: `(previous score, score) -> log potential`, both `()` in [0, 1]; the score
            before the first step is 1. A `Potential` puts aggregates in place of scores.
        finished: "absorb" or "reweigh", see the module docstring.
        unfinished: "keep" or "drop", likewise.
    Sites:
        step: `TextState`, the text after the step; score: of the newest step; prior: the
        correction of `lm`, if its `prior` is "model".
    Raises:
        ValueError: for an unknown `finished` or `unfinished`, no steps, or models whose token ids
            differ.
    """
    check_options(finished, unfinished, max_steps)
    words, judged = lm.tokenizer, prm.tokenizer
    if words is not None and judged is not None and not words.within(judged):
        raise ValueError(
            "smcscale: the language model's token ids mean other words to the reward model.\n"
            "  try: a reward model with the language model's tokenizer."
        )
    rule = potential if isinstance(potential, Potential) else Potential(potential)
    writer, judge = prompt if isinstance(prompt, Prompt) else (prompt, prompt)
    lm, prm = lm.given(writer), prm.given(judge)

    def step(state, _):
        text, judged, tally = state
        over = text.finished
        text: Any = numpyro.sample("step", lm.next_step(text))
        judged = prm.read(judged, text, lm.step_tokens)
        spend(tokens=text.step_length, prm_tokens=judged.spent)
        numpyro.deterministic("score", judged.score)
        tally = tallied(tally, rule, judged.score, text.step_length > 0)
        weight = rule(tally.previous, tally.aggregate)
        if finished == "absorb":
            weight = jnp.where(over, jnp.zeros_like(weight), weight)
        if unfinished == "drop":
            last = text.finished | (tally.steps == max_steps)
            weight = jnp.where(~over & last & ~has_end(lm, text), -jnp.inf, weight)
        numpyro.factor("reward", weight)
        if lm.prior == "model":
            numpyro.factor("prior", lm.correction(text))
        return (text, judged, tally), None

    one = jnp.ones(())
    start = (lm.start(), prm.start(lm, max_steps), Tally(one, one, jnp.zeros((), jnp.int32)))
    scan(step, start, None, length=max_steps)


def check_options(finished: str, unfinished: str, max_steps: int) -> None:
    """Refuse what `reason` does not know, by argument name."""
    if finished not in ("absorb", "reweigh"):
        raise ValueError(f'smcscale: `finished` must be "absorb" or "reweigh", got {finished!r}.')
    if unfinished not in ("keep", "drop"):
        raise ValueError(f'smcscale: `unfinished` must be "keep" or "drop", got {unfinished!r}.')
    if max_steps < 1:
        raise ValueError(f"smcscale: max_steps must be at least 1, got {max_steps}.")


def tallied(tally: Tally, rule: Potential, score: Array, new: Array) -> Tally:
    """The tally with one more score, if there is a `new` step."""
    steps = tally.steps + new
    aggregate = jnp.asarray(rule.aggregate(tally.aggregate, score, steps))
    return Tally(
        jnp.where(new, tally.aggregate, tally.previous),
        jnp.where(new, aggregate.astype(tally.aggregate.dtype), tally.aggregate),
        steps,
    )


def has_end(lm: LanguageModel, state: TextState) -> Array:
    """Whether a text ended by itself, not for want of room."""
    written = state.written
    newest = written.tokens[jnp.maximum(written.length - 1, 0)]
    said = jnp.isin(newest, jnp.asarray(lm.config.end_tokens, jnp.int32))
    return state.finished & (said | (written.length < lm.max_tokens))
