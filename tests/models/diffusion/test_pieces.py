"""`Pieces`: the same numbers by smaller calls, the calls counted by the network itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import correctors, predictors, schedules
from smcscale.models.diffusion.pieces import Pieces, in_pieces
from smcscale.models.diffusion.potentials import Steering
from smcscale.models.diffusion.predictors import Denoiser, Prediction
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.twisted import Sloped, Twisted

SCHEDULE = schedules.vp_cosine(6)
WEIGHT = jax.random.normal(jax.random.key(0), (3, 3)) / 2
STEERING = Steering(lambda x: -jnp.sum((x - 0.5) ** 2))


class Network:
    """Counts the states of every call that is run."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, tau):
        jax.debug.callback(lambda x: self.calls.append(x.shape), x)
        return jnp.tanh(WEIGHT @ x + tau)


def network(x, tau):
    return jnp.tanh(WEIGHT @ x + tau)


def run(denoiser, num_particles=7, num_runs=2, **options):
    smc = SMC(
        ParticleFilter(denoise, store="last"), num_particles=num_particles, num_runs=num_runs,
        progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(1), denoiser, SCHEDULE, STEERING, shape=(3,), **options)
    return smc


def test_pieces_change_no_number():
    plain = Denoiser(network, predictors.x0)
    whole, cut = run(plain), run(Pieces(plain, 4))
    np.testing.assert_allclose(cut.log_evidence, whole.log_evidence, rtol=1e-5)
    np.testing.assert_allclose(cut.result.final["x"], whole.result.final["x"], atol=1e-5)
    assert cut.cost["denoiser_calls"] == whole.cost["denoiser_calls"] == 6 * 7 * 2


@pytest.mark.slow
def test_gradients_inside_a_piece():
    plain = Sloped(Denoiser(network, predictors.x0), STEERING)
    whole = run(plain, sampler=Twisted(STEERING))
    cut = run(Pieces(plain, 3), sampler=Twisted(STEERING))
    np.testing.assert_allclose(cut.log_evidence, whole.log_evidence, rtol=1e-5)


def test_no_piece_is_larger_and_no_state_is_read_twice():
    """What XLA is given: a loop over pieces of 4 of 14 states, and the last 2."""

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "tanh":
                yield eqn.outvars[0].aval.shape
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)

    denoiser = Pieces(Denoiser(network, predictors.x0), 4)
    states, level = jnp.zeros((2, 7, 3)), SCHEDULE.level(3)
    mapped = jax.vmap(jax.vmap(lambda x: denoiser(x, level)))
    assert sorted(shapes(jax.make_jaxpr(mapped)(states).jaxpr)) == [(2, 3), (4, 3)]

    counted = Network()
    jax.vmap(lambda x: Pieces(Denoiser(counted, predictors.x0), 4)(x, level))(states[0])
    jax.effects_barrier()
    assert len(counted.calls) == 7


@pytest.mark.slow
def test_a_corrected_walk_in_pieces():
    """Of products without divergence; with one the derivative through pieces is refused."""
    denoiser, schedule = Denoiser(network, predictors.x0), schedules.vp_linear(6)
    found = []
    for one in (denoiser, Pieces(denoiser, 3)):
        composed = correctors.Composed((one,), (2.0,))
        smc = SMC(ParticleFilter(denoise, store="last"), num_particles=7, progress_bar=False)
        options = {"shape": (3,), "start": correctors.composed_start(schedule, (2.0,), (3,))}
        corrected = correctors.Corrected(correctors.target_score)
        smc.run(jax.random.key(1), composed, schedule, sampler=corrected, **options)
        found.append(smc.log_evidence)
    np.testing.assert_allclose(*found, rtol=1e-4)
    with pytest.raises(TypeError, match="a Pieces cannot be differentiated through"):
        smc.run(jax.random.key(1), composed, schedule, sampler=correctors.Corrected(), **options)


def test_levels_may_be_mapped():
    denoiser = Denoiser(network, predictors.x0)
    levels = SCHEDULE.level(jnp.arange(1, 6))
    states = jax.random.normal(jax.random.key(2), (5, 3))
    for found, expected in zip(
        jax.vmap(Pieces(denoiser, 2))(states, levels), jax.vmap(denoiser)(states, levels),
        strict=True,
    ):  # fmt: skip
        if expected is not None:
            np.testing.assert_allclose(found, expected, atol=1e-5)


class Wide:
    """Holds 2000 numbers a state on the way."""

    def __call__(self, x, level):
        wide = jnp.sin(jnp.outer(jnp.arange(1.0, 2001.0), x[:1]))
        wide = jax.lax.optimization_barrier(wide)
        return Prediction(x * jnp.sum(wide), x)


def test_as_many_as_the_memory_holds():
    found = in_pieces(Wide(), SCHEDULE, (3,), limit=1_000_000)
    assert 30 < found.size <= 126, "8 kB a state and something"
    assert in_pieces(Wide(), SCHEDULE, (3,), limit=2_000_000).size >= 2 * found.size
    assert in_pieces(Wide(), SCHEDULE, (3,)).size > 1000


@pytest.mark.refusal
def test_refusals():
    with pytest.raises(ValueError, match="`size` of Pieces must be a whole number above 0, got 0"):
        Pieces(Wide(), 0)
    with pytest.raises(ValueError, match="`limit` is 10"):
        in_pieces(Wide(), SCHEDULE, (3,), limit=10)
    cut = Pieces(Denoiser(Scaled(jnp.ones(())), predictors.x0), 2)
    several = jax.tree.map(lambda a: jnp.stack([a, a]), cut)
    with pytest.raises(TypeError, match="mapped over networks"):
        jax.vmap(lambda d: d(jnp.zeros(3), SCHEDULE.level(2)))(several)


class Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, x, tau):
        return self.scale * x


def test_a_rematerialized_network_gives_the_same_gradient():
    plain = Denoiser(network, predictors.x0)
    level, x = SCHEDULE.level(3), jnp.asarray([0.3, -0.2, 0.8])
    whole, again = (
        Sloped(d, STEERING)(x, level).extra.gradient for d in (plain, eqx.filter_checkpoint(plain))
    )
    np.testing.assert_allclose(again, whole, rtol=1e-6)
