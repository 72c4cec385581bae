"""What a user may get wrong, and numbers that break: named, placed, with the remedy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from smcscale import SMC, FeynmanKac, ParticleFilter

KEY = jax.random.key(0)
Y = jnp.linspace(-0.5, 0.5, 4)

pytestmark = pytest.mark.refusal


def walk(y):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


def run(program, *args, key=KEY, num_particles=16, num_runs=2, on_dead="raise", **options):
    smc = SMC(
        ParticleFilter(program, **options),
        num_particles=num_particles,
        num_runs=num_runs,
        on_dead=on_dead,
        progress_bar=False,
    )
    smc.run(key, *args)
    return smc


# ---- arguments


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "many", None])
@pytest.mark.parametrize("name", ["num_particles", "num_runs", "num_islands"])
def test_sizes_are_positive_whole_numbers(name, value):
    given = {"num_particles": 16, name: value}
    with pytest.raises((ValueError, TypeError), match=f"smcscale: `{name}` must be .*whole number"):
        SMC(ParticleFilter(walk), **given)


@pytest.mark.parametrize(
    "key, found",
    [
        (0, "got int"),
        (None, "got NoneType"),
        (jnp.zeros(2), "got "),
        (jax.random.split(KEY, 3), r"array of keys \(3,\)"),
    ],
)
def test_bad_key(key, found):
    with pytest.raises(TypeError, match=f"(?s)smcscale: `key` must be .*{found}.*try"):
        run(walk, Y, key=key)


FILTERS = {
    "store": ({"store": "disk"}, "`store` must be one of auto, last, ancestry, paths"),
    "kernel name": ({"resampling": "systematic"}, "`resampling` must be a kernel.*systematic"),
    "no kernel": ({"resampling": None}, "`resampling` must be a kernel"),
    "trigger": ({"trigger": 0.5}, r"`trigger` must be a kernel.*ess_below\(0.5\)"),
    "annealing": ({"annealing": 0.5}, r"`annealing` must be a kernel.*ESSFloor\(0.5\)"),
    "tilt": ({"tilt": "soft"}, "`tilt` must be a kernel"),
    "look-ahead": ({"lookahead": 1}, "`lookahead` must be a kernel"),
    "guide": ({"guide": "prior"}, "`guide` must be"),
    "guide and proposal": ({"guide": walk, "proposal": object()}, "`guide` and `proposal`.*one of"),
    "proposal": ({"proposal": object()}, "`proposal` must have `sample` and `log_prob`"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter_options_are_checked_when_given(name):
    options, message = FILTERS[name]
    with pytest.raises((TypeError, ValueError), match="(?s)^smcscale: .*" + message):
        ParticleFilter(walk, **options)


def test_program_that_is_none():
    with pytest.raises(TypeError, match="`program` must be a NumPyro program.*got str"):
        ParticleFilter("walk")
    with pytest.raises(TypeError, match="(?s)`algorithm` must be a ParticleFilter.*try"):
        SMC(walk, num_particles=16)
    with pytest.raises(ValueError, match="`on_dead` must be"):
        SMC(ParticleFilter(walk), num_particles=16, on_dead="ignore")


def test_wrong_schedules():
    filter = ParticleFilter(walk)
    with pytest.raises(ValueError, match="(?s)do not divide into 3 islands.*multiple"):
        SMC(filter, num_particles=16, num_islands=3)
    with pytest.raises(ValueError, match="lists 2 numbers; there are 4 rows"):
        SMC(filter, num_particles=[16, 8], progress_bar=False).run(KEY, Y)
    with pytest.raises(ValueError, match="`num_particles` must be .*whole number, got 0"):
        SMC(filter, num_particles=[16, 8, 0, 8], progress_bar=False).run(KEY, Y)


def test_results_before_a_run():
    smc = SMC(ParticleFilter(walk), num_particles=16)
    for read in (lambda: smc.log_evidence, smc.get_samples, lambda: smc.diagnostics):
        with pytest.raises(RuntimeError, match=r"(?s)nothing has been run.*smc.run\(key"):
            read()
    with pytest.raises(RuntimeError, match="(?s)no run to predict from"):
        smc.predict(KEY, 2)


def test_arguments_the_program_does_not_take():
    with pytest.raises(TypeError, match="walk"):
        run(walk, Y, Y)
    with pytest.raises(ValueError, match="(?s)scans over a number.*try"):
        run(walk, 3.0)


# ---- FeynmanKac


def model(**pieces):
    given = {
        "initial": lambda key: jax.random.normal(key),
        "transition": lambda key, x, y: x + jax.random.normal(key),
        "log_potential": lambda previous, x, y: -0.5 * (y - x) ** 2,
        **pieces,
    }
    return FeynmanKac(
        given.pop("initial"), given.pop("transition"), given.pop("log_potential"), **given
    )


@pytest.mark.parametrize("name", ["initial", "transition", "log_potential"])
def test_pieces_are_functions(name):
    with pytest.raises(TypeError, match=f"FeynmanKac's `{name}` must be a function, got float"):
        model(**{name: 1.0})


def test_rows_of_a_feynman_kac_model():
    with pytest.raises(ValueError, match=r"(?s)different numbers of rows: \[3, 4\].*\(T, ...\)"):
        run(model(), {"a": Y, "b": Y[:3]})
    with pytest.raises(ValueError, match="(?s)number of steps is not known.*num_steps=T"):
        run(model())
    with pytest.raises(ValueError, match="(?s)number of steps is not known"):
        run(model(), Y[:0])
    with pytest.raises(TypeError, match="(?s)takes its rows as one argument, got 2"):
        run(model(), Y, Y)


PIECES = {
    "vector potential": (
        {"log_potential": lambda p, x, y: jnp.stack([x, x])},
        r"log potential of one particle has shape \(2,\).*scalar",
    ),
    "growing state": (
        {"transition": lambda k, x, y: jnp.append(x, y)},
        r"returns a leaf of shape \(2,\) where it was given \(\).*fixed shape",
    ),
    "other structure": (
        {"transition": lambda k, x, y: (x, y)},
        "another structure than it was given.*same pytree",
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_misfit_pieces(name):
    pieces, message = PIECES[name]
    with pytest.raises((TypeError, ValueError), match="(?s)^smcscale: .*" + message):
        run(model(**pieces), Y)


def test_proposal_without_a_density():
    with pytest.raises(ValueError, match="(?s)transition density, which it lacks.*log_transition="):
        ParticleFilter(model(), proposal=object())


# ---- callbacks and large constants


def printing(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        jax.debug.print("{}", x)
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def calling(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        like = jax.ShapeDtypeStruct((), jnp.float32)
        z = jax.experimental.io_callback(lambda v: v, like, x)
        numpyro.sample("y", dist.Normal(z, 0.7), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def nested_call(y):
    """A callback inside a loop inside the step, and only in the potential."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))

        def inner(i, v):
            return v + jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), v)

        numpyro.factor("f", jax.lax.fori_loop(0, 2, inner, x))
        return x, None

    scan(step, 0.0, y)


@pytest.mark.parametrize("program", [printing, calling, nested_call])
def test_host_callbacks_are_refused_by_name(program):
    with pytest.raises(
        NotImplementedError,
        match=r"(?s)host callback \((debug_print|io_callback|pure_callback)\).*remove it",
    ):
        run(program, Y)


def test_large_closure_warns_once():
    table = jnp.arange(300_000.0)

    def program(y):
        def step(carry, y_t):
            x, t = carry
            x = numpyro.sample("x", dist.Normal(x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.7 + 0.0 * table[t]), obs=y_t)
            return (x, t + 1), None

        scan(step, (0.0, 0), y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(program, Y)
        run(program, Y + 1)
    told = [str(w.message) for w in caught if "closes over" in str(w.message)]
    assert len(told) == 1 and "pass them to `run` as arguments" in told[0]


# ---- broken numbers


def broken(y, what):
    """A site breaks at the row where `y` is 9."""
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        bad = y_t == 9.0
        numpyro.sample("y", dist.Normal(x, 1.0).mask(~bad), obs=y_t)
        numpyro.factor("culprit", jnp.where(bad, what, 0.0))
        return x, None

    scan(step, x0, y)


NAN, INF = jnp.asarray(jnp.nan), jnp.asarray(jnp.inf)
LONG = jnp.zeros(330).at[320].set(9.0)


@pytest.mark.parametrize("value, kind", [(NAN, "NaN"), (INF, r"\+inf")], ids=["nan", "inf"])
def test_broken_potential_is_placed(value, kind):
    found = rf'(?s)NaN or \+inf at step 320.*site "culprit", run 1 of 2.*16 are {kind}.*try'
    with pytest.raises(FloatingPointError, match=found):
        run(broken, LONG, value)


def test_all_dead_is_placed_or_returned():
    found = '(?s)all 16 particles have zero weight at step 320.*"culprit".*16 are -inf.*guide'
    with pytest.raises(FloatingPointError, match=found):
        run(broken, LONG, -INF)
    smc = run(broken, LONG, -INF, on_dead="return")
    assert (smc.log_evidence == -np.inf).all()
    assert (smc.diagnostics.dead_time == 320).all()
    np.testing.assert_array_equal(smc.diagnostics.ess[:, 320:], 0.0)
    assert smc.result.warnings == ()


def one_run(y, what):
    """Breaks where a particle of the first rows is far out: in one run of several."""
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.factor("far", jnp.where(x > y_t, what, 0.0))
        return x, None

    scan(step, x0, y)


def test_one_broken_run_of_several():
    """The bound is between the largest particles of the runs, so one run alone breaks."""
    rows = jnp.full(3, 1e3)
    clean = run(one_run, rows, NAN, num_runs=4)
    largest = np.asarray(clean.result.history.states["x"])[1].max(axis=1)
    order = np.argsort(largest)
    bound = (largest[order[-1]] + largest[order[-2]]) / 2
    with pytest.raises(FloatingPointError, match=rf'at step 1.*"far", run {order[-1] + 1} of 4'):
        with_newlines(run, one_run, rows.at[1].set(bound), NAN, num_runs=4)
    # minus infinity for all but a few: an ordinary hard constraint
    assert np.isfinite(run(one_run, rows.at[1].set(bound), -INF, num_runs=4).log_evidence).all()


def test_one_dead_run_of_several_counts_as_zero():
    rows = jnp.full(3, 1e3)
    clean = run(one_run, rows, NAN, num_runs=4)
    smallest = np.asarray(clean.result.history.states["x"])[1].min(axis=1)
    order = np.argsort(smallest)
    bound = (smallest[order[-1]] + smallest[order[-2]]) / 2
    smc = run(one_run, rows.at[1].set(bound), -INF, num_runs=4)
    dead = np.arange(4) == order[-1]
    np.testing.assert_array_equal(np.asarray(smc.log_evidence) == -np.inf, dead)
    np.testing.assert_array_equal(smc.diagnostics.dead_time, np.where(dead, 1, -2))


def with_newlines(function, *args, **kwargs):
    """Messages on one line, so that `.` crosses them."""
    try:
        return function(*args, **kwargs)
    except FloatingPointError as error:
        raise FloatingPointError(str(error).replace("\n", " ")) from None


def fragile(rows):
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(carry, row):
        x, hidden = carry
        scale, inner = row
        x = numpyro.sample("x", dist.Normal(x, jnp.sqrt(scale)))
        numpyro.factor("mild", 0.0)
        return (x, jnp.log(inner) + hidden), None

    scan(step, (x0, 0.0), rows)


FINE = jnp.ones(4)


def test_nan_that_enters_the_carry_without_a_site():
    found = '(?s)state is NaN at step 2.*site "carry/1", run 1 of 2; its value is NaN'
    with pytest.raises(FloatingPointError, match=found):
        run(fragile, (FINE, FINE.at[2].set(-1.0)))


def test_nan_draw():
    with pytest.raises(
        FloatingPointError, match='(?s)state is NaN at step 1.*site "x", run 1 of 2'
    ):
        run(fragile, (FINE.at[1].set(-1.0), FINE))


def before_loop(y, what, scale):
    x0 = numpyro.sample("x0", dist.Normal(0.0, scale))
    numpyro.factor("start", what)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


@pytest.mark.parametrize(
    "what, scale, found",
    [
        (NAN, 1.0, 'NaN or [+]inf before the loop.*"start", run 1 of 2.*16 are NaN'),
        (-INF, 1.0, 'zero weight before the loop.*"start".*16 are -inf'),
        (0 * FINE[0], NAN, 'state is NaN before the loop.*site "x0", run 1 of 2'),
    ],
    ids=["nan", "dead", "state"],
)
def test_broken_before_the_loop(what, scale, found):
    with pytest.raises(FloatingPointError, match="(?s)" + found):
        run(before_loop, Y, what, jnp.asarray(scale))


def test_broken_feynman_kac():
    broken_model = model(log_potential=lambda previous, x, y: jnp.log(y))
    with pytest.raises(
        FloatingPointError, match="(?s)NaN or .inf at step 2.*log_potential.*16 are NaN"
    ):
        run(broken_model, jnp.array([1.0, 2.0, -1.0]))


# ---- static parameters


def parametric(y):
    rho = numpyro.sample("rho", dist.Uniform(0.0, 1.0))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(rho * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.7), obs=y_t)
        return x, None

    scan(step, x0, y)


def test_static_parameters_are_warned_of():
    smc = run(parametric, Y)
    assert len(smc.result.warnings) == 1
    assert '"rho"' in smc.result.warnings[0] and "x0" not in smc.result.warnings[0]
    assert "condition" in smc.result.warnings[0]
