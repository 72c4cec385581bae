"""Diffusion of tokens towards uniform noise, with Feynman-Kac correctors: `jump`.

A sequence has L tokens in `[0, V)`.  Noise keeps a token from level a to level b < a with
probability `b / a` and draws it anew, uniform, otherwise.  Level 1 is data and 0 is noise (it is the
package's `alpha`, not its index k); the rows rise.  A network is any callable
`network(tokens, levels (L,)) -> (L, V)`, logits of the clean tokens given the noisy ones.
With q_i the marginals of network i, b_i its exponent, s the rows' strengths:

    target of row t, up to Z:  prod_i q_i,t(x)^b_i exp(s_t r(x))

so `Powers((p,), (beta,))` anneals, `Powers((p, q), (1, 1))` multiplies, `tilt=r` tilts, and any of
them together.  The evidence estimates the sum of the last target over all sequences: the constants of
every row are kept, and the first one is known, since level 0 is exactly uniform.

A row from levels t to s draws each token j from `Q_j(v)`, normalized, and weighs, both from

    T_j(v) = sum_i b_i log p_i,j(v | x_t) + (1 - sum_i b_i) log k(x_t,j | v)
    log-weight of the row = sum_j [T_j - log Q_j](x_s,j) + s_s r(x_s) - s_t r(x_t)

with p_i,j the reverse kernel of token j and k the noise between the two levels.  This is the ratio of
`target_s(x_s) k(x_t | x_s)` to `target_t(x_t) Q(x_s | x_t)`, and as the levels approach each other it
is `exp(g dt)` of the corrector in continuous time (`rates`, `weight_rate`).

| `levels` | tokens moved by a row | law of the end with an exact network |
|---|---|---|
| `sweeps(n, L)`, `(n L + 1, L)` | one | the target, at any number of rows |
| `even_levels(T)`, `(T + 1,)` | all, independently | the target as T grows; the product of path laws at any T |

Source: rates and weights are derived here from the forward equation for uniform noise, as Skreta et al. 2025
(arXiv 2503.02819) do for continuous states; the ratio of a row is their integral kept exact.  Single tokens:
Austin et al. 2021 (arXiv 2107.03006).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Int
from numpyro.contrib.control_flow import scan

from smcscale.program.spend import spend
from smcscale.weights import cool


def sweeps(num_sweeps: int, length: int) -> Float[Array, "levels L"]:
    """Levels `(num_sweeps * length + 1, length)`: each row raises one token's level, left to right."""
    made = jnp.arange(num_sweeps * length + 1)[:, None]
    own = (made + length - 1 - jnp.arange(length)) // length
    return own / num_sweeps


class Powers(eqx.Module):
    """A product of networks' laws, each to an exponent.

    Attributes:
        networks: callables `(tokens, levels) -> (L, V)`.
        exponents: one for each.
    """

    networks: tuple[Any, ...]
    exponents: tuple[ArrayLike, ...] = (1.0,)

    def __check_init__(self):
        if len(self.networks) != len(self.exponents) or not self.networks:
            raise ValueError(
                f"smcscale: `exponents` of Powers has {len(self.exponents)} numbers for "
                f"{len(self.networks)} networks.\n  try: one for each."
            )


class Rise(NamedTuple):
    """One row: levels `(L,)` before and after it, strengths `()` before and after it."""

    level: Float[Array, "..."]
    next_level: Float[Array, "..."]
    strength: Float[Array, "..."]


def noise_log_probs(
    tokens: Int[Array, " L"], kept: Float[Array, " L"], vocabulary: int
) -> Float[Array, "L V"]:
    """`log k(token | v)` for every earlier value v: noise keeps a token with probability `kept`."""
    same = jnp.arange(vocabulary) == tokens[:, None]
    return jnp.log(jnp.where(same, kept[:, None], 0.0) + (1 - kept[:, None]) / vocabulary)


def kept_between(level: Float[Array, " L"], next_level: Float[Array, " L"]) -> Float[Array, " L"]:
    """Probability that noise keeps a token from `next_level` down to `level`."""
    # two levels alike are no move, at 0 too
    return jnp.where(level == next_level, 1.0, level / jnp.maximum(next_level, 1e-30))


def reverse_log_probs(
    logits: Float[Array, "L V"],
    tokens: Int[Array, " L"],
    level: Float[Array, " L"],
    next_level: Float[Array, " L"],
) -> Float[Array, "L V"]:
    """Log-probabilities of each token one row nearer to the data.

    Exact for a token if `logits` are those of its exact law given all tokens, and no other moves.

    Args:
        logits: `(L, V)`, of the clean tokens.
        tokens: `(L,)` at `level`.
        level, next_level: `(L,)`; tokens whose level does not rise stay.
    Source: Austin et al. 2021, summed over the clean token.
    """
    vocabulary = logits.shape[1]
    clean = jax.nn.softmax(logits)
    odds = clean / jnp.exp(noise_log_probs(tokens, level, vocabulary))
    raised = next_level[:, None]
    mixed = raised * odds + (1 - raised) / vocabulary * jnp.sum(odds, axis=1, keepdims=True)
    moved = noise_log_probs(tokens, kept_between(level, next_level), vocabulary) + jnp.log(mixed)
    stays = jnp.where(jnp.arange(vocabulary) == tokens[:, None], 0.0, -jnp.inf)
    return jnp.where((level == next_level)[:, None], stays, moved)


def corrected(
    powers: Powers,
    tokens: Int[Array, " L"],
    level: Float[Array, " L"],
    next_level: Float[Array, " L"],
    vocabulary: int,
) -> Float[Array, "L V"]:
    """The table T of the module docstring, `(L, V)`."""
    rest = 1 - sum(jnp.asarray(b, float) for b in powers.exponents)
    power = jax.vmap(cool, (0, None))
    noise = noise_log_probs(tokens, kept_between(level, next_level), vocabulary)
    table = power(noise, jnp.asarray(rest))
    for network, exponent in zip(powers.networks, powers.exponents, strict=True):
        found = reverse_log_probs(network(tokens, level), tokens, level, next_level)
        table += power(found, jnp.asarray(exponent, float))
    return table


def replaced(
    reward: Callable[..., Array], tokens: Int[Array, " L"], vocabulary: int
) -> Float[Array, "L V"]:
    """Reward of every sequence that differs from `tokens` in one place at most; L V calls."""
    values = jnp.arange(vocabulary, dtype=tokens.dtype)
    one = lambda place, value: reward(tokens.at[place].set(value))
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.arange(tokens.shape[0]), values)


def jump(
    networks: Powers | Callable[..., Array],
    levels: Float[Array, "..."],
    *,
    shape: tuple[int, int],
    tilt: Callable[..., Array] | None = None,
    strengths: Float[Array, " levels"] | None = None,
    informed: bool = True,
) -> None:
    """The program: draw uniform noise; move tokens up, weigh.

    Args:
        networks: a network, or `Powers` of several.
        levels: `(T + 1,)` for all tokens alike, or `(T + 1, L)`; the first 0, the last 1.
        shape: `(L, V)`.
        tilt: reward `(tokens (L,)) -> ()`; it is read at noisy tokens too.
        strengths: `(T + 1,)`, of the tilt after each row; rising evenly to 1 by default. Only the last
            is in the target.
        informed: draw tokens in proportion to `exp` of their reward, at L V reward calls a row and
            network; False draws them without. The target is the same.
    Sites:
        noise: `(L,)`, before the loop; tokens: `(L,)` after the row; scale: the first target's
        constant; weight, tilt: the potentials.
    Raises:
        ValueError: for `levels` or `strengths` of another shape.
    """
    length, vocabulary = shape
    levels = jnp.asarray(levels, float)
    if levels.ndim not in (1, 2) or levels.shape[0] < 2 or levels.shape[1:] not in ((), (length,)):
        raise ValueError(
            f"smcscale: `levels` of jump must be (T + 1,) or (T + 1, {length}), got {levels.shape}.\n"
            "  try: sweeps(num_sweeps, length), or even_levels(num_steps)."
        )
    count = levels.shape[0]
    if strengths is None:
        strengths = jnp.linspace(0.0, 1.0, count)
    strengths = jnp.asarray(strengths, float)
    if strengths.shape != (count,):
        raise ValueError(
            f"smcscale: `strengths` of jump must be ({count},), as many as levels, got "
            f"{strengths.shape}."
        )
    powers = networks if isinstance(networks, Powers) else Powers((networks,))
    levels = jnp.broadcast_to(levels.reshape(count, -1), (count, length))
    start: Any = numpyro.sample(
        "noise", dist.CategoricalLogits(jnp.zeros((length, vocabulary))).to_event(1)
    )
    total = sum(jnp.asarray(b, float) for b in powers.exponents)
    # the first target is V^(-L sum b) everywhere, the law it is drawn from V^-L
    numpyro.factor("scale", (1 - total) * length * jnp.log(float(vocabulary)))

    def step(carry: tuple[Array, Array], rise: Rise) -> tuple[tuple[Array, Array], None]:
        tokens, tilted = carry
        table = corrected(powers, tokens, rise.level, rise.next_level, vocabulary)
        drawn = table
        if tilt is not None and informed:
            drawn = table + rise.strength * replaced(tilt, tokens, vocabulary)
        log_q = jax.nn.log_softmax(drawn)
        law = dist.CategoricalLogits(log_q, validate_args=False).to_event(1)
        new: Any = numpyro.sample("tokens", law)
        at = lambda logs: jnp.take_along_axis(logs, new[:, None], axis=1)[:, 0]
        numpyro.factor("weight", jnp.sum(at(table) - at(log_q)))
        calls = 0
        if tilt is not None:
            value = rise.strength * tilt(new)
            numpyro.factor("tilt", value - tilted)
            tilted, calls = value, 1 + informed * length * vocabulary
        spend(denoiser_calls=len(powers.networks), reward_calls=calls)
        return (new, tilted), None

    opening = (start.astype(jnp.int32), jnp.zeros(()))
    scan(step, opening, Rise(levels[:-1], levels[1:], strengths[1:]))


# ---- the same in continuous time


def log_ratios(
    logits: Float[Array, "L V"], tokens: Int[Array, " L"], level: Float[Array, " L"]
) -> Float[Array, "L V"]:
    """`log q(x with v at j) - log q(x)` at a level below 1: the concrete score of a network.

    Args:
        logits: `(L, V)`, of the clean tokens given `tokens`.
        tokens: `(L,)`.
        level: `(L,)`, below 1.
    Source: Lou, Meng & Ermon 2024 (arXiv 2310.16834), by the posterior mean of
        `k(v | x_0) / k(x | x_0)`.
    """
    vocabulary = logits.shape[1]
    odds = jax.nn.softmax(logits) / jnp.exp(noise_log_probs(tokens, level, vocabulary))
    kept = level[:, None]
    return jnp.log(kept * odds + (1 - kept) / vocabulary * jnp.sum(odds, axis=1, keepdims=True))


def rates(
    log_ratios_of: tuple[Float[Array, "L V"], ...],
    exponents: tuple[ArrayLike, ...],
    tokens: Int[Array, " L"],
    tilt: Float[Array, "L V"] | float = 0.0,
) -> Float[Array, "L V"]:
    """Rates of the corrected jumps for each unit of `-log level`; 0 for a token to itself.

    Args:
        log_ratios_of: of each network.
        exponents: theirs.
        tokens: `(L,)`.
        tilt: strength times the reward gained by the jump, `(L, V)`.
    """
    vocabulary = log_ratios_of[0].shape[1]
    joint = sum(b * ratio for b, ratio in zip(exponents, log_ratios_of, strict=True)) + tilt
    same = jnp.arange(vocabulary) == tokens[:, None]
    return jnp.where(same, 0.0, jnp.exp(joint) / vocabulary)


def weight_rate(
    log_ratios_of: tuple[Float[Array, "L V"], ...],
    exponents: tuple[ArrayLike, ...],
    tokens: Int[Array, " L"],
    tilt: Float[Array, "L V"] | float = 0.0,
) -> Float[Array, ""]:
    """Growth g of the log-weight for each unit of `-log level`, at jumps of `rates`.

    `g = sum_j sum_{v != x_j} [ prod_i s_i^b_i e^tilt - sum_i b_i s_i + sum_i b_i - 1 ] / V`, to which
    a strength that changes adds its derivative times the reward. Arguments as in `rates`.
    """
    vocabulary = log_ratios_of[0].shape[1]
    pairs = list(zip(exponents, log_ratios_of, strict=True))
    linear = sum(b * (jnp.exp(ratio) - 1) for b, ratio in pairs) + 1
    same = jnp.arange(vocabulary) == tokens[:, None]
    joint = rates(log_ratios_of, exponents, tokens, tilt)
    return jnp.sum(joint - jnp.where(same, 0.0, linear) / vocabulary)


class ExactUniform(eqx.Module):
    """The network of a given joint law, by enumeration: for tests and first steps.

    Attributes:
        log_joint: `(V, ..., V)`, L axes, log-probabilities of all clean sequences.
    """

    log_joint: Float[Array, "..."]

    def __call__(self, tokens: Int[Array, " L"], level: Float[Array, " L"]) -> Float[Array, "L V"]:
        """Log-probabilities `(L, V)` of each clean token given all noisy ones."""
        length, vocabulary = self.log_joint.ndim, self.log_joint.shape[0]
        sequences = jnp.indices(self.log_joint.shape).reshape(length, -1).T
        noise = noise_log_probs(tokens, level, vocabulary)
        seen = jnp.take_along_axis(noise[None], sequences[..., None], axis=2)[..., 0].sum(1)
        given = jax.nn.softmax(self.log_joint.reshape(-1) + seen)
        return jnp.log(jnp.einsum("n,nlv->lv", given, jax.nn.one_hot(sequences, vocabulary)))
