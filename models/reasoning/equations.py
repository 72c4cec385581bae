"""A judge without a model: are the equations of a solution right, and do their numbers come from somewhere?

    judge = EquationJudge("Tom has 4 boxes with 3 pens in each. He gives away 5 pens. How many are left?")
    judge(None, ["4 * 3 = 12\n12 - 5 = 7\nAnswer: 7"])         # [0.99]

A text of a language model that reckons line by line is checked for what can be checked without knowing
the solution. Its score is 0.99 times a factor for every fault:

| fault | factor |
|---|---|
| an equation whose two sides differ | 0.05 |
| an operand that is neither in the question nor the result of an earlier line | 0.2 |
| a number of the question or a result that is used more often than it is there | 0.5 |
| a line without an equation, before the answer | 0.7 |
| an answer that is no result of the text | 0.05 |

A wrong plan with right sums passes: it is a verifier that errs on one side.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import numpy as np

_NUMBER = r"(?<![\w.])(\d+(?:\.\d+)?)"
_EQUATION = re.compile(rf"{_NUMBER}\s*([-+*/x×÷])\s*(\d+(?:\.\d+)?)\s*=\s*(-?\d+(?:\.\d+)?)")
_ANSWER = re.compile(r"answer\D*?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_WORDS = {
    word: float(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
} | {"twice": 2.0, "double": 2.0, "doubles": 2.0, "half": 2.0, "triple": 3.0, "dozen": 12.0}


class EquationJudge(eqx.Module):
    """`(prompt, texts) -> (len(texts),)` scores in (0, 1) of texts that solve one question.

    Attributes:
        question: its numbers may be used, each as often as it is there; those in words too.
        answer: pattern of the final answer, with one group.
    """

    question: str
    answer: re.Pattern = eqx.field(static=True, default=_ANSWER)

    def __call__(self, prompt: Any, texts: Sequence[str]) -> np.ndarray:
        """Scores of texts so far; the prompt is not looked at."""
        return np.array([self.score(text) for text in texts])

    def score(self, text: str) -> float:
        """Of one text: 0.99, and a factor for every fault."""
        known = Counter(numbers(self.question))
        results: set[float] = set()
        factor = 0.99
        for line in filter(None, (line.strip() for line in text.split("\n"))):
            said = self.answer.search(line)
            found = _EQUATION.findall(line)
            if said is not None and not found:
                factor *= 1.0 if float(said[1]) in results else 0.05
                continue
            factor *= 1.0 if found else 0.7
            for left, sign, right, told in found:
                operands, value = (float(left), float(right)), float(told)
                factor *= 1.0 if holds(sign, *operands, value) else 0.05
                for operand in operands:
                    if operand not in known:
                        factor *= 0.2
                    elif known[operand] == 0:
                        factor *= 0.5
                    else:
                        known[operand] -= 1
                known[value] += 1
                results.add(value)
        return factor


def numbers(text: str) -> Iterable[float]:
    """Numbers of a text, in digits and in words."""
    yield from (float(found) for found in re.findall(_NUMBER, text))
    yield from (_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS)


def holds(sign: str, left: float, right: float, value: float) -> bool:
    """Whether `left sign right = value`."""
    if sign in "/÷":
        return right != 0 and abs(left / right - value) < 1e-6
    found = {"+": left + right, "-": left - right}.get(sign, left * right)
    return abs(found - value) < 1e-6
