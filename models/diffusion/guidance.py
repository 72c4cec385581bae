"""Guidance of masked diffusion: another law to draw tokens from, and what it owes.

| name | target, with its weight |
|---|---|
| `annealed(b)`, `classifier_free(q, a)`, `multiplied(q)` | `p^b`, `p^(1-a) q^a`, `p q` |
| `Heated(temperature)` | p, drawn at another temperature |
| `Lookahead(log_likelihood, scale)` | p, drawn with a classifier in view |

A guidance is `(log_probs (L, V), tokens, level) -> Guided`, with `calls`, its network calls. Without its
weight (`corrected=False`) the law is that of the guided chain itself: a product of conditionals that are
normalized one by one.

Source: Lee et al. 2025 (arXiv 2502.06079) for the weights; Nisonoff et al. 2024 (arXiv 2406.01572).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smcscale.weights import cool


class Guided(NamedTuple):
    """What a guidance makes of the network's table.

    Attributes:
        proposal: `(L, V)`, normalized log-probabilities to draw tokens from.
        target: `(L, V)`, log-densities that a token counts with, normalized or not.
    """

    proposal: Float[Array, "L V"]
    target: Float[Array, "L V"]


class Product(eqx.Module):
    """Guidance towards a product of laws, each to an exponent; drawn from its normalized table.

    The weight of a row is the product over the tokens shown of `sum_v prod_i p_i(v)^b_i`.

    Attributes:
        exponent: of the program's own network; made by `annealed`, `classifier_free`, `multiplied`.
        networks: further ones.
        exponents: theirs.
        corrected: False drops the weights, as published guided samplers do.
    """

    exponent: float | Float[Array, ""]
    networks: tuple[Any, ...] = ()
    exponents: tuple[Any, ...] = ()
    corrected: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if len(self.networks) != len(self.exponents):
            raise ValueError(
                f"smcscale: `exponents` of Product has {len(self.exponents)} numbers for "
                f"{len(self.networks)} networks.\n  try: one for each."
            )

    @property
    def calls(self) -> int:
        """Network calls of one reading."""
        return len(self.networks)

    def __call__(
        self, log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], level: Float[Array, ""]
    ) -> Guided:
        target = jax.vmap(cool, (0, None))(log_probs, self.exponent)
        for network, exponent in zip(self.networks, self.exponents, strict=True):
            table = jax.nn.log_softmax(network(tokens, level))
            target += jax.vmap(cool, (0, None))(table, exponent)
        proposal = jax.nn.log_softmax(target)
        return Guided(proposal, target if self.corrected else proposal)


def annealed(beta: float | Float[Array, ""], *, corrected: bool = True) -> Product:
    """Guidance towards `p(x)^beta`."""
    return Product(beta, corrected=corrected)


def classifier_free(
    conditional: Any, scale: float | Float[Array, ""], *, corrected: bool = True
) -> Product:
    """Guidance towards `p(x)^(1 - scale) p(x | z)^scale`, the network being p.

    Args:
        conditional: the network given z, `(tokens, level) -> (L, V)`.
        scale: 1 is the conditional law; above 1 it is sharpened.
        corrected: False is the published predictor-free guidance.
    Source: Nisonoff et al. 2024 (arXiv 2406.01572); weights Lee et al. 2025.
    """
    return Product(1 - scale, (conditional,), (scale,), corrected)


def multiplied(*networks: Any, corrected: bool = True) -> Product:
    """Guidance towards the product of the laws of the program's network and `networks`."""
    return Product(1.0, networks, (1.0,) * len(networks), corrected)


class Heated(eqx.Module):
    """Guidance that only draws otherwise: at a softmax temperature, corrected to `p`.

    Attributes:
        temperature: below 1 sharpens.
        corrected: False drops the weights: the law is then that of the sharpened conditionals.
    """

    temperature: float | Float[Array, ""]
    corrected: bool = eqx.field(static=True, default=True)
    calls: int = eqx.field(static=True, default=0)

    def __call__(
        self, log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], level: Float[Array, ""]
    ) -> Guided:
        proposal = jax.nn.log_softmax(log_probs / self.temperature)
        return Guided(proposal, log_probs if self.corrected else proposal)


class Lookahead(eqx.Module):
    """Guidance that draws a token with `p(v) exp(scale log p(z | tokens with v))`, corrected to `p`.

    Each table costs L V calls of the classifier; with one token a row and an exact classifier at
    scale 1 the weights of `classifier_guidance` are then all equal.

    Attributes:
        log_likelihood: `(tokens, level) -> ()`, of the condition given a partly masked sequence.
        scale: exponent.
    """

    log_likelihood: Callable[..., Array]
    scale: float | Float[Array, ""]
    calls: int = eqx.field(static=True, default=0)

    def __call__(
        self, log_probs: Float[Array, "L V"], tokens: Int[Array, " L"], level: Float[Array, ""]
    ) -> Guided:
        length, vocabulary = log_probs.shape
        positions, values = jnp.arange(length), jnp.arange(vocabulary, dtype=tokens.dtype)

        def ahead(position: Array, value: Array) -> Array:
            return self.log_likelihood(tokens.at[position].set(value), level)

        over_values = jax.vmap(ahead, (None, 0))
        tilt = self.scale * jax.vmap(over_values, (0, None))(positions, values)
        # where nothing that may be drawn is possible, draw from p; the potential ends it
        tilted = jnp.where(jnp.isneginf(log_probs), -jnp.inf, log_probs + tilt)
        possible = jnp.any(jnp.isfinite(tilted), axis=1, keepdims=True)
        return Guided(jax.nn.log_softmax(jnp.where(possible, tilted, log_probs)), log_probs)
