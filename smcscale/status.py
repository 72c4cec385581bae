"""What can go wrong inside a compiled run: codes that travel in the carry, raised at the boundary.

No callback is compiled into the program. A step writes a code, the host reads it one block late and
raises with the step, the site and the run.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

OK = 0
BROKEN_POTENTIAL = 1
BROKEN_STATE = 2
ALL_DEAD = 3

#: `Status.time` of a fault in the initial law
BEFORE = -1


class Status(NamedTuple):
    """First fault of each run.

    Attributes:
        code: `(R,)` int32, `OK` or the first code met.
        time: `(R,)` int32, 0-based row of that fault; -1 is before the loop.
        dead_time: `(R,)` int32, first row at which all particles had zero weight, -2 if none.
    """

    code: Int32[Array, " R"]
    time: Int32[Array, " R"]
    dead_time: Int32[Array, " R"]


def start(num_runs: int) -> Status:
    """The status of runs in which nothing has happened yet."""
    zeros = jnp.zeros(num_runs, jnp.int32)
    return Status(zeros, zeros - 2, zeros - 2)


def update(
    status: Status,
    time: Array,
    potential: Bool[Array, " R"],
    state: Bool[Array, " R"],
    dead: Bool[Array, " R"],
) -> Status:
    """Record the first fault: broken potentials (NaN, +inf), NaN states, no particle alive."""
    code = jnp.where(potential, BROKEN_POTENTIAL, jnp.where(state, BROKEN_STATE, OK))
    first = (status.code == OK) & (code != OK)
    return Status(
        jnp.where(first, code, status.code).astype(jnp.int32),
        jnp.where(first, time, status.time).astype(jnp.int32),
        jnp.where(dead & (status.dead_time == -2), time, status.dead_time).astype(jnp.int32),
    )


def where(time: int) -> str:
    """How messages name a row."""
    return "before the loop" if time < 0 else f"at step {time}"


def message(
    code: int, time: int, run: int, num_runs: int, num_particles: int, culprits: dict[str, str]
) -> str:
    """The text of an error: what happened, where, what was found, what to do.

    Args:
        code: one of the codes above.
        time: 0-based row, -1 before the loop.
        run: index of the first run that failed.
        num_runs: number of runs.
        num_particles: particles of a run.
        culprits: what was found, by site.
    """
    what = {
        BROKEN_POTENTIAL: f"a potential is NaN or +inf {where(time)}",
        BROKEN_STATE: f"a particle's state is NaN {where(time)}",
        ALL_DEAD: f"all {num_particles} particles have zero weight {where(time)}",
    }[code]
    cure = {
        BROKEN_POTENTIAL: "check the likelihood's parameters and support, or the reward, at that row; "
        "a zero likelihood is -inf, never NaN.",
        BROKEN_STATE: "check the transition at that row (log or sqrt of a negative number, 0 / 0); "
        "a missing observation wants `mask` or nan_is_missing=True.",
        ALL_DEAD: "a guide that sees the observation, annealing=ESSFloor(0.5), more particles, or "
        'check the likelihood\'s support; on_dead="return" keeps the run.',
    }[code]
    lines = [f"smcscale: {what}."]
    for site, found in culprits.items():
        lines.append(f'  first at: site "{site}", run {run + 1} of {num_runs}; {found}.')
    if not culprits:
        lines.append(f"  first at: run {run + 1} of {num_runs}.")
    lines.append(f"  try: {cure}")
    return "\n".join(lines)
