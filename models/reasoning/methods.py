"""The published population methods as settings of one particle filter.

    solve(question, method=beam_search(4), num_particles=16)

A `Method` is a `ParticleFilter` of `reason`, with options of that program, a number of islands and
the rule that chooses the answer.  Nothing else differs between these:

| method | resampling | when | potential | target |
|---|---|---|---|---|
| `best_of_n`, `self_consistency` | none | never | difference | that of the potential |
| `particle_filter` | systematic | ESS below half | difference | that of the potential |
| `published_filter` | multinomial | always | odds, finished texts weighed again | none: see `program.py` |
| `entropic_filter` | systematic, annealed | always | difference | that of the potential |
| `published_entropic_filter` | systematic, annealed, rest of the weight dropped | always | as `published_filter` | none |
| `look_ahead` | n / k of n, k children of each | always | difference | that of the potential |
| `steering` | the best kept once, without replacement | always | difference | that of the potential |
| `beam_search` | the k best | always | newest score | none |
| `diverse_trees` | the best of each island | always | newest score | none |
| `particle_gibbs` | systematic, a text kept | ESS below half | difference | that of the potential |
| `parallel_tempering` | as `particle_gibbs`, chains that swap | ESS below half | difference | that of the potential |
| `published_particle_gibbs` | multinomial, a text kept | always | as `published_filter` | as there |
| `balanced_search` | in proportion to `exp(score / temperature)` | always | newest score | none |

"None": the run has no target at a fixed number of particles and its evidence is refused, or (for
`published_filter`, whose loop here makes all rows) is that of another target than is meant.  The
searches see the newest score only, that of a finished text at every row; pruned texts are gone.

| source | |
|---|---|
| `published_filter` | Puri et al. 2025 (arXiv 2502.01618), algorithm 1 |
| `entropic_filter` | Giannone et al. 2025 (arXiv 2510.05825); corrected: the quotient is kept |
| `look_ahead` | their look-ahead modulation, as resampling of n k children to n |
| `particle_gibbs` | `gibbs.py`; Puri et al. 2025, algorithm 2, as published |
| `parallel_tempering` | `gibbs.py`; Puri et al. 2025, algorithm 3 |
| `steering` | Lew et al. 2023 (arXiv 2306.03081), Fearnhead & Clifford 2003 |
| `beam_search` | Snell et al. 2024 (arXiv 2408.03314), section 5.2 |
| `diverse_trees` | DVTS, Beeching, Tunstall & Rush 2024 |
| `balanced_search` | REBASE, Wu et al. 2024 (arXiv 2408.00724); there a finished text leaves the search and its share with it, here it goes on competing |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from smcscale.engine.filter import ParticleFilter
from smcscale.kernels import resampling
from smcscale.kernels.annealing import Entropic, FromESS, TemperatureSchedule
from smcscale.kernels.resampling import Balanced, FanOut, TopK
from smcscale.kernels.tilts import Optimal
from smcscale.kernels.triggers import always, never
from smcscale.models.reasoning import answers
from smcscale.models.reasoning.gibbs import Sweeps
from smcscale.models.reasoning.potentials import Potential, difference, odds, product
from smcscale.models.reasoning.program import reason


@dataclass(frozen=True)
class Method:
    """How `solve` runs and reads a population.

    Attributes:
        filter: the particle filter of `reason`.
        options: keyword arguments of `reason`.
        select: the rule that chooses the answer, see `answers.py`.
        num_islands: of the population.
        sweeps: of particle Gibbs, None for one run of the filter.
    """

    filter: ParticleFilter
    options: dict[str, Any] = field(default_factory=dict)
    select: Callable[..., str | None] = answers.weighted_majority
    num_islands: int = 1
    sweeps: Sweeps | None = None

    @property
    def num_populations(self) -> int:
        """How many populations of N texts the method writes."""
        return 1 if self.sweeps is None else self.sweeps.number * len(self.sweeps.temperatures)


def _filter(**kernels: Any) -> ParticleFilter:
    return ParticleFilter(reason, store="last", **kernels)


def best_of_n() -> Method:
    """Independent texts, the one with the best last score."""
    return Method(_filter(trigger=never), select=answers.argmax)


def self_consistency() -> Method:
    """Independent texts, the most frequent answer; the scores are not looked at."""
    return Method(_filter(trigger=never), select=answers.majority)


def particle_filter(power: float = 1.0, **kernels: Any) -> Method:
    """The properly weighted filter of `p(y) score(y)^power`; `kernels` as for `ParticleFilter`.

    Args:
        power: above 1 scores count for more, and the filter resamples more often.
        **kernels: as for `ParticleFilter`.
    Raises:
        ValueError: a power that is not positive.
    """
    if not power > 0:
        raise ValueError(f"smcscale: power must be positive, got {power}.")
    rule = Potential(difference, temperature=1 / power)
    return Method(_filter(**kernels), {} if power == 1 else {"potential": rule})


#: finished texts show their score at every row, as the published loops do
_EVERY_ROW = {"potential": odds, "finished": "reweigh"}


def published_filter() -> Method:
    """The particle filter of Puri et al. as published; read by the best last score."""
    kernels = _filter(resampling=resampling.multinomial, trigger=always)
    return Method(kernels, _EVERY_ROW, answers.argmax)


def entropic_filter(max_steps: int, schedule: TemperatureSchedule = FromESS()) -> Method:  # noqa: B008
    """Resampling at every row, annealed early in the run; the rest of the weights is kept.

    Args:
        max_steps: rows of the run, which the schedule counts.
        schedule: `FromESS()`, `FromEntropy()` or `FromProgress()` of `kernels.annealing`.
    """
    return Method(_filter(trigger=always, annealing=Entropic(max_steps, schedule)))


def published_entropic_filter(
    max_steps: int,
    schedule: TemperatureSchedule = FromESS(),  # noqa: B008
) -> Method:
    """Entropic particle filtering as published: what annealing takes from the weights is lost."""
    annealing = Entropic(max_steps, schedule, corrected=False)
    return Method(_filter(trigger=always, annealing=annealing), _EVERY_ROW, answers.argmax)


def look_ahead(children: int = 4) -> Method:
    """Each survivor is shown the next step `children` times before it is chosen.

    Of n particles, all children of n / `children` parents, as many as there are parents are drawn
    by their weights: the choice knows the step it leads to.
    """
    return Method(_filter(resampling=FanOut(resampling.systematic, children), trigger=always))


def steering(num_parents: int, children: int) -> Method:
    """SMC steering: `num_parents` of all children survive, none twice, the best for sure.

    Run it with `num_particles = num_parents * children`.
    """
    kernels = _filter(
        resampling=FanOut(resampling.systematic, children),
        trigger=always,
        tilt=Optimal(num_parents),
    )
    return Method(kernels)


def newest_score(previous: Array, score: Array) -> Float[Array, ""]:
    """The score itself as log potential: what `Balanced` divides by its temperature."""
    return jnp.asarray(score)


def beam_search(beams: int) -> Method:
    """The `beams` best texts by their newest score, each with equally many children."""
    options = {"potential": product, "finished": "reweigh"}
    return Method(_filter(resampling=TopK(beams), trigger=always), options, answers.argmax)


def diverse_trees(num_trees: int) -> Method:
    """Diverse verifier tree search: independent trees, each goes on from its best text."""
    options = {"potential": product, "finished": "reweigh"}
    return Method(
        _filter(resampling=TopK(1), trigger=always), options, answers.argmax, num_islands=num_trees
    )


def balanced_search(temperature: float = 0.2) -> Method:
    """Reward balanced search: children in proportion to `exp(score / temperature)`."""
    options = {"potential": newest_score, "finished": "reweigh"}
    return Method(
        _filter(resampling=Balanced(temperature), trigger=always), options, answers.score_vote
    )


def particle_gibbs(
    num_sweeps: int = 4, *, ancestor_sampling: bool = True, **kernels: Any
) -> Method:
    """A filter run `num_sweeps` times, each with a text kept from the one before; the first is not read.

    Args:
        num_sweeps: each of N texts; 1 is the filter.
        ancestor_sampling: whether a kept text may change its beginning; each particle then reads its
            rest at every resampling.
        **kernels: as for `ParticleFilter`; resampling with a conditional form.
    """
    sweeps = Sweeps(num_sweeps, min(1, num_sweeps - 1), ancestor_sampling)
    return Method(_filter(**kernels), sweeps=sweeps)


def published_particle_gibbs(num_sweeps: int = 4) -> Method:
    """Particle Gibbs of Puri et al. as published: only the last sweep is read, by its best last score."""
    kernels = _filter(resampling=resampling.multinomial, trigger=always)
    sweeps = Sweeps(num_sweeps, num_sweeps - 1, ancestor_sampling=False)
    return Method(kernels, _EVERY_ROW, answers.argmax, sweeps=sweeps)


def parallel_tempering(
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0),
    num_sweeps: int = 4,
    *,
    ancestor_sampling: bool = True,
    **kernels: Any,
) -> Method:
    """Particle Gibbs chains of several temperatures that swap their kept texts; the first is read.

    Args:
        temperatures: of the potentials (`G^(1 / temperature)`), one chain each.
        num_sweeps, ancestor_sampling, **kernels: as for `particle_gibbs`.
    """
    burn_in = min(1, num_sweeps - 1)
    sweeps = Sweeps(num_sweeps, burn_in, ancestor_sampling, tuple(temperatures))
    return Method(_filter(**kernels), sweeps=sweeps)
