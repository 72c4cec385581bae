"""A bed of `reason` with an exact checker: Countdown, operations on numbers until the target is reached.

    solvable(numbers, target)        how many texts reach the target
    check(text, numbers, target)     whether a text is a right solution: the exact checker

A text is operations on what is left, its reward that the target is reached, its answer the first operation;
exact by search.  Under `beds.EXACT` the evidence is the probability that the model solves the problem in one
text.  Scores on the way are a guess.  Read `beds.py` first, for `Bed`.

Source: Gandhi et al. 2024, "Stream of Search" (arXiv 2404.03683), for Countdown as a task of language models;
texts there use every number, here as in the television game they need not.
"""

import functools
import itertools
import re
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from smcscale.models.reasoning.beds import Bed
from smcscale.models.reasoning.known_model import KnownModel
from smcscale.models.reasoning.language_model import TextState
from smcscale.models.reasoning.rewards import RewardFunction

#: results beyond are not written, so that products fit into int32
LARGEST = 9999
SIGNS = "+-*/"
_LINE = re.compile(r"(\d{1,9}) ([-+*/]) (\d{1,9}) = (\d{1,9})")


def operations(size: int) -> list[tuple[int, int, str]]:
    """What each token of a Countdown with `size` numbers does: two places and a sign.

    The result takes the first place, the second is empty from then on.  The larger number comes
    first in differences and quotients.  The token after all these ends the text.
    """
    return [(i, j, s) for i, j in itertools.combinations(range(size), 2) for s in SIGNS]


def applied(first: int, second: int, sign: str) -> int | None:
    """The result of an operation, None where there is none: it must be whole and in [1, LARGEST]."""
    large, small = max(first, second), min(first, second)
    if sign == "/":
        return large // small if large % small == 0 else None
    result = {"+": large + small, "-": large - small, "*": large * small}[sign]
    return result if 1 <= result <= LARGEST else None


class CountdownLaw(eqx.Module):
    """Law of the next operation: any that is possible with what is left, all alike.

    The text ends, surely, when the target is there or nothing is possible.

    Attributes:
        numbers: `(n,)` to begin with.
        target: wanted.
    """

    numbers: Int32[Array, " n"]
    target: Int32[Array, ""]

    def __call__(self, tokens: Int32[Array, " C"], length: Int32[Array, ""]) -> Float[Array, " V"]:
        """Log-probabilities `(V,)`: the operations, then the end."""
        left, there = self.left(tokens, length)
        _, possible = _results(left, there)
        over = jnp.any(there & (left == self.target)) | ~jnp.any(possible)
        chosen = jnp.append(possible & ~over, over)
        return jnp.where(chosen, -jnp.log(jnp.maximum(jnp.sum(chosen), 1.0)), -jnp.inf)

    def left(
        self, tokens: Int32[Array, " C"], length: Int32[Array, ""]
    ) -> tuple[Int32[Array, " n"], Bool[Array, " n"]]:
        """The numbers at all places after a text, and which places are not empty."""
        firsts, seconds, _ = _columns(self.numbers.shape[0])

        def step(carry, xs):
            left, there = carry
            place, token = xs
            acts = (place < length) & (token < len(firsts))
            safe = jnp.where(acts, token, 0)
            results, _ = _results(left, there)
            after = left.at[firsts[safe]].set(results[safe]), there.at[seconds[safe]].set(False)
            return jax.tree.map(lambda a, b: jnp.where(acts, a, b), after, carry), None

        start = (self.numbers, jnp.ones(self.numbers.shape, bool))
        (left, there), _ = jax.lax.scan(step, start, (jnp.arange(tokens.shape[0]), tokens))
        return left, there


class Nearness(eqx.Module):
    """Score of a Countdown text: 1 with the target, 0 at an end without, else how near it is.

    Attributes:
        law: knows what is left.
        scale: a distance that halves the score.
    """

    law: CountdownLaw
    scale: Float[Array, ""]

    def __call__(self, state: TextState) -> Float[Array, ""]:
        """The score `()` of the text so far."""
        left, there = self.law.left(state.written.tokens, state.written.length)
        gaps = jnp.where(there, jnp.abs(left - self.law.target), LARGEST)
        nearest = jnp.min(gaps)
        guess = 1 / (1 + nearest / self.scale)
        return jnp.where(nearest == 0, 1.0, jnp.where(state.finished, 0.0, guess))


def countdown(numbers: tuple[int, ...], target: int, *, scale: float = 10.0) -> Bed:
    """Countdown: reach a target from numbers, each of which may be used once.

    Exact: the probability that uniformly drawn operations get there (the evidence), and of each
    first operation given that they do, by search with a memory of what is left.

    Args:
        numbers: positive; two or more, the target not among them.
        target: positive.
        scale: of the guess that guides on the way, see `Nearness`.
    Raises:
        ValueError: other numbers.
    """
    _check_numbers(numbers, target)
    size, names = len(numbers), operations(len(numbers))
    after = [_after(tuple(numbers), *operation) for operation in names]
    solved = np.array([0.0 if left is None else _chance(left, target) for left in after])
    evidence = float(solved.sum()) / sum(left is not None for left in after)
    law = CountdownLaw(jnp.asarray(numbers, jnp.int32), jnp.asarray(target, jnp.int32))
    lm = KnownModel(law, len(names) + 1, max_tokens=size, end_tokens=(len(names),))
    with np.errstate(invalid="ignore"):
        posterior = np.append(solved, 0.0) / solved.sum()
    return Bed(
        lm,
        RewardFunction(Nearness(law, jnp.asarray(scale, jnp.float32))),
        size,
        evidence,
        posterior,
        lambda tokens, lengths: tokens[:, 0],
        lambda tokens: written(numbers, tokens),
    )


def written(numbers: tuple[int, ...], tokens: Any) -> str:
    """A text of operations as a reader checks it: `8 - 3 = 5`, one a line.

    Raises:
        ValueError: an operation that is not possible there.
    """
    names, left, lines = operations(len(numbers)), dict(enumerate(numbers)), []
    for token in (int(t) for t in tokens):
        if token == len(names):
            break
        i, j, sign = names[token]
        result = applied(left[i], left[j], sign) if i in left and j in left else None
        if result is None:
            raise ValueError(f"smcscale: token {token} is not possible after {lines}.")
        large, small = max(left[i], left[j]), min(left[i], left[j])
        lines.append(f"{large} {sign} {small} = {result}")
        left[i] = result
        del left[j]
    return "\n".join(lines)


def check(text: str, numbers: tuple[int, ...], target: int) -> bool:
    """Whether a text is a right solution: the exact checker.

    Every line must be `a + b = c` (or `-`, `*`, `/`) in whole numbers, the arithmetic right, both
    operands there when it comes: given and not used yet, or made by a line before and not used yet.
    The last result must be the target.  Nothing else may stand in the text.
    """
    left, result = Counter(numbers), None
    for line in text.strip().split("\n"):
        read = _LINE.fullmatch(line.strip())
        if read is None:
            return False
        a, sign, b, result = int(read[1]), read[2], int(read[3]), int(read[4])
        left.subtract([a, b])
        if min(left[a], left[b]) < 0:
            return False
        right = {"+": a + b == result, "-": a - b == result, "*": a * b == result}
        if not right.get(sign, b * result == a and b > 0):
            return False
        left[result] += 1
    return result == target


def solvable(numbers: tuple[int, ...], target: int) -> int:
    """How many texts of the model reach the target: 0 if and only if none does.

    Operations on different places count apart, also where their numbers are equal.
    """
    _check_numbers(numbers, target)
    return _count(tuple(sorted(numbers)), target)


def countdowns(
    seed: int, count: int, *, size: int = 4, largest: int = 25, targets: range = range(10, 100)
) -> list[tuple[tuple[int, ...], int]]:
    """`count` random problems `(numbers, target)` that can be solved, and not in one operation.

    Raises:
        ValueError: fewer than three numbers, or of a thousand draws for each too few can be solved.
    """
    if size < 3:
        raise ValueError(f"smcscale: size must be at least 3, got {size}.")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(1000 * count):
        numbers = tuple(int(n) for n in rng.integers(1, largest + 1, size))
        target = int(rng.choice(np.asarray(targets)))
        if target in numbers or any(target in left for left in _successors(numbers)):
            continue
        if solvable(numbers, target):
            found.append((numbers, target))
        if len(found) == count:
            return found
    raise ValueError(f"smcscale: too few problems with targets in {targets} can be solved.")


def _after(numbers: tuple[int, ...], i: int, j: int, sign: str) -> tuple[int, ...] | None:
    """What is left after an operation, sorted; None if it is not possible."""
    result = applied(numbers[i], numbers[j], sign)
    rest = (number for place, number in enumerate(numbers) if place not in (i, j))
    return None if result is None else tuple(sorted([*rest, result]))


def _successors(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What may be left after each possible operation."""
    after = (_after(numbers, *operation) for operation in operations(len(numbers)))
    return [left for left in after if left is not None]


@functools.lru_cache(maxsize=2**18)
def _chance(left: tuple[int, ...], target: int) -> float:
    """Probability that uniformly drawn operations reach the target from what is left."""
    if target in left:
        return 1.0
    after = _successors(left)
    return sum(_chance(rest, target) for rest in after) / len(after) if after else 0.0


@functools.lru_cache(maxsize=2**18)
def _count(left: tuple[int, ...], target: int) -> int:
    """How many texts reach the target from what is left."""
    return 1 if target in left else sum(_count(rest, target) for rest in _successors(left))


def _check_numbers(numbers: tuple[int, ...], target: int) -> None:
    inside = all(1 <= number <= LARGEST for number in (*numbers, target))
    if len(numbers) < 2 or target in numbers or not inside:
        raise ValueError(
            f"smcscale: Countdown needs two or more numbers in [1, {LARGEST}] and a target that is "
            f"none of them, got {numbers} and {target}."
        )


def _columns(size: int) -> tuple[Array, Array, Array]:
    """First places, second places and signs of all operations, `(V - 1,)` int32 each."""
    names = operations(size)
    columns = zip(*((i, j, SIGNS.index(sign)) for i, j, sign in names), strict=True)
    first, second, sign = (jnp.asarray(column, jnp.int32) for column in columns)
    return first, second, sign


def _results(
    left: Int32[Array, " n"], there: Bool[Array, " n"]
) -> tuple[Int32[Array, " m"], Bool[Array, " m"]]:
    """What each operation gives, and whether it is possible."""
    first, second, sign = _columns(left.shape[0])
    a, b = left[first], left[second]
    large, small = jnp.maximum(a, b), jnp.maximum(jnp.minimum(a, b), 1)
    whole = jnp.where(large % small == 0, large // small, 0)
    results = jnp.select(
        [sign == 0, sign == 1, sign == 2], [large + small, large - small, large * small], whole
    )
    return results, there[first] & there[second] & (results >= 1) & (results <= LARGEST)
