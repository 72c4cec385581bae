"""How a reward model wants a text laid out, and where it says what it thinks: `Form`.

A process reward model judges a step at one token: the step's own last token, or a mark that is
put after it.  A form is a small description by token ids, made from the model's tokenizer:

    prm = ProcessRewardModel.from_pretrained(path, form=math_shepherd)
    ...                               form=functools.partial(rlhflow, template="{prompt} "))

| form | after each step | score |
|---|---|---|
| `token_classification` | nothing, or a separator | head at the step's last token (TRL) |
| `outcome` | nothing, or an end that is taken back | head at the text's last token: a model of whole answers |
| `qwen_math_prm` | `<extra_0>` | two-layer head there |
| `math_shepherd` | ` ки` and a newline | `+` against `-` at the tag |
| `rlhflow` | a turn in which the model says `+` | `+` against `-` one token before that `+` |
| `skywork` | a newline | value head there |

The ids of marks and of `+` and `-` come from the tokenizer; a word that is not one token of it is
refused by name.  Marks are put in by id and steps are tokenised apart, so nothing merges across.

Source: model cards and published scoring code of Qwen2.5-Math-PRM (Zhang et al. 2025),
Math-Shepherd (Wang et al. 2024), RLHFlow (Xiong et al. 2024), Skywork-o1 Open PRM (2024), TRL.
Read next: `reward_model.py`.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from smcscale.models.reasoning import cache
from smcscale.models.reasoning.tokenizer import Tokenizer

ANSWER = re.compile(r"Answer\s*:")
_SPECIAL = re.compile(r"<\|[^|<>]+\|>|<[a-z]+_?\d*>")
_QWEN = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
_LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
_LLAMA_JUDGE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Form(NamedTuple):
    """Layout of a text for a reward model; hashable, so that it can be static under jit.

    Attributes:
        mark: token ids put after each step.
        place: which token is read: 0 the step's last, k the k-th of the mark.
        kept: whether marks stay in the text for later steps; else each is taken back once read.
        trims: tokens that a mark takes the place of, at most one: a step's own newline or end.
        candidates: ids of (good, bad): the score is the share of the first in the language model's
            head; None for models with a head of their own.
        template: the prompt's frame, "{prompt}" in it; None for a prompt that is taken as it is.
    """

    mark: tuple[int, ...] = ()
    place: int = 0
    kept: bool = True
    trims: tuple[int, ...] = ()
    candidates: tuple[int, int] | None = None
    template: str | None = None

    @property
    def whole(self) -> "Form":
        """The form that judges the partial answer as one step with one mark."""
        # nothing after the token that is read can matter
        return self._replace(mark=self.mark[: self.place], kept=not self.place)


#: the step's own last token is read
PLAIN = Form()
MakeForm = Callable[[Tokenizer], Form]


def token_classification(tokenizer: Tokenizer, *, separator: str = "") -> Form:
    """The last token of the step, or a separator put in place of its newline."""
    mark = inside(tokenizer, separator)
    return Form(mark, len(mark), trims=trims(tokenizer) if mark else ())


def outcome(tokenizer: Tokenizer, *, end: str = "", template: str | None = None) -> Form:
    """A model of whole answers, asked about every prefix, which is closed by `end` for that."""
    mark = inside(tokenizer, end)
    return Form(
        mark, len(mark), not mark, trims(tokenizer) if mark else (), template=template
    )  # fmt: skip


def qwen_math_prm(
    tokenizer: Tokenizer, *, step: str = "<extra_0>", template: str | None = _QWEN
) -> Form:
    """Qwen2.5-Math-PRM: the token `step` after each step."""
    _check_special(tokenizer, template)
    mark = (known_token(tokenizer, step),)
    return Form(mark, 1, trims=trims(tokenizer), template=template)


def math_shepherd(
    tokenizer: Tokenizer,
    *,
    step: str = " ки",
    between: str = "\n",
    good: str = "+",
    bad: str = "-",
    template: str | None = "{prompt} ",
) -> Form:
    """Math-Shepherd: the tag `step` after each step, then `between`."""
    _check_special(tokenizer, template)
    candidates = (known_token(tokenizer, good), known_token(tokenizer, bad))
    mark = (known_token(tokenizer, step, continues=True), *inside(tokenizer, between))
    return Form(
        mark, 1, trims=trims(tokenizer), candidates=candidates, template=template
    )  # fmt: skip


def rlhflow(
    tokenizer: Tokenizer,
    *,
    judge: str = _LLAMA_JUDGE,
    writer: str = "<|eot_id|>" + _LLAMA_USER,
    good: str = "+",
    bad: str = "-",
    template: str | None = _LLAMA_USER + "{prompt} ",
) -> Form:
    """RLHFlow: a chat in which the user writes the steps and the model answers `good` to each.

    Args:
        judge: what closes the user's turn and opens the model's.
        writer: what closes the model's turn and opens the user's.
        good, bad: the two answers; each step is read before its own answer, after all others,
            which are `good`.
        template: opens the first turn of the user, who says the question first.
    """
    for text in (judge, writer, template):
        _check_special(tokenizer, text)
    opens = inside(tokenizer, judge)
    candidates = (known_token(tokenizer, good), known_token(tokenizer, bad))
    mark = (*opens, candidates[0], *inside(tokenizer, writer))
    return Form(
        mark, len(opens), trims=trims(tokenizer), candidates=candidates, template=template
    )  # fmt: skip


def skywork(
    tokenizer: Tokenizer, *, separator: str = "\n", template: str | None = "{prompt}\n"
) -> Form:
    """Skywork-o1 Open PRM: the newline after each step."""
    _check_special(tokenizer, template)
    mark = (inside(tokenizer, separator)[-1],)
    return Form(mark, 1, trims=trims(tokenizer), template=template)


class Laid(NamedTuple):
    """Steps of a text as a reward model reads them.

    Attributes:
        tokens: `(rows, S)` int32, padded; one row, or one for each step where marks are taken back.
        row, place: `(num_steps,)`, where each step is read.
        begin: tokens of the prompt.
        ends: `(num_steps,)`, the tokens of a row up to the end of the step, prompt counted.
    """

    tokens: np.ndarray
    row: np.ndarray
    place: np.ndarray
    begin: int
    ends: np.ndarray


def lay_out(
    tokenizer: Tokenizer | None,
    form: Form,
    prompt: str,
    steps: Sequence[str],
    complete: bool | None = None,
    max_length: int | None = None,
) -> Laid:
    """A prompt and steps of text in the layout of a form.

    Args:
        steps: lines of a solution; a missing newline is added.
        complete: whether the last step ends the solution (with the end token in place of the
            newline); by default, whether it says `Answer:`.
        max_length: positions of the model, if it has a limit.
    Raises:
        TypeError: `steps` is a string.
        ValueError: no tokenizer, or a text that exceeds the model's positions.
    """
    if tokenizer is None:
        raise ValueError("smcscale: a reward model without tokenizer cannot read text.")
    if isinstance(steps, str):
        raise TypeError(
            "smcscale: `steps` is one string; prm.score needs a list, one string a step.\n"
            '  try: text.split("\\n").'
        )
    if complete is None:
        complete = bool(steps) and ANSWER.search(steps[-1]) is not None
    so_far = tokenizer.encode_prompt(rendered(form, prompt))
    begin, rows, places, ends = len(so_far), [], [], []
    for number, step in enumerate(steps):
        line = step.rstrip("\n")
        final = complete and number == len(steps) - 1 and tokenizer.end_tokens
        whole = tokenizer.encode(line if final else line + "\n")
        whole += tokenizer.end_tokens[:1] if final else ()
        read = so_far + (tokenizer.encode(line) if form.trims else whole)
        ends.append(len(read))
        places.append(len(read) + form.place - 1)
        read += form.mark
        rows.append(read)
        so_far = read if form.kept else so_far + whole
    if form.kept:
        rows = rows[-1:]
    longest = max(map(len, rows), default=0)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"smcscale: prompt and steps have {longest} tokens, the reward model has "
            f"{max_length} positions."
        )
    tokens = np.zeros((len(rows), cache.bucketed(longest)), np.int32)
    for row, filled in zip(tokens, rows, strict=True):
        row[: len(filled)] = filled
    row = np.zeros(len(steps), np.int32) if form.kept else np.arange(len(steps), dtype=np.int32)
    return Laid(tokens, row, np.array(places, np.int32), begin, np.array(ends, np.int32))


def rendered(form: Form, prompt: str) -> str:
    """A prompt in the form's template.

    Raises:
        ValueError: the prompt is in a chat template already.
    """
    if form.template is None:
        return prompt
    opening = _SPECIAL.match(form.template)
    if opening and prompt.startswith(opening[0]):
        raise ValueError(
            f"smcscale: the prompt begins with {opening[0]!r}, and the reward model's own template "
            "would wrap it once more.\n  try: read_prompt(lm, prm, prompt, question=...) with the "
            "bare question for the reward model, or a form with template=None."
        )
    return form.template.replace("{prompt}", prompt.strip())


def inside(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of a text that continues another."""
    if not text:
        return ()
    # some tokenizers put a space before what begins a text; digits hardly ever merge with others
    for before in "1.":
        ahead, whole = tokenizer.encode(before), tokenizer.encode(before + text)
        if len(whole) > len(ahead) and whole[: len(ahead)] == ahead:
            return tuple(whole[len(ahead) :])
    return tuple(tokenizer.encode(text))


def known_token(tokenizer: Tokenizer, text: str, *, continues: bool = False) -> int:
    """The id of a text that is one token, alone or where it `continues` another."""
    ids = inside(tokenizer, text) if continues else tokenizer.encode(text)
    if len(ids) != 1 or tokenizer.unknown(text):
        raise ValueError(
            f"smcscale: {text!r} is {len(ids)} tokens to this tokenizer, or one it does not know; "
            "a mark must be one token.\n  try: the tokenizer.json of the reward model, or "
            "another `form`."
        )
    return ids[0]


def _check_special(tokenizer: Tokenizer, text: str | None) -> None:
    for piece in _SPECIAL.findall(text or ""):
        known_token(tokenizer, piece)


def trims(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens without words that may end a step: newlines, and special tokens, which have no text."""
    texts = ((index, tokenizer.decode([index])) for index in range(tokenizer.vocabulary_size))
    return tuple(i for i, text in texts if not text or ("\n" in text and not text.strip()))
