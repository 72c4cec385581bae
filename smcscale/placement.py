"""Particles over devices: one population whose arrays are cut along the particles.

    with jax.set_mesh(particle_mesh()):
        smc.run(key, data)

Transitions, potentials and noise of a particle are then computed where it lies; resampling gathers the weights of a
run on all devices and moves the states that it copies. Keys, kernels and evidence are those of one device, up to the
rounding of sums. Any mesh with an automatic axis named "particles" will do; its other axes are the program's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

#: the mesh axis that particles are cut along
AXIS = "particles"


def particle_mesh(devices: Any = None) -> Mesh:
    """A mesh of one axis, "particles", for `jax.set_mesh`.

    Args:
        devices: all of them when None.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def num_devices() -> int:
    """Devices that particles are cut over: 1 without a mesh in context that has the axis.

    Raises:
        ValueError: an explicit axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names:
        return 1
    if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[AXIS] != AxisType.Auto:
        raise ValueError(
            f'smcscale: the mesh axis "{AXIS}" must be automatic.\n'
            "  try: jax.set_mesh(smcscale.placement.particle_mesh())."
        )
    return mesh.shape[AXIS]


def check(numbers: Sequence[int]) -> None:
    """Refuse numbers of particles that the devices do not divide, before any work.

    Raises:
        ValueError: such a number, or an explicit axis.
    """
    count = num_devices()
    for number in numbers:
        if number % count:
            raise ValueError(
                f"smcscale: num_particles = {number} cannot be cut over {count} devices.\n"
                "  try: a multiple."
            )


def spread(tree: Any) -> Any:
    """Arrays `(R, N, ...)` cut along the particles over the mesh in context, if there is one."""
    count = num_devices()
    if count == 1:
        return tree

    def placed(x: Any) -> Any:
        if x.shape[1] % count:  # a probe of shapes; `check` has seen the numbers of a run
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, AXIS))

    return jax.tree.map(placed, tree)
