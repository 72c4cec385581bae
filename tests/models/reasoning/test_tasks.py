"""Problems: solutions are right, test stories differ from training stories, text round-trips."""

import random
import re

import pytest

from smcscale.models.reasoning import tasks
from smcscale.models.reasoning.tokenizer import word_level


def templates(text):
    """Which templates a story's sentences come from, held out or not."""

    def pattern(template):
        return re.sub(r"\\{.\\}", r"[A-Za-z0-9]+", re.escape(template))

    held = [p for group in tasks.HELD_OUT.values() for p in group]
    return sum(bool(re.search(pattern(t), text)) for t in held)


@pytest.mark.parametrize("split", ["train", "test"])
def test_steps_are_right_and_numbered_as_asked(split):
    for problem in tasks.problems(0, 200, split):
        assert len(problem.steps) - 1 in tasks.STEPS
        for step in problem.steps[:-1]:
            left, right = step.split(": ")[1].split(" = ")
            assert eval_arithmetic(left) == int(right)
        assert problem.steps[-1] == f"Answer: {problem.answer}"
        assert tasks.grade(problem.solution, problem)
        assert not tasks.grade(problem.solution + "1", problem)


def eval_arithmetic(text):
    tokens = text.split()
    if len(tokens) == 5:  # a + b * c
        return int(tokens[0]) + int(tokens[2]) * int(tokens[4])
    a, sign, b = int(tokens[0]), tokens[1], int(tokens[2])
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]


def test_splits_do_not_overlap():
    for problem in tasks.problems(1, 300, "train"):
        assert templates(problem.question) == 0
        numbers = {int(n) for n in re.findall(r"\d+", problem.question)}
        assert not numbers & set(tasks.HELD_OUT_NUMBERS)
    test = tasks.problems(1, 300, "test")
    assert all(templates(p.question) >= 1 for p in test)
    mention = [set(map(int, re.findall(r"\d+", p.question))) for p in test]
    assert sum(bool(m & set(tasks.HELD_OUT_NUMBERS)) for m in mention) > 60


def test_problems_depend_on_the_seed_only():
    assert tasks.problems(3, 5) == tasks.problems(3, 5) != tasks.problems(4, 5)
    with pytest.raises(ValueError, match="unknown split"):
        tasks.problem(random.Random(0), "validation")


def test_text_survives_the_tokenizer():
    tokenizer = word_level(tasks.words())
    for problem in tasks.problems(2, 100, "train") + tasks.problems(2, 100, "test"):
        text = problem.question + "\n" + problem.solution
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.unknown(text) == []
    assert tokenizer.unknown("Ana buys 3 zebras.") == ["zebras"]
    mask = tokenizer.ends_step()
    assert mask.sum() == 2 and mask[tokenizer.encode("\n")[0]] and mask[tokenizer.end_tokens[0]]


def test_right_steps_and_final_answers():
    problem = tasks.problems(5, 1)[0]
    lines = list(problem.steps)
    assert all(tasks.right_steps("\n".join(lines), problem))
    lines[1] = lines[1] + "9"
    assert tasks.right_steps("\n".join(lines), problem)[:3] == [True, False, True]
    assert tasks.final_answer("no answer here") is None
    assert tasks.final_answer("Answer: 3\nAnswer: 12") == "12"
