"""Updates on their way up: which frames came, which are missing, and how many may be on their way at once.

MQTT acknowledges to the broker, not to the receiver, and a broker drops what its queue cannot hold. So the frames of an
update travel under *credit*: each agent may have so many frames on their way, unacknowledged, and the sum over all agents
stays at or below `TOTAL_CREDIT`, which any broker's queue holds. An acknowledgement lists what is still missing; it
can be lost, doubled or late without harm. It is due after a quarter of the credit, after a short silence, and whenever
the agent sends its header again, which is how an agent asks.

Credit is first shared among those that are invited, so that none need ask; then each acknowledgement moves an agent
towards an equal part among those that have announced an update. One that has more gives some up as soon as another asks in
vain, so that no slow or silent agent starves the rest.

An update counts as received only when its header and all of its frames are here and stored. This file is pure: it holds
digests and counts, never elements.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from midge.wire.frames import Framing, content_tag, update_digest
from midge.wire.messages import MAX_RANGES, Range, UpdateHeader

TOTAL_CREDIT = 256
"""Frames on their way to the coordinator at once, over all agents: a quarter of the queue of a default Mosquitto."""
_ACK_DELAY_S = 0.05


class FrameFacts(Struct, frozen=True):
    """What is remembered of a stored frame.

    Attributes:
        body_digest: SHA-256 of its body.
        delta_sum_squares: sum of (local - global)^2 over its elements; not finite if an element is not.
    """

    body_digest: bytes
    delta_sum_squares: float


class Verdict(enum.StrEnum):
    """What to do with a frame that came."""

    WANTED = "wanted"
    DUPLICATE = "duplicate"
    UNANNOUNCED = "unannounced"
    STALE = "stale"
    MALFORMED = "malformed"


class Acknowledgement(Struct, frozen=True):
    """What an agent is to be told."""

    agent_id: str
    missing: tuple[Range, ...]
    credit: int
    need_header: bool


@dataclass
class Transfer:
    """One agent's update as far as it came."""

    agent_id: str
    credit: int
    header: UpdateHeader | None = None
    frames: dict[int, FrameFacts] = field(default_factory=dict)
    retries: int = 0
    low: int = 0
    """All frames below are here."""
    unacknowledged: int = 0
    due_at: float = math.inf

    def missing(self, num_frames: int) -> tuple[Range, ...]:
        """What is not here, as ranges; past `MAX_RANGES` of them, the last reaches to the end."""
        ranges: list[Range] = []
        start: int | None = None
        for index in range(self.low, num_frames):
            if index not in self.frames:
                start = index if start is None else start
            elif start is not None:
                ranges.append((start, index))
                start = None
                if len(ranges) == MAX_RANGES - 1:
                    return (*ranges, (index, num_frames))
        if start is not None:
            ranges.append((start, num_frames))
        return tuple(ranges)


class Uplink:
    """The transfers of one attempt at one round.

    Args:
        framing: the run's; every update has its number of frames.
    """

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self.transfers: dict[str, Transfer] = {}
        self._free = TOTAL_CREDIT

    def invite(self, agent_ids: Iterable[str]) -> None:
        """Expect updates of these agents, and share what credit is free among those that have none.

        Inviting one again changes nothing else.
        """
        without = [agent_id for agent_id in agent_ids if not self.credit(agent_id)]
        if not without:
            return
        share = min(self._free // len(without), self.framing.num_frames)
        for agent_id in without:
            self.transfers.setdefault(agent_id, Transfer(agent_id, 0)).credit = share
            self._free -= share

    def credit(self, agent_id: str) -> int:
        """How many frames this agent may have on their way; 0 where it must first ask with its header."""
        transfer = self.transfers.get(agent_id)
        return transfer.credit if transfer else 0

    def offer(self, header: UpdateHeader, agent_id: str, stored: Mapping[int, FrameFacts], now: float) -> Transfer:
        """Take an update's header; `stored` are frames of this very update that are here already.

        The same header again is an agent that asks what is missing. Another update starts the transfer anew.
        """
        transfer = self.transfers[agent_id]
        if transfer.header is None or transfer.header.update_digest != header.update_digest:
            transfer.frames = dict(stored)
            transfer.low = 0
        transfer.header = header
        self._advance(transfer)
        self._reclaim(transfer, now)
        transfer.due_at = now  # its acknowledgement raises the credit
        return transfer

    def verdict(self, agent_id: str, tag: bytes, index: int, num_elements: int) -> Verdict:
        """Whether a frame should be stored."""
        transfer = self.transfers.get(agent_id)
        if transfer is None:
            return Verdict.STALE
        if transfer.header is None:
            return Verdict.UNANNOUNCED
        if content_tag(transfer.header.update_digest) != tag:
            return Verdict.STALE
        if index >= self.framing.num_frames:
            return Verdict.MALFORMED
        start, stop = self.framing.span(index)
        if num_elements != stop - start:
            return Verdict.MALFORMED
        return Verdict.DUPLICATE if index in transfer.frames else Verdict.WANTED

    def store(self, agent_id: str, index: int, facts: FrameFacts, now: float) -> Transfer:
        """A wanted frame is stored."""
        transfer = self.transfers[agent_id]
        transfer.frames[index] = facts
        self._advance(transfer)
        transfer.unacknowledged += 1
        soon = transfer.unacknowledged * 4 >= transfer.credit
        transfer.due_at = min(transfer.due_at, now if soon else now + _ACK_DELAY_S)
        return transfer

    def remind(self, agent_id: str, now: float) -> None:
        """An agent sent what is not wanted: tell it what is missing, though not for each such frame."""
        transfer = self.transfers[agent_id]
        if transfer.due_at == math.inf:
            transfer.due_at = now + _ACK_DELAY_S

    def is_complete(self, agent_id: str) -> bool:
        """Whether the header and every frame are here."""
        transfer = self.transfers[agent_id]
        return transfer.header is not None and len(transfer.frames) == self.framing.num_frames

    def digest(self, agent_id: str) -> str:
        """The digest of what came, to be compared with the header's. The update must be complete."""
        frames = self.transfers[agent_id].frames
        return update_digest(frames[index].body_digest for index in range(self.framing.num_frames))

    def norm(self, agent_id: str) -> float:
        """L2 norm of the delta; not finite if an element is not. The update must be complete."""
        frames = self.transfers[agent_id].frames
        total = sum(frames[index].delta_sum_squares for index in range(self.framing.num_frames))
        return math.sqrt(total) if total >= 0 else math.nan

    def restart(self, agent_id: str, now: float) -> int:
        """Forget all frames of an update whose digest is wrong, ask for them again; returns how often that was done."""
        transfer = self.transfers[agent_id]
        transfer.frames = {}
        transfer.low = 0
        transfer.retries += 1
        transfer.due_at = now
        return transfer.retries

    def end(self, agent_id: str, now: float) -> None:
        """No more of this agent's frames are wanted; its credit goes to those that wait for some."""
        transfer = self.transfers.pop(agent_id, None)
        if transfer is None:
            return
        self._free += transfer.credit
        unused, share = self._free, self._share()
        for waiting in self.transfers.values():
            if unused <= 0:
                return
            if waiting.credit == 0 and waiting.header is not None:
                waiting.due_at = now
                unused -= share

    def acknowledgements(self, now: float) -> list[Acknowledgement]:
        """What is due by `now`; each is returned once."""
        due = [transfer for transfer in self.transfers.values() if transfer.due_at <= now]
        if not due:
            return []
        self._grant(due)
        acknowledgements = []
        for transfer in due:
            transfer.due_at = math.inf
            transfer.unacknowledged = 0
            missing = transfer.missing(self.framing.num_frames)
            is_unannounced = transfer.header is None
            acknowledgements.append(Acknowledgement(transfer.agent_id, missing, transfer.credit, is_unannounced))
        return acknowledgements

    def deadline(self) -> float:
        """When the next acknowledgement is due."""
        return min((transfer.due_at for transfer in self.transfers.values()), default=math.inf)

    def _share(self) -> int:
        """An equal part of all credit, among those that have announced an update."""
        num_announced = sum(1 for transfer in self.transfers.values() if transfer.header is not None)
        return min(max(1, TOTAL_CREDIT // max(1, num_announced)), self.framing.num_frames)

    def _grant(self, transfers: list[Transfer]) -> None:
        """Raise the credit of those that announced an update towards an equal share, as far as there is free credit."""
        below = [transfer for transfer in transfers if transfer.header is not None]
        share = self._share() if below else 0
        for transfer in sorted(below, key=lambda transfer: transfer.credit):
            granted = min(max(0, share - transfer.credit), self._free)
            transfer.credit += granted
            self._free -= granted

    def _reclaim(self, asking: Transfer, now: float) -> None:
        """Where there is too little free credit for one that asks, take it from those that have more than their share."""
        share = self._share()
        wanted = share - asking.credit - self._free
        for transfer in self.transfers.values():
            if wanted <= 0:
                return
            taken = min(transfer.credit - share, wanted)
            if transfer.header is not None and taken > 0:
                transfer.credit -= taken
                transfer.due_at = now
                self._free += taken
                wanted -= taken

    def _advance(self, transfer: Transfer) -> None:
        while transfer.low in transfer.frames:
            transfer.low += 1

    def check(self) -> None:
        """Assert what holds between any two calls."""
        outstanding = sum(transfer.credit for transfer in self.transfers.values())
        assert outstanding + self._free == TOTAL_CREDIT, "credit was lost or made"
        assert self._free >= 0, "more credit than there is"
