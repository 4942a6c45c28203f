"""An agent as a simulated process: its real driver, on a journal and a trainer in memory, honest or not."""

from __future__ import annotations

import errno
import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_agent import agent_events as ev
from edge_agent.driver import Driver, make_agent
from midge import PROTOCOL
from midge.transport.base import TransportEvent, Will
from midge.wire.frames import Framing
from midge.wire.layout import Layout, model_hash
from midge.wire.messages import Head, Invitation, Presence, decode, encode
from midge.wire.topics import OutboxTopic
from tests.sim.learning import Trained, evaluate, layout_of, package, train
from tests.sim.process import Process, WatchedTransport

if TYPE_CHECKING:
    from tests.sim.federation import Federation


_layout = functools.cache(Layout)


@dataclass
class Behaviour:
    """How an agent is.

    Attributes:
        training_s: shortest and longest training.
        refuses: probability that it objects to an invitation.
        fails: probability that its worker dies while training.
        disk_fails: probability that it cannot read or write, at each operation on its journal.
        varies: whether training twice gives two results, as on many GPUs.
        lie: what is wrong with every update of it; "" for an honest one.
    """

    training_s: tuple[float, float] = (0.01, 0.02)
    refuses: float = 0.0
    fails: float = 0.0
    disk_fails: float = 0.0
    varies: bool = False
    lie: str = ""


LIES: dict[str, Callable[[ev.FinishedUpdate], dict[str, Any]]] = {
    "nan": lambda _: {},
    "update_digest": lambda update: {"update_digest": update.update_digest[:16] + "0" * 48},
    "other_update_digest": lambda _: {"update_digest": "ab" * 32},
    "model_digest": lambda _: {},
    "layout": lambda _: {"layout_digest": "ef" * 32},
    "num_frames": lambda update: {"num_frames": update.num_frames + 1},
    "no_examples": lambda _: {"num_examples": 0},
    "many_examples": lambda _: {"num_examples": 2**53},
    "too_many_examples": lambda _: {"num_examples": 2**63 - 1},
    "counters": lambda _: {"counters": (1, 2, 3)},
}
"""Each changes the header of a finished update; "nan" changes an element, and "model_digest" what is sent."""


class MemoryJournal:
    """What an agent keeps on disk."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.invitation: Invitation | None = None
        self.model = bytearray()
        self._work: tuple[ev.FinishedUpdate, list[bytes]] | None = None
        self._tick = tick

    def update(self) -> ev.FinishedUpdate | None:
        """See `edge_agent.journal.JournalLike`; so do all that follow."""
        return self._work[0] if self._work else None

    def write_invitation(self, invitation: Invitation) -> None:
        self._tick()
        self.invitation = decode(encode(invitation), Invitation)
        self._tick()

    def erase(self) -> None:
        self._tick()
        self._work = self.invitation = None
        self._tick()

    def open_model(self, head: Head) -> None:
        self._tick()
        self.model = bytearray(4 * sum(tensor.num_elements for tensor in head.layout if tensor.is_float))

    def write_frame(self, head: Head, index: int, body: memoryview) -> None:
        self._tick()
        start = index * head.frame_elements * 4
        expected = min(head.frame_elements * 4, len(self.model) - start)
        if len(body) != expected:
            raise ValueError(f"frame {index} of {len(body)} bytes: expected {expected}")
        self.model[start : start + expected] = body

    def model_is(self, head: Head) -> bool:
        hasher = model_hash(_layout(head.layout), head.counters)
        hasher.update(self.model)
        return hasher.hexdigest() == head.model_digest

    def read_frame(self, update: ev.FinishedUpdate, index: int) -> bytes:
        self._tick()
        assert self._work is not None, f"an update is sent that is not on disk: {update}"
        assert self._work[0].update_digest == update.update_digest, f"{update} is sent, {self._work[0]} is on disk"
        return self._work[1][index]

    def wipe(self) -> None:
        """The disk is another one."""
        self._work = self.invitation = None

    def write_update(self, update: ev.FinishedUpdate, frames: list[bytes]) -> None:
        """What the worker does when it has trained."""
        self._work = (update, frames)


class LyingTransport(WatchedTransport):
    """Says of each update that it was trained on another model."""

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        payload = re.sub(rb'"model_digest":"[0-9a-f]+"', b'"model_digest":"' + b"cd" * 32 + b'"', payload)
        return super().publish(topic, payload, qos=qos, retain=retain, expiry_s=expiry_s)


class AgentProcess(Process):
    """An agent; `driver` is the one of the present start. It is also its own trainer."""

    driver: Driver

    def __init__(self, federation: Federation, agent_id: str, behaviour: Behaviour) -> None:
        super().__init__(federation, agent_id)
        self.behaviour = behaviour
        self.journal = MemoryJournal(self._use_disk)
        self._training = 0
        self._num_finished = 0
        self._is_wanted = False

    # Starting and ending.

    def _start(self) -> None:
        federation, topics = self.federation, self.federation.topics
        incarnation = f"{self.generation:08x}"
        birth = Presence(online=True, incarnation=incarnation, protocol=PROTOCOL, task=federation.config.task)
        will = Will(topics.presence(self.name), encode(Presence(online=False, incarnation=incarnation)))
        self.transport = federation.broker.transport(self.name, self._take, will, keeps_session=True)
        watched = LyingTransport if self.behaviour.lie == "model_digest" else WatchedTransport
        self.driver = Driver(
            self.name,
            topics,
            make_agent(random.Random(f"{federation.seed}/{self.name}/{self.generation}"), self.now(), self.journal),
            watched(self, self.transport, self._audit) if federation.is_audited else self.transport,
            self.journal,
            self,
            birth,
            self._object,
        )
        self._training = 0
        self.transport.start()
        self._settled()

    def _lost(self) -> None:
        """Its memory is gone; the journal stays."""

    def stop(self) -> None:
        """Stop it as an operator does."""
        self.driver.say_farewell()
        assert self.transport is not None
        transport, self.transport = self.transport, None
        transport.stop()
        self.die(0.0)

    # What comes in.

    def _take(self, event: TransportEvent) -> None:
        try:
            self.driver.handle(event, self.now())
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"I11: {event} raises {error!r}") from error
        self._settled()

    def _on_deadline(self, now: float) -> None:
        self.driver.step(ev.TimePassed(), now)
        self._settled()

    def _settled(self) -> None:
        if self.federation.is_audited:
            self.driver.agent.check()
        self.wait_for(self.driver.agent.deadline())

    def _object(self, invitation: Invitation) -> ev.Objection | None:
        refuses = self.behaviour.refuses and self.federation.rng.random() < self.behaviour.refuses
        return ev.Objection("busy", "made to refuse") if refuses else None

    def _audit(self, topic: str, payload: bytes) -> None:
        """Whatever is announced is on disk already: a crash would lose it otherwise."""
        if isinstance(self.federation.topics.parse(topic), OutboxTopic) and b'"type":"update"' in payload:
            on_disk = self.journal.update()
            assert on_disk is not None, f"{self.name} announces what is not on disk: {payload!r}"
            assert on_disk.update_digest.encode() in payload, f"{payload!r} is not of {on_disk}"

    def _use_disk(self) -> None:
        self.tick()
        if self.behaviour.disk_fails and self.federation.rng.random() < self.behaviour.disk_fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    # The trainer, as `edge_agent.trainer` and its worker behave.

    def train(self, invitation: Invitation, head: Head, now: float) -> None:
        """See `TrainerLike`."""
        self.tick()
        federation, behaviour = self.federation, self.behaviour
        federation.auditor.began_training(invitation.round_num, self.name)
        self._training += 1
        self._is_wanted = True
        number, model = self._training, bytes(self.journal.model)
        training_s = federation.rng.uniform(*behaviour.training_s)
        if behaviour.fails and federation.rng.random() < behaviour.fails:
            failed = ev.TrainingFailed(ev.Objection("worker", "made to fail"))
            self.call_later(training_s / 2, lambda: self._report(number, failed))
            return
        if federation.has_faults:
            self.call_later(training_s / 2, lambda: self._report(number, ev.TrainingProgressed(0.5)))
        self.call_later(training_s, lambda: self._finish(number, invitation, head, model))

    def cancel(self, now: float) -> None:
        """See `TrainerLike`. The worker does not notice in time, and finishes all the same."""
        self.tick()
        self._is_wanted = False

    def _finish(self, number: int, invitation: Invitation, head: Head, model: bytes) -> None:
        if number != self._training:
            return
        update, frames, trained = self._work(invitation, head, model)
        self.federation.auditor.trained(update.update_digest, trained)
        self.journal.write_update(update, frames)
        self.tick()
        self._report(number, ev.TrainingFinished(update))

    def _report(self, number: int, event: ev.Event) -> None:
        if number == self._training and self._is_wanted:
            self.driver.step(event, self.now())
            self._settled()

    def _work(self, invitation: Invitation, head: Head, model: bytes) -> tuple[ev.FinishedUpdate, list[bytes], Trained]:
        elements = np.frombuffer(model, "<f4")
        address = (invitation.seed, invitation.round_num, self.name)
        self._num_finished += 1
        salt = f"/{self._num_finished}" if self.behaviour.varies else ""
        trained = train(head.model_digest, elements, head.counters, address, salt)
        lie = self.behaviour.lie
        if lie == "nan":
            trained.elements[-1] = np.nan
        layout = layout_of(len(elements))
        framing = Framing(layout.num_elements, head.frame_elements)
        score = evaluate(elements, trained.num_examples)
        update, frames = package(trained, layout, framing, invitation.run_id, score)
        return (msgspec.structs.replace(update, **LIES[lie](update)) if lie else update), frames, trained
