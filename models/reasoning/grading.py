"""Is an answer the right one?

| name | what it is |
|---|---|
| `read_answer` | the final answer of a solution: boxed, after `####`, after `Answer:` |
| `same_answer` | equal as numbers, as texts, or to a verifier |
| `needs_verifier` | whether an answer is no plain number |
| `Verifier` | math-verify in a process of its own, with limits of time and memory |
"""

import importlib.metadata
import importlib.util
import json
import re
import select
import subprocess
import sys
from collections.abc import Callable

from smcscale.models.reasoning import answers, tasks

#: longer answers are read as no answer
LONGEST_ANSWER = 500
_ANSWER = re.compile(r"\banswer(?:\s+is)?\s*:?\s+(.+?)\s*$", re.IGNORECASE | re.MULTILINE)


def read_answer(text: str) -> str | None:
    """The final answer of a solution, None if there is none.

    What the last `\\boxed{...}` holds; else what follows the last `####`; else the number after the
    last `Answer:`; else the rest of the last line that says `answer is`.
    """
    found = _boxed(text)
    if found is None and "####" in text:
        found = text.rsplit("####", 1)[1].split("\n")[0]
    if found is None:
        found = tasks.final_answer(text)
    if found is None and (said := _ANSWER.findall(text)):
        found = said[-1].rstrip(".")
    found = None if found is None else _plain(found)
    return found if found and len(found) <= LONGEST_ANSWER else None


def _boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, braces balanced; None if it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = place = start + len("\\boxed{")
    depth = 1
    while place < len(text):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
        place += 2 if text[place] == "\\" else 1  # an escaped brace is no brace
    return None


def _plain(answer: str) -> str:
    """An answer without the signs that change nothing."""
    answer = answer.strip().strip("$").strip()
    answer = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;]|\\\$", "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer).replace("{,}", ",")
    return " ".join(answer.split())


def same_answer(
    answer: str | None, right: str, verify: Callable[[str, str], bool] | None = None
) -> bool:
    """Whether an answer is the right one: equal as number, as text, or to `verify`.

    Two plain numbers are compared exactly and never reach `verify`.
    """
    if answer is None:
        return False
    forms = [answers.numeric(_plain(each)) for each in (answer, right)]
    if forms[0] == forms[1]:
        return True
    if verify is None or not any(isinstance(form, str) for form in forms):
        return False
    return verify(right, answer)


def needs_verifier(answer: str) -> bool:
    """Whether a right answer is no plain number."""
    return isinstance(answers.numeric(_plain(answer)), str)


class Verifier:
    """Math-Verify in a process of its own, with limits on time and memory.

    Computer algebra on what a model wrote can take forever, in C code that no signal interrupts:
    the process is then killed, and the answer counts as wrong.  So do answers that cannot be read.
    Only LaTeX is parsed: the library's other way, SymPy's `parse_expr`, evaluates Python.

    Attributes:
        seconds: for one answer.
        name: of the grader, with its version.
    Raises:
        ImportError: Math-Verify is not installed.
    """

    def __init__(self, seconds: float = 5.0, megabytes: int = 4096):
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "smcscale: these answers are no plain numbers, which only Math-Verify can grade.\n"
                "  try: pip install 'smcscale[grading]'."
            )
        self.seconds = seconds
        self.megabytes = megabytes
        self.name = f"math-verify {importlib.metadata.version('math-verify')}"
        self._process: subprocess.Popen | None = None

    def __call__(self, right: str, answer: str) -> bool:
        """Whether an answer equals the right one; False if that is not found out in time."""
        process = self._process if self._process and self._process.poll() is None else self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps([right, answer]) + "\n")
            process.stdin.flush()
            return self._line(process, self.seconds) == "true\n"
        except OSError:  # it died before it read
            return False

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, str(self.megabytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        if self._line(self._process, 120.0) != "ready\n":
            raise ImportError("smcscale: Math-Verify is installed, and cannot be imported.")
        return self._process

    def _line(self, process: subprocess.Popen, seconds: float) -> str:
        """The next line of the process; "" after its end, which a missed limit brings about."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
        return line


_CHILD = """
import json, resource, sys
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
replies, sys.stdout = sys.stdout, sys.stderr
from math_verify import LatexExtractionConfig, parse, verify
config = dict(extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    try:
        right, answer = (parse(f"${text}$", **config) for text in json.loads(line))
        same = bool(right and answer and verify(right, answer, timeout_seconds=None))
    except Exception:
        same = False
    print(json.dumps(same), file=replies, flush=True)
"""
