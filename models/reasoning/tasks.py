"""Word problems of dependent steps in plain English, their solutions, and the grader.

A problem is a short story: a first amount, then `num_steps` sentences that each change the
amount in hand or bring in another person whose amount depends on the others.  The solution has
one line per sentence (`Ana: 14 + 7 = 21`) and ends with `Answer: N`.

    problem(rng, split, num_steps) -> Problem
    problems(seed, count, split)   -> list[Problem]
    grade(text, problem)           -> bool        the final answer is right
    right_steps(text, problem)     -> list[bool]  each written step is right, given the story

Splits: `"test"` stories use sentence templates and numbers that `"train"` stories never use: two
sentences of a test story come from `HELD_OUT` templates, and its numbers from the whole range,
`HELD_OUT_NUMBERS` included, which no training story mentions.  Read next: `tokenizer.py`.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

HELD_OUT_NUMBERS = range(33, 37)
STEPS = range(6, 11)
LARGEST = 400

WOMEN = ("Ana", "Cara", "Dina", "Ella", "Fay", "Gina", "Hana", "Iris", "Jana", "Kim")
MEN = ("Ben", "Leo", "Max", "Noah", "Omar", "Paul", "Raj", "Sam", "Tom", "Will")
NOUNS = (
    ("apples", "boxes"), ("books", "boxes"), ("coins", "bags"), ("cards", "packs"),
    ("eggs", "boxes"), ("stamps", "packs"), ("shells", "bags"), ("pencils", "packs"),
    ("marbles", "bags"), ("stickers", "packs"), ("cookies", "bags"), ("beads", "bags"),
)  # fmt: skip
OPENERS = ("", "", "", "Then ", "Next, ", "Later, ", "After that, ", "The next day, ")

# Operations on the amount in hand; {p} the person, {k} and {b} numbers, {n} the things, {c} what
# holds them, {q} another person, {r} a third.  All words of HELD_OUT occur in TRAIN.
TRAIN = {
    "start": ("{p} has {k} {n}.", "{p} starts with {k} {n}.", "At home {p} has {k} {n}."),
    "add": (
        "{p} buys {k} more {n}.", "{p} finds {k} {n}.", "{p} gets {k} {n} from a friend.",
        "{p} picks up {k} more {n} at the market.", "{p} wins {k} {n} in a game.",
    ),
    "subtract": (
        "{p} gives {k} {n} away.", "{p} loses {k} {n}.", "{p} sells {k} {n} at the market.",
        "{p} gives {k} of the {n} to a friend.", "{p} leaves {k} {n} at home.",
    ),
    "double": ("{p} doubles the number of {n}.", "{p} works hard and now has twice as many {n}."),
    "triple": ("{p} triples the number of {n}.", "{p} works hard and now has three times as many {n}."),
    "halve": ("{p} gives half of the {n} away.", "{p} sells half of the {n}."),
    "share": (
        "{p} shares the {n} equally among {k} friends and keeps one share.",
        "{p} puts the {n} equally into {k} {c} and keeps one of them.",
    ),
    "packs": ("{p} buys {b} {c} of {k} {n} each.", "{p} finds {b} {c} with {k} {n} in each."),
    "more": ("{q} has {k} more {n} than {p}.", "{q} has as many {n} as {p} and {k} more."),
    "fewer": ("{q} has {k} fewer {n} than {p}.", "{q} has as many {n} as {p} but loses {k}."),
    "twice": ("{q} has twice as many {n} as {p}.", "{q} doubles what {p} has."),
    "half as many": ("{q} has half as many {n} as {p}.", "{q} gets half of what {p} has."),
    "together": (
        "{q} has as many {n} as {p} and {r} together.",
        "{q} gets the {n} of {p} and {r} together.",
    ),
}  # fmt: skip
HELD_OUT = {
    "start": ("{p} now has {k} {n} at home.",),
    "add": ("{p} finds {k} more {n} at the market.", "{p} gets {k} more {n} in a game."),
    "subtract": ("{p} sells {k} of the {n} to a friend.", "{p} loses {k} of the {n} in a game."),
    "double": ("{p} now has twice the number of {n}.",),
    "triple": ("{p} now has three times the number of {n}.",),
    "halve": ("{p} leaves half of the {n} at home.", "{p} gives half of the {n} to a friend."),
    "share": ("{p} shares the {n} equally among {k} friends and now has one share.",),
    "packs": ("{p} gets {b} more {c} with {k} {n} in each.",),
    "more": ("{q} has what {p} has and {k} more {n}.",),
    "fewer": ("{q} has what {p} has but {k} fewer {n}.",),
    "twice": ("{q} gets twice as many {n} as {p} has.",),
    "half as many": ("{q} gets half as many {n} as {p} has.",),
    "together": ("{q} gets as many {n} as {p} and {r} have together.",),
}
QUESTIONS = ("How many {n} does {p} have now?", "How many {n} does {p} have at the end?")
_CHANGES = ("add", "add", "subtract", "subtract", "double", "triple", "halve", "share", "packs")
_RELATIONS = ("more", "fewer", "twice", "half as many", "together")


@dataclass(frozen=True)
class Problem:
    """A story, its worked steps, and the answer.

    `question` is the text a model is given (it ends without a newline), `steps` the lines of the
    solution (the last is `Answer: N`), `answer` the number.
    """

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The steps as text: one line each."""
        return "\n".join(self.steps)


def problem(
    rng: random.Random,
    split: str = "train",
    num_steps: int | None = None,
    held_out_numbers: Collection[int] = HELD_OUT_NUMBERS,
) -> Problem:
    """One random problem.

    Args:
        rng: the source of randomness; advanced.
        split: `"train"` or `"test"` (see the module docstring).
        num_steps: how many sentences change something; drawn from `STEPS` when None.
        held_out_numbers: numbers that training stories avoid.
    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'smcscale: unknown split {split!r}; use "train" or "test".')
    num_steps = rng.choice(STEPS) if num_steps is None else num_steps
    noun, holder = rng.choice(NOUNS)
    people: list[str] = rng.sample(WOMEN + MEN, 6)
    held_out = set(rng.sample(range(num_steps), 2)) if split == "test" else set()

    def number(low: int, high: int) -> int:
        while (drawn := rng.randint(low, high)) in held_out_numbers and split == "train":
            pass
        return drawn

    def templates(operation: str, position: int) -> Sequence[str]:
        if position in held_out:
            return HELD_OUT[operation]
        return TRAIN[operation]

    focus: str = people[0]
    others: list[str] = people[1:]
    amounts = {focus: number(5, 60)}
    sentences = [rng.choice(templates("start", -1)).format(p=focus, n=noun, k=amounts[focus])]
    steps: list[str] = []
    new_focus = True
    while len(steps) < num_steps:
        old = amounts[focus]
        relate = bool(others) and rng.random() < 0.25
        operation = rng.choice(_RELATIONS if relate else _CHANGES)
        change = _apply(rng, number, operation, old, len(amounts) > 1)
        if change is None:
            continue
        text, value, k, b = change
        asked, third = "", ""
        if relate:
            asked = others.pop()
        if operation == "together":
            third = rng.choice([p for p, v in amounts.items() if p != focus])
            value = old + amounts[third]
            text = f"{old} + {amounts[third]}"
            if value > LARGEST:
                others.append(asked)
                continue
        opener = rng.choice(OPENERS)
        person = focus
        if not relate and not new_focus and rng.random() < 0.6:
            person = "she" if focus in WOMEN else "he"
            person = person if opener else person.capitalize()
        template = rng.choice(templates(operation, len(steps)))
        sentences.append(
            opener + template.format(p=person, q=asked, r=third, n=noun, c=holder, k=k, b=b)
        )
        new_focus = relate
        focus = asked or focus
        amounts[focus] = value
        steps.append(f"{focus}: {text} = {value}")
    sentences.append(rng.choice(QUESTIONS).format(p=focus, n=noun))
    steps.append(f"Answer: {amounts[focus]}")
    return Problem(" ".join(sentences), tuple(steps), amounts[focus])


def _apply(rng: random.Random, number: Callable, operation: str, old: int, others: bool):
    """`(expression, value, k, b)` of one operation on `old`, or None where it does not fit."""
    k = b = 0
    if operation in ("add", "more"):
        k = number(2, 60)
        text, value = f"{old} + {k}", old + k
    elif operation in ("subtract", "fewer"):
        k = number(2, 60)
        text, value = f"{old} - {k}", old - k
    elif operation in ("double", "twice"):
        text, value = f"{old} * 2", old * 2
    elif operation == "triple":
        text, value = f"{old} * 3", old * 3
    elif operation in ("halve", "half as many"):
        text, value = f"{old} / 2", old // 2 if old % 2 == 0 else 0
    elif operation == "share":
        divisors = [d for d in range(3, 10) if old % d == 0]
        if not divisors:
            return None
        k = rng.choice(divisors)
        text, value = f"{old} / {k}", old // k
    elif operation == "packs":
        b, k = rng.randint(2, 6), rng.randint(3, 9)
        text, value = f"{old} + {b} * {k}", old + b * k
    else:  # together: the third person is chosen by the caller
        return ("", 1, 0, 0) if others else None
    return (text, value, k, b) if 3 <= value <= LARGEST else None


def problems(seed: int, count: int, split: str = "test") -> list[Problem]:
    """`count` problems that depend on `seed` and `split` only."""
    rng = random.Random(f"smcscale {split} {seed}")
    return [problem(rng, split) for _ in range(count)]


def final_answer(text: str) -> str | None:
    """The number after the last `Answer:` of a text, or None."""
    found = re.findall(r"Answer\s*:\s*(-?\d+)\s*$", text, flags=re.MULTILINE)
    return found[-1] if found else None


def grade(text: str, problem: Problem) -> bool:
    """True if the last `Answer:` line of `text` has the right number."""
    return final_answer(text) == str(problem.answer)


def right_steps(text: str, problem: Problem) -> list[bool]:
    """For each line of `text`: does it equal the line of the worked solution?

    After the first wrong line the later ones are counted as wrong unless they agree with the
    worked solution again.
    """
    lines = [line for line in text.strip().split("\n") if line]
    return [
        position < len(problem.steps) and line == problem.steps[position]
        for position, line in enumerate(lines)
    ]


def words() -> list[str]:
    """Every word and mark that a problem or a solution can contain, sorted."""
    texts = [*QUESTIONS, *OPENERS, *WOMEN, *MEN, "She", "he", "He", "she", "Answer: + - * / ="]
    texts += [
        template for table in (TRAIN, HELD_OUT) for group in table.values() for template in group
    ]
    texts += [word for pair in NOUNS for word in pair]
    return sorted(
        {w for t in texts for w in re.findall(r"[A-Za-z]+|[^\w\s{}]", re.sub(r"{.}", " ", t))}
    )
