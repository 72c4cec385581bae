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
last step of a text.  A finished text stays as it is; under `finished="absorb"` its log potential
is then 0, under `"reweigh"` its last potential counts again at every row (the published filter
of Puri et al. 2025 with `odds`; its target favours short texts that score well).
A text still unfinished after `max_steps` rows is kept; it has no answer.

Source: Puri et al. 2025, "Rollout Roulette" (arXiv 2502.01618); targets by enumeration in
`tests/models/reasoning/test_program.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float
from numpyro.contrib.control_flow import scan

from smcscale.models.reasoning.decode import Prompted
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.reward_model import ProcessRewardModel
from smcscale.program.spend import spend

CLIP = 1e-6


class Prompt(NamedTuple):
    """A prompt read by both models, once, outside the loop over steps."""

    writer: Prompted
    judge: Prompted


def read_prompt(lm: LanguageModel, prm: ProcessRewardModel, prompt: Any) -> Prompt:
    """Run a prompt (text or token ids) through both models.

    `reason` takes text as well; a prompt read beforehand spares it the work in every block, and
    prompts of one padded length share one compiled program.
    """
    return Prompt(lm.read(prompt), prm.prompted(prompt))


def difference(previous: Float[Array, ""], score: Float[Array, ""]) -> Float[Array, ""]:
    """Telescoping potential `log r_t - log r_(t-1)`: only the last score counts in the target."""
    return jnp.log(_clip(score)) - jnp.log(_clip(previous))


def product(previous: Float[Array, ""], score: Float[Array, ""]) -> Float[Array, ""]:
    """`log r_t`: every step's score counts; long texts are punished."""
    return jnp.log(_clip(score))


def odds(previous: Float[Array, ""], score: Float[Array, ""]) -> Float[Array, ""]:
    """`logit r_t`: every step's odds count, as in Puri et al. (2025)."""
    clipped = _clip(score)
    return jnp.log(clipped) - jnp.log1p(-clipped)


def _clip(score):
    return jnp.clip(score, CLIP, 1 - CLIP)


def reason(
    lm: LanguageModel,
    prm: ProcessRewardModel,
    prompt: Any,
    *,
    max_steps: int,
    potential: Callable[[Array, Array], Array] = difference,
    finished: str = "absorb",
) -> None:
    """The program: write a step, judge it, weigh by the potential.

    Args:
        lm: writes.
        prm: judges.
        prompt: text, token ids, or `read_prompt(lm, prm, text)`.
        max_steps: rows of the loop; finished texts wait.
        potential: `(previous score, score) -> log potential`, both `()` in [0, 1]; the score
            before the first step is 1.
        finished: "absorb" or "reweigh", see the module docstring.
    Sites:
        step: `TextState`, the text after the step; score: of the newest step.
    Raises:
        ValueError: for an unknown `finished`, no steps, or models whose token ids differ.
    """
    if finished not in ("absorb", "reweigh"):
        raise ValueError(f'smcscale: `finished` must be "absorb" or "reweigh", got {finished!r}.')
    if max_steps < 1:
        raise ValueError(f"smcscale: max_steps must be at least 1, got {max_steps}.")
    words, judged = lm.tokenizer, prm.tokenizer
    if words is not None and judged is not None and not words.within(judged):
        raise ValueError(
            "smcscale: the language model's token ids mean other words to the reward model.\n"
            "  try: a reward model with the language model's tokenizer."
        )
    writer, judge = prompt if isinstance(prompt, Prompt) else (prompt, prompt)
    lm, prm = lm.given(writer), prm.given(judge)

    def step(state, _):
        text, judged = state
        over = text.finished
        text: Any = numpyro.sample("step", lm.next_step(text))
        judged = prm.read(judged, text, lm.step_tokens)
        spend(tokens=text.step_length, prm_tokens=text.step_length)
        numpyro.deterministic("score", judged.score)
        weight = potential(judged.previous, judged.score)
        if finished == "absorb":
            weight = jnp.where(over, jnp.zeros_like(weight), weight)
        numpyro.factor("reward", weight)
        return (text, judged), None

    scan(step, (lm.start(), prm.start(lm)), None, length=max_steps)
