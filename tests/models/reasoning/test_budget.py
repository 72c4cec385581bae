"""Costs against arrays, XLA and hand counts; plans against pilots whose truth is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import nnx

from smcscale import SMC
from smcscale.models.reasoning import budget, methods
from smcscale.models.reasoning.architecture import Config
from smcscale.models.reasoning.budget import Arm, Metered
from smcscale.models.reasoning.program import read_prompt
from smcscale.models.reasoning.rewards import RewardFunction
from smcscale.models.reasoning.transformer import Transformer
from support.montecarlo import assert_mean
from support.reasoning import tiny
from support.reasoning.families import EXTRAS, SHAPES, configuration

RNG = np.random.default_rng


@pytest.mark.parametrize("family", EXTRAS)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_parameters_are_those_of_the_network(family, index):
    config = Config.from_hf(configuration(family, index))
    shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))]
    assert budget.num_parameters(config) == sum(sizes)


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
    step = budget.token_step(CONFIG, length, num_particles=batch)
    assert float(step.flops) * length <= counted <= 1.03 * float(step.flops) * length


def test_bytes_by_hand():
    small = Config(
        family="Llama", vocabulary_size=10, hidden_size=4, num_layers=2, num_heads=2,
        num_kv_heads=1, head_size=2, mlp_size=6, tied=False, windows=(0, 5),
    )  # fmt: skip
    step = budget.token_step(small, 3, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    # keys and values of 2 numbers each: layer 1 sees 4 + 3, layer 2 the last 5 of them, 3 its own
    assert step.kv_bytes == 2 * 2 * 2 * ((4 + 7 * 3) + (2 + 7 * 3))
    assert step.weight_bytes == 2 * (budget.num_parameters(small) - 40)
    matrices = 2 * (2 * 4 * (4 + 2) + 3 * 4 * 6) + 40
    assert step.flops == 7 * (2 * matrices + 4 * 2 * 2 * (7 + 5))
    long = budget.token_step(small, 9, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    assert long.kv_bytes == 2 * 2 * 2 * ((4 + 7 * 9) + 7 * 5)
    whole = budget.decode_cost(small, 9, num_particles=7, prompt_length=4, bytes_per_number=2.0)
    assert whole.weight_bytes == 9 * step.weight_bytes
    parts = [budget.token_step(small, i, num_particles=7, prompt_length=4) for i in range(1, 10)]
    assert whole.flops == sum(part.flops for part in parts)
    assert whole.kv_bytes == sum(part.kv_bytes for part in parts) / 2
    moved = step.weight_bytes + step.kv_bytes
    assert step.seconds(1e9, 1e3) == moved / 1e3 and step.seconds(1e3, 1e9) == step.flops / 1e3


def looked_at(config, positions):
    """Tokens that the tokens at some positions look at, one by one."""
    windows = config.windows or (0,) * config.num_layers
    return sum(min(p + 1, w or p + 1) for p in positions for w in windows)


@pytest.mark.parametrize("windows", [(), (0, 5), (3, 3), (0, 1)])
def test_attended_is_the_sum_over_tokens_and_layers(windows):
    config = Config(
        family="Llama", vocabulary_size=10, hidden_size=4, num_layers=2, num_heads=2,
        num_kv_heads=1, head_size=2, mlp_size=6, windows=windows,
    )  # fmt: skip
    for first, count in itertools.product((0, 1, 2, 4, 7), (0, 1, 3, 6)):
        found = budget.attended(config, first, count)
        assert found == looked_at(config, range(first, first + count)), (first, count)


def test_a_run_costs_what_a_hand_count_says():
    lm, prm = tiny.language_model(), tiny.reward_model()
    num_particles, steps = 6, 3
    prompt = read_prompt(lm, prm, tiny.PROMPT)
    metered = Metered.of(lm, prm, prompt)
    # without resampling every text that was written is there to be counted
    smc = SMC(methods.best_of_n().filter, num_particles=num_particles, progress_bar=False)
    smc.run(jax.random.key(3), lm, metered, prompt, max_steps=steps)
    spent = metered.spent(smc.cost)
    samples, _ = smc.get_samples(weighted=True)
    lengths = [int(n) for n in samples["step"].written.length]
    ends = np.asarray(lm.ends_step)
    begin, passes = len(tiny.PROMPT), 0
    for tokens, length in zip(np.asarray(samples["step"].written.tokens), lengths, strict=True):
        size = 0
        for place, token in enumerate(tokens[:length]):
            size += 1
            if ends[token] or size == lm.step_tokens or place + 1 == length:
                passes, size = passes + 1, 0
    assert (spent.tokens, spent.prm_tokens, spent.prm_passes) == (sum(lengths),) * 2 + (passes,)
    assert spent.prompt_tokens == spent.prm_prompt_tokens == begin
    # by hand: q and o 16 x 16, k and v 16 x 8, three matrices 16 x 24, the head 4 x 16
    layers, head = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24), 4 * 16
    drawn = [range(begin - 1, begin - 1 + n) for n in lengths]
    writer = looked_at(lm.config, range(begin - 1)) + sum(looked_at(lm.config, p) for p in drawn)
    read = [range(begin, begin + n) for n in lengths]
    judge = looked_at(prm.config, range(begin)) + sum(looked_at(prm.config, p) for p in read)
    total = sum(lengths)
    assert spent.flops == 2 * (layers * (begin - 1 + total) + head * total) + 4 * 4 * 4 * writer
    assert spent.prm_flops == 2 * layers * (begin + total) + 4 * 4 * 4 * judge
    # a reward that is counted weighs as one that is not
    plain = SMC(methods.best_of_n().filter, num_particles=num_particles, progress_bar=False)
    plain.run(jax.random.key(3), lm, prm, prompt, max_steps=steps)
    np.testing.assert_array_equal(plain.log_evidence, smc.log_evidence)


def half(state):
    return jnp.full((), 0.5)


def test_a_function_as_reward_costs_nothing():
    lm, function = tiny.language_model(), RewardFunction(half)
    prompt = read_prompt(lm, function, tiny.PROMPT)
    metered = Metered.of(lm, function, prompt)
    smc = SMC(methods.best_of_n().filter, num_particles=2, progress_bar=False)
    smc.run(jax.random.key(0), lm, metered, prompt, max_steps=2)
    spent = metered.spent(smc.cost)
    assert spent.flops > 0
    assert spent.prm_flops == spent.prm_passes == spent.prm_tokens == spent.prm_prompt_tokens == 0


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
        found = budget.plan(arms, {"tokens": limit})
        assert found.arm is arms[index] and found.chosen[index] > 0.99
    assert np.isnan(budget.plan(arms, {"tokens": 1.3}).lead.value)
    found = budget.plan(arms, {"tokens": 100.0, "seconds": 2.0})
    np.testing.assert_allclose(found.lead.value, np.mean(arms[2].correct - arms[1].correct))
    with pytest.raises(ValueError, match="times the budget"):
        budget.plan(arms, {"tokens": 0.1})
    with pytest.raises(ValueError, match="times the budget"):
        budget.plan(arms, {"tokens": 100.0, "seconds": 0.5})
    with pytest.raises(ValueError, match="same problems"):
        budget.plan([arms[0], Arm("other", 1, np.ones(3), {"tokens": np.ones(3)})], {"tokens": 9.0})
    equal = [Arm(str(i), 1, np.array([0.0, 1.0]), {"tokens": np.full(2, 3.0 - i)}) for i in (0, 1)]
    assert budget.plan(equal, {"tokens": 5.0}).arm is equal[1]  # a tie goes to the cheaper


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
        found = budget.plan(arms, {"tokens": 1.0}, draws=200, seed=i)
        estimates.append(found.accuracy.value)
        flattered.append(found.arm.correct.mean())
        fixed = budget.plan(arms[:1], {"tokens": 1.0}, draws=200, seed=i)
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
        found = budget.allocate(7, np.log(z), h, spent=spent)
        assert found.sum() == 7
        np.testing.assert_allclose(gain(found), max(map(gain, map(np.array, shares))), rtol=1e-12)


def test_allocation_at_its_edges():
    log_z, h = np.array([-np.inf, 0.0, np.log(0.5), np.log(0.5)]), np.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(budget.allocate(100, log_z, h), [0, 1, 0, 99])
    np.testing.assert_array_equal(budget.allocate(8, log_z, h, least=2), [2, 2, 2, 2])
    assert budget.allocate(9, log_z[:2], h[:2]).sum() == 1  # nothing more to gain
    with pytest.raises(ValueError, match="2 for each of 4 problems exceeds 7"):
        budget.allocate(7, log_z, h, least=2)
    with pytest.raises(ValueError, match="must not be NaN"):
        budget.allocate(7, [np.nan], [1.0])
    with pytest.raises(ValueError, match="must not be NaN"):
        budget.allocate(7, [0.0], [-1.0])
