"""Words for a person: what was seen and what was expected. What is secret stays out of them."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from msgspec import NODEFAULT

from midge.settings.fields import Field, peel

_SCALES = {
    "seconds": {"ms": 0.001, "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600},
    "MiB": {"kb": 1 / 1024, "kib": 1 / 1024, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024},
}
_QUANTITY = re.compile(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]+)\s*", re.IGNORECASE)
_EXAMPLES = {tuple: "1,2,3 (in a file [1, 2, 3])", dict: 'a=1,b=2 (in a file a table, { a = "1", b = "2" })'}


def shown(value: object) -> str:
    """A value for a message: without a URL's user, and not too long."""
    text = str(value).lower() if isinstance(value, bool) else without_user(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def without_user(text: str) -> str:
    """`text` without the name and password of a URL, also of one that lacks its scheme."""
    pattern = r"(//).*@" if "//" in text else r"()[^\s'\"]*:.*@"
    return re.sub(pattern, r"\1(hidden)@", text, flags=re.DOTALL)


def plain_name(name: str) -> str:
    """A key or a path: as it is where nobody could mistake it, else quoted; it never breaks the line."""
    return name if re.fullmatch(r"[\w./ -]{1,255}", name, re.ASCII) and name.strip() == name else shown(name)


def reason_of(error: Exception) -> str:
    """Why a file could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return "is not text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def type_words(kind: Any) -> str:
    """A type, as a person would call it."""
    base, _, optional = peel(kind)
    if optional:
        return f"{type_words(base)}, or none"
    if base in (words := {bool: "true or false", int: "whole number", float: "number", str: "text"}):
        return words[base]
    if get_origin(base) is Literal:
        *others, last = map(str, get_args(base))
        return f"{', '.join(others)} or {last}" if others else last
    return (
        f"list of {_plural(type_words(get_args(base)[0]))}"
        if get_origin(base) is tuple
        else "table of names and values"
    )


def _plural(words: str) -> str:
    first, of, rest = words.partition(" of ")
    return f"{first}s{of}{rest}"


def expected(field: Field) -> str:
    """What a field takes, to follow "expected"."""
    base, _, _ = peel(field.type)
    words = type_words(field.type)
    article = "" if base in {bool, str} or get_origin(base) is Literal else "a "
    unit = f" of {field.unit}" if field.unit else ""
    limits = f", {_range(field.type)}" if _range(field.type) else ""
    example = _EXAMPLES.get(get_origin(base) or base)
    return f"{article}{words}{unit}{limits}{f', such as {example}' if example else ''}"


def limits_of(field: Field) -> str:
    """A field's unit and range."""
    return ", ".join(filter(None, (field.unit, _range(field.type))))


def _range(kind: Any) -> str:
    base, meta, _ = peel(kind)
    if get_origin(base) is tuple:
        each = _range(get_args(base)[0])
        return f"each {each.removeprefix('each ')}" if each else ""
    least, most = meta.get("ge", meta.get("min_length")), meta.get("le", meta.get("max_length"))
    things = " entries" if get_origin(base) is dict else " characters" if base is str else ""
    if least is not None and most is not None:
        return f"{_number(least)} to {_number(most)}{things}"
    words = [("at least", least), ("above", meta.get("gt")), ("at most", most), ("below", meta.get("lt"))]
    said = " and ".join(f"{word} {_number(limit)}" for word, limit in words if limit is not None)
    return said and said + things


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")


def default_words(field: Field) -> str:
    """A field's default; empty where that is nothing."""
    if (words := field.meta.get("default")) is not None:
        return str(words)
    if field.default is NODEFAULT:
        return "must be given"
    value = field.default() if callable(field.default) else field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    return f"`{value}`" if value else ""


def unit_hint(field: Field, value: object) -> str:
    """What to write instead of a number with a unit, such as 90 for `1.5 min` where seconds are wanted; empty for others."""
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) and field.unit else None
    if match is None:
        return ""
    scales, unit = _SCALES[field.unit], match[2].lower()
    if (scale := scales.get(unit, scales.get(unit.removesuffix("s")))) is None:
        return ""
    number = _number(float(match[1]) * scale)
    return f"; {match[0].strip()} is {number} {field.unit}: write {number}"


def brace_hint(field: Field, value: object) -> str:
    """What to write instead of a table in braces, as a file has it; empty for others."""
    if get_origin(peel(field.type)[0]) is not dict or not isinstance(value, str) or not value.strip().startswith("{"):
        return ""
    pair = re.fullmatch(r"\{\s*([\w.-]+)\s*=\s*([\w.+-]+)\s*\}", value.strip())
    example = "" if pair is None or field.is_secret else f": write {field.key}={pair[1]}={pair[2]}"
    return f"; here without braces{example}"
