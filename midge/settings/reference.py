"""The reference of a kind of settings, as docs/configuration.md has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from midge.settings.fields import fields_of
from midge.settings.words import default_words, limits_of, type_words, without_user


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the reference, in words for a person."""

    key: str
    type: str
    default: str
    limits: str
    description: str


def describe(kind: type[msgspec.Struct]) -> list[Setting]:
    """The reference of a kind of settings, in the order of its fields."""
    return [
        Setting(field.key, type_words(field.type), default_words(field), limits_of(field), field.meta["description"])
        for field in fields_of(kind).values()
    ]


def markdown(kind: type[msgspec.Struct]) -> str:
    """`describe` as a table in Markdown: docs/configuration.md holds it word for word."""
    rows = [(f"`{row.key}`", row.type, row.default, row.limits, row.description) for row in describe(kind)]
    header = [("key", "type", "default", "unit and range", "meaning"), ("---",) * 5]
    return "\n".join("| " + " | ".join(cell or "-" for cell in row) + " |" for row in header + rows)


def redacted(settings: msgspec.Struct) -> dict[str, Any]:
    """The values by key, with what is secret replaced: safe to print and to log."""
    shown = {}
    for key, field in fields_of(type(settings)).items():
        value = getattr(settings, key)
        if isinstance(value, str):
            value = "(hidden)" if value and field.is_secret else without_user(value)
        shown[key] = value
    return shown
