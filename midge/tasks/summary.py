"""What an agent would train on, in a few numbers, and as lines for a terminal. NumPy is not needed to show it.

`midge.tasks.inspection` makes a summary of a task's data.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

_MAX_SHOWN = 12
"""Labels of a summary in one line."""
_EIGHTHS = "▏▎▍▌▋▊▉"
_MIN_BAR = 8
_GAP = "  "


class LabelCount(msgspec.Struct, frozen=True, omit_defaults=True):
    """How many examples have a label."""

    label: int
    count: int
    name: str = ""

    @property
    def title(self) -> str:
        """What a person calls the label."""
        return self.name or str(self.label)


class DataSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent would train on.

    Attributes:
        num_examples: how many examples there are.
        input_shape: of one example; None where it cannot be told.
        labels: in ascending order, those with no example left out; None where the examples' labels cannot be read.
    """

    num_examples: int
    input_shape: tuple[int, ...] | None = None
    labels: tuple[LabelCount, ...] | None = None

    @property
    def is_of_one_class(self) -> bool:
        """Whether every example has the same label."""
        return self.labels is not None and len(self.labels) == 1

    def labels_line(self) -> str:
        """The labels and how many examples each has, cut to what fits a line of a log; `none` for data without any."""
        if self.labels is None:
            return "none"  # of a regression; or the task's data have a form in which they cannot be told
        shown = " ".join(f"{one.title}:{one.count}" for one in self.labels[:_MAX_SHOWN])
        rest = len(self.labels) - _MAX_SHOWN
        return f"{shown} and {rest} more" if rest > 0 else shown

    def line(self) -> str:
        """The whole in one line: `473 examples of shape (64,), labels 0:7 1:146 2:142`."""
        return self.examples_line() if self.labels is None else f"{self.examples_line()}, labels {self.labels_line()}"

    def examples_line(self) -> str:
        """How many examples of which shape."""
        words = f"{self.num_examples} {'example' if self.num_examples == 1 else 'examples'}"
        return words if self.input_shape is None else f"{words} of shape {self.input_shape}"


def bar_chart(labels: Sequence[LabelCount], width: int, *, blocks: bool = True) -> list[str]:
    """A line for each label with a bar in proportion to its count; the longest fills `width` columns.

    Args:
        labels: with their counts, at least one above 0.
        width: of the terminal, in columns.
        blocks: whether eighths of a block can be shown; else bars are of `#`.
    """
    titles = [_cut(one.title, max(_MIN_BAR, width // 3)) for one in labels]
    of_title = max(len(title) for title in titles)
    of_count = max(len(str(one.count)) for one in labels)
    room = max(_MIN_BAR, width - of_title - of_count - 2 * len(_GAP))
    most = max(one.count for one in labels)
    return [
        f"{title:>{of_title}}{_GAP}{one.count:>{of_count}}{_GAP}{_bar(one.count / most * room, blocks=blocks)}".rstrip()
        for title, one in zip(titles, labels, strict=True)
    ]


def table(rows: Sequence[DataSummary], width: int) -> list[str]:
    """Parts against labels: a line of counts for each of `rows`, and their sum; fewer columns where `width` is small."""
    titles = {one.label: one.title for row in rows for one in row.labels or ()}
    counts = [{one.label: one.count for one in row.labels or ()} for row in rows]
    labels = sorted(titles)
    totals = [sum(row.get(label, 0) for row in counts) for label in labels]
    head = ["part", "examples", *(titles[label] for label in labels)]
    lines = [
        [str(part), str(row.num_examples), *(str(of_label.get(label) or ".") for label in labels)]
        for part, (row, of_label) in enumerate(zip(rows, counts, strict=True))
    ]
    lines.append(["all", str(sum(row.num_examples for row in rows)), *map(str, totals)])
    drawn = _aligned([head, *lines])
    if max(map(len, drawn)) <= width:
        return drawn
    return _aligned(
        [["part", "examples", "labels", "largest label"], *(_short(part, row) for part, row in enumerate(rows))]
    )


def _short(part: int, row: DataSummary) -> list[str]:
    if not row.labels:
        return [str(part), str(row.num_examples), ".", "."]
    largest = max(row.labels, key=lambda one: one.count)
    share = largest.count / row.num_examples
    return [str(part), str(row.num_examples), str(len(row.labels)), f"{_cut(largest.title, 20)} {share:.0%}"]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [_GAP.join(f"{cell:>{wide}}" for cell, wide in zip(line, widths, strict=True)) for line in lines]


def _bar(length: float, *, blocks: bool) -> str:
    """A bar of `length` columns; what is above 0 is never invisible."""
    if not blocks:
        return "#" * max(round(length), int(length > 0))
    eighths = max(round(length * 8), int(length > 0))
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[part - 1] if part else "")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 2]}.."
