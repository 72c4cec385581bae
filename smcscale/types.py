"""Protocols of every swappable piece, and names for the arrays they exchange.

A piece is a plain function, or a frozen `equinox.Module` with `__call__` when it has parameters;
nothing is inherited and nothing is registered. Kernels are compared by value: two equal modules
compile once. A biased kernel carries `bias`, read with `getattr(kernel, "bias", None)`:

| bias | meaning | log evidence |
|---|---|---|
| absent or None | unbiased | given |
| "asymptotic" | bias vanishes as particles or iterations grow | given, marked in the summary |
| "no target" | a search rule without a target distribution | refused |

| protocol | called with | returns |
|---|---|---|
| `Resampling` | `(key, log_weights, n)` | ancestors |
| `ConditionalResampling` | `(key, log_weights, n, kept_ancestor, kept_slot)` | ancestors |
| `Trigger` | `(log_weights, time)` | whether to resample now |
| `Tilt` | `(log_weights, time)` | log-weights to resample with |
| `Lookahead` | `(log_weights, states, input, time)` | log-weights to resample with |
| `Transport` | `(key, log_weights, states, n)` | states, log-weights |
| `Proposal` | `.sample(key, previous, input)`, `.log_prob(previous, state, input)` | state; log density |
| `Move` | `.init(state, log_density)`, `.step(key, state, log_density)` | state; state and info |
| `Potential` | `(previous, state, input)`, one particle | log potential |

`time` is the 0-based row about to be entered, which is the number of rows already made; `input`
is that row. Members live in `smcscale.kernels`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

#: One key; consumed by whoever receives it.
Key = PRNGKeyArray
#: Unnormalised log-weights in nats; `-inf` marks a dead particle.
LogWeights = Float[Array, " N"]
#: Parent of every new particle, in `[0, N)`.
Ancestors = Int32[Array, " n"]
#: The 0-based row about to be entered; a Python int is as good outside the compiled step.
Time = Int32[Array, ""] | int
#: State of one particle, any pytree.
State = PyTree
#: States of all particles, leaves `(N, ...)`.
States = PyTree
#: One row of the data.
Input = PyTree


class Resampling(Protocol):
    """Chooses the parents of the next generation."""

    def __call__(self, key: Key, log_weights: LogWeights, n: int) -> Ancestors:
        """Ancestors of `n` new particles, with `E[#{k: ancestors[k] = i}] = n weights[i]`.

        A particle of zero weight is never chosen. If all weights are zero, the engine has put
        equal ones in their place before the call.
        """
        ...


class ConditionalResampling(Protocol):
    """Chooses parents given that one of them is kept, as particle Gibbs needs."""

    def __call__(
        self,
        key: Key,
        log_weights: LogWeights,
        n: int,
        kept_ancestor: Int32[Array, ""],
        kept_slot: Int32[Array, ""],
    ) -> Ancestors:
        """Ancestors drawn given `ancestors[kept_slot] == kept_ancestor`."""
        ...


class Trigger(Protocol):
    """Decides when to resample."""

    def __call__(self, log_weights: LogWeights, time: Time) -> Bool[Array, ""]:
        """Whether to resample before row `time`. Weights that are NaN must answer True."""
        ...


class Tilt(Protocol):
    """Replaces the weights to resample with; the engine keeps the quotient.

    A tilt may also have `.beta(log_weights, time) -> ()`, reported in the diagnostics.
    """

    def __call__(self, log_weights: LogWeights, time: Time) -> LogWeights:
        """Log-weights `(N,)`, unnormalised, above `-inf` wherever `log_weights` is."""
        ...


class Lookahead(Protocol):
    """A tilt that sees the states and the next row."""

    def __call__(
        self, log_weights: LogWeights, states: States, input: Input, time: Time
    ) -> LogWeights:
        """Log-weights `(N,)`, unnormalised, above `-inf` wherever `log_weights` is."""
        ...


class Transport(Protocol):
    """Moves states instead of choosing ancestors; leaves no genealogy."""

    def __call__(
        self, key: Key, log_weights: LogWeights, states: States, n: int
    ) -> tuple[States, Float[Array, " n"]]:
        """`n` new states and their log-weights."""
        ...


class Proposal(Protocol):
    """Draws one particle's next state from another law than the program's."""

    def sample(self, key: Key, previous: State, input: Input) -> State:
        """A state of one particle."""
        ...

    def log_prob(self, previous: State, state: State, input: Input) -> Float[Array, ""]:
        """Log density of that draw."""
        ...


class Move(Protocol):
    """A Markov move of one particle that leaves a density invariant; the shape of BlackJAX."""

    def init(self, state: State, log_density: Callable[[State], Float[Array, ""]]) -> Any:
        """The move's own state at a particle's state."""
        ...

    def step(
        self, key: Key, state: Any, log_density: Callable[[State], Float[Array, ""]]
    ) -> tuple[Any, Any]:
        """The moved state and what is worth knowing about the move."""
        ...


class Potential(Protocol):
    """Scores one particle's step."""

    def __call__(self, previous: State, state: State, input: Input) -> Float[Array, ""]:
        """Log potential in nats; `-inf` kills the particle. `previous` is `state` at the start."""
        ...
