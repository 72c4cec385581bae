"""Parameterizations against the data and noise they were made of; networks of every kind."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smcscale.models.diffusion import predictors, schedules
from smcscale.models.diffusion.mixtures import ExactDenoiser, GaussianMixture
from smcscale.models.diffusion.predictors import Converted, Denoiser, Preconditioned, Prediction

KINDS = {
    "eps": predictors.eps,
    "x0": predictors.x0,
    "v": predictors.v,
    "score": predictors.score,
    "velocity": predictors.velocity,
}
LEVELS = {
    "vp": schedules.vp_cosine(10).level(6),
    "edm": schedules.edm(10).level(7),
    "flow": schedules.rectified_flow(10).level(4),
}
DATA, NOISE = jnp.array([0.3, -1.1]), jnp.array([0.8, 0.2])
LINE = schedules.rectified_flow(10).level(4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_what_was_written_is_read(kind, level):
    parameterization, level = KINDS[kind], LEVELS[level]
    x = level.alpha * DATA + level.sigma * NOISE
    output = parameterization.write(Prediction(DATA, NOISE), level)
    found = Denoiser(lambda x, tau: output, parameterization)(x, level)
    np.testing.assert_allclose(found.x0, DATA, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.eps, NOISE, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        ("eps", lambda level: NOISE),
        ("x0", lambda level: DATA),
        ("v", lambda level: level.alpha * NOISE - level.sigma * DATA),
        ("score", lambda level: -NOISE / level.sigma),
        ("velocity", lambda level: level.alpha_rate * DATA + level.sigma_rate * NOISE),
    ],
)
def test_outputs_have_their_formulas(kind, exact):
    for level in LEVELS.values():
        output = KINDS[kind].write(Prediction(DATA, NOISE), level)
        np.testing.assert_allclose(output, exact(level), rtol=1e-6)
    np.testing.assert_allclose(
        predictors.velocity.write(Prediction(DATA, NOISE), LINE), NOISE - DATA, rtol=1e-6
    )


def test_every_kind_converts_to_every_other():
    level = LEVELS["vp"]
    x = level.alpha * DATA + level.sigma * NOISE
    for one in KINDS.values():
        for other in KINDS.values():
            first = one.write(Prediction(DATA, NOISE), level)
            second = other.write(one.read(first, x, level), level)
            back = one.write(other.read(second, x, level), level)
            np.testing.assert_allclose(back, first, rtol=1e-4, atol=1e-5)


class Linear(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.array([2.0, -1.0]))

    def __call__(self, x, tau):
        return self.weight * x + tau


def test_networks_of_every_kind_give_the_same():
    level = LEVELS["vp"]
    x = jnp.array([0.5, -0.2])
    expected = jnp.array([2.0, -1.0]) * x + level.tau

    class Module(eqx.Module):
        weight: jax.Array

        def __call__(self, x, tau):
            return self.weight * x + tau

    networks = [Linear(), Module(jnp.array([2.0, -1.0])), lambda x, tau: expected]
    for network in networks:
        denoiser = Denoiser(network, predictors.eps)
        np.testing.assert_allclose(eqx.filter_jit(denoiser)(x, level).eps, expected, rtol=1e-6)
    leaves = jax.tree.leaves(eqx.filter(Denoiser(Linear(), predictors.eps), eqx.is_array))
    assert len(leaves) == 1, "the parameters of an NNX module are leaves"


def test_conditions_bounds_and_variances():
    level = LEVELS["vp"]
    x = jnp.array([3.0, -0.2])
    denoiser = Denoiser(
        lambda x, tau, label: label * x,
        predictors.x0,
        condition=jnp.array(2.0),
        clip=1.0,
        variance=lambda x, tau, label: 0 * x + label,
    )
    found = denoiser(x, level)
    np.testing.assert_allclose(found.x0, [1.0, -0.4], rtol=1e-6)
    np.testing.assert_allclose(level.alpha * found.x0 + level.sigma * found.eps, x, rtol=1e-6)
    np.testing.assert_allclose(found.variance, [2.0, 2.0])


def test_wrong_networks_are_refused():
    with pytest.raises(TypeError, match="callable"):
        Denoiser(3, predictors.eps)
    with pytest.raises(TypeError, match="Parameterization"):
        Denoiser(lambda x, tau: x, "eps")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch axis"):
        Denoiser(lambda x, tau: x[None], predictors.eps)(DATA, LINE)


def test_a_preconditioned_network_is_the_identity_where_there_is_no_noise():
    level = LEVELS["edm"]
    still = Preconditioned(lambda x, tau: jnp.ones_like(x), 0.5)
    np.testing.assert_allclose(still(DATA, jnp.array(1e-6)), DATA, atol=1e-5)
    total = level.sigma**2 + 0.25
    exact = 0.25 / total * DATA + level.sigma * 0.5 / jnp.sqrt(total)
    np.testing.assert_allclose(still(DATA, level.tau), exact, rtol=1e-6)


def test_a_denoiser_of_straight_lines_serves_other_levels():
    """The exact denoiser of a mixture, asked through the lines, is the exact one of the VP levels."""
    mixture = GaussianMixture(
        jnp.log(jnp.array([0.4, 0.6])), jnp.array([[-1.0], [1.5]]), jnp.array([[[0.3]], [[0.2]]])
    )
    exact = ExactDenoiser(mixture)
    network = Denoiser(
        lambda x, tau: predictors.velocity.write(
            exact(x, predictors.straight_level((1 - tau) / tau)), predictors.straight_level((1 - tau) / tau)
        ),
        predictors.velocity,
    )  # fmt: skip
    converted = Converted(network, predictors.straight_level)
    schedule = schedules.vp_linear(10)
    x = jnp.array([0.7])
    for index in (1, 4, 9):
        level = schedule.level(index)
        found, wanted = converted(x, level), exact(x, level)
        np.testing.assert_allclose(found.x0, wanted.x0, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(found.eps, wanted.eps, rtol=2e-3, atol=1e-4)
