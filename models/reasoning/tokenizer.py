"""Text to tokens and back, by the `tokenizers` library.

`Tokenizer.from_file(path)` reads any `tokenizer.json`; `word_level(words)` makes the small
vocabulary of the shipped model (whole words, single digits, the newline a token of its own).
`Tokenizer.ends_step()` is the vocabulary mask that ends a step of reasoning: every token that
contains the delimiter, and the end token.  `Tokenizer.encode_chat(messages)` writes a conversation by
the template in `chat.py`; special tokens in untrusted messages stay text.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from smcscale.models.reasoning.chat import MARK, ChatTemplate, Escape

#: stand for special tokens, one code point each, in a private area; taken out of all messages
_STANDINS = 0x10F000


class Tokenizer:
    """A tokenizer with the few things that decoding needs.

    Equal by content, so that two loads of one file share compiled programs.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        end_tokens: Sequence[int],
        template: ChatTemplate | None = None,
    ):
        self._backend = backend
        self.end_tokens = tuple(end_tokens)
        self.template = template
        self._content = backend.to_str()

    @classmethod
    def from_file(
        cls, path: str | Path, end_tokens: Sequence[int], template: ChatTemplate | None = None
    ) -> "Tokenizer":
        """Read `tokenizer.json`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"smcscale: {path} does not exist; a model folder needs it.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"smcscale: {path} is not a tokenizer.json ({error}).") from error
        return cls(backend, end_tokens, template)

    @property
    def _value(self) -> tuple:
        return self._content, self.end_tokens, self.template

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def within(self, other: "Tokenizer") -> bool:
        """Whether every token of this vocabulary has the same id in the other one."""
        if self == other:
            return True
        return self._backend.get_vocab().items() <= other._backend.get_vocab().items()

    @property
    def vocabulary_size(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins one, after the tokens that its model expects first (BOS).

        They come from the tokenizer's own post-processor, unless the text begins with them.
        """
        plain, whole = self.encode(text), self._backend.encode(text, add_special_tokens=True)
        marked = zip(whole.ids, whole.special_tokens_mask, strict=True)
        first = [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)]
        return plain if plain[: len(first)] == first else first + plain

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as the chat template writes it; see `ChatTemplate.render`.

        Raises:
            ValueError: there is no template.
        """
        if self.template is None:
            raise ValueError(
                "smcscale: this model has no chat template.\n  try: a folder whose "
                "tokenizer_config.json has one, or write the prompt as the model expects it."
            )
        return self.template.render(messages, add_generation_prompt, **variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        trusted: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: such as `[{"role": "user", "content": "..."}]`.
            add_generation_prompt: end with the opening of the model's turn.
            trusted: special tokens in the messages and variables count too; else they are text,
                and only those that the template writes, or makes of a role, count.
            **variables: further ones for the template.
        Raises:
            ValueError: there is no template, or it fails.
        """
        if trusted or self.template is None:
            return self.encode(self.chat_text(messages, add_generation_prompt, **variables))
        special, literal, real = self._apart
        escape = Escape(special, self.template.literals())
        gone = dict.fromkeys(map(ord, special.values()))
        text = self.chat_text(
            messages, add_generation_prompt, **variables,
            escape=lambda text: escape(text.translate(gone)),
        )  # fmt: skip
        if special:
            longest = sorted(special, key=len, reverse=True)
            pattern = "|".join(re.escape(token) for token in longest)
            text = re.sub(pattern, lambda found: special[found[0]], text)
        ids = literal.encode(text.replace(MARK, ""), add_special_tokens=False).ids
        return [real.get(token, token) for token in ids]

    @functools.cached_property
    def _apart(self) -> tuple[dict[str, str], tokenizers.Tokenizer, dict[int, int]]:
        """Special tokens apart from text that looks like them.

        Returns:
            the stand-in of each special token; a tokenizer that knows the stand-ins, and reads
            special tokens as text; the special token's id for that of each stand-in.
        """
        literal = tokenizers.Tokenizer.from_str(self._content)
        literal.encode_special_tokens = True
        standins, real = {}, {}
        for index, token in sorted(self._backend.get_added_tokens_decoder().items()):
            if token.special and token.content:
                standin = chr(_STANDINS + len(standins))
                standins[token.content] = standin
                literal.add_tokens(
                    [
                        AddedToken(
                            standin, lstrip=token.lstrip, rstrip=token.rstrip,
                            single_word=token.single_word, normalized=False, special=False,
                        )
                    ]
                )  # fmt: skip
                real[literal.get_vocab()[standin]] = index
        return standins, literal, real

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._backend.decode([int(token) for token in tokens])

    def unknown(self, text: str) -> list[str]:
        """Words of a text that a word-level vocabulary does not know."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        unknown = self._backend.token_to_id("[UNK]")
        return [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets) if i == unknown]

    def ends_step(self, delimiter: str = "\n", size: int | None = None) -> np.ndarray:
        """`(size,)` bool: tokens that end a step, those containing `delimiter` and the end tokens.

        `size` is the width of the model's vocabulary where it exceeds the tokenizer's.
        """
        mask = np.zeros(size or self.vocabulary_size, bool)
        for index in range(min(len(mask), self.vocabulary_size)):
            token = self._backend.id_to_token(index)
            mask[index] = token is not None and (
                delimiter in token or delimiter in self._backend.decode([index])
            )
        mask[[token for token in self.end_tokens if token < len(mask)]] = True
        return mask

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        self._backend.save(str(path))


def word_level(words: Iterable[str]) -> Tokenizer:
    """The shipped kind of tokenizer: `[PAD]`, `[UNK]`, `<end>`, newline, digits, then `words`."""
    special = ["[PAD]", "[UNK]", "<end>"]
    vocabulary = [*special, "\n", *"0123456789", *words]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|\d|[^\W\d_]+|[^\w\s]"), behavior="removed", invert=True
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            decoders.Replace(Regex(r" *\n *"), "\n"),
            decoders.Replace(Regex(r" (?=[:;?])"), ""),
        ]
    )
    backend.add_special_tokens(special)
    return Tokenizer(backend, end_tokens=(2,))
