"""Problems for `reason` whose evidence and answer posterior are known exactly, by matrix products.

    bed = chains(seed=0, count=1)[0]
    prompt = read_prompt(bed.lm, bed.reward, ())
    smc.run(key, bed.lm, bed.reward, prompt, max_steps=bed.max_steps, potential=EXACT)
    smc.log_evidence, bed.log_evidence

| bed | a text is | reward | answer | exact by |
|---|---|---|---|---|
| `markov_text`, `markov_texts` | tokens until one says stop | what was observed of each | token at a place | forward-backward |
| `bayes_net`, `chains` | values of the variables of a chain | what was observed of them | a variable's value | elimination |
| `weighted_automaton`, `weighted_automata` | a string of letters | its weight | its length | products of matrices |

More beds, where paths and operations are searched for, are in `mazes.py`, `countdown.py`.  All have `KnownModel`s
as writers and rewards that are functions of the text.  Under `EXACT`, the potential `difference` of
scores that are not clipped, the target is `p(y) r(y)`, its evidence `E_p[r]`.  Plurals make random ones from a seed, all of one shape, so
that they share compiled programs.  Exact sums are in float64, by NumPy, and use nothing of the runs.

Source: Rabiner 1989, section III (forward-backward); Koller & Friedman 2009, chapter 9
(elimination); Mohri 2009, section 3 (weighted automata).  Held to enumeration of all texts in
`tests/models/reasoning/test_beds.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smcscale.models.reasoning.known_model import KnownModel, MarkovLaw
from smcscale.models.reasoning.language_model import TextState
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.rewards import RewardFunction

#: the token that ends a text, where there is one
STOP = 0


def unclipped(aggregate: Any, score: Any, count: Any) -> Array:
    """The newest score as it is: those of beds are right, 0 and 1 too (`aggregates.last` clips)."""
    return jnp.asarray(score)


#: the potential under which the exact answers hold to the last digit
EXACT = Potential(difference, unclipped)


class Bed(NamedTuple):
    """A problem for `reason` with its exact answer.

    Attributes:
        lm: writes.
        reward: judges; its score of a finished text is the r of the target `p(y) r(y)`.
        max_steps: rows that finish every text.
        evidence: `E_p[r]`, exact.
        posterior: `(K,)`, exact probability of each answer under `p(y) r(y) / E_p[r]`; NaN where
            the evidence is 0.
        answers: `(tokens (N, C), lengths (N,)) -> (N,)` int in [0, K), the answer of each text.
        text: `tokens -> str`, what one text says.
    """

    lm: KnownModel
    reward: RewardFunction
    max_steps: int
    evidence: float
    posterior: np.ndarray
    answers: Callable[[np.ndarray, np.ndarray], np.ndarray]
    text: Callable[[Any], str]

    @property
    def log_evidence(self) -> float:
        """Nats; `-inf` where no text has a reward."""
        return float(np.log(self.evidence)) if self.evidence > 0 else float("-inf")


# ---- chains: what was observed of every token


class Observed(eqx.Module):
    """Score of a text: the product of the likelihoods of its tokens, each at its place.

    Attributes:
        log_likelihoods: `(T, V)`, nats, at most 0.
    """

    log_likelihoods: Float[Array, "T V"]

    def __call__(self, state: TextState) -> Float[Array, ""]:
        """The score `()` of the text so far."""
        places = jnp.arange(self.log_likelihoods.shape[0])
        told = self.log_likelihoods[places, state.written.tokens]
        return jnp.exp(jnp.sum(jnp.where(places < state.written.length, told, 0.0)))


def eliminated(first: Any, pairs: Any) -> tuple[float, np.ndarray]:
    """Evidence of a chain of T variables, and every variable's posterior.

    Args:
        first: `(V,)`, weights of the first: its probabilities times what was observed of it.
        pairs: `(T - 1, V, V)`, weights of each one given the one before, likewise.
    Returns:
        evidence, and marginals `(T, V)`; NaN where the evidence is 0.
    """
    forward, backward = [np.asarray(first, np.float64)], [np.ones(len(first))]
    for pair in pairs:
        forward.append(forward[-1] @ pair)
    for pair in pairs[::-1]:
        backward.append(pair @ backward[-1])
    joint = np.array(forward) * np.array(backward[::-1])
    evidence = joint[-1].sum()
    with np.errstate(invalid="ignore"):
        return float(evidence), joint / evidence


def markov_text(
    first: Any,
    table: Any,
    likelihoods: Any,
    *,
    place: int = 0,
    breaks: tuple[int, ...] | None = None,
    step_tokens: int = 1,
) -> Bed:
    """Texts of a Markov chain until it says `STOP`, of which every token was observed with noise.

    Exact: evidence and the posterior of the token at `place` (`STOP` where the text is over by
    then), by forward-backward over a chain in which a text that is over waits.

    Args:
        first: `(V,)`, probabilities of the first token.
        table: `(V, V)`, of each token given the one before; what follows `STOP` is not read.
        likelihoods: `(T, V)` in [0, 1], of each token at each place; T is the room of a text.
        place: of the token that is asked for.
        breaks: tokens that end a step of `step_tokens` at most; None: all.
    """
    first, table = np.asarray(first, np.float64), np.array(table, np.float64)
    likelihoods = np.asarray(likelihoods, np.float64)
    room, size = likelihoods.shape
    waits = np.eye(size)[STOP]
    table[STOP] = waits
    pairs = table * likelihoods[1:, None, :]
    pairs[:, STOP] = waits  # nothing is observed of a text that is over
    evidence, marginals = eliminated(first * likelihoods[0], pairs)
    moves = np.broadcast_to(table, (room - 1, size, size))
    lm = KnownModel(
        MarkovLaw.of(first, moves),
        size,
        max_tokens=room,
        end_tokens=(STOP,),
        step_tokens=step_tokens,
        ends_step=None if breaks is None else np.isin(np.arange(size), breaks),
    )

    def answers(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.where(lengths > place, tokens[:, place], STOP)

    return Bed(lm, _observed(likelihoods), room, evidence, marginals[place], answers, _spaced)


def markov_texts(seed: int, count: int, *, vocabulary: int = 4, room: int = 5) -> list[Bed]:
    """`count` random beds of `markov_text`, asked for their second token."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first = rng.dirichlet(np.full(vocabulary, 2.0))
        table = rng.dirichlet(np.full(vocabulary, 1.0), vocabulary)
        likelihoods = rng.uniform(0.2, 0.9, (room, vocabulary))
        found.append(markov_text(first, table, likelihoods, place=min(1, room - 1)))
    return found


def bayes_net(first: Any, moves: Any, likelihoods: Any, *, query: int = 0) -> Bed:
    """A chain of variables, X1 -> X2 -> ... -> XT, whose values a text writes one a step.

    Each variable may have a child that was observed, so the reward is the likelihood of what was
    observed and the evidence that of the net.  A variable that is known itself has a likelihood of
    zeros and a one.  Exact: evidence and the posterior of a variable, by elimination from both ends.

    Args:
        first: `(V,)`, probabilities of X1.
        moves: `(T - 1, V, V)`, of each variable given its parent.
        likelihoods: `(T, V)` in [0, 1], `P(child as observed | value)`; ones where nothing was.
        query: index of the variable that is asked for.
    """
    first, moves = np.asarray(first, np.float64), np.asarray(moves, np.float64)
    likelihoods = np.asarray(likelihoods, np.float64)
    evidence, marginals = eliminated(first * likelihoods[0], moves * likelihoods[1:, None, :])
    room, size = likelihoods.shape
    lm = KnownModel(MarkovLaw.of(first, moves), size, max_tokens=room)

    def text(tokens: Any) -> str:
        return "\n".join(f"X{t} = {int(value)}" for t, value in enumerate(tokens, 1))

    return Bed(
        lm,
        _observed(likelihoods),
        room,
        evidence,
        marginals[query],
        lambda tokens, lengths: tokens[:, query],
        text,
    )


def chains(
    seed: int, count: int, *, values: int = 3, length: int = 5, observed: float = 0.6
) -> list[Bed]:
    """`count` random beds of `bayes_net`, asked for their first variable.

    The last variable is always observed, each other one with probability `observed`.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first = rng.dirichlet(np.full(values, 2.0))
        moves = rng.dirichlet(np.full(values, 0.7), (length - 1, values))
        likelihoods = rng.uniform(0.1, 1.0, (length, values))
        hidden = rng.random(length) > observed
        hidden[-1] = False
        likelihoods[hidden] = 1.0
        found.append(bayes_net(first, moves, likelihoods))
    return found


# ---- strings with weights


class StringWeight(eqx.Module):
    """Score of a string under a weighted automaton: `initial M_y1 ... M_yl final`.

    A string that may still go on is scored with `promise` in place of `final`: any positive numbers
    guide the filter, none of them is in the target.

    Attributes:
        initial, final, promise: `(S,)`.
        matrices: `(V, S, S)`, one for each letter; that of `STOP` is the identity.
    """

    initial: Float[Array, " S"]
    matrices: Float[Array, "V S S"]
    final: Float[Array, " S"]
    promise: Float[Array, " S"]

    def __call__(self, state: TextState) -> Float[Array, ""]:
        """The score `()` of the text so far."""
        written = state.written

        def read(reached, xs):
            place, token = xs
            ahead = reached @ self.matrices[token]
            return jnp.where(place < written.length, ahead, reached), None

        places = jnp.arange(written.tokens.shape[0])
        reached, _ = jax.lax.scan(read, self.initial, (places, written.tokens))
        return reached @ jnp.where(state.finished, self.final, self.promise)


def weighted_automaton(
    first: Any, table: Any, initial: Any, matrices: Any, final: Any, *, room: int, promise: Any = 1
) -> Bed:
    """Strings of a Markov chain until it says `STOP`, with the weights of a finite automaton.

    The automaton need not be deterministic: the weight of a string is the sum over all its paths.
    Exact: evidence and the posterior of the string's length, by products of matrices over pairs of
    last letter and state.

    Args:
        first: `(V,)`, probabilities of the first letter, `STOP` among them.
        table: `(V, V)`, of each letter given the one before; what follows `STOP` is not read.
        initial, final: `(S,)`, not negative, at most 1; `initial` sums to at most 1.
        matrices: `(V, S, S)`, not negative, rows sum to at most 1, so that weights do not exceed 1;
            that of `STOP` is not read.
        room: a string with so many letters is finished.
        promise: `(S,)` or a number, in (0, 1]: `final` for strings that may still go on.
    Raises:
        ValueError: weights that could leave [0, 1].
    """
    first, table = np.asarray(first, np.float64), np.array(table, np.float64)
    initial, final = np.asarray(initial, np.float64), np.asarray(final, np.float64)
    matrices = np.array(matrices, np.float64)
    size, states = len(first), len(initial)
    table[STOP], matrices[STOP] = np.eye(size)[STOP], np.eye(states)
    rows = np.vstack([initial[None], matrices.reshape(-1, states)])
    promised = np.broadcast_to(np.asarray(promise, np.float64), (states,))
    smallest = min(rows.min(), final.min())
    if smallest < 0 or max(rows.sum(1).max(), final.max(), promised.max()) > 1 + 1e-9:
        raise ValueError(
            "smcscale: an automaton's weights must lie in [0, 1], and so must sums of `initial` and "
            "of rows of `matrices`.\n  try: divide them by their largest sum."
        )
    if promised.min() <= 0:
        raise ValueError(f"smcscale: `promise` must be positive, got {promise}.")
    # masses (V, S) of strings by last letter and state, times weight; row STOP: those that ended
    mass = first[:, None] * (initial @ matrices)
    ended = [mass[STOP] @ final]
    letters = np.arange(size) != STOP
    for _ in range(room - 1):
        mass = np.einsum("us,uv,vst->vt", mass[letters], table[letters], matrices)
        ended.append(mass[STOP] @ final)
    ended.append((mass[letters] @ final).sum())
    evidence = float(np.sum(ended))
    moves = np.broadcast_to(table, (room - 1, size, size))
    lm = KnownModel(MarkovLaw.of(first, moves), size, max_tokens=room, end_tokens=(STOP,))
    single = (jnp.asarray(x, jnp.float32) for x in (initial, matrices, final, promised))

    def answers(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        return lengths - ((lengths > 0) & (last == STOP))

    with np.errstate(invalid="ignore"):
        lengths = np.array(ended) / evidence
    return Bed(lm, RewardFunction(StringWeight(*single)), room, evidence, lengths, answers, _spaced)


def weighted_automata(
    seed: int, count: int, *, letters: int = 2, states: int = 3, room: int = 5
) -> list[Bed]:
    """`count` random beds of `weighted_automaton`, over the letters 1, 2, ..."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first = rng.dirichlet(np.full(letters + 1, 2.0))
        table = rng.dirichlet(np.full(letters + 1, 1.0), letters + 1)
        matrices = rng.dirichlet(np.full(states, 0.5), (letters + 1, states))
        matrices *= rng.uniform(0.4, 1.0, (letters + 1, states, 1))
        initial, final = rng.dirichlet(np.ones(states)), rng.uniform(0.05, 1.0, states)
        found.append(weighted_automaton(first, table, initial, matrices, final, room=room))
    return found


def _observed(likelihoods: np.ndarray) -> RewardFunction:
    if (likelihoods < 0).any() or (likelihoods > 1).any():
        raise ValueError(
            "smcscale: `likelihoods` must be in [0, 1], as scores are.\n"
            "  try: likelihoods / likelihoods.max()."
        )
    with np.errstate(divide="ignore"):
        return RewardFunction(Observed(jnp.asarray(np.log(likelihoods), jnp.float32)))


def _spaced(tokens: Any) -> str:
    return " ".join(str(int(token)) for token in tokens)
