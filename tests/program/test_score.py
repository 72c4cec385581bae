"""What a program is scored on: guides, forecasts, missing data."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from smcscale import SMC, ParticleFilter
from smcscale.program.lower import lower
from support.montecarlo import assert_mean
from support.paths import draw_path

Y = jnp.array([0.3, -0.4, 1.1])
HOLES = jnp.array([0.3, jnp.nan, 1.1])
SEEN = ~jnp.isnan(HOLES)
RHO, STEP, NOISE = 0.8, 0.5, 0.3


def ar1(y):
    x0 = numpyro.sample("x0", dist.Normal(1.0, 0.4))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, x0, y)


def quiet(program, **options):
    return SMC(ParticleFilter(program, **options), num_particles=64, num_runs=2, progress_bar=False)


# ---- guides and densities


def prior(y):
    x0 = numpyro.sample("x0", dist.Normal(1.0, 0.4))

    def step(x, y_t):
        return numpyro.sample("x", dist.Normal(RHO * x, STEP)), None

    scan(step, x0, y)


def test_prior_as_guide_adds_exactly_nothing():
    path = draw_path(ar1, Y, options={"guide": prior})
    np.testing.assert_array_equal(path.increments, 0.0)


def test_without_a_guide_the_transition_adds_nothing():
    np.testing.assert_array_equal(draw_path(ar1, Y).increments, 0.0)


def test_pieces_by_hand():
    path = draw_path(ar1, Y)
    x, before = path.sites["x"], jnp.append(path.before["x0"], path.sites["x"][:-1])
    transitions = dist.Normal(RHO * before, STEP).log_prob(x)
    np.testing.assert_allclose(path.transitions, transitions, rtol=1e-6)
    np.testing.assert_allclose(path.potentials, dist.Normal(x, NOISE).log_prob(Y), rtol=1e-6)


class Towards:
    """A proposal that looks at the row."""

    def sample(self, key, carry, row):
        return {"x": row + 0.6 * jax.random.normal(key)}

    def log_prob(self, carry, values, row):
        return dist.Normal(row, 0.6).log_prob(values["x"])


def test_proposal_ratio():
    path = draw_path(ar1, Y, options={"proposal": Towards()})
    ratio = path.transitions - dist.Normal(Y, 0.6).log_prob(path.sites["x"])
    np.testing.assert_allclose(path.increments[1:], ratio, rtol=1e-5, atol=1e-6)


def test_proposal_with_other_sites_is_refused():
    class Other(Towards):
        def sample(self, key, carry, row):
            return {"z": row}

    with pytest.raises(ValueError, match='(?s)the proposal lacks "x" and has "z"'):
        draw_path(ar1, Y, options={"proposal": Other()})


def test_density_has_gradients():
    """Scores with respect to a static value, against finite differences."""
    model_of = handlers.substitute  # the value enters as a substituted site
    path = draw_path(ar1, Y)

    def score(x0):
        low = lower(model_of(ar1, {"x0": x0}), (Y,), {})
        state = low.model.initial(jax.random.key(0)).state
        new = path.last
        row = jax.tree.map(lambda v: v[0], low.inputs)
        return low.model.log_transition(state, new, row)

    got = jax.grad(score)(0.5)
    expected = RHO * (path.sites["x"][-1] - RHO * 0.5) / STEP**2
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# ---- missing data


def handler_mask(y):
    def step(x, row):
        y_t, seen = row
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        with handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, 0.5, (y, ~jnp.isnan(y)))


def distribution_mask(y):
    def step(x, row):
        y_t, seen = row
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE).mask(seen), obs=y_t)
        return x, None

    scan(step, 0.5, (y, ~jnp.isnan(y)))


def joint_mask(y):
    """The second element is masked where it is NaN, inside one independent event."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        seen = ~jnp.isnan(y_t)
        law = dist.Independent(dist.Normal(x, NOISE).expand([2]).mask(seen), 1)
        numpyro.sample("y", law, obs=jnp.stack([y_t, y_t]))
        return x, None

    scan(step, 0.5, y)


def unmasked(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        numpyro.factor("nothing", 0.0 * x)
        return x, None

    scan(step, 0.5, y)


@pytest.mark.parametrize(
    "program, options",
    [
        (handler_mask, {}),
        (distribution_mask, {}),
        (joint_mask, {}),
        (unmasked, {"nan_is_missing": True}),
    ],
)
def test_missing_rows_say_nothing(program, options):
    holes = draw_path(program, HOLES, options=options)
    whole = draw_path(program, jnp.where(SEEN, HOLES, 0.0), options=options)
    np.testing.assert_array_equal(holes.sites["x"], whole.sites["x"])
    np.testing.assert_array_equal(holes.transitions, whole.transitions)
    np.testing.assert_array_equal(holes.potentials, jnp.where(SEEN, whole.potentials, 0.0))
    found = lower(program, (HOLES,), {}, **options).missing()
    if options:
        assert found["y"][0].tolist() == (~SEEN).tolist()
    else:
        assert not found["y"][0].any()


def imputed(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t, obs_mask=~jnp.isnan(y_t))
        return x, None

    scan(step, 0.5, y)


def vectors(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        with numpyro.plate("sensors", 2):
            numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, 0.5, y)


def events(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE).expand([2]).to_event(1), obs=y_t)
        return x, None

    scan(step, 0.5, y)


def joint(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        numpyro.sample("y", dist.MultivariateNormal(x, 0.1 * jnp.eye(2)), obs=y_t)
        return x, None

    scan(step, 0.5, y)


def test_obs_mask_may_cover_nan():
    path = draw_path(imputed, HOLES)
    assert np.isfinite(path.potentials).all() and path.potentials[1] == 0
    assert not any(absent.any() for absent, _ in path.lowered.missing().values())


@pytest.mark.parametrize("program", [vectors, events])
def test_missing_elements_of_independent_observations(program):
    y = jnp.array([[0.1, jnp.nan], [jnp.nan, jnp.nan], [0.4, 0.5]])
    path = draw_path(program, y, options={"nan_is_missing": True})
    log_prob = dist.Normal(path.sites["x"][:, None], NOISE).log_prob(jnp.nan_to_num(y))
    expected = jnp.where(jnp.isnan(y), 0.0, log_prob).sum(1)
    np.testing.assert_allclose(path.potentials, expected, rtol=1e-6)
    assert not lower(program, (y,), {}).missing()["y"][1].any()


def test_joint_observation_missing_as_a_whole():
    y = jnp.array([[0.1, 0.2], [jnp.nan, jnp.nan], [0.4, 0.5]])
    path = draw_path(joint, y, options={"nan_is_missing": True})
    assert path.potentials[1] == 0 and np.isfinite(path.potentials).all()


def test_partly_missing_joint_observation_is_refused_by_name():
    y = jnp.array([[0.1, 0.2], [0.3, 0.3], [0.4, jnp.nan]])
    with pytest.raises(ValueError, match='(?s)site "y" is partly NaN at step 2.*independent sites'):
        quiet(joint, nan_is_missing=True).run(jax.random.key(0), y)


def test_nan_observation_is_refused_by_site_and_time():
    with pytest.raises(ValueError, match=r'(?s)site "y" is NaN at step 1 \(1 of 3.*nan_is_missing'):
        quiet(unmasked).run(jax.random.key(0), HOLES)


def carried(y):
    """The observation is carried into the next row's law."""

    def step(carry, y_t):
        x, last = carry
        x = numpyro.sample("x", dist.Normal(RHO * x, STEP))
        y_t = numpyro.sample("y", dist.Normal(x + 0.5 * last, NOISE), obs=y_t)
        return (x, y_t), None

    scan(step, (0.5, 0.0), y)


def test_missing_observation_that_is_computed_with_is_an_error():
    """It must not silently count as some number."""
    with pytest.raises(FloatingPointError, match="(?s)NaN at step 1"):
        quiet(carried, nan_is_missing=True).run(jax.random.key(0), HOLES)


# ---- forecasts


@pytest.fixture(scope="module")
def forecaster():
    smc = SMC(ParticleFilter(ar1), num_particles=4000, num_runs=30, progress_bar=False)
    smc.run(jax.random.key(1), Y)
    return smc


def kalman(y):
    mean, var, out = 1.0, 0.4**2, []
    for value in y:
        mean, var = RHO * mean, RHO**2 * var + STEP**2
        gain = var / (var + NOISE**2)
        mean, var = mean + gain * (value - mean), (1 - gain) * var
    for _ in range(3):
        mean, var = RHO * mean, RHO**2 * var + STEP**2
        out.append((mean, var))
    return np.array(out).T


@pytest.mark.statistical
def test_forecast_of_ar1_is_exact(forecaster):
    drawn = forecaster.predict(jax.random.key(2), 3)
    assert set(drawn) == {"x", "y"} and drawn["x"].shape == (120_000, 3)
    mean, var = kalman(np.asarray(Y, np.float64))
    for site, noise in (("x", 0.0), ("y", NOISE**2)):
        # equally weighted draws are grouped; groups of particles stand in for replicates
        groups = np.asarray(drawn[site], np.float64).reshape(30, 4000, 3)
        for statistic, exact in ((groups, mean), ((groups - mean) ** 2, var + noise)):
            assert_mean(statistic.mean(1), exact, family=12, smallest_bias=0.03)
    # the draws of a path belong together
    pair = np.asarray(drawn["x"], np.float64)
    got = np.mean((pair[:, 0] - mean[0]) * (pair[:, 1] - mean[1]))
    np.testing.assert_allclose(got, RHO * var[0], atol=0.02)


def test_same_key_same_forecast_and_prefix(forecaster):
    first = forecaster.predict(jax.random.key(2), 3)["x"]
    np.testing.assert_array_equal(first, forecaster.predict(jax.random.key(2), 3)["x"])
    np.testing.assert_allclose(
        first[:, :2], forecaster.predict(jax.random.key(2), 2)["x"], rtol=1e-5
    )


def controlled(y, u):
    def step(x, row):
        y_t, u_t = row
        x = numpyro.sample("x", dist.Normal(RHO * x + u_t, STEP))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, 0.0, (y, u))


def test_forecast_that_needs_rows():
    smc = quiet(controlled)
    smc.run(jax.random.key(0), Y, jnp.zeros(3))
    with pytest.raises(
        ValueError, match=r"(?s)computes with the rows.*predict\(key, num_steps, xs="
    ):
        smc.predict(jax.random.key(1), 2)
    drawn = smc.predict(jax.random.key(1), 2, xs=(jnp.zeros(2), jnp.array([100.0, 0.0])))
    assert (drawn["x"][:, 0] > 90).all()
    with pytest.raises(ValueError, match=r"(?s)`xs`.*shape \(3,\).*\(2,\)"):
        smc.predict(jax.random.key(1), 2, xs=(jnp.zeros(3), jnp.zeros(3)))
    with pytest.raises(ValueError, match="(?s)`xs`.*structure"):
        smc.predict(jax.random.key(1), 2, xs=jnp.zeros(2))


def test_forecast_carries_observations_on():
    smc = quiet(carried, nan_is_missing=True)
    smc.run(jax.random.key(0), Y)
    drawn = smc.predict(jax.random.key(1), 4)
    assert np.isfinite(drawn["y"]).all() and drawn["y"].shape == (128, 4)
