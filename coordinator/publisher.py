"""The publisher: puts a version of the model at the broker, frames first and head last, a window at a time.

Only so many frames are handed to the connection before the broker has taken earlier ones, so that memory does not depend on
the model's size. Two slots alternate: the version before stays whole while the next one is published. Where the connection is
lost in the midst, it stops: once there is another, a new publisher begins anew, since the broker may have forgotten everything.
"""

from __future__ import annotations

from coordinator.models import ModelFile
from midge.failpoints import fail_point
from midge.transport.base import Transport
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag
from midge.wire.messages import Head, encode
from midge.wire.topics import NUM_SLOTS, Topics

WINDOW = 64
"""Frames handed to the connection that the broker has not yet taken."""


class Publisher:
    """One version on its way to the broker.

    Args:
        transport: the connection.
        topics: of the federation.
        model: the version; kept open by the caller until `is_done`.
        framing: of the run.
        run_id: of the run.
        round_num: of the version.
        epoch: of this coordinator.
        task: what the head calls it.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        model: ModelFile,
        framing: Framing,
        *,
        run_id: str,
        round_num: int,
        epoch: int,
        task: str,
    ) -> None:
        self.round_num = round_num
        self.is_done = False
        self.num_bytes = 0
        self._transport = transport
        self._topics = topics
        self._model = model
        self._framing = framing
        self._head = Head(
            run_id=run_id,
            epoch=epoch,
            round_num=round_num,
            slot=round_num % NUM_SLOTS,
            model_digest=model.digest,
            layout=model.layout.tensors,
            frame_elements=framing.frame_elements,
            codec="float32",
            counters=model.counters,
            task=task,
        )
        self._run_tag = run_tag(run_id)
        self._content_tag = content_tag(model.digest)
        self._next = 0
        self._outstanding: set[int] = set()

    def pump(self) -> bool:
        """Publish as much as the window allows; true once all of it, the head too, was handed to the connection.

        Raises:
            PacketTooLargeError: a frame, or the head, is above the broker's limit.
        """
        while self._next < self._framing.num_frames and len(self._outstanding) < WINDOW:
            token = self._publish_frame(self._next)
            if not token:
                return False
            self._next += 1
            self._outstanding.add(token)
            fail_point("coordinator.frame.published")
        if self._next == self._framing.num_frames and not self.is_done:
            payload = encode(self._head)
            if self._transport.publish(self._topics.head(self._head.run_id), payload, retain=True):
                self.num_bytes += len(payload)
                self.is_done = True
                fail_point("coordinator.head.published")
        return self.is_done

    def taken(self, token: int) -> bool:
        """The broker took the message with this token; whether it was one of ours that made room."""
        if token not in self._outstanding:
            return False
        self._outstanding.discard(token)
        return not self.is_done

    def _publish_frame(self, index: int) -> int:
        start, stop = self._framing.span(index)
        frame = encode_frame(
            codec=FLOAT32,
            run_tag=self._run_tag,
            round_num=self.round_num,
            index=index,
            num_elements=stop - start,
            content_tag=self._content_tag,
            body=encode_float32(self._model.elements[start:stop]),
        )
        topic = self._topics.model_frame(self._head.run_id, self._head.slot, index)
        token = self._transport.publish(topic, frame, retain=True)
        self.num_bytes += len(frame) if token else 0
        return token


def clear_retained(transport: Transport, topics: Topics, run_id: str, num_frames: int) -> None:
    """Have the broker forget everything of a run."""
    transport.publish(topics.head(run_id), b"", retain=True)
    for slot in range(NUM_SLOTS):
        for index in range(num_frames):
            transport.publish(topics.model_frame(run_id, slot, index), b"", retain=True)
