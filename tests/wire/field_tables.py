"""What the code says of each field of a message, in the words of docs/protocol.md."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import inspect

from midge.wire import layout, messages

NAMED: dict[str, Any] = {
    "identifier": messages.Identifier,
    "digest": messages.Digest,
    "text": messages.ShortText,
    "detail": messages.Detail,
    "count": messages.Count,
    "small": messages.Small,
    "number": messages.Finite,
    "seconds": messages.Seconds,
    "counters": messages.Counters,
    "metrics": messages.Metrics,
    "labels": messages.Labels,
    "parameters": messages.Parameters,
    "range": messages.Range,
    "dtype": layout.FloatType | layout.IntegerType,
    "refusal reason": messages.RefusalReason,
    "reject reason": messages.RejectReason,
    "cancel reason": messages.CancelReason,
}
"""Types that have a name on the page."""

PARTS: dict[str, type[msgspec.Struct]] = {
    "tensor": layout.TensorSpec,
    "training": messages.TrainingConfig,
    "evaluation": messages.Evaluation,
}
"""Structs that messages hold."""

KINDS: dict[str, type[msgspec.Struct]] = {kind.__struct_config__.tag: kind for kind in get_args(messages.Message)}
"""Messages by the `type` that they carry."""

ADDRESS = messages.Cancel.__mro__[1]
"""What all messages of a round share."""


START, END = r"\A", r"\Z"


def rows(struct: type[msgspec.Struct], inherited: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """(name, type and limits, default) of each field of `struct` that is not inherited, in order."""
    hints = get_type_hints(struct, include_extras=True)
    fields = [field for field in msgspec.structs.fields(struct) if field.name not in inherited]
    return [(f"`{field.name}`", describe(hints[field.name]), _default(field)) for field in fields]


def describe(hint: Any) -> str:
    """A type in words, by its name where it has one."""
    return _describe(inspect.type_info(hint))


def spell_out(hint: Any) -> str:
    """A type in words, without its own name."""
    return _spell_out(inspect.type_info(hint))


def _describe(info: inspect.Type) -> str:
    name = next((name for name, hint in NAMED.items() if inspect.type_info(hint) == info), None)
    return f"*{name}*" if name else _spell_out(info)


def _spell_out(info: inspect.Type) -> str:
    match info:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"integer, {_number(info.ge)} to {_number(info.le)}"
        case inspect.FloatType():
            return _spell_out_float(info)
        case inspect.StrType(pattern=str(pattern)):
            return f"text that is `{pattern.removeprefix(START).removesuffix(END)}`, whole"
        case inspect.StrType():
            return f"text of {info.min_length or 0} to {info.max_length} characters"
        case inspect.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in values)
        case inspect.VarTupleType(item_type=item):
            return f"array of at most {_number(info.max_length)}: {_describe(item)}"
        case inspect.TupleType(item_types=items):
            return f"array of {len(items)}: {', '.join(_describe(item) for item in items)}"
        case inspect.DictType(key_type=key, value_type=value):
            return f"object of at most {info.max_length}: {_describe(key)} to {_describe(value)}"
        case inspect.StructType(cls=cls):
            return f"*{next(name for name, part in PARTS.items() if part is cls)}*"
        case inspect.NoneType():
            return "null"
        case inspect.UnionType(types=types):
            return "; or ".join(_describe(item) for item in types)
    raise AssertionError(f"the page has no words for {info}")


def _spell_out_float(info: inspect.FloatType) -> str:
    low = f"above {_number(info.gt)}" if info.gt is not None else _number(info.ge)
    high = f"below {_number(info.lt)}" if info.lt is not None else _number(info.le)
    return "finite number" if low == high == "" else f"number, {low} to {high}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value < 0:
        return f"-{_number(-value)}"
    if value >= 1e6 and isinstance(value, int):
        for exact, shown in ((value, ""), (value + 1, " - 1")):
            if exact.bit_count() == 1:
                return f"2^{exact.bit_length() - 1}{shown}"
    return f"{value:.15g}" if value < 1e15 else f"{value:g}"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{msgspec.json.encode(value).decode()}`"
