"""A language model and a reward model behind a server.

    lm = connect("http://127.0.0.1:8000/v1", "my-model")       asks what the server can
    judge = RemoteRewardModel(Server("http://127.0.0.1:8001/v1", "my-prm"))

Prompts are rendered here and sent to `/completions`; chat end points add templates of their own and
cannot go on with a text.  Read next: `remote_program.py`, which runs them under a particle filter.

A step ends at the delimiter. Whether a text stopped there or is finished must be known for sure: a
server that names its stop string (`stop_reason`, vLLM; `matched_stop`, SGLang) is told to stop; from
any other the step is cut out of what it writes, which costs the tokens after the cut.

| server | n | names the stop string | its own sampling defaults to switch off by `options` |
|---|---|---|---|
| vLLM, SGLang | yes | yes | the model's generation_config (`top_k`, `top_p`, `repetition_penalty`) |
| llama.cpp | no | no | `{"top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}` |
| transformers serve | no | no | the model's generation_config, which must say `"do_sample": true` |
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from smcscale.engine.host import wait_for
from smcscale.models.reasoning.server import RemoteError, Server


class Abilities(NamedTuple):
    """What a server was seen to do.

    Attributes:
        several: gives n answers to one request.
        names_stop: says which stop string it met, so that the end of the text is known from it.
    """

    several: bool
    names_stop: bool


class Completion(NamedTuple):
    """One step that a server wrote: its text, whether the text is finished, tokens it cost."""

    text: str
    finished: bool
    tokens: float
    prompt_tokens: float


@dataclass(frozen=True)
class RemoteLanguageModel:
    """A language model that a server runs; made by `connect`.

    Args:
        server: where.
        abilities: what it can.
        delimiter: ends a step.
        step_tokens: a step has at most so many tokens.
        temperature: of the token distribution.
        options: further fields of each request, such as `{"top_k": 0}`.
    """

    server: Server
    abilities: Abilities
    delimiter: str = "\n"
    step_tokens: int = 256
    temperature: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.delimiter:
            raise ValueError("smcscale: `delimiter` is empty; a step would never end.")
        if self.step_tokens < 1:
            raise ValueError(f"smcscale: step_tokens must be positive, got {self.step_tokens}.")
        if not self.temperature > 0:
            raise ValueError(f"smcscale: temperature must be positive, got {self.temperature}.")

    async def write(self, text: str, seed: int, copies: int = 1) -> list[Completion]:
        """So many independent next steps of a text (with its prompt)."""
        body: dict[str, Any] = {
            "prompt": text,
            "max_tokens": self.step_tokens,
            "temperature": self.temperature,
            "seed": seed,
            **self.options,
        }
        if self.abilities.names_stop:
            body["stop"] = [self.delimiter]
        if copies > 1:
            body["n"] = copies

        def check(answer: Any) -> list[Completion]:
            choices = answer["choices"]
            if len(choices) != copies:
                raise ValueError(f"{len(choices)} choices for n = {copies}")
            spent, read = (_count(answer, n) for n in ("completion_tokens", "prompt_tokens"))
            return [
                Completion(*self._step(choice), spent / copies, read / copies) for choice in choices
            ]

        return await self.server.ask("completions", body, check)

    def _step(self, choice: dict[str, Any]) -> tuple[str, bool]:
        """Text of one step, its delimiter with it, and whether the whole text is finished."""
        text, reason = choice["text"], choice["finish_reason"]
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise ValueError(f"finish_reason {reason!r}")
        if self.abilities.names_stop:
            met = choice.get("stop_reason", choice.get("matched_stop"))
            if reason == "stop" and met == self.delimiter:
                return text + self.delimiter, False
            return text, reason == "stop"
        cut = text.find(self.delimiter)
        if cut >= 0:
            return text[: cut + len(self.delimiter)], False
        return text, reason == "stop"


def _count(answer: Any, name: str) -> float:
    value = answer["usage"][name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"usage.{name} is {value!r}")
    return float(value)


def connect(
    base_url: str | Server,
    model: str | None = None,
    *,
    prompt: str = "1 2 3",
    delimiter: str = "\n",
    step_tokens: int = 256,
    temperature: float = 1.0,
    options: dict[str, Any] | None = None,
    **server_options: Any,
) -> RemoteLanguageModel:
    """Ask a server what it can, and refuse one that would make a run silently wrong.

    Args:
        base_url: up to and with `/v1`, or a `Server`.
        model: the name that requests carry.
        prompt: text of the trial requests.
        delimiter, step_tokens, temperature, options: see `RemoteLanguageModel`.
        **server_options: further arguments of `Server`, such as `timeout` and `journal`.
    Raises:
        RemoteError: nobody answers; the server counts no tokens, or does not sample.
    """
    if isinstance(base_url, Server):
        server = base_url
    elif model is None:
        raise ValueError('smcscale: connect() needs the model\'s name.\n  try: model="...".')
    else:
        server = Server(base_url, model, **server_options)
    body = {"prompt": prompt, "max_tokens": 4, "temperature": temperature, **(options or {})}

    def asked(retries: int | None = None, **fields: Any) -> dict[str, Any]:
        request = server.ask("completions", {**body, **fields}, _with_choices, max_retries=retries)
        return wait_for(request)

    answer = asked()
    if not isinstance((answer.get("usage") or {}).get("completion_tokens"), int):
        raise RemoteError(
            "smcscale: the server does not count tokens (`usage` is missing), so that no budget "
            "can be kept.\n  try: a server that returns `usage`."
        )
    # at temperature 2 four seeds that agree are no chance: such a run would have one particle
    if len({asked(temperature=2.0, seed=seed)["choices"][0]["text"] for seed in range(4)}) == 1:
        raise RemoteError(
            "smcscale: the server writes the same text for every seed; it decodes greedily, and all "
            "particles would be one.\n  try: `do_sample` in the generation_config of its model "
            "(transformers serve), or `options`."
        )
    try:
        choice = asked(2, stop=[delimiter])["choices"][0]
        names_stop = "stop_reason" in choice or "matched_stop" in choice
    except RemoteError:  # refused, or too much for the server: steps are cut here
        names_stop = False
    try:
        several = len(asked(2, n=2)["choices"]) == 2
    except RemoteError:
        several = False
    return RemoteLanguageModel(
        server,
        Abilities(several, names_stop),
        delimiter,
        step_tokens,
        temperature,
        dict(options or {}),
    )


def _with_choices(answer: Any) -> dict[str, Any]:
    if not answer["choices"]:
        raise ValueError("no choices")
    return answer


@dataclass(frozen=True)
class RemoteRewardModel:
    """Scores of texts by a server's process reward model.

    Args:
        server: where; a reward model's end point is beside `/v1`, not below it.
        form: "pooling" (a row of label probabilities at every mark) or "score" (one number).
        mark: what follows each step, such as "<extra_0>".
        delimiter: ends a step.
        render: `(prompt, steps) -> text` for "pooling"; prompt, steps and marks joined by default.
    """

    server: Server
    form: str = "pooling"
    mark: str = "<extra_0>"
    delimiter: str = "\n"
    render: Callable[[str, list[str]], str] | None = None

    def __post_init__(self):
        if self.form not in ("pooling", "score"):
            raise ValueError(f'smcscale: `form` must be "pooling" or "score", got {self.form!r}.')

    async def __call__(self, prompt: str, texts: Sequence[str]) -> np.ndarray:
        """Scores of the newest steps, `(len(texts),)` in [0, 1]."""
        return np.array(await all_of([self._score(prompt, text) for text in texts]))

    async def _score(self, prompt: str, text: str) -> float:
        root = self.server.base_url.rstrip("/").removesuffix("/v1")
        if self.form == "score":
            body = {"text_1": prompt, "text_2": text}
            return await self.server.ask(
                f"{root}/score", body, lambda a: _probability(a["data"][0]["score"])
            )
        steps = split_steps(text, self.delimiter)
        if self.render is not None:
            whole = self.render(prompt, steps)
        else:
            whole = prompt + "".join(step + self.mark for step in steps)

        def check(answer: Any) -> float:
            rows = answer["data"][0]["data"]
            if len(rows) != len(steps):
                raise ValueError(f"{len(rows)} scores for {len(steps)} steps")
            return _probability(rows[-1][-1])

        return await self.server.ask(f"{root}/pooling", {"input": whole}, check)


def _probability(value: Any) -> float:
    # a failed call is an error, never a score of zero
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"a score of {value!r} is no probability")
    return float(value)


def split_steps(text: str, delimiter: str) -> list[str]:
    """Steps of a text, without their delimiters."""
    return text.removesuffix(delimiter).split(delimiter)


async def all_of(awaitables: list) -> list:
    """All results, in order; the first failure cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(a) for a in awaitables]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
