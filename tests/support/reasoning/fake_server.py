"""An OpenAI-compatible server over a Markov chain of characters, and a proxy that breaks answers.

    with serving(FakeServer(...)) as base_url: ...

The chain writes `a`, `b`, the delimiter `;` and an end that is no character; the law of every text
is known (`texts`).  Fields are those of vLLM, or fewer by option.  `faults` maps the number of a
request (0 the first) to what goes wrong with it; a broken request is not counted as answered.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DELIMITER = ";"
LETTERS = ["a", "b", DELIMITER, ""]  # the last is the end of the text
#: law of the next letter after each letter
CHAIN = {
    "a": (0.3, 0.3, 0.3, 0.1),
    "b": (0.5, 0.1, 0.2, 0.2),
    DELIMITER: (0.4, 0.4, 0.0, 0.2),
}


@dataclass
class FakeServer:
    """How the server behaves, and what it saw."""

    several: bool = True
    names_stop: bool = True
    usage: bool = True
    greedy: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    gone_after: int | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Choices by the chain; equal requests have equal answers."""
        seed = 0 if self.greedy else body.get("seed", 0)
        rng = np.random.default_rng([seed, *map(ord, body["prompt"])])
        stops = body.get("stop") or []
        choices, written = [], 0
        for index in range(body.get("n", 1) if self.several else 1):
            text, reason, met = "", "length", None
            last = body["prompt"][-1]
            for _ in range(body["max_tokens"]):
                letter = LETTERS[rng.choice(4, p=CHAIN.get(last, CHAIN[DELIMITER]))]
                written += 1
                if letter == "" or letter in stops:
                    reason, met = "stop", letter or None
                    break
                text, last = text + letter, letter
            choice = {"index": index, "text": text, "finish_reason": reason}
            choices.append(choice | ({"stop_reason": met} if self.names_stop else {}))
        answer: dict[str, Any] = {"choices": choices}
        if self.usage:
            answer["usage"] = {"completion_tokens": written, "prompt_tokens": len(body["prompt"])}
        return answer

    def pool(self, body: dict[str, Any]) -> dict[str, Any]:
        """Label probabilities at every mark `#`, of the text before it."""
        parts = body["input"].split("#")[:-1]
        rows = []
        for count in range(1, len(parts) + 1):
            good = score("".join(parts[:count]))
            rows.append([1 - good, good])
        return {"data": [{"data": rows}]}


def score(text: str) -> float:
    """A reward of a prefix: prefers many `b`."""
    return 0.1 + 0.8 * (text.count("b") + 1) / (len(text.replace(DELIMITER, "")) + 2)


def texts(step_tokens: int, max_steps: int) -> dict[str, tuple[float, list[str]]]:
    """Every text with its probability, and the prefixes that are judged; `!` marks an end."""
    found: dict[str, tuple[float, list[str]]] = {}

    def grow(text: str, chance: float, steps: list[str], in_step: int) -> None:
        last = text[-1] if text else DELIMITER
        for letter, p in zip(LETTERS, CHAIN[last], strict=True):
            if p == 0:
                continue
            new = text + letter
            if letter == "":
                found[text + "!"] = (chance * p, [*steps, text])
            elif letter == DELIMITER or in_step + 1 == step_tokens:
                if len(steps) + 1 == max_steps:
                    found[new] = (chance * p, [*steps, new])
                else:
                    grow(new, chance * p, [*steps, new], 0)
            else:
                grow(new, chance * p, steps, in_step + 1)

    grow("", 1.0, [], 0)
    return found


@contextlib.contextmanager
def serving(server: FakeServer) -> Iterator[str]:
    """Run the server on a free port; gives its address up to `/v1`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
            fault = server.faults.get(number)
            if server.gone_after is not None and number >= server.gone_after:
                self.connection.close()
                return
            if fault == "timeout":
                time.sleep(1.5)
            if fault in ("429", "500", "400"):
                self.send(int(fault), b'{"error": {"message": "no"}}')
                return
            if not server.several and body.get("n", 1) > 1:
                self.send(400, b'{"error": {"message": "n is not supported"}}')
                return
            answer = server.pool(body) if self.path == "/pooling" else server.complete(body)
            if fault == "fewer":
                answer["choices"] = answer["choices"][1:]
            if fault == "no finish":
                answer["choices"][0]["finish_reason"] = None
            data = json.dumps(answer).encode()
            if fault == "malformed":
                data = data[:-7]
            if fault == "truncated":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.connection.close()
                return
            with server.lock:
                server.answered += fault is None
            self.send(200, data)

        def send(self, status: int, data: bytes) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
