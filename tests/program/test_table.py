"""Every row of the table of what programs may contain: scored as NumPyro scores it, or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.reparam import LocScaleReparam, TransformReparam

from smcscale.program.lower import lower
from support.paths import draw_path, numpyro_total, total

Y = jnp.array([0.3, -0.4, 1.1])
Y2 = jnp.array([[0.3, 1.0], [-0.4, 0.2], [1.1, -0.5]])
SEEN = jnp.array([True, False, True])


def walk(y, length=None):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, x

    scan(step, x0, y, length=length)


def plate_inside(y):
    x0 = numpyro.sample("x0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(x, y_t):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


def plates_inside(y):
    def step(x, y_t):
        with numpyro.plate("rows", 3, dim=-2), numpyro.plate("columns", 2, dim=-1):
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            with handlers.scale(scale=2.5):
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, jnp.zeros((3, 2)), y)


def masked_handler(y, seen):
    def step(x, row):
        y_t, seen_t = row
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        with handlers.mask(mask=seen_t):
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.5, (y, seen))


def masked_observation(y, seen):
    def step(x, row):
        y_t, seen_t = row
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7).mask(seen_t), obs=y_t)
        return x, None

    scan(step, 0.5, (y, seen))


def deterministic(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
    start = numpyro.deterministic("twice", 2 * x0)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        square = numpyro.deterministic("square", x**2)
        numpyro.sample("y", dist.Normal(square, 0.7), obs=y_t)
        return x, square

    x, _ = scan(step, start, y)
    numpyro.deterministic("end", x + 1.0)


def factors(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.factor("pull", -jnp.abs(x - y_t))
        numpyro.factor("vector", -(jnp.stack([x, x]) ** 2))
        return x, None

    scan(step, 0.5, y)


def tail(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    x, _ = scan(step, x0, y)
    numpyro.factor("reward", -jnp.abs(x - x0))
    numpyro.sample("end", dist.Normal(x, 0.1), obs=0.3)


def observed_before(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
    numpyro.sample("y0", dist.Normal(x0, 0.7), obs=0.2)
    numpyro.factor("start", -(x0**2))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


def discrete(y):
    z0 = numpyro.sample("z0", dist.Categorical(jnp.array([0.4, 0.6])))
    matrix = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical(matrix[z]))
        k = numpyro.sample("k", dist.Bernoulli(0.3 + 0.2 * z))
        numpyro.sample("y", dist.Normal(z - 0.5 * k, 0.7), obs=y_t)
        return z, None

    scan(step, z0, y)


def enumerated(y):
    matrix = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical(matrix[z]), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(1.0 * z, 0.7), obs=y_t)
        return z, None

    scan(step, 1, y)


def pytree_carry(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))
    start = {"x": x0, "past": (jnp.zeros(2), jnp.int32(0))}

    def step(carry, y_t):
        x, (past, count) = carry["x"], carry["past"]
        new = numpyro.sample("x", dist.Normal(0.5 * x + 0.2 * past[0], 0.5))
        numpyro.sample("y", dist.Normal(new, 0.7 + 0.1 * count), obs=y_t)
        return {"x": new, "past": (jnp.stack([x, past[0]]), count + 1)}, None

    scan(step, start, y)


def dict_rows(rows):
    def step(x, row):
        x = numpyro.sample("x", dist.Normal(x + row["control"], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=row["y"])
        return x, None

    scan(step, 0.0, rows)


def without_rows(length):
    def step(x, _):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.factor("low", -(x**2))
        return x, None

    scan(step, 0.0, None, length=length)


def indexed(y):
    scales = numpyro.sample("scales", dist.LogNormal(0.0, 0.3).expand([3]).to_event(1))

    def step(carry, y_t):
        x, t = carry
        x = numpyro.sample("x", dist.Normal(x, scales[t]))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return (x, t + 1), None

    scan(step, (0.0, 0), y)


def vector(y):
    a = jnp.array([[0.9, 0.1], [0.0, 0.8]])

    def step(x, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(a @ x, 0.3 * jnp.eye(2)))
        numpyro.sample("y", dist.MultivariateNormal(x, jnp.eye(2)), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


def mixed(y):
    a = numpyro.sample("a", dist.Uniform(0.5, 1.0))

    def step(x, y_t):
        s = numpyro.sample("s", dist.HalfNormal(1.0 + a))
        x = numpyro.sample("x", dist.Cauchy(a * x, s))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.3, y)


def scoped(y):
    with handlers.scope(prefix="left"):
        x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        with handlers.scope(prefix="left"):
            x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


def located(y, centered):
    def step(x, y_t):
        with handlers.reparam(config={"x": LocScaleReparam(centered)}):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.2, y)


def transformed(y):
    def step(x, y_t):
        affine = dist.transforms.AffineTransform(0.9 * x, 0.5)
        with handlers.reparam(config={"x": TransformReparam()}):
            x = numpyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), affine))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.2, y)


def inner_scan(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))

        def inner(total, k):
            return total + jnp.sin(k * x), None

        total, _ = jax.lax.scan(inner, 0.0, jnp.arange(3.0))
        numpyro.sample("y", dist.Normal(total, 0.7), obs=y_t)
        return x, None

    scan(step, 0.2, y)


PATH = jnp.array([0.1, 0.2, 0.4])
SCORED = {
    "plain": (walk, (Y,)),
    "plate in the body": (plate_inside, (Y2,)),
    "two plates and a scale": (plates_inside, (jnp.ones((3, 3, 2)),)),
    "mask handler": (masked_handler, (Y, SEEN)),
    "masked distribution": (masked_observation, (Y, SEEN)),
    "deterministic": (deterministic, (Y,)),
    "factor": (factors, (Y,)),
    "sites after the loop": (tail, (Y,)),
    "observed before the loop": (observed_before, (Y,)),
    "discrete": (discrete, (Y,)),
    "enumerate annotation": (enumerated, (Y,)),
    "pytree carry": (pytree_carry, (Y,)),
    "rows as a dict": (dict_rows, ({"y": Y, "control": -Y},)),
    "no rows": (without_rows, (4,)),
    "static vector by index": (indexed, (Y,)),
    "vector": (vector, (Y2,)),
    "several families": (mixed, (Y,)),
    "scope in the program": (scoped, (Y,)),
    "inner lax.scan": (inner_scan, (Y,)),
    "scale around": (handlers.scale(walk, scale=0.3), (Y,)),
    "mask around": (handlers.mask(walk, mask=False), (Y,)),
    "condition rows": (handlers.condition(mixed, {"x": PATH}), (Y,)),
    "condition one value": (handlers.condition(mixed, {"x": jnp.asarray(0.3)}), (Y,)),
    "condition before": (handlers.condition(walk, {"x0": jnp.asarray(0.3)}), (Y,)),
    "condition unobserved": (handlers.condition(walk, {"y": Y}), (None, 3)),
    "substitute rows": (handlers.substitute(mixed, {"x": PATH}), (Y,)),
    "substitute before": (handlers.substitute(walk, {"x0": jnp.asarray(0.3)}), (Y,)),
    "decentered": (located, (Y, 0.0)),
    "partly decentered": (located, (Y, 0.4)),
    "untransformed": (transformed, (Y,)),
    "seeded": (handlers.seed(walk, 3), (Y,)),
}


@pytest.mark.parametrize("name", SCORED)
def test_path_density_is_numpyros(name):
    program, args = SCORED[name]
    path = draw_path(program, *args)
    expected = numpyro_total(program, path, *args)
    np.testing.assert_allclose(total(path), expected, rtol=1e-5, atol=2e-5)


def test_sites_before_inside_and_after_are_told():
    path = draw_path(deterministic, Y)
    np.testing.assert_allclose(path.sites["square"], path.sites["x"] ** 2, rtol=1e-6)
    before, after = path.lowered.readout(path.last)
    np.testing.assert_allclose(before["twice"], 2 * path.before["x0"], rtol=1e-6)
    np.testing.assert_allclose(after["end"], path.sites["x"][-1] + 1, rtol=1e-6)
    assert path.lowered.observed == ("y",)


def test_masked_rows_have_potential_zero():
    for program in (masked_handler, masked_observation):
        assert (np.asarray(draw_path(program, Y, SEEN).potentials) != 0).tolist() == SEEN.tolist()


def test_masked_row_may_hold_anything():
    clean = draw_path(masked_observation, Y, SEEN)
    other = draw_path(masked_observation, jnp.where(SEEN, Y, 99.0), SEEN)
    np.testing.assert_array_equal(clean.potentials, other.potentials)


def test_obs_mask_draws_what_is_missing():
    """Missing elements become latent sites `y_unobserved`, which the density includes."""

    def imputed(y, seen):
        def step(x, row):
            y_t, seen_t = row
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            y_t = numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t, obs_mask=seen_t)
            return y_t, None

        scan(step, 0.5, (y, seen))

    path = draw_path(imputed, Y, SEEN)
    x, drawn = path.sites["x"], path.sites["y_unobserved"]
    y = jnp.where(SEEN, Y, drawn)
    start = jnp.concatenate([jnp.array([0.5]), y[:-1]])
    log_y = dist.Normal(x, 0.7).log_prob(y)
    np.testing.assert_allclose(path.potentials, jnp.where(SEEN, log_y, 0.0), rtol=1e-5)
    # where the element is seen, nothing is said of the draw
    expected = dist.Normal(start, 0.5).log_prob(x) + jnp.where(SEEN, 0.0, log_y)
    np.testing.assert_allclose(path.transitions, expected, rtol=1e-5)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_plate_around_the_loop_is_one_joint_state(where):
    def around(y):
        with numpyro.plate("series", 2):
            x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

            def step(x, y_t):
                x = numpyro.sample("x", dist.Normal(x, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
                return x, None

            scan(step, x0, y)

    def inside(y):
        with numpyro.plate("series", 2):
            x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            with numpyro.plate("series", 2):
                x = numpyro.sample("x", dist.Normal(x, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, x0, y)

    path = draw_path({"around": around, "inside": inside}[where], Y2)
    assert path.sites["x"].shape == (3, 2)
    np.testing.assert_allclose(total(path), numpyro_total(inside, path, Y2), rtol=1e-5)


@pytest.mark.parametrize(
    "wrap, names",
    [
        (lambda p: handlers.scope(p, prefix="a"), {"x0": "a/x0", "x": "a/x"}),
        (lambda p: handlers.seed(p, 3), {"x0": "x0", "x": "x"}),
        (lambda p: handlers.infer_config(p, lambda m: {}), {"x0": "x0", "x": "x"}),
        (lambda p: handlers.trace(p), {"x0": "x0", "x": "x"}),
    ],
)
def test_handlers_that_only_rename_or_watch_change_nothing(wrap, names):
    plain, wrapped = draw_path(walk, Y), draw_path(wrap(walk), Y)
    np.testing.assert_array_equal(wrapped.before[names["x0"]], plain.before["x0"])
    np.testing.assert_array_equal(wrapped.sites[names["x"]], plain.sites["x"])
    np.testing.assert_array_equal(wrapped.potentials, plain.potentials)
    np.testing.assert_array_equal(wrapped.transitions, plain.transitions)


def test_reparam_around_the_program_reaches_the_body():
    def plain(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, 0.2, y)

    around = handlers.reparam(plain, config={"x": LocScaleReparam(0.0)})
    path = draw_path(around, Y)
    assert set(path.sites) == {"x", "x_decentered"}
    np.testing.assert_allclose(total(path), numpyro_total(located, path, Y, 0.0), rtol=1e-5)


@pytest.mark.parametrize("wrap", [handlers.condition, handlers.substitute])
@pytest.mark.parametrize("value", [PATH, jnp.asarray(0.3)])
def test_fixed_latent_becomes_a_potential(wrap, value):
    path = draw_path(wrap(walk, {"x": value}), Y)
    x = jnp.broadcast_to(value, (3,))
    before = jnp.concatenate([path.before["x0"][None], x[:-1]])
    expected = dist.Normal(0.9 * before, 0.5).log_prob(x) + dist.Normal(x, 0.7).log_prob(Y)
    np.testing.assert_allclose(path.potentials, expected, rtol=1e-5)
    np.testing.assert_array_equal(path.transitions, 0.0)


def test_condition_on_a_callable():
    fixed = handlers.condition(walk, condition_fn=lambda m: 0.3 if m["name"] == "x0" else None)
    path = draw_path(fixed, Y)
    assert not path.before
    np.testing.assert_allclose(path.increments[0], dist.Normal(0.0, 1.0).log_prob(0.3), rtol=1e-6)


def test_substitute_inside_the_body():
    def body_fixed(y):
        def step(x, y_t):
            with handlers.substitute(data={"x": 0.4}):
                x = numpyro.sample("x", dist.Normal(x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, 0.2, y)

    path = draw_path(body_fixed, Y)
    before = jnp.array([0.2, 0.4, 0.4])
    expected = dist.Normal(before, 0.5).log_prob(0.4) + dist.Normal(0.4, 0.7).log_prob(Y)
    np.testing.assert_allclose(path.potentials, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [PATH, jnp.asarray(0.3)])
def test_do_cuts_the_site_from_what_follows(value):
    """The site keeps its own law, what comes after sees the value."""
    path = draw_path(handlers.do(walk, {"x": value}), Y)
    x = jnp.broadcast_to(value, (3,))
    before = jnp.concatenate([path.before["x0"][None], x[:-1]])
    np.testing.assert_allclose(path.potentials, dist.Normal(x, 0.7).log_prob(Y), rtol=1e-5)
    law = dist.Normal(0.9 * before, 0.5)
    np.testing.assert_allclose(path.transitions, law.log_prob(path.sites["x"]), rtol=1e-5)
    assert not np.allclose(path.sites["x"], x)


def test_do_before_the_loop():
    path = draw_path(handlers.do(walk, {"x0": jnp.asarray(5.0)}), Y)
    law = dist.Normal(0.9 * jnp.append(5.0, path.sites["x"][:-1]), 0.5)
    np.testing.assert_allclose(path.transitions, law.log_prob(path.sites["x"]), rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Word:
    """A pytree as a sample's value."""

    tokens: jax.Array
    length: jax.Array

    ndim = 0
    shape = ()


class Words(dist.Distribution):
    """Up to three letters, each one of five."""

    support = dist.constraints.real
    pytree_data_fields = ("logits",)

    def __init__(self, logits):
        self.logits = logits
        super().__init__(batch_shape=(), event_shape=())

    def sample(self, key, sample_shape=()):
        first, second = jax.random.split(key)
        tokens = jax.random.categorical(first, self.logits, shape=(3,))
        return Word(tokens, jax.random.randint(second, (), 1, 4))

    def log_prob(self, value):
        log_p = jax.nn.log_softmax(self.logits)[value.tokens]
        return jnp.sum(jnp.where(jnp.arange(3) < value.length, log_p, 0.0)) - jnp.log(3.0)


def test_sample_that_is_a_pytree():
    def letters(y):
        def step(logits, y_t):
            word = numpyro.sample("word", Words(logits))
            numpyro.factor("score", y_t * word.length)
            return logits.at[word.tokens].add(0.1), None

        scan(step, jnp.arange(5.0) / 5, y)

    path = draw_path(letters, Y)
    words = path.sites["word"]
    assert isinstance(words, Word) and words.tokens.shape == (3, 3) and words.length.shape == (3,)
    np.testing.assert_allclose(path.potentials, Y * words.length, rtol=1e-6)
    first = Words(jnp.arange(5.0) / 5).log_prob(jax.tree.map(lambda v: v[0], words))
    np.testing.assert_allclose(path.transitions[0], first, rtol=1e-5)


# ---- refused


def two_scans(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    x, _ = scan(step, 0.0, y)
    scan(step, x, y)


def nested_scan(y):
    def step(x, y_t):
        def inner(z, _):
            z = numpyro.sample("z", dist.Normal(z, 0.5))
            return z, None

        x, _ = scan(inner, x, None, length=2)
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def option(**options):
    def program(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
            return x, None

        scan(step, 0.0, y, **options)

    return program


def subsampled(y):
    def step(x, y_t):
        with numpyro.plate("rows", 5, subsample_size=2):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def improper(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def improper_before(y):
    x = numpyro.sample("x0", dist.ImproperUniform(dist.constraints.real, (), ()))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x, y)


def whole_path(y):
    x = numpyro.sample("x", dist.GaussianRandomWalk(0.5, num_steps=3))
    numpyro.sample("y", dist.Normal(x, 0.7), obs=y)


def latent_after(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    x, _ = scan(step, 0.0, y)
    numpyro.sample("end", dist.Normal(x, 0.1))


def outputs_after(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, x

    _, xs = scan(step, 0.0, y)
    numpyro.factor("roughness", -jnp.sum(jnp.diff(xs) ** 2))


def no_loop(y):
    x = numpyro.sample("x", dist.Normal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, 0.7), obs=y)


def same_name(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("x", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def same_name_as_before(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x, y)


def growing(y):
    def step(x, y_t):
        new = numpyro.sample("x", dist.Normal(x[-1], 0.5))
        numpyro.sample("y", dist.Normal(new, 0.7), obs=y_t)
        return jnp.append(x, new), None

    scan(step, jnp.zeros(1), y)


def restructured(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(jax.tree.leaves(x)[0], 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return (x, x), None

    scan(step, 0.0, y)


def random_rows(y):
    z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

    def step(x, row):
        y_t, z_t = row
        x = numpyro.sample("x", dist.Normal(x + z_t, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, (y, z))


def no_pair(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x

    scan(step, 0.0, y)


REFUSED = {
    "two scans": (two_scans, "two scans over time.*carry holds both"),
    "nested scan": (nested_scan, 'site "z" is inside a scan inside the loop.*plate'),
    "reverse": (option(reverse=True), "reverse=True.*reverse the inputs"),
    "history": (option(history=2), r"history=2.*history=1"),
    "subsampling": (subsampled, 'plate "rows" subsamples 2 of 5.*without subsample_size'),
    "no sampler": (improper, r'site "x" \(ImproperUniform\) has no sampler.*proper distribution'),
    "no sampler before": (improper_before, r'site "x0" \(ImproperUniform\) has no sampler'),
    "whole path": (whole_path, r'site "x" \(GaussianRandomWalk\).*numpyro.*scan\(step, x0, y\)'),
    "latent after": (latent_after, 'site "end" is latent and comes after the loop.*inside'),
    "outputs after": (outputs_after, r"\(roughness\) read the loop's stacked.*keep .*in the carry"),
    "no loop": (no_loop, r'"no_loop" has no time loop \(sites: x, y\).*scan over'),
    "same name": (same_name, 'two sites are named "x".*scope'),
    "same name as before": (same_name_as_before, 'two sites are named "x".*scope'),
    "growing carry": (growing, r"carry has shape \(1,\) before the loop and \(2,\) after a row"),
    "restructured carry": (restructured, "carry of another structure.*output second"),
    "random rows": (random_rows, '"random_rows" scans over depend on latent sites.*inside'),
    "no pair": (no_pair, r"body .*\(carry, output\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_remedy(name):
    program, message = REFUSED[name]
    with pytest.raises(
        (ValueError, TypeError, NotImplementedError), match="(?s)^smcscale: .*" + message
    ):
        lower(program, (Y,), {})


def test_condition_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r'(?s)site "x" has shape \(2,\).*3 rows'):
        lower(handlers.condition(walk, {"x": PATH[:2]}), (Y,), {})


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match=r"(?s)smcscale: .*rows.*\[2, 3\]"):
        lower(dict_rows, ({"y": Y, "control": Y[:2]},), {})


def test_length_that_disagrees_with_the_rows_is_refused():
    with pytest.raises(ValueError, match="(?s)smcscale: .*length"):
        lower(walk, (Y, 2), {})


def test_no_rows_at_all_is_refused():
    with pytest.raises(ValueError, match="(?s)smcscale: .*no rows"):
        lower(walk, (Y[:0],), {})
    with pytest.raises(ValueError, match="(?s)smcscale: .*length"):
        lower(without_rows, (None,), {})


# ---- guides


def guide(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * (x + y_t), 0.6))
        return x, None

    scan(step, numpyro.sample("x0", dist.Normal(0.1, 1.2)), y)


def test_guide_ratio_is_prior_over_proposal():
    path = draw_path(walk, Y, options={"guide": guide})
    x0, x = path.before["x0"], path.sites["x"]
    before = jnp.append(x0, x[:-1])
    opening = dist.Normal(0.0, 1.0).log_prob(x0) - dist.Normal(0.1, 1.2).log_prob(x0)
    ratios = path.transitions - dist.Normal(0.5 * (before + Y), 0.6).log_prob(x)
    np.testing.assert_allclose(path.increments, jnp.append(opening, ratios), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        path.transitions, dist.Normal(0.9 * before, 0.5).log_prob(x), rtol=1e-5
    )


def test_guide_may_draw_what_the_prior_cannot():
    path = draw_path(improper, Y, options={"guide": option_guide})
    assert np.isfinite(path.increments).all()


def option_guide(y):
    def step(x, y_t):
        return numpyro.sample("x", dist.Normal(y_t, 0.6)), None

    scan(step, 0.0, y)


def without_site(y):
    def step(x, y_t):
        return x, None

    scan(step, 0.0, y)


def other_site(y):
    def step(x, y_t):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        return numpyro.sample("x", dist.Normal(x, 0.6)), None

    scan(step, 0.0, y)


def extra_before(y):
    numpyro.sample("z0", dist.Normal(0.0, 1.0))
    guide(y)


def shorter(y):
    guide(y[1:])


def guide_shape(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 0.6).to_event(1))
        return x, None

    scan(step, jnp.zeros(2), y)


def observing(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.6))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


GUIDES = {
    "missing": (without_site, 'the guide lacks "x" inside the loop.*"x"'),
    "extra": (other_site, 'the guide has "z", which the program lacks'),
    "extra before": (extra_before, 'the guide draws "z0" before the loop'),
    "length": (shorter, "the guide's loop has 2 rows, the program's 3"),
    "shape": (guide_shape, r'the guide draws site "x" in shape \(2,\).*in shape \(\)'),
    "no loop": (no_loop, '"no_loop" has no time loop'),
}


@pytest.mark.parametrize("name", GUIDES)
def test_unfit_guide_is_refused_by_name(name):
    unfit, message = GUIDES[name]
    with pytest.raises((ValueError, TypeError), match="(?s)^smcscale: .*" + message):
        lower(walk, (Y,), {}, guide=unfit)
