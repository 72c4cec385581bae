"""Every program simulates, and its density under plain NumPyro is the law in its docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer.util import log_density

from smcscale.models import statespace
from smcscale.models.statespace import (
    HiddenMarkov,
    coupled_model,
    hmm_filter,
    kalman_filter,
    local_level_model,
    log_emissions,
)

HMM = HiddenMarkov(
    jnp.array([0.6, 0.4]), jnp.array([[0.9, 0.1], [0.2, 0.8]]), jnp.array([[0.8, 0.2], [0.3, 0.7]])
)
PROGRAMS = {
    "stochastic_volatility": (),
    "stochastic_volatility_with_parameters": (),
    "stochastic_volatility_with_leverage": (),
    "local_level": (),
    "theta_logistic": (),
    "bearings_only": (),
    "linear_gaussian": (coupled_model(3),),
    "hidden_markov": (HMM,),
}


def simulate(name: str, length: int, seed: int = 0) -> dict:
    """Values of all sites of one simulation, by site."""

    @jax.jit  # op by op, this would compile a hundred small programs
    def values(key):
        program = handlers.seed(getattr(statespace, name), key)
        trace = handlers.trace(program).get_trace(None, *PROGRAMS[name], length=length)
        kept = ("sample", "deterministic")
        return {site: found["value"] for site, found in trace.items() if found["type"] in kept}

    return values(jax.random.key(seed))


def score(name: str, y, latents, *args):
    """Log joint density under plain NumPyro."""
    program = getattr(statespace, name)
    return jax.jit(lambda y, latents: log_density(program, (y, *args), {}, latents)[0])(y, latents)


@pytest.mark.parametrize("name", PROGRAMS)
def test_simulates_and_scores_what_it_simulated(name):
    found = simulate(name, 24)
    assert found["y"].shape[0] == 24
    latents = {site: value for site, value in found.items() if site != "y"}
    assert np.isfinite(score(name, found["y"], latents, *PROGRAMS[name]))


def test_the_list_of_programs_is_complete():
    from smcscale.models.statespace import zoo

    assert set(PROGRAMS) == {
        n for n, v in vars(zoo).items() if getattr(v, "__module__", "") == zoo.__name__
    } - {n for n in vars(zoo) if n.startswith("_")}


def test_stochastic_volatility_law():
    x0, x, y = -0.7, np.array([-0.6, -1.4]), np.array([0.3, -1.1])
    norm = scipy.stats.norm
    before = np.array([x0, x[0]])
    exact = norm(-1, 0.25 / np.sqrt(1 - 0.95**2)).logpdf(x0)
    exact += norm(-1 + 0.95 * (before + 1), 0.25).logpdf(x).sum()
    exact += norm(0, np.exp(x / 2)).logpdf(y).sum()
    ours = score("stochastic_volatility", jnp.asarray(y), {"x0": x0, "x": jnp.asarray(x)})
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_leverage_law():
    x0, x, y, rho = -0.7, np.array([-0.6, -1.4]), np.array([0.3, -1.1]), -0.5
    norm = scipy.stats.norm
    means = [-1 + 0.95 * (x0 + 1), -1 + 0.95 * (x[0] + 1) + rho * 0.25 * y[0] * np.exp(-x[0] / 2)]
    exact = norm(-1, 0.25 / np.sqrt(1 - 0.95**2)).logpdf(x0)
    exact += norm(means, 0.25 * np.sqrt(1 - rho**2)).logpdf(x).sum()
    exact += norm(0, np.exp(x / 2)).logpdf(y).sum()
    latents = {"x0": x0, "x": jnp.asarray(x)}
    ours = score("stochastic_volatility_with_leverage", jnp.asarray(y), latents)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_theta_logistic_law():
    x0, x, y = 0.4, np.array([0.6, 0.1]), np.array([0.3, 0.5])
    norm = scipy.stats.norm
    before = np.array([x0, x[0]])
    exact = norm(0, 1).logpdf(x0) + norm(x, 0.39).logpdf(y).sum()
    exact += norm(before + 0.15 - 0.12 * np.exp(0.1 * before), 0.47).logpdf(x).sum()
    ours = score("theta_logistic", jnp.asarray(y), {"x0": x0, "x": jnp.asarray(x)})
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_bearings_only_moves_and_wraps():
    found = simulate("bearings_only", 24, seed=3)
    state, push = np.asarray(found["x"]), np.asarray(found["push"])
    before = np.concatenate([np.asarray(found["x0"])[None], state[:-1]])
    np.testing.assert_allclose(state[:, 0], before[:, 0] + before[:, 1] + push[:, 0] / 2, atol=1e-6)
    np.testing.assert_allclose(state[:, 3], before[:, 3] + push[:, 1], atol=1e-6)
    # two angles on either side of the cut are close
    latents = {"x0": jnp.array([-1.0, 0.0, 1e-3, 0.0]), "push": jnp.zeros((1, 2))}
    above, below = (
        score("bearings_only", jnp.array([angle]), latents)
        for angle in (np.pi - 2e-3, 2e-3 - np.pi)
    )
    assert abs(above - below) < 1.0
    # near its center the von Mises law is the normal one with the same spread
    latents = {"x0": jnp.array([1.0, 0.0, 0.0, 0.0]), "push": jnp.zeros((1, 2))}
    peak, side = (score("bearings_only", jnp.array([angle]), latents) for angle in (0.0, 0.005))
    np.testing.assert_allclose(peak - side, 0.5, atol=0.01)


def test_linear_programs_have_the_evidence_of_the_kalman_filter():
    """Chib's identity: evidence = joint density / posterior density, at any path."""
    y = jnp.array([1.5, 1.2])
    with jax.enable_x64(True):
        model = local_level_model(level_scale=0.3, noise_scale=1.0)
        joint = jax.jit(
            lambda z: log_density(
                statespace.local_level, (y, 0.3, 1.0), {}, {"x0": z[0], "x": z[1:]}
            )[0]
        )
        at = jnp.zeros(3)
        gradient, curvature = jax.grad(joint)(at), -jax.hessian(joint)(at)
        # the joint is Gaussian in the path: integrate it by completing the square
        log_evidence = (
            joint(at)
            + 0.5 * gradient @ jnp.linalg.solve(curvature, gradient)
            + 1.5 * jnp.log(2 * jnp.pi)
            - 0.5 * jnp.linalg.slogdet(curvature)[1]
        )
        exact = kalman_filter(model, y).log_evidence
    np.testing.assert_allclose(log_evidence, exact, rtol=1e-6)


@pytest.mark.parametrize("initial_y", [None, 0])
def test_hidden_markov_sums_to_the_evidence_of_the_forward_pass(initial_y):
    y = jnp.array([1, 1, 0])
    paths = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    joint = jax.vmap(
        lambda path: score("hidden_markov", y, {"x0": path[0], "x": path[1:]}, HMM, initial_y)
    )(jnp.asarray(paths))
    first = None if initial_y is None else log_emissions(HMM.emission, jnp.asarray(initial_y))
    exact = hmm_filter(
        HMM.initial, HMM.transition, log_emissions(HMM.emission, y), initial_log_likelihood=first
    ).log_evidence
    np.testing.assert_allclose(jax.nn.logsumexp(joint), exact, rtol=1e-5)


def test_linear_gaussian_observes_the_first_state_when_asked():
    model = coupled_model(2)
    latents = {"x0": jnp.ones(2), "x": jnp.zeros((1, 2))}
    y, first = jnp.zeros((1, 2)), jnp.array([0.5, -0.5])
    with_first = score("linear_gaussian", y, latents, model, first)
    without = score("linear_gaussian", y, latents, model)
    exact = scipy.stats.norm(1, 1).logpdf(np.asarray(first)).sum()
    np.testing.assert_allclose(with_first - without, exact, rtol=1e-5)
