"""Patterns against `re.fullmatch`; token automata against every sequence of tokens, brute force."""

import functools
import itertools
import random
import re
from importlib.resources import files

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from smcscale.models.reasoning import automaton as automata
from smcscale.models.reasoning.automaton import (
    TokenAutomaton,
    Vocabulary,
    both,
    from_regex,
    token_bytes,
    vocabulary_of,
)
from smcscale.models.reasoning.regex import byte_automaton
from smcscale.models.reasoning.tokenizer import Tokenizer

END = 0
#: end, letters, a token of two, the two halves of an e with an accent, one that ends within, special
PIECES = [None, b"a", b"ab", b"b", b"\xc3", b"\xa9", b"\xa9a", None]
PLAIN = Vocabulary([PIECES], np.zeros(len(PIECES), np.int32), (END,))
LONGEST = 5


def matches(pattern: str, text: bytes) -> bool:
    try:
        return re.fullmatch(pattern, text.decode(), re.ASCII) is not None
    except UnicodeDecodeError:
        return False


# ---- patterns

PATTERNS = [
    "", "a|b*c", "(a*|b)c", "(ab?)*", "(a|ab)(c|bcd)(d*)", r"[^a-z]\d{2,3}x?", "(?:é|[α-ω])+.",
    r"\W\w\s", r"\S\D\W?", "(a*)*b{0,2}", r"[\s\S]{3}", "a+?b{2,}?", "(a|b)*a(a|b){3}", r"[]\-a]+",
    r"\.\*\n|\x41\u00e9", "[^\\d\\s]{2}", "x{3}|y{0}", "(?P<name>a)(?:b|)", "a{,2}b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_re_does(pattern):
    rng = random.Random(0)
    found = byte_automaton(pattern)
    for number in range(4000):
        letters = "abcdxyA]-.*0123 \n_éα\U0001f600\u0800"[: 4 if number % 2 else None]
        text = "".join(rng.choices(letters, k=rng.randint(0, 6)))
        assert found.accepts(text) == matches(pattern, text.encode()), text


SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]


def patterns():
    item = st.sampled_from(
        [
            "a",
            "b",
            "c",
            "é",
            ".",
            r"\d",
            r"\w",
            r"\s",
            r"\W",
            r"\D",
            "[a-b]",
            "[^a]",
            r"[^\w]",
            "[é-ω0]",
        ]
    )

    def grown(inner):
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?"])).map(
                "(?:{0[0]}){0[1]}".format
            ),
        )

    return st.recursive(item, grown, max_leaves=6)


@hypothesis.settings(max_examples=150, suppress_health_check=SLOW)
@hypothesis.given(patterns(), st.data())
def test_any_pattern_matches_as_re_does(pattern, data):
    found = byte_automaton(pattern)
    made = st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)
    assert found.accepts(data.draw(made.filter(lambda text: len(text) < 30)))
    for text in data.draw(st.lists(st.text("abcé0", max_size=5), min_size=20, max_size=20)):
        assert found.accepts(text) == matches(pattern, text.encode()), (pattern, text)


def test_code_points_become_their_bytes():
    ranges = [(0x70, 0x900), (0x7FF, 0x800), (0xD000, 0x10005), (0x1234, 0x23456), (0, 0x10FFFF)]
    edges = {0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF}
    edges |= {x + d for pair in ranges for x in pair for d in (-1, 0, 1)}
    points = sorted((edges | set(range(0, 0x110000, 397))) - set(range(0xD800, 0xE000)))
    for low, high in ranges:
        found = byte_automaton(f"[{re.escape(chr(low))}-{re.escape(chr(high))}]")
        for point in points:
            if 0 <= point <= 0x10FFFF:
                assert found.accepts(chr(point)) == (low <= point <= high), hex(point)
        assert not found.accepts(b"\xed\xa0\x80")  # half of a surrogate pair is no character


@pytest.mark.parametrize(
    ("pattern", "states"),
    [("(a|b)*a(a|b){3}", 16), ("(ab?)*", 2), ("a?b?c?", 4), ("", 1), ("a(b|c)d|ebd|ecd", 4)],
)
def test_automata_are_minimal(pattern, states):
    assert len(byte_automaton(pattern).accepting) == states


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("^a", "anchor"), ("a$", "anchor"), (r"\ba", "anchor"), (r"(a)\1", "back-reference"),
        ("(?=a)b", "look-around"), ("(?<!a)b", "look-around"), ("(a)?(?(1)b)", "conditional"),
        ("(?>a)", "atomic"), ("a*+", "possessive"), ("(?i)a", "inline flags"),
        ("(?i:a)b", "inline flags"),
    ],
)  # fmt: skip
def test_what_is_no_regular_language_is_refused_by_name(pattern, name):
    with pytest.raises(NotImplementedError, match=name):
        byte_automaton(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"), (r"[^\s\S]", "no text matches"),
        ("(a|b)*a(a|b){15}", "more than 20000 states"), ("(a{100}){300}", "more than 20000"),
    ],
)  # fmt: skip
def test_patterns_that_make_no_automaton_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        byte_automaton(pattern)


# ---- tokens


@functools.cache
def sequences(size: int = len(PIECES)) -> list[tuple[int, ...]]:
    """All texts of at most `LONGEST` tokens, ended by the end token or cut off."""
    found = []
    for length in range(LONGEST + 1):
        for body in itertools.product(range(1, size), repeat=length):
            found.append(body)
            if length < LONGEST:
                found.append((*body, END))
    return found


def brute(pattern: str, tokens: tuple[int, ...]) -> bool:
    body = [token for token in tokens if token != END]
    pieces = [PIECES[token] for token in body]
    return all(pieces) and matches(pattern, b"".join(piece or b"" for piece in pieces))


@pytest.mark.parametrize("pattern", ["(ab)*é?a?", "[^a]b*", ".{2}", "aab|é", "(éa|b)+"])
def test_tokens_are_accepted_as_their_text_is(pattern):
    found = from_regex(pattern, PLAIN)
    accepted = {tokens for tokens in sequences() if brute(pattern, tokens)}
    assert {tokens for tokens in sequences() if found.accepts(tokens)} == accepted
    # a token is allowed exactly if some text that is left room for begins with it
    prefixes: dict[tuple, set] = {}
    for tokens in accepted:
        for place, token in enumerate(tokens):
            prefixes.setdefault(tokens[:place], set()).add(token)
    allowed = jax.jit(jax.vmap(found.allowed))
    read = jax.jit(jax.vmap(found.read, in_axes=(None, 0, 0)))
    keys = sorted(prefixes)
    rows = jnp.array([key + (0,) * (LONGEST - len(key)) for key in keys], jnp.int32)
    lengths = jnp.array([len(key) for key in keys])
    states = read(0, rows, lengths)
    assert (states >= 0).all()
    masks = np.asarray(allowed(states, LONGEST - 1 - lengths))
    for key, mask in zip(keys, masks, strict=True):
        assert set(np.flatnonzero(mask).tolist()) == prefixes[key], key


def test_reading_stops_for_ever_at_a_forbidden_token():
    found = from_regex("(ab)*", PLAIN)
    tokens = jnp.array([2, 3, 3, 2], jnp.int32)  # ab, then b; the last row allows another b
    state, counts = jnp.zeros((), jnp.int32), jnp.arange(5)
    read = jax.vmap(found.read, in_axes=(None, None, 0))
    np.testing.assert_array_equal(read(state, tokens, counts), [0, 0, -1, -1, -1])
    assert not found.allowed(jnp.asarray(-1), jnp.asarray(9)).any()
    np.testing.assert_array_equal(read(state + 1, tokens[1:], counts[:2]), [1, 0])


def test_states_that_whole_tokens_cannot_leave_are_gone():
    vocabulary = Vocabulary([[None, b"a", b"bc"]], np.zeros(3, np.int32), (0,))
    found = from_regex("ab|abc", vocabulary)  # "ab" cannot be written
    assert found.next_state.shape == (3, 3)
    assert found.accepts([1, 2, 0]) and not found.accepts([1])
    np.testing.assert_array_equal(found.distance, [2, 1, 0])
    with pytest.raises(ValueError, match="no text made of whole tokens"):
        from_regex("ab", vocabulary)


def test_both_is_the_intersection():
    one, other = from_regex("([ab]{2})*é?", PLAIN), from_regex("(ab)*a?.?.?", PLAIN)
    found = both(one, other)
    for tokens in sequences():
        assert found.accepts(tokens) == (one.accepts(tokens) and other.accepts(tokens))
    with pytest.raises(ValueError, match="no text made of whole tokens matches both"):
        both(from_regex("a+", PLAIN), from_regex("b+", PLAIN))
    with pytest.raises(ValueError, match="other vocabularies"):
        both(one, from_regex("a", Vocabulary([[None, b"a"]], np.zeros(2, np.int32), (0,))))


def test_a_table_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="needs more than `limit` 100 bytes"):
        from_regex("(ab){3}", PLAIN, limit=100)
    with pytest.raises(ValueError, match="needs more than `limit` 100 bytes"):
        both(from_regex("(ab){3}", PLAIN), from_regex("[ab]*", PLAIN), limit=100)


def test_an_automaton_is_a_pytree_of_arrays():
    found = from_regex("(ab)*", PLAIN)
    leaves, structure = jax.tree.flatten(found)
    assert [leaf.dtype for leaf in leaves] == [jnp.int32, jnp.bool_, jnp.int32]
    assert isinstance(jax.tree.unflatten(structure, leaves), TokenAutomaton)


# ---- tokenizers


@functools.cache
def shipped() -> Tokenizer:
    """Whole words: what a token adds depends on the one before it."""
    path = str(files("smcscale.models.pretrained") / "reasoner" / "tokenizer.json")
    return Tokenizer.from_file(path, (2,))


@functools.cache
def byte_level() -> Tokenizer:
    """As GPT-2's and Qwen's, trained on little, so that characters fall apart into bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    texts = [
        "Ana has 12 apples and 3 élans\n",
        "naïve café 😀 😃 déjà",
        '{"answer": 42, "ok": true}',
    ]
    backend.train_from_iterator(texts * 5, trainer)
    backend.add_tokens(["<|mark|>"])
    return Tokenizer(backend, end_tokens=(0,))


@functools.cache
def with_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2's: spaces are marks, unknown characters bytes, a text's first space is dropped."""
    words = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "▁a", "▁b", "▁▁", "ab", "é", "1", "2"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip)
    first = [normalizers.Prepend("▁")] * strip
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<unk>", "<end>"])
    return Tokenizer(backend, end_tokens=(1,))


CASES = [  # tokenizer, pattern, texts that match
    (shipped, r"[A-Z][a-z]+ has \d{1,3} [a-z]+\.\n", ["Ana has 12 apples.\n"]),
    (shipped, r"(Answer: \d+\n?)+|\d+ [+*-] \d+ = \d+\n", ["12 + 3 = 15\n", "Answer: 4\n"]),
    (byte_level, r"[A-Z]\w+ has \d+ [a-z]+ and \d élans?\n?", ["Ana has 12 apples and 3 élans\n"]),
    (byte_level, "(.😀 ?|😃|caf[é-ü]|na.ve)+", ["café 😀", "naïve", "😃😀", "é😀"]),
    (byte_level, r'\{"answer": -?\d+(, "ok": (true|false))?\}', ['{"answer": 42, "ok": true}']),
    (with_fallback, " ?a( a|b)*.?", ["a abbé", " a a€", "aba"]),
    (lambda: with_fallback(False), " ?a( a|b)*.?", ["a abbé", " a a€", "aba"]),
]


def random_texts(found: TokenAutomaton, number: int, seed: int) -> list[list[int]]:
    """Sequences drawn from the tokens that an automaton allows, of at most 40."""
    rng = np.random.default_rng(seed)
    table, distance = np.asarray(found.next_state), np.asarray(found.distance)
    texts = []
    for _ in range(number):
        state, tokens = 0, []
        while len(tokens) < 40 and not (tokens and tokens[-1] in found.end_tokens):
            after = table[state]
            token = int(
                rng.choice(np.flatnonzero((after >= 0) & (distance[after] < 40 - len(tokens))))
            )
            tokens.append(token)
            state = table[state, token]
        texts.append(tokens)
    return texts


@pytest.mark.parametrize("case", range(len(CASES)))
def test_tokenizers_agree_with_their_own_text(case):
    make, pattern, _ = CASES[case]
    tokenizer = make()
    vocabulary = vocabulary_of(tokenizer, tokenizer.vocabulary_size + 3)  # a wider model
    found = from_regex(pattern, vocabulary)
    assert found.next_state.shape[1] == tokenizer.vocabulary_size + 3
    rng = np.random.default_rng(case)
    allowed = random_texts(found, 150, case)
    usable = [t for t, piece in enumerate(vocabulary.pieces[-1]) if piece]
    tried, agreed = [], 0
    for tokens in allowed:
        assert found.accepts(tokens)
        text = token_bytes(vocabulary, tokens).decode()
        assert text == tokenizer.decode(tokens)
        assert re.fullmatch(pattern, text, re.ASCII)
        for _ in range(20):  # and texts that are nearly as good
            other = list(tokens)
            place = int(rng.integers(len(other)))
            change = [[], [int(rng.choice(usable))], other[place : place + 1] * 2]
            other[place : place + 1] = change[int(rng.integers(3))]
            if not any(t in tokenizer.end_tokens for t in other[:-1]):
                tried.append(other)
    for tokens in tried:
        wanted = matches(pattern, token_bytes(vocabulary, tokens))
        assert found.accepts(tokens) == wanted, tokens
        if wanted:
            assert re.fullmatch(pattern, tokenizer.decode(tokens), re.ASCII)
            agreed += 1
    assert 20 < agreed < len(tried) - 20


@pytest.mark.parametrize("case", range(len(CASES)))
def test_texts_as_the_tokenizer_writes_them_are_accepted(case):
    make, pattern, texts = CASES[case]
    tokenizer = make()
    found = from_regex(pattern, vocabulary_of(tokenizer))
    for text in texts:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and re.fullmatch(pattern, text, re.ASCII)
        assert found.accepts(tokens) and found.accepts([*tokens, *tokenizer.end_tokens])
        assert not found.accepts([*tokenizer.end_tokens, *tokens])


def test_every_pair_of_the_shipped_vocabulary():
    tokenizer = shipped()
    vocabulary = vocabulary_of(tokenizer)
    pattern = r"\d\d|[A-Z]\w* \w+|\w+[.,]|\n\w+"
    found = from_regex(pattern, vocabulary)
    special = {0, 1, 2}
    hits = 0
    for pair in itertools.product(range(tokenizer.vocabulary_size), repeat=2):
        wanted = not special & set(pair) and re.fullmatch(pattern, tokenizer.decode(pair), re.ASCII)
        hits += bool(wanted)
        assert found.accepts(pair) == bool(wanted), pair
    assert hits > 1000


def test_tokenizers_whose_texts_are_no_concatenation_are_refused(monkeypatch):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(), decoders.Fuse(), decoders.Replace("a b", "c")]
    )
    with pytest.raises(NotImplementedError, match="changes the one before"):
        vocabulary_of(Tokenizer(backend, (2,)))
    backend.decoder = decoders.Sequence(  # three in a row, which no pair shows
        [decoders.WordPiece(), decoders.Fuse(), decoders.Replace(Regex("(?<=c c) c"), "x")]
    )
    with pytest.raises(NotImplementedError, match="not put together token by token"):
        vocabulary_of(Tokenizer(backend, (0,)))
    monkeypatch.setattr(automata, "MEASURED", 10)
    with pytest.raises(NotImplementedError, match="128 tokens"):
        vocabulary_of(shipped())
