"""Codecs: how the elements of a frame become its body. A closed table; the number is the frame's codec byte.

    1  float32   4 bytes an element, little-endian

**What a float32 body carries.** In a model: its elements. In an update: the agent's elements *after training*, from which
the reader takes `delta = local - global` in float64. Sending the difference itself in float32 would lose the bit-for-bit
equality of one agent with local SGD (docs/decisions/0001-float32-carries-local-values.md).

Decoding is bounded: the number of elements is known from the layout before a byte of the body is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from midge.wire.errors import FrameError
from midge.wire.frames import FLOAT32

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FLOAT32", "NAMES", "decode_float32", "encode_float32"]

NAMES = {"float32": FLOAT32}

_FLOAT32_LE = np.dtype("<f4")


def encode_float32(elements: NDArray[np.float32]) -> memoryview:
    """The body of a frame: a view of `elements` (float32[n], contiguous), which must stay unchanged while it is used."""
    return np.ascontiguousarray(elements, dtype=_FLOAT32_LE).view(np.uint8).data


def decode_float32(body: bytes | memoryview, num_elements: int) -> NDArray[np.float32]:
    """The elements of a body, float32[num_elements]: a read-only view of it where the machine is little-endian.

    Raises:
        FrameError: the body is not `num_elements` long.
    """
    if len(body) != num_elements * 4:
        raise FrameError(f"float32 body of {len(body)} bytes: expected {num_elements * 4} for {num_elements} elements")
    return np.frombuffer(body, dtype=_FLOAT32_LE).astype(np.float32, copy=False)
