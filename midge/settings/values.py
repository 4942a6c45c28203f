"""One value: from what was given to what the field holds."""

from __future__ import annotations

import math
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from midge.settings.fields import Field, peel
from midge.settings.sources import Given
from midge.settings.words import brace_hint, expected, shown, unit_hint

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def convert(given: Given, field: Field) -> object:
    """The field's value.

    Raises:
        ValueError: it is none; the message says what was seen and what was expected.
    """
    try:
        return _value(given, field)
    except (ValueError, KeyError, msgspec.ValidationError):
        seen = "(hidden)" if field.is_secret else shown(given.value)
        hint = unit_hint(field, given.value) or (brace_hint(field, given.value) if given.is_text else "")
        raise ValueError(f"{field.key} is {seen}: expected {expected(field)}{hint}") from None


def _value(given: Given, field: Field) -> object:
    value = given.value
    if given.is_text and isinstance(value, str):
        value = _parse(value if field.is_secret else value.strip(), field.type)
    if get_origin(peel(field.type)[0]) is Literal and isinstance(value, str):
        value = value.lower()
    value = msgspec.convert(value, field.type)
    if not _travels(value):
        raise ValueError("not finite, above 64 bits, or not Unicode")
    return value


def _parse(text: str, kind: Any) -> object:
    base, _, optional = peel(kind)
    if optional and text.lower() in {"", "none"}:
        return None
    if base is bool:
        return _SWITCH[text.lower()]
    if base is int or base is float:
        return base(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(base) is tuple:
        return tuple(_parse(part, get_args(base)[0]) for part in parts)
    if get_origin(base) is dict:
        if text.startswith("{"):
            raise ValueError("what a file would have")
        pairs = {key.strip(): value.strip() for key, equals, value in (part.partition("=") for part in parts) if equals}
        if len(pairs) != len(parts):
            raise ValueError("a part without '=', or a name twice")
        return {key: _parse(value, get_args(base)[1]) for key, value in pairs.items()}
    return _parse_scalar(text) if get_origin(base) in {Union, UnionType} else text


def _parse_scalar(text: str) -> object:
    if text.lower() in {"true", "false"}:
        return _SWITCH[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _travels(value: object) -> bool:
    """Whether a message could carry `value`: finite, of 64 bits, encodable. What limits cannot say."""
    match value:
        case str():
            return re.search("[\ud800-\udfff]", value) is None
        case int():
            return -(2**63) <= value < 2**63
        case float():
            return math.isfinite(value)
        case dict():
            return all(map(_travels, value)) and all(map(_travels, value.values()))
        case _:
            return True
