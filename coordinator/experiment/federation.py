"""The demonstration's federation: a broker, the coordinator in this process, and agents; whatever happens, they end together.

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
from typing import Any, Self

from coordinator.config import Settings, load_settings
from coordinator.driver import SupersededError
from coordinator.experiment.agents import AgentPlan, Agents, deal_labels, last_words
from coordinator.experiment.demo_report import Round
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
from midge.wire.topics import Topics

LOCAL_BROKERS: dict[str, Kind] = {"mosquitto": "mosquitto", "embedded": "embedded"}

_TRAINING = {"local_epochs": 2, "batch_size": 10, "learning_rate": 0.1}
_DEADLINES = {"start_deadline_s": 60.0, "selection_deadline_s": 30.0, "round_deadline_s": 120.0, "max_attempts": 2}
_UNREACHABLE_S = 15.0
_CLEARING_S = 3.0
_CONNECTION = ("USERNAME", "PASSWORD", "PASSWORD_FILE", "CA_FILE", "CERT_FILE", "KEY_FILE")


class DemoError(Exception):
    """The demonstration cannot go on. `status` is what to exit with: 1 it failed, 2 it was wrongly used."""

    def __init__(self, text: object, status: int = 1) -> None:
        super().__init__(str(text))
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be shown.

    Attributes:
        rounds: of the federation.
        num_agents: 2 to 10.
        seed: of every random choice.
        broker: URL of one to use, or which one to start; None for whichever is there.
        out: directory for all results.
    """

    rounds: int
    num_agents: int
    seed: int
    broker: str | None
    out: Path

    @property
    def agents(self) -> list[AgentPlan]:
        """Who takes part. Elsewhere than on a broker of our own, `agent-1` may be the name of somebody."""
        stem = "agent" if self.broker is None or self.broker in LOCAL_BROKERS else "demo-agent"
        hands = deal_labels(self.num_agents)
        return [AgentPlan(agent_id=f"{stem}-{number}", classes=hand) for number, hand in enumerate(hands, start=1)]

    @property
    def state_dir(self) -> Path:
        """Of the coordinator."""
        return self.out / "state"

    @property
    def log_dir(self) -> Path:
        """Of everybody."""
        return self.out / "logs"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the federation came to.

    Attributes:
        run_id: of its run.
        last_digest: of its last model.
        rounds: how each version does.
        wall_s: from the start of the agents to the last model, evaluated.
    """

    run_id: str
    last_digest: str
    rounds: Sequence[Round]
    wall_s: float


class Federation:
    """All of it, while it is entered.

    Args:
        plan: what is to be shown.
        scratch: a directory for what nobody wants to keep.

    Attributes:
        service: the coordinator.
        settings: its settings.
        broker: "mosquitto" or "embedded", or the address of the one that was given.
    """

    service: Service
    settings: Settings
    broker: str

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self._plan = plan
        self._scratch = scratch
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
                self.settings.federation, self._plan.seed, self._scratch / "agents", self._plan.log_dir, environ
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
            DemoError: something died or failed; says what.
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
            raise DemoError(f"the coordinator failed: {error}") from error
        if self._problem:
            raise DemoError(self._problem)
        if self.service.state is not RunState.DONE:
            raise DemoError(self._failure())
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
            raise DemoError(error) from error
        return {"MIDGE_BROKER": self._local.url}

    def _make_service(self, environ: Mapping[str, str]) -> None:
        plan = self._plan
        options: dict[str, Any] = {
            "broker": environ["MIDGE_BROKER"],  # its place, where it is wrong, is the option
            "federation": f"demo-{secrets.token_hex(3)}",
            "task": "digits",
            "rounds": plan.rounds,
            "min_agents": plan.num_agents,
            "seed": plan.seed,
            "state_dir": str(plan.state_dir),
            "http_port": 0,
            **_TRAINING,
            **_DEADLINES,
        }
        try:
            self.settings = load_settings(environ=environ, options=options)
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
            self.service.begin_run()
        except (SettingsError, AddressError, StoreError, HttpError, ModelError) as error:
            raise DemoError(error, status=2) from error

    def _watch(self) -> None:
        """After each turn of the coordinator: is everybody there?"""
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
        store = Store(self._plan.state_dir, read_only=True)
        try:
            versions = store.versions(self.service.run_id)
        finally:
            store.close()
        rounds = []
        for version in versions[1:]:
            score = version["central"]
            if score is None:
                log = self._plan.log_dir / "coordinator.log"
                raise DemoError(f"the model of round {version['round_num']} was not evaluated. {last_words(log)}")
            rounds.append(
                Round(
                    round=version["round_num"],
                    accuracy=score.metrics["accuracy"],
                    loss=score.loss,
                    duration_s=version["duration_s"],
                    num_updates=version["num_updates"],
                )
            )
        wall_s = self._done_at - self._began
        return Outcome(run_id=self.service.run_id, last_digest=versions[-1]["digest"], rounds=rounds, wall_s=wall_s)

    def _clear_broker(self) -> None:
        """Have somebody else's broker forget all retained messages of this federation. Gives up after a while."""
        topics, run_id = Topics(self.settings.federation), self.service.run_id
        events: EventQueue[TransportEvent] = EventQueue()
        transport = MqttTransport(self._address, f"demo-{secrets.token_hex(6)}", events)
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


def _num_frames(state_dir: Path, run_id: str) -> int:
    store = Store(state_dir, read_only=True)
    try:
        row = store.run(run_id)
        return row["num_frames"] if row else 0
    finally:
        store.close()
