"""What a comparison keeps in its directory, so that it can go on where it was.

    plan.json            what is compared, and the name of the federation
    results/NAME.json    what one unit came to; written whole or not at all
    work/NAME/           the coordinator's state, the agents' and everybody's logs, of one federated unit
    lock                 held while a comparison runs here

A unit is the least that is done in one go: a federation, a training in one place, or one agent's training alone, with one
seed. Arms are made of units: `local-average` of every agent's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from coordinator.experiment.compare_plan import ComparePlan
from coordinator.experiment.federation import ExperimentError
from coordinator.experiment.scores import Assessed, RoundScore
from coordinator.files import sync_dir


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """The least that is done in one go.

    Attributes:
        kind: `federated`, `fedsgd`, `centralized` or `alone`.
        agent: who trains alone; else empty.
    """

    kind: str
    seed: int
    agent: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(filter(None, (self.kind, self.agent, f"seed-{self.seed}")))

    @property
    def words(self) -> str:
        """For a person."""
        return f"{self.agent or self.kind}{' alone' if self.agent else ''}, seed {self.seed}"


class UnitResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a unit came to.

    Attributes:
        rounds: from 0, which is before any training.
        tested: the last model.
        steps: gradient steps that were to be made, round by round.
        versions: of the libraries that trained.
        finished_at: UTC, in ISO 8601.
        run_id: of a federation's run, whose models are below `work/`.
        broker: that a federation ran over.
    """

    unit: Unit
    rounds: list[RoundScore]
    tested: Assessed
    steps: tuple[int, ...]
    versions: dict[str, str]
    finished_at: str
    run_id: str = ""
    broker: str = ""

    @property
    def num_steps(self) -> int:
        """That were made in all."""
        return sum(one.num_steps for one in self.rounds)


class _PlanFile(msgspec.Struct, kw_only=True):
    definition: dict[str, Any]
    federation: str
    own_broker: bool


class CompareStore:
    """The directory of a comparison, held while it is entered.

    Args:
        plan: what is compared.
        own_broker: whether we start the broker: agents have other names on somebody else's.

    Raises:
        ExperimentError: the directory cannot be used, is in use, or holds another comparison.
    """

    federation: str

    def __init__(self, plan: ComparePlan, *, own_broker: bool) -> None:
        self._plan = plan
        self._own_broker = own_broker
        self._lock_fd = -1
        self._is_new = False

    def __enter__(self) -> Self:
        out = self._plan.out
        self._is_new = not out.exists()
        try:
            for directory in (out, self._results, out / "work"):
                directory.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(out / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ExperimentError(f"{out}: {error.strerror}; choose another directory with --out", status=2) from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.federation = self._claim()
        except BlockingIOError:
            os.close(self._lock_fd)
            raise ExperimentError(f"{out}: another comparison is running in it; choose another with --out", 2) from None
        except ExperimentError:
            os.close(self._lock_fd)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._is_new:
            self._clear_away()
        os.close(self._lock_fd)

    def _clear_away(self) -> None:
        """Leave no directory behind where the start failed before anything was done: another one may be meant next."""
        out = self._plan.out
        if not any(self._results.iterdir()) and not any((out / "work").iterdir()):
            for name in ("plan.json", "coordinator.log", "lock"):
                (out / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something of somebody else's lies there
                for directory in (self._results, out / "work", out):
                    directory.rmdir()

    @property
    def _results(self) -> Path:
        return self._plan.out / "results"

    def work_dir(self, unit: Unit) -> Path:
        """Where a federated unit keeps its state."""
        return self._plan.out / "work" / unit.name

    def result(self, unit: Unit) -> UnitResult | None:
        """What a unit came to; None while it is to be done."""
        path = self._results / f"{unit.name}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=UnitResult)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ExperimentError(f"{path}: {error}; remove it, and it is made again", status=2) from error

    def save(self, result: UnitResult) -> None:
        """Keep what a unit came to."""
        write_whole(self._results / f"{result.unit.name}.json", _json(result))

    def _claim(self) -> str:
        """The federation's name, of the plan that is here or from now on."""
        path, definition = self._plan.out / "plan.json", self._plan.definition()
        canonical = msgspec.json.decode(msgspec.json.encode(definition))
        if not path.exists():
            federation = f"compare-{secrets.token_hex(3)}"
            ours = _PlanFile(definition=canonical, federation=federation, own_broker=self._own_broker)
            write_whole(path, _json(ours))
            return federation
        try:
            theirs = msgspec.json.decode(path.read_bytes(), type=_PlanFile)
        except msgspec.DecodeError as error:
            raise ExperimentError(f"{path}: {error}; choose another directory with --out", status=2) from error
        differs = _differences(theirs.definition, canonical)
        if theirs.own_broker != self._own_broker:
            differs.append("broker: it ran over " + ("one of its own" if theirs.own_broker else "one that was given"))
        if differs:
            lines = "\n".join(f"  {line}" for line in differs)
            raise ExperimentError(
                f"{self._plan.out}: another comparison was begun here, which differs in\n{lines}\n"
                "Go on with that one by giving the same again, or choose another directory with --out.",
                status=2,
            )
        return theirs.federation


def write_whole(path: Path, body: bytes) -> None:
    """Write a file so that it is there whole or not at all, after a power failure too."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_dir(path.parent)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each value that is another one; what all agents have in common is one line."""
    agents = dict(theirs.get("agents", {})), dict(ours.get("agents", {}))
    of_agents: dict[tuple[str, str, str], list[str]] = {}
    for agent_id in dict.fromkeys((*agents[0], *agents[1])):
        if any(agent_id not in side for side in agents):
            of_agents[(agent_id, *("one" if agent_id in side else "none" for side in agents))] = []
        else:
            for change in _changes(agents[0][agent_id], agents[1][agent_id]):
                of_agents.setdefault(change, []).append(agent_id)
    before, now = ({key: value for key, value in side.items() if key != "agents"} for side in (theirs, ours))
    lines = [f"{key}: {there} there, {here} here" for key, there, here in _changes(before, now)]
    for (key, there, here), owners in of_agents.items():
        name = ".".join(filter(None, (_some(owners), key)))
        lines.append(f"{name}: {there} there, {here} here")
    return lines


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, value there and value here, of each value that differs; a key of an inner table is `table.key`."""
    for key in dict.fromkeys((*ours, *theirs)):
        there, here = theirs.get(key), ours.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _changes(there, here, f"{above}{key}.")
        elif there != here:
            yield f"{above}{key}", _short(there), _short(here)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" if names else ""


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json(content: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
