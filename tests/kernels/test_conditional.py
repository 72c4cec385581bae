"""Resampling given a kept ancestor: its law against plain draws that happen to hold it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from smcscale.kernels import resampling
from smcscale.kernels.resampling import conditional

FORMS = ("multinomial", "systematic", "stratified", "residual", "killing")
#: the kernels whose slots are exchangeable once they are shuffled, not only rotated
SHUFFLED = ("multinomial", "residual")
WEIGHTS = {"skewed": [0.55, 0.0, 0.33, 0.12], "even": [0.25, 0.25, 0.25, 0.25]}
DRAWS = 100_000


def codes(ancestors):
    """A number for each vector of ancestors of four particles."""
    return np.asarray(ancestors) @ 4 ** np.arange(ancestors.shape[1])


def plain(name, log_weights, n, kept_ancestor, kept_slot):
    """Plain draws with slots in random order, those that hold the kept ancestor in its slot."""
    if name == "killing":
        drawn = killed(log_weights)
        return drawn[drawn[:, kept_slot] == kept_ancestor]
    kernel = getattr(resampling, name)

    def draw(key):
        first, second = jax.random.split(key)
        ancestors = kernel(first, log_weights, n)
        if name in SHUFFLED:
            return jax.random.permutation(second, ancestors)
        return jnp.roll(ancestors, jax.random.randint(second, (), 0, n))

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), DRAWS)))
    return drawn[drawn[:, kept_slot] == kept_ancestor]


def killed(log_weights):
    """Killing resampling written out: candidates rotated, survivors by weight, the others redrawn."""
    rng = np.random.default_rng(0)
    weights = np.exp(np.asarray(log_weights, np.float64))
    weights /= weights.sum()
    n = len(weights)
    candidates = (np.arange(n) + rng.integers(0, n, (DRAWS, 1))) % n
    survives = rng.random((DRAWS, n)) < weights[candidates] / weights.max()
    return np.where(survives, candidates, rng.choice(n, (DRAWS, n), p=weights))


def given(name, log_weights, n, kept_ancestor, kept_slot, draws=DRAWS, seed=1):
    form = conditional.form_of(getattr(resampling, name))
    draw = jax.jit(jax.vmap(lambda key: form(key, log_weights, n, kept_ancestor, kept_slot)))
    return np.asarray(draw(jax.random.split(jax.random.key(seed), draws)))


@pytest.mark.statistical
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", FORMS)
def test_law_is_that_of_plain_draws_with_the_kept_one(name, weights):
    """Chi-square over all vectors of ancestors, of a particle of middle weight in the third slot."""
    log_weights = jnp.log(jnp.asarray(WEIGHTS[weights]))
    n, kept_ancestor, kept_slot = (4 if name == "killing" else 5), 2, 2
    expected = plain(name, log_weights, n, kept_ancestor, kept_slot)
    found = given(name, log_weights, n, kept_ancestor, kept_slot)
    assert (found[:, kept_slot] == kept_ancestor).all()
    outcomes, places = np.unique(
        np.concatenate([codes(expected), codes(found)]), return_inverse=True
    )
    table = np.zeros((2, len(outcomes)))
    np.add.at(table[0], places[: len(expected)], 1)
    np.add.at(table[1], places[len(expected) :], 1)
    often = table.sum(0) >= 20
    table = np.column_stack([table[:, often], table[:, ~often].sum(1)])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] > 1:
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3 / (len(FORMS) * len(WEIGHTS))


@pytest.mark.parametrize("name", FORMS)
def test_contract(name):
    """The kept one in its slot, ancestors in range and alive, other slots not fixed by it."""
    log_weights = jnp.asarray([-0.5, 0.3, -jnp.inf, 0.6, 0.0, -0.4])
    for kept_ancestor, kept_slot in ((0, 0), (3, 5), (5, 2)):
        found = given(name, log_weights, 6, kept_ancestor, kept_slot, draws=200)
        assert found.dtype == np.int32 and (found[:, kept_slot] == kept_ancestor).all()
        assert np.isin(found, [0, 1, 3, 4, 5]).all()
        assert len(np.unique(found, axis=0)) > 1


@pytest.mark.parametrize("name", FORMS)
def test_one_particle_is_the_kept_one(name):
    found = given(name, jnp.zeros(1), 1, 0, 0, draws=3)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("name", ["multinomial", "systematic", "stratified", "residual"])
def test_the_kept_one_stays_among_a_hundred_thousand(name):
    """Its light stretch of the counts is found exactly, in float32."""
    log_weights = jax.random.normal(jax.random.key(2), (100_000,)).at[70_001].set(-12.0)
    form = jax.jit(conditional.form_of(getattr(resampling, name)), static_argnums=2)
    for seed in range(20):
        ancestors = form(jax.random.key(seed), log_weights, 100_000, 70_001, 31)
        assert int(ancestors[31]) == 70_001


def test_a_kernel_brings_its_own_form():
    def mine(key, log_weights, n):
        return resampling.systematic(key, log_weights, n)

    with pytest.raises(ValueError, match="the resampling kernel mine has no form"):
        conditional.form_of(mine)
    mine.conditional = conditional.systematic
    assert conditional.form_of(mine) is conditional.systematic


@pytest.mark.parametrize("kernel", [resampling.ssp, resampling.metropolis, resampling.rejection])
def test_kernels_without_a_form_are_refused_by_name(kernel):
    with pytest.raises(ValueError, match=getattr(kernel, "__name__", type(kernel).__name__)):
        conditional.form_of(kernel)
    with pytest.raises(ValueError, match="n = 5 ancestors of 4 particles"):
        conditional.killing(jax.random.key(0), jnp.zeros(4), 5, jnp.asarray(0), jnp.asarray(0))
