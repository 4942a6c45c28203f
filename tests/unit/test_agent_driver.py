"""The agent's driver: bytes in, bytes out. Whatever is garbage is counted and changes nothing; a round goes its way."""

from __future__ import annotations

import errno
import logging
import random
from typing import Any

import msgspec
import pytest

from edge_agent import agent_events as ev
from edge_agent.agent import Agent, AgentState
from edge_agent.driver import Driver, make_agent
from edge_agent.journal import Journal, write_update
from midge.transport.base import Connected, Disconnected, MessageReceived, SubscriptionDenied
from midge.wire.frames import FLOAT32, content_tag, encode_frame, run_tag
from midge.wire.messages import (
    Acceptance,
    Cancel,
    CoordinatorStatus,
    Credit,
    Head,
    Invitation,
    Presence,
    Receipt,
    Refusal,
    RollCall,
    UpdateHeader,
    decode,
    decode_to_coordinator,
    encode,
)
from midge.wire.topics import Topics
from tests.unit.recording import RecordingTransport, Sent
from tests.unit.test_journal import head as head_of
from tests.unit.test_journal import invitation as some_invitation
from tests.unit.test_journal import made

ELEMENTS = bytes(range(1, 41))
HEAD = head_of(ELEMENTS)
INVITATION = msgspec.structs.replace(some_invitation(), model_digest=HEAD.model_digest)
ADDRESS = {"run_id": "r1", "epoch": 1, "round_num": 1, "attempt": 1}
TOPICS = Topics("lab")
INBOX = TOPICS.inbox("pi-1")
FRAMES = [TOPICS.model_frame("r1", 0, index) for index in range(3)]


class FakeTrainer:
    """A trainer that trains nothing."""

    def __init__(self) -> None:
        self.trainings: list[tuple[Invitation, Head]] = []
        self.num_cancelled = 0

    def train(self, invitation: Invitation, head: Head, now: float) -> None:
        self.trainings.append((invitation, head))

    def cancel(self, now: float) -> None:
        self.num_cancelled += 1


class Talk:
    """A driver with a real machine and a real journal, and the test on all its other sides."""

    def __init__(self, journal: Journal, packet_limit_bytes: int | None = None) -> None:
        self.now = 0.0
        self.journal = journal
        self.transport = RecordingTransport(packet_limit_bytes)
        self.trainer = FakeTrainer()
        self.notes: list[ev.Note] = []
        self.objection: ev.Objection | None = None
        self.driver = Driver(
            "pi-1",
            TOPICS,
            make_agent(random.Random(1), 0.0, journal),
            self.transport,
            journal,
            self.trainer,
            Presence(online=True, incarnation="ab", protocol=1, version="0.1", task="digits", labels={"site": "lab"}),
            lambda _: self.objection,
            self.notes.append,
        )
        self.driver.handle(Connected("5", 1000), self.now)

    @property
    def agent(self) -> Agent:
        return self.driver.agent

    def hear(self, topic: str, payload: bytes, *, retained: bool = False) -> list[Sent]:
        self.transport.take()
        self.now += 0.01
        self.driver.handle(MessageReceived(topic, payload, retained), self.now)
        self.agent.check()
        return self.transport.take()

    def told(self, message: Any) -> list[Sent]:
        return self.hear(INBOX, encode(message))

    def frame(self, index: int, payload: bytes | None = None) -> list[Sent]:
        return self.hear(FRAMES[index], frame(index) if payload is None else payload, retained=True)

    def to_fetching(self) -> None:
        self.hear(TOPICS.coordinator, encode(status()), retained=True)
        self.told(INVITATION)
        self.hear(TOPICS.head("r1"), encode(HEAD), retained=True)
        assert self.agent.work is AgentState.FETCHING

    def to_training(self) -> None:
        self.to_fetching()
        for index in (2, 0, 1):
            self.frame(index)
        assert self.agent.work is AgentState.TRAINING

    def to_uploading(self) -> tuple[ev.FinishedUpdate, list[bytes], list[Sent]]:
        """Returns the update, its frames, and what was sent at the end of the training."""
        self.to_training()
        update, frames = made()
        update = ev.FinishedUpdate(
            **{key: getattr(update, key) for key in update.__slots__} | {"model_digest": HEAD.model_digest}
        )
        write_update(self.journal.update_path, frames, update)
        self.driver.step(ev.TrainingFinished(update), self.now)
        return update, frames, self.transport.take()


def status(epoch: int = 1, *, online: bool = True) -> CoordinatorStatus:
    return CoordinatorStatus(online=online, epoch=epoch, instance="i1", protocol=1, version="0.1")


def frame(index: int, **changes: Any) -> bytes:
    """Frame `index` of the model, but for `changes`."""
    body = ELEMENTS[16 * index : 16 * index + 16]
    fields: dict[str, Any] = {
        "codec": FLOAT32,
        "run_tag": run_tag("r1"),
        "round_num": 0,
        "index": index,
        "num_elements": len(body) // 4,
        "content_tag": content_tag(HEAD.model_digest),
        "body": body,
    }
    return encode_frame(**(fields | changes))


def messages(sent: list[Sent]) -> list[Any]:
    """What was said to the coordinator."""
    return [decode_to_coordinator(each.payload) for each in sent if each.topic == TOPICS.outbox("pi-1")]


@pytest.fixture
def talk(tmp_path):
    journal = Journal(tmp_path)
    yield Talk(journal)
    journal.close()


# A round.


def test_once_connected_it_listens_and_says_that_it_is_there(talk):
    assert talk.transport.read == {INBOX, TOPICS.coordinator, TOPICS.rollcall}
    (sent,) = talk.transport.take()
    assert (sent.topic, sent.retain, sent.qos) == (TOPICS.presence("pi-1"), True, 1)
    presence = decode(sent.payload, Presence)
    assert (presence.online, presence.incarnation, presence.task, presence.labels) == (
        True,
        "ab",
        "digits",
        {"site": "lab"},
    )
    assert (presence.epoch, presence.packet_limit_bytes) == (0, 1000)


def test_an_invitation_is_on_disk_before_it_is_accepted_and_the_head_is_watched(talk):
    on_disk = []
    publish = talk.transport.publish
    talk.transport.publish = lambda *args, **kwargs: (
        on_disk.append(talk.journal.invitation()) or publish(*args, **kwargs)
    )
    assert messages(talk.told(INVITATION)) == [Acceptance(**ADDRESS)]
    assert on_disk == [INVITATION]
    assert TOPICS.head("r1") in talk.transport.read


def test_frames_are_asked_for_by_topic_stored_and_read_no_more(talk):
    talk.to_fetching()
    assert set(FRAMES) <= talk.transport.read
    for index in (2, 0, 1):
        assert talk.trainer.trainings == []
        talk.frame(index)
    assert talk.trainer.trainings == [(INVITATION, HEAD)]
    assert talk.journal.model_path.read_bytes() == ELEMENTS
    assert not set(FRAMES) & talk.transport.read


def test_a_finished_update_is_announced_and_sent_byte_for_byte_within_its_credit(talk):
    update, frames, sent = talk.to_uploading()
    (header,) = messages(sent)
    assert isinstance(header, UpdateHeader)
    assert (header.update_digest, header.num_frames, header.counters) == (update.update_digest, 3, (3, -1))
    of_frames = [(each.topic, each.payload) for each in sent if "/update/" in each.topic]
    assert of_frames == [(TOPICS.update_frame("pi-1", 0, index), frames[index]) for index in range(2)]  # credit is 2
    more = talk.told(Credit(**ADDRESS, missing=((1, 3),), credit=2))
    assert [(each.topic, each.payload) for each in more] == [(TOPICS.update_frame("pi-1", 0, 2), frames[2])]


def test_a_receipt_ends_the_work_on_disk_too(talk):
    update, _, _ = talk.to_uploading()
    talk.told(Receipt(**ADDRESS, update_digest=update.update_digest, accepted=True))
    assert talk.journal.update() is None
    assert talk.journal.invitation() is None
    assert talk.agent.state is AgentState.IDLE
    assert [note.outcome for note in talk.notes if isinstance(note, ev.RoundEnded)] == ["accepted"]


def test_a_cancellation_ends_the_training(talk):
    talk.to_training()
    talk.told(Cancel(**ADDRESS, reason="closed"))
    assert talk.trainer.num_cancelled == 1
    assert talk.agent.state is AgentState.IDLE


def test_an_objection_is_asked_for_with_each_invitation_and_told(talk):
    talk.objection = ev.Objection("battery", "12 % left")
    assert messages(talk.told(INVITATION)) == [Refusal(**ADDRESS, reason="battery", detail="12 % left")]
    assert talk.journal.invitation() is None


def test_the_head_of_another_run_is_read_instead_of_the_first(talk):
    talk.told(INVITATION)
    talk.told(msgspec.structs.replace(INVITATION, run_id="r2"))
    assert TOPICS.head("r2") in talk.transport.read
    assert TOPICS.head("r1") not in talk.transport.read


def test_presence_says_the_highest_epoch_that_was_seen(talk):
    talk.hear(TOPICS.coordinator, encode(status(41)), retained=True)
    sent = talk.hear(TOPICS.rollcall, encode(RollCall(epoch=41)))
    assert [decode(each.payload, Presence).epoch for each in sent if each.topic == TOPICS.presence("pi-1")] == [41]


def test_after_a_reconnection_everything_is_read_anew_and_what_was_under_way_goes_on(talk):
    talk.to_fetching()
    talk.frame(0)
    talk.driver.handle(Disconnected("the broker was stopped"), talk.now)
    talk.transport.subscribed.clear()
    talk.transport.unsubscribed.clear()
    talk.driver.handle(Connected("3.1.1", None), talk.now)
    assert talk.transport.read == {INBOX, TOPICS.coordinator, TOPICS.rollcall, TOPICS.head("r1"), *FRAMES[1:]}
    presences = [each for each in talk.transport.take() if each.topic == TOPICS.presence("pi-1")]
    assert decode(presences[-1].payload, Presence).packet_limit_bytes == 0
    talk.frame(1)
    talk.frame(2)
    assert talk.agent.work is AgentState.TRAINING


def test_a_farewell_is_retained_and_takes_back_the_birth(talk):
    talk.transport.take()
    talk.driver.say_farewell()
    (sent,) = talk.transport.take()
    assert (sent.topic, sent.retain) == (TOPICS.presence("pi-1"), True)
    assert decode(sent.payload, Presence) == Presence(online=False, incarnation="ab")


def test_an_update_of_an_earlier_process_is_offered_when_its_round_is_invited_to_again(talk, tmp_path):
    _, frames, _ = talk.to_uploading()
    talk.journal.close()
    again = Talk(Journal(tmp_path))
    sent = again.told(msgspec.structs.replace(INVITATION, attempt=2, epoch=2))
    assert [type(message) for message in messages(sent)] == [Acceptance, UpdateHeader]
    assert [each.payload for each in sent if "/update/" in each.topic] == frames[:2]
    assert again.trainer.trainings == []
    again.journal.close()


# What is wrong.


@pytest.mark.fault(20, 24)
@pytest.mark.parametrize("topic", [INBOX, TOPICS.coordinator, TOPICS.rollcall, TOPICS.head("r1"), FRAMES[0]])
@pytest.mark.parametrize(
    "payload",
    [b"{", b"\xff\xfe", b"null", b"[]", b'{"type":"invitation"}', b'{"type":"nothing"}', b"MF" * 40, b"[" * 5000],
    ids=repr,
)
def test_garbage_is_counted_and_changes_nothing(talk, topic, payload):
    talk.to_fetching()
    before = (talk.agent.work, talk.agent.head, talk.agent.invitation, talk.agent.epoch)
    assert talk.hear(topic, payload) == []
    assert talk.driver.num_invalid == 1
    assert (talk.agent.work, talk.agent.head, talk.agent.invitation, talk.agent.epoch) == before


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "topic", ["", "midge/1/other/coordinator", "midge/1/lab/agent/../inbox", "x" * 70_000, "$SYS/x"]
)
def test_a_topic_that_is_none_of_ours_is_counted(talk, topic):
    assert talk.hear(topic, encode(INVITATION)) == []
    assert talk.driver.num_invalid == 1


@pytest.mark.parametrize("topic", [TOPICS.inbox("pi-2"), TOPICS.outbox("pi-1"), TOPICS.presence("pi-1")])
def test_what_is_for_others_is_ignored(talk, topic):
    assert talk.hear(topic, encode(INVITATION)) == []
    assert talk.agent.state is AgentState.IDLE


@pytest.mark.parametrize("topic", [TOPICS.coordinator, TOPICS.head("r1"), FRAMES[0]])
def test_a_retained_message_that_was_cleared_is_no_message(talk, topic):
    talk.to_fetching()
    assert talk.hear(topic, b"") == []
    assert talk.driver.num_invalid == 0


@pytest.mark.fault(6, 8)
@pytest.mark.parametrize(
    "payload",
    [
        frame(0, content_tag=b"before!!"),
        frame(1),
        frame(0, codec=9),
        frame(0, num_elements=3),
        frame(0, body=ELEMENTS[:12], num_elements=3),
        frame(0, body=bytes(64), num_elements=16),
    ],
    ids=["of the version before", "of another index", "of another codec", "ill counted", "too short", "too long"],
)
def test_a_frame_that_is_not_the_awaited_one_is_awaited_still(talk, payload):
    talk.to_fetching()
    talk.frame(0, payload)
    assert talk.journal.model_path.read_bytes() == bytes(40)
    for index in range(3):
        assert talk.agent.work is AgentState.FETCHING
        talk.frame(index)
    assert talk.agent.work is AgentState.TRAINING


@pytest.mark.fault(8)
def test_frames_that_do_not_add_up_to_the_digest_are_asked_for_again_and_in_the_end_refused(talk):
    talk.to_fetching()
    for _ in range(2):
        for index in range(3):
            talk.frame(index, frame(index, body=bytes(16 if index < 2 else 8)))
        assert talk.agent.work is AgentState.FETCHING
        assert set(FRAMES) <= set(talk.transport.subscribed[-3:])
    sent = [each for index in range(3) for each in talk.frame(index, frame(index, body=bytes(16 if index < 2 else 8)))]
    (refusal,) = messages(sent)
    assert (refusal.reason, refusal.detail) == ("fetch", "the model's frames do not add up to its digest")


def test_a_flood_of_anything_on_any_topic_never_raises(talk):
    rng = random.Random(5)
    topics = [INBOX, TOPICS.coordinator, TOPICS.rollcall, TOPICS.head("r1"), TOPICS.head("r2"), *FRAMES, "x/y"]
    good = [
        encode(INVITATION),
        encode(HEAD),
        encode(status()),
        encode(RollCall(epoch=1)),
        *(frame(i) for i in range(3)),
    ]
    good += [encode(Cancel(**ADDRESS, reason="late")), encode(Credit(**ADDRESS, missing=((0, 9),), credit=9))]
    for _ in range(3000):
        payload = bytearray(rng.choice(good))
        for _ in range(rng.choice((0, 0, 1, 3))):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        talk.hear(rng.choice(topics), bytes(payload[: rng.choice((None, None, rng.randrange(99)))]))
    assert talk.driver.num_invalid > 300


@pytest.mark.fault(9)
def test_a_message_above_the_packet_limit_is_logged_and_not_sent(tmp_path, caplog):
    journal = Journal(tmp_path)
    talk = Talk(journal, packet_limit_bytes=10)
    assert talk.transport.take() == []
    assert "message not sent" in caplog.text
    talk.told(INVITATION)
    assert talk.agent.work is AgentState.FETCHING
    journal.close()


def test_topics_that_may_not_be_read_are_logged(talk, caplog):
    talk.driver.handle(SubscriptionDenied((INBOX,)), 0.0)
    assert "the broker denies reading" in caplog.text


@pytest.mark.parametrize("operation", ["write_invitation", "open_model", "write_frame", "model_is"])
def test_a_full_disk_is_a_refused_round_and_the_agent_takes_the_next(talk, monkeypatch, operation):
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    refusals = []
    publish = talk.transport.publish

    def watch(topic: str, payload: bytes, **options: Any) -> int:
        refusals.extend(said for said in messages([Sent(topic, payload, 1, False, None)]) if isinstance(said, Refusal))
        return publish(topic, payload, **options)

    talk.transport.publish = watch
    with monkeypatch.context() as patch:
        patch.setattr(talk.journal, operation, fails)
        talk.told(INVITATION)
        talk.hear(TOPICS.head("r1"), encode(HEAD))
        for index in range(3):
            talk.frame(index)
    assert [refusal.reason for refusal in refusals] == ["disk"]
    assert "No space left on device" in refusals[0].detail
    talk.told(msgspec.structs.replace(INVITATION, attempt=2))
    for index in range(3):
        talk.frame(index)
    assert talk.agent.work is AgentState.TRAINING


def test_the_end_of_a_training_is_logged_with_its_loss(talk, caplog):
    with caplog.at_level(logging.INFO, "edge_agent"):
        update, *_ = talk.to_uploading()
    (record,) = [record for record in caplog.records if record.getMessage() == "trained"]
    assert record.midge_fields == {
        "run": "r1",
        "round": update.round_num,
        "agent": "pi-1",
        "examples": update.num_examples,
        "loss": 0.5,
        "duration_s": round(update.training_s, 3),
    }
