"""The posteriors that AB-MCTS draws from, and its choice between a new answer and an old one.

A posterior is called with what was seen of J groups and draws a value for each:

    posterior(key, scores) -> (J,)        scores = Scores(count, mean, squares)

| posterior | model of the scores of a group | draws |
|---|---|---|
| `Gaussian` | normal, unknown mean and variance (normal-inverse-chi-squared prior) | means, independent |
| `Beta` | Bernoulli with fractional outcomes, Jeffreys prior (a quasi-likelihood) | means, independent |
| `Mixed` | `y = alpha_j + noise`, `alpha_j` normal about a common mean | scores, jointly |

A rule is called with what was seen below one node of the tree and says where to go:

    rule(key, generated, continued, children) -> index of a child, or NEW

| rule | paper's name | how |
|---|---|---|
| `NodeAggregation(posterior)` | AB-MCTS-A | new against old by two draws, then the best draw of a child |
| `MixedModel(posterior)` | AB-MCTS-M | one joint draw of all children and of one more, not yet made |

`rule.action(key, scores)` chooses among actions (models, temperatures) by what each has scored.
Everything is compiled once for each power of two of the number of children.

Source: Inoue et al. 2025, "Wider or Deeper?" (arXiv 2503.04412), sections 3.3 and 3.4, with the
priors of its implementation (treequest).  `Mixed` samples its posterior on a grid, where that uses
a Markov chain: only the two standard deviations are not conjugate.  Read next: `tree_search.py`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int32, PRNGKeyArray

#: a rule's answer: make a new child
NEW = -1


class Scores(NamedTuple):
    """What was seen of each group.

    Attributes:
        count: `(J,)`, how many scores; 0 for a group not yet seen.
        mean: `(J,)`, their mean; ignored where the count is 0.
        squares: `(J,)`, sum of squared deviations from the mean.
    """

    count: Any
    mean: Any
    squares: Any


def summary(sums: np.ndarray) -> Scores:
    """`Scores` of groups from `(..., 3)` sums of `1, y, y^2` (float64)."""
    count, total, squares = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    mean = total / np.maximum(count, 1)
    deviations = np.maximum(squares - count * mean**2, 0.0)
    return Scores(*(np.asarray(x, np.float32) for x in (count, mean, deviations)))


class Gaussian(eqx.Module):
    """Mean of normal scores with unknown variance.

    Prior: `sigma^2 ~ scaled-inv-chi^2(nu, tau2)`, `mu ~ N(mean, sigma^2 / kappa)`.  The draw of the
    variance is integrated out: the posterior of the mean is a Student t.
    """

    mean: float = 0.0
    kappa: float = 1.0
    nu: float = 1.0
    tau2: float = 0.1

    def parameters(self, scores: Scores) -> tuple[Array, Array, Array, Array]:
        """Mean, kappa, nu and tau2 of the posterior, `(J,)` each."""
        n, average, squares = (jnp.asarray(x) for x in scores)
        kappa, nu = self.kappa + n, self.nu + n
        mean = (self.kappa * self.mean + n * average) / kappa
        shift = n * self.kappa * (self.mean - average) ** 2 / kappa
        return mean, kappa, nu, (self.nu * self.tau2 + squares + shift) / nu

    def __call__(self, key: PRNGKeyArray, scores: Scores) -> Float[Array, " J"]:
        """Draws `(J,)` of the means."""
        mean, kappa, nu, tau2 = self.parameters(scores)
        return mean + jnp.sqrt(tau2 / kappa) * jax.random.t(key, nu, mean.shape)


class Beta(eqx.Module):
    """Mean of scores in [0, 1]: each score counts as so much of a success."""

    a: float = 0.5
    b: float = 0.5

    def parameters(self, scores: Scores) -> tuple[Array, Array]:
        """Both parameters of the posterior, `(J,)` each."""
        n, average, _ = (jnp.asarray(x) for x in scores)
        return self.a + n * average, self.b + n * (1 - average)

    def __call__(self, key: PRNGKeyArray, scores: Scores) -> Float[Array, " J"]:
        """Draws `(J,)` of the means."""
        return jax.random.beta(key, *self.parameters(scores))


class Mixed(eqx.Module):
    """The next score of each group, when groups differ by a normal effect.

    `y_ij ~ N(alpha_j, sigma_y^2)`, `alpha_j ~ N(mu, sigma_a^2)`, `mu ~ N(mean, mean_scale^2)`,
    `sigma_a ~ HalfNormal(between)`, `sigma_y ~ HalfNormal(within)`.  The standard deviations live on
    a grid of equal prior mass, all else is exact; a group with no scores draws as a new one.

    Identical scores in a group give the likelihood a pole at `sigma_y = 0` and an improper
    posterior: `sigma_y` stays at or above `floor`, a rounding of the scores.
    """

    mean: float = 0.5
    mean_scale: float = 0.2
    between: float = 0.2
    within: float = 0.3
    floor: float = 0.01
    grid: int = eqx.field(static=True, default=64)

    def deviations(self) -> tuple[Float[Array, "grid 1"], Float[Array, "1 grid"]]:
        """The grids of `sigma_a` and `sigma_y`: quantiles of their priors."""
        quantiles = ndtri((1 + (jnp.arange(self.grid) + 0.5) / self.grid) / 2)
        within = jnp.maximum(self.within * quantiles, self.floor)
        return (self.between * quantiles)[:, None], within[None, :]

    def log_likelihood(self, scores: Scores) -> tuple[Array, Array, Array]:
        """Log likelihood of the deviations, and mean and precision of `mu` given them.

        Each `(grid, grid)`, over `sigma_a` and `sigma_y`; `mu` and the effects are integrated out.
        """
        n, average, squares = (jnp.asarray(x) for x in scores)
        sigma_a, sigma_y = (x[..., None] for x in self.deviations())
        seen = n > 0
        some = jnp.maximum(n, 1)
        variance = sigma_a**2 + sigma_y**2 / some
        precision = self.mean_scale**-2 + jnp.sum(jnp.where(seen, 1 / variance, 0.0), -1)
        pulled = jnp.sum(jnp.where(seen, (average - self.mean) / variance, 0.0), -1)
        center = self.mean + pulled / precision
        around = norm.logpdf(average, center[..., None], jnp.sqrt(variance))
        inside = (
            -(n - 1) / 2 * jnp.log(2 * jnp.pi * sigma_y**2)
            - squares / (2 * sigma_y**2)
            - jnp.log(some) / 2
        )
        by_group = jnp.sum(jnp.where(seen, inside + around, 0.0), -1)
        prior = norm.logpdf(center, self.mean, self.mean_scale)
        return by_group + prior - jnp.log(precision / (2 * jnp.pi)) / 2, center, precision

    def __call__(self, key: PRNGKeyArray, scores: Scores) -> Float[Array, " J"]:
        """One joint draw `(J,)` of the next score of each group."""
        n, average, _ = (jnp.asarray(x) for x in scores)
        point_key, mean_key, effect_key, noise_key = jax.random.split(key, 4)
        log_likelihood, center, precision = self.log_likelihood(scores)
        cumulative = jnp.cumsum(jax.nn.softmax(log_likelihood.ravel()))
        uniform = jax.random.uniform(point_key) * cumulative[-1]
        point = jnp.sum(cumulative[:-1] <= uniform)
        a, y = point // self.grid, point % self.grid
        sigma_a, sigma_y = self.deviations()[0][a, 0], self.deviations()[1][0, y]
        mu = center[a, y] + jax.random.normal(mean_key) / jnp.sqrt(precision[a, y])
        known = sigma_a**-2 + n / sigma_y**2
        alpha = (mu / sigma_a**2 + n * average / sigma_y**2) / known
        alpha += jax.random.normal(effect_key, alpha.shape) / jnp.sqrt(known)
        return alpha + sigma_y * jax.random.normal(noise_key, alpha.shape)


class NodeAggregation(eqx.Module):
    """AB-MCTS-A: first new against old, then which of the old; see the module docstring."""

    posterior: Gaussian | Beta = Gaussian()

    @eqx.filter_jit
    def __call__(
        self, key: PRNGKeyArray, generated: Scores, continued: Scores, children: Scores
    ) -> Int32[Array, ""]:
        """Index of the child to go to, or `NEW`.

        Args:
            key: consumed.
            generated: `()`, scores of the answers made from this node.
            continued: `()`, scores of all answers made from those, at any depth.
            children: `(J,)`, of each child and all below it; a count of 0 is no child.
        """
        stacked = (jnp.append(jnp.stack(x[:2]), x[2]) for x in zip(generated, continued, children))
        draws = self.posterior(key, Scores(*stacked))
        best = jnp.argmax(jnp.where(jnp.asarray(children.count) > 0, draws[2:], -jnp.inf))
        return jnp.where(draws[0] > draws[1], NEW, best).astype(jnp.int32)

    @eqx.filter_jit
    def action(self, key: PRNGKeyArray, scores: Scores) -> Int32[Array, ""]:
        """The action with the best draw, from all scores `(A,)` that each action has had."""
        return jnp.argmax(self.posterior(key, scores)).astype(jnp.int32)


class MixedModel(eqx.Module):
    """AB-MCTS-M: the children and one more, not yet made, compete in one joint draw."""

    posterior: Mixed = Mixed()

    @eqx.filter_jit
    def __call__(
        self, key: PRNGKeyArray, generated: Scores, continued: Scores, children: Scores
    ) -> Int32[Array, ""]:
        """Index of the child to go to, or `NEW`; arguments as of `NodeAggregation`.

        `generated` and `continued` are not used.
        """
        more = Scores(*(jnp.append(jnp.asarray(x), 0.0) for x in children))  # the one not yet made
        draws = self.posterior(key, more)
        old = jnp.where(more.count > 0, draws, -jnp.inf)[:-1]
        return jnp.where(draws[-1] > jnp.max(old), NEW, jnp.argmax(old)).astype(jnp.int32)

    @eqx.filter_jit
    def action(self, key: PRNGKeyArray, scores: Scores) -> Int32[Array, ""]:
        """The action with the best draw, from all scores `(A,)` that each action has had."""
        return jnp.argmax(self.posterior(key, scores)).astype(jnp.int32)
