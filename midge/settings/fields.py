"""The fields of a kind of settings: their types without annotations, their limits, their units."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT

_LIMITS = ("ge", "gt", "le", "lt", "min_length", "max_length", "description")
UNITS = {"_s": "seconds", "_mb": "MiB"}


@dataclass(frozen=True, slots=True)
class Field:
    """A field: its name, its annotated type, its default or what makes it, and what its annotations say."""

    key: str
    type: Any
    default: object
    meta: dict[str, Any]

    @property
    def unit(self) -> str:
        """The unit that its name ends in, in words; empty for none."""
        return next((unit for suffix, unit in UNITS.items() if self.key.endswith(suffix)), "")

    @property
    def is_secret(self) -> bool:
        """Whether its value is for nobody's eyes."""
        return bool(self.meta.get("secret"))


def fields_of(kind: type[msgspec.Struct]) -> dict[str, Field]:
    """The fields of a kind of settings, by name, in their order."""
    found = {}
    for info in msgspec.structs.fields(kind):
        _, meta, _ = peel(info.type)
        default = info.default if info.default_factory is NODEFAULT else info.default_factory
        found[info.name] = Field(info.name, info.type, default, {"description": ""} | meta)
    return found


def peel(kind: Any) -> tuple[Any, dict[str, Any], bool]:
    """A type without its annotations, what they say, and whether None is allowed besides it."""
    meta: dict[str, Any] = {}
    optional = False
    while True:
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            for note in notes:
                said = {name: getattr(note, name) for name in _LIMITS} | (note.extra or {})
                meta |= {name: limit for name, limit in said.items() if limit is not None}
        elif get_origin(kind) in {Union, UnionType} and NoneType in get_args(kind):
            kind, optional = Union[tuple(one for one in get_args(kind) if one is not NoneType)], True  # noqa: UP007
        else:
            return kind, meta, optional
