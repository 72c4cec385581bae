"""Laws of coverage against enumeration and known parameters, costs against arrays and XLA, plans."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import nnx

from smcscale.models.reasoning import scaling
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.scaling import Arm
from smcscale.models.reasoning.transformer import Transformer
from support.montecarlo import assert_mean
from support.reasoning.families import EXTRAS, SHAPES, configuration

RNG = np.random.default_rng


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            right = np.arange(n) < c
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = np.mean([right[list(s)].any() for s in subsets])
                np.testing.assert_allclose(scaling.pass_at_k(n, c, k), share, atol=1e-12)
    assert scaling.pass_at_k([10, 4], [3, 2], 4).shape == (2,)


@pytest.mark.statistical
def test_pass_at_k_is_unbiased_and_so_is_its_squared_error():
    p, n, k, problems, runs = RNG(0).beta(0.5, 1.5, 400), 8, 5, 40, 4000
    chosen = RNG(1).choice(p, (runs, problems))
    found = [scaling.coverage(n, RNG([2, i]).binomial(n, row), k) for i, row in enumerate(chosen)]
    values = np.array([f.value for f in found])
    assert_mean(values, np.mean(1 - (1 - p) ** k), family=2, smallest_bias=0.01)
    counts = np.arange(n + 1)
    each = scaling.pass_at_k(n, counts, k)
    moments = [np.mean(scipy.stats.binom.pmf(counts, n, p[:, None]) @ each**m) for m in (1, 2)]
    variance = (moments[1] - moments[0] ** 2) / problems
    squares = np.array([f.standard_error**2 for f in found])
    assert_mean(squares / variance, 1.0, family=2, smallest_bias=0.05)


def test_counts_that_cannot_be_are_refused():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError, match="fit_beta"):
            scaling.pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="two coverages"):
        scaling.fit_power_law([1, 2], [0.5, 1.0])
    with pytest.raises(ValueError, match="right and wrong"):
        scaling.fit_beta([8, 8], [0, 0])
    with pytest.raises(ValueError, match="two samples"):
        scaling.fit_beta([1, 1], [0, 1])
    with pytest.raises(ValueError, match="three budgets"):
        scaling.fit_saturation([1, 2, 2], [0.1, 0.2, 0.2])


def test_curves_without_noise_are_found_again():
    k = 2.0 ** np.arange(10)
    law = scaling.fit_power_law(k, np.exp(-1.7 * k**-0.4))
    np.testing.assert_allclose([law.a, law.b], [-1.7, -0.4], rtol=1e-6)
    for ceiling, gap, rate in ((0.8, 0.5, 0.6), (0.95, 0.3, 0.15), (0.5, 0.4, 2.0)):
        for unit in (1.0, 1000.0):  # budgets in particles or tokens
            curve = scaling.fit_saturation(k * unit, ceiling - gap * k**-rate)
            found = [curve.ceiling, curve.gap * unit**-curve.rate, curve.rate]
            np.testing.assert_allclose(found, [ceiling, gap, rate], rtol=1e-4)


def test_beta_coverage_is_the_integral_and_tends_to_its_power_law():
    law = scaling.BetaLaw(0.3, 2.5, np.eye(2))
    density = scipy.stats.beta(0.3, 2.5)
    for k in (1, 7, 200):
        # by parts, since the density has a pole at 0
        exact = scipy.integrate.quad(
            lambda p, k=k: k * (1 - p) ** (k - 1) * density.sf(p), 0, 1, limit=200
        )[0]
        np.testing.assert_allclose(law.coverage(k).value, exact, rtol=1e-6)
    missed, tail = 1 - law.coverage(1e9).value, law.power_law()
    np.testing.assert_allclose(missed, -tail.a * 1e9**tail.b, rtol=1e-3)
    np.testing.assert_allclose(missed, -np.log(tail.coverage(1e9)), rtol=1e-3)


@pytest.mark.statistical
@pytest.mark.parametrize("alpha, beta, far", [(0.4, 1.5, 300), (3.0, 2.0, 4)])
def test_fit_beta_finds_the_parameters_within_its_standard_error(alpha, beta, far):
    problems, runs = 400, 200
    n = np.where(np.arange(problems) % 2, 12, 40)
    exact = scaling.BetaLaw(alpha, beta, np.eye(2)).coverage(far).value
    scores, errors = [], []
    for i in range(runs):
        p = RNG([3, i]).beta(alpha, beta, problems)
        fit = scaling.fit_beta(n, RNG([4, i]).binomial(n, p))
        reached = fit.coverage(far)
        found = np.array([fit.alpha, fit.beta])
        scores.append([*((found - [alpha, beta]) / np.sqrt(np.diag(fit.covariance))),
                       (reached.value - exact) / reached.standard_error])  # fmt: skip
        errors.append(np.log(found) - np.log([alpha, beta]))
    # maximum likelihood is biased by about its variance, the square of 0.08 at most
    assert np.all(np.abs(np.mean(errors, 0)) < 0.01 + 4 * np.std(errors, 0) / np.sqrt(runs))
    spread = np.std(scores, axis=0, ddof=1)
    assert np.all(np.abs(spread - 1) < 4 / np.sqrt(2 * runs)), spread


def test_fit_beta_agrees_with_a_search_over_the_likelihood():
    n, c = np.array([5, 9, 12, 3, 20, 20, 7]), np.array([0, 4, 12, 1, 2, 17, 0])
    fit = scaling.fit_beta(n, c)
    best = scipy.stats.betabinom(n, fit.alpha, fit.beta).logpmf(c).sum()
    for a, b in itertools.product(*(np.geomspace(0.8, 1.25, 9) * x for x in (fit.alpha, fit.beta))):
        assert scipy.stats.betabinom(n, a, b).logpmf(c).sum() <= best + 1e-9
    same = scaling.fit_beta(20, np.tile([9, 10, 11], 30))  # less spread than binomial counts
    assert same.alpha / (same.alpha + same.beta) == pytest.approx(0.5)
    assert same.alpha > 1e4


@pytest.mark.statistical
@pytest.mark.parametrize("abstain", [False, True])
def test_verified_accuracy_is_that_of_the_procedure(abstain):
    p, t, f, n, runs = 0.3, 0.8, 0.25, 4, 40_000
    rng = RNG(5)
    right = rng.random((runs, n)) < p
    accepted = rng.random((runs, n)) < np.where(right, t, f)
    order = rng.random((runs, n)) + 10 * ~accepted  # an accepted one at random, else any
    handed_in = np.take_along_axis(right, order.argmin(1)[:, None], axis=1)[:, 0]
    handed_in &= accepted.any(1) | (not abstain)
    exact = scaling.verified_accuracy(p, t, f, n, abstain=abstain)
    assert_mean(handed_in, exact, family=2, smallest_bias=0.02)


def test_verified_accuracy_has_the_ceiling_of_bayes_rule():
    ceiling = scaling.verified_accuracy([0.3, 0.0, 1.0], 0.8, 0.25, np.inf)
    np.testing.assert_allclose(ceiling, [0.24 / (0.24 + 0.175), 0.0, 1.0])
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.8, 0.25, 200), ceiling[0])
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.8, 0.25, 1), 0.3)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 1.0, 0.0, 6), 1 - 0.7**6)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 0.0, 0.0, np.inf), 0.3)
    np.testing.assert_allclose(scaling.verified_accuracy(0.3, 1.0, 1.0, np.inf), 0.3)


@pytest.mark.parametrize("family", EXTRAS)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_parameters_are_those_of_the_network(family, index):
    config = Config.from_hf(configuration(family, index))
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))]
    assert scaling.num_parameters(config) == sum(sizes)


CONFIG = Config(
    family="Qwen2", vocabulary_size=1000, hidden_size=256, num_layers=2, num_heads=8,
    num_kv_heads=2, head_size=32, mlp_size=512, tied=True,
)  # fmt: skip


def test_flops_are_those_that_xla_counts():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    batch, length = 2, 256
    tokens = jnp.zeros((batch, length), jnp.int32)
    graph, state = nnx.split(model)

    def logits(state):
        network = nnx.merge(graph, state)
        return network.logits(network(tokens, unroll=CONFIG.num_layers))

    counted = jax.jit(logits).lower(state).compile().cost_analysis()["flops"]
    # a full pass computes all scores of `length` keys for each token, then masks
    step = scaling.token_step(CONFIG, length, num_particles=batch)
    assert float(step.flops) * length <= counted <= 1.03 * float(step.flops) * length


def test_bytes_by_hand():
    small = Config(
        family="Llama", vocabulary_size=10, hidden_size=4, num_layers=2, num_heads=2,
        num_kv_heads=1, head_size=2, mlp_size=6, tied=False, windows=(0, 5),
    )  # fmt: skip
    step = scaling.token_step(small, 3, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    # keys and values of 2 numbers each: layer 1 sees 4 + 3, layer 2 the last 5 of them, 3 its own
    assert step.kv_bytes == 2 * 2 * 2 * ((4 + 7 * 3) + (2 + 7 * 3))
    assert step.weight_bytes == 2 * (scaling.num_parameters(small) - 40)
    matrices = 2 * (2 * 4 * (4 + 2) + 3 * 4 * 6) + 40
    assert step.flops == 7 * (2 * matrices + 4 * 2 * 2 * (7 + 5))
    long = scaling.token_step(small, 9, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    assert long.kv_bytes == 2 * 2 * 2 * ((4 + 7 * 9) + 7 * 5)
    whole = scaling.decode_cost(small, 9, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    assert whole.weight_bytes == 9 * step.weight_bytes
    parts = [scaling.token_step(small, i, num_particles=7, prompt_length=4) for i in range(1, 10)]
    assert whole.flops == sum(part.flops for part in parts)
    assert whole.kv_bytes == sum(part.kv_bytes for part in parts) / 2
    moved = step.weight_bytes + step.kv_bytes
    assert step.seconds(1e9, 1e3) == moved / 1e3 and step.seconds(1e3, 1e9) == step.flops / 1e3


def pilot(rng, accuracies, problems):
    """Arms whose true accuracies are known; cost doubles from each to the next."""
    hard = rng.random(problems)
    return [
        Arm(f"method {i}", 2**i, (hard < a).astype(float),
            {"tokens": rng.gamma(50, 2**i / 50, problems), "seconds": np.full(problems, 1.0)})
        for i, a in enumerate(accuracies)
    ]  # fmt: skip


def test_a_plan_keeps_the_budget_and_takes_the_best():
    arms = pilot(RNG(6), (0.2, 0.5, 0.8), 300)
    for limit, index in ((1.3, 0), (2.6, 1), (100.0, 2)):
        found = scaling.plan(arms, {"tokens": limit})
        assert found.arm is arms[index] and found.chosen[index] > 0.99
    assert np.isnan(scaling.plan(arms, {"tokens": 1.3}).lead.value)
    found = scaling.plan(arms, {"tokens": 100.0, "seconds": 2.0})
    np.testing.assert_allclose(found.lead.value, np.mean(arms[2].correct - arms[1].correct))
    with pytest.raises(ValueError, match="times the budget"):
        scaling.plan(arms, {"tokens": 0.1})
    with pytest.raises(ValueError, match="times the budget"):
        scaling.plan(arms, {"tokens": 100.0, "seconds": 0.5})
    with pytest.raises(ValueError, match="same problems"):
        scaling.plan(
            [arms[0], Arm("other", 1, np.ones(3), {"tokens": np.ones(3)})], {"tokens": 9.0}
        )
    equal = [Arm(str(i), 1, np.array([0.0, 1.0]), {"tokens": np.full(2, 3.0 - i)}) for i in (0, 1)]
    assert scaling.plan(equal, {"tokens": 5.0}).arm is equal[1]  # a tie goes to the cheaper


@pytest.mark.statistical
def test_the_uncertainty_of_a_plan():
    accuracy, problems, runs = 0.5, 60, 1500
    estimates, leads, flattered = [], [], []
    for i in range(runs):
        rng = RNG([7, i])
        arms = [
            Arm(str(j), 1, (rng.random(problems) < accuracy).astype(float), {"tokens": np.ones(problems)})
            for j in range(4)
        ]  # fmt: skip
        found = scaling.plan(arms, {"tokens": 1.0}, draws=200, seed=i)
        estimates.append(found.accuracy.value)
        flattered.append(found.arm.correct.mean())
        fixed = scaling.plan(arms[:1], {"tokens": 1.0}, draws=200, seed=i)
        leads.append(fixed.accuracy.standard_error**2)
    # with equal arms the best of four looks better by this many standard deviations
    excess = scipy.integrate.quad(lambda x: 4 * x * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** 3, -9, 9)[0]  # fmt: skip
    exact = accuracy + excess * np.sqrt(accuracy * (1 - accuracy) / problems)
    assert_mean(flattered, exact, family=3, smallest_bias=0.01)
    # the bootstrap takes most of that away
    assert abs(np.mean(estimates) - accuracy) < 0.4 * (exact - accuracy)
    variance = accuracy * (1 - accuracy) / problems * (1 - 1 / problems)
    assert_mean(np.array(leads) / variance, 1.0, family=3, smallest_bias=0.05)


def test_allocation_is_the_best_there_is():
    rng = RNG(8)
    for _ in range(20):
        z, h, spent = rng.random(3), rng.random(3), rng.integers(0, 3, 3)

        def gain(n, z=z, h=h, spent=spent):
            return np.sum(h * (1 - (1 - z) ** (spent + n)))

        shares = [n for n in itertools.product(range(8), repeat=3) if sum(n) == 7]
        found = scaling.allocate(7, np.log(z), h, spent=spent)
        assert found.sum() == 7
        np.testing.assert_allclose(gain(found), max(map(gain, map(np.array, shares))), rtol=1e-12)


def test_allocation_at_its_edges():
    log_z, h = np.array([-np.inf, 0.0, np.log(0.5), np.log(0.5)]), np.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(scaling.allocate(100, log_z, h), [0, 1, 0, 99])
    np.testing.assert_array_equal(scaling.allocate(8, log_z, h, least=2), [2, 2, 2, 2])
    assert scaling.allocate(9, log_z[:2], h[:2]).sum() == 1  # nothing more to gain
    with pytest.raises(ValueError, match="2 for each of 4 problems exceeds 7"):
        scaling.allocate(7, log_z, h, least=2)
    with pytest.raises(ValueError, match="must not be NaN"):
        scaling.allocate(7, [np.nan], [1.0])
    with pytest.raises(ValueError, match="must not be NaN"):
        scaling.allocate(7, [0.0], [-1.0])
