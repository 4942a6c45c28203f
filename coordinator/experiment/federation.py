"""The federation of an experiment: a broker, the coordinator in this process, and agents; whatever happens, they end together.

A broker that was given with `--broker` may have others on it: the federation gets a name that nobody has, agents get ids
that no common set-up has, and in the end the broker is made to forget what it was told to keep.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from coordinator.config import Settings, load_settings
from coordinator.driver import SupersededError
from coordinator.experiment.agents import AgentPlan, Agents, last_words
from coordinator.experiment.attendance import Attendance
from coordinator.experiment.interrupts import Interrupts
from coordinator.http import HttpError
from coordinator.models import ModelError
from coordinator.publisher import clear_retained
from coordinator.run import RunState
from coordinator.service import Service
from coordinator.store import Store, StoreError
from midge.eventqueue import EventQueue
from midge.settings import SettingsError
from midge.transport.address import Address, AddressError
from midge.transport.base import Connected, TransportEvent
from midge.transport.brokers import BrokerError, Kind, LocalBroker, start_local_broker
from midge.transport.mqtt import MqttTransport
from midge.wire.messages import Evaluation
from midge.wire.topics import Topics

LOCAL_BROKERS: dict[str, Kind] = {"mosquitto": "mosquitto", "embedded": "embedded"}

ATTENDANCE_FILE = "attendance.jsonl"
_UNREACHABLE_S = 15.0
_CLEARING_S = 3.0
_CONNECTION = ("USERNAME", "PASSWORD", "PASSWORD_FILE", "CA_FILE", "CERT_FILE", "KEY_FILE")


class ExperimentError(Exception):
    """The experiment cannot go on. `status` is what to exit with: 1 it failed, 2 it was wrongly used."""

    def __init__(self, text: object, status: int = 1) -> None:
        super().__init__(str(text))
        self.status = status


@dataclass(frozen=True, kw_only=True)
class FederationPlan:
    """Who learns what together.

    Attributes:
        settings: of the coordinator, but for its connection.
        agents: who takes part.
        broker: URL of one to use, or which one to start; None for whichever is there.
        agents_dir: where the agents keep their state.
        log_dir: for everybody's log.
        threads: that each agent trains with.
    """

    settings: Settings
    agents: Sequence[AgentPlan]
    broker: str | None
    agents_dir: Path
    log_dir: Path
    threads: int = 1

    @property
    def state_dir(self) -> Path:
        """Of the coordinator."""
        return Path(self.settings.state_dir)


@dataclass(frozen=True, kw_only=True)
class CommittedRound:
    """A version that the federation made; 0 is the initial model.

    Attributes:
        score: central; None where it was not evaluated.
        num_examples: by agent, of each update that counted.
    """

    round_num: int
    digest: str
    score: Evaluation | None
    duration_s: float
    num_updates: int
    num_examples: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the federation came to.

    Attributes:
        run_id: of its run.
        rounds: every version, from 0.
        wall_s: from the start of the agents to the last model, evaluated.
    """

    run_id: str
    rounds: Sequence[CommittedRound]
    wall_s: float

    @property
    def last_digest(self) -> str:
        """Of the last model."""
        return self.rounds[-1].digest


class Federation:
    """All of it, while it is entered.

    Args:
        plan: who learns what.

    Attributes:
        service: the coordinator.
        settings: its settings, with its connection.
        broker: "mosquitto" or "embedded", or the address of the one that was given.
    """

    service: Service
    settings: Settings
    broker: str

    def __init__(self, plan: FederationPlan) -> None:
        self._plan = plan
        self._at_end = ExitStack()
        self._local: LocalBroker | None = None
        self._broker_dir = plan.log_dir / "broker"
        self._done_at = 0.0
        self._problem = ""

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            environ = self._reach_broker(undo)
            self._make_service(environ)
            if self._local is None:
                undo.callback(self._clear_broker)
            self._agents = Agents(
                self.settings.federation,
                self.settings.task,
                self._plan.agents_dir,
                self._plan.log_dir,
                environ,
                self._plan.threads,
            )
            undo.callback(self._agents.stop)
            self._at_end = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._at_end.close()

    def run(self, interrupts: Interrupts, look: Callable[[], None]) -> Outcome:
        """Start the agents and run all rounds; `look` is called after each turn of the coordinator.

        Raises:
            ExperimentError: something died or failed; says what.
            Interrupted: a signal came.
        """
        self._began = time.monotonic()
        for plan in self._plan.agents:
            self._agents.start(plan)

        def each_turn() -> None:
            self._watch()
            look()

        try:
            with interrupts.waking(self.service.stop):
                self.service.run(each_turn)
        except (SupersededError, OSError) as error:
            raise ExperimentError(f"the coordinator failed: {error}") from error
        if self._problem:
            raise ExperimentError(self._problem)
        if self.service.state is not RunState.DONE:
            raise ExperimentError(self._failure())
        return self._outcome()

    def _reach_broker(self, undo: ExitStack) -> Mapping[str, str]:
        """Start a broker where none was given; the way to it as environment variables."""
        given = self._plan.broker
        if given is not None and given not in LOCAL_BROKERS:
            connection = {f"MIDGE_{key}": os.environ.get(f"MIDGE_{key}", "") for key in _CONNECTION}
            return {"MIDGE_BROKER": given, **{key: value for key, value in connection.items() if value}}
        kind = LOCAL_BROKERS[given] if given is not None else "auto"
        try:
            self._local = undo.enter_context(start_local_broker(kind, directory=self._broker_dir))
        except BrokerError as error:
            raise ExperimentError(error) from error
        return {"MIDGE_BROKER": self._local.url}

    def _make_service(self, environ: Mapping[str, str]) -> None:
        try:
            # Of the broker: its place, where it is wrong, is the option.
            connection = load_settings(environ=environ, options={"broker": environ["MIDGE_BROKER"]})
            keys = ("broker", *(key.lower() for key in _CONNECTION))
            given = {key: getattr(connection, key) for key in keys}
            self.settings = msgspec.structs.replace(self._plan.settings, **given)
            self._address = Address.parse(
                self.settings.broker,
                username=self.settings.username or None,
                password=self.settings.read_password() or None,
                ca_file=self.settings.ca_file or None,
                cert_file=self.settings.cert_file or None,
                key_file=self.settings.key_file or None,
            )
            self.broker = self._local.kind if self._local else str(self._address)
            self.service = Service(self.settings, self._address)
            self._attendance = Attendance(self._plan.state_dir / ATTENDANCE_FILE)
            if self.service.begin_run() == "begins":
                self._attendance.clear()
        except (SettingsError, AddressError, StoreError, HttpError, ModelError) as error:
            raise ExperimentError(error, status=2) from error

    def _watch(self) -> None:
        """After each turn of the coordinator: who took part, and is everybody there?"""
        self._attendance.note(
            self.service.store, self.service.run_id, max(self.service.shared.board.history, default=0)
        )
        if self.service.state is RunState.DONE:
            self._done_at = self._done_at or time.monotonic()
        elif not self._problem:
            self._problem = self._agents.obituary() or self._broker_problem()
            if self._problem:
                self.service.stop()

    def _broker_problem(self) -> str:
        if self._local is not None:
            log = self._broker_dir / f"{self._local.kind}.log"
            return "" if self._local.is_running() else f"the broker died. {last_words(log)}"
        board = self.service.shared.board
        if board.is_connected or time.monotonic() - self._began < _UNREACHABLE_S:
            return ""
        return f"{board.broker_problem or f'{board.broker}: no answer'} (given up after {_UNREACHABLE_S:.0f} s)"

    def _failure(self) -> str:
        """Why the run failed, and what agents said of it."""
        board = self.service.shared.board
        said = [
            f"  {agent.agent_id} {agent.activity}: {agent.detail}" for agent in board.agents.values() if agent.detail
        ]
        return "\n".join([f"the run failed: {board.reason}", *said, f"The logs are in {self._plan.log_dir}."])

    def _outcome(self) -> Outcome:
        return outcome_of(self._plan.state_dir, self.service.run_id, self._done_at - self._began)

    def _clear_broker(self) -> None:
        """Have somebody else's broker forget all retained messages of this federation. Gives up after a while."""
        topics, run_id = Topics(self.settings.federation), self.service.run_id
        events: EventQueue[TransportEvent] = EventQueue()
        transport = MqttTransport(self._address, f"experiment-{secrets.token_hex(6)}", events)
        transport.start()
        deadline = time.monotonic() + _CLEARING_S
        while (left_s := deadline - time.monotonic()) > 0:
            if not any(isinstance(event, Connected) for event in events.take(left_s)):
                continue
            for topic in (topics.coordinator, *(topics.presence(plan.agent_id) for plan in self._plan.agents)):
                transport.publish(topic, b"", retain=True)
            clear_retained(transport, topics, run_id, _num_frames(self._plan.state_dir, run_id))
            break
        transport.stop(_CLEARING_S)


def outcome_of(state_dir: Path, run_id: str, wall_s: float = 0.0) -> Outcome:
    """What the database says that a run came to."""
    attendance = Attendance(state_dir / ATTENDANCE_FILE)
    store = Store(state_dir, read_only=True)
    try:
        versions = store.versions(run_id)
    finally:
        store.close()
    rounds = [
        CommittedRound(
            round_num=version["round_num"],
            digest=version["digest"],
            score=version["central"],
            duration_s=version["duration_s"],
            num_updates=version["num_updates"],
            num_examples=attendance.rounds.get(version["round_num"], {}),
        )
        for version in versions
    ]
    return Outcome(run_id=run_id, rounds=rounds, wall_s=wall_s)


def _num_frames(state_dir: Path, run_id: str) -> int:
    store = Store(state_dir, read_only=True)
    try:
        row = store.run(run_id)
        return row["num_frames"] if row else 0
    finally:
        store.close()
