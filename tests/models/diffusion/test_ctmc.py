"""Uniform noise: correctors against enumeration, in rows and in continuous time; planted mistakes."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smcscale import SMC, ParticleFilter
from smcscale.kernels import annealing, resampling, triggers
from smcscale.models.diffusion import ctmc
from smcscale.models.diffusion.ctmc import ExactUniform, Powers, jump, sweeps
from support.sequences import assert_sequences, sequence_masses

V, L, RUNS = 3, 2, 4000
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
RNG = np.random.default_rng(2)
JOINT, OTHER = (RNG.dirichlet(np.full(V**L, 1.5)).reshape((V,) * L) for _ in range(2))
REWARD = 0.7 * RNG.normal(size=(V,) * L) - 0.4
#: comparisons of this file
FAMILY = 30


class Table(eqx.Module):
    """A function of whole sequences, by table."""

    values: jax.Array

    def __call__(self, tokens):
        return self.values[tuple(tokens)]


NETWORK, NETWORK_OTHER = (ExactUniform(jnp.log(jnp.asarray(law))) for law in (JOINT, OTHER))
REWARDS = Table(jnp.asarray(REWARD))


def noise_matrix(kept):
    return kept * np.eye(V) + (1 - kept) / V


def marginal(joint, levels):
    """Law of the noisy tokens at levels `(L,)`."""
    return np.einsum("ab,ia,jb->ij", joint, noise_matrix(levels[0]), noise_matrix(levels[1]))


def replicates(networks, levels, num_particles=4, num_runs=RUNS, seed=5, program=jump, **options):
    """Unnormalized mass `(R, V^L)` that each run gives every sequence."""
    kernels = {k: options.pop(k) for k in ("trigger", "annealing", "resampling") if k in options}
    smc = SMC(
        ParticleFilter(program, store="last", **{"trigger": triggers.always, **kernels}),
        num_particles=num_particles, num_runs=num_runs, progress_bar=False,
    )  # fmt: skip
    smc.run(jax.random.key(seed), networks, levels, shape=(L, V), **options)
    return sequence_masses(smc, L, V)


def assert_target(mass, target, bias=0.08):
    assert_sequences(mass, target, family=FAMILY, smallest_bias=bias)


# ---- the kernel


@pytest.mark.parametrize("levels", [([0.0, 0.0], [0.0, 0.5]), ([0.3, 0.6], [1.0, 0.6])])
def test_the_reverse_of_one_token_is_bayes(levels):
    """`q_s(x_s) k(x_t | x_s) / q_t(x_t)` by enumeration; tokens that do not rise stay."""
    low, high = map(np.array, levels)
    ways = [noise_matrix(low[k] / high[k] if low[k] < high[k] else 1.0) for k in range(L)]
    for x in SEQUENCES:
        logits = NETWORK(jnp.asarray(x), jnp.asarray(low))
        ours = ctmc.reverse_log_probs(logits, jnp.asarray(x), jnp.asarray(low), jnp.asarray(high))
        joint = marginal(JOINT, high) * np.outer(ways[0][:, x[0]], ways[1][:, x[1]])
        joint /= marginal(JOINT, low)[tuple(x)]
        exact = np.array([joint.sum(1), joint.sum(0)])
        np.testing.assert_allclose(np.exp(ours), exact, atol=2e-6)


def test_the_concrete_score_is_the_ratio_of_marginals():
    level = np.array([0.4, 0.7])
    q = marginal(JOINT, level)
    for x in SEQUENCES:
        logits = NETWORK(jnp.asarray(x), jnp.asarray(level))
        ours = np.exp(ctmc.log_ratios(logits, jnp.asarray(x), jnp.asarray(level)))
        exact = np.array([q[:, x[1]], q[x[0], :]]) / q[tuple(x)]
        np.testing.assert_allclose(ours, exact, rtol=2e-5)


def test_sweeps_raise_one_token_a_row():
    levels = np.asarray(sweeps(3, L))
    assert levels.shape == (3 * L + 1, L)
    assert (levels[0] == 0).all() and (levels[-1] == 1).all()
    assert ((np.diff(levels, axis=0) > 0).sum(1) == 1).all()


CASES = {
    "anneal": ((NETWORK,), (2.0,), 0.0),
    "flatten": ((NETWORK,), (0.5,), 0.0),
    "product": ((NETWORK, NETWORK_OTHER), (1.0, 1.0), 0.0),
    "geometric": ((NETWORK, NETWORK_OTHER), (-0.5, 1.5), 0.0),
    "tilt": ((NETWORK,), (1.0,), 0.8),
    "all": ((NETWORK, NETWORK_OTHER), (1.3, 0.6), 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_and_weights_solve_the_forward_equation(name):
    """`d rho / dt = (jumps of rho) + g rho` for `rho = prod q_i^b_i exp(s r)`, by enumeration."""
    networks, exponents, strength = CASES[name]
    with jax.enable_x64(True):
        joints = [np.exp(np.asarray(network.log_joint, np.float64)) for network in networks]
        exact = [ExactUniform(jnp.log(jnp.asarray(joint))) for joint in joints]
        rewards, level = REWARD.astype(np.float64), 0.45

        def density(level):
            laws = [marginal(joint, np.full(L, level)) for joint in joints]
            powers = np.prod([q**b for q, b in zip(laws, exponents, strict=True)], axis=0)
            return powers * np.exp(strength * rewards)

        rho = density(level)
        h = 1e-5  # time runs with log level: a step of h multiplies the level
        slope = (density(level * np.exp(h)) - density(level * np.exp(-h))) / (2 * h)
        found = np.zeros_like(rho)
        for x in SEQUENCES:
            tokens, levels = jnp.asarray(x), jnp.full(L, level)
            ratios = tuple(ctmc.log_ratios(net(tokens, levels), tokens, levels) for net in exact)
            gain = np.array([rewards[:, x[1]], rewards[x[0], :]]) - rewards[tuple(x)]
            tilt = jnp.asarray(strength * gain)
            jumps = np.asarray(ctmc.rates(ratios, exponents, tokens, tilt))
            g = float(ctmc.weight_rate(ratios, exponents, tokens, tilt))
            found[tuple(x)] += (g - jumps.sum()) * rho[tuple(x)]
            for place, value in itertools.product(range(L), range(V)):
                new = x.copy()
                new[place] = value
                found[tuple(new)] += jumps[place, value] * rho[tuple(x)]
    np.testing.assert_allclose(found, slope, atol=1e-9)


def test_a_short_row_weighs_by_the_rate():
    """The log-weight of a row over its length in `log level` tends to g."""
    exponents = (1.3, 0.6)
    with jax.enable_x64(True):
        networks = tuple(ExactUniform(jnp.log(jnp.asarray(law))) for law in (JOINT, OTHER))
        level, h = jnp.full(L, 0.45), 1e-6
        tokens = jnp.array([2, 0])
        table = ctmc.corrected(Powers(networks, exponents), tokens, level, level * np.exp(h), V)
        row = float(jax.nn.logsumexp(table, axis=1).sum()) / h
        ratios = tuple(ctmc.log_ratios(net(tokens, level), tokens, level) for net in networks)
        np.testing.assert_allclose(row, ctmc.weight_rate(ratios, exponents, tokens), rtol=1e-4)


# ---- the program


def target_of(name):
    networks, exponents, strength = CASES[name]
    laws = [np.exp(np.asarray(network.log_joint, np.float64)) for network in networks]
    powers = np.prod([q**b for q, b in zip(laws, exponents, strict=True)], axis=0)
    return powers * np.exp(strength * REWARD)


SLOW = ("flatten", "geometric", "product")


@pytest.mark.statistical
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_one_token_a_row_has_the_target(name):
    networks, exponents, strength = CASES[name]
    options = {}
    if strength:
        options = {"tilt": REWARDS, "strengths": strength * jnp.linspace(0.3, 1.0, 2 * L + 1)}
    mass = replicates(Powers(networks, exponents), sweeps(2, L), **options)
    assert_target(mass, target_of(name))


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize(
    "kernels",
    [
        {"trigger": triggers.ess_below(0.7), "resampling": resampling.multinomial},
        pytest.param({"annealing": annealing.ESSFloor(0.7)}, marks=pytest.mark.slow),
    ],
)
def test_any_kernel_runs_it_unchanged(kernels):
    strengths = 0.8 * jnp.linspace(0.0, 1.0, L + 1)
    options = {"tilt": REWARDS, "strengths": strengths, "informed": False, **kernels}
    assert_target(replicates(NETWORK, sweeps(1, L), **options), target_of("tilt"))


def path_law(rows, exponent):
    """Mass of the sequences when all tokens move at once, by enumeration of the path law's power."""
    levels = np.linspace(0, 1, rows + 1)
    mass = np.full(V**L, float(V) ** (-L * exponent))
    for low, high in itertools.pairwise(levels):
        level, after = jnp.full(L, low), jnp.full(L, high)
        step = np.zeros((V**L, V**L))
        noise = noise_matrix(low / high)
        for i, x in enumerate(SEQUENCES):
            logits = NETWORK(jnp.asarray(x), level)
            log_probs = ctmc.reverse_log_probs(logits, jnp.asarray(x), level, after)
            table = np.exp(np.asarray(log_probs, np.float64))
            for j, y in enumerate(SEQUENCES):
                reverse = np.prod([table[k, y[k]] for k in range(L)])
                step[i, j] = reverse**exponent
                step[i, j] *= np.prod([noise[y[k], x[k]] for k in range(L)]) ** (1 - exponent)
        mass = mass @ step
    return mass


@pytest.mark.statistical
def test_all_tokens_at_once_target_the_power_of_the_path_law():
    mass = replicates(Powers((NETWORK,), (2.0,)), jnp.linspace(0, 1, 3))
    exact = path_law(2, 2.0)
    assert_target(mass, exact)
    assert abs(exact.sum() / target_of("anneal").sum() - 1) > 0.02


def test_more_rows_bring_the_path_law_to_the_target():
    errors = [
        np.abs(path_law(rows, 2.0) - target_of("anneal").reshape(-1)).sum() for rows in (2, 8, 32)
    ]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.45 * errors[1]


def test_a_network_alone_has_weight_one():
    mass = replicates(NETWORK, sweeps(1, L), num_particles=2, num_runs=20)
    np.testing.assert_allclose(mass.sum(1), 1.0, atol=1e-5)


# ---- mistakes, planted


def without_noise_power(powers, tokens, level, next_level, vocabulary):
    """The noise between the levels forgotten: p^b alone."""
    table = 0.0
    for network, exponent in zip(powers.networks, powers.exponents, strict=True):
        logits = network(tokens, level)
        found = ctmc.reverse_log_probs(logits, tokens, level, next_level)
        table = table + exponent * found
    return table


def without_constant(powers, tokens, level, next_level, vocabulary):
    """The table normalized: guidance by heated conditionals, weights dropped."""
    return jax.nn.log_softmax(correct_table(powers, tokens, level, next_level, vocabulary))


correct_table = ctmc.corrected


@pytest.mark.statistical
@pytest.mark.parametrize("broken", [without_noise_power, without_constant])
def test_planted_mistakes_are_caught(broken, monkeypatch):
    monkeypatch.setattr(ctmc, "corrected", broken)

    def program(*args, **kwargs):  # another function: nothing compiled before is found again
        jump(*args, **kwargs)

    mass = replicates(Powers((NETWORK,), (2.0,)), sweeps(2, L), num_runs=1500, program=program)
    with pytest.raises(AssertionError):
        assert_target(mass, target_of("anneal"), bias=99.0)


# ---- the rest


def test_the_ledger_counts_calls():
    smc = SMC(ParticleFilter(jump, store="last"), num_particles=3, progress_bar=False)
    powers = Powers((NETWORK, NETWORK_OTHER), (1.0, 1.0))
    smc.run(jax.random.key(0), powers, sweeps(1, L), shape=(L, V), tilt=REWARDS)
    assert smc.cost["denoiser_calls"] == 3 * L * 2
    assert smc.cost["reward_calls"] == 3 * L * (1 + L * V)


@pytest.mark.refusal
def test_what_does_not_fit_is_refused():
    smc = SMC(ParticleFilter(jump), num_particles=2, progress_bar=False)
    with pytest.raises(ValueError, match=r"`levels` of jump must be \(T \+ 1,\)"):
        smc.run(jax.random.key(0), NETWORK, jnp.zeros((4, L + 1)), shape=(L, V))
    with pytest.raises(ValueError, match="`strengths` of jump must be"):
        smc.run(
            jax.random.key(0), NETWORK, sweeps(1, L), shape=(L, V), strengths=jnp.ones(2)
        )  # fmt: skip
    with pytest.raises(ValueError, match="`exponents` of Powers has 1 numbers for 2 networks"):
        Powers((NETWORK, NETWORK_OTHER))
