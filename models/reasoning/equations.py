"""A judge without a model: are the equations of a solution right, and do their numbers come from somewhere?

    judge = EquationJudge("Tom has 4 boxes with 3 pens in each. He gives away 5 pens. How many are left?")
    judge(None, ["4 * 3 = 12\\n12 - 5 = 7\\nAnswer: 7"])       # [0.99]

A text of a language model that reckons line by line is checked for what can be checked without knowing
the solution. Its score is 0.99 times a factor for every fault:

| fault | factor |
|---|---|
| an equation whose two sides differ | 0.05 |
| an operand that is neither in the question nor the result of an earlier line | 0.2 |
| a number of the question or a result that is used more often than it is there | 0.5 |
| a line without an equation, before the answer | 0.7 |
| an answer that is no result of the text | 0.05 |
| an answer before a number of the question, in digits, was used | 0.5 each |

A left side is any chain of numbers and `+ - * / x`, multiplied before added, without brackets. A wrong plan
with right sums over all numbers passes; a right solution in another form (brackets, the result first,
number words above twelve), or of a question with numbers that are not needed, loses a little.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import numpy as np

_DIGITS = r"\d+(?:\.\d+)?"
_SIGNS = r"[-+*/x×÷]"
_EQUATION = re.compile(
    rf"(?<![\w.)+*/×÷-])\$?({_DIGITS}(?:\s*{_SIGNS}\s*\$?{_DIGITS})+)\s*=\s*\$?(-?{_DIGITS})"
)
#: what a left side that goes on from before has before it; a sign alone is the mark of a list
_BEFORE = re.compile(r"[\d)]\s*[-+*/×÷]\s*$|\)\s*$")
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
        unused = Counter(digits(self.question))
        results: set[float] = set()
        factor = 0.99
        for line in filter(None, (plain(line) for line in text.split("\n"))):
            said = self.said(line)
            found = equations(line)
            if said is None and not found:
                factor *= 0.7
            for left, told in found:
                operands, value = [float(n) for n in re.findall(_DIGITS, left)], float(told)
                factor *= 1.0 if abs(reckoned(left) - value) < 1e-6 else 0.05
                unused -= Counter(operands)
                for operand in operands:
                    if operand not in known:
                        factor *= 0.2
                    elif known[operand] == 0:
                        factor *= 0.5
                    else:
                        known[operand] -= 1
                known[value] += 1
                results.add(value)
            if said is not None:
                factor *= 1.0 if float(said[1]) in results else 0.05
                factor *= 0.5 ** unused.total()
        return factor

    def said(self, line: str) -> re.Match | None:
        """The answer that a line names, in group 1: of `Answer: 12 - 5 = 7` that is 7."""
        named = self.answer.search(line)
        if named is None:
            return None
        later = equations(line[named.start(1) :])
        return self.answer.search(f"answer {later[-1][1]}") if later else named


def equations(line: str) -> list[tuple[str, str]]:
    """Left side and result of every equation of which the whole left side was found."""
    every = _EQUATION.finditer(line)
    return [(e[1], e[2]) for e in every if not _BEFORE.search(line[: e.start()])]


def plain(text: str) -> str:
    """A text without the commas that set off thousands, and without space around it."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).strip()


def numbers(text: str) -> Iterable[float]:
    """Numbers of a text, in digits and in words."""
    yield from digits(text)
    words = re.findall(r"[a-z]+", text.lower())
    yield from (_WORDS[word] for word in words if word in _WORDS)


def digits(text: str) -> Iterable[float]:
    """Numbers of a text, in digits only."""
    return (float(found) for found in re.findall(rf"(?<![\w.]){_DIGITS}", plain(text)))


def reckoned(left: str) -> float:
    """The value of a chain of numbers and signs, products before sums; NaN where it divides by 0."""
    parts = re.findall(rf"{_DIGITS}|{_SIGNS}", left)
    terms = [float(parts[0])]
    for sign, number in zip(parts[1::2], map(float, parts[2::2]), strict=True):
        if sign in "+-":
            terms.append(number if sign == "+" else -number)
        elif sign in "/÷":
            terms[-1] = terms[-1] / number if number else float("nan")
        else:
            terms[-1] *= number
    return sum(terms)
