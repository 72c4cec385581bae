"""Images from coarse to fine: `draw_scales`, a program whose steps of time are scales.

An image is a sum of residuals on grids of 1x1, 2x2, 4x4, ... tokens.  All tokens of a scale are drawn
at once, independently given the coarser ones (next-scale prediction, VAR), so that K scales cost K
network calls.  What has been drawn so far already is an image, and that is what a reward reads:

    model = load_scales(PRETRAINED / "digits-scales")
    smc = SMC(ParticleFilter(draw_scales, store="last"), num_particles=[16, 8, 8, 4])
    smc.run(key, model, model.codec, Steering(reward, strength=3.0), label=8)
    smc.result.final["image"], smc.log_evidence

| name | what it is |
|---|---|
| `draw_scales` | the program |
| `PatchCodec` | tokens of an image and back: one codebook of residual patches a scale |
| `Diversity` | early scales: a look-ahead that spreads the population over clusters of images |

The shipped network, its folder and `load_scales` are in `scale_networks.py`.

Tokens lie in one flat vector, coarse scales first; those not drawn yet hold V, which decodes to
nothing.  With p the law of the unsteered program the target is `p(x) exp(lambda r(x))`, x the image of
all tokens, for every rule of `potentials.py` and every trigger, tilt or number of particles.

TTS-VAR in this engine: fewer particles at finer scales are the schedule `num_particles` of `SMC`, a
row for each scale, whose joints resample with the filter's own kernel; its late selections are
potentials; its early ones are a `Diversity`.  A resampling kernel sees weights alone, so what chooses
by the look of an image is a look-ahead, the one tilt that sees states: the engine divides it out.

| | here | as published |
|---|---|---|
| early scales | `Diversity(sizes)`: clusters count alike, the engine keeps their weights | `Diversity(sizes, corrected=False)` |
| late scales | any rule, always corrected at the end | `Steering(..., rule=product, scored=late)` |
| in between | `trigger=ess_below(0.5)` | `trigger=never`: it selects only where N falls |
| at the end | weighted draws | the largest `final["reward"]` |

The published early selection targets no law, and the evidence is refused.

Source: Tian et al. 2024, "Visual autoregressive modeling" (arXiv 2404.02905); Chen et al. 2025,
"TTS-VAR" (arXiv 2507.18537).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32
from numpyro.contrib.control_flow import scan

from smcscale.models.diffusion.potentials import Seen, Steering, nothing_seen
from smcscale.models.diffusion.reveal import blank, transition
from smcscale.program.spend import spend
from smcscale.types import Input, LogWeights, States, Time


class Network(Protocol):
    """A model of the tokens of a scale given those of coarser ones; any callable."""

    def __call__(
        self, tokens: Int[Array, " L"], scale: Int[Array, ""], label: Int[Array, ""]
    ) -> Float[Array, "L V"]:
        """Logits of every position; only those of the scale are used. Label -1: any class."""
        ...


class Codec(Protocol):
    """What tokens look like.

    Attributes:
        counts: tokens of each scale, coarse ones first.
        vocabulary: V.
    """

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def vocabulary(self) -> int: ...

    def decode(self, tokens: Int[Array, " L"]) -> Float[Array, "..."]:
        """The image; tokens equal to V add nothing."""
        ...


class Canvas(NamedTuple):
    """What one particle carries.

    Attributes:
        tokens: `(L,)`, V where not drawn yet.
        image: of these tokens.
        seen: rewards so far, None without steering.
    """

    tokens: Int[Array, "..."]
    image: Float[Array, "..."]
    seen: Seen | None


class Scale(NamedTuple):
    """One row of the loop.

    Attributes:
        number: `()` int32, 0 for the coarsest.
        positions: `(L,)` bool, the tokens of this scale.
        last: `()` bool.
    """

    number: Int32[Array, "..."]
    positions: Bool[Array, "..."]
    last: Bool[Array, "..."]


def draw_scales(
    network: Network,
    codec: Codec,
    steering: Steering | None = None,
    *,
    label: int | Int[Array, ""] | None = None,
) -> None:
    """The program: draw all tokens of a scale, look at the image so far, weigh; K times.

    Args:
        network: `(tokens, scale, label) -> (L, V)` logits.
        codec: the number of tokens of each scale, and what they look like.
        steering: a reward of images; `scored` and `tempering` count the scales that are drawn, 1 to
            K. None samples the model.
        label: class to make; None: any.
    Sites:
        tokens: `(L,)` after the scale; image, reward: of them (deterministic), the reward that of the
            newest scored scale; potential: the factor.
    Raises:
        ValueError: for a `steering` that guesses, or a codec without scales.
    """
    if not codec.counts or min(codec.counts) < 1:
        raise ValueError(
            f"smcscale: `counts` of the codec must list the tokens of each scale, got "
            f"{codec.counts}.\n  try: (1, 4, 16, 64)."
        )
    if steering is not None and (steering.num_guesses or steering.value is not None):
        raise ValueError(
            "smcscale: `steering` of draw_scales reads the image so far; it has no noise level to "
            "guess from.\n  try: Steering(reward) without `num_guesses` and `value`."
        )
    told = jnp.asarray(-1 if label is None else label, jnp.int32)
    num_scales = len(codec.counts)
    scale_of = np.repeat(np.arange(num_scales), codec.counts)

    def step(canvas: Canvas, scale: Scale) -> tuple[Canvas, None]:
        logits = network(canvas.tokens, scale.number, told)
        if logits.shape != (len(scale_of), codec.vocabulary):
            raise ValueError(
                f"smcscale: the network gives logits of shape {logits.shape}, the codec has "
                f"{len(scale_of)} tokens of {codec.vocabulary} kinds.\n  try: a network made for it."
            )
        log_probs = jax.nn.log_softmax(logits)
        law = transition(log_probs, canvas.tokens, scale.positions.astype(log_probs.dtype))
        tokens: Any = numpyro.sample("tokens", law)
        image = codec.decode(tokens)
        numpyro.deterministic("image", image)
        spend(denoiser_calls=1)
        seen = canvas.seen
        if seen is not None and steering is not None:
            made = scale.number + 1
            seen, log_potential = steering.weigh(
                seen, partial(steering.reward, image), made, scale.last
            )
            numpyro.factor("potential", log_potential)
            numpyro.deterministic("reward", seen.last)
            spend(reward_calls=steering.calls(made, scale.last))
        return Canvas(tokens, image, seen), None

    number = jnp.arange(num_scales, dtype=jnp.int32)
    rows = Scale(
        number, jnp.asarray(scale_of == np.arange(num_scales)[:, None]), number == num_scales - 1
    )
    nothing = blank(len(scale_of), codec.vocabulary)
    opening = Canvas(nothing, codec.decode(nothing), None if steering is None else nothing_seen())
    scan(step, opening, rows)


# ---- tokens and images


class PatchCodec(eqx.Module):
    """Residual vector quantization over scales: a token of scale k is a patch of the image.

    On a grid of s x s tokens a patch has `size / s` pixels a side: the first token chooses a whole
    image, later ones correct ever smaller patches of what the coarser scales left over.

    Attributes:
        codebooks: one of each scale, `(V, pixels)`, pixels those of a patch, row by row.
        size: pixels of a side.
    """

    codebooks: tuple[Float[Array, "..."], ...]
    size: int = eqx.field(static=True)

    def __check_init__(self):
        shapes = [book.shape for book in self.codebooks]
        sides = [round(shape[-1] ** 0.5) for shape in shapes]
        if (
            not shapes
            or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes)
            or any(side**2 != shape[1] for side, shape in zip(sides, shapes, strict=True))
            or any(self.size % side for side in sides)
        ):
            raise ValueError(
                f"smcscale: `codebooks` of a PatchCodec have shapes {shapes} for images of "
                f"{self.size} x {self.size}.\n"
                "  try: (V, side * side) for each scale, one V, sides that divide the image's."
            )

    @property
    def vocabulary(self) -> int:
        """V, the same at every scale."""
        return self.codebooks[0].shape[0]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(self.size**2 // book.shape[1] for book in self.codebooks)

    def decode(self, tokens: Int[Array, " L"]) -> Float[Array, " D"]:
        """The image `(size * size,)` in [-1, 1]; tokens equal to V add nothing."""
        image = jnp.zeros(self.size**2, self.codebooks[0].dtype)
        start = 0
        for book, count in zip(self.codebooks, self.counts, strict=True):
            entries = jnp.concatenate([book, jnp.zeros_like(book[:1])])
            image = image + _joined(entries[tokens[start : start + count]])
            start += count
        return jnp.clip(image, -1, 1)

    def encode(self, image: Float[Array, " D"]) -> Int32[Array, " L"]:
        """Tokens `(L,)`, scale by scale the nearest patches of what is left."""
        found = []
        for book, count in zip(self.codebooks, self.counts, strict=True):
            tokens, image = quantized(image, book, count)
            found.append(tokens)
        return jnp.concatenate(found)


def quantized(
    image: Float[Array, " D"], book: Float[Array, "V pixels"], count: int
) -> tuple[Int32[Array, " count"], Float[Array, " D"]]:
    """Tokens of one scale, the nearest patches, and what they leave of the image."""
    patches = patches_of(image, count)
    nearest = jnp.argmin(jnp.sum((patches[:, None] - book) ** 2, axis=-1), axis=1)
    return nearest.astype(jnp.int32), image - _joined(book[nearest])


def patches_of(image: Float[Array, " D"], count: int) -> Float[Array, "count pixels"]:
    """An image cut into a square grid of patches."""
    grid, size = round(count**0.5), round(image.size**0.5)
    side = size // grid
    return image.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(count, side * side)


def _joined(patches: Float[Array, "count pixels"]) -> Float[Array, " D"]:
    """The image of a square grid of patches."""
    grid, side = (round(n**0.5) for n in patches.shape)
    return patches.reshape(grid, grid, side, side).swapaxes(1, 2).reshape(-1)


# ---- early scales: a population of many kinds


def _image_of(canvas: Canvas) -> Float[Array, " F"]:
    return canvas.image.reshape(-1)


class Diversity(eqx.Module):
    """Look-ahead: clusters of images, equally many offspring expected of each.

    The population is cut into clusters by k-means; a particle is resampled with its share of its
    cluster, and the engine leaves it the weight of the cluster. Joined to a schedule that falls to
    as many particles as there are clusters, each has one offspring on average.

    Attributes:
        sizes: clusters before each row, 0 for none, as before rows beyond the last entry; the first
            entry is never used (nothing is drawn).
        corrected: False keeps the member nearest each centroid and drops the weights, as
            published: `bias = "no target"`. With systematic resampling to as many particles as there
            are clusters each kept one is taken exactly once.
        features: `(canvas) -> (F,)`, what is compared: pixels unless a better eye is given.
        iterations: of Lloyd's algorithm, from a farthest-point start.

    Args (of the call):
        log_weights: `(N,)`, unnormalised, nats.
        states: `Canvas`, leaves `(N, ...)`.
        input: the next row; not used.
        time: its index.
    Returns:
        log_weights: `(N,)`, unnormalised; the dead stay dead.
    Properties: evidence unbiased for any features; with `corrected=False` there is none.
    Source: Chen et al. 2025 (arXiv 2507.18537), section 3.2, for `corrected=False`; the published
        features are principal components of DINOv2 patches.
    """

    sizes: tuple[int, ...] = eqx.field(static=True)
    corrected: bool = eqx.field(static=True, default=True)
    features: Callable[..., Array] = _image_of
    iterations: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if not self.sizes or min(self.sizes) < 0:
            raise ValueError(
                f"smcscale: `sizes` of Diversity must be a number of clusters for each row, got "
                f"{self.sizes}.\n  try: (0, 6, 4, 0): none before the first and the last scale."
            )

    @property
    def bias(self) -> str | None:
        """None, or "no target" without the correction."""
        return None if self.corrected else "no target"

    def __call__(
        self, log_weights: LogWeights, states: States, input: Input, time: Time
    ) -> LogWeights:
        """Log-weights `(N,)`; see the class."""
        alive = log_weights > -jnp.inf
        wanted = jnp.asarray(self.sizes).at[time].get(mode="fill", fill_value=0)
        points = jax.vmap(self.features)(states)
        member, distance = clusters(points, alive, wanted, self.iterations)
        each = jnp.arange(alive.size)
        inside = alive & (member == each[:, None])  # (cluster, particle)
        if self.corrected:
            mass = jax.nn.logsumexp(jnp.where(inside, log_weights, -jnp.inf), axis=1)
            tilted = log_weights - jnp.where(alive, mass[member], 0)
        else:
            nearest = jnp.argmin(jnp.where(inside, distance, jnp.inf), axis=1)
            tilted = jnp.where(alive & (nearest[member] == each), 0.0, -jnp.inf)
        return jnp.where(wanted > 0, tilted.astype(log_weights.dtype), log_weights)


def clusters(
    points: Float[Array, "N F"], alive: Bool[Array, " N"], wanted: Int[Array, ""], iterations: int
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """k-means of the living points, from a farthest-point start.

    Args:
        points: `(N, F)`.
        alive: `(N,)`, others neither start a cluster nor move a centroid.
        wanted: number of clusters; may be traced, and above the number of points.
        iterations: of Lloyd's algorithm.
    Returns:
        cluster `(N,)` of each point, below `wanted`, and its squared distance to the centroid.
    """
    number = points.shape[0]
    active = jnp.arange(number) < jnp.clip(wanted, 1, jnp.maximum(jnp.sum(alive), 1))
    mean = jnp.mean(points, axis=0, where=alive[:, None])

    def farther(gap: Array, _: None) -> tuple[Array, Array]:
        next = jnp.argmax(jnp.where(alive, gap, -jnp.inf))
        return jnp.minimum(gap, jnp.sum((points - points[next]) ** 2, axis=1)), next

    first = jnp.argmax(jnp.where(alive, jnp.sum((points - mean) ** 2, axis=1), -jnp.inf))
    gap = jnp.sum((points - points[first]) ** 2, axis=1)
    _, rest = lax.scan(farther, gap, None, length=number - 1)
    centers = points[jnp.concatenate([first[None], rest])]

    def distances(centers: Array) -> Array:
        squares = jnp.sum((points[:, None] - centers) ** 2, axis=-1)
        return jnp.where(active, squares, jnp.inf)

    def lloyd(_: Any, centers: Array) -> Array:
        member = jnp.argmin(distances(centers), axis=1)
        weight = (member == jnp.arange(number)[:, None]) & alive
        count = jnp.sum(weight, axis=1, keepdims=True)
        return jnp.where(count > 0, weight @ points / jnp.maximum(count, 1), centers)

    found = distances(lax.fori_loop(0, iterations, lloyd, centers))
    return jnp.argmin(found, axis=1), jnp.min(found, axis=1)
