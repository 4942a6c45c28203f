"""A federation of real processes that is watched for a long time: `fuzz.py` and `soak.py` share this.

Every program works in a directory of its own, which stays empty but for what Midge is told to write there, with `HOME` and
`TMPDIR` pointing into empty directories: a file anywhere else under `root` is a promise broken. Memory and descriptors of each
process are read once a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from coordinator.store import Store, StoreError

ROOT = Path(__file__).resolve().parent.parent
TASK = "benchmarks.null_task:small"
NAME = "long"
SIGNS_OF_TROUBLE = (
    "Traceback",
    "network thread recovered",
    "connection given up: internal error",
    "event lost",
    "paho failed",
    "house-keeping failed",
)
"""What stands in a log where something raised that should not have."""
_ALLOWED = ("broker", "logs", "coordinator/state", "agents/state")


class Program:
    """One of our programs; it can be ended and started again, and keeps its name, its directories and its log."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], root: Path) -> None:
        self.name = name
        self.num_starts = 0
        self._command = [sys.executable, "-m", module, *arguments]
        self._root = root
        self.log_path = root / "logs" / f"{name}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        empty = {word: self._root / word for word in ("home", "tmp", "work")}
        for path in empty.values():
            path.mkdir(exist_ok=True)
        own = {name: value for name, value in os.environ.items() if not name.startswith("MIDGE_")}
        own |= {"PYTHONPATH": str(ROOT), "HOME": str(empty["home"]), "TMPDIR": str(empty["tmp"])}
        with self.log_path.open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own,
                cwd=empty["work"],
                start_new_session=True,
            )
        self.num_starts += 1

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to end; its exit code, -9 where it had to be made to."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def troubles(self) -> list[str]:
        """The lines of its log that should not be there."""
        with self.log_path.open(errors="replace") as log:
            return [line.rstrip() for line in log if any(sign in line for sign in SIGNS_OF_TROUBLE)]


class Federation:
    """A coordinator and some agents that go on and on, by a broker that the caller starts.

    Args:
        root: an empty directory, for everything.
        url: of the broker, or of a way to it.
        num_agents: that take part in every round.
        task: what they do in it.
        settings: of the coordinator, over those here.
    """

    def __init__(self, root: Path, url: str, num_agents: int, task: str = TASK, **settings: object) -> None:
        self.root = root
        common = ["--broker", url, "--federation", NAME, "--task", task]
        # A round must get over whatever a stranger did to its messages, soon.
        chosen: dict[str, object] = {
            "rounds": 1_000_000,
            "min_agents": 2,
            "quorum": 1,
            "http_port": 0,
            "acceptance_deadline_s": 5,
            "selection_deadline_s": 30,
            "round_deadline_s": 8,
            "max_attempts": 1000,
        } | settings
        assigned = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
        self.state_dir = root / "coordinator" / "state"
        arguments = ["run", *common, "--state-dir", str(self.state_dir), *assigned]
        self.coordinator = Program("coordinator", "coordinator", arguments, root)
        self.agents = []
        for number in range(num_agents):
            own = [
                "--agent-id",
                f"agent-{number}",
                "--state-dir",
                str(root / "agents" / "state"),
                "--metrics-port",
                "0",
            ]
            self.agents.append(Program(f"agent-{number}", "edge_agent", ["run", *common, *own], root))

    @property
    def programs(self) -> list[Program]:
        return [self.coordinator, *self.agents]

    def num_rounds(self) -> int:
        """Rounds that are committed."""
        with contextlib.suppress(StoreError):
            store = Store(self.state_dir, read_only=True)
            try:
                rows = store.runs()
                return int(rows[0]["round_num"]) if rows else 0
            finally:
                store.close()
        return 0

    def get(self, path: str) -> str:
        """What the coordinator serves; empty where it does not."""
        try:
            url = json.loads((self.state_dir / "service.json").read_text(encoding="utf-8"))["url"]
            with urllib.request.urlopen(url + path, timeout=10.0) as answer:  # noqa: S310  the coordinator's own
                return str(answer.read().decode())
        except (OSError, ValueError, urllib.error.URLError):
            return ""

    def status(self) -> str:
        with contextlib.suppress(ValueError):
            return str(json.loads(self.get("/api/v1/status"))["status"])
        return "the coordinator does not answer"

    def counts(self, name: str) -> dict[str, float]:
        """The series of a metric of the coordinator, by their labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        return {labels: float(value) for labels, value in (line[len(name) :].rsplit(" ", 1) for line in lines)}

    def agent_counts(self, name: str) -> dict[str, float]:
        """The value of a counter that each agent serves, by agent."""
        found = {}
        for agent in self.agents:
            served = re.findall(r"metrics served .*url=(\S+)", agent.log_path.read_text(errors="replace"))
            with contextlib.suppress(OSError, IndexError), urllib.request.urlopen(served[-1], timeout=10.0) as answer:  # noqa: S310
                lines = answer.read().decode().splitlines()
                found[agent.name] = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
        return found

    def wait_for(self, num_rounds: int, timeout_s: float) -> bool:
        """Whether so many rounds are committed within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.num_rounds() < num_rounds:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def sizes(self) -> dict[str, float]:
        """Bytes of what the coordinator keeps on disk, by kind, and files of models and segments of the spool."""
        found = {"database_bytes": 0.0, "models_bytes": 0.0, "spool_bytes": 0.0, "models": 0.0, "segments": 0.0}
        for path in self.state_dir.rglob("*"):
            with contextlib.suppress(OSError):
                size = path.stat().st_size if path.is_file() else 0
                if path.name.startswith("midge.db"):
                    found["database_bytes"] += size
                elif path.suffix == ".safetensors":
                    found["models_bytes"] += size
                    found["models"] += 1
                elif path.suffix == ".spool":
                    found["spool_bytes"] += size
                    found["segments"] += 1
        return found

    def stray_files(self) -> list[str]:
        """Files that nobody was told to write."""
        files = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        allowed = tuple(f"{place}/" for place in _ALLOWED)
        return sorted(name for name in files if not name.startswith(allowed) and "__pycache__" not in name)

    def stop(self) -> dict[str, int]:
        """Ask all to end; exit codes by name."""
        return {program.name: program.stop() for program in reversed(self.programs)}


@dataclass
class Series:
    """Samples of one number over time."""

    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at_s: float, value: float) -> None:
        self.at_s.append(at_s)
        self.values.append(value)

    def at(self, at_s: float) -> float:
        """The last value up to then; the first one where there is none."""
        return next(
            (value for at, value in zip(self.at_s[::-1], self.values[::-1], strict=True) if at <= at_s), self.values[0]
        )

    def slope(self, skip_s: float = 0.0) -> float:
        """What a straight line through the samples after `skip_s` seconds gains a second; 0 where there are too few."""
        points = [(at, value) for at, value in zip(self.at_s, self.values, strict=True) if at >= skip_s]
        if len(points) < 10:
            return 0.0
        middle_at = sum(at for at, _ in points) / len(points)
        middle = sum(value for _, value in points) / len(points)
        spread = sum((at - middle_at) ** 2 for at, _ in points)
        return sum((at - middle_at) * (value - middle) for at, value in points) / spread if spread else 0.0


class Sampler:
    """Reads memory and descriptors of processes, each under a name; one that was started again begins a series anew.

    Args:
        processes: name and pid of each, asked for at every look.
    """

    def __init__(self, processes: Callable[[], dict[str, int]]) -> None:
        self.began = time.monotonic()
        self.memory: dict[tuple[str, int], Series] = {}
        """Resident bytes by name and pid."""
        self.descriptors: dict[tuple[str, int], Series] = {}
        self._processes = processes

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began

    def look(self) -> None:
        for name, pid in self._processes().items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                memory, descriptors = process.memory_info().rss, process.num_fds()
                self.memory.setdefault((name, pid), Series()).add(self.now_s, memory)
                self.descriptors.setdefault((name, pid), Series()).add(self.now_s, descriptors)

    def longest(self, series: dict[tuple[str, int], Series]) -> dict[str, Series]:
        """Of each name, the series of the process that lived longest."""
        found: dict[str, Series] = {}
        for (name, _), one in series.items():
            if name not in found or len(one.values) > len(found[name].values):
                found[name] = one
        return found


def broker_is_there() -> None:
    """End with a sentence where Mosquitto is not installed."""
    from midge.transport.brokers import find_mosquitto

    if find_mosquitto() is None:
        raise SystemExit("mosquitto is not installed: install it (apt install mosquitto), or put it on the PATH")


def table(rows: Sequence[Sequence[Any]], *, indent: str = "  ") -> str:
    """Columns, the first to the left and the others to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    lines = []
    for first, *others in texts:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(indent + "  ".join(cells))
    return "\n".join(lines)
