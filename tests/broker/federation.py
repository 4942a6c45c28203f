"""A federation of real processes: coordinators and agents over a real broker, started, watched, killed and looked into.

    federation = Federation(tmp_path, broker.url)
    federation.start_agent("pi-0")
    coordinator = federation.start_coordinator(rounds=3, min_agents=1)
    assert coordinator.wait() == 0
    federation.versions()

Nothing here sleeps for a length of time: `wait_until` looks again and again, up to a bound. Every process writes to a log of
its own, whose end is printed after the test (pytest shows it where the test failed), and is ended by its pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from coordinator.models import ModelStore
from coordinator.run_events import AcceptedUpdate
from coordinator.store import DATABASE, Store, StoreError
from midge.tasks.base import DataSpec, State, Task, TrainSpec, seed_of

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
_TAIL_LINES = 40

T = TypeVar("T")


def wait_until(look: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first true result of `look`, which is called again and again."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}; seen last: {seen!r}"
        time.sleep(0.02)
    return seen


def environment() -> dict[str, str]:
    """For our programs: they find this repository, and no settings of whoever runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MIDGE_")}
    return {**own, "PYTHONPATH": str(ROOT)}


def call(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of our programs to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={**environment(), **variables},
    )


def call_json(module: str, *arguments: str) -> Any:
    """What one of our programs prints as JSON."""
    done = call(module, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Program:
    """One of our programs, as a process in a session of its own."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        directory: Path,
        *,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(), **(variables or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.log().count(text) >= times, f"{self.name} says {text!r}, {times} times")

    def children(self) -> list[psutil.Process]:
        """Its worker or its evaluator, while there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
            return found
        return []

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code, once it has ended by itself."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it as a power failure would."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End it, however it takes."""
        self._process.terminate()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.kill()


class Federation:
    """The processes of one federation, and what they leave on disk.

    Args:
        directory: for logs, state and data; may be another federation's too.
        url: of the broker.
        name: of the federation.
        task: what is learned.
        security: options that every program needs to reach the broker.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        name: str = "test",
        task: str = "tests.broker.tasks:linear",
        security: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.programs: list[Program] = []
        self._directory = directory / name
        self._common = ["--broker", url, "--federation", name, "--task", task, *security]

    # Processes.

    def start_coordinator(
        self, *options: str, state: str = "coordinator", fail_point: str = "", **settings: object
    ) -> Program:
        """`coordinator run`, or what `options` begin with; `settings` go by `--set`."""
        command, *rest = options if options and not options[0].startswith("-") else ("run", *options)
        arguments = [command, *self._common, "--state-dir", str(self.state_dir(state)), *rest]
        return self._start(state, "coordinator", [*arguments, *_assigned({"http_port": 0, **settings})], fail_point)

    def start_agent(
        self, agent_id: str, *options: str, part: int = 0, fail_point: str = "", **settings: object
    ) -> Program:
        """`edge-agent run`, which looks at its data before the first round only where a test says so."""
        own = ["--agent-id", agent_id, "--state-dir", str(self._directory / "agents"), "--data-dir"]
        own += [str(self.control(agent_id)), "--index", str(part), "--of", str(part + 1)]
        assigned = _assigned({"check_data": "false", **settings})
        return self._start(agent_id, "edge_agent", ["run", *self._common, *own, *options, *assigned], fail_point)

    def start_agents(self, number: int, **settings: object) -> list[Program]:
        """`agent-0` with part 0, and so on."""
        return [self.start_agent(f"agent-{part}", part=part, **settings) for part in range(number)]

    def start_watcher(self, name: str, *options: str) -> Program:
        """`coordinator watch`."""
        return self._start(name, "coordinator", ["watch", "--state-dir", str(self.state_dir()), *options])

    def end(self) -> None:
        """End what still runs, and print the end of every log."""
        for program in self.programs:
            program.send_signal(signal.SIGTERM)
        for program in self.programs:
            program.end()
        for program in self.programs:
            title = f"--- {self.name}: {program.name} (pid {program.pid})"
            sys.stdout.write("\n".join([title, *program.log().splitlines()[-_TAIL_LINES:], ""]))

    def _start(self, name: str, module: str, arguments: Sequence[str], fail_point: str = "") -> Program:
        starts = sum(program.name.partition(".")[0] == name for program in self.programs)
        label = f"{name}.{starts + 1}" if starts else name
        variables = {"MIDGE_FAIL_POINT": fail_point} if fail_point else {}
        self.programs.append(Program(label, module, arguments, self._directory / "logs", variables=variables))
        return self.programs[-1]

    # The remote control of an agent's trainings: see tasks.py.

    def control(self, agent_id: str) -> Path:
        """The agent's data directory."""
        path = self._directory / "data" / agent_id
        path.mkdir(parents=True, exist_ok=True)
        return path

    def hold(self, agent_id: str, training: int) -> None:
        """Let this training of the agent, counted from 1, wait for `release`."""
        temporary = self.control(agent_id) / "hold.tmp"
        temporary.write_text(str(training))
        temporary.replace(self.control(agent_id) / "hold")

    def release(self, agent_id: str) -> None:
        (self.control(agent_id) / "hold").unlink()

    def trainings(self, agent_id: str) -> list[str]:
        """What each training of the agent began from, in order."""
        path = self.control(agent_id) / "trainings"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_training(self, agent_id: str, number: int) -> None:
        wait_until(lambda: len(self.trainings(agent_id)) >= number, f"training {number} of {agent_id}")

    def journal(self, agent_id: str) -> Path:
        """Where the agent keeps its unfinished work."""
        return self._directory / "agents" / self.name / agent_id

    # What the coordinator has on disk.

    def state_dir(self, state: str = "coordinator") -> Path:
        return self._directory / state

    @contextlib.contextmanager
    def store(self, state: str = "coordinator") -> Iterator[Store]:
        store = Store(self.state_dir(state), read_only=True)
        try:
            yield store
        finally:
            store.close()

    def runs(self, state: str = "coordinator") -> list[dict[str, Any]]:
        """All runs, the latest first; none where no coordinator was there yet."""
        try:
            with self.store(state) as store:
                return store.runs()
        except StoreError:
            return []

    def run_id(self, state: str = "coordinator") -> str:
        """Of the latest run."""
        return str(self.runs(state)[0]["run_id"])

    def versions(self, state: str = "coordinator", run_id: str = "") -> list[dict[str, Any]]:
        """The versions of the latest run, or of that one; empty where there is none yet."""
        run_ids = [run_id] if run_id else [run["run_id"] for run in self.runs(state)[:1]]
        if not run_ids:
            return []
        with self.store(state) as store:
            return store.versions(run_ids[0])

    def updates(self, round_num: int) -> dict[str, AcceptedUpdate]:
        """The accepted updates of a round of the latest run, by agent."""
        if not self.runs():
            return {}
        with self.store() as store:
            return {update.agent_id: update for update in store.updates(self.run_id(), round_num)}

    def attempts(self, round_num: int) -> tuple[int, dict[str, str]]:
        """The number of the latest attempt at a round of the latest run, and its members' states."""
        with self.store() as store:
            found = store.last_attempt(self.run_id(), round_num)
        assert found is not None
        return found[0], {agent_id: str(state) for agent_id, state in found[2].items()}

    def tallies(self) -> dict[tuple[str, str], int]:
        with self.store() as store:
            return store.tallies(self.run_id())

    def model(self, round_num: int, state: str = "coordinator", run_id: str = "") -> State:
        """A version's model, as arrays."""
        digest = self.versions(state, run_id)[round_num]["digest"]
        with ModelStore(self.state_dir(state) / "models").open(digest) as model:
            return model.state()

    def epoch(self, state: str = "coordinator") -> int:
        with contextlib.closing(sqlite3.connect(self.state_dir(state) / DATABASE)) as connection:
            return int(connection.execute("select value from meta where key = 'epoch'").fetchone()[0])

    def wait_for_round(self, round_num: int, state: str = "coordinator") -> None:
        """Wait until this round is committed."""
        wait_until(lambda: len(self.versions(state)) > round_num, f"round {round_num} of {self.name} is committed")

    def wait_for_update(self, agent_id: str, round_num: int) -> AcceptedUpdate:
        """Wait until the coordinator has accepted the agent's update."""
        what = f"the update of {agent_id} in round {round_num}"
        return wait_until(lambda: self.updates(round_num).get(agent_id), what)

    # What the coordinator serves.

    def http_url(self, state: str = "coordinator") -> str:
        """Where the coordinator serves, once it does."""
        path = self.state_dir(state) / "service.json"
        text = wait_until(lambda: path.read_text() if path.exists() else "", f"{path.name} is there")
        return str(json.loads(text)["url"])

    def get(self, path: str, state: str = "coordinator") -> tuple[int, str]:
        """Status and body of an answer."""
        try:
            with urllib.request.urlopen(self.http_url(state) + path, timeout=PATIENCE_S) as answer:  # noqa: S310  ours
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_ready(self, program: Program) -> float:
        """Wait until a coordinator answers that it is ready; seconds from its start."""
        path = self.state_dir() / "service.json"

        def is_ready() -> bool:
            with contextlib.suppress(OSError, ValueError):  # of a process that is gone, or not up yet
                url = str(json.loads(path.read_text())["url"])
                with urllib.request.urlopen(f"{url}/readyz", timeout=PATIENCE_S) as answer:  # noqa: S310  ours
                    return answer.status == 200
            return False

        wait_until(is_ready, f"{program.name} is ready")
        return time.monotonic() - program.started_at

    def board(self, state: str = "coordinator") -> dict[str, Any]:
        board: dict[str, Any] = json.loads(self.get("/api/v1/status", state)[1])
        return board

    def agent_views(self, state: str = "coordinator") -> dict[str, dict[str, Any]]:
        """What the coordinator shows of each agent, by its id."""
        return {view["agent_id"]: view for view in self.board(state)["agents"]}


def _assigned(settings: Mapping[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def federated(task: Task, parts: Mapping[str, int], rounds: int, *, seed: int = 0, **training: Any) -> list[State]:
    """The models of rounds 0 to `rounds` by FedAvg in plain NumPy, of agents by id with their parts.

    w <- sum (n_k / n) w_k in float64, agents in the order of their ids; an integer buffer takes the largest.
    """
    models = [task.initial_state(seed)]
    data = {agent_id: task.load_data(DataSpec(part=part)) for agent_id, part in sorted(parts.items())}
    for round_num in range(1, rounds + 1):
        trained = [
            task.train(
                models[-1], data[agent_id], TrainSpec(seed=seed_of(seed, round_num, agent_id), **training), _mute
            )
            for agent_id in data
        ]
        models.append(mean([one.state for one in trained], [one.num_examples for one in trained]))
    return models


def mean(states: Sequence[State], num_examples: Sequence[int]) -> State:
    """The mean by examples of float tensors, and the largest of integer ones, each in its own type."""
    weights = [number / sum(num_examples) for number in num_examples]
    result = {}
    for name, first in states[0].items():
        arrays = [state[name] for state in states]
        if first.dtype.kind == "f":
            total = sum(weight * array.astype(np.float64) for weight, array in zip(weights, arrays, strict=True))
            result[name] = np.asarray(total).astype(np.float32).astype(first.dtype)
        else:
            result[name] = np.max(arrays, axis=0)
    return result


def _mute(fraction: float) -> None:
    """Nobody asks how far a training in a test is."""


def assert_same_model(seen: State, expected: State) -> None:
    """Assert that two models are equal to the bit."""
    assert list(seen) == list(expected)
    for name, array in expected.items():
        assert seen[name].dtype == array.dtype, name
        np.testing.assert_array_equal(seen[name], array, err_msg=name)
