"""Particle Gibbs for `reason`, and chains of several temperatures that swap texts.

    solve(question, method=methods.particle_gibbs(4), num_particles=8)
    solve(question, method=methods.parallel_tempering((1.0, 2.0, 4.0)), num_particles=8)

The first sweep is a particle filter. Every later one keeps a text: the others are written from the
beginning, may branch off any beginning of the kept one, and a new text is drawn by weight. With ancestor
sampling the kept text may also change its beginning: to each particle's beginning its rest is read
again, by both models, all of it, since a language model and a judge look back over the whole text. A rest
keeps its rows; a finished beginning goes on only as a finished text does.

Chains of higher temperatures (`G^(1 / temperature)` in place of `G`) move more freely; after each sweep
neighbours swap their kept texts with probability `min(1, ratio of their joint densities)`. The
answer is read from the first chain.

| | unchanged by a sweep |
|---|---|
| the law of the kept text | the filter's target, with any number of particles |
| the mean of a sweep's weighted texts, in equilibrium | that of the target |

`Published` settings (`methods.published_particle_gibbs`) have the target of `methods.published_filter`'s
potentials, since resampling happens at every row; they read the last sweep alone.

Source: Puri et al. 2025 (arXiv 2502.01618), algorithms 2 and 3; Andrieu, Doucet & Holenstein 2010; Lindsten,
Jordan & Schön 2014. There is no published code with ancestor sampling for language models.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from smcscale.engine import conditional
from smcscale.models.reasoning.decode import Written
from smcscale.models.reasoning.language_model import LanguageModel
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.program import Prompt, Reward, reason
from smcscale.run import SMC


@dataclass(frozen=True)
class Sweeps:
    """How often a population is run, and what is kept between.

    Attributes:
        number: of sweeps, the first (a plain filter) counted.
        burn_in: how many of the first sweeps are not read.
        ancestor_sampling: whether kept texts may change their beginning.
        temperatures: of the chains; the first is read, and is 1 for the filter's own target.
    """

    number: int = 4
    burn_in: int = 1
    ancestor_sampling: bool = True
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if not 0 <= self.burn_in < self.number:
            raise ValueError(
                f"smcscale: burn_in = {self.burn_in} of {self.number} sweeps leaves nothing to read."
            )
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"smcscale: temperatures must be positive, got {self.temperatures}.")


class Steps(NamedTuple):
    """A text cut into the steps of its rows.

    Attributes:
        tokens: `(T, S)`, padded.
        counts: `(T,)`; 0 once the text is finished.
    """

    tokens: Int32[Array, "T S"]
    counts: Int32[Array, " T"]


class Read(NamedTuple):
    """Texts that are read, all sweeps after burn-in together.

    Attributes:
        written: leaves `(M, ...)`, without caches.
        scores: `(M,)`, the last of each.
        log_weights: `(M,)`; each sweep weighs 1.
        log_evidence: of the first sweep, a plain filter.
        cost: by name; `read_tokens` are those of kept texts that passed the language model again.
    """

    written: Written
    scores: np.ndarray
    log_weights: np.ndarray
    log_evidence: float
    cost: dict[str, float]


def steps_of(lm: LanguageModel, written: Written, max_steps: int) -> Steps:
    """The steps of a text as the sampler would have written them."""
    room, size = written.tokens.shape[-1], lm.step_tokens
    ends = lm.ends_step[written.tokens]
    ends |= jnp.isin(written.tokens, jnp.asarray(lm.config.end_tokens, jnp.int32))
    ends |= jnp.arange(room) == written.length - 1
    padded = jnp.concatenate([written.tokens, jnp.zeros(size, jnp.int32)])
    over = jnp.concatenate([ends, jnp.ones(size, bool)])

    def one(begin: Array, _: None) -> tuple:
        closing = jax.lax.dynamic_slice(over, (begin,), (size,)).at[size - 1].set(True)
        count = jnp.where(begin < written.length, jnp.argmax(closing) + 1, 0).astype(jnp.int32)
        tokens = jax.lax.dynamic_slice(padded, (begin,), (size,))
        return begin + count, Steps(jnp.where(jnp.arange(size) < count, tokens, 0), count)

    return jax.lax.scan(one, jnp.zeros((), jnp.int32), None, length=max_steps)[1]


def _follow(lm: LanguageModel, prompt: Prompt, steps: Steps) -> conditional.Follow:
    """The kept text, for the engine: its step of a row after any beginning."""
    given = lm.given(prompt.writer)

    def follow(carry: Any, time: Array) -> tuple:
        state, density = given.next_step(carry[0]).follow(steps.tokens[time], steps.counts[time])
        return {"step": state}, density

    return follow


@eqx.filter_jit
def sweep(
    pf: Any,
    key: Array,
    args: tuple,
    options: dict,
    kept: Written,
    num_particles: int,
    ancestor_sampling: bool,
) -> tuple[Written, Float[Array, " N"], Float[Array, " N"], Written, dict, Bool[Array, ""]]:
    """One sweep with a text kept.

    Args:
        pf: the filter of `reason`.
        key: consumed.
        args: `(lm, prm, Prompt)`.
        options: of `reason`.
        kept: the text, leaves `(...)`; its cache is not read.
        num_particles: N, the kept text counted; 2 or more.
        ancestor_sampling: whether it may change its beginning.
    Returns:
        texts `(N, ...)` without caches, last scores, log-weights, the new kept text, the cost, and
        whether a log-weight was NaN or +inf.
    """
    lm, prompt = args[0], args[2]
    follow = _follow(lm, prompt, steps_of(lm, kept, options["max_steps"]))
    made = conditional.sweep(
        pf, key, args, options, follow, num_particles, ancestor_sampling=ancestor_sampling
    )
    texts = _light(made.states.sites["step"].written)
    kept = jax.tree.map(lambda x: x[made.chosen], texts)
    cost = dict(made.cost)
    for name, spent in made.followed.items():
        name = "read_tokens" if name == "tokens" else name
        cost[name] = cost.get(name, 0.0) + spent
    broken = jnp.any(jnp.isnan(made.log_weights))
    return texts, made.states.sites["score"], made.log_weights, kept, cost, broken


@eqx.filter_jit
def text_log_density(
    pf: Any, key: Array, args: tuple, options: dict, kept: Written
) -> Float[Array, ""]:
    """Log density of a text under the filter's target, up to its normalizer, nats."""
    follow = _follow(args[0], args[2], steps_of(args[0], kept, options["max_steps"]))
    return conditional.path_log_density(pf, key, args, options, follow)


def run(
    pf: Any,
    sweeps: Sweeps,
    key: Array,
    lm: LanguageModel,
    prm: Reward,
    prompt: Prompt,
    *,
    num_particles: int,
    **options: Any,
) -> Read:
    """Run all sweeps of all chains.

    Args:
        pf: the filter of `reason`, see `conditional.check`.
        sweeps: see there.
        key: random key.
        lm, prm, prompt: as for `reason`, the prompt read.
        num_particles: N of each sweep, 2 or more.
        **options: of `reason`.
    Raises:
        ValueError: another program, kernels without a conditional form, fewer than 2 particles.
        FloatingPointError: NaN or +inf among the potentials, or a first sweep whose particles all died.
    """
    if pf.program is not reason:
        raise ValueError(
            "smcscale: particle Gibbs follows texts of `reason`; the filter has another program."
        )
    conditional.check(pf)
    if num_particles < min(2, sweeps.number):
        raise ValueError(
            f"smcscale: a sweep needs a kept text and others; num_particles = {num_particles}."
        )
    args = (lm, prm, prompt)
    chains = [_heated(options, temperature) for temperature in sweeps.temperatures]
    for_first, for_sweeps, for_swaps = jax.random.split(key, 3)
    cost: dict[str, float] = {}
    read, kept, evidence = [], [], 0.0
    for number, told in enumerate(chains):
        run_key, choice = jax.random.split(jax.random.fold_in(for_first, number))
        smc = SMC(pf, num_particles=num_particles, progress_bar=False)
        smc.run(run_key, *args, **told)
        samples, log_weights = smc.get_samples(weighted=True)
        texts = _light(samples["step"].written)
        chosen = jax.random.categorical(choice, log_weights)
        kept.append(jax.tree.map(lambda x, i=chosen: x[i], texts))
        _add(cost, smc.cost)
        if number == 0:
            evidence = float(smc.log_evidence[0])
            read.append((texts, samples["score"], log_weights))
    for count in range(1, sweeps.number):
        for number, told in enumerate(chains):
            chain_key = jax.random.fold_in(jax.random.fold_in(for_sweeps, number), count)
            *found, kept[number], spent, broken = sweep(
                pf, chain_key, args, told, kept[number], num_particles, sweeps.ancestor_sampling
            )
            if broken:
                raise FloatingPointError(
                    f"smcscale: a log potential is NaN or +inf in sweep {count} of chain {number}."
                )
            _add(cost, spent)
            if number == 0:
                read.append(tuple(found))
        _swap(pf, jax.random.fold_in(for_swaps, count), args, chains, kept)
    counted = jax.tree.map(np.asarray, read[sweeps.burn_in :])
    weights = [np.asarray(x, np.float64) for _, _, x in counted]
    normal = [x - np.logaddexp.reduce(x) for x in weights]
    return Read(
        jax.tree.map(lambda *x: np.concatenate(x), *(texts for texts, _, _ in counted)),
        np.concatenate([scores for _, scores, _ in counted]),
        np.concatenate(normal),
        evidence,
        cost,
    )


def _swap(pf: Any, key: Array, args: tuple, chains: list[dict], kept: list[Written]) -> None:
    """Let neighbouring chains swap their kept texts."""
    for number in range(len(chains) - 1):
        one, two = kept[number], kept[number + 1]
        ratio = 0.0
        for sign, told, text in (
            (1, chains[number], two), (1, chains[number + 1], one),
            (-1, chains[number], one), (-1, chains[number + 1], two),
        ):  # fmt: skip
            ratio += sign * float(text_log_density(pf, key, args, told, text))
        if np.log(jax.random.uniform(jax.random.fold_in(key, number))) < ratio:
            kept[number], kept[number + 1] = two, one


def _heated(options: dict, temperature: float) -> dict:
    """Options of `reason` with every potential raised to `1 / temperature`."""
    if temperature == 1.0:
        return options
    given = options.get("potential", difference)
    rule = given if isinstance(given, Potential) else Potential(given)
    heat = jnp.asarray(temperature * rule.temperature, jnp.float32)
    return options | {"potential": Potential(rule.weigh, rule.aggregate, heat)}


def _light(written: Written) -> Written:
    """Texts without their caches."""
    return eqx.tree_at(lambda w: w.cache, written, None)


def _add(cost: dict[str, float], spent: Any) -> None:
    for name, amount in spent.items():
        cost[name] = cost.get(name, 0.0) + float(amount)
