"""Tables in CSV: a line of column names, then a row for each example."""

from __future__ import annotations

import csv
import difflib
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.files.places import Examples, files_of, some
from midge.tasks.partition import select

_WHOLE = re.compile(r"[+-]?\d+")


def load_csv(
    spec: DataSpec,
    *,
    label: str = "",
    class_names: Sequence[str] = (),
    pattern: str = "*.csv",
    delimiter: str = ",",
) -> Examples:
    """This agent's share of the rows of CSV files: every column a number, but the label's.

    The first line names the columns. A label is a whole number from 0, or a word, which is its place in `class_names`.

    Args:
        spec: its `data_dir` is a file, or a directory whose files like `pattern` are read in order of their names.
        label: the column of the label; empty: the last one.
        class_names: see the head of this file; empty: the words that occur, sorted.
        pattern: of names of files, where `data_dir` is a directory.
        delimiter: between cells.

    Raises:
        TaskError: files are missing, empty or unreadable, or a cell is not what it must be.
    """
    files = files_of(spec, pattern, "CSV files with a line of column names and a row for each example")
    header: list[str] | None = None
    numbers = array("f")
    words: list[tuple[str, str]] = []
    for file in files:
        table = _Table(file, label, delimiter)
        if header is not None and table.header != header:
            raise TaskError(
                f"{file}, line 1: the columns are {some(table.header)}: expected those of {files[0]}, {some(header)}"
            )
        header = table.header
        for features, word, line in table.rows():
            numbers.extend(features)
            words.append((word, f"{file}, line {line}, column {table.label}"))
    if header is None or not words:
        raise TaskError(
            f"{some([str(file) for file in files])}: no rows below the names of the columns: expected one for each example"
        )
    labels, names = _as_labels(words, class_names)
    mine = select(labels, spec)
    inputs = np.frombuffer(numbers, np.float32).reshape(len(words), len(header) - 1)
    return Examples(inputs[mine], labels[mine], names)


class _Table:
    """One CSV file."""

    def __init__(self, file: Path, label: str, delimiter: str) -> None:
        self._file = file
        self._delimiter = delimiter
        _, first = next(self._lines(), (1, []))
        if not first:
            raise TaskError(f"{file}: the file is empty: expected a line of column names, and a row for each example")
        self.header = [name.strip() for name in first]
        if len(self.header) < 2:
            raise TaskError(
                f"{file}, line 1: {len(self.header)} columns: expected names of at least two, the label's and one more, "
                f"with {delimiter!r} between them"
            )
        if all(_is_number(name) for name in self.header):
            raise TaskError(f"{file}, line 1: {some(self.header)} are numbers: expected the names of the columns")
        if len(set(self.header)) < len(self.header):
            twice = next(name for name in self.header if self.header.count(name) > 1)
            raise TaskError(f"{file}, line 1: column {twice!r} is there twice: expected each name once")
        if label and label not in self.header:
            nearest = difflib.get_close_matches(label, self.header, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise TaskError(
                f"{file}, line 1: no column {label!r} for the label; the columns are {some(self.header)}.{hint}"
            )
        self.label = label or self.header[-1]

    def rows(self) -> Iterator[tuple[array[float], str, int]]:
        """Of each row the features, the label as it stands there, and the line."""
        place = self.header.index(self.label)
        lines = self._lines()
        next(lines)
        for line, cells in lines:
            if len(cells) != len(self.header):
                raise TaskError(
                    f"{self._file}, line {line}: {len(cells)} cells: expected {len(self.header)}, as line 1 names columns"
                )
            word = cells.pop(place).strip()
            try:
                features = array("f", map(float, cells))
            except ValueError:
                raise TaskError(self._wrong_cell(cells, line)) from None
            if not all(map(math.isfinite, features)):
                raise TaskError(self._wrong_cell(cells, line))
            yield features, word, line

    def _wrong_cell(self, cells: Sequence[str], line: int) -> str:
        features = [name for name in self.header if name != self.label]
        name, cell = next((name, cell) for name, cell in zip(features, cells, strict=True) if not _is_number(cell))
        if not cell.strip() or cell.strip().lower() in ("na", "n/a", "nan", "null", "none", "?", "-"):
            seen = f"the value is missing ({cell.strip()!r})" if cell.strip() else "the value is missing"
            return f"{self._file}, line {line}, column {name}: {seen}: fill it in, or leave the row or the column out"
        return (
            f"{self._file}, line {line}, column {name}: {cell.strip()[:40]!r} is no number that float32 can hold: features are "
            f"numbers; words may stand in the label's column ({self.label}) alone"
        )

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """The number of each line that is not empty, and its cells."""
        try:
            with self._file.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, delimiter=self._delimiter, strict=True)
                for cells in reader:
                    if cells:
                        yield reader.line_num, cells
        except UnicodeDecodeError as error:
            raise TaskError(f"{self._file}: byte {error.start} is not UTF-8: save the table as CSV in UTF-8") from None
        except csv.Error as error:
            raise TaskError(f"{self._file}, line {reader.line_num}: no CSV: {error}") from None
        except OSError as error:
            raise TaskError(f"{self._file}: cannot be read: {error.strerror or error}") from None


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(array("f", [float(cell)])[0])
    except (ValueError, OverflowError):
        return False


def _as_labels(
    words: Sequence[tuple[str, str]], class_names: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The label of each (word, where it stands), and the names of labels."""
    missing = next((place for word, place in words if not word), None)
    if missing is not None:
        raise TaskError(f"{missing}: the label is missing: fill it in, or leave the row out")
    if class_names:
        numbers = {name: number for number, name in enumerate(class_names)}
        for word, place in words:
            if word not in numbers:
                raise TaskError(f"{place}: {word[:40]!r} is none of the classes {some(class_names)}")
        return np.array([numbers[word] for word, _ in words], np.int64), tuple(class_names)
    if all(_WHOLE.fullmatch(word) for word, _ in words):
        for word, place in words:
            if not 0 <= int(word) < 2**31:
                raise TaskError(f"{place}: label {word[:40]}: expected a whole number, 0 to {2**31 - 1}")
        return np.array([int(word) for word, _ in words], np.int64), ()
    if all(_is_number(word) for word, _ in words):
        word, place = next((word, place) for word, place in words if not _WHOLE.fullmatch(word))
        raise TaskError(f"{place}: label {word[:40]}: expected whole numbers or words, which name classes")
    names = tuple(sorted({word for word, _ in words}))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[word] for word, _ in words], np.int64), names
