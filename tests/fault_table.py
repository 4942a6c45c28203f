"""The suite of faults: which test shows which fault, and the table that `make faults` ends with.

    @pytest.mark.fault(1)                      # this test shows that fault 1 of FAULTS is survived
    def test_...(federation, recovery):
        broker.kill()
        with recovery.watch():                 # seconds until the block is left: the time to the next committed round
            federation.wait_for_round(3)
        recovery.ready(seconds)                # from a process' start to the moment at which it says that it is ready
    recovery.lost(num_lost)                # accepted updates that were lost; the test asserts that there are none

`pytest --faults` runs the marked tests alone, the long ones among them (`@pytest.mark.long`, which `make test` leaves out),
and prints the table. A test is one try, unless it says how many it made (`recovery.tried`). A fault whose tests fail, or that
no test has shown, is red, and the status is 1.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

FAULTS = {
    1: "broker killed and started again, idle and in mid-transfer",
    2: "broker lost what it kept, or its file is damaged",
    3: "coordinator killed at each transition",
    4: "agent killed: training, uploading, before the receipt",
    5: "messages delivered twice",
    6: "frames reordered, interleaved, missing, out of range",
    7: "update of an old round, an old epoch, a round to come",
    8: "damaged or truncated frame, wrong digest",
    9: "message above a broker's limit",
    10: "NaN, infinity, huge norm",
    11: "wrong layout: shape, type, name, more or fewer tensors",
    12: "num_examples absurd or of another type",
    13: "wall clock wrong, or set back",
    14: "disk full, read-only, broken",
    15: "coordinator frozen: a slow consumer",
    16: "network cut, half-open connection",
    17: "two agents with one id",
    18: "old messages replayed",
    19: "forged agent id",
    20: "retained poison",
    21: "decompression bomb",
    22: "pickled payload",
    23: "paths and wildcards in names",
    24: "header bomb: huge counts and depths",
    25: "exception in a callback, dead network thread",
    26: "training longer than the keep-alive",
    27: "quorum never reached, all agents gone, one flapping",
    28: "200 agents come back at once after a broker's restart",
    29: "two coordinators at once",
    30: "agent and coordinator of different protocol versions",
    31: "rogue subscriptions, unbounded metric labels",
    32: "Byzantine updates, divergence",
    33: "TLS certificate expired, or of another authority",
    34: "SIGTERM in mid-round",
    35: "limit of descriptors or memory reached",
}
_PROPERTY = "recovery"
_WIDTH = 150


@dataclass
class Recovery:
    """What one test tells of the fault that it shows.

    Attributes:
        tries: how many times the fault was brought about; 0: once, and it was survived if the test passed.
        seconds: from each fault to the next committed round, by the clock.
        virtual_s: the same in simulated time.
        ready_s: from the start of a process that was killed until it said that it was ready.
        num_lost: accepted updates that were lost.
    """

    tries: int = 0
    seconds: list[float] = field(default_factory=list)
    virtual_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    num_lost: int = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Take the time that the block needs. Enter it right after the fault; leave it when the next round is committed."""
        began = time.monotonic()
        yield
        self.seconds.append(time.monotonic() - began)

    def took_virtual(self, seconds: float) -> None:
        """Take simulated seconds from a fault to the next committed round."""
        self.virtual_s.append(seconds)

    def ready(self, seconds: float) -> None:
        """Take the time in which a process that was killed and started again was ready."""
        self.ready_s.append(seconds)

    def tried(self, number: int) -> None:
        """Say how many times a test brought the fault about."""
        self.tries += number

    def lost(self, number: int) -> None:
        """Add accepted updates that were lost, and fail if there are any."""
        self.num_lost += number
        assert number == 0, f"{number} accepted updates were lost"


@pytest.fixture
def recovery(request: pytest.FixtureRequest) -> Iterator[Recovery]:
    """Where a test says what it saw of a fault."""
    said = Recovery()
    yield said
    request.node.user_properties.append(
        (_PROPERTY, (said.tries, said.seconds, said.virtual_s, said.ready_s, said.num_lost))
    )


@dataclass
class _Row:
    tries: int = 0
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)
    virtual_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    num_lost: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def is_green(self) -> bool:
        return self.tries > 0 and self.tries == self.recovered and self.num_lost == 0 and not self.failed


class FaultTable:
    """A plugin of pytest: gathers what the tests of faults report, and prints it."""

    def __init__(self) -> None:
        self._rows = {number: _Row() for number in FAULTS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test; a failure of its set-up or its end is one as well."""
        properties = dict(report.user_properties)
        for number in properties.get("faults", ()):
            row = self._rows[number]
            if report.failed and report.nodeid not in row.failed:
                row.failed.append(report.nodeid)
                row.tries += report.when != "teardown"
                row.recovered -= report.when == "teardown"
            elif report.when == "call" and report.passed:
                row.tries += 1
                row.recovered += 1
            if report.when == "teardown" and _PROPERTY in properties:
                self._add(row, *properties[_PROPERTY], passed=report.nodeid not in row.failed)

    @staticmethod
    def _add(
        row: _Row,
        tries: int,
        seconds: list[float],
        virtual_s: list[float],
        ready_s: list[float],
        num_lost: int,
        *,
        passed: bool,
    ) -> None:
        further = max(0, tries - 1)
        row.tries += further
        row.recovered += further if passed else 0
        row.seconds += seconds
        row.virtual_s += virtual_s
        row.ready_s += ready_s
        row.num_lost += num_lost

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail where a fault was not shown, though all tests that ran have passed."""
        if exitstatus == pytest.ExitCode.OK and not all(row.is_green for row in self._rows.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self) -> None:
        """Print the table."""
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("#", justify="right")
        table.add_column("fault")
        for name in ("tries", "recovered", "next round, s", "simulated, s", "ready, s", "lost"):
            table.add_column(name, justify="right")
        table.add_column("", no_wrap=True)
        for number, row in self._rows.items():
            verdict = "[green]ok[/]" if row.is_green else "[red]FAILED[/]" if row.tries else "[red]not shown[/]"
            times = (_spread(row.seconds), _spread(row.virtual_s), _spread(row.ready_s))
            seen = (str(row.tries), str(row.recovered), *times, str(row.num_lost))
            table.add_row(str(number), FAULTS[number], *seen, verdict)
        console = Console(width=_WIDTH)
        console.print(table)
        console.print("Seconds from the fault to the next committed round: median / worst. Lost: accepted updates.")
        console.print("Ready: from the start of a coordinator that was killed until /readyz says so.")
        for number, row in self._rows.items():
            for test in row.failed:
                console.print(f"[red]{number}[/] {test}", markup=True, highlight=False)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} / {max(values):.1f}" if values else ""


def add_options(parser: pytest.Parser) -> None:
    """Add `--faults`."""
    parser.addoption(
        "--faults", action="store_true", help="Run the tests of faults alone, long ones too; print the table."
    )


def configure(config: pytest.Config) -> None:
    """Print the table at the end, in the process that hears of all tests."""
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultTable(), "fault-table")


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this kind of session does not run, and note on each test which faults it shows.

    Raises:
        pytest.UsageError: a test names a fault that there is not.
    """
    wants_faults = config.getoption("--faults")
    chosen, left = [], []
    for item in items:
        numbers = sorted({number for mark in item.iter_markers("fault") for number in mark.args})
        if unknown := set(numbers) - set(FAULTS):
            raise pytest.UsageError(
                f"{item.nodeid}: no fault has the number {unknown}; those there are: tests/fault_table.py"
            )
        if numbers:
            item.user_properties.append(("faults", numbers))
        runs = bool(numbers) if wants_faults else item.get_closest_marker("long") is None
        (chosen if runs else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen
