"""The driver: turns what comes in, from the broker and from computations, into events, and carries out the run's commands.

It works in turns. Within one, every event that waits is handled: frames go to the spool as they come, and commands are
collected. `flush` ends the turn: the spool is synced if an update was accepted, everything that is to be saved is saved in
one transaction, and only then is anything sent. So nothing is ever acknowledged that a crash could lose, and durability
costs one sync a turn.

It owns no thread and no clock, and everything it needs is handed in, so that the same driver runs on MQTT and files, and on a
broker in memory in tests.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from coordinator import run_events as ev
from coordinator.attempt import address_of
from coordinator.cohort import Change, Fleet
from coordinator.gates import delta_sum_squares
from coordinator.models import ModelFile
from coordinator.publisher import Publisher, clear_retained
from coordinator.run import FINAL, Run
from coordinator.store import AgentLeft, AgentRow
from coordinator.uplink import FrameFacts, Verdict
from midge import PROTOCOL, __version__
from midge.failpoints import fail_point, is_armed
from midge.log import log_event
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    Published,
    SubscriptionDenied,
    Transport,
    TransportEvent,
)
from midge.wire.codecs import FLOAT32, decode_float32
from midge.wire.errors import FrameError, MessageError, WireError
from midge.wire.frames import Frame, content_tag, decode_frame
from midge.wire.messages import (
    MAX_EPOCH_JUMP,
    CoordinatorStatus,
    Presence,
    Refusal,
    RollCall,
    UpdateHeader,
    decode,
    decode_to_coordinator,
    encode,
)
from midge.wire.topics import CoordinatorTopic, OutboxTopic, PresenceTopic, Topics, UpdateFrameTopic

_log = logging.getLogger("coordinator")
_LONGEST_DELAY_S = 0.5
"""What need not be saved at once is saved after this time at the latest."""
_ROLL_CALL_RATE = 500.0
"""Answers to a roll call per second that are asked for: it is spread over the fleet's size by this."""


class SupersededError(Exception):
    """Another coordinator of this federation started after this one: this one must stop."""


class StoreLike(Protocol):
    """What the driver needs of the database."""

    def raise_epoch(self, above: int = 0) -> int:
        """Raise the epoch, durably."""

    def save(self, run_id: str, saves: list[ev.Save], agents: list[AgentRow | AgentLeft]) -> None:
        """Persist, in one transaction."""


class SpoolLike(Protocol):
    """What the driver needs of the spool of the current round."""

    def store(self, round_num: int, agent_id: str, payload: bytes, frame: Frame, facts: FrameFacts) -> None:
        """Store a frame."""

    def stored(self, round_num: int, agent_id: str, tag: bytes) -> Mapping[int, FrameFacts]:
        """The frames of one update that are there already."""

    def forget(self, round_num: int, agent_id: str, tag: bytes) -> None:
        """Treat an update's frames as never stored."""

    def sync(self) -> None:
        """Make everything that was stored durable."""


class ComputeLike(Protocol):
    """What the driver has done by others; results come back through `Driver.step`."""

    def ask(self, command: ev.Computation, now: float) -> None:
        """Begin."""


class Observer(Protocol):
    """Who is told what happened, for logs, metrics and screens. Nothing depends on it."""

    def note(self, note: ev.Note) -> None:
        """The run says so."""

    def saved(self, save: ev.Save) -> None:
        """This was persisted."""

    def traffic(self, direction: str, kind: str, size_bytes: int) -> None:
        """A message went "in" or "out"."""

    def refused(self, kind: str, error: Exception) -> None:
        """A message of this kind broke the protocol."""

    def broker(self, event: Connected | Disconnected) -> None:
        """The connection came or went."""

    def fleet(self, fleet: Fleet, agent_id: str, change: Change | None) -> None:
        """An agent came, left or restarted."""

    def broker_says(self, topic: str, payload: bytes) -> None:
        """The broker's own figures ($SYS)."""


class Driver:
    """The driver.

    Args:
        topics: of the federation.
        transport: the connection; its events are handed to `handle`.
        store: the database.
        spool: where frames wait.
        compute: who computes.
        open_model: opens a stored model by its digest.
        observer: is told.
        epoch: of this coordinator, as the store raised it.
        instance: differs from every other coordinator's.
        broker_topics: the broker's own figures to read.
    """

    def __init__(
        self,
        topics: Topics,
        transport: Transport,
        store: StoreLike,
        spool: SpoolLike,
        compute: ComputeLike,
        open_model: Callable[[str], ModelFile],
        observer: Observer,
        *,
        epoch: int,
        instance: str,
        broker_topics: tuple[str, ...] = (),
    ) -> None:
        self.topics = topics
        self.transport = transport
        self.epoch = epoch
        self.fleet = Fleet()
        self.run: Run | None = None
        self.is_connected = False
        self._num_connections = 0
        self._knows_lead = True
        self._epoch_heard = 0
        """The highest that agents spoke of since we connected again, until we know who leads."""
        self.packet_limit_bytes: int | None = None
        self.problem = ""
        """Why the run cannot go on over this connection, where that is known."""
        self._store = store
        self._spool = spool
        self._compute = compute
        self._open_model = open_model
        self._observer = observer
        self._instance = instance
        self._broker_topics = broker_topics
        self._base: ModelFile | None = None
        self._publisher: Publisher | None = None
        self._published_again_for = ("", 0, 0)
        self._commands: list[ev.Command] = []
        self._moved: dict[str, AgentRow | AgentLeft] = {}
        self._scratch = np.empty(0, np.float64)
        self._later: list[ev.Save] = []
        self._save_at = math.inf
        self._status_is_due = False
        """Whether what is retained as our presence is not ours any more."""
        self._told: Counter[tuple[str, str]] = Counter()
        """The run's tallies as the observer knows them."""

    def deadline(self) -> float:
        """When `flush` has something to do though nothing happened."""
        return self._save_at if self._later else math.inf

    # What comes in.

    def start_run(self, run: Run, now: float) -> None:
        """Make this the current run, and begin or resume it."""
        self.run = run
        self._told = run.tallies.counts.copy()
        self._take(run.start())
        self.step(ev.TimePassed(), now)

    def handle(self, event: TransportEvent, now: float) -> None:
        """Take an event of the connection. Never raises for what a peer sent.

        Raises:
            SupersededError: a newer coordinator is at work.
            OSError: what came cannot be stored: `park`.
        """
        match event:
            case MessageReceived():
                try:
                    self._on_message(event, now)
                except WireError as error:
                    self._observer.refused(_kind_of(event.topic), error)
            case Published(token):
                if self._publisher is not None and self._publisher.taken(token):
                    self._pump(now)
            case Connected(_, packet_limit_bytes):
                self._on_connected(packet_limit_bytes)
                self._observer.broker(event)
                self.step(ev.BrokerConnected(), now)
            case Disconnected(reason):
                self.is_connected = False
                self._publisher = None
                self.fleet.lose_all()
                self._observer.broker(event)
                self.step(ev.BrokerLost(reason), now)
            case SubscriptionDenied(topics):
                if not set(topics) <= set(self._broker_topics):
                    log_event(_log, logging.ERROR, "the broker denies reading", topics=", ".join(topics))

    def step(self, event: ev.Event, now: float) -> None:
        """Hand an event to the run, and keep what it says for the end of the turn."""
        if self.run is not None:
            self._take(self.run.step(event, now))

    def _take(self, commands: list[ev.Command]) -> None:
        """Keep what the run says for the end of the turn; but frames are forgotten before the next one can be stored."""
        for command in commands:
            if isinstance(command, ev.ForgetFrames):
                assert self.run is not None
                self._spool.forget(self.run.current_round, command.agent_id, content_tag(command.update_digest))
            else:
                self._commands.append(command)

    def flush(self, now: float) -> None:
        """End the turn: persist, then act. What acting brings about at once is dealt with too.

        Raises:
            OSError: the disk is full or fails; nothing was sent that depends on what could not be stored: `park`.
        """
        if self._status_is_due:
            self._publish_status(online=True)
        while True:
            if self.run is not None:
                self._take(self.run.end_turn())
            if not self._commands and not self._moved:
                break
            commands, self._commands = self._commands, []
            self._persist([command for command in commands if isinstance(command, ev.SAVES)], now)
            self._perform_all(commands, now)
        if self._later and (now >= self._save_at or self.is_over):
            self._persist([], now, all_of_it=True)

    def _persist(self, saves: list[ev.Save], now: float, *, all_of_it: bool = False) -> None:
        """Save what must be saved before anything is sent; what can wait goes along, or goes alone a moment later."""
        if any(isinstance(save, ev.SaveUpdate) for save in saves):
            self._spool.sync()
            fail_point("coordinator.spool.synced")
        waiting = [*self._later, *saves]
        if all_of_it or self._moved or not all(map(_can_wait, saves)):
            _pass_transitions("saving", waiting)
            self._store.save(self.run.config.run_id if self.run else "", waiting, list(self._moved.values()))
            _pass_transitions("saved", waiting)
            self._later, self._moved = [], {}
            return
        if waiting and not self._later:
            self._save_at = now + _LONGEST_DELAY_S
        self._later = waiting

    # When the disk fails: see disk.py.

    def park(self) -> None:
        """Let go of the run: its memory is ahead of what could be stored, and what it decided is not done.

        What earlier turns left to be saved later, which has been acted on, is kept for `write_waiting`. Until `unpark`, `flush`
        must not be called; events may come, and find no run.
        """
        self.run = None
        self._commands = []
        self._publisher = None
        self._base = None

    def write_waiting(self, run_id: str) -> None:
        """Save what waited when the run was parked; then the disk has all that was ever acted on.

        Raises:
            OSError: it still cannot be written.
        """
        self._store.save(run_id, self._later, list(self._moved.values()))
        self._later, self._moved = [], {}

    def unpark(self, run: Run, now: float) -> None:
        """Go on with the run, as it was read from the disk; the observer, which lives on, is told what it missed.

        That is what a write stored that then failed, and that what was on its way when the run was parked is late.
        """
        for (outcome, reason), count in (run.tallies.counts - self._told).items():
            is_received = outcome == "received"
            note = ev.UpdateReceived("") if is_received else ev.UpdateSettled("", outcome, reason)
            for _ in range(count):
                self._observer.note(note)
        self.start_run(run, now)

    def say_farewell(self) -> None:
        """Tell everyone that this coordinator stops, before it does."""
        self._publish_status(online=False)

    def clear_run(self, run_id: str, num_frames: int) -> None:
        """Have the broker forget an earlier run."""
        clear_retained(self.transport, self.topics, run_id, num_frames)

    def _on_connected(self, packet_limit_bytes: int | None) -> None:
        self.is_connected = True
        self._num_connections += 1
        self._knows_lead, self._epoch_heard = self._num_connections == 1, 0
        self.packet_limit_bytes = packet_limit_bytes
        self.problem = ""
        self._publisher = None
        self.transport.subscribe(
            [
                self.topics.coordinator,
                self.topics.all_presences,
                self.topics.all_outboxes,
                self.topics.all_update_frames,
            ]
        )
        if self._broker_topics:
            self.transport.subscribe(self._broker_topics, qos=0)
        self._publish_status(online=True)

    def _on_message(self, event: MessageReceived, now: float) -> None:
        if event.topic.startswith("$SYS/"):
            self._observer.broker_says(event.topic, event.payload)
            return
        match self.topics.parse(event.topic):
            case UpdateFrameTopic(agent_id, _, index):
                self._observer.traffic("in", "update", len(event.payload))
                self._on_frame(agent_id, index, event.payload, now)
            case OutboxTopic(agent_id):
                self._observer.traffic("in", "control", len(event.payload))
                self._on_outbox(agent_id, event.payload, now)
            case PresenceTopic(agent_id):
                self._observer.traffic("in", "presence", len(event.payload))
                if event.payload:
                    self._on_presence(agent_id, decode(event.payload, Presence), now, retained=event.retained)
            case CoordinatorTopic():
                self._status_is_due = True  # unless it turns out to be right as it is, or is published anyway
                if event.payload:
                    status = decode(event.payload, CoordinatorStatus)
                    self._on_coordinator(status, retained=event.retained)
                    self._learn_lead(status)
            case _:
                pass

    def _on_frame(self, agent_id: str, index: int, payload: bytes, now: float) -> None:
        if self.run is None:
            return
        frame = decode_frame(payload)
        verdict = self.run.frame_verdict(agent_id, frame, index)
        if verdict is not Verdict.WANTED:
            if verdict is Verdict.STALE:
                self._observer.note(ev.MessageStale("update"))
            self.step(ev.FrameDropped(agent_id, verdict), now)
            if verdict is Verdict.MALFORMED:
                raise FrameError(
                    f"frame {frame.index} of {frame.num_elements} elements from {agent_id} on topic {index}"
                )
            return
        facts = self._facts(frame)
        self._spool.store(frame.round_num, agent_id, payload, frame, facts)
        fail_point("coordinator.frame.stored")
        self.step(ev.FrameStored(agent_id, index, facts), now)

    def _facts(self, frame: Frame) -> FrameFacts:
        if frame.codec != FLOAT32:
            raise FrameError(f"frame {frame.index} of codec {frame.codec}: this run uses float32 (codec {FLOAT32})")
        local = decode_float32(frame.body, frame.num_elements)
        assert self.run is not None
        assert self.run.framing is not None
        start, stop = self.run.framing.span(frame.index)
        if len(self._scratch) < frame.num_elements:
            self._scratch = np.empty(frame.num_elements, np.float64)
        global_ = self._base_elements()[start:stop]
        return FrameFacts(hashlib.sha256(frame.body).digest(), delta_sum_squares(local, global_, self._scratch))

    def _on_outbox(self, agent_id: str, payload: bytes, now: float) -> None:
        message = decode_to_coordinator(payload)
        run = self.run
        if not isinstance(message, UpdateHeader):
            if run is None or run.attempt is None or run.attempt.address != address_of(message):
                self._observer.note(ev.MessageStale("control"))
            if isinstance(message, Refusal) and message.reason == "fetch":
                self._publish_again(message, now)
            self.step(ev.MessageCame(agent_id, message), now)
            return
        stored: Mapping[int, FrameFacts] = {}
        # A run that is over has no round any more, and no segment of the spool is to be made for one.
        is_open = run is not None and run.state not in FINAL
        if run is not None and is_open and address_of(message)[::2] == (run.config.run_id, run.current_round):
            stored = self._spool.stored(message.round_num, agent_id, content_tag(message.update_digest))
        self.step(ev.UpdateOffered(agent_id, message, stored), now)

    def _on_presence(self, agent_id: str, presence: Presence, now: float, *, retained: bool) -> None:
        if self.epoch < presence.epoch < self.epoch + MAX_EPOCH_JUMP:
            if self._knows_lead:
                self._go_above(presence.epoch)
            self._epoch_heard = max(self._epoch_heard, presence.epoch)
        elif presence.epoch >= self.epoch + MAX_EPOCH_JUMP:  # it believed what cannot be, and would not listen to us
            self._publish_status(online=True)
        change = self.fleet.hear(agent_id, presence, retained=retained)
        agent = self.fleet.agents.get(agent_id)
        if agent is not None:
            self._observer.fleet(self.fleet, agent_id, change)
        elif not presence.online:  # it left while no coordinator ran: the database may have it as online
            self._moved[agent_id] = AgentLeft(agent_id)
        if change is not None and agent is not None:
            known = agent.presence
            self._moved[agent_id] = AgentRow(agent_id, agent.state, known.task, dict(known.labels), known.version)
            self.step(ev.FleetMoved(agent_id, change), now)

    def _on_coordinator(self, status: CoordinatorStatus, *, retained: bool) -> None:
        """Another coordinator's presence: the newer one leads.

        A retained one that is there as we connect for the first time is of somebody who started before us, if not a ghost. One
        with a higher epoch that is there as we connect again is of somebody who started while we were cut off.
        """
        if status.epoch < self.epoch or (status.epoch == self.epoch and status.instance == self._instance):
            # Ours; or the will of an earlier connection of ours, or of an older coordinator, which says that there is none; or
            # of an older one that is back, and has replaced ours, perhaps without having read it.
            is_back = not retained and status.instance != self._instance
            self._status_is_due = is_back or not status.online
            return
        if status.epoch >= self.epoch + MAX_EPOCH_JUMP:
            raise MessageError(
                f"a coordinator's presence of epoch {status.epoch}: expected one near our own {self.epoch}"
            )
        is_newer = not retained or (status.epoch > self.epoch and self._num_connections > 1)
        if status.online and is_newer and status.instance != self._instance:
            raise SupersededError(
                f"another coordinator of federation {self.topics.federation} started (epoch {status.epoch}, this one has "
                f"{self.epoch}); give each its own federation, or stop the other"
            )
        if status.epoch >= self.epoch:
            self._go_above(status.epoch)
        elif not status.online:  # the will of an earlier coordinator came late, and says that there is none
            self._publish_status(online=True)

    def _learn_lead(self, status: CoordinatorStatus) -> None:
        """Connected again, we have heard what is retained on our topic, or that there is nothing but what we just published.

        Until then, an agent that spoke of a higher epoch may have it from a coordinator that took our place while we were cut
        off: to go above it would take the agents back. What the broker kept of agents for us comes before it.
        """
        is_old = status.instance == self._instance and not status.online  # the will of our earlier connection
        if self._knows_lead or is_old:
            return
        self._knows_lead = True
        if self._epoch_heard > self.epoch:
            self._go_above(self._epoch_heard)

    def _go_above(self, epoch: int) -> None:
        """Someone knows of a higher epoch, from a coordinator that lost its state: agents would ignore a lower one."""
        self.epoch = self._store.raise_epoch(above=epoch)
        if self.run is not None:
            self._take(self.run.raise_epoch(self.epoch))
        self._publish_status(online=True)

    # What goes out.

    def _perform_all(self, commands: list[ev.Command], now: float) -> None:
        """Carry out what is persisted, all of it: where one fails for the disk, the others are none the less decided."""
        failure: OSError | None = None
        for command in commands:
            try:
                self._perform(command, now)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _perform(self, command: ev.Command, now: float) -> None:
        match command:
            case ev.Send(agent_id, message, expiry_s):
                self._publish(self.topics.inbox(agent_id), encode(message), "control", expiry_s=expiry_s)
                if is_armed():
                    fail_point(f"coordinator.sent.{type(message).__name__.lower()}")
            case ev.PublishModel():
                self._begin_publishing(command, now)
            case ev.CallRoll():
                spread_s = len(self.fleet.agents) / _ROLL_CALL_RATE
                self._publish(self.topics.rollcall, encode(RollCall(epoch=self.epoch, spread_s=spread_s)), "control")
            case ev.PrepareModel() | ev.EvaluateModel() | ev.AggregateUpdates() | ev.DiscardModel():
                self._compute.ask(command, now)
            case _ if isinstance(command, ev.NOTES):
                if isinstance(command, ev.UpdateReceived):
                    self._told["received", ""] += 1
                elif isinstance(command, ev.UpdateSettled):
                    self._told[command.outcome, command.reason] += 1
                self._observer.note(command)
            case _ if isinstance(command, ev.SAVES):
                self._observer.saved(command)

    def _publish(
        self, topic: str, payload: bytes, kind: str, *, expiry_s: float | None = None, retain: bool = False
    ) -> None:
        try:
            if self.transport.publish(topic, payload, retain=retain, expiry_s=expiry_s):
                self._observer.traffic("out", kind, len(payload))
        except PacketTooLargeError as error:
            log_event(_log, logging.ERROR, "message not sent", error=error)

    def _publish_status(self, *, online: bool) -> None:
        self._status_is_due = False
        payload = presence_payload(self.epoch, self._instance, online=online)
        self._publish(self.topics.coordinator, payload, "presence", retain=True)

    def _begin_publishing(self, command: ev.PublishModel, now: float) -> None:
        assert self.run is not None
        assert self.run.framing is not None
        self._publisher = Publisher(
            self.transport,
            self.topics,
            self._open_base(command.digest),
            self.run.framing,
            run_id=self.run.config.run_id,
            round_num=command.round_num,
            epoch=self.epoch,
            task=self.run.config.task,
        )
        self._pump(now)

    def _publish_again(self, refusal: Refusal, now: float) -> None:
        """An agent did not get the model: a retained frame may be lost, or overwritten. Once for each attempt."""
        run = self.run
        if run is None or run.version is None or self._publisher is not None or not self.is_connected:
            return
        attempt = (run.config.run_id, run.current_round, run.attempt.round.attempt if run.attempt else 0)
        if (refusal.run_id, refusal.round_num) != attempt[:2] or self._published_again_for == attempt:
            return
        self._published_again_for = attempt
        log_event(_log, logging.WARNING, "model published again: an agent did not get it", round=run.version.round_num)
        self._begin_publishing(ev.PublishModel(run.version.round_num, run.version.digest), now)

    def _pump(self, now: float) -> None:
        publisher = self._publisher
        try:
            is_done = publisher is not None and publisher.pump()
        except PacketTooLargeError as error:  # another broker than the run began with; the next connection tries again
            self._publisher = None
            self.problem = f"the model cannot be published: {error}"
            log_event(_log, logging.ERROR, "model not published", error=error)
            return
        if publisher is not None and is_done:
            self._observer.traffic("out", "model", publisher.num_bytes)
            self._publisher = None
            self.step(ev.ModelPublished(publisher.round_num), now)

    def _open_base(self, digest: str) -> ModelFile:
        if self._base is None or self._base.digest != digest:
            self._base = self._open_model(digest)
        return self._base

    def _base_elements(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        assert self.run is not None
        assert self.run.version is not None
        return self._open_base(self.run.version.digest).elements

    @property
    def is_over(self) -> bool:
        """Whether there is a run and it has come to an end."""
        return self.run is not None and self.run.state in FINAL


def _can_wait(save: ev.Save) -> bool:
    return isinstance(save, ev.SaveTallies) or (isinstance(save, ev.SaveAttempt) and save.can_wait)


def _pass_transitions(when: str, saves: list[ev.Save]) -> None:
    """Pass the fail points of what is about to be saved, or has been."""
    if is_armed():
        for save in saves:
            kind = type(save).__name__.removeprefix("Save").lower()
            state = f"-{save.state}" if isinstance(save, ev.SaveAttempt) else ""
            fail_point(f"coordinator.{when}.{kind}{state}")


def presence_payload(epoch: int, instance: str, *, online: bool) -> bytes:
    """The coordinator's presence, or with `online` false its will."""
    return encode(
        CoordinatorStatus(online=online, epoch=epoch, instance=instance, protocol=PROTOCOL, version=__version__)
    )


def _kind_of(topic: str) -> str:
    """A bounded word for a topic, whatever a peer made of it."""
    for kind in ("presence", "outbox", "update", "coordinator"):
        if f"/{kind}" in topic:
            return kind
    return "other"
