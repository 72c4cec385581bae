"""A language model and a reward model behind a server, run by the same particle filter.

    lm = connect("http://127.0.0.1:8000/v1", "my-model")       asks what the server can
    program = remote_reason(lm, judge, prompt, max_steps=12)   a host `FeynmanKac`
    smc = SMC(ParticleFilter(program), num_particles=16)
    smc.run(key, num_steps=12)
    texts_of(smc)                                              what the particles wrote

`judge` is a `ProcessRewardModel`, a `RemoteRewardModel`, or any `(prompt, texts) -> scores`, also
`async`.

Prompts are rendered here and sent to `/completions`; chat end points add templates of their own and
cannot go on with a text. The state of a particle on the device is a number, its text stays on the
host, so resampling moves numbers. Particles with equal texts share one request where the server
gives several answers to one. All requests of a row are in flight together.

A step ends at the delimiter. Whether a text stopped there or is finished must be known for sure: a
server that names its stop string (`stop_reason`, vLLM; `matched_stop`, SGLang) is told to stop; from
any other the step is cut out of what it writes, which costs the tokens after the cut.

| server | n | names the stop string | its own sampling defaults to switch off by `options` |
|---|---|---|---|
| vLLM, SGLang | yes | yes | the model's generation_config (`top_k`, `top_p`, `repetition_penalty`) |
| llama.cpp | no | no | `{"top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}` |
| transformers serve | no | no | the model's generation_config |
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale.engine.host import wait_for
from smcscale.feynman_kac import Capabilities, FeynmanKac
from smcscale.models.reasoning.potentials import Potential, difference
from smcscale.models.reasoning.program import Tally, tallied
from smcscale.models.reasoning.reward_model import ProcessRewardModel
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
        prompt: text of the two trial requests.
        delimiter, step_tokens, temperature, options: see `RemoteLanguageModel`.
        **server_options: further arguments of `Server`, such as `timeout` and `journal`.
    Raises:
        RemoteError: nobody answers; or the server counts no tokens.
    """
    if isinstance(base_url, Server):
        server = base_url
    elif model is None:
        raise ValueError('smcscale: connect() needs the model\'s name.\n  try: model="...".')
    else:
        server = Server(base_url, model, **server_options)
    body = {"prompt": prompt, "max_tokens": 4, "temperature": temperature, **(options or {})}

    def asked(**fields: Any) -> dict[str, Any]:
        return wait_for(server.ask("completions", {**body, **fields}, _with_choices))

    answer = asked(stop=[delimiter])
    if not isinstance((answer.get("usage") or {}).get("completion_tokens"), int):
        raise RemoteError(
            "smcscale: the server does not count tokens (`usage` is missing), so that no budget "
            "can be kept.\n  try: a server that returns `usage`."
        )
    choice = answer["choices"][0]
    try:
        number = len(asked(n=2)["choices"])
    except RemoteError:  # refused
        number = 1
    return RemoteLanguageModel(
        server,
        Abilities(number == 2, "stop_reason" in choice or "matched_stop" in choice),
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
        return np.array(await _all([self._score(prompt, text) for text in texts]))

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


class RemoteState(NamedTuple):
    """One particle, or `(M,)` of them.

    Attributes:
        text: number of its text in the table of the run.
        score: of the newest step; 1 before the first.
        tally: of the scores.
        finished: the end of the text was written.
    """

    text: Any
    score: Any
    tally: Tally
    finished: Any


def _nothing_written(key: Array) -> RemoteState:
    one, zero = jnp.ones(()), jnp.zeros((), jnp.int32)
    return RemoteState(zero, one, Tally(one, one, zero), jnp.zeros((), bool))


def _kept(state: RemoteState) -> dict[str, Array]:
    return {"text": state.text, "score": state.score}


class Writing:
    """The transition of a remote run: writes a step of every text and has it judged.

    Attributes:
        texts: the run's table; a state's `text` is an index into it, 0 the empty text.
        tokens, prompt_tokens: what each text's newest step cost.
    """

    def __init__(
        self, lm: RemoteLanguageModel, judge: Callable[..., Any], prompt: str, rule: Potential
    ):
        self.lm, self.judge, self.prompt, self.rule = lm, judge, prompt, rule
        self.texts = [""]
        self.tokens, self.prompt_tokens = [0.0], [0.0]

    async def __call__(self, keys: Array, previous: RemoteState, row: Any) -> RemoteState:
        """States `(M,)` after one more step; finished ones stay as they are."""
        before, over = np.asarray(previous.text), np.asarray(previous.finished)
        seeds = np.asarray(jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32))(keys)) >> 1
        groups: dict[int, list[int]] = {}
        for place in np.flatnonzero(~over):
            key = int(before[place]) if self.lm.abilities.several else len(groups)
            groups.setdefault(key, []).append(int(place))
        answers = await _all(
            [
                self.lm.write(
                    self.prompt + self.texts[before[g[0]]], int(seeds[g[0]]), copies=len(g)
                )
                for g in groups.values()
            ]
        )
        text, finished = before.copy(), over.copy()
        for places, completions in zip(groups.values(), answers, strict=True):
            for place, step in zip(places, completions, strict=True):
                text[place] = len(self.texts)
                finished[place] = step.finished
                self.texts.append(self.texts[before[place]] + step.text)
                self.tokens.append(step.tokens)
                self.prompt_tokens.append(step.prompt_tokens)
        return await self._judged(previous, text, finished, ~over)

    async def _judged(
        self, previous: RemoteState, text: np.ndarray, finished: np.ndarray, new: np.ndarray
    ) -> RemoteState:
        """The states with their newest steps judged; equal texts are judged once."""
        different = sorted({self.texts[i] for i in text[new]})
        scores = np.array(previous.score)
        if different:
            found = self.judge(self.prompt, different)
            found = np.asarray(await found if inspect.isawaitable(found) else found, float)
            if found.shape != (len(different),):
                raise TypeError(
                    f"smcscale: the reward of {len(different)} texts has shape {found.shape}.\n"
                    "  try: `(prompt, texts) -> (len(texts),)`."
                )
            told = dict(zip(different, found, strict=True))
            scores[new] = [told[self.texts[i]] for i in text[new]]
        return RemoteState(text, scores, _tallied(self.rule, previous.tally, scores, new), finished)

    def cost(self, previous: RemoteState, state: RemoteState, row: Any) -> dict[str, np.ndarray]:
        """Tokens written and read for the newest steps, `(M,)` each."""
        text = np.asarray(state.text)
        new = text != np.asarray(previous.text)
        return {
            "tokens": np.where(new, np.asarray(self.tokens)[text], 0.0),
            "prompt_tokens": np.where(new, np.asarray(self.prompt_tokens)[text], 0.0),
        }


@functools.partial(jax.jit, static_argnums=0)
def _tallied(rule: Potential, tally: Tally, scores: Array, new: Array) -> Tally:
    return jax.vmap(lambda t, s, n: tallied(t, rule, s, n))(tally, jnp.asarray(scores), new)


@functools.partial(jax.jit, static_argnums=0)
def _weights(rule: Potential, tally: Tally) -> Array:
    return jax.vmap(lambda t: rule(t.previous, t.aggregate))(tally)


def remote_reason(
    lm: RemoteLanguageModel,
    judge: Any,
    prompt: str,
    *,
    max_steps: int,
    potential: Callable[..., Any] = difference,
    finished: str = "absorb",
    unfinished: str = "keep",
) -> FeynmanKac:
    """The program `reason` for a model behind a server, as a host `FeynmanKac`.

    Args:
        lm: writes.
        judge: `ProcessRewardModel`, `RemoteRewardModel`, or `(prompt, texts) -> scores` in [0, 1]
            of the newest steps, `(len(texts),)`; may be `async`.
        prompt: text, as the model is to read it.
        max_steps: rows of the run, `SMC.run(key, num_steps=max_steps)`.
        potential, finished, unfinished: as in `reason`; the targets are the same.
    Raises:
        TypeError, ValueError: by argument name.
    """
    if finished not in ("absorb", "reweigh") or unfinished not in ("keep", "drop") or max_steps < 1:
        raise ValueError(
            f"smcscale: finished={finished!r}, unfinished={unfinished!r}, max_steps={max_steps}: "
            'finished is "absorb" or "reweigh", unfinished "keep" or "drop", max_steps at least 1.'
        )
    if not prompt:
        raise ValueError("smcscale: the prompt is empty; a text starts from at least a token.")
    rule = potential if isinstance(potential, Potential) else Potential(potential)
    if isinstance(judge, ProcessRewardModel):
        judge = functools.partial(_judged_here, judge, lm.delimiter)
    elif not callable(judge):
        raise TypeError(
            f"smcscale: `judge` must be a reward model or a function, got {type(judge).__name__}."
        )
    writing = Writing(lm, judge, prompt, rule)

    def log_potential(previous: RemoteState, state: RemoteState, row: Any) -> np.ndarray:
        over, done = np.asarray(previous.finished), np.asarray(state.finished)
        weights = np.array(_weights(rule, state.tally))
        if finished == "absorb":
            weights = np.where(over, 0.0, weights)
        if unfinished == "drop":
            cut = ~done & (np.asarray(state.tally.steps) == max_steps)
            weights = np.where(cut, -np.inf, weights)
        return weights

    return FeynmanKac(
        _nothing_written,
        writing,
        log_potential,
        capabilities=Capabilities(host=True, differentiable=False),
        record=_kept,
        cost=writing.cost,
    )


def _judged_here(
    prm: ProcessRewardModel, delimiter: str, prompt: str, texts: Sequence[str]
) -> np.ndarray:
    """Scores by a reward model on this machine, whole texts at once."""
    return np.array([float(prm.score(prompt, split_steps(t, delimiter))[-1]) for t in texts])


async def _all(awaitables: list) -> list:
    """All results, in order; the first failure cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(a) for a in awaitables]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def texts_of(smc: Any) -> list[str]:
    """What each particle of a finished remote run wrote, runs one after the other."""
    table = smc.algorithm.program.transition.texts
    samples, _ = smc.get_samples(weighted=True)
    return [table[i] for i in np.asarray(samples["text"]).reshape(-1)]
