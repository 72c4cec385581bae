"""Every NumPyro family as a latent site whose parameters depend on the particle.

Particles alternate between two parameters, and statistics of the draws of each half are compared
with NumPyro's own sampler. A distribution rebuilt with a stale batch shape would hand every particle
one draw, or a wrong shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.contrib.control_flow import scan
from numpyro.distributions import transforms

from smcscale import SMC, ParticleFilter
from smcscale.noise import split_noise
from smcscale.program.lower import ProgramState, lower

N = 2000
LEVELS = jnp.array([0.7, 1.3])
EYE = jnp.eye(2)
TRIL = jnp.array([[1.0, 0.0], [0.4, 0.8]])
RING = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def three(m):
    return jnp.stack([0.2 * m, 0.3 + 0 * m, 0.7 - 0.2 * m])


def two(m):
    return jnp.stack([m / 2, 1 - m / 2])


CONTINUOUS = {
    "AsymmetricLaplace": lambda m: dist.AsymmetricLaplace(m, m, 1.5),
    "Cauchy": lambda m: dist.Cauchy(m, 0.5),
    "Exponential": lambda m: dist.Exponential(m),
    "Gumbel": lambda m: dist.Gumbel(m, 0.5),
    "HalfCauchy": lambda m: dist.HalfCauchy(m),
    "HalfNormal": lambda m: dist.HalfNormal(m),
    "Laplace": lambda m: dist.Laplace(m, 0.5),
    "LeftTruncated": lambda m: dist.LeftTruncatedDistribution(dist.Normal(m, 1.0), low=0.5),
    "Logistic": lambda m: dist.Logistic(m, 0.5),
    "LogNormal": lambda m: dist.LogNormal(m, 0.5),
    "LowRankMultivariateNormal": lambda m: dist.LowRankMultivariateNormal(
        m * jnp.ones(3), m * jnp.ones((3, 1)), jnp.ones(3)
    ),
    "MatrixNormal": lambda m: dist.MatrixNormal(jnp.ones((2, 3)), m * TRIL, jnp.eye(3)),
    "MultivariateNormal covariance": lambda m: dist.MultivariateNormal(
        m * jnp.ones(2), m * TRIL @ TRIL.T
    ),
    "MultivariateNormal precision": lambda m: dist.MultivariateNormal(
        m * jnp.ones(2), precision_matrix=m * TRIL @ TRIL.T
    ),
    "MultivariateNormal tril": lambda m: dist.MultivariateNormal(0.0, scale_tril=m * TRIL),
    "MultivariateNormal batch": lambda m: dist.MultivariateNormal(
        m * jnp.ones((4, 2)), scale_tril=TRIL
    ),
    "Normal": lambda m: dist.Normal(m, 0.5),
    "Normal scale": lambda m: dist.Normal(0.0, m),
    "Normal vector": lambda m: dist.Normal(m * jnp.arange(3.0), 0.5),
    "Normal constant": lambda m: dist.Normal(0.0, 1.0),
    "Normal expand": lambda m: dist.Normal(m, 0.5).expand([3]),
    "Normal expand to_event": lambda m: dist.Normal(m, 0.5).expand([3]).to_event(1),
    "Normal mask": lambda m: dist.Normal(m * jnp.ones(2), 0.5).mask(jnp.array([True, False])),
    "Normal mask by particle": lambda m: dist.Normal(m, 0.5).mask(m > 1),
    "Normal to_event": lambda m: dist.Normal(m * jnp.ones((2, 3)), 0.5).to_event(2),
    "Independent": lambda m: dist.Independent(dist.Normal(m * jnp.ones(3), 1.0), 1),
    "RelaxedBernoulli": lambda m: dist.RelaxedBernoulli(0.5, probs=m / 2),
    "RightTruncated": lambda m: dist.RightTruncatedDistribution(dist.Normal(m, 1.0), high=1.5),
    "StickBreaking": lambda m: dist.TransformedDistribution(
        dist.Normal(m * jnp.ones(2), 1.0).to_event(1), transforms.StickBreakingTransform()
    ),
    "Transformed": lambda m: dist.TransformedDistribution(
        dist.Normal(m, 1.0), [transforms.AffineTransform(m, 2.0), transforms.SigmoidTransform()]
    ),
    "Transformed vector": lambda m: dist.TransformedDistribution(
        dist.MultivariateNormal(m * jnp.ones(2), EYE),
        transforms.LowerCholeskyAffine(jnp.ones(2), TRIL),
    ),
    "TruncatedCauchy": lambda m: dist.TruncatedCauchy(m, 1.0, low=0.0, high=3.0),
    "TruncatedNormal": lambda m: dist.TruncatedNormal(0.0, 1.0, low=-m, high=m),
    "TwoSidedTruncated": lambda m: dist.TwoSidedTruncatedDistribution(
        dist.Normal(m, 1.0), 0.0, 2.0
    ),
    "Uniform": lambda m: dist.Uniform(0.0, m),
    "VonMises": lambda m: dist.VonMises(m, 2.0),
    "Weibull": lambda m: dist.Weibull(m, 1.5),
    "MixtureSameFamily": lambda m: dist.MixtureSameFamily(
        dist.Categorical(two(m)), dist.Normal(jnp.stack([m, 3 * m]), 0.5)
    ),
    "MixtureSameFamily vector": lambda m: dist.MixtureSameFamily(
        dist.Categorical(two(m)), dist.MultivariateNormal(m * jnp.ones((2, 3)), jnp.eye(3))
    ),
    "Mixture": lambda m: dist.Mixture(
        dist.Categorical(jnp.array([0.3, 0.7])), [dist.Normal(m, 0.5), dist.Laplace(3 * m, 1.0)]
    ),
    # rejection loops: a key for each particle
    "Gamma": lambda m: dist.Gamma(m, 2.0),
    "Beta": lambda m: dist.Beta(m, 2.0),
    "StudentT": lambda m: dist.StudentT(3.0 + m, m, 1.0),
    "Dirichlet": lambda m: dist.Dirichlet(jnp.stack([m, 2 * m, 1.0 + 0 * m])),
    "InverseGamma": lambda m: dist.InverseGamma(2 + m, 2.0),
    "LKJCholesky": lambda m: dist.LKJCholesky(3, m),
}
DISCRETE = {
    "Bernoulli probs": lambda m: dist.Bernoulli(m / 2),
    "Bernoulli logits": lambda m: dist.Bernoulli(logits=m),
    "Categorical probs": lambda m: dist.Categorical(three(m)),
    "Categorical logits": lambda m: dist.Categorical(logits=jnp.log(three(m))),
    "Delta": lambda m: dist.Delta(m),
    "DiscreteUniform": lambda m: dist.DiscreteUniform(0, jnp.floor(6 * m).astype(int)),
    "Geometric": lambda m: dist.Geometric(m / 2),
    "Multinomial": lambda m: dist.Multinomial(6, three(m)),
    "OrderedLogistic": lambda m: dist.OrderedLogistic(m, jnp.array([0.0, 1.0, 2.0])),
    "Poisson": lambda m: dist.Poisson(3 * m),
    "Binomial": lambda m: dist.Binomial(9, probs=m / 2),
    "ZeroInflatedPoisson": lambda m: dist.ZeroInflatedPoisson(m / 3, 2.0 * m),
}
#: samplers like those above, or slow to compile
SLOW_CONTINUOUS = {
    "AsymmetricLaplaceQuantile": lambda m: dist.AsymmetricLaplaceQuantile(m, m, 0.3),
    "CAR": lambda m: dist.CAR(m, 0.5, 1.0 + m, RING),
    "CirculantNormal": lambda m: dist.CirculantNormal(
        m * jnp.ones(4), jnp.array([1.0, 0.5, 0.25, 0.5])
    ),
    "Dagum": lambda m: dist.Dagum(m, 2.0, 1.5),
    "DoublyTruncatedPowerLaw": lambda m: dist.DoublyTruncatedPowerLaw(-1.5, m, 5.0),
    "Folded": lambda m: dist.FoldedDistribution(dist.Normal(m, 1.0)),
    "Gompertz": lambda m: dist.Gompertz(m, 0.5),
    "Kumaraswamy": lambda m: dist.Kumaraswamy(m, 2.0),
    "LeftCensored": lambda m: dist.LeftCensoredDistribution(dist.Normal(m, 1.0), 0.0),
    "Levy": lambda m: dist.Levy(0.0, m),
    "LowerTruncatedPowerLaw": lambda m: dist.LowerTruncatedPowerLaw(-2.5 * m, 1.0),
    "LogUniform": lambda m: dist.LogUniform(m, 4.0),
    "Pareto": lambda m: dist.Pareto(m, 3.0),
    "ProjectedNormal": lambda m: dist.ProjectedNormal(m * jnp.array([1.0, 0.5])),
    "RightCensored": lambda m: dist.RightCensoredDistribution(dist.Normal(m, 1.0), 1.0),
    "SoftLaplace": lambda m: dist.SoftLaplace(m, 0.5),
    "ZeroSumNormal": lambda m: dist.ZeroSumNormal(m, event_shape=(4,)),
    "Wishart": lambda m: dist.Wishart(3.0 + m, m * EYE),
    "BetaProportion": lambda m: dist.BetaProportion(m / 2, 3.0),
    "Chi2": lambda m: dist.Chi2(2 * m),
    "Gamma expand": lambda m: dist.Gamma(m, 2.0).expand([3]),
    "InverseWishart": lambda m: dist.InverseWishart(4.0 + m, m * EYE),
    "InverseWishartCholesky": lambda m: dist.InverseWishartCholesky(4.0, m * EYE),
    "LKJ": lambda m: dist.LKJ(3, m),
    "LKJCholesky cvine": lambda m: dist.LKJCholesky(3, m, sample_method="cvine"),
    "MixtureGeneral": lambda m: dist.MixtureGeneral(
        dist.Categorical(two(m)), [dist.Normal(m, 0.5), dist.StudentT(5.0, 3 * m, 1.0)]
    ),
    "MultivariateStudentT": lambda m: dist.MultivariateStudentT(3.0 + m, jnp.ones(2), TRIL),
    "SineBivariateVonMises": lambda m: dist.SineBivariateVonMises(
        m, 0.5, 2 * m, 1.5, correlation=0.5
    ),
    "SineSkewed": lambda m: dist.SineSkewed(
        dist.Independent(dist.VonMises(m * jnp.ones(2), 1.0), 1), jnp.array([0.3, 0.2])
    ),
    "TruncatedGamma": lambda m: dist.TruncatedGamma(m, 1.0, low=0.3, high=2.0),
    "TruncatedPolyaGamma": lambda m: dist.TruncatedPolyaGamma(),
    "WishartCholesky": lambda m: dist.WishartCholesky(3.0 + m, m * EYE),
}
SLOW_DISCRETE = {
    "BetaBinomial": lambda m: dist.BetaBinomial(m, 2.0, 7),
    "BetaNegativeBinomial": lambda m: dist.BetaNegativeBinomial(4 * m, 3.0, 5),
    "DirichletMultinomial": lambda m: dist.DirichletMultinomial(
        jnp.stack([m, 2 * m, 1.0 + 0 * m]), 8
    ),
    "GammaPoisson": lambda m: dist.GammaPoisson(m, 0.5),
    "Hurdle": lambda m: dist.HurdleDistribution(dist.Poisson(2 * m), gate=m / 2),
    "NegativeBinomial probs": lambda m: dist.NegativeBinomialProbs(5, m / 2),
    "NegativeBinomial logits": lambda m: dist.NegativeBinomialLogits(5, m - 1),
    "NegativeBinomial2": lambda m: dist.NegativeBinomial2(m, 2.0),
    "ZeroInflated logits": lambda m: dist.ZeroInflatedDistribution(
        dist.Poisson(2 * m), gate_logits=m
    ),
    "ZeroInflatedNegativeBinomial2": lambda m: dist.ZeroInflatedNegativeBinomial2(
        2 * m, 3.0, gate=m / 3
    ),
}
FAMILIES = CONTINUOUS | DISCRETE | SLOW_CONTINUOUS | SLOW_DISCRETE
#: comparisons of a family: two levels of at most 18 statistics, and neighbours
COMPARISONS = 50 * len(FAMILIES)


def program_of(family):
    def program(y):
        m = numpyro.sample("m", dist.Uniform(0.5, 1.5))

        def step(m, _):
            numpyro.sample("x", family(m))
            return m, None

        scan(step, m, y)

    return program


def quickly(function):
    """Compiled with few optimisations: these programs run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def drawn(family, keys, m):
    """Draws of the transition for particles with parameters `m (N,)`, one set for each key."""
    lowered = lower(program_of(family), (jnp.zeros(2),), {})
    structure: list = []

    def step(key, m_one, time):
        state = ProgramState({"m": m_one}, m_one, None, {})
        row = jax.tree.map(lambda x: x[0], lowered.inputs)._replace(time=time)
        leaves, treedef = jax.tree.flatten(lowered.model.transition(key, state, row).sites["x"])
        structure[:] = [treedef]
        return leaves

    split = split_noise(step, keys.dtype, [m[0], jnp.int32(0)])
    axes = tuple(0 if b else None for b in split.batched)

    def draw(key):
        return jax.vmap(lambda v, m_one: split.rest(v, m_one, jnp.int32(0)), in_axes=(axes, 0))(
            split.noise(key, len(m)), m
        )

    leaves = quickly(jax.vmap(draw))(keys)
    return np.asarray(jax.tree.unflatten(structure[0], leaves))


def statistics(x, center):
    """Bounded statistics `(N, k)`: heavy tails have means too."""
    z = np.arctan(x.reshape(len(x), -1) - center)
    found = [z, z**2]
    if z.shape[1] > 1:
        found.append(z * np.roll(z, 1, axis=1))
    return np.concatenate(found, axis=1)


def all_families():
    for name in CONTINUOUS | DISCRETE:
        yield pytest.param(name)
    for name in SLOW_CONTINUOUS | SLOW_DISCRETE:
        yield pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.statistical
@pytest.mark.parametrize("name", list(all_families()))
def test_particles_have_the_law_of_their_parameter(name):
    family = FAMILIES[name]
    shape = family(LEVELS[0]).shape()
    x = drawn(family, jax.random.split(jax.random.key(1), 2), jnp.tile(LEVELS, N // 2))
    assert x.shape == (2, N, *shape)
    if name in CONTINUOUS | SLOW_CONTINUOUS:
        rows = x.reshape(2 * N, -1)
        # float32 has some ties; a draw shared by particles or steps would leave few values
        assert len(np.unique(rows, axis=0)) > 1.95 * N
    elif name != "Delta":
        assert (x[0] != x[1]).any()
    sampler = quickly(lambda key, m: family(m).sample(key, (5 * N,)))
    limit = scipy.stats.norm.isf(1e-3 / (2 * COMPARISONS))
    for level in range(2):
        exact = np.asarray(sampler(jax.random.key(7), LEVELS[level]), np.float64)
        center = np.median(exact, axis=0).reshape(-1)
        reference = statistics(exact, center)
        got = statistics(x[:, level::2].reshape(N, *shape).astype(np.float64), center)
        se = np.sqrt(got.var(0) / len(got) + reference.var(0) / len(reference)) + 1e-6
        np.testing.assert_array_less(np.abs(got.mean(0) - reference.mean(0)), limit * se)
        z = got - got.mean(0)
        neighbours = (z[1:] * z[:-1]).mean(0) / (z.var(0) + 1e-12)
        np.testing.assert_array_less(np.abs(neighbours), (limit + 0.1) / np.sqrt(len(z)))


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Categorical probs", "Poisson", "Mixture"])
def test_a_run_does_not_depend_on_how_many_there_are(name):
    keys = jax.random.split(jax.random.key(1), 2)
    m = jnp.tile(LEVELS, 8)
    both = drawn(FAMILIES[name], keys, m)
    # another batch size may change the last bit of a vectorised function
    np.testing.assert_allclose(both[1], drawn(FAMILIES[name], keys[1:], m)[0], rtol=1e-6)


def chain(y):
    """Families of each kind of sampler, through the whole filter."""
    shape = numpyro.sample("shape", dist.Exponential(1.0))

    def step(level, y_t):
        share = numpyro.sample("share", dist.Gamma(1.0 + shape, 1.0))
        kind = numpyro.sample("kind", dist.Categorical(jnp.stack([share, 1.0, 2.0])))
        level = numpyro.sample("level", dist.Normal(0.5 * level + 0.1 * kind, 0.5))
        numpyro.sample("y", dist.Normal(level + 0.1 * share, 1.0), obs=y_t)
        return level, None

    scan(step, 0.0, y)


@pytest.mark.long
def test_through_the_whole_filter():
    y = jnp.array([0.3, -0.2, 0.8])

    def run(num_runs):
        filter = ParticleFilter(chain, store="paths")
        smc = SMC(filter, num_particles=256, num_runs=num_runs, progress_bar=False)
        smc.run(jax.random.key(0), y)
        return smc.result

    result = run(2)
    states = jax.tree.map(np.asarray, result.history.states)
    assert states["share"].shape == (3, 2, 256) and states["kind"].dtype.kind == "i"
    for name in ("share", "level"):
        assert len(np.unique(states[name])) > 1500  # of 1536: steps, runs and particles differ
    alone = run(1)
    np.testing.assert_allclose(
        alone.history.states["level"][:, 0], states["level"][:, 0], rtol=1e-5
    )
    np.testing.assert_allclose(alone.log_evidence[0], result.log_evidence[0], rtol=1e-5)
