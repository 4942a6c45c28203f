"""Examples in NumPy's own files, .npz and .npy."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.files.places import Examples, root_of, some
from midge.tasks.partition import select


def load_arrays(spec: DataSpec, *, class_names: Sequence[str] = ()) -> Examples:
    """This agent's share of examples in NumPy's files: `inputs`, a number or an array each, and `labels`, whole numbers from 0.

    Args:
        spec: its `data_dir` is an .npz file with arrays `inputs` and `labels`, or a directory that holds one, or that holds
            `inputs.npy` and `labels.npy`. Of the latter the agent's share alone is read into memory.
        class_names: of labels by index; a label beyond them is an error.

    Raises:
        TaskError: files are missing or unreadable, or the arrays are not what they must be.
    """
    inputs, labels, source = _read_arrays(spec)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TaskError(f"{source}: labels {labels.shape} {labels.dtype}: expected one whole number an example")
    if inputs.ndim < 1 or inputs.dtype.kind not in "fiub":
        raise TaskError(
            f"{source}: inputs {inputs.shape} {inputs.dtype}: expected numbers, examples along the first axis"
        )
    if len(inputs) != len(labels):
        raise TaskError(f"{source}: {len(inputs)} inputs and {len(labels)} labels: expected as many")
    if not len(labels):
        raise TaskError(f"{source}: no examples: expected at least one")
    lowest, highest = int(labels.min()), int(labels.max())
    limit = len(class_names) or 2**31
    if lowest < 0 or highest >= limit:
        wrong = lowest if lowest < 0 else highest
        raise TaskError(f"{source}: label {wrong}: expected 0 to {limit - 1}")
    mine = select(np.asarray(labels), spec)
    with np.errstate(over="ignore"):
        taken = np.array(inputs[mine], np.float32)
    finite = np.isfinite(taken.reshape(len(taken), -1)).all(axis=1)
    if not finite.all():
        raise TaskError(
            f"{source}: inputs[{mine[np.argmin(finite)]}] holds a value that is not finite: mend it or leave it out"
        )
    return Examples(taken, labels[mine].astype(np.int64), tuple(class_names))


def _read_arrays(spec: DataSpec) -> tuple[NDArray[Any], NDArray[Any], Path]:
    """Inputs, labels, and where they are from."""
    what = "an .npz file with arrays inputs and labels, or inputs.npy and labels.npy"
    root = root_of(spec, what)
    pair = root / "inputs.npy", root / "labels.npy"
    if root.is_dir() and any(path.exists() for path in pair):
        inputs, labels = (_opened(path) for path in pair)
        return inputs, labels, root
    files = [root] if root.is_file() else sorted(root.glob("*.npz"))
    if len(files) != 1:
        seen = some([file.name for file in files]) if files else "none"
        raise TaskError(f"{root}: {seen} found: expected {what}")
    archive = _opened(files[0])
    arrays = []
    for name in ("inputs", "labels"):
        if name not in getattr(archive, "files", ()):
            seen = some(archive.files) if hasattr(archive, "files") else "one array without a name"
            raise TaskError(
                f"{files[0]}: no array {name!r}; there is {seen}: save it with np.savez(file, inputs=..., labels=...)"
            )
        arrays.append(_guarded(files[0], partial(archive.__getitem__, name)))
    return arrays[0], arrays[1], files[0]


def _opened(path: Path) -> Any:
    """An array mapped into memory, or an archive of them. Nothing in the file is run: pickled objects are refused."""
    return _guarded(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError:
        raise TaskError(f"{path}: there is no such file: inputs.npy and labels.npy go together") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        text = "it holds objects, not numbers" if "allow_pickle" in str(error) else " ".join(str(error).split())
        raise TaskError(f"{path}: cannot be read as NumPy's .npy or .npz: {text}") from None
