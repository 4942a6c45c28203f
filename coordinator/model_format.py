"""The form of a model's file: safetensors, with the flat vector in one piece. Bytes only; models.py keeps the files.

A safetensors file is 8 bytes that say how long its header is, the header in JSON, and the tensors' bytes with no gap, in
any order. A model's file holds its floating-point tensors as float32, whatever their own type, together:

    64-bit integer buffers | all floating-point tensors as float32: the flat vector | smaller integer buffers

Each part is in the layout's order, and larger elements come first, so that every tensor is aligned (readers that map a file
need that); the header is padded so that the vector starts at a multiple of 64. `__metadata__` carries the layout, which
restores what float32 hides: the order of tensors, and a float16, bfloat16 or float64 that one really is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from midge.wire.errors import LayoutError
from midge.wire.layout import Layout, TensorSpec

_FORMAT = "midge-model-1"
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LENGTH_BYTES = 8
_ALIGNMENT = 64
_WIDEST_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000


class ModelError(Exception):
    """A model is not in the store, its file is damaged, or a state cannot be stored as one."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A safetensors file before it is written: its header, and where each tensor's bytes go.

    Attributes:
        header: all before the tensors, the length included.
        offsets: of each tensor in the file, by name.
        floats_start: the least offset of a floating-point tensor: in a model's file, where the flat vector starts.
        size_bytes: of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    floats_start: int
    size_bytes: int


def _plan(layout: Layout, codes: dict[str, str], metadata: dict[str, str]) -> FilePlan:
    """Lay a file out: larger elements first, floats before integers of their size, else in the layout's order."""
    if "__metadata__" in codes:
        raise ModelError("a tensor is named __metadata__, which safetensors keeps for itself: rename it in the task")
    relative: dict[str, int] = {}
    position = 0
    widest = 0
    for spec in sorted(layout.tensors, key=lambda spec: (-_ITEM_BYTES[codes[spec.name]], not spec.is_float)):
        relative[spec.name] = position
        position += spec.num_elements * _ITEM_BYTES[codes[spec.name]]
        widest = position if _ITEM_BYTES[codes[spec.name]] == _WIDEST_BYTES else widest
    floats_start = min(relative[spec.name] for spec in layout.tensors if spec.is_float)
    entries: dict[str, Any] = {"__metadata__": metadata}
    for spec in layout.tensors:
        start = relative[spec.name]
        stop = start + spec.num_elements * _ITEM_BYTES[codes[spec.name]]
        entries[spec.name] = {"dtype": codes[spec.name], "shape": spec.shape, "data_offsets": (start, stop)}
    text = msgspec.json.encode(entries)
    # All 8-byte elements come first: what follows them, a model's flat vector, starts at a multiple of 64.
    text += b" " * (-(_LENGTH_BYTES + len(text) + widest) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    offsets = {name: len(header) + start for name, start in relative.items()}
    return FilePlan(header, offsets, len(header) + floats_start, len(header) + position)


def model_plan(layout: Layout) -> FilePlan:
    """The file of a model: one for each layout.

    Raises:
        ModelError: a tensor has a name that a file cannot carry.
    """
    codes = {spec.name: "F32" if spec.is_float else _CODES[spec.dtype] for spec in layout.tensors}
    return _plan(layout, codes, {"format": _FORMAT, "layout": msgspec.json.encode(layout.tensors).decode()})


def export_plan(layout: Layout) -> FilePlan:
    """A file whose tensors have the layout's own types, for other programs."""
    return _plan(layout, {spec.name: _CODES[spec.dtype] for spec in layout.tensors}, {"format": "pt"})


def read_header(fd: int, path: Path) -> tuple[Layout, FilePlan]:
    """The layout of the model in an open file, and where its tensors lie.

    Raises:
        ModelError: the file is no model, or of another size than its layout's.
    """
    size_bytes = os.fstat(fd).st_size
    text_bytes = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    if not 0 < text_bytes <= min(size_bytes, _MAX_HEADER_BYTES):
        raise ModelError(f"{path}: a header of {text_bytes} bytes in {size_bytes}: the file is damaged; restore it")
    text = os.pread(fd, text_bytes, _LENGTH_BYTES)
    try:
        metadata = msgspec.json.decode(text)["__metadata__"]
        if metadata["format"] != _FORMAT:
            raise ModelError(f"{path} has format {metadata['format']!r}: this version reads {_FORMAT!r}")
        layout = Layout(msgspec.json.decode(metadata["layout"], type=tuple[TensorSpec, ...]))
    except (msgspec.MsgspecError, LayoutError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no header of a model ({error}): the file is damaged; restore it") from None
    plan = model_plan(layout)
    # The layout determines every byte before the tensors, so one comparison checks all offsets.
    if plan.header[_LENGTH_BYTES:] != text or plan.size_bytes != size_bytes:
        raise ModelError(f"{path}, {size_bytes} bytes: does not fit its layout, {plan.size_bytes} bytes; restore it")
    return layout, plan


def narrow(elements: NDArray[np.float32], spec: TensorSpec) -> bytes:
    """The bytes of `elements` (float32[n]) in the type of `spec`, rounded to the nearest, ties to even.

    Raises:
        ModelError: one is beyond the range of that type.
    """
    if spec.dtype == "bfloat16":
        narrowed = _bfloat16_bits(elements)
        in_range = bool(np.all((narrowed & 0x7F80) != 0x7F80))
    else:
        with np.errstate(over="ignore"):
            converted = elements.astype(np.dtype(spec.dtype).newbyteorder("<"))
        in_range = bool(np.all(np.isfinite(converted)))
        narrowed = converted
    if not in_range:
        raise ModelError(f"{spec} holds a value that its type cannot: export it as float32, by copying the stored file")
    return narrowed.tobytes()


def _bfloat16_bits(elements: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Each element rounded to the nearest bfloat16, ties to even: the upper 16 bits of a float32."""
    bits = np.ascontiguousarray(elements).view(np.uint32)
    # Half of the last kept bit less one, plus that bit: what lies above half carries, a tie only if the bit is odd.
    rounded: NDArray[np.uint32] = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype("<u2")
