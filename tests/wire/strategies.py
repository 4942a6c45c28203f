"""Hypothesis strategies of everything that travels, derived from the types: a new field is covered once it is declared."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from midge.wire.frames import MAX_FRAMES
from midge.wire.layout import Layout, TensorSpec
from midge.wire.messages import Head

_MAX_ITEMS = 4
_MAX_CHARACTERS = 20


def values(info: inspect.Type) -> st.SearchStrategy[Any]:
    """Everything that the limits of a field let through."""
    match info:
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(info.ge, info.le)
        case inspect.FloatType():
            low, high = (info.ge if info.gt is None else info.gt), (info.le if info.lt is None else info.lt)
            return st.floats(
                low,
                high,
                allow_nan=False,
                allow_infinity=False,
                exclude_min=info.gt is not None,
                exclude_max=info.lt is not None,
            )
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern)
        case inspect.StrType():
            longest = min(info.max_length or 0, _MAX_CHARACTERS)
            return st.text(st.characters(codec="utf-8"), min_size=info.min_length or 0, max_size=longest)
        case inspect.LiteralType(values=choices):
            return st.sampled_from(choices)
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType(types=types):
            return st.one_of([values(item) for item in types])
        case inspect.VarTupleType(item_type=item):
            return st.lists(values(item), max_size=_MAX_ITEMS).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*(values(item) for item in items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=_MAX_ITEMS)
        case inspect.StructType(cls=cls):
            return structs(cls)
    raise AssertionError(f"no strategy for {info}")


def structs(struct: type[msgspec.Struct], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Messages, or parts of them, with any fields."""
    if struct is Head and not given:
        return heads()
    fields = {field.encode_name: values(field.type) for field in inspect.type_info(struct).fields}  # type: ignore[attr-defined]
    return st.builds(struct, **{**fields, **given})


def layouts() -> st.SearchStrategy[Layout]:
    """Small models, each with at least one float element."""
    tensor = structs(TensorSpec, shape=st.lists(st.integers(0, 5), max_size=4).map(tuple))
    tensors = st.lists(tensor, min_size=1, max_size=6, unique_by=lambda spec: spec.name)
    return tensors.filter(lambda specs: any(spec.is_float and spec.num_elements for spec in specs)).map(
        lambda specs: Layout(tuple(specs))
    )


@st.composite
def heads(draw: st.DrawFn) -> Head:
    """Heads whose counters and frames fit their layouts."""
    layout = draw(layouts())
    assert layout.num_elements <= MAX_FRAMES
    # Within every integer type, bool included; what does not fit is tried by hand.
    counters = draw(st.lists(st.integers(0, 1), min_size=layout.num_counters, max_size=layout.num_counters))
    head: Head = draw(structs(Head, layout=st.just(layout.tensors), counters=st.just(tuple(counters))))
    return head
