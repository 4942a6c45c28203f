"""The driver: turns what comes in, from the broker and from the worker, into events, and carries out the agent's commands.

It owns no thread and no clock: `handle` is called with one event and the time. Everything that it needs is handed in, so that
the same driver runs on MQTT and files, and on a broker in memory in tests.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Callable
from typing import Any, cast

from edge_agent import agent_events as ev
from edge_agent.agent import Agent
from edge_agent.journal import JournalLike
from edge_agent.trainer import TrainerLike
from midge.failpoints import fail_point
from midge.log import Throttle, log_event
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    PacketTooLargeError,
    SubscriptionDenied,
    Transport,
    TransportEvent,
)
from midge.wire.errors import FrameError, TopicError, WireError
from midge.wire.frames import ELEMENT_BYTES, FLOAT32, decode_frame
from midge.wire.messages import (
    CoordinatorStatus,
    Head,
    Invitation,
    Presence,
    Receipt,
    RollCall,
    UpdateHeader,
    decode,
    decode_to_agent,
    encode,
)
from midge.wire.topics import CoordinatorTopic, HeadTopic, InboxTopic, ModelFrameTopic, RollCallTopic, Topics

_log = logging.getLogger("edge_agent")

Observer = Callable[[ev.Note], None]


class Driver:
    """The driver.

    Args:
        agent_id: who this is.
        topics: of the federation.
        agent: the machine.
        transport: the connection; its events are handed to `handle`.
        journal: what is kept on disk.
        trainer: who trains; its events come back through `handle_training`.
        presence: what this agent says of itself; its epoch and packet limit are filled in.
        objection: the operator's rules, asked for each invitation.
        observe: told what happened, for metrics.
    """

    def __init__(
        self,
        agent_id: str,
        topics: Topics,
        agent: Agent,
        transport: Transport,
        journal: JournalLike,
        trainer: TrainerLike,
        presence: Presence,
        objection: Callable[[Invitation], ev.Objection | None],
        observe: Observer | None = None,
    ) -> None:
        self.agent_id = agent_id
        self.agent = agent
        self.num_invalid = 0
        self.num_bytes_in = 0
        self.num_bytes_out = 0
        self._refusals_logged = Throttle()
        self._topics = topics
        self._transport = transport
        self._journal = journal
        self._trainer = trainer
        self._presence = presence
        self._objection = objection
        self._observe = observe
        self._packet_limit_bytes = 0
        self._said_too_large = False
        self._watched = ""
        self._asked: set[str] = set()

    def handle(self, event: TransportEvent, now: float) -> None:
        """Take an event of the connection. Never raises for what a peer sent."""
        match event:
            case MessageReceived():
                self.num_bytes_in += len(event.payload)
                try:
                    self._on_message(event, now)
                except WireError as error:
                    self.num_invalid += 1
                    # Topics of others come where our session at the broker is older than our federation: no news for anybody.
                    level = logging.DEBUG if isinstance(error, TopicError) else logging.WARNING
                    self._refusals_logged.log(_log, level, "message refused", now, topic=event.topic, error=error)
            case Connected(version, packet_limit_bytes):
                self._packet_limit_bytes = packet_limit_bytes or 0
                self._said_too_large = False
                self._watched = ""
                self._asked.clear()
                self._transport.subscribe(
                    [self._topics.inbox(self.agent_id), self._topics.coordinator, self._topics.rollcall]
                )
                log_event(_log, logging.INFO, "broker connected", agent=self.agent_id, mqtt=version)
                self.step(ev.BrokerConnected(), now)
            case Disconnected(reason, fatal):
                level = logging.ERROR if fatal else logging.WARNING
                log_event(_log, level, "broker lost", agent=self.agent_id, reason=reason)
                self.step(ev.BrokerLost(), now)
            case SubscriptionDenied(topics):
                log_event(
                    _log, logging.ERROR, "the broker denies reading", agent=self.agent_id, topics=", ".join(topics)
                )

    def step(self, event: ev.Event, now: float) -> None:
        """Hand an event to the machine and do what it says, results included, until nothing is left to do."""
        if isinstance(event, ev.TrainingFinished):
            self._log_trained(event.update)
            fail_point("agent.training.ended")
        elif isinstance(event, ev.TrainingProgressed):
            fail_point("agent.training.progressed")
        events = [event]
        while events:
            for command in self.agent.step(events.pop(0), now):
                try:
                    result = self._perform(command, now)
                except OSError as error:
                    events.append(self._disk_failed(error, lost_update=isinstance(command, ev.SendFrames)))
                    break  # what follows says that it was done
                if result is not None:
                    events.append(result)

    def say_farewell(self) -> None:
        """Tell everyone that this agent stops, before it does."""
        farewell = Presence(online=False, incarnation=self._presence.incarnation)
        self._publish(self._topics.presence(self.agent_id), encode(farewell), retain=True)

    # What comes in.

    def _on_message(self, event: MessageReceived, now: float) -> None:
        match self._topics.parse(event.topic):
            case ModelFrameTopic(run_id, _, index):
                self._on_frame(run_id, index, event.payload, now)
            case InboxTopic(agent_id) if agent_id == self.agent_id:
                message = decode_to_agent(event.payload)
                if isinstance(message, Invitation):
                    self.step(ev.Invited(message, self._objection(message)), now)
                else:
                    if isinstance(message, Receipt):
                        fail_point("agent.receipt.heard")
                    self.step(ev.Told(message), now)
            case HeadTopic() if event.payload:
                self.step(ev.HeadSeen(decode(event.payload, Head)), now)
            case CoordinatorTopic() if event.payload:
                self.step(ev.CoordinatorSeen(decode(event.payload, CoordinatorStatus)), now)
            case RollCallTopic():
                self.step(ev.RollCalled(decode(event.payload, RollCall)), now)
            case _:
                pass  # a retained message that was cleared, or a subscription of ours that is being undone

    def _on_frame(self, run_id: str, index: int, payload: bytes, now: float) -> None:
        if not payload:
            return
        frame = decode_frame(payload)
        if frame.index != index or not self.agent.wants_frame(run_id, frame.index, frame.content_tag):
            return  # of the version before, left in its slot, or double: the awaited one replaces it
        head = self.agent.head
        assert head is not None, "a frame is wanted of a model that nothing is known of"
        if frame.codec != FLOAT32 or frame.num_elements * ELEMENT_BYTES != len(frame.body):
            seen = f"{frame.num_elements} elements in {len(frame.body)} bytes of codec {frame.codec}"
            raise FrameError(f"frame {index} of the model, {seen}: expected float32 (codec {FLOAT32})")
        try:
            self._journal.write_frame(head, index, frame.body)
            fail_point("agent.frame.fetched")
        except ValueError as error:
            raise FrameError(str(error)) from None
        except OSError as error:
            self.step(self._disk_failed(error), now)
            return
        self.step(ev.FrameStored(index), now)

    # What goes out.

    def _perform(self, command: ev.Command, now: float) -> ev.Event | None:
        match command:
            case ev.Say(message, qos):
                self._publish(self._topics.outbox(self.agent_id), encode(message), qos=qos)
                if isinstance(message, UpdateHeader):
                    fail_point("agent.header.sent")
            case ev.SendFrames(update, indices):
                for index in indices:
                    topic = self._topics.update_frame(self.agent_id, 0, index)
                    self._publish(topic, self._journal.read_frame(update, index))
                    fail_point("agent.frame.sent")
                    if index == update.num_frames - 1:
                        fail_point("agent.frames.sent")
            case ev.AskFrames(head, wanted, done):
                self._ask(head, wanted, done)
            case ev.WriteInvitation(invitation):
                self._journal.write_invitation(invitation)
                fail_point("agent.invitation.written")
            case ev.EraseWork():
                self._journal.erase()
                fail_point("agent.work.erased")
            case ev.OpenModel(head):
                self._undo_asking()
                self._journal.open_model(head)
            case ev.CheckModel(head):
                self._undo_asking()
                return ev.ModelChecked(self._journal.model_is(head))
            case ev.Train(invitation, head):
                fail_point("agent.training.begins")
                self._trainer.train(invitation, head, now)
            case ev.StopTraining():
                self._trainer.cancel(now)
            case ev.WatchHead(run_id):
                self._watch(run_id)
            case ev.AnnouncePresence():
                self._announce()
            case ev.StateChanged() | ev.RoundEnded() | ev.Quarantined() | ev.Stale() | ev.ProtocolDiffers():
                self._note(command)
        return None

    def _disk_failed(self, error: OSError, *, lost_update: bool = False) -> ev.DiskFailed:
        log_event(_log, logging.ERROR, "disk failed", agent=self.agent_id, error=error)
        return ev.DiskFailed(f"{error.strerror or error}; {_cure(error)}", lost_update)

    def _publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        try:
            if self._transport.publish(topic, payload, qos=qos, retain=retain):
                self.num_bytes_out += len(payload)
        except (
            PacketTooLargeError
        ) as error:  # said once for each connection: many frames are of one size, and tried again
            level = logging.DEBUG if self._said_too_large else logging.ERROR
            self._said_too_large = True
            log_event(_log, level, "message not sent", agent=self.agent_id, error=error)

    def _announce(self) -> None:
        presence = Presence(
            online=True,
            incarnation=self._presence.incarnation,
            protocol=self._presence.protocol,
            version=self._presence.version,
            task=self._presence.task,
            labels=self._presence.labels,
            epoch=self.agent.epoch,
            packet_limit_bytes=self._packet_limit_bytes,
        )
        self._publish(self._topics.presence(self.agent_id), encode(presence), retain=True)

    def _watch(self, run_id: str) -> None:
        if self._watched and self._watched != run_id:
            self._transport.unsubscribe([self._topics.head(self._watched)])
        self._watched = run_id
        self._transport.subscribe([self._topics.head(run_id)])

    def _ask(self, head: Head, wanted: tuple[int, ...], done: tuple[int, ...]) -> None:
        def name(index: int) -> str:
            return self._topics.model_frame(head.run_id, head.slot, index)

        if done:
            topics = [name(index) for index in done]
            self._asked.difference_update(topics)
            self._transport.unsubscribe(topics)
        if wanted:
            topics = [name(index) for index in wanted]
            self._asked.update(topics)
            self._transport.subscribe(topics)

    def _undo_asking(self) -> None:
        """Read no frames any more: a topic that stays subscribed would send every later version unasked."""
        if self._asked:
            self._transport.unsubscribe(sorted(self._asked))
            self._asked.clear()

    def _log_trained(self, update: ev.FinishedUpdate) -> None:
        loss = {"loss": update.metrics["loss"]} if "loss" in update.metrics else {}
        log_event(
            _log,
            logging.INFO,
            "trained",
            run=update.run_id,
            round=update.round_num,
            agent=self.agent_id,
            examples=update.num_examples,
            **cast("Any", loss),
            duration_s=round(update.training_s, 3),
        )

    def _note(self, note: ev.Note) -> None:
        if self._observe is not None:
            self._observe(note)
        match note:
            case ev.StateChanged(state):
                log_event(_log, logging.DEBUG, "state changed", agent=self.agent_id, state=state)
            case ev.Quarantined(run_id, round_num):
                detail = "its updates were rejected, or left out, too often: it is not invited for some rounds"
                fields: dict[str, Any] = {"run": run_id, "round": round_num, "agent": self.agent_id, "detail": detail}
                log_event(_log, logging.WARNING, "quarantined by the coordinator", **fields)
            case ev.Stale(what):
                log_event(_log, logging.DEBUG, "stale message ignored", agent=self.agent_id, what=what)
            case ev.ProtocolDiffers(detail):
                log_event(
                    _log, logging.ERROR, "the coordinator is of another protocol", agent=self.agent_id, detail=detail
                )
            case ev.RoundEnded(invitation, outcome, reason, detail):
                why: dict[str, Any] = {key: text for key, text in (("reason", reason), ("detail", detail)) if text}
                log_event(
                    _log,
                    logging.INFO if outcome in ("accepted", "cancelled") else logging.WARNING,
                    "round refused" if outcome == "refused" else f"update {outcome}",
                    run=invitation.run_id,
                    round=invitation.round_num,
                    agent=self.agent_id,
                    **why,
                )


def _cure(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if error.errno == errno.ENOMEM:
        return "this device is short of memory"
    return "free some space, or choose another --state-dir"


def make_agent(rng: random.Random, now: float, journal: JournalLike) -> Agent:
    """The machine, with whatever finished work the journal holds."""
    return Agent(rng, now, journal.update())
