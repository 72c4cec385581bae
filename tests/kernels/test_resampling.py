"""Schemes and parallel kernels of `kernels/resampling/`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale.kernels import resampling
from support import contracts
from support.contracts import RESAMPLING, offspring, weights_of
from support.montecarlo import assert_mean

MEMBERS = pytest.mark.parametrize("name", RESAMPLING)


@MEMBERS
@pytest.mark.statistical
def test_offspring(name):
    contracts.check_offspring(RESAMPLING[name])


@pytest.mark.statistical
def test_rejection_is_exact_whatever_the_tries():
    member = RESAMPLING["rejection"]._replace(kernel=resampling.Rejection(tries=2), any_n=False)
    contracts.check_offspring(member)


@pytest.mark.long
@MEMBERS
def test_transformations(name):
    contracts.check_transformations(RESAMPLING[name])


@pytest.mark.long
@MEMBERS
def test_a_million_particles(name):
    contracts.check_many(RESAMPLING[name])


@MEMBERS
def test_edges(name):
    contracts.check_edges(RESAMPLING[name])


@MEMBERS
def test_broken_weights(name):
    contracts.check_broken(RESAMPLING[name])


@MEMBERS
def test_export(name):
    contracts.check_export(RESAMPLING[name])


def skewed(kind: str, num_particles: int) -> jnp.ndarray:
    """Log-weights whose largest expected offspring is far above one, some of them dead."""
    key = jax.random.key(num_particles)
    if kind == "lognormal":
        log_weights = 3 * jax.random.normal(key, (num_particles,))
    elif kind == "pareto":
        log_weights = jax.random.exponential(key, (num_particles,)) / 1.1
    else:
        log_weights = jax.random.normal(key, (num_particles,)).at[7].set(15.0)
    return jnp.where(jnp.arange(num_particles) % 5 == 4, -jnp.inf, log_weights)


@pytest.mark.long
@pytest.mark.parametrize("num_particles", [1_000, 100_000, 10_000_000])
def test_systematic_counts_within_one(num_particles):
    run = jax.jit(resampling.systematic, static_argnums=2)
    for kind in ("lognormal", "pareto", "one heavy"):
        log_weights = skewed(kind, num_particles)
        ancestors = np.asarray(run(jax.random.key(1), log_weights, num_particles))
        assert (np.diff(ancestors) >= 0).all()
        expected = num_particles * weights_of(log_weights)
        counts = np.bincount(ancestors, minlength=num_particles)
        # float32 knows a weight to one part in 1e7 only
        assert (np.abs(counts - expected) <= 1 + 1e-6 * expected + 1e-4).all(), kind
        assert (counts[np.isneginf(np.asarray(log_weights))] == 0).all()


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual", "ssp", "killing"])
def test_equal_weights_keep_everyone(name):
    run = jax.jit(RESAMPLING[name].kernel, static_argnums=2)
    ancestors = run(jax.random.key(0), jnp.zeros(37), 37)
    np.testing.assert_array_equal(np.asarray(ancestors), np.arange(37))


_BOUNDS = {
    "systematic": lambda counts, expected: np.abs(counts - expected) < 1 + 1e-3,
    "stratified": lambda counts, expected: np.abs(counts - expected) < 2 + 1e-3,
    "residual": lambda counts, expected: counts >= np.floor(expected + 1e-3 * (expected < 0)),
    "ssp": lambda counts, expected: (counts == np.floor(expected)) | (counts == np.ceil(expected)),
}


@pytest.mark.parametrize("name", _BOUNDS)
def test_counts_near_their_expectation(name):
    """For 300 weights that are no multiples of 1 / n."""
    num_particles, n = 50, 80
    log_weights = 2 * jax.random.normal(jax.random.key(3), (300, num_particles))
    keys = jax.random.split(jax.random.key(4), 300)
    run = jax.jit(jax.vmap(lambda key, lw: RESAMPLING[name].kernel(key, lw, n)))
    counts = offspring(run(keys, log_weights), num_particles)
    expected = n * np.stack([weights_of(lw) for lw in log_weights])
    sure = np.abs(expected - np.round(expected)) > 1e-3
    assert sure.mean() > 0.9
    assert _BOUNDS[name](counts, expected)[sure].all()


@pytest.mark.statistical
def test_multinomial_draws_are_independent():
    """Variances and covariances of the counts are those of n independent draws."""
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    n, replicates = 12, 40_000
    keys = jax.random.split(jax.random.key(5), replicates)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    run = jax.jit(jax.vmap(lambda key: resampling.multinomial(key, log_weights, n)))
    deviations = offspring(run(keys), 4) - n * weights
    products = deviations[:, :, None] * deviations[:, None, :]
    exact = n * (np.diag(weights) - np.outer(weights, weights))
    assert_mean(products, exact, family=16, smallest_bias=0.2)


@pytest.mark.statistical
def test_ssp_counts_never_help_one_another():
    """No pair of counts has a positive covariance."""
    weights = np.array([0.31, 0.22, 0.18, 0.13, 0.09, 0.07])
    replicates = 40_000
    keys = jax.random.split(jax.random.key(6), replicates)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    run = jax.jit(jax.vmap(lambda key: resampling.ssp(key, log_weights, 6)))
    deviations = offspring(run(keys), 6) - 6 * weights
    products = (deviations[:, :, None] * deviations[:, None, :])[:, *np.triu_indices(6, 1)]
    se = products.std(0, ddof=1) / np.sqrt(replicates)
    assert (products.mean(0) <= 4 * se).all()
    assert (products.mean(0) < -4 * se).sum() >= 5  # and the rounding does repel


@pytest.mark.statistical
def test_variance_of_a_sum_by_scheme():
    """Multinomial, residual, stratified, then ssp and systematic, on particles in no order."""
    size = contracts.LOG_WEIGHTS.size
    values = np.random.default_rng(1).normal(size=size)

    def variance(name):
        draws = contracts.many_draws(RESAMPLING[name].kernel, size)
        return (offspring(draws, size) @ values).var(ddof=1)

    # a variance of 20000 replicates has a relative standard error of 0.01
    multinomial, residual, stratified, ssp, systematic = map(
        variance, ("multinomial", "residual", "stratified", "ssp", "systematic")
    )
    assert residual < 0.9 * multinomial
    assert stratified < 0.9 * residual
    assert ssp < 0.9 * stratified
    assert systematic < 0.9 * stratified


def test_killing_keeps_survivors_in_place():
    log_weights = jnp.asarray([0.0, -jnp.inf] * 8)
    run = jax.jit(resampling.killing, static_argnums=2)
    ancestors = np.asarray(run(jax.random.key(0), log_weights, 16))
    np.testing.assert_array_equal(ancestors[::2], np.arange(0, 16, 2))
    assert (ancestors[1::2] % 2 == 0).all()
    assert len(set(ancestors[1::2])) > 2


@pytest.mark.statistical
def test_killing_survival_probability():
    """A particle stays with probability w / max w; a vacant slot may draw its own again."""
    log_weights = jnp.log(jnp.asarray([0.4, 0.2, 0.1, 0.3]))
    keys = jax.random.split(jax.random.key(1), 20_000)
    run = jax.jit(jax.vmap(lambda key: resampling.killing(key, log_weights, 4)))
    stays = np.asarray(run(keys)) == np.arange(4)
    probability = np.array([1.0, 0.5, 0.25, 0.75])
    se = np.sqrt(probability * (1 - probability) / 20_000)
    assert (stays.mean(0) >= probability - 4 * se).all()
    assert (stays.mean(0) <= probability + 0.6 * (1 - probability)).all()
    assert stays[:, 0].all()


def test_killing_refuses_another_number():
    with pytest.raises(ValueError, match="n = 3 ancestors of 4 particles"):
        resampling.killing(jax.random.key(0), jnp.zeros(4), 3)


def test_counts_refuse_more_than_float32_holds():
    with pytest.raises(ValueError, match="num_islands"):
        jax.eval_shape(
            lambda lw: resampling.systematic(jax.random.key(0), lw, 2**24 + 1), jnp.zeros(4)
        )


_METROPOLIS_WEIGHTS = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def metropolis_matrix(weights: np.ndarray) -> np.ndarray:
    """Transition matrix of one iteration."""
    moves = np.minimum(1, weights[None, :] / weights[:, None]) / len(weights)
    np.fill_diagonal(moves, 0)
    return moves + np.diag(1 - moves.sum(1))


@pytest.mark.statistical
@pytest.mark.parametrize("iterations", [1, 4, 16])
def test_metropolis_law_and_bound(iterations):
    """Its law is that of the Markov chain, within the bound of the docstring."""
    weights, replicates = _METROPOLIS_WEIGHTS, 40_000
    law = np.linalg.matrix_power(metropolis_matrix(weights), iterations)
    distance = 0.5 * np.abs(law - weights).sum(1)
    assert (distance <= (1 - weights.mean() / weights.max()) ** iterations).all()
    keys = jax.random.split(jax.random.key(iterations), replicates)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    kernel = resampling.Metropolis(iterations)
    ancestors = np.asarray(jax.jit(jax.vmap(lambda key: kernel(key, log_weights, 5)))(keys))
    drawn = ancestors[:, :, None] == np.arange(5)
    assert_mean(drawn, law, family=75, smallest_bias=0.02)


def test_metropolis_reaches_its_target():
    law = np.linalg.matrix_power(metropolis_matrix(_METROPOLIS_WEIGHTS), 64)
    assert np.abs(law - _METROPOLIS_WEIGHTS).max() < 1e-9
    assert resampling.metropolis.bias == "asymptotic"


def test_rejection_ends_when_one_particle_holds_everything():
    log_weights = jnp.full(100_000, -20.0).at[31].set(0.0)
    ancestors = jax.jit(lambda key: resampling.rejection(key, log_weights, 100_000))(
        jax.random.key(0)
    )
    assert (np.asarray(ancestors) == 31).mean() > 0.99


def test_equal_kernels_are_one():
    for make in (
        lambda: resampling.Metropolis(4),
        lambda: resampling.Rejection(8),
        lambda: resampling.FanOut(resampling.systematic, 2),
        lambda: resampling.TopK(2),
        lambda: resampling.BestPerIsland(2),
        lambda: resampling.Balanced(0.2),
    ):
        assert make() == make() and hash(make()) == hash(make())
    assert resampling.Metropolis(4) != resampling.Metropolis(5)


def test_equal_kernels_compile_once():
    traces = []

    def draw(kernel, key, log_weights):
        traces.append(kernel)
        return kernel(key, log_weights, 4)

    run = jax.jit(draw, static_argnums=0)
    run(resampling.Metropolis(4), jax.random.key(0), jnp.zeros(4))
    run(resampling.Metropolis(4), jax.random.key(1), jnp.ones(4))
    assert len(traces) == 1
