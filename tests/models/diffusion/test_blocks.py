"""Block schedules: the law of each by enumeration of all candidates, their mixture, the vote."""

import collections
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import blocks
from smcscale.models.diffusion.blocks import Adaptive, Fixed, Local, pooled, vote, write
from smcscale.models.diffusion.masked import ExactMasked
from smcscale.models.diffusion.reveal import blank
from smcscale.models.diffusion.token_steering import TokenSteering
from support.sequences import assert_sequences, sequence_masses

V, L, RUNS = 2, 4, 4000
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
RNG = np.random.default_rng(8)
JOINT = RNG.dirichlet(np.full(V**L, 0.6)).reshape((V,) * L)
REWARD = 0.8 * RNG.normal(size=(V,) * L) - 0.3
NETWORK = ExactMasked(jnp.log(jnp.asarray(JOINT)))
FAMILY = 30


class Table(eqx.Module):
    """A function of whole sequences, by table."""

    values: jax.Array

    def __call__(self, tokens):
        return self.values[tuple(tokens)]


REWARDS = Table(jnp.asarray(REWARD))
DRAWN, LAW = blocks.of_drawn, blocks.of_law


def table_of(tokens):
    """Exact conditionals `(L, V)` given the tokens shown."""
    fits = np.all((np.array(tokens) == V) | (np.array(tokens) == SEQUENCES), axis=1)
    given = JOINT.reshape(-1) * fits / (JOINT.reshape(-1) * fits).sum()
    return np.stack([np.bincount(SEQUENCES[:, k], given, V) for k in range(L)])


def size_of(schedule, table, begin):
    if not isinstance(schedule, Adaptive):
        return schedule.size
    best = None
    for k in range(begin, min(begin + schedule.window, L)):
        surety = table[k].max()
        if table[k].argmax() in schedule.delimiters and (best is None or surety > best[0]):
            best = (surety, k)
    found = best is not None and best[0] >= schedule.delimiter_threshold
    return best[1] + 1 - begin if found else schedule.size


def kept_of(schedule, surety, active):
    """Positions that a row keeps, by the words of the papers."""
    ranked = sorted(active, key=lambda k: (-surety[k], k))
    if isinstance(schedule, Fixed):
        return ranked[: schedule.count]
    if isinstance(schedule, Adaptive):
        return [k for k in active if surety[k] >= schedule.threshold] or ranked[:1]
    anchors = [k for k in active if surety[k] >= schedule.anchor]
    near = [k for k in active if any(abs(k - a) <= schedule.radius for a in anchors)]
    return [*anchors, *(k for k in near if surety[k] >= schedule.relaxed)] or ranked[:1]


def law_of(schedule, confidence=DRAWN, temperature=1.0, rows=L):
    """Law of the sequences written by a schedule, over all candidates of every row."""
    law = {((V,) * L, 0): 1.0}
    for row in range(rows):
        after = collections.defaultdict(float)
        for (tokens, end), mass in law.items():
            masks = [k for k in range(L) if tokens[k] == V]
            if not masks:
                after[tokens, end] += mass
                continue
            table = table_of(tokens)
            heated = table ** (1 / temperature)
            heated /= heated.sum(1, keepdims=True)
            if masks[0] >= end:
                end = masks[0] + size_of(schedule, table, masks[0])
            active = [k for k in masks if k < end]
            for drawn in itertools.product(range(V), repeat=len(masks)):
                candidate = dict(zip(masks, drawn, strict=True))
                chance = np.prod([heated[k, v] for k, v in candidate.items()])
                if confidence is DRAWN:
                    surety = {k: table[k, v] for k, v in candidate.items()}
                else:
                    surety = {k: table[k].max() for k in masks}
                kept = masks if row == rows - 1 else kept_of(schedule, surety, active)
                new = tuple(candidate[k] if k in kept else tokens[k] for k in range(L))
                after[new, end] += mass * chance
        law = after
    exact = np.zeros((V,) * L)
    for (tokens, _), mass in law.items():
        exact[tokens] += mass
    return exact


def run(schedules, num_particles=1, num_runs=RUNS, seed=6, program=write, **options):
    smc = SMC(
        ParticleFilter(program, store="last", trigger=options.pop("trigger", triggers.always)),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), NETWORK, blank(L, V), schedules, **options)
    return smc


def masses(smc):
    return sequence_masses(smc, L, V)


def assert_target(mass, target, bias=0.08):
    assert_sequences(mass, target, family=FAMILY, smallest_bias=bias)


SCHEDULES = {
    "fixed": (Fixed(2), {}),
    "several at once": (Fixed(4, count=2), {}),
    "adaptive": (Adaptive((1,), 3, 4, 0.6, 0.8), {}),
    "local": (Local(4, 0.8, 0.55, 1), {}),
    "of the law": (Fixed(4), {"confidence": LAW}),
    "cool": (Fixed(2), {"temperature": 0.6}),
}


@pytest.mark.statistical
@pytest.mark.parametrize(
    "name",
    ["fixed", "adaptive", "local",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("several at once", "of the law", "cool"))],
)  # fmt: skip
def test_a_schedule_has_its_law(name):
    schedule, options = SCHEDULES[name]
    assert_target(masses(run(schedule, **options)), law_of(schedule, **options))


def test_only_one_token_by_the_law_is_the_joint_law():
    """Confidence of what was drawn, several tokens, another temperature: other laws."""
    np.testing.assert_allclose(law_of(Fixed(2), LAW), JOINT, atol=1e-12)
    np.testing.assert_allclose(law_of(Fixed(4), LAW), JOINT, atol=1e-12)
    for name, (schedule, options) in SCHEDULES.items():
        if name != "of the law":
            assert 0.5 * np.abs(law_of(schedule, **options) - JOINT).sum() > 0.02, name


def test_what_the_schedules_keep():
    active = jnp.array([True, True, False, True, True])
    confidence = jnp.array([0.5, 0.95, 0.99, 0.6, 0.8])
    keep = lambda schedule: np.flatnonzero(schedule.keep(confidence, active)).tolist()
    assert keep(Fixed(5, 2)) == [1, 4]
    assert keep(Adaptive((0,), threshold=0.7)) == [1, 4]
    assert keep(Adaptive((0,), threshold=0.97)) == [1]
    assert keep(Local(5, 0.9, 0.55, 2)) == [1, 3]  # 4 is sure enough, but too far
    assert keep(Local(5, 0.97, 0.1, 2)) == [1]  # no anchor: the surest


def test_an_adaptive_block_ends_with_the_surest_delimiter():
    probs = jnp.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3], [0.05, 0.95]])
    size = lambda begin, **options: int(
        Adaptive((1,), 2, **options).block(jnp.log(probs), jnp.asarray(begin))
    )
    assert size(0, window=4) == 3
    assert size(0, window=5) == 5
    assert size(0, window=5, delimiter_threshold=0.96) == 2
    assert size(3, window=1) == 2


def test_blocks_go_left_to_right_and_keep_the_prompt():
    start = blank(L, V).at[0].set(1)
    smc = SMC(ParticleFilter(write, store="paths"), num_particles=20, progress_bar=False)
    smc.run(jax.random.key(0), NETWORK, start, Fixed(2))
    tokens = np.asarray(smc.get_samples()["tokens"])
    assert (tokens[:, :, 0] == 1).all() and (tokens[:, -1] < V).all()
    assert (tokens[:, :2, 3] == V).all()  # the first block is positions 1 and 2
    assert (tokens[:, 1, 1:3] < V).all()


# ---- the mixture of schedules

MIXED = [Fixed(1), Fixed(4, count=4)]
LAWS = [law_of(schedule) for schedule in MIXED]
TILT = np.exp(1.1 * REWARD)
MIXTURE = sum(LAWS) / 2 * TILT


@pytest.mark.statistical
@pytest.mark.parametrize("guesses", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_filter_over_all_schedules_has_the_mixture_as_target(guesses):
    value = None if guesses else lambda tokens, level: jnp.mean(jnp.where(tokens == 1, 0.5, 0.0))
    steering = TokenSteering(REWARDS, 1.1, value=value)
    assert_target(masses(run(MIXED, 4, steering=steering)), MIXTURE)


@pytest.mark.statistical
def test_particles_keep_their_schedule():
    """Heads counted: the share of schedules is even, and a particle is written by one of them."""
    smc = run(MIXED, 8, 1000, trigger=triggers.never)
    mass = masses(smc)
    assert_target(mass, sum(LAWS) / 2)


@pytest.mark.slow
@pytest.mark.statistical
def test_filters_of_one_schedule_are_pooled_by_their_evidence():
    steering = TokenSteering(REWARDS, 1.1)
    found = [masses(run(s, 4, seed=9 + i, steering=steering)) for i, s in enumerate(MIXED)]
    assert_target((found[0] + found[1]) / 2, MIXTURE)
    # the same of one pair of filters, through `pooled`
    runs = [run(s, 200, 1, seed=i, steering=steering) for i, s in enumerate(MIXED)]
    log_weights = pooled(
        [smc.result.log_weights[0] for smc in runs], [smc.log_evidence[0] for smc in runs]
    )
    each = np.exp([np.logaddexp.reduce(part) for part in np.split(log_weights, 2)])
    np.testing.assert_allclose(each, np.exp([smc.log_evidence[0] for smc in runs]), rtol=1e-4)


def test_a_vote_for_each_filter_has_another_target():
    """Two schedules, three answers, exact numbers: W_i alone is biased, Z_b W_i is not."""
    laws = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    reward = np.log([3.0, 1.0, 0.5])
    evidences = (laws * np.exp(reward)).sum(1)
    answers = ["a", "b", "c"] * 2
    own = [np.log(law) + reward for law in laws]
    target = (laws.sum(0) * np.exp(reward))[0] / (laws.sum(0) * np.exp(reward)).sum()
    _, shares = vote(answers, pooled(own, np.log(evidences)))
    np.testing.assert_allclose(shares["a"], target)
    _, alone = vote(answers, pooled(own, np.zeros(2)))
    assert abs(alone["a"] - target) > 0.05


def test_the_vote_counts_heads_and_breaks_ties_by_size():
    assert vote(["x", "y", None, "y"]) == ("y", {"x": 1 / 3, "y": 2 / 3})
    assert vote(["x", "y", "y", "x"], sizes=[16, 8, 32, 64])[0] == "y"
    assert vote(["x", "y"], [-1000.0, -1000.5])[0] == "x"
    assert vote(["x", "y"], [-np.inf, -5.0]) == ("y", {"y": 1.0})
    assert vote([None, None]) == (None, {})
    assert vote([]) == (None, {})
    dead = pooled([np.full(2, -np.inf), np.zeros(2)], [-np.inf, 0.0])
    np.testing.assert_array_equal(np.isneginf(dead), [True, True, False, False])


# ---- mistakes, planted


@pytest.mark.statistical
def test_a_law_taken_for_the_networks_is_caught():
    mass = masses(run(Fixed(2)))
    with pytest.raises(AssertionError, match="chi-square"):
        assert_target(mass, JOINT)


@pytest.mark.slow
@pytest.mark.statistical
def test_runs_that_weigh_alike_are_caught():
    """Every filter with one vote: the mass of the poor schedule counts too much."""
    steering = TokenSteering(REWARDS, 1.1)
    found = [masses(run(s, 4, seed=9 + i, steering=steering)) for i, s in enumerate(MIXED)]
    shares = sum(mass / mass.mean(0).sum() for mass in found) / 2
    with pytest.raises(AssertionError, match="chi-square"):
        assert_target(shares, MIXTURE / MIXTURE.sum(), bias=99.0)


# ---- the rest


def test_the_ledger_counts_calls():
    smc = SMC(ParticleFilter(write, store="last"), num_particles=3, progress_bar=False)
    smc.run(jax.random.key(0), NETWORK, blank(L, V), Fixed(4, 2), num_steps=2)
    assert smc.cost["denoiser_calls"] == 3 * 2


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`size` of Fixed must be at least 1"):
        Fixed(0)
    smc = SMC(ParticleFilter(write), num_particles=2, progress_bar=False)
    with pytest.raises(ValueError, match="`write` needs a schedule and a row"):
        smc.run(jax.random.key(0), NETWORK, blank(L, V), [])
    with pytest.raises(ValueError, match="`pooled` got 2 filters and 1 evidences"):
        pooled([np.zeros(2), np.zeros(2)], [0.0])
    with pytest.raises(ValueError, match="`vote` got 2 answers"):
        vote(["x", "y"], [0.0])
