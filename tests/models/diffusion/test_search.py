"""Searches: what they return, what they count, and that more calls find more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.models.diffusion import DDIM, ancestral, mixtures, search, vp_linear

MIXTURE = mixtures.GaussianMixture(
    jnp.log(jnp.asarray([0.35, 0.65])), jnp.asarray([[-1.5, 0.0], [1.0, 0.5]]),
    jnp.stack([0.3 * jnp.eye(2), 0.2 * jnp.eye(2)]),
)  # fmt: skip
SCHEDULE = vp_linear(8)


def denoiser(x, level):
    return mixtures.ExactDenoiser(MIXTURE)(x, level)._replace(variance=None)


def reward(x):
    return -jnp.sum((x - jnp.asarray([-1.0, 0.7])) ** 2)


class Counted:
    """A denoiser that counts its calls as they happen."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, level):
        jax.debug.callback(self._count, x[0])  # of x, so that each of a batch calls
        return denoiser(x, level)

    def _count(self, _):
        self.calls += 1


SEARCHES = {
    "random": lambda key, d: search.random_search(
        key, d, SCHEDULE, reward, shape=(2,), num_noises=5
    ),
    "zero order": lambda key, d: search.zero_order(
        key, d, SCHEDULE, reward, shape=(2,), num_rounds=3, num_candidates=4
    ),
    "paths": lambda key, d: search.over_paths(
        key, d, SCHEDULE, reward, shape=(2,), num_paths=2, num_children=3, up=1, down=3, start=5
    ),
    "local": lambda key, d: search.local_search(
        key, d, SCHEDULE, reward, shape=(2,), num_candidates=3, every=3
    ),
    "rollover": lambda key, d: search.rollover(
        key, d, SCHEDULE, reward, shape=(2,), num_calls=41, num_noises=4
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_returned_has_its_reward_and_repeats(name):
    found, again = (SEARCHES[name](jax.random.key(3), denoiser) for _ in range(2))
    assert found.x.shape == (2,)
    np.testing.assert_allclose(found.reward, reward(found.x), rtol=1e-5)
    np.testing.assert_array_equal(found.x, again.x)
    other = SEARCHES[name](jax.random.key(4), denoiser)
    assert jnp.abs(other.x - found.x).max() > 1e-3


@pytest.mark.parametrize("name", SEARCHES)
def test_calls_are_counted(name):
    counted = Counted()
    found = jax.block_until_ready(SEARCHES[name](jax.random.key(3), counted))
    jax.effects_barrier()
    assert counted.calls == found.cost["denoiser_calls"]
    if name == "rollover":
        assert counted.calls == 41


def test_the_best_of_several_noises_is_the_best():
    found = SEARCHES["random"](jax.random.key(0), denoiser)
    assert found.reward == found.trace.max() and found.trace.shape == (5,)
    noise, walk = jax.random.split(jax.random.key(0))
    start = jax.random.normal(noise, (5, 2))
    keys = jax.random.split(walk, 5)
    data = [
        search.walked(k, denoiser, SCHEDULE, DDIM(0.0), x, 8)
        for k, x in zip(keys, start, strict=True)
    ]
    np.testing.assert_allclose([reward(x) for x in data], found.trace, rtol=1e-4, atol=1e-5)


def test_rounds_never_lose_what_was_found():
    for seed in range(5):
        found = SEARCHES["zero order"](jax.random.key(seed), denoiser)
        assert (np.diff(found.trace) >= 0).all() and found.trace[-1] == found.reward


@pytest.mark.slow
@pytest.mark.statistical
def test_more_candidates_find_more():
    """Mean reward over 60 independent runs, by candidates: beyond four standard errors."""
    keys = jax.random.split(jax.random.key(0), 60)

    def rewards(num_candidates):
        run = jax.vmap(
            lambda k: (
                search.local_search(
                    k, denoiser, SCHEDULE, reward, shape=(2,), num_candidates=num_candidates
                ).reward
            )
        )
        return np.asarray(run(keys), np.float64)

    gain = rewards(8) - rewards(1)
    assert gain.mean() > 4 * gain.std(ddof=1) / np.sqrt(len(gain))


def test_a_walk_that_draws_has_draws_of_its_own():
    found = search.random_search(
        jax.random.key(0), denoiser, SCHEDULE, reward, shape=(2,), num_noises=4, sampler=ancestral
    )
    assert len(np.unique(np.asarray(found.trace))) == 4


@pytest.mark.refusal
def test_refusals():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="radius"):
        search.zero_order(
            key, denoiser, SCHEDULE, reward, shape=(2,), num_rounds=1, num_candidates=1, radius=0.0
        )
    with pytest.raises(ValueError, match="does not go down"):
        search.over_paths(
            key, denoiser, SCHEDULE, reward, shape=(2,), num_paths=1, num_children=1, up=2, down=2,
            start=4,
        )  # fmt: skip
    with pytest.raises(ValueError, match="rollover cannot spend"):
        search.rollover(key, denoiser, SCHEDULE, reward, shape=(2,), num_calls=9, num_noises=4)
