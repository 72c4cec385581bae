"""The probability flow by adaptive steps, on mixtures: quantiles, densities, another curve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from smcscale.models.diffusion import mixtures, predictors, schedules
from smcscale.models.diffusion.flow import Preserving, Rectified, flow, log_density
from smcscale.models.diffusion.predictors import Denoiser
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.samplers import DDIM
from support.compilations import compilations

LINE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5], [1.0]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)  # fmt: skip
PLANE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.4, 0.6])), jnp.asarray([[0.0, 1.0], [1.0, -1.0]]),
    jnp.asarray([[[1.0, 0.4], [0.4, 0.5]], [[0.5, 0.0], [0.0, 0.3]]]),
)  # fmt: skip
CURVES = {"rectified": Rectified(), "preserving": Preserving()}
POINTS = jnp.asarray([[-1.4], [-0.3], [0.0], [0.6], [2.0]])

pytest.importorskip("diffrax")


def cdf(mixture, x):
    shares, means = np.exp(mixture.log_weights), np.asarray(mixture.means)[:, 0]
    return norm.cdf(x, means, np.sqrt(mixture.covs[:, 0, 0])) @ shares


@pytest.mark.parametrize("name", CURVES)
def test_the_flow_keeps_quantiles(name):
    """On a line the flow cannot change the order of states, so it maps quantiles to quantiles."""
    curve, denoiser = CURVES[name], mixtures.ExactDenoiser(LINE)
    found = jax.vmap(lambda x: flow(denoiser, curve, x, start=0.95, end=0.01))(POINTS)
    high, low = curve.level(0.95), curve.level(0.01)
    before, after = (LINE.noised(level.alpha, level.sigma) for level in (high, low))
    for x, y in zip(np.asarray(POINTS), np.asarray(found), strict=True):
        np.testing.assert_allclose(cdf(after, y), cdf(before, x), atol=2e-4)
    back = jax.vmap(lambda x: flow(denoiser, curve, x, start=0.01, end=0.95))(found)
    np.testing.assert_allclose(back, POINTS, atol=2e-3)


@pytest.mark.parametrize("name", CURVES)
def test_densities(name):
    """Of two dimensions, at two levels; the noise at the end is standard normal up to its mean."""
    curve, denoiser = CURVES[name], mixtures.ExactDenoiser(PLANE)
    points = jnp.asarray([[0.2, 0.5], [1.0, -1.0], [-0.7, 0.4]])

    @jax.jit
    def both(start):
        level = curve.level(start)
        marginal = PLANE.noised(level.alpha, level.sigma)
        found = jax.vmap(lambda x: log_density(denoiser, curve, x, start=start, end=0.9999))
        return found(points), jax.vmap(marginal.log_prob)(points)

    for start in (0.02, 0.3):
        np.testing.assert_allclose(*both(start), atol=0.02)


def test_two_curves_end_at_one_point():
    """Flows of two interpolants through one state, scaled to the same ratio of signal and noise."""
    line, arc = CURVES["rectified"], CURVES["preserving"]
    denoiser = mixtures.ExactDenoiser(LINE)

    def on_the_line(tau):
        """Time and scale of the straight line with the signal over noise of the other curve."""
        level = arc.level(tau)
        time = level.sigma / (level.alpha + level.sigma)
        return time, level.sigma / time

    (top, scale), (bottom, rest) = on_the_line(0.9), on_the_line(0.02)
    there = jax.vmap(lambda x: flow(denoiser, arc, x, start=0.9, end=0.02) / rest)(POINTS)
    straight = jax.vmap(lambda x: flow(denoiser, line, x / scale, start=top, end=bottom))(POINTS)
    np.testing.assert_allclose(straight, there, atol=2e-4)


def test_fixed_steps_approach_it():
    """`DDIM(0.0)` in many steps is the same flow."""
    from numpyro import handlers

    taus = np.linspace(0.02, 0.9, 1001)
    curve, denoiser = CURVES["preserving"], mixtures.ExactDenoiser(LINE)
    schedule = schedules.interpolant(curve.alpha, curve.sigma, taus)
    x = POINTS[1]
    expected = flow(denoiser, curve, x, start=0.9, end=0.02)
    with handlers.substitute(data={"noise": x}), handlers.seed(rng_seed=0):
        trace = handlers.trace(denoise).get_trace(denoiser, schedule, shape=(1,), sampler=DDIM(0.0))
    # the last step of a walk is taken for the data
    np.testing.assert_allclose(trace["x"]["value"][-1], expected, atol=5e-3)


@pytest.mark.compile
def test_another_state_and_other_weights_compile_nothing():
    """Called outside `jit`, with a network whose weights are arrays, that predicts noise."""

    def ends(scale, x):
        denoiser = Denoiser(Scaled(jnp.asarray(scale)), predictors.eps)
        return flow(denoiser, Rectified(), x), log_density(denoiser, Rectified(), x)

    assert np.isfinite(np.concatenate([np.ravel(e) for e in ends(0.5, POINTS[0])])).all()
    assert compilations(lambda: ends(0.7, POINTS[1])) == 0


class Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, x, tau):
        return self.scale * x


@pytest.mark.refusal
def test_too_few_steps_are_refused():
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        flow(mixtures.ExactDenoiser(LINE), Rectified(), POINTS[0], max_steps=3)
