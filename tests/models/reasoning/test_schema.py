"""JSON schemas: what matches is valid JSON of the schema, and what we know to be valid matches."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from smcscale.models.reasoning.automaton import Vocabulary, from_regex
from smcscale.models.reasoning.regex import byte_automaton
from smcscale.models.reasoning.schema import schema_regex

NESTED = {
    "title": "A solution",
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "maxLength": 4},
                    "ok": {"type": "boolean"},
                },
                "required": ["text"],
            },
        },
        "answer": {"type": "integer", "minimum": -12, "exclusiveMaximum": 345},
        "unit": {"enum": ["apples", 'a "b"', None, 3]},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}
BYTES = Vocabulary([[*(bytes([b]) for b in range(256)), None]], np.zeros(257, np.int32), (256,))
SCHEMAS = [
    NESTED,
    {"type": "string", "minLength": 1, "maxLength": 3},
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": ["boolean", "null", "integer"], "minimum": 0},
    {"const": {"a": [1, 2.5, "x+y"], "b": {}}},
    {"type": "string", "enum": ["(a|b)*", "é\n", 3]},
    {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": -3}]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}},
    {"type": "object", "properties": {n: {"type": "null"} for n in "abcd"}, "required": ["c"]},
    {"type": "object"},
]  # fmt: skip


def random_texts(pattern: str, number: int, rng: random.Random) -> list[str]:
    """Texts drawn byte by byte from what a pattern allows, soon on the way to an end."""
    found = from_regex(pattern, BYTES)
    table, distance = np.asarray(found.next_state), np.asarray(found.distance)
    longest = int(distance[0]) + 40
    texts = []
    for _ in range(number):
        state, text = 0, []
        while True:
            after = table[state, :256]
            left = longest - len(text) - 1
            choices = np.flatnonzero((after >= 0) & (distance[after] <= left)).tolist()
            if not choices or (distance[state] == 0 and rng.random() < 0.3):
                break
            text.append(rng.choice(choices))
            state = int(after[text[-1]])
        texts.append(bytes(text).decode())
    return texts


def instance(schema: dict, rng: random.Random):
    """Some value of a schema, properties in order."""
    for name in ("enum", "anyOf"):
        if name in schema:
            chosen = rng.choice(
                [v for v in schema[name] if schema.get("type") != "string" or v != 3]
            )
            return instance(chosen, rng) if name == "anyOf" else chosen
    if "const" in schema:
        return schema["const"]
    kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    if kind == "object":
        required = schema.get("required", ())
        return {
            name: instance(value, rng)
            for name, value in schema.get("properties", {}).items()
            if name in required or rng.random() < 0.5
        }
    if kind == "array":
        least = schema.get("minItems", 0)
        count = rng.randint(least, schema.get("maxItems", least + 3))
        return [instance(schema["items"], rng) for _ in range(count)]
    if kind == "string":
        least = schema.get("minLength", 0)
        count = rng.randint(least, schema.get("maxLength", least + 5))
        return "".join(rng.choices('ab"\\/\n\x01é€😀\u2028\x7f', k=count))
    if kind == "integer":
        low = schema.get("minimum", -2000)
        return rng.randint(
            low, min(schema.get("maximum", 2000), schema.get("exclusiveMaximum", 2001) - 1)
        )
    if kind == "number":
        return rng.choice([0, -1, 2.5, 1e300, -1e-7, rng.gauss(0, 100)])
    return None if kind == "null" else rng.random() < 0.5


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_what_matches_is_valid_and_the_other_way_round(index):
    schema, rng = SCHEMAS[index], random.Random(index)
    pattern = schema_regex(schema)
    for text in random_texts(pattern, 100, rng):
        assert re.fullmatch(pattern, text, re.ASCII)
        jsonschema.validate(json.loads(text), schema)
    found = byte_automaton(pattern)
    for _ in range(200):
        value = instance(schema, rng)
        jsonschema.validate(value, schema)
        text = json.dumps(value, ensure_ascii=False)
        assert found.accepts(text), text
        assert not found.accepts(text + " ") and not found.accepts(text[:-1] + "}}")


def test_integers_have_their_bounds():
    rng = random.Random(0)
    for _ in range(300):
        low, high = sorted(rng.randint(-1100, 1100) for _ in range(2))
        for schema in (
            {"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high},
            {"exclusiveMinimum": low - 1, "maximum": high, "minimum": low - 5},
            {"exclusiveMaximum": high + 1},
        ):  # fmt: skip
            pattern = re.compile(schema_regex({"type": "integer", **schema}))
            edges = [x + d for x in (low, high) for d in (-1, 0, 1)]
            for number in [*edges, 0, *(rng.randint(-12_000, 12_000) for _ in range(15))]:
                inside = all(
                    (number >= value if "inimum" in name else number <= value)
                    and (not name.startswith("ex") or number != value)
                    for name, value in schema.items()
                )
                assert bool(pattern.fullmatch(str(number))) == inside, (schema, number)
            assert not any(pattern.fullmatch(text) for text in ("-0", "007", "", "-", "+1", "1.0"))


@pytest.mark.parametrize(
    "text", ['"\\ud83d\\ude00"', '"\\ud800"', '"a\nb"', '"\\x"', '"a"b"', '"\\u12"', '"', "'a'"]
)
def test_strings_that_are_not_json_or_not_characters_do_not_match(text):
    assert not byte_automaton(schema_regex({"type": "string"})).accepts(text)


def test_escapes_count_as_one_character():
    found = byte_automaton(schema_regex({"type": "string", "minLength": 2, "maxLength": 2}))
    for text in ('"\\n\\""', '"\\u00e9é"', '"\\\\a"', '"😀a"'):
        assert len(json.loads(text)) == 2 and found.accepts(text)
    assert not found.accepts('"\\n"') and not found.accepts('"abc"')


def test_separators_are_those_of_json_dumps():
    schema = {"const": {"a": [1, 2], "b": "x, y: z"}}
    for separators in ((", ", ": "), (",", ":")):
        pattern = schema_regex(json.dumps(schema), separators=separators)
        assert re.fullmatch(pattern, json.dumps(schema["const"], separators=separators))
    pattern = schema_regex(NESTED, separators=(",", ":"))
    assert re.fullmatch(pattern, '{"steps":[{"text":"a"},{"text":"","ok":true}],"answer":-12}')


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"$ref": "#"}, r"\$ has \$ref"),
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "number", "minimum": 3}, "minimum, which is not read with number"),
        ({"oneOf": [{"type": "null"}]}, "oneOf"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "type, which is not read with anyOf"),
        ({"type": "array"}, "no `items`"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "additionalProperties": True}, "additionalProperties"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, r"\$\.a has not"),
        ({"type": "text"}, r"has type \['text'\]"),
        ({}, "has type None"),
        ({"type": "integer", "minimum": 0.5}, "whole numbers"),
        ({"type": "integer", "multipleOf": 2}, "multipleOf"),
    ],
)
def test_other_keywords_are_refused_by_name_and_place(schema, name):
    with pytest.raises(NotImplementedError, match=name):
        schema_regex(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 and maxLength 2"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, r"no integer at \$ is in \[3, 2\]"),
        ({"type": "object", "required": ["a"]}, r"requires \['a'\]"),
        ({"type": "string", "enum": [1, 2]}, "no value in enum of its type"),
    ],
)
def test_schemas_that_nothing_satisfies_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        schema_regex(schema)
    with pytest.raises(TypeError, match=r"at \$\[\] is True"):
        schema_regex({"type": "array", "items": True})
