"""Networks and rewards that run Python: a walk of known law, exact evidence, counts, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion import predictors, samplers, schedules
from smcscale.models.diffusion.host_program import host_denoise
from smcscale.models.diffusion.potentials import Interval, Steering, maximum
from smcscale.models.diffusion.predictors import Denoiser
from support.montecarlo import assert_mean

K, MEAN, VARIANCE, SLOPE = 6, 0.7, 0.4, 1.3
SCHEDULE = schedules.vp_cosine(K)
#: comparisons of evidence in this file
FAMILY = 6


def noise(x, tau):
    """`E[eps | x]` for data N(MEAN, VARIANCE), in NumPy; `tau` says which level."""
    level = np.abs(np.asarray(SCHEDULE.tau)[None] - tau[:, None]).argmin(1)
    alpha, sigma = (np.asarray(a)[level][:, None] for a in (SCHEDULE.alpha, SCHEDULE.sigma))
    return sigma * (x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


def reward(x):
    """Linear, of all states at once; NumPy and nothing else."""
    assert type(x) is np.ndarray
    return SLOPE * x[:, 0]


def data_law() -> tuple[float, float]:
    """Mean and variance of the data under the ancestral walk, which is linear: no particles."""
    denoiser = Denoiser(lambda x, tau: jnp.asarray(noise(np.asarray(x)[None], np.asarray(tau)[None])[0]),
                        predictors.eps)  # fmt: skip
    mean, variance = 0.0, 1.0
    for k in range(K, 0, -1):
        high, low = SCHEDULE.level(k), SCHEDULE.level(k - 1)

        def law(x, high=high, low=low):
            x = jnp.asarray([x], jnp.float32)
            found = samplers.ancestral(denoiser, x, denoiser(x, high), high, low)
            return float(found.mean[0]), float(found.variance[0])

        (at_zero, added), (at_one, _) = law(0.0), law(1.0)
        mean, variance = (
            at_zero + (at_one - at_zero) * mean,
            (at_one - at_zero) ** 2 * variance + added,
        )
    return mean, variance


def run(steering, num_particles=8, num_runs=1, network=noise, seed=0, **options):
    program, rows = host_denoise(
        network, (SCHEDULE, predictors.eps), steering, shape=(1,), **options
    )
    smc = SMC(
        ParticleFilter(program, trigger=triggers.ess_below(0.7), store="last"),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), rows)
    return smc


@pytest.mark.statistical
@pytest.mark.parametrize(
    "steering",
    [
        Steering(reward),
        Steering(reward, maximum, scored=Interval(every=2)),
        Steering(reward, strength=0.8, num_guesses=3),
    ],
    ids=["difference", "maximum", "guesses"],
)
def test_evidence_is_that_of_the_walk(steering):
    mean, variance = data_law()
    slope = SLOPE * float(steering.strength)
    smc = run(steering, 8, 4000)
    exact = np.exp(slope * mean + slope**2 * variance / 2)
    ratio = np.exp(np.asarray(smc.log_evidence, np.float64)) / exact
    assert_mean(ratio, 1.0, family=FAMILY, smallest_bias=0.06)
    # the law of the data is tilted: normal with the mean moved by slope * variance
    weights = jax.nn.softmax(smc.result.log_weights, axis=1)
    x = smc.result.final["x"][..., 0]
    moved = np.asarray(jnp.sum(weights * x, axis=1)) * ratio
    assert_mean(moved, mean + slope * variance, family=FAMILY, smallest_bias=0.1)


@pytest.mark.slow
def test_without_steering_the_data_have_the_law_of_the_walk():
    mean, variance = data_law()
    x = np.asarray(run(None, 4000).result.final["x"])
    error = np.sqrt(variance / x.size)
    assert abs(x.mean() - mean) < 4 * error
    assert abs(x.var() - variance) < 4 * variance * np.sqrt(2 / x.size)


def test_calls_are_counted_and_come_in_pieces():
    sizes, rewards = [], []

    def network(x, tau):
        assert x.dtype == tau.dtype == np.float32 and tau.shape == x.shape[:1]
        sizes.append(len(x))
        return noise(x, tau)

    def counted(x):
        rewards.append(len(x))
        return reward(x)

    steering = Steering(counted, num_guesses=2, scored=Interval(start=1, every=3))
    smc = run(steering, 5, 2, network, batch_size=4)
    assert sizes == [4, 4, 2] * K
    assert rewards == [20, 20, 10]  # after one move and after four, and of the data
    assert smc.cost["denoiser_calls"] == 10 * K and smc.cost["reward_calls"] == sum(rewards)


def test_another_batch_size_changes_no_number():
    whole, pieces = (run(Steering(reward), batch_size=size).result.final["x"] for size in (None, 3))
    np.testing.assert_array_equal(whole, pieces)


@pytest.mark.refusal
def test_what_host_functions_return_is_checked():
    with pytest.raises(TypeError, match=r"network was given 8 states and returned shape \(8,\)"):
        run(None, network=lambda x, tau: x[:, 0])
    with pytest.raises(TypeError, match=r"reward was given 8 states and returned shape \(\)"):
        run(Steering(lambda x: x.sum()))
    with pytest.raises(FloatingPointError, match="NaN"):
        run(Steering(lambda x: np.full(len(x), np.nan)))


@pytest.mark.refusal
def test_what_cannot_run_on_the_host_is_refused():
    _, heun = samplers.churn(schedules.edm(K), amount=2.0)
    with pytest.raises(ValueError, match="calls the network inside a step"):
        run(None, sampler=heun)
    with pytest.raises(ValueError, match="`value` of a Steering is traced"):
        run(Steering(reward, value=lambda x, prediction, level: x[0]))
    with pytest.raises(TypeError, match="`steering` cannot be a function"):
        run(reward)
    with pytest.raises(TypeError, match="what the network predicts"):
        host_denoise(lambda x, tau: x, schedules.vp_linear(3), shape=(2,))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        run(None, batch_size=0)
