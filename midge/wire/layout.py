"""Layouts: which tensors a model has, and where each lies in the flat vector that travels.

A model is a list of named tensors. Its floating-point tensors, in order, form one flat vector of float32 elements; its
integer and boolean buffers (BatchNorm's counters, say), in order, form one short vector of whole numbers, the *counters*,
which travels in the head and in the header of an update. Both sides compare the digest of the layout, so that
no tensor is ever matched by position, broadcast or cast to another shape.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from midge.wire.errors import LayoutError

FloatType = Literal["float32", "float64", "float16", "bfloat16"]
IntegerType = Literal["int64", "int32", "int16", "int8", "uint8", "bool"]

FLOAT_TYPES: frozenset[str] = frozenset(FloatType.__args__)  # type: ignore[attr-defined]
MAX_TENSORS = 65_536
MAX_ELEMENTS = 2**34
"""64 GiB of float32: above every model that a device could train."""
MAX_COUNTERS = 16_384
MAX_CANONICAL_BYTES = 3 * 1024 * 1024
"""Of the layout as JSON: a head holds it, with up to `MAX_COUNTERS` counters, and must not exceed `MAX_MESSAGE_BYTES`."""

_INTEGER_LIMITS = {
    "int64": (-(2**63), 2**63 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int8": (-(2**7), 2**7 - 1),
    "uint8": (0, 2**8 - 1),
    "bool": (0, 1),
}


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=False):
    """One tensor of a model: its name in the state dictionary, its shape and its element type."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_ELEMENTS)], ...], msgspec.Meta(max_length=8)]
    dtype: FloatType | IntegerType

    @property
    def num_elements(self) -> int:
        """How many elements it has; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it lies in the flat vector (else among the counters)."""
        return self.dtype in FLOAT_TYPES

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Layout:
    """A model's tensors in order.

    Attributes:
        tensors: in the order of the state dictionary.
        num_elements: length of the flat float32 vector; at least 1.
        num_counters: length of the vector of integer buffers; 0 where there are none.
        digest: 64 hexadecimal digits that two layouts share only if they are equal.

    Raises:
        LayoutError: names repeat, nothing is left to train, or a limit is exceeded.
    """

    tensors: tuple[TensorSpec, ...]
    num_elements: int = field(init=False)
    num_counters: int = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if len(self.tensors) > MAX_TENSORS:
            raise LayoutError(f"layout: {len(self.tensors)} tensors, expected at most {MAX_TENSORS}")
        twice = sorted(name for name, times in Counter(tensor.name for tensor in self.tensors).items() if times > 1)
        if twice:
            raise LayoutError(f"layout: tensor names must differ, seen more than once: {', '.join(twice[:3])}")
        num_elements = sum(tensor.num_elements for tensor in self.tensors if tensor.is_float)
        num_counters = sum(tensor.num_elements for tensor in self.tensors if not tensor.is_float)
        if not 1 <= num_elements <= MAX_ELEMENTS:
            raise LayoutError(f"layout: {num_elements} floating-point elements, expected 1 to {MAX_ELEMENTS}")
        if num_counters > MAX_COUNTERS:
            raise LayoutError(f"layout: {num_counters} elements in integer buffers, expected at most {MAX_COUNTERS}")
        canonical = msgspec.json.encode(self.tensors)
        if len(canonical) > MAX_CANONICAL_BYTES:
            raise LayoutError(f"layout: {len(canonical)} bytes as JSON, expected at most {MAX_CANONICAL_BYTES}")
        object.__setattr__(self, "num_elements", num_elements)
        object.__setattr__(self, "num_counters", num_counters)
        object.__setattr__(self, "digest", hashlib.sha256(b"midge-layout-1\n" + canonical).hexdigest())

    def floats(self) -> Iterator[tuple[TensorSpec, int, int]]:
        """Each floating-point tensor with its first and its past-the-last element in the flat vector."""
        return _spans(tensor for tensor in self.tensors if tensor.is_float)

    def integers(self) -> Iterator[tuple[TensorSpec, int, int]]:
        """Each integer tensor with its first and its past-the-last element in the counters."""
        return _spans(tensor for tensor in self.tensors if not tensor.is_float)

    def check_counters(self, counters: Sequence[int]) -> None:
        """Check that `counters` are as many as the integer buffers hold, each within its buffer's type.

        Raises:
            LayoutError: they are not; the message names the buffer.
        """
        if len(counters) != self.num_counters:
            raise LayoutError(f"{len(counters)} counters, the layout has {self.num_counters}")
        for spec, start, stop in self.integers():
            low, high = _INTEGER_LIMITS[spec.dtype]
            for value in counters[start:stop]:
                if not low <= value <= high:
                    raise LayoutError(f"counter {value} for {spec}: expected {low} to {high}")

    def difference(self, other: Layout) -> str:
        """What is wrong with `other` where this layout is expected, as a predicate; empty where both have the same tensors.

        Tensors are compared by name: which come in another order is no difference that a model would notice.
        """
        theirs = {tensor.name: tensor for tensor in other.tensors}
        for tensor in self.tensors:
            found = theirs.pop(tensor.name, None)
            if found is None:
                return f"lacks {tensor}"
            if found != tensor:
                return f"has {found}, expected {tensor.shape} {tensor.dtype}"
        return f"has {next(iter(theirs.values()))}, which is not expected" if theirs else ""


def _spans(tensors: Iterator[TensorSpec]) -> Iterator[tuple[TensorSpec, int, int]]:
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_elements
        yield tensor, start, stop
        start = stop


def model_hash(layout: Layout, counters: Sequence[int]) -> hashlib._Hash:
    """A SHA-256 to feed a model's flat vector to, as little-endian float32 bytes, in order.

    Its hexadecimal digest then is the *model digest*: it covers layout, counters and elements, and does not depend on
    how the vector is cut into frames.
    """
    layout.check_counters(counters)
    return hashlib.sha256(b"midge-model-1\n" + bytes.fromhex(layout.digest) + msgspec.json.encode(list(counters)))


@functools.lru_cache(maxsize=8)
def layout_of(tensors: tuple[TensorSpec, ...]) -> Layout:
    """The layout of these tensors; a run's heads all bring the same ones, so that the last few are remembered."""
    return Layout(tensors)
