"""Files of problems: JSON lines with a question and its answer.

| name | what it is |
|---|---|
| `Problem`, `read_problems` | questions with answers; the fields of MATH500, AIME and GSM8K are known |
| `generated`, `write_problems` | held-out problems of the shipped task, by level, as such a file |

A line is an object with a question ("problem" or "question"), an answer ("answer"; else the boxed one of
"solution"), and perhaps an id ("id", "unique_id") and a level ("level"): the fields of MATH500, AIME and
GSM8K, whose answer is what follows `####`. Case does not matter.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from smcscale.models.reasoning import tasks
from smcscale.models.reasoning.grading import read_answer


class Problem(NamedTuple):
    """A question with its answer; `level` is None where a file says none."""

    id: str
    question: str
    answer: str
    level: str | None = None


def read_problems(path: str | Path) -> list[Problem]:
    """Problems of a file of JSON lines; for its fields see the module docstring.

    Raises:
        OSError: the file cannot be read.
        ValueError: by line: no JSON object, no question, no answer, an id that was there before;
            or a file without problems.
    """
    found: dict[str, Problem] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"smcscale: {path} is not a file of JSON lines ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"smcscale: {path}, line {number}"
        try:
            fields = {str(k).lower(): v for k, v in json.loads(line).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{where} is no JSON object.\n"
                '  try: a line like {"problem": "How many ...?", "answer": "12"} for each problem.'
            ) from error
        question, answer = _text(fields, "problem", "question"), _text(fields, "answer")
        if answer is None:
            answer = read_answer(_text(fields, "solution") or "")
        elif "####" in answer or "\\boxed" in answer:
            answer = read_answer(answer)
        for value, names in ((question, '"problem" or "question"'), (answer, '"answer"')):
            if value is None:
                raise ValueError(
                    f"{where} has no {names}; it has {', '.join(fields) or 'nothing'}."
                )
        name = _text(fields, "id", "unique_id") or f"{number}"
        if name in found:
            raise ValueError(f'{where}: the id "{name}" was there before.')
        found[name] = Problem(name, str(question), str(answer), _text(fields, "level"))
    if not found:
        raise ValueError(f"smcscale: {path} has no problems.")
    return list(found.values())


def _text(fields: dict[str, Any], *names: str) -> str | None:
    """The first of some fields that is a text or a number, as stripped text; None if there is none."""
    for name in names:
        value = fields.get(name)
        known = isinstance(value, str | int | float) and not isinstance(value, bool)
        if known and (text := str(value).strip()):
            return text
    return None


def generated(count: int, seed: int = 0) -> list[Problem]:
    """Held-out problems of the shipped task, as many of each level: its number of steps."""
    rng = random.Random(f"smcscale bench {seed}")
    found = []
    for number in range(count):
        level = tasks.STEPS[number % len(tasks.STEPS)]
        drawn = tasks.problem(rng, "test", level)
        found.append(Problem(f"{seed}-{number}", drawn.question, str(drawn.answer), str(level)))
    return found


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSON lines; a file that is there already is refused."""
    with Path(path).open("x", encoding="utf-8") as file:
        for each in problems:
            named = {"id": each.id, "problem": each.question, "answer": each.answer}
            file.write(json.dumps(named | {"level": each.level}, ensure_ascii=False) + "\n")
