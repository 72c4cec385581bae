"""A JSON schema as a regular expression, for texts that are JSON of a given form.

    pattern = schema_regex({"type": "object", "properties": {"answer": {"type": "integer"}},
                            "required": ["answer"]})
    automaton = from_regex(pattern, vocabulary_of(lm.tokenizer))

| type | keywords |
|---|---|
| `string` | `minLength`, `maxLength` |
| `integer` | `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum` (whole numbers) |
| `number`, `boolean`, `null` | none |
| `array` | `items` (needed), `minItems`, `maxItems` |
| `object` | `properties`, `required`, `additionalProperties: false` |
| any | `enum`, `const`, `anyOf`, a list of types, annotations (`title`, `description`, ...) |

What matches is valid; not all that is valid matches: properties come in their order and are only
those named, separators are the two given, integers have no fraction or exponent.  Every other
keyword is refused by name and place, so nothing of a schema is silently dropped; schemas that
refer to themselves are no regular language.

Source: JSON Schema 2020-12 (validation); RFC 8259 (JSON).  Read next: `automaton.py`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment",
}  # fmt: skip
_KEYWORDS = {
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(),
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_LEAST = {"minimum": 0, "exclusiveMinimum": 1}
_MOST = {"maximum": 0, "exclusiveMaximum": 1}
_CHOICES = ("const", "enum", "anyOf")
#: one character of a string: itself, or escaped; halves of a surrogate pair are no characters
_CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}))'
_WHOLE = r"(?:0|[1-9][0-9]*)"
_NUMBER = rf"-?{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"


def schema_regex(
    schema: Mapping[str, Any] | str, *, separators: tuple[str, str] = (", ", ": ")
) -> str:
    """The pattern of the JSON texts of a schema.

    Args:
        schema: a dictionary, or its JSON.
        separators: between items and after keys, as in `json.dumps`.
    Returns:
        pattern for `automaton.from_regex`, and for `re.fullmatch`.
    Raises:
        NotImplementedError: a keyword or type that is not in the table, with its place.
        TypeError: a schema that is no dictionary.
        ValueError: counts or bounds that nothing satisfies.
    """
    if isinstance(schema, str):
        schema = json.loads(schema)
    return _value(schema, "$", separators)


def _value(schema: Any, where: str, separators: tuple[str, str]) -> str:
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"smcscale: the schema at {where} is {schema!r}, which says nothing about a form.\n"
            '  try: {"type": ...}.'
        )
    given = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
    _refuse(set(given).difference(("type", *_CHOICES), *_KEYWORDS.values()), where, "anything")
    for name in _CHOICES:
        if name in given:
            # a type beside it adds nothing if the values have it; anything else would be dropped
            _refuse(set(given) - {name} - ({"type"} if name != "anyOf" else set()), where, name)
            return _choice(name, given, where, separators)
    kinds = given.pop("type", None)
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    if not kinds or not set(kinds) <= set(_KEYWORDS):
        raise NotImplementedError(
            f"smcscale: the schema at {where} has type {kinds or None}.\n"
            f"  try: one of {', '.join(_KEYWORDS)}."
        )
    _refuse(set(given).difference(*(_KEYWORDS[kind] for kind in kinds)), where, " or ".join(kinds))
    return _either([_of_type(kind, given, where, separators) for kind in kinds])


def _refuse(names: set[str], where: str, kind: str) -> None:
    if names:
        raise NotImplementedError(
            f"smcscale: the schema at {where} has {', '.join(sorted(names))}, which is not read "
            f"with {kind}.\n  try: leave it out, and check the finished text for it."
        )


def _choice(name: str, given: dict, where: str, separators: tuple[str, str]) -> str:
    if name == "anyOf":
        return _either(
            [_value(s, f"{where}.anyOf[{i}]", separators) for i, s in enumerate(given[name])]
        )
    values = [given[name]] if name == "const" else list(given[name])
    kinds = given.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        values = [value for value in values if any(_has_type(value, kind) for kind in kinds)]
    if not values:
        raise ValueError(f"smcscale: the schema at {where} has no value in {name} of its type.")
    texts = [
        json.dumps(v, ensure_ascii=False, allow_nan=False, separators=separators) for v in values
    ]
    return _either([re.escape(text) for text in texts])


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    names = {str: ("string",), int: ("integer", "number"), list: ("array",), dict: ("object",)}
    return kind in names[type(value)]


def _of_type(kind: str, given: dict, where: str, separators: tuple[str, str]) -> str:
    if kind == "string":
        return f'"{_CHARACTER}{_times(given, "Length", where)}"'
    if kind == "integer":
        return _integer(given, where)
    if kind == "array":
        return _array(given, where, separators)
    if kind == "object":
        return _object(given, where, separators)
    return {"number": _NUMBER, "boolean": "(?:true|false)", "null": "null"}[kind]


def _either(patterns: list[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def _bounds(given: dict, kind: str, where: str) -> tuple[int, int | None]:
    least, most = given.get(f"min{kind}", 0), given.get(f"max{kind}")
    if least < 0 or (most is not None and most < least):
        raise ValueError(
            f"smcscale: the schema at {where} has min{kind} {least} and max{kind} {most}."
        )
    return least, most


def _times(given: dict, kind: str, where: str) -> str:
    least, most = _bounds(given, kind, where)
    return "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"


def _array(given: dict, where: str, separators: tuple[str, str]) -> str:
    if "items" not in given:
        raise NotImplementedError(
            f"smcscale: the array at {where} has no `items`.\n  try: say them."
        )
    least, most = _bounds(given, "Items", where)
    if most == 0:
        return r"\[\]"
    item = _value(given["items"], f"{where}[]", separators)
    upper = "" if most is None else most - 1
    more = f"(?:{re.escape(separators[0])}{item}){{{max(least - 1, 0)},{upper}}}"
    filled = f"{item}{more}"
    return rf"\[{filled}\]" if least else rf"\[(?:{filled})?\]"


def _object(given: dict, where: str, separators: tuple[str, str]) -> str:
    """Properties in order; one that is not required may be missing."""
    if given.get("additionalProperties", False) is not False:
        raise NotImplementedError(
            f"smcscale: the object at {where} has additionalProperties, whose names nothing "
            "bounds.\n  try: additionalProperties=false; only named properties are written anyway."
        )
    properties, required = given.get("properties", {}), given.get("required", [])
    if unknown := [name for name in required if name not in properties]:
        raise ValueError(f"smcscale: the object at {where} requires {unknown}, which it lacks.")
    comma = re.escape(separators[0])
    pairs = [
        re.escape(json.dumps(name, ensure_ascii=False) + separators[1])
        + _value(value, f"{where}.{name}", separators)
        for name, value in properties.items()
    ]
    later = [
        f"{comma}{pair}" if name in required else f"(?:{comma}{pair})?"
        for name, pair in zip(properties, pairs, strict=True)
    ]
    # the first property that is there has no comma before it
    firsts = []
    for index, name in enumerate(properties):
        firsts.append(pairs[index] + "".join(later[index + 1 :]))
        if name in required:
            break
    else:
        firsts.append("")
    return rf"\{{{_either(firsts)}\}}"


def _integer(given: dict, where: str) -> str:
    lows = [given[name] + by for name, by in _LEAST.items() if name in given]
    highs = [given[name] - by for name, by in _MOST.items() if name in given]
    low, high = max(lows, default=None), min(highs, default=None)
    if any(bound is not None and bound != int(bound) for bound in (low, high)):
        raise NotImplementedError(
            f"smcscale: the integer at {where} has bounds {low} and {high}.\n  try: whole numbers."
        )
    if low is not None and high is not None and low > high:
        raise ValueError(f"smcscale: no integer at {where} is in [{low}, {high}].")
    low, high = (None if bound is None else int(bound) for bound in (low, high))
    parts = []
    if low is None or low < 0:  # the digits of -n, from the other end
        first = 1 if high is None or high >= 0 else -high
        parts.append(f"-{_either(_digits(first, None if low is None else -low))}")
    if high is None or high >= 0:
        parts += _digits(max(low or 0, 0), high)
    return _either(parts)


def _digits(low: int, high: int | None) -> list[str]:
    """Patterns of the numbers low to high, neither negative, without leading zeros."""
    size = len(str(low))
    if high is None:
        more = rf"[1-9][0-9]{{{size},}}"
        return [*_digits(low, 10**size - 1), more]
    if size < len(str(high)):
        return [*_digits(low, 10**size - 1), *_digits(10**size, high)]
    return _same_length(str(low), str(high))


def _same_length(low: str, high: str) -> list[str]:
    """Patterns of the digits from low to high."""
    if low == high:
        return [low]
    rest = len(low) - 1
    a, b = int(low[0]), int(high[0])
    if a == b:
        return [f"{a}{_either(_same_length(low[1:], high[1:]))}"]
    parts = []
    if low[1:] != "0" * rest:
        parts.append(f"{a}{_either(_same_length(low[1:], '9' * rest))}")
        a += 1
    top = []
    if high[1:] != "9" * rest:
        top.append(f"{b}{_either(_same_length('0' * rest, high[1:]))}")
        b -= 1
    if a <= b:
        parts.append(f"[{a}-{b}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return parts + top
