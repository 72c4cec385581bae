"""Feynman-Kac correctors against integrals of products of densities.

The weighted walk of one-dimensional mixtures is followed on a grid, without particles: what it ends with
differs from the product by discretization alone, which must shrink in proportion to the steps. Particles are
then held to the grid, on which their evidence is unbiased at any number of steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.models.diffusion import mixtures, schedules
from smcscale.models.diffusion.correctors import (
    Composed,
    Corrected,
    PowerPath,
    Tilt,
    bridge,
    composed_start,
    exact_divergence,
    probed_divergence,
    share_of_signal,
    target_score,
    tempered_noise,
)
from smcscale.models.diffusion.program import denoise
from support.montecarlo import assert_mean

ONE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.0], [0.8]]),
    jnp.asarray([[[0.3]], [[0.2]]]),
)  # fmt: skip
OTHER = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.6, 0.4])), jnp.asarray([[-0.5], [1.2]]),
    jnp.asarray([[[0.4]], [[0.3]]]),
)  # fmt: skip
PLAIN = mixtures.GaussianMixture(jnp.zeros(1), jnp.asarray([[0.7]]), jnp.asarray([[[0.4]]]))
GRID = np.linspace(-6, 6, 401)
FAMILY = 4


def reward(x):
    return jnp.sum(jnp.sin(2 * x) - 0.2 * x**2)


def denoiser(mixture):
    return mixtures.ExactDenoiser(mixture)


def densities(*parts):
    """Log densities of mixtures at a level."""
    return lambda x, level: jnp.stack(
        [m.noised(level.alpha, level.sigma).log_prob(x) for m in parts]
    )


def grown(level):
    """Powers 1 at the noise, all of 2 at the data."""
    return (1 + share_of_signal(level)) / 2


def crossed(level):
    """From the first model at the noise to guidance by the second."""
    share = share_of_signal(level)
    return jnp.stack([share - 2 * (1 - share), share])


CASES = {
    "annealed": (Composed((denoiser(ONE),), (2.0,)), (ONE,)),
    "flattened": (Composed((denoiser(ONE),), (0.6,)), (ONE,)),
    "guidance": (Composed((denoiser(ONE), denoiser(OTHER)), (-0.5, 1.5)), (ONE, OTHER)),
    "product": (Composed((denoiser(ONE), denoiser(OTHER)), (1.0, 1.0)), (ONE, OTHER)),
    "tilted": (Composed((denoiser(ONE),), (1.0,), Tilt(reward, 1.5)), (ONE,)),
    "heated": (
        Composed((denoiser(ONE),), (2.0,), path=PowerPath(grown, densities(ONE))), (ONE,),
    ),
    "crossing": (
        Composed(
            (denoiser(ONE), denoiser(OTHER)), (-0.5, 1.5), path=PowerPath(crossed, densities(ONE, OTHER))
        ),
        (ONE, OTHER),
    ),
    "all": (
        Composed((denoiser(ONE), denoiser(OTHER)), (0.7, 0.6), Tilt(reward, 1.5)), (ONE, OTHER),
    ),
}  # fmt: skip


def truth(name):
    """`log of the integral` of the product and its mean."""
    composed, parts = CASES[name]
    log_density = sum(
        float(b) * np.asarray(jax.vmap(m.log_prob)(jnp.asarray(GRID)[:, None]), np.float64)
        for b, m in zip(composed.powers, parts, strict=True)
    )
    if composed.tilt is not None:
        log_density = log_density + 1.5 * np.asarray(jax.vmap(reward)(jnp.asarray(GRID)[:, None]))
    density = np.exp(log_density)
    total = np.trapezoid(density, GRID)
    return np.log(total), np.trapezoid(GRID * density, GRID) / total


def followed(composed, sampler, schedule):
    """Log evidence and mean of the weighted walk, on the grid."""

    @jax.jit
    def moves(high, low):
        def one(x):
            law, log_weight = sampler(composed, x, composed(x, high), high, low)
            return law.mean[0], law.variance[0], log_weight(x)

        return jax.vmap(one)(jnp.asarray(GRID)[:, None])

    law, first = composed_start(schedule, composed.at(schedule.level(-1)), (1,))
    mass = np.exp(np.asarray(jax.vmap(law.log_prob)(jnp.asarray(GRID)[:, None]), np.float64))
    mass *= np.exp(float(first(jnp.zeros(1)))) * (GRID[1] - GRID[0])
    for k in range(schedule.num_steps, 0, -1):
        mean, variance, log_weight = (
            np.asarray(a, np.float64) for a in moves(schedule.level(k), schedule.level(k - 1))
        )
        kernel = np.exp(-((GRID - mean[:, None]) ** 2) / (2 * variance[:, None]))
        kernel /= np.sqrt(2 * np.pi * variance[:, None]) / (GRID[1] - GRID[0])
        mass = (mass * np.exp(log_weight)) @ kernel
    return np.log(mass.sum()), GRID @ mass / mass.sum()


@pytest.mark.parametrize(
    ("name", "drift"),
    [
        ("annealed", bridge), ("flattened", tempered_noise), ("guidance", bridge),
        ("heated", bridge), ("crossing", target_score),
        ("tilted", target_score), ("all", target_score), ("all", tempered_noise), ("all", bridge),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("annealed", target_score), ("annealed", tempered_noise), ("flattened", bridge),
                ("product", target_score),
            )
        ),
    ],
)  # fmt: skip
def test_the_walk_approaches_the_product(name, drift):
    """Log Z and mean on the grid: of first order in the steps, and right in the limit."""
    composed = CASES[name][0]
    exact = np.asarray(truth(name))
    coarse, fine = (
        np.asarray(followed(composed, Corrected(drift), schedules.vp_linear(k))) for k in (150, 300)
    )
    print(name, exact, coarse, fine, 2 * fine - coarse)
    # what is left after the first order
    assert (np.abs(2 * fine - coarse - exact) < 0.02).all(), (2 * fine - coarse, exact)


def test_the_bridge_owes_nothing_for_normal_models():
    """Whatever the power, no weight is due while the model is standard normal noise."""
    composed = Composed((denoiser(PLAIN),), (3.0,))
    schedule = schedules.vp_linear(200)
    x = jnp.asarray([0.3])
    high, low = schedule.level(-1), schedule.level(-2)
    owed = {
        drift: float(Corrected(drift)(composed, x, composed(x, high), high, low).log_weight(x))
        for drift in (bridge, target_score)
    }
    assert abs(owed[bridge]) < 1e-3
    assert abs(owed[target_score]) > 0.05


def test_probes_average_to_the_divergence():
    """Over the four probes of two dimensions the estimate is exact on average."""
    matrix = jnp.asarray([[1.0, 0.4], [0.4, 0.5]])
    mixture = mixtures.GaussianMixture(
        jnp.log(jnp.asarray([0.5, 0.5])), jnp.asarray([[0.0, 1.0], [1.0, -1.0]]),
        jnp.stack([matrix, 0.5 * matrix]),
    )  # fmt: skip
    composed = Composed((denoiser(mixture), denoiser(mixture)), (1.0, 2.0))
    level, x = schedules.vp_linear(10).level(4), jnp.asarray([0.2, -0.5])
    from numpyro import handlers

    found = []
    for signs in ([0, 0], [0, 1], [1, 0], [1, 1]):
        with handlers.substitute(data={"probe": jnp.asarray(signs)}), handlers.seed(rng_seed=0):
            found.append(probed_divergence(composed, x, level))
    exact = exact_divergence(composed, x, level)
    np.testing.assert_allclose(np.mean(found, axis=0), exact, rtol=1e-4)
    assert np.ptp(np.asarray(found)[:, 0]) > 0.1
    step = 1e-3
    eye = step * jnp.eye(2)
    by_hand = sum(
        (composed.noises(x - e, level) - composed.noises(x + e, level))[:, i] / (2 * step)
        for i, e in enumerate(eye)
    )
    np.testing.assert_allclose(exact, by_hand / level.sigma, rtol=5e-3)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        pytest.param("annealed", Corrected(), marks=pytest.mark.slow),
        pytest.param("annealed", Corrected(divergence=probed_divergence), marks=pytest.mark.slow),
        pytest.param("product", Corrected(), marks=pytest.mark.slow),
        ("all", Corrected()),
    ],
    ids=["annealed", "annealed-probe", "product", "all"],
)
def test_evidence_of_particles(name, sampler):
    """`E[Z]` of 32 particles is the grid's, at 40 steps, where both are far from the product."""
    composed = CASES[name][0]
    schedule = schedules.vp_linear(40)
    expected = np.exp(followed(composed, Corrected(sampler.drift), schedule)[0])
    smc = SMC(
        ParticleFilter(denoise, store="last"), num_particles=32, num_runs=3000, progress_bar=False
    )
    smc.run(
        jax.random.key(5), composed, schedule, shape=(1,), sampler=sampler,
        start=composed_start(schedule, composed.powers, (1,)),
    )  # fmt: skip
    found = np.exp(np.asarray(smc.log_evidence, np.float64)) / expected
    assert_mean(found, 1.0, family=FAMILY, smallest_bias=0.08)


@pytest.mark.refusal
def test_refusals():
    schedule = schedules.vp_linear(10)
    high, low, x = schedule.level(3), schedule.level(2), jnp.zeros(1)
    with pytest.raises(TypeError, match="Composed"):
        Corrected()(denoiser(ONE), x, denoiser(ONE)(x, high), high, low)
    with pytest.raises(ValueError, match="`powers` must add up to more than 0"):
        composed_start(schedule, (1.0, -1.0), (1,))
    with pytest.raises(ValueError, match="one power for each"):
        Composed((denoiser(ONE),), (1.0, 2.0))
