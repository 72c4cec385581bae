"""Sweeps of host models that keep a path: they leave the target as it is, and give it from anywhere."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale import FeynmanKac, ParticleFilter
from smcscale.engine.conditional_host import Path, sweep
from smcscale.feynman_kac import Capabilities, Weighted
from smcscale.kernels import resampling
from smcscale.kernels.triggers import always, ess_below, never
from support.montecarlo import assert_mean

SIZE, ROWS = 3, 3
_RNG = np.random.default_rng(2)
LAW = _RNG.dirichlet(np.ones(SIZE), (SIZE, SIZE))  # of the next, given the last two
SCORES = _RNG.uniform(0.05, 1.0, (SIZE, SIZE))
BONUS = np.array([1.0, 0.25, 0.5])
FAMILY = 3


def transition(keys, previous, row):
    uniforms = np.asarray(_uniforms(keys))
    old, last = np.asarray(previous["old"]), np.asarray(previous["last"])
    new = (uniforms[:, None] > LAW[old, last].cumsum(1)).sum(1).clip(max=SIZE - 1)
    return Weighted({"old": last, "last": new}, np.log(BONUS[new]))


_uniforms = jax.jit(jax.vmap(jax.random.uniform))


def log_potential(previous, states, row):
    return np.log(SCORES[np.asarray(states["old"]), np.asarray(states["last"])])


MODEL = FeynmanKac(
    lambda key: {"old": jnp.zeros((), jnp.int32), "last": jnp.zeros((), jnp.int32)},
    transition,
    log_potential,
    capabilities=Capabilities(host=True),
    cost=lambda previous, states, row: {"moves": np.ones(len(states["last"]))},
    num_steps=ROWS,
)


@functools.cache
def exact():
    """Paths, their law under the target, and the evidence."""
    paths = list(itertools.product(range(SIZE), repeat=ROWS))
    mass = []
    for path in paths:
        whole = (0, 0, *path)
        mass.append(
            np.prod([
                LAW[a, b, c] * BONUS[c] * SCORES[b, c] for a, b, c in zip(whole, whole[1:], path, strict=False)
            ])
        )  # fmt: skip
    return paths, np.array(mass) / np.sum(mass), np.sum(mass)


def as_path(values):
    whole = (0, 0, *values)
    states = [{"old": jnp.int32(a), "last": jnp.int32(b)} for a, b in itertools.pairwise(whole)]
    return Path(states, [0.0, *(float(np.log(BONUS[v])) for v in values)])


def values_of(path):
    return tuple(int(state["last"]) for state in path.states[1:])


def chi_square(found, law):
    paths = exact()[0]
    counts = np.array([found.count(path) for path in paths])
    return scipy.stats.chisquare(counts, law * len(found)).pvalue


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("kernel", "trigger", "size"),
    [
        (resampling.multinomial, always, 2),
        (resampling.systematic, ess_below(0.8), 3),
    ],
    ids=["multinomial", "systematic, ESS"],
)
def test_a_sweep_leaves_the_target_as_it_is(kernel, trigger, size):
    paths, law, _ = exact()
    pf = ParticleFilter(MODEL, resampling=kernel, trigger=trigger, store="last")
    rng = np.random.default_rng(4)
    found, changed = [], 0
    for number in range(1500):
        kept = paths[rng.choice(len(paths), p=law)]
        one = sweep(pf, jax.random.key(number), num_particles=size, kept=as_path(kept))
        found.append(values_of(one.path))
        changed += found[-1] != kept
        assert one.cost["moves"] == ROWS * (size - 1)
    assert changed > 150  # or the test would say nothing
    assert chi_square(found, law) > 1e-3 / FAMILY


@pytest.mark.statistical
def test_without_a_path_it_is_the_filter():
    _, _, evidence = exact()
    pf = ParticleFilter(MODEL, trigger=ess_below(0.7), store="last")
    estimates = [
        sweep(pf, jax.random.key(number), num_particles=12).log_evidence for number in range(700)
    ]
    assert_mean(np.exp(estimates) / evidence, 1.0, family=FAMILY, smallest_bias=0.1)


def log_weight(values):
    whole = (0, 0, *values)
    return sum(np.log(BONUS[c] * SCORES[b, c]) for b, c in itertools.pairwise(whole[1:]))


def test_weights_are_those_of_the_paths():
    pf = ParticleFilter(MODEL, trigger=never, store="last")
    kept, other = (1, 2, 1), None
    for number in range(20):
        made = sweep(pf, jax.random.key(number), num_particles=2, kept=as_path(kept))
        other = values_of(made.path)
        if other != kept:
            break
    assert other != kept
    difference = float(made.log_weights[0] - made.log_weights[1])
    np.testing.assert_allclose(difference, log_weight(kept) - log_weight(other), rtol=1e-5)


def test_weights_of_the_start_and_far_from_one_count():
    """What `initial` weighs stays in the weights; log potentials of thousands lose nothing beside them."""
    shift = 8192.0
    program = dataclasses.replace(
        MODEL,
        initial=lambda key: Weighted(MODEL.initial(key), jnp.log(0.5)),
        log_potential=lambda *given: log_potential(*given).astype(np.float32) - np.float32(shift),
    )
    pf, plain = (ParticleFilter(p, trigger=never, store="last") for p in (program, MODEL))
    far, near = (sweep(f, jax.random.key(1), num_particles=6) for f in (pf, plain))
    np.testing.assert_allclose(far.log_weights, near.log_weights, atol=ROWS * 6e-4)  # of 8192
    expected = near.log_evidence + np.log(0.5) - ROWS * shift
    assert abs(far.log_evidence - expected) < ROWS * 6e-4
    assert far.path.increments[0] == pytest.approx(np.log(0.5))
    again = sweep(pf, jax.random.key(2), num_particles=2, kept=far.path)
    assert again.path.increments[0] == pytest.approx(np.log(0.5))


def test_the_kept_path_stays_and_paths_are_whole():
    pf = ParticleFilter(MODEL, resampling=resampling.multinomial, trigger=always, store="last")
    kept = (2, 0, 1)
    made = sweep(pf, jax.random.key(0), num_particles=4, kept=as_path(kept))
    assert int(made.states["last"][0]) == kept[-1] and int(made.states["old"][0]) == kept[-2]
    assert made.num_resamplings == ROWS and made.log_weights.shape == (4,)
    values = values_of(made.path)
    for row, state in enumerate(made.path.states[1:]):
        assert int(state["old"]) == (0, *values)[row]
        np.testing.assert_allclose(
            made.path.increments[row + 1], np.log(BONUS[values[row]]), rtol=1e-6
        )


def test_bad_input_is_refused():
    pf = ParticleFilter(MODEL, store="last")
    with pytest.raises(ValueError, match="as long and particles"):
        sweep(pf, jax.random.key(0), num_particles=1, kept=as_path((0, 0, 0)))
    with pytest.raises(ValueError, match="as long and particles"):
        sweep(pf, jax.random.key(0), num_particles=3, kept=as_path((0, 0)))
    with pytest.raises(ValueError, match="conditional"):
        sweep(
            ParticleFilter(MODEL, resampling=resampling.metropolis, store="last"),
            jax.random.key(0), num_particles=3,
        )  # fmt: skip
    traced = FeynmanKac(lambda key: 0.0, lambda key, x, row: x, lambda p, x, row: 0.0)
    with pytest.raises(TypeError, match="host models"):
        sweep(ParticleFilter(traced, store="last"), jax.random.key(0), num_particles=3)
    broken = FeynmanKac(
        MODEL.initial, MODEL.transition, lambda *_: np.nan, capabilities=MODEL.capabilities, num_steps=2
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="row 0"):
        sweep(ParticleFilter(broken, store="last"), jax.random.key(0), num_particles=3)
    broken = dataclasses.replace(MODEL, initial=lambda key: Weighted(MODEL.initial(key), jnp.nan))
    with pytest.raises(FloatingPointError, match="at the start"):
        sweep(
            ParticleFilter(broken, trigger=always, store="last"), jax.random.key(0), num_particles=3
        )
