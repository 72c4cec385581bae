"""One request to an OpenAI-compatible server: bounded, retried, checked, and written down.

    server = Server("http://127.0.0.1:8000/v1", "my-model", journal="run.jsonl")
    answer = await server.ask("completions", {"prompt": "..."}, check)

| what goes wrong | what happens |
|---|---|
| no connection, time-out, 408, 409, 429, 5xx | asked again after a pause that doubles, with jitter |
| an answer that is no JSON, or that `check` refuses | asked again as well |
| any other status (bad request, no such model, no permission) | raised at once, `RemoteError` |
| still no good answer after `max_retries` | `RemoteError`; the journal keeps what was answered |

With a `journal` every accepted answer is appended to a file of JSON lines under a hash of its
request. The engine is deterministic, so the same run started again asks the same requests: those
answered before are read from the file, and a killed run goes on where it stopped, with equal
numbers. A line torn by the kill is asked again.
"""

import asyncio
import hashlib
import json
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smcscale.engine.host import wait_for

#: seconds of the first pause, and of the longest
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_AGAIN = (408, 409, 429)


class RemoteError(RuntimeError):
    """A server that does not answer, or answers what cannot be used."""


class Journal:
    """Answers on disk, by the hash of their request; safe to share between coroutines."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.answers: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.path.is_file():
            self._read()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):  # killed in the middle of a line
            warnings.warn(
                f"smcscale: the last line of {self.path} is torn; its request is asked again.",
                stacklevel=3,
            )
            self.path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.answers[entry["request"]] = entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"smcscale: line {number} of the journal {self.path} cannot be read.\n"
                    "  try: remove that line, or start with a new journal."
                ) from error

    def add(self, request: str, answer: Any) -> None:
        """Append one answer; on disk when this returns."""
        line = json.dumps({"request": request, "answer": answer}) + "\n"
        with self._lock:
            self.answers[request] = answer
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)


@dataclass
class Server:
    """An OpenAI-compatible server and how to ask it.

    Args:
        base_url: up to and with `/v1`.
        model: name that requests carry.
        api_key: a local server needs none.
        timeout: seconds for one request.
        max_retries: how often a request is repeated.
        max_concurrency: requests in flight.
        journal: file of answers, for a run that may be killed; None keeps none.
    """

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0
    max_retries: int = 6
    max_concurrency: int = 32
    journal: Journal | str | Path | None = None
    #: requests sent, repeated, and read from the journal
    sent: int = field(default=0, init=False)
    repeated: int = field(default=0, init=False)
    remembered: int = field(default=0, init=False)

    def __post_init__(self):
        for name in ("timeout", "max_concurrency"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"smcscale: `{name}` must be positive, got {getattr(self, name)!r}."
                )
        if isinstance(self.journal, str | Path):
            self.journal = Journal(self.journal)
        self._client = self._connected()
        self._gate: asyncio.Semaphore | None = None

    def _connected(self) -> Any:
        # retries are counted in `ask`, for every kind of failure alike
        return _openai().AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.api_key or "none",
            timeout=self.timeout,
            max_retries=0,
        )

    def close(self) -> None:
        """Drop the connections; a later request opens new ones."""
        wait_for(self._client.close())
        self._client = self._connected()

    async def ask(
        self,
        path: str,
        body: dict[str, Any],
        check: Callable[[Any], Any],
        *,
        max_retries: int | None = None,
    ) -> Any:
        """The answer to one request, as `check` returns it.

        Args:
            path: below `base_url` ("completions"), or whole (a server's `/pooling`).
            body: JSON; the model's name is added.
            check: `(decoded answer) -> what is kept of it`; raises ValueError, KeyError or TypeError
                for an answer that cannot be used.
            max_retries: of this request; the server's when None.
        Raises:
            RemoteError: see the module docstring.
        """
        openai = _openai()
        body = {"model": self.model, **body}
        request = hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()
        journal = self.journal
        assert not isinstance(journal, str | Path)
        if journal is not None and request in journal.answers:
            self.remembered += 1
            return check(journal.answers[request])
        if self._gate is None:
            self._gate = asyncio.Semaphore(self.max_concurrency)
        pause, reason = _PAUSE, ""
        retries = self.max_retries if max_retries is None else max_retries
        for attempt in range(retries + 1):
            wait: float | None = None
            try:
                async with self._gate:
                    self.sent += 1
                    self.repeated += attempt > 0
                    answer = await self._client.post(path, cast_to=object, body=body)
                checked = check(answer)
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in _AGAIN:
                    raise RemoteError(
                        f"smcscale: {self._where(path)} answers {error.status_code}: "
                        f"{str(error)[:300]}\n  try: the model's name and the server's log."
                    ) from error
                reason = f"status {error.status_code}"
                wait = _retry_after(error)
            except openai.OpenAIError as error:  # no connection, time-out, no JSON
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"an answer that cannot be used ({type(error).__name__}: {error})"
            else:
                if journal is not None:
                    journal.add(request, answer)
                return checked
            if attempt < retries:
                await asyncio.sleep(pause * random.uniform(0.5, 1) if wait is None else wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        kept = (
            ""
            if journal is None
            else (
                f"\n  {len(journal.answers)} answers are kept in {journal.path}; the same call goes on "
                "from there."
            )
        )
        raise RemoteError(
            f"smcscale: {self._where(path)} gave no usable answer in {retries + 1} "
            f"attempts; the last: {reason[:300]}.\n"
            f"  try: look whether the server runs, or a larger timeout or max_retries.{kept}"
        )

    def _where(self, path: str) -> str:
        return path if "://" in path else f"{self.base_url.rstrip('/')}/{path}"


def _openai() -> Any:
    """The client library, an optional part of the installation."""
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "smcscale: remote models need the openai client.\n"
            "  try: pip install 'smcscale[remote]'."
        ) from error
    return openai


def _retry_after(error: Any) -> float | None:
    """Seconds that the server asks to wait, at most the longest pause."""
    try:
        return min(float(error.response.headers["retry-after"]), _LONGEST_PAUSE)
    except (KeyError, ValueError):
        return None
