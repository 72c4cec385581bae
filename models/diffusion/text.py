"""The shipped masked model of text: lines of arithmetic that a function can check.

    3+4*2-5+8-6=7,4,9,7,1

A line is a digit, five steps, and after `=` what each step makes of the result before it, of which
only the last digit is written.  A line has 21 characters, and each place one meaning.  The order of
writing matters: a result is easy once the one before it is there, and results that are shown together
rarely agree.

    from smcscale.models.diffusion.masked import unmask
    from smcscale.models.diffusion.networks import PRETRAINED
    from smcscale.models.diffusion.reveal import even_levels, left_to_right

    network = load_text(PRETRAINED / "text")
    smc = SMC(ParticleFilter(unmask, store="last"), num_particles=64)
    smc.run(key, network, problem(encode("3+4*2-5+8-6=7,4,9,7,1")), even_levels(9),
            reveal=left_to_right)

| name | what it is |
|---|---|
| `encode(line)`, `decode(tokens)` | characters to tokens and back; a mask is `_` |
| `right_steps(tokens)` | which of the five steps are right, given the result before |
| `problem(tokens)`, `answer(tokens)` | a line with its results masked; its last digit |
| `lines(seed, count, split)` | random right lines, of training or held out |
| `TextDenoiser` | the network, a bidirectional transformer |
| `load_text(folder)`, `save_text(folder, network)` | its folder |

An opening is the first digit and the first two steps.  One of `ONE_IN` openings is held out: no line of
training begins with it, every line of the test does.  The network was trained with the question shown,
and knows nothing of lines without one.  It is not told the level: the best table does not depend on it,
only on the tokens.

Source: Sahoo et al. 2024 (arXiv 2406.07524); Ou et al. 2025 (arXiv 2406.03736, theorem 1) for
networks without a level.  Made by `train_text.py`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from smcscale.models import parameters

CHARACTERS = "0123456789+-*=,"
#: the token of a mask, one past the last character
MASK = len(CHARACTERS)
STEPS = 5
#: characters up to the `=`, and of a line
PROMPT = 2 * STEPS + 2
LENGTH = PROMPT + 2 * STEPS - 1
#: of so many openings one is held out of training
ONE_IN = 10
_PLUS, _MINUS, _TIMES, _EQUALS, _COMMA = (CHARACTERS.index(c) for c in "+-*=,")
#: operations 3, operands 1 to 9
_CHOICES = 27
_OPERATION = np.arange(1, PROMPT - 1, 2)
_RESULT = np.arange(PROMPT, LENGTH, 2)


# ---- lines


def encode(line: str) -> Int[np.ndarray, " L"]:
    """Tokens `(L,)` int32 of a text of any length; `_` is a mask.

    Raises:
        ValueError: for a character that is not in `CHARACTERS`.
    """
    unknown = sorted(set(line) - set(CHARACTERS) - {"_"})
    if unknown:
        raise ValueError(
            f"smcscale: `line` of encode has characters that the model does not know: {unknown}.\n"
            f"  try: those of {CHARACTERS!r}, and _ for a mask."
        )
    return np.array([MASK if c == "_" else CHARACTERS.index(c) for c in line], np.int32)


def decode(tokens: Any) -> str:
    """The text of tokens `(L,)`; a mask is `_`."""
    return "".join((CHARACTERS + "_")[int(token)] for token in np.asarray(tokens))


def right_steps(tokens: Int[Array, " L"] | Int[np.ndarray, " L"]) -> Bool[Array, " steps"]:
    """Which steps are right: the result is what the step makes of the one before, as it is written.

    A step with a mask or a misplaced character, its own or in the number before it, is wrong.

    Args:
        tokens: `(21,)`, one line.
    """
    tokens = jnp.asarray(tokens)
    digits = jnp.concatenate([tokens[:1], tokens[_RESULT]])
    operations, operands = tokens[_OPERATION], tokens[_OPERATION + 1]
    before, after = digits[:-1], digits[1:]
    made = jnp.select(
        [operations == _PLUS, operations == _MINUS, operations == _TIMES],
        [before + operands, before - operands, before * operands],
        -1,
    )
    known = (operations >= _PLUS) & (operations <= _TIMES)
    numbers = (before < 10) & (after < 10) & (operands > 0) & (operands < 10)
    marks = tokens[_RESULT - 1] == jnp.where(jnp.arange(STEPS) == 0, _EQUALS, _COMMA)
    return known & numbers & marks & (made % 10 == after)


def problem(tokens: Any) -> Int[np.ndarray, " L"]:
    """A line `(21,)` with all after `=` masked."""
    return np.where(np.arange(LENGTH) < PROMPT, np.asarray(tokens, np.int32), MASK)


def answer(tokens: Any) -> int | None:
    """The last digit of a line `(21,)`, None where another character stands there."""
    last = int(np.asarray(tokens)[-1])
    return last if last < 10 else None


def held_out(seed: int = 0) -> Bool[np.ndarray, "10 choices choices"]:
    """Which openings no line of training has, by first digit and first two steps.

    Args:
        seed: the shipped model was trained with 0.
    """
    count = 10 * _CHOICES**2
    chosen = np.random.default_rng(seed).permutation(count) < count // ONE_IN
    return chosen.reshape(10, _CHOICES, _CHOICES)


def lines(seed: int, count: int, split: str = "train") -> Int[np.ndarray, "count L"]:
    """Random right lines, tokens `(count, 21)` int32: openings of the split and later steps alike.

    Args:
        seed: of the draws; the two splits share no line, whatever it is.
        count: how many.
        split: "train" or "test", the held-out openings.
    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'smcscale: unknown `split` {split!r} of lines.\n  try: "train", "test".')
    rng = np.random.default_rng([seed, split == "test"])
    openings = np.argwhere(held_out() if split == "test" else ~held_out())
    opening = openings[rng.integers(len(openings), size=count)]
    steps = np.concatenate([opening[:, 1:], rng.integers(_CHOICES, size=(count, STEPS - 2))], 1)
    operations, operands = _PLUS + steps // 9, 1 + steps % 9
    tokens = np.full((count, LENGTH), _COMMA, np.int32)
    tokens[:, 0], tokens[:, PROMPT - 1] = opening[:, 0], _EQUALS
    tokens[:, _OPERATION], tokens[:, _OPERATION + 1] = operations, operands
    digit = opening[:, 0]
    for k, place in enumerate(_RESULT):
        made = [digit + operands[:, k], digit - operands[:, k], digit * operands[:, k]]
        digit = np.choose(steps[:, k] // 9, made) % 10
        tokens[:, place] = digit
    return tokens


# ---- the network


@dataclass(frozen=True)
class Shape:
    """Sizes of a `TextDenoiser`.

    Attributes:
        width: of the hidden states.
        num_layers: layers.
        num_heads: of attention; they divide the width.
        mlp_size: of the layers' hidden units.
    """

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    mlp_size: int = 256


class Layer(eqx.Module):
    """Attention over the whole line, then two linear maps, each added to what comes in."""

    attention_norm: eqx.nn.LayerNorm
    gather: eqx.nn.Linear
    spread: eqx.nn.Linear
    mlp_norm: eqx.nn.LayerNorm
    enter: eqx.nn.Linear
    leave: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, shape: Shape, key: PRNGKeyArray):
        gather, spread, enter, leave = jax.random.split(key, 4)
        self.num_heads = shape.num_heads
        self.attention_norm = eqx.nn.LayerNorm(shape.width)
        self.gather = eqx.nn.Linear(shape.width, 3 * shape.width, key=gather)
        self.spread = eqx.nn.Linear(shape.width, shape.width, key=spread)
        self.mlp_norm = eqx.nn.LayerNorm(shape.width)
        self.enter = eqx.nn.Linear(shape.width, shape.mlp_size, key=enter)
        self.leave = eqx.nn.Linear(shape.mlp_size, shape.width, key=leave)

    def __call__(self, hidden: Float[Array, "L D"]) -> Float[Array, "L D"]:
        x = jax.vmap(self.gather)(jax.vmap(self.attention_norm)(hidden))
        queries, keys, values = x.reshape(len(x), 3, self.num_heads, -1).swapaxes(0, 1)
        attended = jax.nn.dot_product_attention(queries, keys, values)
        hidden = hidden + jax.vmap(self.spread)(attended.reshape(hidden.shape))
        x = jax.vmap(self.enter)(jax.vmap(self.mlp_norm)(hidden))
        return hidden + jax.vmap(self.leave)(jax.nn.gelu(x))


class TextDenoiser(eqx.Module):
    """A `Network` of `unmask` and `write`: what stands behind the masks of one line.

    Args:
        shape: the sizes.
        key: of the first parameters.
    """

    shape: Shape = eqx.field(static=True)
    token: Float[Array, "symbols D"]
    place: Float[Array, "L D"]
    layers: list[Layer]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, shape: Shape, key: PRNGKeyArray):
        token, place, head, *layers = jax.random.split(key, 3 + shape.num_layers)
        self.shape = shape
        self.token = 0.3 * jax.random.normal(token, (MASK + 1, shape.width))
        self.place = 0.3 * jax.random.normal(place, (LENGTH, shape.width))
        self.layers = [Layer(shape, key) for key in layers]
        self.norm = eqx.nn.LayerNorm(shape.width)
        self.head = eqx.nn.Linear(shape.width, MASK, key=head)

    def __call__(self, tokens: Int[Array, " L"], level: Any = None) -> Float[Array, "L V"]:
        """Log-probabilities `(21, 15)` of every place given the tokens shown.

        Args:
            tokens: `(21,)`, in [0, 15]; 15 is the mask.
            level: not used.
        """
        hidden = self.token[tokens] + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        return jax.nn.log_softmax(jax.vmap(self.head)(jax.vmap(self.norm)(hidden)))


def save_text(folder: str | Path, network: TextDenoiser) -> None:
    """Write `config.json` and `model.safetensors` (bfloat16); the folder is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "text_denoiser", "characters": CHARACTERS, **asdict(network.shape)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named, _ = _named(network)
    parameters.save(folder / "model.safetensors", named)


def load_text(folder: str | Path) -> TextDenoiser:
    """What `save_text` wrote, in float32.

    Args:
        folder: with `config.json` and `model.safetensors`.
    Raises:
        FileNotFoundError, ValueError: a file is missing, cut short or of another kind.
    """
    folder = Path(folder)
    config = parameters.read_json(folder / "config.json")
    kind, characters = config.get("model_type"), config.get("characters")
    if kind != "text_denoiser" or characters != CHARACTERS:
        raise ValueError(
            f"smcscale: {folder / 'config.json'} is of model_type {kind!r} with the characters "
            f"{characters!r}.\n  try: a folder of save_text; `unmask` takes any other network "
            "as a callable."
        )
    if lacking := sorted(asdict(Shape()).keys() - config.keys()):
        raise ValueError(f"smcscale: {folder / 'config.json'} lacks {', '.join(lacking)}.")
    shape = Shape(**{name: int(config[name]) for name in asdict(Shape())})
    if shape.width % shape.num_heads:
        raise ValueError(
            f"smcscale: {folder / 'config.json'} divides a width of {shape.width} among "
            f"{shape.num_heads} heads."
        )
    skeleton = eqx.filter_eval_shape(TextDenoiser, shape, jax.random.key(0))
    expected, structure = _named(skeleton)
    tensors = parameters.load(folder / "model.safetensors")
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in expected.items()}:
        raise ValueError(
            f"smcscale: {folder / 'model.safetensors'} does not hold the tensors that its "
            f"config.json describes ({len(tensors)} there, {len(expected)} expected).\n"
            "  try: save it again."
        )
    return jax.tree.unflatten(structure, [jnp.asarray(tensors[name]) for name in expected])


def _named(network: TextDenoiser) -> tuple[dict[str, Any], Any]:
    """Parameters by the path that leads to them, in the order of the tree, and the tree."""
    leaves, structure = jax.tree.flatten_with_path(network)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), structure
