"""The spool as the driver wants it: of one run."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.spool import Spool
from coordinator.uplink import FrameFacts
from midge.wire.frames import Frame


class RunSpool:
    """The spool as the driver wants it: of the current run."""

    def __init__(self, spool: Spool) -> None:
        self.run_id = ""
        self._spool = spool
        self._dirty: set[int] = set()

    def store(self, round_num: int, agent_id: str, payload: bytes, frame: Frame, facts: FrameFacts) -> None:
        """See `SpoolLike.store`."""
        segment = self._spool.round(self.run_id, round_num)
        segment.append(agent_id, payload, facts.body_digest, facts.delta_sum_squares, frame=frame)
        self._dirty.add(round_num)

    def stored(self, round_num: int, agent_id: str, tag: bytes) -> Mapping[int, FrameFacts]:
        """See `SpoolLike.stored`."""
        frames = self._spool.round(self.run_id, round_num).stored(agent_id, tag)
        return {index: FrameFacts(frame.body_digest, frame.delta_sum_squares) for index, frame in frames.items()}

    def forget(self, round_num: int, agent_id: str, tag: bytes) -> None:
        """See `SpoolLike.forget`."""
        self._spool.round(self.run_id, round_num).forget(agent_id, tag)

    def sync(self) -> None:
        """See `SpoolLike.sync`."""
        for round_num in self._dirty:
            self._spool.round(self.run_id, round_num).sync()
        self._dirty.clear()
