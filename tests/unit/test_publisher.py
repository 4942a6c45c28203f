"""Publishing a version: frames first and head last, a window at a time, and what the broker holds is the model."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from coordinator.models import ModelStore
from coordinator.publisher import WINDOW, Publisher, clear_retained
from midge.transport.base import PacketTooLargeError
from midge.wire.frames import FLOAT32, Framing, content_tag, decode_frame, run_tag
from midge.wire.layout import Layout, model_hash
from midge.wire.messages import Head, decode
from midge.wire.topics import NUM_SLOTS, Topics
from tests.unit.recording import RecordingTransport

TOPICS = Topics("lab")


class Talk:
    """A publisher of a model with `num_elements` weights, 0, 1, 2 and so on, and a counter."""

    def __init__(self, directory, num_elements: int = 5, frame_elements: int = 2, round_num: int = 3) -> None:
        self.transport = RecordingTransport()
        self.models = ModelStore(directory / "models")
        state = {"w": np.arange(num_elements, dtype=np.float32), "n": np.array(41, np.int64)}
        self.model = self.models.open(self.models.save_state(state))
        self.framing = Framing(num_elements, frame_elements)
        self.publisher = self.new(round_num)

    def new(self, round_num: int) -> Publisher:
        return Publisher(
            self.transport,
            TOPICS,
            self.model,
            self.framing,
            run_id="r1",
            round_num=round_num,
            epoch=7,
            task="digits",
        )

    @property
    def topics(self) -> list[str]:
        return [sent.topic.removeprefix("midge/1/lab/model/r1/") for sent in self.transport.sent]


def test_frames_go_before_the_head_and_all_of_it_is_retained(tmp_path):
    talk = Talk(tmp_path)
    assert talk.publisher.pump()
    assert talk.publisher.is_done
    assert talk.topics == ["1/0", "1/1", "1/2", "head"]
    assert all(sent.retain and sent.qos == 1 for sent in talk.transport.sent)
    assert talk.publisher.num_bytes == sum(len(sent.payload) for sent in talk.transport.sent)


def test_whoever_reads_head_and_frames_has_the_model(tmp_path):
    talk = Talk(tmp_path, num_elements=1000, frame_elements=64)
    talk.publisher.pump()
    head = decode(talk.transport.sent[-1].payload, Head)
    assert (head.run_id, head.epoch, head.round_num, head.slot, head.task) == ("r1", 7, 3, 1, "digits")
    assert (head.counters, head.frame_elements, head.codec) == ((41,), 64, "float32")
    hasher = model_hash(Layout(head.layout), head.counters)
    for index, sent in enumerate(talk.transport.sent[:-1]):
        frame = decode_frame(sent.payload)
        assert (frame.index, frame.codec, frame.round_num, frame.run_tag) == (index, FLOAT32, 3, run_tag("r1"))
        assert frame.content_tag == content_tag(head.model_digest)
        hasher.update(frame.body)
    assert hasher.hexdigest() == head.model_digest == talk.model.digest


def test_versions_alternate_between_the_slots_so_the_one_before_stays_whole(tmp_path):
    talk = Talk(tmp_path, round_num=0)
    talk.publisher.pump()
    talk.new(1).pump()
    talk.new(2).pump()
    assert [topic[0] for topic in talk.topics if topic != "head"] == ["0"] * 3 + ["1"] * 3 + ["0"] * 3


def test_no_more_frames_are_on_their_way_than_the_window_holds(tmp_path):
    talk = Talk(tmp_path, num_elements=200, frame_elements=1)
    assert not talk.publisher.pump()
    assert len(talk.transport.sent) == WINDOW == 64
    assert not talk.publisher.pump()
    assert len(talk.transport.sent) == WINDOW
    for token in range(1, 137):
        assert talk.publisher.taken(token)
        assert talk.publisher.pump() == (token == 136), token
        assert len(talk.transport.sent) - token <= WINDOW + 1
    assert talk.topics == [*(f"1/{index}" for index in range(200)), "head"]


def test_a_token_of_another_message_makes_no_room(tmp_path):
    talk = Talk(tmp_path, num_elements=200, frame_elements=1)
    talk.publisher.pump()
    assert not talk.publisher.taken(4711)
    assert talk.publisher.taken(1)
    assert not talk.publisher.taken(1)
    talk.publisher.pump()
    assert len(talk.transport.sent) == WINDOW + 1


def test_once_done_nothing_is_published_again(tmp_path):
    talk = Talk(tmp_path)
    talk.publisher.pump()
    num_sent = len(talk.transport.sent)
    assert talk.publisher.pump()
    assert not talk.publisher.taken(1)
    assert len(talk.transport.sent) == num_sent


@pytest.mark.parametrize("num_frames", [0, 2, 3])
def test_a_connection_that_is_lost_in_the_midst_leaves_it_undone_whatever_was_sent(tmp_path, num_frames):
    talk = Talk(tmp_path)
    publish = talk.transport.publish

    def lose(*args, **options) -> int:
        talk.transport.is_connected = len(talk.transport.sent) < num_frames
        return publish(*args, **options)

    talk.transport.publish = lose
    assert not talk.publisher.pump()
    assert not talk.publisher.is_done
    assert len(talk.transport.sent) == num_frames
    assert talk.publisher.num_bytes == sum(len(sent.payload) for sent in talk.transport.sent)


def test_a_frame_above_the_brokers_limit_is_told(tmp_path):
    talk = Talk(tmp_path)
    talk.transport.packet_limit_bytes = 47  # a frame of two elements has 48
    with pytest.raises(PacketTooLargeError, match="raise the limit on the broker"):
        talk.publisher.pump()
    assert talk.transport.sent == []


def test_a_run_is_cleared_from_every_topic_that_it_was_retained_on(tmp_path):
    talk = Talk(tmp_path)
    talk.publisher.pump()
    talk.new(4).pump()
    published = {sent.topic for sent in talk.transport.take()}
    clear_retained(talk.transport, TOPICS, "r1", talk.framing.num_frames)
    assert {sent.topic for sent in talk.transport.sent} == published
    assert len(published) == NUM_SLOTS * 3 + 1
    assert all(sent.payload == b"" and sent.retain for sent in talk.transport.sent)


def test_the_same_version_published_again_is_the_same_bytes(tmp_path):
    talk = Talk(tmp_path)
    digests = []
    for _ in range(2):
        talk.new(3).pump()
        digests.append(hashlib.sha256(b"".join(sent.payload for sent in talk.transport.take())).hexdigest())
    assert digests[0] == digests[1]
