"""A conversation as the text that a chat model expects, by the template of its folder.

    template = ChatTemplate.from_folder(path)         None if the folder has none
    text = template.render(messages)                  text, special tokens and all
    text = template.render(messages, escape=escape)   what `escape` makes of every message in it

A template is a Jinja program of the model's author.  It runs in Jinja's immutable sandbox with what
`transformers` gives it (`raise_exception`, `strftime_now`, `tojson`, `break` and `continue`,
`{% generation %}`) and sees plain values only; what it writes is cut off at `LONGEST` characters.  It
can still waste time and memory: read a template from someone you do not trust.

`Escape(special)` is how untrusted messages are kept apart: it puts a mark behind each character in
them that could begin a special token.  Marks survive whatever the template does with a message, so
a special token in the rendered text without one was written by the template.  Strings that the
template itself looks for (such as `</think>`) are left whole.

Source: the interface of `transformers.apply_chat_template`, held to it by tests.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from smcscale.models.parameters import read_json

#: characters that a template may write, and read
LONGEST = 4_000_000
#: a code point that Unicode keeps free of characters; taken out of what was rendered
MARK = "\ufdd0"
_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it names.

    Attributes:
        source: the Jinja program.
        names: `(("bos_token", "<s>"), ...)`, variables of the program.
    """

    source: str
    names: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_folder(cls, path: str | Path) -> "ChatTemplate | None":
        """The template of a model folder: `chat_template.jinja`, else in `tokenizer_config.json`.

        Of several named ones the one called "default".

        Raises:
            ValueError: broken JSON, or a template that is no text.
        """
        path = Path(path)
        config, alone = path / "tokenizer_config.json", path / "chat_template.jinja"
        raw = read_json(config) if config.is_file() else {}
        source = raw.get("chat_template")
        if alone.is_file():
            source = alone.read_text(encoding="utf-8")
        elif isinstance(source, list):
            named = {each.get("name"): each.get("template") for each in source}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(  # noqa: TRY004 (the file is wrong, not the argument's type)
                f"smcscale: the chat template in {config} is no text."
            )
        tokens = {name: raw.get(name) for name in _NAMED}
        tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
        return cls(source, tuple((k, v) for k, v in tokens.items() if isinstance(v, str)))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        escape: Callable[[str], str] = str,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: dictionaries with "role" and "content", and what else the template knows.
            add_generation_prompt: end with the opening of the model's turn.
            escape: applied to every string in the messages and variables but the messages' roles.
            **variables: such as `tools`, `documents`, `enable_thinking`.
        Raises:
            ImportError: Jinja is not installed.
            TypeError: messages that are no list of dictionaries.
            ValueError: the template is broken, refuses these messages, or writes too much.
        """
        if isinstance(messages, (str, Mapping)) or not all(
            isinstance(message, Mapping) for message in messages
        ):
            raise TypeError(
                "smcscale: messages must be a list of dictionaries.\n"
                '  try: [{"role": "user", "content": "..."}].'
            )
        given = {
            **dict(self.names),
            "tools": None,
            "documents": None,
            **{name: _plain(value, escape) for name, value in variables.items()},
            "messages": [_message(message, escape) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        template, pieces, length = _compiled(self.source), [], 0
        try:
            for piece in template.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise ValueError(f"it writes more than {LONGEST} characters")
        except Exception as error:  # a template can fail in any way a program can
            raise ValueError(
                f"smcscale: the chat template failed on these messages: {error}.\n"
                "  try: roles in the order it knows (user, assistant, user, ...), each with content."
            ) from error
        return "".join(pieces)

    def literals(self) -> frozenset[str]:
        """The strings that the program compares with, splits at, or writes by an expression."""
        from jinja2 import nodes

        constants = _environment().parse(self.source).find_all(nodes.Const)
        return frozenset(c.value for c in constants if isinstance(c.value, str))


class Escape:
    """Puts `MARK` behind every character of a text that could begin one of some tokens."""

    def __init__(self, special: Iterable[str], kept: Iterable[str] = ()):
        """Which tokens, and which strings to leave whole.

        Args:
            special: texts of the tokens.
            kept: strings that the template looks for; those that could be part of a special token
                are marked all the same.
        """
        special = sorted(set(special))
        first = {token[0] for token in special}
        whole = [
            text
            for text in sorted(kept, key=len, reverse=True)
            if first & set(text) and not any(_entangled(text, token) for token in special)
        ]
        parts = [*map(re.escape, whole), f"([{re.escape(''.join(sorted(first)))}])"]
        self._pattern = re.compile("|".join(parts)) if special else None

    def __call__(self, text: str) -> str:
        """The text with its marks."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda m: m[0] + MARK if m[1] else m[0], text)


def _entangled(text: str, token: str) -> bool:
    """Whether a special token could begin inside a text, or the text lie inside the token."""
    ends = any(token.startswith(text[i:]) for i in range(len(text)))
    return ends or token in text or text in token


def _plain(value: Any, escape: Callable[[str], str]) -> Any:
    """A value rebuilt from JSON's types, so that a template meets no object with methods."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return escape(str(value))
    if isinstance(value, Mapping):
        names = {name: str(name) for name in value}  # a template asks for most of them by name
        names = {
            name: text if text.isidentifier() else escape(text) for name, text in names.items()
        }
        return {names[name]: _plain(item, escape) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, escape) for item in value]
    raise TypeError(
        f"smcscale: a message holds a {type(value).__name__}; a chat template reads text, numbers, "
        "lists and dictionaries."
    )


def _message(message: Mapping[str, Any], escape: Callable[[str], str]) -> dict[str, Any]:
    """A message for the template; its role is the caller's word, not the writer's."""
    role = {"role": str(message["role"])} if "role" in message else {}
    return _plain(message, escape) | role


@cache
def _environment() -> Any:
    """Jinja's sandbox with the functions that chat templates expect."""
    try:
        from jinja2 import TemplateError, ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "smcscale: chat templates need Jinja.\n  try: pip install 'jinja2>=3.1.6'."
        ) from error

    class Generation(ext.Extension):
        """`{% generation %}`, which marks the model's turns for training: its body as it is."""

        tags = {"generation"}  # noqa: RUF012  as in Jinja

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses the operators by which one short line makes a huge value."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            size = max((len(x) for x in (left, right) if hasattr(x, "__len__")), default=0)
            times = max((abs(x) for x in (left, right) if isinstance(x, int)), default=0)
            if size * times > LONGEST or (operator == "**" and times > 1000):
                raise TemplateError(f"{operator} makes too large a value")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes what HTML does not like
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del made.globals["lipsum"]
    return made


@cache
def _compiled(source: str) -> Any:
    """The program, ready to run.

    Raises:
        ValueError: it is no Jinja program, or too long.
    """
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    if len(source) > LONGEST:
        raise ValueError(f"smcscale: the chat template has more than {LONGEST} characters.")
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"smcscale: the chat template is broken at line {error.lineno}: {error.message}.\n"
            "  try: the `chat_template` of the model's own tokenizer_config.json."
        ) from error
