"""Remake the shipped diffusion models from a seed.

    python -m smcscale.models.diffusion.train --out FOLDER [--only denoiser flow judges]

The data are the 1797 handwritten digits inside scikit-learn (8 x 8, 17 grey levels), scaled to
[-1, 1]. `denoiser` predicts the data on variance-preserving levels (`vp_linear`), `flow` the velocity on
straight lines; both know the class of 85% of what they see, so that one network makes digits of a
class and of any. `judges` are a logistic regression on one half of the digits (the reward) and
support vector machines on the other half (the judge).

Source: Salimans & Ho 2022 (weights SNR + 1); Hang et al. 2023, "Efficient diffusion
training via min-SNR weighting"; Ho & Salimans 2022 (label dropout).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from smcscale.models.diffusion import schedules
from smcscale.models.diffusion.fitting import fit
from smcscale.models.diffusion.judges import Judges, KernelJudge, LogisticReward, save_judges
from smcscale.models.diffusion.networks import ResidualMLP, Shape, save_denoiser

LABEL_DROPOUT = 0.15
#: weights of the loss are the signal-to-noise ratio plus 1, cut here
LARGEST_WEIGHT = 5.0


def digits(half: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 64)` float32 in [-1, 1] and labels `(n,)` int32.

    Args:
        half: "A" or "B", halves that share no image; None: all.
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = (found.data / 8.0 - 1.0).astype(np.float32)
    labels = found.target.astype(np.int32)
    if half is None:
        return images, labels
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[: len(order) // 2] if half == "A" else order[len(order) // 2 :]
    return images[chosen], labels[chosen]


def x0_loss(predicted: Array, data: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """Squared errors of the data, weighted by the signal-to-noise ratio plus 1, up to a limit."""
    weight = jnp.minimum((alpha / sigma) ** 2 + 1, LARGEST_WEIGHT)
    return weight * jnp.mean((predicted - data) ** 2, axis=-1, keepdims=True)


def velocity_loss(predicted: Array, data: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """Squared errors of `eps - x_0`, the velocity of a straight line."""
    return jnp.mean((predicted - (noise - data)) ** 2, axis=-1, keepdims=True)


def train(
    network: ResidualMLP,
    schedule: schedules.Schedule,
    loss: Callable[..., Array],
    *,
    seed: int,
    steps: int,
    batch: int = 256,
    learning_rate: float = 2e-3,
    average: float = 0.999,
    log: Callable[..., None] = print,
) -> ResidualMLP:
    """Fit a denoiser to all digits; returns the exponential average of its parameters.

    Args:
        network: first parameters.
        schedule: its levels above 0 are drawn evenly.
        loss: `(predicted, data, noise, alpha, sigma) -> (batch, 1)`.
        seed: of everything drawn here.
        steps, batch, learning_rate, average: of Adam with a cosine, and of the average.
        log: told the loss now and then.
    """
    images, labels = (jnp.asarray(a) for a in digits())
    graph, weights = nnx.split(network)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def batch_loss(weights, key):
        which, level, noise, dropped = jax.random.split(key, 4)
        row = jax.random.randint(which, (batch,), 0, len(labels))
        at = schedule.level(jax.random.randint(level, (batch, 1), 1, schedule.num_steps + 1))
        eps = jax.random.normal(noise, (batch, images.shape[1]))
        known = jax.random.uniform(dropped, (batch,)) >= LABEL_DROPOUT
        x = at.alpha * images[row] + at.sigma * eps
        predicted = nnx.merge(graph, weights)(x, at.tau[:, 0], jnp.where(known, labels[row], -1))
        return jnp.mean(loss(predicted, images[row], eps, at.alpha, at.sigma))

    weights = fit(weights, batch_loss, optimizer, seed=seed, steps=steps, average=average, log=log)
    return nnx.merge(graph, weights)


def fit_judges() -> Judges:
    """The reward model on half A, the judge on half B."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    images, labels = digits("A")
    line = LogisticRegression(C=0.3, max_iter=2000).fit(images, labels)
    reward = LogisticReward(
        jnp.asarray(line.coef_, jnp.float32), jnp.asarray(line.intercept_, jnp.float32)
    )
    images, labels = digits("B")
    machines = SVC(C=10.0, gamma="scale").fit(images, labels)
    ends = np.concatenate([[0], np.cumsum(machines.n_support_)])
    pairs = [(i, j) for i in range(10) for j in range(i + 1, 10)]
    weights = np.zeros((len(pairs), ends[-1]))
    for row, (i, j) in enumerate(pairs):  # the machine of a pair knows the two classes' vectors
        weights[row, ends[i] : ends[i + 1]] = machines.dual_coef_[j - 1, ends[i] : ends[i + 1]]
        weights[row, ends[j] : ends[j + 1]] = machines.dual_coef_[i, ends[j] : ends[j + 1]]
    gamma = 1 / (images.shape[1] * images.var())
    judge = KernelJudge(
        jnp.asarray(machines.support_vectors_, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(machines.intercept_, jnp.float32),
        jnp.asarray(pairs, jnp.int32),
        jnp.asarray(gamma, jnp.float32),
    )
    return Judges(reward, judge)


def main(argv: list[str] | None = None) -> None:
    """Train what is asked for and write the folders."""
    parser = argparse.ArgumentParser(description="Remake the shipped diffusion models from a seed.")
    parser.add_argument("--out", required=True, help="folder for the model folders")
    parser.add_argument(
        "--only", nargs="+", choices=["denoiser", "flow", "judges"],
        default=["denoiser", "flow", "judges"],
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000, help="of each network")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if "denoiser" in args.only:
        network = ResidualMLP(Shape(), nnx.Rngs(args.seed))
        network = train(
            network, schedules.vp_linear(1000), x0_loss, seed=args.seed, steps=args.steps
        )
        save_denoiser(out / "digits", network, "x0", "vp_linear", 1.0)
    if "flow" in args.only:
        network = ResidualMLP(Shape(), nnx.Rngs(args.seed + 1))
        network = train(
            network, schedules.rectified_flow(1000), velocity_loss, seed=args.seed + 1,
            steps=args.steps,
        )  # fmt: skip
        save_denoiser(out / "digits-flow", network, "velocity", "rectified_flow", None)
    if "judges" in args.only:
        save_judges(out / "digits-judges", fit_judges())


if __name__ == "__main__":
    main()
