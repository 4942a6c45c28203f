"""Models that other programs wrote: plain safetensors files, read with no library and no code from them, and fitted to a task.

A safetensors file (https://huggingface.co/docs/safetensors#format) names its tensors, in any order. So they are matched by
name with the task's, and have to have its shapes and types; bfloat16, which NumPy lacks, is float32 in a state.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.model_format import ModelError
from midge.tasks.base import State
from midge.tasks.flatten import layout_of, state_to_vector
from midge.wire.errors import LayoutError
from midge.wire.layout import Layout

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**50)]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def read_state(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: it cannot be read, is no safetensors file, or holds a type that no model of ours can.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            entries, start = _header(content, path)
            return {name: _tensor(content, start, name, entry, path) for name, entry in entries.items()}
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # an empty file cannot be mapped
        raise ModelError(f"{path}: no safetensors file ({error})") from None


def fit_state(state: State, layout: Layout) -> dict[str, NDArray[Any]]:
    """The state in the order of a task's layout.

    Raises:
        LayoutError: a tensor is missing, unexpected, of another shape or type, or not finite; the message names it.
    """
    expected = {spec.name: spec for spec in layout.tensors}
    missing = [str(spec) for name, spec in expected.items() if name not in state]
    unexpected = sorted(state.keys() - expected.keys())
    if missing or unexpected:
        lacks = f"lacks {_listed(missing)}" if missing else ""
        has = f"has {_listed(unexpected)}, which the task's model has not" if unexpected else ""
        raise LayoutError(" and ".join(part for part in (lacks, has) if part))
    ordered = {name: np.asarray(state[name]) for name in expected}
    difference = layout.difference(layout_of(ordered))
    if difference:
        raise LayoutError(difference)
    vector, _ = state_to_vector(ordered, layout)
    for spec, start, stop in layout.floats():
        if not np.isfinite(vector[start:stop]).all():
            raise LayoutError(f"has a value in {spec} that is not finite as float32")
    return ordered


def _header(content: mmap.mmap, path: Path) -> tuple[dict[str, _Entry], int]:
    text_bytes = int.from_bytes(content[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + text_bytes
    if not 0 < text_bytes <= _MAX_HEADER_BYTES or start > len(content):
        raise ModelError(
            f"{path}: no safetensors file: its first 8 bytes say that {text_bytes} bytes of header follow; "
            "a file of torch.save is none: save it with safetensors.torch.save_file(model.state_dict(), ...)"
        )
    try:
        parts: Mapping[str, msgspec.Raw] = msgspec.json.decode(
            content[_LENGTH_BYTES:start], type=dict[str, msgspec.Raw]
        )
        entries = {
            name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items() if name != "__metadata__"
        }
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: no safetensors file: its header is damaged ({error})") from None
    return entries, start


def _tensor(content: mmap.mmap, start: int, name: str, entry: _Entry, path: Path) -> NDArray[Any]:
    if entry.dtype not in _TYPES:
        raise ModelError(f"{path}: {name} {entry.shape} is {entry.dtype}: expected one of {', '.join(_TYPES)}")
    dtype = np.dtype(_TYPES[entry.dtype])
    first, stop = entry.data_offsets
    num_elements = math.prod(entry.shape)
    if stop - first != num_elements * dtype.itemsize or start + stop > len(content):
        seen = f"bytes {first} to {stop} of {len(content) - start}"
        raise ModelError(f"{path}: {name} {entry.shape} {entry.dtype} lies in {seen}: the file is damaged or cut")
    flat = np.frombuffer(content[start + first : start + stop], dtype)
    if entry.dtype == "BF16":
        flat = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat.astype(flat.dtype.newbyteorder("="), copy=False).reshape(entry.shape)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
