"""Remake the shipped masked model of text from a seed.

    python -m smcscale.models.diffusion.train_text --out FOLDER

Lines of `text.lines` without held-out openings.  The question is always shown; of the characters after
`=` each is masked with probability tau, drawn evenly for each line, and the loss is the surprise at the
masked ones times `1 / tau`, whose expectation bounds the surprise at all of them.

| name | what it is |
|---|---|
| `loss(network, tokens, key)` | that bound, of each line, one draw |
| `train(network, ...)` | Adam with a cosine, and the average of the parameters |
| `measured(network, key)` | what the card says of held-out lines |

Source: Sahoo et al. 2024 (arXiv 2406.07524, equation 10), with log-linear noise; Nie et al. 2025
(arXiv 2502.09992, equation 5) for a prompt that is never masked.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from smcscale.models.diffusion.fitting import fit
from smcscale.models.diffusion.reveal import Network
from smcscale.models.diffusion.text import (
    LENGTH,
    MASK,
    PROMPT,
    Shape,
    TextDenoiser,
    lines,
    load_text,
    right_steps,
    save_text,
)


def loss(network: Network, tokens: Int[Array, "B L"], key: PRNGKeyArray) -> Float[Array, " B"]:
    """Draws of the bound on `-log p(results | question)`, nats; their mean is unbiased.

    The levels are spread evenly over (0, 1), the lowest for the first line and so on: of lines in random
    order the mean has less variance; a single line's number says nothing.

    Args:
        network: its table must be normalized, as that of `TextDenoiser` is.
        tokens: `(B, L)`, whole lines.
        key: consumed.
    """
    shift, hide = jax.random.split(key)
    count = tokens.shape[0]
    tau = (jnp.arange(count) + jax.random.uniform(shift, (count,))) / count
    tau = jnp.maximum(tau, 1e-7)
    drawn = jax.random.uniform(hide, tokens.shape) < tau[:, None]
    hidden = drawn & (jnp.arange(LENGTH) >= PROMPT)
    log_probs = jax.vmap(network)(jnp.where(hidden, MASK, tokens), 1 - tau)
    surprise = -jnp.take_along_axis(log_probs, tokens[..., None], axis=2)[..., 0]
    return jnp.sum(jnp.where(hidden, surprise, 0.0), axis=1) / tau


def train(
    network: TextDenoiser,
    *,
    seed: int,
    steps: int,
    batch: int = 64,
    num_lines: int = 200_000,
    learning_rate: float = 2e-3,
    average: float = 0.995,
    log: Callable[..., None] = print,
) -> TextDenoiser:
    """Fit to training lines; returns the exponential average of the parameters.

    Args:
        network: first parameters.
        seed: of the lines and of everything drawn here.
        steps, batch, learning_rate, average: of Adam with a cosine, and of the average.
        num_lines: how many lines there are.
        log: told the loss now and then.
    """
    data = jnp.asarray(lines(seed, num_lines), jnp.int8)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    def batch_loss(network, key):
        which, noise = jax.random.split(key)
        rows = data[jax.random.randint(which, (batch,), 0, num_lines)]
        return jnp.mean(loss(network, rows.astype(jnp.int32), noise))

    return fit(
        network, batch_loss, optimizer, seed=seed, steps=steps, average=average, log=log, every=100
    )


def measured(
    network: Network, key: PRNGKeyArray, count: int = 4000
) -> dict[str, tuple[float, float]]:
    """The bound, and the share of right steps written from left to right; with standard errors.

    Args:
        network: of lines.
        key: consumed.
        count: how many held-out lines.
    """
    bound, write = jax.random.split(key)
    tokens = jnp.asarray(lines(77, count, "test"))

    @jax.jit
    def results(network, tokens, key):
        def show(tokens, row):
            place, key = row
            log_probs = jax.vmap(network, (0, None))(tokens, place / LENGTH)[:, place]
            drawn = jax.random.categorical(key, log_probs)
            return tokens.at[:, place].set(drawn.astype(tokens.dtype)), None

        start = jnp.where(jnp.arange(LENGTH) < PROMPT, tokens, MASK)
        rows = jnp.arange(PROMPT, LENGTH), jax.random.split(key, LENGTH - PROMPT)
        return jnp.mean(jax.vmap(right_steps)(jax.lax.scan(show, start, rows)[0]), axis=1)

    found = {
        "nats a held-out line": jax.jit(loss)(network, tokens, bound),
        "of the results are right from left to right": results(network, tokens, write),
    }
    return {k: (float(v.mean()), float(v.std() / count**0.5)) for k, v in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Train, write the folder, and say how good it is as it is stored."""
    parser = argparse.ArgumentParser(description="Remake the shipped model of text from a seed.")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args(argv)
    network = TextDenoiser(Shape(), jax.random.key(args.seed))
    save_text(args.out, train(network, seed=args.seed, steps=args.steps))
    for words, (mean, error) in measured(load_text(args.out), jax.random.key(1)).items():
        print(f"{mean:.4f} ± {error:.4f} {words}", flush=True)


if __name__ == "__main__":
    main()
