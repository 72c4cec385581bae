"""Remake the shipped next-scale model of digits from a seed.

    python -m smcscale.models.diffusion.train_scales --out FOLDER

The codec is fitted first, by k-means of what the coarser scales leave over; then a `ScaleMLP` learns
the tokens of each scale from the image of the coarser ones, and from the class of 85% of what it sees.
Data: the digits of `train.py`.

Source: Tian et al. 2024 (arXiv 2404.02905), section 3; Ho & Salimans 2022 (label dropout).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int

from smcscale.models.diffusion.autoregressive import PatchCodec, patches_of, quantized
from smcscale.models.diffusion.fitting import fit
from smcscale.models.diffusion.scale_networks import ScaleMLP, Shape, save_scales
from smcscale.models.diffusion.train import LABEL_DROPOUT, digits


def fit_codec(images: np.ndarray, shape: Shape, seed: int) -> PatchCodec:
    """Codebooks by k-means, scale by scale, of the patches of what is left over.

    Args:
        images: `(n, size)` in [-1, 1].
        shape: its `counts` and `vocabulary`.
        seed: of k-means.
    """
    from sklearn.cluster import KMeans

    left, books = jnp.asarray(images), []
    for count in shape.counts:
        patches = np.concatenate(jax.vmap(partial(patches_of, count=count))(left))
        means = KMeans(shape.vocabulary, n_init=3, random_state=seed).fit(patches)  # pyright: ignore[reportArgumentType]
        # as stored, so that the tokens of the data are those of the shipped codec
        book = jnp.asarray(means.cluster_centers_, jnp.bfloat16).astype(jnp.float32)
        _, left = jax.jit(jax.vmap(partial(quantized, book=book, count=count)))(left)
        books.append(book)
    return PatchCodec(tuple(books), round(shape.size**0.5))


def inputs_of(codec: PatchCodec, tokens: Int[Array, " L"]) -> Array:
    """The images `(K, size)` that the network is shown before each scale."""
    first = np.repeat(np.arange(len(codec.counts)), codec.counts)
    scales = np.arange(len(codec.counts))
    known = jnp.where(first < scales[:, None], tokens, codec.vocabulary)
    return jax.vmap(codec.decode)(known)


def train(
    network: ScaleMLP,
    codec: PatchCodec,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    steps: int,
    batch: int = 128,
    learning_rate: float = 2e-3,
    decay: float = 0.05,
    average: float = 0.998,
    log: Callable[..., None] = print,
) -> ScaleMLP:
    """Fit a network to the tokens of images; returns the exponential average of its parameters.

    Args:
        network: first parameters.
        codec: that makes the tokens.
        images, labels: the data.
        seed: of everything drawn here.
        steps, batch, learning_rate, decay, average: of AdamW with a cosine, and of the average.
        log: told the loss, nats an image, now and then.
    """
    tokens = jax.jit(jax.vmap(codec.encode))(jnp.asarray(images))
    shown = jax.jit(jax.vmap(lambda t: inputs_of(codec, t)))(tokens)
    known_labels, counts = jnp.asarray(labels), codec.counts
    edges = np.concatenate([[0], np.cumsum(counts)])
    graph, weights = nnx.split(network)
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=decay)

    def batch_loss(weights: Any, key: Array) -> Array:
        which, dropped = jax.random.split(key)
        row = jax.random.randint(which, (batch,), 0, len(tokens))
        known = jax.random.uniform(dropped, (batch,)) >= LABEL_DROPOUT
        label = jnp.where(known, known_labels[row], -1)
        model, loss = nnx.merge(graph, weights), jnp.zeros(())
        for k in range(len(counts)):
            inside = slice(edges[k], edges[k + 1])
            logits = model(shown[row, k], jnp.full(batch, k), label)[:, inside]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[row, inside])
            loss += jnp.mean(jnp.sum(losses, axis=1))
        return loss

    weights = fit(
        weights, batch_loss, optimizer, seed=seed, steps=steps, average=average, log=log, every=250
    )
    return nnx.merge(graph, weights)


def main(argv: list[str] | None = None) -> None:
    """Train and write the folder `digits-scales`."""
    parser = argparse.ArgumentParser(description="Remake the shipped next-scale model of digits.")
    parser.add_argument("--out", required=True, help="folder for the model folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args(argv)
    images, labels = digits()
    shape = Shape()
    codec = fit_codec(images, shape, args.seed)
    again = np.asarray(jax.jit(jax.vmap(lambda x: codec.decode(codec.encode(x))))(images))
    print(f"codec: root mean squared error {np.sqrt(np.mean((again - images) ** 2)):.4f}")
    network = ScaleMLP(shape, nnx.Rngs(args.seed))
    network = train(network, codec, images, labels, seed=args.seed, steps=args.steps)
    save_scales(Path(args.out) / "digits-scales", network, codec)


if __name__ == "__main__":
    main()
