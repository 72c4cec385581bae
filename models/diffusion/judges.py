"""Two classifiers of digits that never saw the same image: one to steer with, one to judge by.

| name | what it is |
|---|---|
| `LogisticReward` | logistic regression, split A: `log p(label | x)`, with a gradient |
| `KernelJudge` | support vector machine with a Gaussian kernel, split B: a label |
| `load_judges(folder)`, `save_judges(folder, ...)` | arrays in safetensors, nothing pickled |

A sample that pleases the reward and not the judge has found a weakness of the reward, not a digit.
"""

import math
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from smcscale.models import parameters


class LogisticReward(eqx.Module):
    """Logistic regression.

    Attributes:
        weights: `(C, D)`.
        bias: `(C,)`.
    """

    weights: Float[Array, "C D"]
    bias: Float[Array, " C"]

    def __call__(self, x: Float[Array, " D"]) -> Float[Array, " C"]:
        """`log p(label | x)`, nats, for every label."""
        return jax.nn.log_softmax(self.weights @ x + self.bias)


class KernelJudge(eqx.Module):
    """A vote of support vector machines, one for each pair of classes.

    Attributes:
        support: `(S, D)`, support vectors.
        weights: `(P, S)`, of each pair's machine; positive votes for its first class.
        bias: `(P,)`.
        pairs: `(P, 2)` int32, classes of each pair.
        gamma: `()`, the kernel is `exp(-gamma |x - support|^2)`.
    """

    support: Float[Array, "S D"]
    weights: Float[Array, "P S"]
    bias: Float[Array, " P"]
    pairs: Int32[Array, "P 2"]
    gamma: Float[Array, ""]

    def __call__(self, x: Float[Array, " D"]) -> Int32[Array, ""]:
        """The class with the most votes, the lower one of equals."""
        kernel = jnp.exp(-self.gamma * jnp.sum((self.support - x) ** 2, axis=1))
        first = self.weights @ kernel + self.bias > 0
        winners = jnp.where(first, self.pairs[:, 0], self.pairs[:, 1])
        classes = (1 + math.isqrt(1 + 8 * len(self.pairs))) // 2
        votes = jnp.zeros(classes, jnp.int32).at[winners].add(1)
        return jnp.argmax(votes).astype(jnp.int32)


class Judges(NamedTuple):
    """The reward model and the judge."""

    reward: LogisticReward
    judge: KernelJudge


def save_judges(folder: str | Path, judges: Judges) -> None:
    """Write `model.safetensors` (float32); the folder is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": np.asarray(value)
        for part, module in judges._asdict().items()
        for name, value in vars(module).items()
    }
    parameters.save(folder / "model.safetensors", tensors, np.float32)


def load_judges(folder: str | Path) -> Judges:
    """What `save_judges` wrote.

    Raises:
        FileNotFoundError, ValueError: the file is missing, cut short or lacks an array.
    """
    tensors = parameters.load(Path(folder) / "model.safetensors")
    try:
        found = [
            kind(**{name: jnp.asarray(tensors[f"{part}.{name}"]) for name in kind.__annotations__})
            for part, kind in (("reward", LogisticReward), ("judge", KernelJudge))
        ]
    except KeyError as error:
        raise ValueError(
            f"smcscale: {folder} lacks the array {error}.\n  try: save_judges again."
        ) from error
    return Judges(*found)  # pyright: ignore[reportArgumentType]
