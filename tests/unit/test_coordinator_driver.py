"""The coordinator's driver: nothing is sent that a crash could take back, and no peer and no predecessor upsets it.

The run's machine and the models are real; the test is the broker, the database, the spool and the computations.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.cohort import Change, Fleet
from coordinator.driver import Driver, SupersededError, presence_payload
from coordinator.models import ModelStore
from coordinator.run import Resumed, Run, RunState, Version
from coordinator.store import AgentLeft, AgentRow
from coordinator.uplink import FrameFacts
from midge.transport.base import (
    Connected,
    Disconnected,
    MessageReceived,
    Published,
    SubscriptionDenied,
)
from midge.wire.frames import FLOAT32, Frame, content_tag, encode_frame, run_tag, update_digest
from midge.wire.messages import (
    MAX_EPOCH_JUMP,
    Acceptance,
    Cancel,
    CoordinatorStatus,
    Credit,
    Evaluation,
    Head,
    Invitation,
    Presence,
    Progress,
    Receipt,
    Refusal,
    RollCall,
    UpdateHeader,
    decode,
    decode_to_agent,
    encode,
)
from midge.wire.topics import Topics
from tests.machines import FRAMING, LAYOUT, RUN_ID, config, of_kind, presence
from tests.unit.recording import RecordingTransport, Sent

TOPICS = Topics("lab")
EPOCH = 5
BODIES = [np.full(size, 0.5, "<f4").tobytes() for size in (4, 4, 2)]
DIGEST = update_digest(hashlib.sha256(body).digest() for body in BODIES)


class FakeStore:
    """A database that remembers what it is given, and may fail."""

    def __init__(self, order: list[str]) -> None:
        self.epoch = EPOCH
        self.saves: list[ev.Save] = []
        self.agents: list[AgentRow | AgentLeft] = []
        self.error: OSError | None = None
        self._order = order

    def raise_epoch(self, above: int = 0) -> int:
        self.epoch = max(self.epoch, above) + 1
        self._order.append("raise epoch")
        return self.epoch

    def save(self, run_id: str, saves: list[ev.Save], agents: list[AgentRow | AgentLeft]) -> None:
        if self.error is not None:
            raise self.error
        self._order.append("save")
        self.saves += saves
        self.agents += agents

    def take(self) -> list[ev.Save]:
        saves, self.saves = self.saves, []
        return saves


class FakeSpool:
    """Frames in memory."""

    def __init__(self, order: list[str]) -> None:
        self.frames: dict[tuple[int, str, bytes], dict[int, FrameFacts]] = {}
        self.error: OSError | None = None
        self._order = order

    def store(self, round_num: int, agent_id: str, payload: bytes, frame: Frame, facts: FrameFacts) -> None:
        if self.error is not None:
            raise self.error
        self._order.append("store")
        self.frames.setdefault((round_num, agent_id, bytes(frame.content_tag)), {})[frame.index] = facts

    def stored(self, round_num: int, agent_id: str, tag: bytes) -> Mapping[int, FrameFacts]:
        return self.frames.get((round_num, agent_id, tag), {})

    def forget(self, round_num: int, agent_id: str, tag: bytes) -> None:
        self._order.append("forget")
        self.frames.pop((round_num, agent_id, tag), None)

    def sync(self) -> None:
        self._order.append("sync")


class FakeObserver:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[ev.Note] = []
        self.saves: list[ev.Save] = []
        self.num_refused: dict[str, int] = {}
        self.bytes: dict[tuple[str, str], int] = {}
        self.broker_figures: list[tuple[str, bytes]] = []
        self.changes: list[tuple[str, Change | None]] = []

    def note(self, note: ev.Note) -> None:
        self.notes.append(note)

    def saved(self, save: ev.Save) -> None:
        self.saves.append(save)

    def traffic(self, direction: str, kind: str, size_bytes: int) -> None:
        self.bytes[direction, kind] = self.bytes.get((direction, kind), 0) + size_bytes

    def refused(self, kind: str, error: Exception) -> None:
        self.num_refused[kind] = self.num_refused.get(kind, 0) + 1

    def broker(self, event: Connected | Disconnected) -> None:
        pass

    def fleet(self, fleet: Fleet, agent_id: str, change: Change | None) -> None:
        self.changes.append((agent_id, change))

    def broker_says(self, topic: str, payload: bytes) -> None:
        self.broker_figures.append((topic, payload))


class Talk:
    """A driver, and the test on all its sides."""

    def __init__(self, directory, **settings: Any) -> None:
        self.now = 100.0
        self.order: list[str] = []
        self.transport = RecordingTransport(heard=self.order.append)
        self.store = FakeStore(self.order)
        self.spool = FakeSpool(self.order)
        self.observer = FakeObserver()
        self.asked: list[Any] = []
        self.models = ModelStore(directory / "models")
        self.base = self.models.save_state({"w": np.zeros(10, np.float32)})
        self.settings = config(rounds=2, **settings)
        self.driver = Driver(
            TOPICS,
            self.transport,
            self.store,
            self.spool,
            self,
            self.models.open,
            self.observer,
            epoch=EPOCH,
            instance="this",
            broker_topics=("$SYS/broker/uptime",),
        )

    def ask(self, command: Any, now: float) -> None:
        """See `ComputeLike`."""
        self.asked.append(command)

    def hear(self, topic: str, message: Any, *, retained: bool = False) -> None:
        payload = message if isinstance(message, bytes) else encode(message)
        self.driver.handle(MessageReceived(topic, payload, retained), self.now)

    def turn(self, after_s: float = 0.0) -> list[Sent]:
        """End the turn; returns what was sent."""
        self.now += after_s
        self.driver.step(ev.TimePassed(), self.now)
        self.driver.flush(self.now)
        if self.driver.run is not None:
            self.driver.run.check()
        return self.transport.take()

    def connect(self) -> list[Sent]:
        self.driver.handle(Connected("5", 65_536), self.now)
        return self.turn()

    def start(self) -> None:
        run = Run(self.settings, epoch=EPOCH, fleet=self.driver.fleet, now=self.now, connected=self.driver.is_connected)
        self.driver.start_run(run, self.now)

    def come(self, *agent_ids: str, **changes: Any) -> None:
        for agent_id in agent_ids:
            self.hear(TOPICS.presence(agent_id), presence(**changes))

    def to_collecting(self) -> list[Sent]:
        """Returns what was sent when the agents a and b had come."""
        self.connect()
        self.start()
        self.driver.step(ev.ModelPrepared(self.base, LAYOUT, FRAMING), self.now)
        self.driver.step(ev.ModelEvaluated(0, Evaluation(num_examples=1, loss=1.0)), self.now)
        self.turn()
        self.come("a", "b")
        return self.turn()

    @property
    def address(self) -> dict[str, Any]:
        assert self.driver.run is not None
        assert self.driver.run.attempt is not None
        return self.driver.run.attempt.address._asdict()

    def header(self, **changes: Any) -> UpdateHeader:
        fields: dict[str, Any] = {
            "model_digest": self.base,
            "layout_digest": LAYOUT.digest,
            "update_digest": DIGEST,
            "num_frames": 3,
            "num_examples": 10,
            "counters": (),
        }
        return UpdateHeader(**(self.address | fields | changes))

    def say(self, agent_id: str, message: Any) -> None:
        self.hear(TOPICS.outbox(agent_id), message)

    def send_frames(self, agent_id: str, *indices: int) -> None:
        for index in indices:
            self.hear(TOPICS.update_frame(agent_id, 0, index), frame(index))

    def update_as_before(self, agent_id: str) -> None:
        """The same, of an agent that does not know that nobody waits for it any more."""
        address = {"run_id": RUN_ID, "epoch": EPOCH, "round_num": 1, "attempt": 1}
        header = UpdateHeader(
            **address,
            model_digest=self.base,
            layout_digest=LAYOUT.digest,
            update_digest=DIGEST,
            num_frames=3,
            num_examples=10,
            counters=(),
        )
        self.say(agent_id, header)
        self.send_frames(agent_id, 0, 1, 2)

    def update(self, agent_id: str) -> None:
        """Header and frames come."""
        self.say(agent_id, self.header())
        self.send_frames(agent_id, 0, 1, 2)


def frame(index: int, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "codec": FLOAT32,
        "run_tag": run_tag(RUN_ID),
        "round_num": 1,
        "index": index,
        "num_elements": len(BODIES[index]) // 4,
        "content_tag": content_tag(DIGEST),
        "body": BODIES[index],
    }
    return encode_frame(**(fields | changes))


def told(sent: list[Sent], kind: type) -> dict[str, Any]:
    """The messages of a kind that agents were sent, by agent."""
    found = {}
    for each in sent:
        if each.topic.endswith("/inbox"):
            message = decode_to_agent(each.payload)
            if isinstance(message, kind):
                found[each.topic.split("/")[-2]] = message
    return found


def statuses(sent: list[Sent]) -> list[CoordinatorStatus]:
    return [decode(each.payload, CoordinatorStatus) for each in sent if each.topic == TOPICS.coordinator]


@pytest.fixture
def talk(tmp_path):
    return Talk(tmp_path)


# A round.


def test_once_connected_it_reads_everything_and_says_that_it_is_there(talk):
    sent = talk.connect()
    assert talk.transport.read == {
        TOPICS.coordinator,
        TOPICS.all_presences,
        TOPICS.all_outboxes,
        TOPICS.all_update_frames,
        "$SYS/broker/uptime",
    }
    (status,) = statuses(sent)
    assert (status.online, status.epoch, status.instance) == (True, EPOCH, "this")
    assert sent[0].retain
    assert talk.driver.packet_limit_bytes == 65_536


def test_a_model_is_asked_for_then_published_and_agents_invited(talk):
    sent = talk.to_collecting()
    assert isinstance(talk.asked[0], ev.PrepareModel)
    invitations = told(sent, Invitation)
    assert set(invitations) == {"a", "b"}
    assert invitations["a"].model_digest == talk.base
    assert [each.expiry_s for each in sent if each.topic.endswith("/inbox")] == [600.0, 600.0]


def test_a_whole_round_goes_through(talk):
    talk.to_collecting()
    talk.update("a")
    talk.update("b")
    sent = talk.turn()
    assert [receipt.accepted for receipt in told(sent, Receipt).values()] == [True, True]
    (aggregate,) = [command for command in talk.asked if isinstance(command, ev.AggregateUpdates)]
    assert [update.agent_id for update in aggregate.updates] == ["a", "b"]
    # Ten elements of 0.5 are sqrt(10 * 0.25) from zero.
    assert [update.norm for update in aggregate.updates] == [pytest.approx(2.5**0.5)] * 2
    version = talk.models.save_state({"w": np.full(10, 0.5, np.float32)})
    talk.driver.step(ev.UpdatesAggregated(version, 1.5), talk.now)
    sent = talk.turn()
    assert [save.digest for save in of_kind(talk.store.take(), ev.SaveVersion)] == [talk.base, version]
    (head,) = [decode(each.payload, Head) for each in sent if each.topic == TOPICS.head(RUN_ID)]
    assert head.model_digest == version
    assert set(told(sent, Invitation)) == {"a", "b"}


# Nothing is sent before it is saved.


def test_an_update_is_synced_then_saved_and_only_then_receipted(talk):
    talk.to_collecting()
    talk.update("a")
    talk.order.clear()
    talk.turn()
    assert talk.order.index("sync") < talk.order.index("save") < talk.order.index("publish inbox")


def test_what_cannot_be_saved_is_not_sent(talk):
    talk.to_collecting()
    talk.update("a")
    talk.store.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        talk.turn()
    assert talk.transport.take() == []
    assert of_kind(talk.observer.notes, ev.UpdateSettled) == []


@pytest.mark.parametrize("moment", ["model", "agents", "aggregated"])
def test_at_no_moment_is_anything_sent_that_was_not_saved(talk, moment):
    if moment == "model":
        talk.connect()
        talk.start()
        talk.driver.step(ev.ModelPrepared(talk.base, LAYOUT, FRAMING), talk.now)
    elif moment == "agents":
        talk.to_collecting()
        talk.come("c")
        talk.hear(TOPICS.presence("a"), presence("2"))
    else:
        talk.to_collecting()
        talk.update("a")
        talk.update("b")
        talk.turn()
        version = talk.models.save_state({"w": np.full(10, 0.5, np.float32)})
        talk.driver.step(ev.UpdatesAggregated(version, 1.5), talk.now)
    talk.transport.take()
    talk.asked.clear()
    talk.store.error = OSError(5, "Input/output error")
    with pytest.raises(OSError):
        talk.turn()
    assert talk.transport.take() == []
    assert talk.asked == []


def test_a_frame_that_cannot_be_stored_ends_it_before_anything_is_acknowledged(talk):
    talk.to_collecting()
    talk.say("a", talk.header())
    talk.spool.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        talk.send_frames("a", 0)
    assert talk.transport.take() == []


# A disk that fails.


def test_a_parked_run_decides_nothing_and_what_comes_meanwhile_is_heard(talk):
    talk.to_collecting()
    talk.update("a")
    talk.store.error = OSError(28, "No space left on device")
    with pytest.raises(OSError):
        talk.turn()
    talk.driver.park()
    talk.come("c")
    talk.update_as_before("b")
    talk.driver.handle(Disconnected("gone"), talk.now)
    talk.driver.handle(Connected("5", 65_536), talk.now)
    assert (talk.driver.run, talk.driver.is_connected) == (None, True)
    assert {each.topic for each in talk.transport.take()} == {TOPICS.coordinator}
    assert set(talk.driver.fleet.agents) == {"a", "b", "c"}


def test_what_earlier_turns_left_to_be_saved_is_saved_before_the_run_is_read_again(talk):
    talk.to_collecting()
    talk.store.take()
    talk.say("a", talk.header(attempt=9))  # stale: counted, and saved a moment later
    talk.turn()
    waiting = [save for save in talk.store.take() if isinstance(save, ev.SaveTallies)]
    assert waiting == []
    talk.update("b")
    talk.store.error = OSError(28, "No space left on device")
    with pytest.raises(OSError):
        talk.turn()
    talk.driver.park()
    with pytest.raises(OSError):
        talk.driver.write_waiting(RUN_ID)  # it is kept for the next try
    talk.store.error = None
    talk.driver.write_waiting(RUN_ID)
    saves = talk.store.take()
    (tallies,) = of_kind(saves, ev.SaveTallies)
    assert tallies.tallies == {("received", ""): 1, ("late", "stale"): 1}  # and nothing of b's update
    assert of_kind(saves, ev.SaveUpdate) == []
    talk.driver.write_waiting(RUN_ID)
    assert talk.store.take() == []


def test_the_observer_is_told_once_of_what_a_failed_write_stored_and_of_what_was_cut_off(talk):
    talk.to_collecting()
    talk.say("a", talk.header())  # announced, noted and on its way
    talk.turn(1.0)
    talk.observer.notes.clear()
    talk.driver.park()
    stored = {("received", ""): 2, ("accepted", ""): 1}  # b's update was accepted by a write that failed in the end
    resumed = Resumed(version=Version(0, talk.base), layout=LAYOUT, framing=FRAMING, tallies=stored)
    run = Run(talk.settings, epoch=EPOCH, fleet=talk.driver.fleet, now=talk.now, resumed=resumed)
    talk.driver.unpark(run, talk.now)
    assert of_kind(talk.observer.notes, ev.UpdateReceived) == [ev.UpdateReceived("")]
    settled = [(note.outcome, note.reason) for note in of_kind(talk.observer.notes, ev.UpdateSettled)]
    assert sorted(settled) == [("accepted", ""), ("late", "restart")]


def test_what_is_persisted_is_done_even_where_a_model_cannot_be_read(talk, monkeypatch):
    """One command fails for the disk; receipts of the same turn say what is stored, and go out."""
    talk.to_collecting()
    talk.update("a")
    talk.driver._commands.insert(0, ev.PublishModel(0, "ab" * 32))

    def fails(digest: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(talk.driver, "_open_model", fails)
    with pytest.raises(OSError, match="Input/output error"):
        talk.turn()
    assert set(told(talk.transport.take(), Receipt)) == {"a"}


def test_without_an_accepted_update_nothing_is_synced(talk):
    talk.to_collecting()
    talk.say("a", talk.header())
    talk.send_frames("a", 0, 1)
    talk.turn(0.1)
    assert "store" in talk.order
    assert "sync" not in talk.order


def test_what_a_restart_can_do_without_is_saved_within_half_a_second(talk):
    talk.to_collecting()
    talk.order.clear()
    talk.say("a", Acceptance(**talk.address))
    talk.turn()
    assert "save" not in talk.order
    assert talk.driver.deadline() == talk.now + 0.5
    talk.say("b", Acceptance(**talk.address))
    talk.turn(0.3)
    assert "save" not in talk.order
    talk.turn(0.2)
    assert talk.order.count("save") == 1
    assert "accepted" in str(of_kind(talk.store.take(), ev.SaveAttempt)[-1].members)
    assert talk.driver.deadline() == float("inf")


def test_what_can_wait_goes_along_with_what_cannot(talk):
    talk.to_collecting()
    talk.say("a", Acceptance(**talk.address))
    talk.turn()
    talk.order.clear()
    talk.update("a")
    talk.turn()
    assert talk.order.count("save") == 1
    assert talk.driver.deadline() == float("inf") or talk.driver.deadline() >= talk.now + 0.5
    saves = talk.store.take()
    assert of_kind(saves, ev.SaveTallies)
    assert of_kind(saves, ev.SaveUpdate)


def test_a_run_that_ends_leaves_nothing_unsaved(talk):
    talk.to_collecting()
    talk.say("a", Acceptance(**talk.address))
    talk.turn()
    talk.driver.step(ev.StopAsked(), talk.now)
    talk.turn()
    assert talk.driver.is_over
    saves = talk.store.take()
    assert of_kind(saves, ev.SaveRun)[-1].state == RunState.STOPPED
    assert "accepted" in str(of_kind(saves, ev.SaveAttempt)[-1].members)
    assert talk.driver.deadline() == float("inf")


def test_agents_are_remembered_as_they_come_and_go(talk):
    talk.connect()
    talk.come("a", labels={"site": "lab"}, version="0.9")
    talk.turn()
    talk.hear(TOPICS.presence("a"), presence(online=False))
    talk.turn()
    assert [(row.agent_id, row.state, row.labels, row.version) for row in talk.store.agents] == [
        ("a", "online", {"site": "lab"}, "0.9"),
        ("a", "offline", {"site": "lab"}, "0.9"),
    ]


# Frames.


@pytest.mark.fault(6, 8)
@pytest.mark.parametrize(
    ("payload", "is_refused"),
    [
        (frame(0, codec=9), True),
        (frame(0, num_elements=3), True),
        (frame(0, body=BODIES[0][:8], num_elements=4), True),
        (frame(0, round_num=2), False),
        (frame(0, run_tag=run_tag("other")), False),
        (frame(0, content_tag=b"another!"), False),
        (frame(1), True),
        (frame(0)[:-1], True),
        (frame(0)[:30], True),
    ],
    ids=["codec", "count", "short body", "round", "run", "update", "index", "cut", "header cut"],
)
def test_a_frame_that_is_not_wanted_is_not_stored(talk, payload, is_refused):
    talk.to_collecting()
    talk.say("a", talk.header())
    talk.hear(TOPICS.update_frame("a", 0, 0), payload)
    talk.turn()
    assert "store" not in talk.order
    assert talk.observer.num_refused == ({"update": 1} if is_refused else {})
    talk.update("a")
    assert told(talk.turn(), Receipt)["a"].accepted


def test_frames_without_a_header_are_answered_with_the_wish_for_one(talk):
    talk.to_collecting()
    talk.send_frames("a", 0)
    talk.turn()
    assert told(talk.turn(0.1), Credit)["a"].need_header


def test_frames_that_are_stored_already_are_not_asked_for_again(talk):
    talk.to_collecting()
    facts = FrameFacts(hashlib.sha256(BODIES[1]).digest(), 1.0)
    talk.spool.frames[1, "a", content_tag(DIGEST)] = {1: facts}  # by a process that was killed
    talk.say("a", talk.header())
    assert told(talk.turn(), Credit)["a"].missing == ((0, 1), (2, 3))
    talk.send_frames("a", 0, 2)
    assert told(talk.turn(), Receipt)["a"].accepted


def test_an_update_that_gives_way_to_another_is_forgotten_before_it_may_come_again(talk):
    talk.to_collecting()
    talk.say("a", talk.header())
    talk.send_frames("a", 0, 1)
    assert talk.spool.stored(1, "a", content_tag(DIGEST)).keys() == {0, 1}
    talk.say("a", talk.header(update_digest="ab" * 32))
    talk.say("a", talk.header())
    talk.send_frames("a", 2)
    assert told(talk.turn(), Credit)["a"].missing == ((0, 2),)


@pytest.mark.fault(10)
def test_a_body_that_is_not_finite_is_rejected_with_its_reason(talk):
    talk.to_collecting()
    bad = np.full(4, np.nan, "<f4").tobytes()
    digest = update_digest(hashlib.sha256(body).digest() for body in (bad, *BODIES[1:]))
    talk.say("a", talk.header(update_digest=digest))
    for index in range(3):
        body = bad if index == 0 else BODIES[index]
        talk.hear(TOPICS.update_frame("a", 0, index), frame(index, body=body, content_tag=content_tag(digest)))
    receipt = told(talk.turn(), Receipt)["a"]
    assert (receipt.accepted, receipt.reason) == (False, "not_finite")


# Whatever comes.


@pytest.mark.fault(7)
def test_what_is_stale_is_dropped_and_counted(talk):
    talk.to_collecting()
    address = talk.address
    talk.say("a", Acceptance(**(address | {"attempt": 7})))
    talk.say("a", Refusal(**(address | {"epoch": 1}), reason="busy"))
    talk.say("a", Progress(**(address | {"round_num": 9}), phase="training", fraction=0.5))
    talk.hear(TOPICS.update_frame("a", 0, 0), frame(0, round_num=9))
    talk.say("a", Acceptance(**address))
    assert [note.kind for note in of_kind(talk.observer.notes, ev.MessageStale)] == ["control"] * 3 + ["update"]


TOPICS_IN = [
    TOPICS.outbox("a"),
    TOPICS.presence("a"),
    TOPICS.coordinator,
    TOPICS.update_frame("a", 0, 0),
    TOPICS.rollcall,
    TOPICS.head(RUN_ID),
    TOPICS.inbox("a"),
]


@pytest.mark.fault(20, 24)
@pytest.mark.parametrize("topic", TOPICS_IN)
@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"type":"update"}', b'{"type":"x"}', b"MF" * 40, b"[" * 5000],
    ids=repr,
)
def test_garbage_raises_nothing_is_counted_and_changes_nothing(talk, topic, payload):
    talk.to_collecting()
    run = talk.driver.run
    before = (run.state, run.attempt.round.members, run.epoch, dict(run.tallies.counts), run.status())
    talk.hear(topic, payload)
    sent = talk.turn()
    if topic == TOPICS.coordinator:  # our own presence is not there any more, so it is said again
        assert [(status.epoch, status.online) for status in statuses(sent)] == [(EPOCH, True)]
        sent = []
    assert sent == []
    assert (run.state, run.attempt.round.members, run.epoch, dict(run.tallies.counts), run.status()) == before
    ignored = topic in (TOPICS.rollcall, TOPICS.head(RUN_ID), TOPICS.inbox("a"))  # we do not read these
    cleared = payload == b"" and topic in (TOPICS.presence("a"), TOPICS.coordinator)
    assert sum(talk.observer.num_refused.values()) == (0 if ignored or cleared else 1)


@pytest.mark.fault(23, 31)
@pytest.mark.parametrize(
    "topic", ["", "x", "midge/1/other/agent/a/outbox", "midge/1/lab/agent/A B/outbox", "x" * 70_000]
)
def test_a_topic_that_is_none_of_ours_is_counted_under_a_bounded_name(talk, topic):
    talk.connect()
    talk.hear(topic, b"{}")
    assert sum(talk.observer.num_refused.values()) == 1
    assert set(talk.observer.num_refused) <= {"presence", "outbox", "update", "coordinator", "other"}


def test_a_flood_of_anything_on_any_topic_never_raises(talk):
    talk.to_collecting()
    rng = random.Random(7)
    address = talk.address
    good = [
        encode(talk.header()),
        encode(Acceptance(**address)),
        encode(Refusal(**address, reason="busy", detail="x")),
        encode(Progress(**address, phase="training", fraction=0.5)),
        encode(presence()),
        encode(presence("2", online=False)),
        *(frame(index) for index in range(3)),
    ]
    topics = [
        TOPICS.outbox("a"),
        TOPICS.outbox("z"),
        TOPICS.presence("a"),
        TOPICS.presence("z"),
        TOPICS.rollcall,
        "x/y",
    ]
    topics += [TOPICS.update_frame(agent_id, 0, index) for agent_id in "abz" for index in (0, 1, 2, 999_999_999)]
    for number in range(3000):
        payload = bytearray(rng.choice(good))
        for _ in range(rng.choice((0, 0, 1, 3))):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        talk.hear(rng.choice(topics), bytes(payload[: rng.choice((None, None, rng.randrange(99)))]))
        if number % 20 == 0:
            talk.turn(rng.choice((0.0, 0.1, 1.0)))
    assert sum(talk.observer.num_refused.values()) > 300


def test_without_a_run_updates_and_frames_are_ignored(talk):
    talk.connect()
    talk.hear(TOPICS.update_frame("a", 0, 0), frame(0))
    talk.say(
        "a",
        UpdateHeader(
            run_id="r9",
            epoch=1,
            round_num=1,
            attempt=1,
            model_digest="ab" * 32,
            layout_digest="ab" * 32,
            update_digest="ab" * 32,
            num_frames=1,
            num_examples=1,
            counters=(),
        ),
    )
    assert talk.turn() == []


def test_the_brokers_own_figures_are_passed_on_and_are_no_message_of_ours(talk):
    talk.connect()
    talk.hear("$SYS/broker/uptime", b"7 seconds")
    assert talk.observer.broker_figures == [("$SYS/broker/uptime", b"7 seconds")]
    assert talk.observer.num_refused == {}


def test_only_the_denial_of_what_is_needed_is_an_error(talk, caplog):
    talk.driver.handle(SubscriptionDenied(("$SYS/broker/uptime",)), 0.0)
    assert caplog.records == []
    talk.driver.handle(SubscriptionDenied((TOPICS.all_outboxes,)), 0.0)
    assert "the broker denies reading" in caplog.text


# Epochs: other coordinators, and those that were here before.


def status(epoch: int, *, online: bool = True, instance: str = "other") -> bytes:
    return presence_payload(epoch, instance, online=online)


def test_a_retained_status_of_a_higher_epoch_is_of_a_predecessor_and_raises_ours(talk):
    talk.to_collecting()
    talk.hear(TOPICS.coordinator, status(40), retained=True)
    assert talk.driver.epoch == 41
    sent = talk.turn()
    assert [each.epoch for each in statuses(sent)] == [41]
    assert {invitation.epoch for invitation in told(sent, Invitation).values()} == {41}
    assert talk.order.index("raise epoch") < len(talk.order) - 1


def test_of_two_that_were_given_the_same_epoch_the_later_one_goes_above(talk):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH), retained=True)
    assert talk.driver.epoch == EPOCH + 1


@pytest.mark.parametrize("epoch", [EPOCH, EPOCH + 1, EPOCH + 99])
def test_a_live_status_of_another_that_is_not_older_ends_this_one(talk, epoch):
    talk.connect()
    with pytest.raises(SupersededError, match=f"another coordinator of federation lab started \\(epoch {epoch}"):
        talk.hear(TOPICS.coordinator, status(epoch))


def test_one_that_was_cut_off_stops_for_another_that_started_meanwhile_and_not_for_one_that_is_gone(talk):
    talk.connect()
    talk.driver.handle(Disconnected("cut"), 0.0)
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH - 1), retained=True)
    talk.hear(TOPICS.coordinator, status(EPOCH), retained=True)
    assert talk.driver.epoch == EPOCH + 1  # a ghost's, or that one hears our higher epoch, and stops
    talk.hear(TOPICS.coordinator, status(EPOCH + 5, online=False), retained=True)
    assert talk.driver.epoch == EPOCH + 6
    with pytest.raises(SupersededError, match="another coordinator of federation lab started"):
        talk.hear(TOPICS.coordinator, status(EPOCH + 7), retained=True)


@pytest.mark.parametrize("retained", [False, True])
def test_what_is_no_epoch_is_not_believed_and_answered_with_our_presence(talk, retained):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH + MAX_EPOCH_JUMP), retained=retained)
    assert talk.observer.num_refused == {"coordinator": 1}
    assert [(each.epoch, each.instance) for each in statuses(talk.turn())] == [(EPOCH, "this")]
    absurd = Presence(online=True, incarnation="a", protocol=1, task="digits", epoch=2**53)
    talk.hear(TOPICS.presence("pi-0"), encode(absurd), retained=retained)
    assert [(each.epoch, each.instance) for each in statuses(talk.turn())] == [(EPOCH, "this")]
    assert talk.driver.epoch == EPOCH


def test_the_late_will_of_an_older_one_is_answered_with_our_presence(talk):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH - 1, online=False))
    (seen,) = statuses(talk.turn())
    assert (seen.online, seen.epoch, seen.instance) == (True, EPOCH, "this")


@pytest.mark.fault(29)
def test_an_older_one_that_is_back_is_answered_with_our_presence_which_it_replaced(talk):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH - 1), retained=True)  # as ours was on its way
    assert statuses(talk.turn()) == []
    talk.hear(TOPICS.coordinator, status(EPOCH - 1))
    assert talk.driver.epoch == EPOCH
    assert [(seen.online, seen.epoch, seen.instance) for seen in statuses(talk.turn())] == [(True, EPOCH, "this")]


def test_a_farewell_of_a_higher_epoch_is_followed_by_a_higher_one_of_ours(talk):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH + 3, online=False))
    assert talk.driver.epoch == EPOCH + 4


def test_our_own_presence_is_no_other_coordinator(talk):
    talk.connect()
    for epoch in (EPOCH, EPOCH - 1):
        talk.hear(TOPICS.coordinator, status(epoch, instance="this"))
    assert talk.driver.epoch == EPOCH
    assert talk.turn() == []


def test_our_own_will_of_an_earlier_connection_is_answered_with_our_presence(talk):
    talk.connect()
    talk.hear(TOPICS.coordinator, status(EPOCH, online=False, instance="this"))
    assert [seen.online for seen in statuses(talk.turn())] == [True]


@pytest.mark.fault(18, 20)
@pytest.mark.parametrize("online", [True, False])
def test_a_presence_in_our_name_that_is_not_ours_is_gone_above(talk, online):
    """Agents believe it, and would take no invitation of ours any more."""
    talk.to_collecting()
    talk.hear(TOPICS.coordinator, status(EPOCH + 9, online=online, instance="this"))
    assert talk.driver.epoch == EPOCH + 10
    assert [seen.epoch for seen in statuses(talk.turn())] == [EPOCH + 10]


def test_a_flood_on_our_topic_is_answered_once_a_turn(talk):
    talk.connect()
    for _ in range(50):
        talk.hear(TOPICS.coordinator, b"{", retained=True)
    assert len(statuses(talk.turn())) == 1
    assert talk.turn() == []


def test_a_header_for_a_run_that_is_over_makes_no_segment_of_the_spool(talk):
    talk.to_collecting()
    talk.driver.step(ev.StopAsked(), talk.now)
    talk.turn()
    talk.spool.stored = lambda *_: pytest.fail("the spool was asked, which makes a file")
    talk.update_as_before("a")
    talk.turn()


def test_an_agent_that_has_seen_a_higher_epoch_raises_ours(talk):
    talk.to_collecting()
    talk.come("c", epoch=70)
    assert talk.driver.epoch == 71
    assert {invitation.epoch for invitation in told(talk.turn(), Invitation).values()} == {71}


@pytest.mark.fault(29)
def test_connected_again_it_learns_who_leads_before_it_goes_above_what_agents_have_seen(talk):
    """What the broker kept for us comes first: agents that follow who took our place while we were cut off."""
    talk.to_collecting()
    talk.driver.handle(Disconnected("cut"), talk.now)
    talk.connect()
    talk.come("c", epoch=EPOCH + 1)
    talk.hear(TOPICS.coordinator, status(EPOCH, online=False, instance="this"))  # our will
    assert talk.driver.epoch == EPOCH
    with pytest.raises(SupersededError, match=f"another coordinator of federation lab started \\(epoch {EPOCH + 1}"):
        talk.hear(TOPICS.coordinator, status(EPOCH + 1), retained=True)


def test_connected_again_to_find_nobody_else_it_goes_above_what_agents_have_seen(talk):
    talk.to_collecting()
    talk.driver.handle(Disconnected("cut"), talk.now)
    talk.connect()
    talk.come("c", epoch=EPOCH + 3)
    assert talk.driver.epoch == EPOCH
    talk.hear(TOPICS.coordinator, status(EPOCH, instance="this"))  # what it has just published
    assert talk.driver.epoch == EPOCH + 4
    assert [seen.epoch for seen in statuses(talk.turn())] == [EPOCH + 4]
    talk.come("d", epoch=EPOCH + 8)
    assert talk.driver.epoch == EPOCH + 9


@pytest.mark.fault(20)
@pytest.mark.parametrize("retained", [True, False])
def test_an_epoch_beyond_all_measure_is_no_epoch(talk, retained):
    # It would be written to disk, and no agent could read a message with the one above it.
    talk.connect()
    talk.hear(TOPICS.coordinator, status(2**53), retained=retained)
    assert talk.observer.num_refused == {"coordinator": 1}
    assert [seen.epoch for seen in statuses(talk.turn())] == [EPOCH]  # who believes it, hears ours after it
    talk.come("a", epoch=2**53)
    assert talk.driver.epoch == EPOCH
    talk.turn()
    assert [row.agent_id for row in talk.store.agents] == ["a"]


def test_an_agent_that_left_while_no_coordinator_ran_is_settled_offline(talk):
    talk.connect()
    talk.hear(TOPICS.presence("one"), presence(online=False), retained=True)
    talk.turn()
    assert talk.store.agents == [AgentLeft("one")]
    assert "one" not in talk.driver.fleet.agents  # a flood of invented farewells fills no memory


def test_a_farewell_takes_back_the_presence(talk):
    talk.connect()
    talk.driver.say_farewell()
    (seen,) = statuses(talk.transport.take())
    assert (seen.online, seen.epoch) == (False, EPOCH)


# The connection.


def test_after_a_reconnection_the_model_is_published_again_and_the_roll_called(talk):
    talk.to_collecting()
    talk.driver.handle(Disconnected("the broker was stopped"), talk.now)
    assert talk.driver.fleet.available("digits", {}) == frozenset()
    talk.turn()
    sent = talk.connect()
    assert [each.topic for each in sent if "/model/" in each.topic] == [
        *(TOPICS.model_frame(RUN_ID, 0, index) for index in range(3)),
        TOPICS.head(RUN_ID),
    ]
    assert [decode(each.payload, RollCall).epoch for each in sent if each.topic == TOPICS.rollcall] == [EPOCH]


def test_frames_beyond_the_window_follow_as_the_broker_takes_the_first(talk, monkeypatch):
    monkeypatch.setattr("coordinator.publisher.WINDOW", 2)
    talk.connect()
    talk.start()
    talk.driver.step(ev.ModelPrepared(talk.base, LAYOUT, FRAMING), talk.now)
    names = [each.topic.rsplit("/", 1)[1] for each in talk.turn() if "/model/" in each.topic]
    assert names == ["0", "1"]
    talk.driver.handle(Published(2), talk.now)  # the token of the first frame: the presence had 1
    assert [each.topic.rsplit("/", 1)[1] for each in talk.turn()] == ["2", "head"]


def test_a_model_above_the_brokers_limit_is_an_error_in_the_log_and_is_tried_again_on_the_next_connection(talk, caplog):
    talk.connect()
    talk.start()
    talk.driver.step(ev.ModelPrepared(talk.base, LAYOUT, FRAMING), talk.now)
    talk.transport.packet_limit_bytes = 50
    with caplog.at_level(logging.ERROR, "coordinator"):
        talk.turn()
    assert "model not published" in caplog.text
    talk.transport.packet_limit_bytes = None
    talk.driver.handle(Disconnected("the broker was restarted"), talk.now)
    assert TOPICS.head(RUN_ID) in [each.topic for each in talk.connect()]


@pytest.mark.fault(9)
def test_a_message_above_the_brokers_limit_is_logged_and_the_others_go(talk, caplog):
    talk.to_collecting()
    talk.transport.packet_limit_bytes = 10
    talk.update("a")
    assert talk.turn() == []
    assert "message not sent" in caplog.text


def test_traffic_counts_what_was_sent_and_not_what_was_dropped(talk):
    talk.to_collecting()
    sent = {kind: size for (direction, kind), size in talk.observer.bytes.items() if direction == "out"}
    talk.transport.is_connected = False
    talk.update("a")
    talk.turn()
    assert {kind: size for (direction, kind), size in talk.observer.bytes.items() if direction == "out"} == sent
    assert talk.observer.bytes["in", "update"] == sum(len(frame(index)) for index in range(3))


def test_an_earlier_run_is_cleared_from_the_broker(talk):
    talk.connect()
    talk.driver.clear_run("r0", 1)
    sent = talk.transport.take()
    assert {each.topic for each in sent} == {
        TOPICS.head("r0"),
        TOPICS.model_frame("r0", 0, 0),
        TOPICS.model_frame("r0", 1, 0),
    }
    assert all(each.payload == b"" and each.retain for each in sent)


def test_agents_that_are_not_wanted_any_more_are_told(talk):
    talk.to_collecting()
    late = talk.header()
    talk.update("a")
    talk.update("b")
    talk.turn()
    version = talk.models.save_state({"w": np.full(10, 0.5, np.float32)})
    talk.driver.step(ev.UpdatesAggregated(version, 1.5), talk.now)
    talk.turn()
    talk.say("b", msgspec.structs.replace(late, update_digest="cd" * 32))
    assert told(talk.turn(), Cancel)["b"].reason == "late"


def test_presence_payload_is_a_status_with_the_epoch_and_this_process():
    seen = decode(presence_payload(7, "this", online=False), CoordinatorStatus)
    assert (seen.online, seen.epoch, seen.instance) == (False, 7, "this")
    assert isinstance(decode(encode(presence()), Presence), Presence)


# A model that agents do not get.


def test_a_model_that_an_agent_did_not_get_is_published_again_once_for_each_attempt(talk):
    talk.to_collecting()
    talk.turn()
    frames = [TOPICS.model_frame(RUN_ID, 0, index) for index in range(3)]
    refusal = Refusal(**talk.address, reason="fetch", detail="the model did not arrive before the deadline")
    talk.say("a", Refusal(**{**talk.address, "round_num": 9}, reason="fetch"))
    assert [each for each in talk.turn() if each.topic in frames] == []
    talk.say("a", refusal)
    assert [each.topic for each in talk.turn() if each.topic in frames] == frames
    talk.say("a", refusal)
    assert [each for each in talk.turn() if each.topic in frames] == []


def test_a_model_above_the_brokers_limit_is_a_problem_until_the_next_connection(talk):
    talk.transport.packet_limit_bytes = 30
    talk.to_collecting()
    assert talk.driver.problem.startswith(
        f"the model cannot be published: {TOPICS.model_frame(RUN_ID, 0, 0)}: packet of "
    )
    talk.driver.handle(Disconnected("cut"), talk.now)
    talk.transport.packet_limit_bytes = None
    talk.connect()
    assert talk.driver.problem == ""
