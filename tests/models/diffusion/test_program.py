"""`denoise` in a particle filter: evidence and law against closed forms; calls of the network."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.models.diffusion import potentials, predictors, samplers, schedules
from smcscale.models.diffusion.mixtures import (
    ExactDenoiser,
    ExactReverse,
    ExactTwist,
    GaussianMixture,
    TwistedReverse,
    quadratic,
    twisted_start,
)
from smcscale.models.diffusion.potentials import Interval, Steering
from smcscale.models.diffusion.predictors import Denoiser
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.samplers import DDIM, DDPM, EulerMaruyama, FlowSDE, churn
from smcscale.placement import particle_mesh
from support.montecarlo import assert_mean
from support.rules import OneRule

MIXTURE = GaussianMixture(
    jnp.log(jnp.array([0.35, 0.65])), jnp.array([[-1.5], [1.0]]), jnp.array([[[0.3]], [[0.2]]])
)
NORMAL = GaussianMixture(jnp.zeros(1), jnp.array([[0.4]]), jnp.array([[[0.5]]]))
REWARD = quadratic([[1.4]], [0.4], constant=-0.3)


class OneSampler(eqx.Module):
    """A sampler with normal steps chosen by an array, so that all share one compiled program."""

    members: tuple
    which: jax.Array

    def __call__(self, *args):
        laws = [member(*args).base_dist for member in self.members]
        loc, scale = (jnp.stack([getattr(law, n) for law in laws]) for n in ("loc", "scale"))
        return dist.Normal(loc[self.which], scale[self.which]).to_event(1)


def run(denoiser, schedule, steering, *, particles, runs, options=None, seed=0, **kwargs):
    smc = SMC(
        ParticleFilter(denoise, store="last", **(options or {})),
        num_particles=particles, num_runs=runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), denoiser, schedule, steering, shape=(1,), **kwargs)
    return smc


def assert_tilted(smc, law, strength, bias):
    """Evidence, and with it the means of the data and of the reward, are those of the tilted law."""
    exact, slope = jax.value_and_grad(lambda s: law.tilted(REWARD, s).log_normalizer)(strength)
    mean = float(law.tilted(REWARD, strength).mixture.mean[0])
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64) - float(exact))
    found = {n: np.asarray(v, np.float64)[:, -1] for n, v in smc.result.moments.mean.items()}
    replicates = np.stack([ratio, ratio * found["x"][:, 0], ratio * found["reward"]], axis=1)
    assert_mean(replicates, [1.0, mean, float(slope)], family=FAMILY, smallest_bias=bias)


FAMILY = 3 * 80

# ---- without discretization error: the exact reverse kernel of a mixture


@pytest.mark.statistical
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(("steps", "runs"), [(8, 3000), (128, 1000)])
def test_every_rule_has_the_exact_evidence_and_law(steps, runs, which):
    schedule = schedules.vp_linear(steps)
    top = schedule.level(-1)
    steering = Steering(
        REWARD,
        OneRule(jnp.asarray(which)),
        strength=jnp.asarray(0.8),
        scored=Interval(steps // 4, None, steps // 4),
    )
    smc = run(
        ExactDenoiser(MIXTURE),
        schedule,
        steering,
        particles=16,
        runs=runs,
        sampler=ExactReverse(MIXTURE),
        start=MIXTURE.noised(top.alpha, top.sigma).distribution(),
    )
    assert_tilted(smc, MIXTURE, 0.8, bias=0.1)
    size = 16 * runs
    assert smc.cost["denoiser_calls"] == size * steps
    assert smc.cost["reward_calls"] == size * 4


@pytest.mark.parametrize("steps", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_the_exact_twist_has_weights_without_variance(steps):
    schedule = schedules.vp_linear(steps)
    smc = run(
        ExactDenoiser(MIXTURE),
        schedule,
        Steering(REWARD, strength=1.3, value=ExactTwist(MIXTURE, REWARD, 1.3)),
        particles=8,
        runs=50,
        sampler=TwistedReverse(MIXTURE, REWARD, 1.3),
        start=twisted_start(MIXTURE, REWARD, 1.3, schedule.level(-1)),
    )
    found = np.asarray(smc.log_evidence, np.float64)
    assert found.var() < 1e-10
    exact = MIXTURE.tilted(REWARD, 1.3).log_normalizer
    np.testing.assert_allclose(found, exact, atol=2e-5)


@pytest.mark.statistical
def test_a_coarse_sampler_has_the_evidence_of_its_own_law():
    """DDIM in six steps: Z by a recursion on a grid, 12 digits, found independently."""
    kept = np.array([1, 0.97, 0.85, 0.6, 0.3, 0.1, 0.02])
    zero = np.zeros(7)
    schedule = schedules.as_schedule(
        np.sqrt(kept), np.sqrt(1 - kept), np.arange(7.0), zero, zero, 1.0
    )
    smc = run(
        ExactDenoiser(MIXTURE), schedule, Steering(REWARD, strength=1.3), particles=4, runs=12_000
    )
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64)) / 0.379576709909
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.03)


# ---- every sampler, on normal data, where the law it gives is normal too


def cases(steps):
    """Samplers and their levels, all of `steps` moves."""
    vp, flow = schedules.vp_linear(steps, beta_max=8.0), schedules.rectified_flow(steps)
    edm = schedules.edm(steps, sigma_min=0.05, sigma_max=8.0)
    raised, euler = churn(edm, amount=2.0, heun=False)
    return [
        (DDIM(1.0), vp),
        (DDIM(0.5), flow),
        (DDPM(), vp),
        (EulerMaruyama(), vp),
        (EulerMaruyama(), edm),
        (FlowSDE(1.0), flow),
        (euler, raised),
        (churn(edm, amount=2.0)[1], raised),
    ]


def law_of(sampler, schedule, denoiser):
    """The normal law of the data that a sampler gives: its linear steps composed."""

    @jax.jit
    def steps(walk):
        def step(x, row):
            law = sampler(denoiser, x, denoiser(x, row.high), row.high, row.low).base_dist
            return law.loc[0], law.scale[0]

        ends = [jax.vmap(lambda row, x=x: step(x, row))(walk) for x in (jnp.zeros(1), jnp.ones(1))]
        return ends[0][0], ends[1][0] - ends[0][0], ends[0][1]

    mean, variance = 0.0, float(schedule.initial_scale) ** 2
    for b, m, s in zip(*(np.asarray(a, np.float64) for a in steps(schedule.walk())), strict=True):
        mean, variance = b + m * mean, m**2 * variance + s**2
    return GaussianMixture(jnp.zeros(1), jnp.array([[mean]]), jnp.array([[[variance]]]))


PAIRS = [(i, (i + shift) % 4, steps) for shift, steps in ((0, 6), (1, 24)) for i in range(8)]
PLAIN = [
    pytest.param(*pair, marks=pytest.mark.slow)
    if pair in ((0, 0, 6), (1, 2, 24), (3, 3, 6), (5, 1, 6), (6, 2, 6), (7, 3, 6))
    else pair
    for pair in PAIRS
]
OTHERS = [
    pytest.param(i, rule, steps, marks=pytest.mark.grid)
    for steps in (6, 24)
    for i in range(8)
    for rule in range(4)
    if (i, rule, steps) not in PAIRS
]


@pytest.mark.statistical
@pytest.mark.parametrize(("which", "rule", "steps"), PLAIN + OTHERS)
def test_samplers_and_rules_have_the_evidence_of_their_law(which, rule, steps):
    members = cases(steps)
    sampler, schedule = members[which]
    denoiser = ExactDenoiser(NORMAL)
    law = law_of(sampler, schedule, denoiser)
    steering = Steering(
        REWARD,
        OneRule(jnp.asarray(rule)),
        strength=jnp.asarray(0.8),
        scored=Interval(steps // 3, None, steps // 3),
    )
    chosen = OneSampler(tuple(m for m, _ in members), jnp.asarray(which))
    smc = run(denoiser, schedule, steering, particles=8, runs=4000, sampler=chosen)
    assert_tilted(smc, law, 0.8, bias=0.08)


@pytest.mark.statistical
def test_other_kernels_guesses_and_tempering_keep_the_target():
    steering = Steering(
        REWARD,
        potentials.maximum,
        strength=jnp.asarray(0.8),
        num_guesses=3,
        tempering=potentials.Exponential(0.1),
    )
    schedule = schedules.vp_linear(6, beta_max=8.0)
    denoiser = ExactDenoiser(NORMAL)
    options = {
        "resampling": resampling.stratified,
        "trigger": triggers.always,
        "annealing": annealing.ESSFloor(0.6),
    }
    smc = run(denoiser, schedule, steering, particles=8, runs=4000, options=options)
    assert_tilted(smc, law_of(samplers.ancestral, schedule, denoiser), 0.8, bias=0.08)
    assert smc.cost["reward_calls"] == 8 * 4000 * (6 * 3 + 1)


# ---- calls, and the program under plain NumPyro


@pytest.mark.slow
def test_heun_steps_count_two_calls_but_for_the_last():
    schedule, sampler = churn(schedules.edm(5), amount=2.0)
    smc = run(ExactDenoiser(NORMAL), schedule, None, particles=4, runs=2, sampler=sampler)
    assert smc.cost["denoiser_calls"] == 4 * 2 * (2 * 5 - 1)
    assert "reward_calls" not in smc.cost


@pytest.mark.parametrize("steps", [1, 4])
def test_the_network_is_called_once_for_each_level_with_noise(steps):
    seen = []

    def network(x, tau):
        seen.append(float(tau))
        return 0.5 * x

    schedule = schedules.vp_cosine(steps)
    denoiser = Denoiser(network, predictors.eps)
    with jax.disable_jit():
        program = handlers.seed(denoise, 0)
        sites = handlers.trace(program).get_trace(denoiser, schedule, Steering(REWARD), shape=(1,))
    np.testing.assert_allclose(seen, schedule.tau[:0:-1], rtol=1e-6)
    assert sites["noise"]["value"].shape == (1,)
    assert sites["x"]["value"].shape == (steps, 1)


@pytest.mark.slow
def test_samples_are_paths_from_noise_to_data():
    schedule = schedules.vp_cosine(5)
    smc = SMC(ParticleFilter(denoise), num_particles=16, progress_bar=False)
    denoiser = Denoiser(lambda x, tau: 0.5 * x, predictors.eps)
    smc.run(
        jax.random.key(0), denoiser, schedule, Steering(lambda x0: -jnp.sum(x0**2)), shape=(3, 2)
    )
    samples = smc.get_samples()
    assert samples["noise"].shape == (16, 3, 2)
    assert samples["x"].shape == (16, 5, 3, 2)
    scored = -np.sum(np.asarray(samples["x"])[:, -1] ** 2, axis=(1, 2))
    np.testing.assert_allclose(samples["reward"][:, -1], scored, rtol=1e-5)


@pytest.mark.multidevice
def test_particles_over_devices_give_the_same_numbers():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    steering = Steering(REWARD, strength=jnp.asarray(1.3))
    args = (ExactDenoiser(MIXTURE), schedules.vp_linear(8), steering)
    alone = run(*args, particles=64, runs=2)
    with jax.set_mesh(particle_mesh()):
        spread = run(*args, particles=64, runs=2)
    assert {s.data.shape for s in spread.result.final["x"].addressable_shards} == {(2, 8, 1)}
    np.testing.assert_allclose(spread.log_evidence, alone.log_evidence, atol=1e-4)
