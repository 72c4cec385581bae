"""`ParticleFilter`: which program is run, with which kernels, and the online form."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array

from smcscale import keys
from smcscale.engine import online
from smcscale.engine.online import OnlineInfo, OnlineState
from smcscale.feynman_kac import FeynmanKac
from smcscale.kernels import resampling as resampling_kernels
from smcscale.kernels.triggers import ess_below

_STORES = ("auto", "last", "ancestry", "paths")


class ParticleFilter(eqx.Module):
    """The particle filter of a program: bootstrap, guided, auxiliary, with annealed resampling.

    Args:
        program: NumPyro program with one `numpyro.contrib.control_flow.scan`, or `FeynmanKac`.
        guide: a second program, called with the same arguments, whose own `scan` of as many rows draws
            the same latent sites.
        proposal: `sample(key, previous, input)` and `log_prob(previous, state, input)`; excludes
            `guide`. For a program, `previous` is the loop's carry and a state is
            `{site: value}`; for a `FeynmanKac` model its state, and `log_transition` is needed.
        resampling: kernel `(key, log_weights, n) -> ancestors`.
        trigger: `(log_weights, time) -> bool`, whether to resample before the next move.
        annealing: tilt `(log_weights, time) -> log_weights` by an inverse temperature.
        lookahead: tilt `(log_weights, states, input, time) -> log_weights` by the next row;
            for a program, `states` are the loop's carries.
        tilt: a further tilt (soft, optimal, stop-gradient).
        move: reserved for rejuvenation; must be None.
        store: "last", "ancestry", "paths", or "auto": paths up to 512 MB, else last.
        nan_is_missing: mask NaN elements of observed sites.
    Raises:
        TypeError, ValueError: for what cannot be combined, by argument name.

    Source: Gordon, Salmond & Smith (1993); Pitt & Shephard (1999); Doucet & Johansen (2011).
    """

    program: Any
    guide: Any
    proposal: Any
    resampling: Any
    trigger: Any
    annealing: Any
    lookahead: Any
    tilt: Any
    store: str = eqx.field(static=True)
    nan_is_missing: bool = eqx.field(static=True)

    def __init__(
        self,
        program: Callable[..., Any] | FeynmanKac,
        *,
        guide: Callable[..., Any] | None = None,
        proposal: Any = None,
        resampling: Any = resampling_kernels.systematic,
        trigger: Any = ess_below(0.5),  # noqa: B008 (compared by value)
        annealing: Any = None,
        lookahead: Any = None,
        tilt: Any = None,
        move: Any = None,
        store: str = "auto",
        nan_is_missing: bool = False,
    ):
        if not (callable(program) or isinstance(program, FeynmanKac)):
            raise TypeError(
                f"smcscale: `program` must be a NumPyro program or a FeynmanKac model, got "
                f"{type(program).__name__}."
            )
        if guide is not None and proposal is not None:
            raise ValueError(
                "smcscale: `guide` and `proposal` are two ways to say the same.\n  try: one of them."
            )
        if isinstance(program, FeynmanKac):
            if guide is not None:
                raise ValueError(
                    "smcscale: a FeynmanKac model takes no `guide`.\n  try: `proposal=`."
                )
            if program.capabilities.host and proposal is not None:
                raise ValueError(
                    "smcscale: a model with Capabilities(host=True) takes no `proposal`.\n"
                    "  try: a transition that draws from it and returns Weighted(states, ratios)."
                )
            if proposal is not None and program.log_transition is None:
                raise ValueError(
                    "smcscale: a proposal needs the model's transition density, which it lacks.\n"
                    "  try: FeynmanKac(..., log_transition=...)."
                )
        if proposal is not None and not (
            hasattr(proposal, "sample") and hasattr(proposal, "log_prob")
        ):
            raise TypeError(
                "smcscale: `proposal` must have `sample` and `log_prob`, got "
                f"{type(proposal).__name__}."
            )
        for name, value in (
            ("resampling", resampling),
            ("trigger", trigger),
            ("annealing", annealing),
            ("lookahead", lookahead),
            ("tilt", tilt),
            ("guide", guide),
        ):
            required = name in ("resampling", "trigger")
            if not callable(value) and (required or value is not None):
                raise TypeError(
                    f"smcscale: `{name}` must be a kernel (a function), got {value!r}.\n"
                    f"  try: an object of smcscale.kernels, for example "
                    f"{_EXAMPLES[name]}."
                )
        if move is not None:
            raise NotImplementedError(
                "smcscale: `move` inside ParticleFilter is not available yet.\n  try: move=None."
            )
        if store not in _STORES:
            raise ValueError(
                f"smcscale: `store` must be one of {', '.join(_STORES)}, got {store!r}."
            )
        self.program = program
        self.guide = guide
        self.proposal = proposal
        self.resampling = resampling
        self.trigger = trigger
        self.annealing = annealing
        self.lookahead = lookahead
        self.tilt = tilt
        self.store = store
        self.nan_is_missing = nan_is_missing

    @property
    def biases(self) -> tuple[str, ...]:
        """What the chosen kernels declare, such as `"asymptotic: Metropolis"`."""
        pieces = (self.resampling, self.lookahead, self.annealing, self.tilt)
        return tuple(
            f"{piece.bias}: {getattr(piece, '__name__', type(piece).__name__)}"
            for piece in pieces
            if getattr(piece, "bias", None)
        )

    def init(self, key: Array, num_particles: int, *args: Any, **kwargs: Any) -> OnlineState:
        """Draw the initial population, for use row by row.

        Args:
            key: consumed.
            num_particles: N.
            *args: the program's arguments as in `SMC.run`; the scanned leaves only show shape and
                dtype (one row is enough) and are not consumed.
            **kwargs: the program's keyword arguments.
        Returns:
            `OnlineState`, a pytree that jits and scans.
        """
        return online.init(self, keys.as_key(key), num_particles, args, kwargs)

    def step(
        self, key: Array, state: OnlineState, input: Any = None
    ) -> tuple[OnlineState, OnlineInfo]:
        """One row: resample if the trigger fires, move, weigh.

        Args:
            key: consumed; another one for each step.
            state: from `init` or `step`.
            input: one row of the scanned inputs.
        Returns:
            the new state, and `OnlineInfo`.
        """
        return online.step(self, keys.as_key(key), state, input)


_EXAMPLES = {
    "resampling": "resampling.systematic",
    "trigger": "triggers.ess_below(0.5)",
    "annealing": "annealing.ESSFloor(0.5)",
    "lookahead": "lookahead.LookAhead(log_eta)",
    "tilt": "tilts.Soft(0.5)",
    "guide": "a NumPyro program with the same latent sites",
}
