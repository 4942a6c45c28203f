"""The supervisor process of an agent: connects driver, MQTT, journal and trainer, and runs them until it is told to stop.

At rest it waits in one call for the next event: no polling, no torch, no numpy.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import signal
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from edge_agent import agent_events as ev
from edge_agent.agent import AgentState
from edge_agent.config import Settings
from edge_agent.driver import Driver, make_agent
from edge_agent.journal import Journal
from edge_agent.policy import objection, on_battery
from edge_agent.trainer import Trainer, WorkerExited, WorkerReplied
from edge_agent.worker_messages import DataChecked, DataOptions, SetUp
from midge import PROTOCOL, __version__
from midge.eventqueue import EventQueue
from midge.log import log_event
from midge.transport.address import Address
from midge.transport.base import TransportEvent, Will
from midge.transport.mqtt import MqttTransport
from midge.wire.identifiers import task_name
from midge.wire.messages import Invitation, Presence, encode
from midge.wire.topics import Topics

if TYPE_CHECKING:
    from edge_agent.metrics import AgentMetrics

_log = logging.getLogger("edge_agent")
_LONGEST_WAIT_S = 60.0
"""Then the network thread is looked after."""
_TELL_AFTER_S = 10.0
_WAITS = {
    AgentState.OFFLINE: "broker",
    AgentState.FETCHING: "model",
    AgentState.UPLOADING: "credit",
    AgentState.AWAITING_RECEIPT: "receipt",
}
"""What an agent that has work waits for, in each state; to train is no wait."""


class NetworkThreadError(Exception):
    """The network thread is dead: nothing can be heard any more, and only a new process helps."""


class _Stop:
    """Put into the queue to end the loop."""


_Event = TransportEvent | WorkerReplied | WorkerExited | _Stop


class Service:
    """One agent.

    Args:
        settings: checked.
        address: of the broker.

    Raises:
        JournalError: the state directory cannot be used.
    """

    def __init__(self, settings: Settings, address: Address) -> None:
        self.settings = settings
        self._events: EventQueue[_Event] = EventQueue()
        self._journal = Journal(Path(settings.state_dir) / settings.federation / settings.agent_id)
        topics = Topics(settings.federation)
        presence = Presence(
            online=True,
            incarnation=secrets.token_hex(8),
            protocol=PROTOCOL,
            version=__version__,
            task=task_name(settings.task),
            labels=dict(settings.labels),
        )
        will = Presence(online=False, incarnation=presence.incarnation)
        self._transport = MqttTransport(
            address,
            settings.agent_id,
            self._events,
            will=Will(topics.presence(settings.agent_id), encode(will)),
            keepalive_s=settings.keepalive_s,
            clean_start=False,
        )
        self._trainer = Trainer(
            SetUp(
                agent_id=settings.agent_id,
                task=settings.task,
                data=_data_options(settings),
                max_memory_mb=settings.max_memory_mb,
            ),
            self._journal.path,
            self._events.put,
            num_threads=settings.threads,
            idle_s=settings.worker_idle_s,
        )
        self._metrics = _metrics(settings)
        self._measured = (0, 0, 0)
        self._driver = Driver(
            settings.agent_id,
            topics,
            make_agent(random.Random(), time.monotonic(), self._journal),  # noqa: S311  jitter, not a secret
            self._transport,
            self._journal,
            self._trainer,
            presence,
            self._object,
            self._observe,
        )
        self._state = self._driver.agent.state
        self._state_since = time.monotonic()
        self._tell_at = math.inf

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then say farewell.

        Raises:
            NetworkThreadError: whoever runs this agent should start it again; its work is kept.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        settings = self.settings
        log_event(_log, logging.INFO, "agent started", agent=settings.agent_id, task=settings.task, version=__version__)
        unfinished = self._journal.invitation()
        if unfinished is not None:  # the coordinator, if it still wants that, invites again once it sees us
            log_event(_log, logging.INFO, "was last invited", run=unfinished.run_id, round=unfinished.round_num)
        self._transport.start()
        try:
            if settings.check_data:
                self._trainer.check_data()
            while self._turn():
                pass
        finally:
            self._trainer.stop()
            self._driver.say_farewell()
            self._transport.stop()
            self._journal.close()
        log_event(_log, logging.INFO, "agent stopped", agent=settings.agent_id)

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._events.put(_Stop())

    def _turn(self) -> bool:
        deadline = min(self._driver.agent.deadline(), self._trainer.deadline())
        wait_s = None if deadline == math.inf else min(max(0.0, deadline - time.monotonic()), _LONGEST_WAIT_S)
        events = self._events.take(wait_s)
        for event in events:
            now = time.monotonic()
            match event:
                case _Stop():
                    return False
                case WorkerReplied() | WorkerExited():
                    self._on_worker(event, now)
                case _:
                    self._driver.handle(event, now)
        now = time.monotonic()
        self._trainer.tick(now)
        self._driver.step(ev.TimePassed(), now)
        self._measure()
        self._tell_of_wait(now)
        if not self._transport.is_alive:
            raise NetworkThreadError(f"agent {self.settings.agent_id}: the network thread died: start it again")
        return True

    def _tell_of_wait(self, now: float) -> None:
        """Say in the log that the agent still waits, the first time after 10 s, then ever more seldom.

        It does so when something else wakes it: whoever waits asks again, at least every half minute or so.
        """
        agent = self._driver.agent
        if agent.state is not self._state:
            self._state, self._state_since, self._tell_at = agent.state, now, now + _TELL_AFTER_S
        if now < self._tell_at or agent.state not in _WAITS or agent.invitation is None:
            return
        waits_s = now - self._state_since
        self._tell_at = now + 2 * waits_s
        where: dict[str, Any] = {
            "run": agent.invitation.run_id,
            "round": agent.invitation.round_num,
            "agent": self.settings.agent_id,
        }
        log_event(_log, logging.INFO, "still waiting", **where, waits_for=_WAITS[agent.state], since_s=round(waits_s))

    def _on_worker(self, event: WorkerReplied | WorkerExited, now: float) -> None:
        if isinstance(event, WorkerExited):
            log_event(_log, logging.ERROR, "worker died", agent=self.settings.agent_id, reason=event.reason)
        elif isinstance(event.reply, DataChecked):
            _log_data(event.reply, self.settings)
        result = self._trainer.handle(event, now)
        if isinstance(result, ev.TrainingFinished):
            self._journal.forget_update_file()
            if self._metrics is not None:
                self._metrics.trained(result.update.training_s)
        if result is not None:
            self._driver.step(result, now)

    def _object(self, invitation: Invitation) -> ev.Objection | None:
        hour = datetime.now().hour  # noqa: DTZ005  the operator's rule is in local time
        return objection(invitation, self.settings, hour, discharging=on_battery())

    def _observe(self, note: ev.Note) -> None:
        if self._metrics is None:
            return
        match note:
            case ev.StateChanged(state):
                self._metrics.state(cast("Any", state.upper()))
                self._metrics.connected(state != "offline")
            case ev.RoundEnded(_, outcome):
                self._metrics.round_ended(cast("Any", outcome))
            case _:
                pass

    def _measure(self) -> None:
        """Once a turn: what came and went in it."""
        if self._metrics is None:
            return
        before, driver = self._measured, self._driver
        self._measured = now = (driver.num_invalid, driver.num_bytes_in, driver.num_bytes_out)
        num_invalid, bytes_in, bytes_out = (count - earlier for count, earlier in zip(now, before, strict=True))
        self._metrics.invalid_messages(num_invalid)
        self._metrics.message("in", bytes_in)
        self._metrics.message("out", bytes_out)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stop()


def _data_options(settings: Settings) -> DataOptions:
    return DataOptions(
        data_dir=settings.data_dir or None,
        classes=settings.classes,
        sel_prob=settings.sel_prob,
        def_prob=settings.def_prob,
        partition=settings.partition,
        part=settings.index,
        num_parts=settings.of,
        seed=settings.data_seed,
        download=settings.download,
    )


def _log_data(checked: DataChecked, settings: Settings) -> None:
    """Say what this agent would train on, or what is the matter with that."""
    summary = checked.summary
    if summary is None:
        consequence = f"invitations are refused with reason {checked.reason}; each one looks at the data anew"
        log_event(
            _log,
            logging.ERROR,
            "data cannot be used",
            agent=settings.agent_id,
            task=settings.task,
            detail=checked.detail,
            consequence=consequence,
        )
        return
    shown: dict[str, Any] = {"examples": summary.num_examples, "labels": summary.labels_line()}
    log_event(_log, logging.INFO, "data checked", agent=settings.agent_id, task=settings.task, **shown)
    if summary.is_of_one_class:
        hint = "training here teaches no other label; if that is not meant, look at data_dir, classes and partition"
        log_event(_log, logging.WARNING, "data of one class", agent=settings.agent_id, hint=hint, **shown)


def _metrics(settings: Settings) -> AgentMetrics | None:
    if settings.metrics_port < 0:
        return None
    from edge_agent.metrics import AgentMetrics  # noqa: PLC0415  only where it is asked for: it costs memory

    metrics = AgentMetrics(settings.agent_id, settings.federation)
    port = metrics.serve(settings.metrics_port)
    log_event(_log, logging.INFO, "metrics served", agent=settings.agent_id, url=f"http://127.0.0.1:{port}/metrics")
    return metrics
