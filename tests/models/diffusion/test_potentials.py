"""Every rule telescopes to `exp(lambda r(x_0))`, whatever was scored on the way, on any path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from smcscale.models.diffusion import schedules
from smcscale.models.diffusion.potentials import (
    Exponential,
    Interval,
    Polynomial,
    Steering,
    difference,
    full,
    gaussian_guess,
    maximum,
    product,
    total,
)
from smcscale.models.diffusion.predictors import Prediction
from smcscale.models.diffusion.program import denoise

K = 6
SCHEDULE = schedules.vp_cosine(K)
RULES = (difference, maximum, total, product)
# what the denoiser says of the data at every step, from noise; the last one is the data
PATH = np.array([-0.4, 0.7, 0.1, -1.3, -0.2, 0.5, 0.9])


def reward(x0):
    return 1.5 * jnp.sum(x0) - 0.8


def potentials(steering, path=PATH, guesses=None):
    """Log potentials `(K + 1,)` along a path of predictions, and what was seen in the end."""
    walk = SCHEDULE.walk()

    def weigh(seen, x0, level, made, last):
        x = jnp.where(last, x0, 0.3)[None]  # the state itself is the data only at the end
        prediction = Prediction(x0[None], jnp.zeros(1))
        return steering(seen, x, prediction, guesses, level, made, last)

    def run(path):
        zero, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
        seen, first = weigh(steering.start(), path[0], SCHEDULE.level(-1), zero, no)

        def step(seen, row):
            x0, walk = row
            return weigh(seen, x0, walk.low, walk.made, walk.last)

        seen, rest = jax.lax.scan(step, seen, (path[1:], walk))
        return seen, jnp.append(first, rest)

    seen, logs = jax.jit(run)(jnp.asarray(path))
    return seen, np.asarray(logs)


OPTIONS = {
    "all": {},
    "few": {"scored": Interval(start=2, stop=6, every=2)},
    "tempered": {"tempering": Exponential(0.2)},
    "few, tempered": {"scored": Interval(1, None, 3), "tempering": Polynomial(0.1, 2.0)},
    "learned": {"value": lambda x, prediction, level: jnp.sum(x) * level.sigma},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_product_of_all_potentials_is_the_target(rule, options):
    steering = Steering(reward, rule, strength=jnp.asarray(1.7), **OPTIONS[options])
    seen, logs = potentials(steering)
    exact = 1.7 * (1.5 * PATH[-1] - 0.8)
    np.testing.assert_allclose(logs.sum(), exact, rtol=1e-5)
    np.testing.assert_allclose(seen.log_product, exact, rtol=1e-5)
    np.testing.assert_allclose(seen.last, exact / 1.7, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_rules_have_their_formulas(rule):
    _, logs = potentials(Steering(reward, rule, strength=2.0))
    r = 1.5 * PATH - 0.8
    exact = {
        difference: np.diff(np.append(0, 2 * r)),
        maximum: 2 * np.maximum.accumulate(r),
        total: 2 * np.cumsum(r),
        product: 2 * r,
    }[rule]
    np.testing.assert_allclose(logs[:-1], exact[:-1], rtol=1e-5, atol=1e-5)


def test_tempered_differences_have_the_tempered_target_at_every_step():
    _, logs = potentials(Steering(reward, strength=2.0, tempering=Exponential(0.2)))
    share = np.minimum(1.2 ** np.arange(K + 1) - 1, 1)
    exact = 2 * share * (1.5 * PATH - 0.8)
    np.testing.assert_allclose(np.cumsum(logs)[:-1], exact[:-1], rtol=1e-4, atol=1e-5)


def reward_calls(steering):
    """Of one particle, the initial noise included."""
    made = jnp.arange(K + 1)
    return int(sum(steering.calls(m, m == K) for m in made))


def test_only_scored_steps_weigh():
    steering = Steering(reward, maximum, scored=Interval(start=2, stop=6, every=3))
    _, logs = potentials(steering)
    np.testing.assert_array_equal(np.nonzero(logs)[0], [2, 5, 6])
    assert reward_calls(steering) == 3
    assert reward_calls(Steering(reward)) == K + 1
    guessing = Steering(reward, num_guesses=4, scored=Interval(start=2, stop=6, every=3))
    assert reward_calls(guessing) == 2 * 4 + 1
    learned = Steering(reward, value=lambda x, prediction, level: jnp.sum(x))
    assert reward_calls(learned) == 1


def test_guesses_are_averaged_in_the_scale_of_the_weights():
    guesses = jnp.array([[0.3], [-0.5], [1.1]])
    _, logs = potentials(Steering(reward, strength=2.0, num_guesses=3), guesses=guesses)
    mean = np.log(np.mean(np.exp(2.0 * (1.5 * np.asarray(guesses)[:, 0] - 0.8))))
    np.testing.assert_allclose(logs[0], mean, rtol=1e-5)
    np.testing.assert_allclose(logs.sum(), 2.0 * (1.5 * PATH[-1] - 0.8), rtol=1e-5)
    level, x = SCHEDULE.level(3), jnp.zeros(2)
    known = Prediction(jnp.ones(2), x, jnp.array([0.25, 4.0]))
    np.testing.assert_allclose(gaussian_guess(x, known, level).base_dist.scale, [0.5, 2.0])
    plain = gaussian_guess(x, Prediction(jnp.ones(2), x), level).base_dist
    np.testing.assert_allclose(plain.scale, level.sigma, rtol=1e-6)  # a sum of squares of 1


@pytest.mark.parametrize("rule", RULES)
def test_the_dead_stay_dead(rule):
    path = PATH.copy()
    path[3] = -np.inf
    _, logs = potentials(Steering(reward, rule), path)
    assert not np.isnan(logs).any()
    if rule is not maximum:
        assert (logs[3:] == -np.inf).all()


def test_temperings():
    made = jnp.arange(8)
    np.testing.assert_allclose(
        Exponential(0.5)(made), np.minimum(1.5 ** np.arange(8) - 1, 1), rtol=1e-5
    )
    np.testing.assert_allclose(
        Polynomial(0.3, 2.0)(made), np.minimum((0.3 * np.arange(8)) ** 2, 1), rtol=1e-5
    )
    np.testing.assert_array_equal(full(made), 1)


@pytest.mark.refusal
def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="not both"):
        Steering(reward, num_guesses=2, value=lambda x, prediction, level: jnp.sum(x))
    with pytest.raises(ValueError, match="every"):
        Interval(every=0)
    with pytest.raises(ValueError, match="a scalar"):
        potentials(Steering(lambda x0: x0))
    with pytest.raises(TypeError, match=r"Interval\(every=5\)"):
        Steering(reward, scored=5)
    with pytest.raises(ValueError, match=r"scalar `strength`.* shape \(2,\)"):
        Steering(reward, strength=jnp.ones(2))
    with pytest.raises(ValueError, match="0 or more, got shape .* and -1"):
        Steering(reward, num_guesses=-1)
    with pytest.raises(TypeError, match="`host_denoise`"):
        jax.jit(lambda: potentials(Steering(lambda x0: np.sum(np.asarray(x0)))))()


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 2}, r"shape=\(64,\)"),
        ({"steering": reward}, r"Steering\(reward\)"),
        ({"schedule": 10}, r"`schedule` cannot be a int"),
        ({}, r"`denoiser` returned a NoneType"),
    ],
)
def test_another_kind_is_refused_by_name(arguments, message):
    given = {"schedule": SCHEDULE, "shape": (1,)} | arguments
    with pytest.raises(TypeError, match=message), handlers.seed(rng_seed=0):
        denoise(lambda x, level: None, **given)
