"""`edge-agent data`: what an agent would train on, loaded as it would, with neither broker nor coordinator."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.config import Settings
from midge.tasks.base import DataSpec, Task, TaskError, test_data_of
from midge.tasks.inspection import summarize
from midge.tasks.registry import find_task
from midge.tasks.summary import DataSummary, bar_chart, table

_MIN_WIDTH, _MAX_WIDTH = 40, 100
_ALL_PARTS = -1


class DataSettings(Settings, frozen=True, kw_only=True):
    """An agent's settings, of which one more may be missing: without an index, all parts are looked at."""

    index: Annotated[int, Meta(ge=0, le=99_999, description="Which part is this agent's, counted from 0.")] = _ALL_PARTS

    @property
    def parts(self) -> range:
        """The parts to look at."""
        if self.index == _ALL_PARTS and self.partition:
            return range(self.of)
        return range(max(self.index, 0), max(self.index, 0) + 1)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part, and what is in it; or why nothing is."""

    part: int
    summary: DataSummary | None = None
    problem: str = ""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is shown, as JSON has it."""

    task: str
    partition: str
    num_parts: int
    data_seed: int
    parts: tuple[Part, ...]
    test: DataSummary | None = None
    test_problem: str = ""


def show(settings: DataSettings, *, as_json: bool, plot: Path | None) -> int:
    """Print what there is, and draw it into `plot` if one is wanted; returns the program's exit code."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        _say("--plot needs matplotlib, which is not installed: pip install matplotlib")
        return 2
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a task prints is none of the result
            shown = look(settings)
    except TaskError as error:  # there is no such task
        _say(str(error))
        return 2
    problems = list(dict.fromkeys(part.problem for part in shown.parts if part.problem))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode() + "\n")
    elif any(part.summary is not None for part in shown.parts):
        width = min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)
        blocks = "utf" in (sys.stdout.encoding or "").lower()
        sys.stdout.write("\n".join(lines(shown, settings, width, blocks=blocks)) + "\n")
    for problem in problems:
        _say(problem)
    if plot is not None and not problems:
        return _draw(shown, settings, plot)
    return 1 if problems else 0


def look(settings: DataSettings) -> Shown:
    """Load the data of each part in turn, and the test data.

    Raises:
        TaskError: the task cannot be found.
    """
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # a worker is started by `python -m`, which finds a user's task there
    task = find_task(settings.task)
    parts = tuple(_part(task, settings, part) for part in settings.parts)
    test, test_problem = None, ""
    try:
        test_data = test_data_of(task, _spec(settings, 0))
        test = None if test_data is None else summarize(task, test_data)
    except Exception as error:  # noqa: BLE001  it is somebody's code, and no matter of this device
        test_problem = _described(error)
    return Shown(
        task=settings.task,
        partition=settings.partition,
        num_parts=settings.of,
        data_seed=settings.data_seed,
        parts=parts,
        test=test,
        test_problem=test_problem,
    )


def _part(task: Task, settings: DataSettings, part: int) -> Part:
    try:
        return Part(part=part, summary=summarize(task, task.load_data(_spec(settings, part))))
    except Exception as error:  # noqa: BLE001  a user's task may raise anything
        return Part(part=part, problem=_described(error))


def _spec(settings: DataSettings, part: int) -> DataSpec:
    return DataSpec(
        data_dir=Path(settings.data_dir) if settings.data_dir else None,
        download=settings.download,
        classes=settings.classes,
        sel_prob=settings.sel_prob,
        def_prob=settings.def_prob,
        partition=settings.partition,
        part=part,
        num_parts=settings.of,
        seed=settings.data_seed,
    )


def lines(shown: Shown, settings: DataSettings, width: int, *, blocks: bool = True) -> list[str]:
    """What is shown to a person, in lines of `width` columns where the labels allow that."""
    summaries = [part.summary or DataSummary(num_examples=0) for part in shown.parts]
    found = [*_of_one(shown, summaries[0], settings, width, blocks=blocks)] if len(summaries) == 1 else []
    if not found:
        found = [f"{shown.task}, {dealt(shown)}", "", *table(summaries, width)]
    found.append("")
    if shown.test is not None:
        found.append(f"test data: {shown.test.examples_line()}, for the coordinator alone")
    else:
        found.append(f"test data: none{f' ({shown.test_problem})' if shown.test_problem else ''}")
    return found


def _of_one(shown: Shown, summary: DataSummary, settings: DataSettings, width: int, *, blocks: bool) -> Iterator[str]:
    how = f", part {shown.parts[0].part} of {dealt(shown)}" if shown.partition else ""
    yield f"{settings.agent_id}, task {shown.task}{how}: {summary.examples_line()}"
    if summary.labels:
        yield ""
        yield from bar_chart(summary.labels, width, blocks=blocks)
    elif summary.num_examples:
        yield "the labels of these data cannot be read"
    if summary.is_of_one_class:
        yield ""
        yield "all have one label: training here teaches no other; look at --data-dir, --classes and --partition"


def dealt(shown: Shown) -> str:
    """How the data are dealt out, for a title."""
    return f"{shown.partition} over {shown.num_parts} agents, seed {shown.data_seed}"


def _draw(shown: Shown, settings: DataSettings, path: Path) -> int:
    from edge_agent.data_picture import draw  # noqa: PLC0415  with it comes matplotlib

    summaries = [part.summary for part in shown.parts if part.summary is not None]
    if any(summary.labels is None for summary in summaries):
        _say(f"--plot: the labels of task {shown.task} cannot be read, so there is nothing to draw")
        return 1
    title = f"{shown.task}: {dealt(shown)}" if len(summaries) > 1 else f"{settings.agent_id}, task {shown.task}"
    if settings.classes:
        owned = ", ".join(map(str, settings.classes))
        title += f": {settings.sel_prob:.0%} of labels {owned} and {settings.def_prob:.0%} of others"
    if len(summaries) == 1 and shown.partition:
        title += f", part {shown.parts[0].part} of {dealt(shown)}"
    try:
        draw(title, [(part.part, part.summary) for part in shown.parts if part.summary is not None], path)
    except OSError as error:
        _say(f"--plot {path}: {error.strerror or error}")
        return 1
    _say(f"wrote {path}")
    return 0


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, TaskError) else f"loading the data failed: {type(error).__name__}: {error}"


def _say(text: str) -> None:
    sys.stderr.write(f"edge-agent: {text}\n")
