"""The coordinator's state directory in memory: what outlives its process. Store, spool and models are as the driver wants
them, and as `coordinator.resume` and `coordinator.retention` read them.

Every operation calls `tick` before and after, where a test may kill the process, and every write is one to a `Disk`, which may
fail. What the store saved is durable at once; what the spool was given is durable once it was synced: `MemorySpool.lose_power`
takes away some of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from coordinator import run_events as ev
from coordinator.quarantine import Strike
from coordinator.round import MemberState, RoundState
from coordinator.store import KEPT_ROUNDS, AgentLeft, AgentRow
from coordinator.uplink import FrameFacts
from midge.wire.frames import Frame, content_tag
from tests.sim.disk import Disk
from tests.sim.learning import Model

PRUNED_EVERY = 20
"""Rounds between two prunings of the store; the real one prunes at each."""


class MemoryStore:
    """The database of one run."""

    def __init__(
        self,
        tick: Callable[[], None],
        disk: Disk,
        saved: Callable[[ev.Save], None] | None,
        raised: Callable[[int], None],
    ) -> None:
        self.epoch = 0
        self.row: dict[str, Any] = {"state": "preparing", "frame_elements": 0, "best_round": None, "best_value": None}
        self.version_rows: list[dict[str, Any]] = []
        self.attempt_rows: dict[tuple[int, int], tuple[RoundState, dict[str, MemberState]]] = {}
        self.update_rows: dict[tuple[int, str], ev.AcceptedUpdate] = {}
        self.strike_rows: dict[tuple[int, int, str], Strike] = {}
        self.tally_rows: dict[tuple[str, str], int] = {}
        self.agent_rows: dict[str, AgentRow] = {}
        self._tick = tick
        self._disk = disk
        self._saved = saved
        self._raised = raised

    # As the driver writes it.

    def raise_epoch(self, above: int = 0) -> int:
        """See `coordinator.store.Store`; so do all that follow."""
        self._tick()
        with self._disk.write():
            self.epoch = max(self.epoch, above) + 1
            self._raised(self.epoch)
        self._tick()
        return self.epoch

    def probe(self) -> None:
        self._tick()
        with self._disk.write():
            pass

    def set_framing(self, frame_elements: int) -> None:
        self._tick()
        with self._disk.write():
            self.row["frame_elements"] = frame_elements
        self._tick()

    def save(self, run_id: str, saves: Iterable[ev.Save], agents: Iterable[AgentRow | AgentLeft]) -> None:
        self._tick()
        with self._disk.write():
            for save in saves:
                self._save(save)
                if self._saved is not None:
                    self._saved(save)
            for agent in agents:
                if isinstance(agent, AgentRow):
                    self.agent_rows[agent.agent_id] = agent
                elif agent.agent_id in self.agent_rows:
                    self.agent_rows[agent.agent_id] = msgspec.structs.replace(
                        self.agent_rows[agent.agent_id], state="offline"
                    )
        self._tick()

    def _save(self, save: ev.Save) -> None:
        match save:
            case ev.SaveRun():
                self.row |= {"state": save.state, "best_round": save.best_round, "best_value": save.best_value}
                self.row["reason"] = save.reason
            case ev.SaveAttempt():
                self.attempt_rows[save.round_num, save.attempt] = (save.state, dict(save.members))
            case ev.SaveUpdate(round_num, update):
                self.update_rows[round_num, update.agent_id] = update
            case ev.SaveVersion():
                row = {"round_num": save.round_num, "digest": save.digest, "parent": save.parent, "server_state": None}
                self.version_rows.append(row | {"central": None, "federated": None})
                if save.round_num % PRUNED_EVERY == 0:
                    self._prune(save.round_num - KEPT_ROUNDS + 1)
            case ev.SaveEvaluation(round_num, source, score):
                self.version_rows[round_num][source] = score
            case ev.SaveStrike(strike):
                self.strike_rows[strike.round_num, strike.attempt, strike.agent_id] = strike
            case ev.SaveTallies(tallies):
                self.tally_rows |= tallies

    def _prune(self, first: int) -> None:
        self.update_rows = {key: row for key, row in self.update_rows.items() if key[0] >= first}
        self.attempt_rows = {key: row for key, row in self.attempt_rows.items() if key[0] >= first}

    # As `resume` and `Retention` read it.

    def run(self, run_id: str) -> dict[str, Any]:
        return self.row

    def versions(self, run_id: str) -> list[dict[str, Any]]:
        return self.version_rows

    def last_attempt(self, run_id: str, round_num: int) -> tuple[int, RoundState, dict[str, MemberState]] | None:
        numbers = [attempt for number, attempt in self.attempt_rows if number == round_num]
        return (max(numbers), *self.attempt_rows[round_num, max(numbers)]) if numbers else None

    def updates(self, run_id: str, round_num: int) -> list[ev.AcceptedUpdate]:
        return [row for (number, _), row in sorted(self.update_rows.items()) if number == round_num]

    def tallies(self, run_id: str) -> dict[tuple[str, str], int]:
        return dict(self.tally_rows)

    def strikes(self, run_id: str) -> list[Strike]:
        return [strike for _, strike in sorted(self.strike_rows.items())]

    def lone_digest(self, run_id: str, round_num: int, *, kept_from: int, of: str = "digest") -> str | None:
        digest = self.version_rows[round_num][of] if 0 <= round_num < len(self.version_rows) else None
        shared = any(row[of] == digest for row in self.version_rows[max(0, kept_from) :])
        return None if shared else digest


_Key = tuple[int, str, bytes]


class MemorySpool:
    """The frames of the rounds at hand."""

    def __init__(self, tick: Callable[[], None], disk: Disk) -> None:
        self._tick = tick
        self._disk = disk
        self._is_doubtful = False
        self._frames: dict[_Key, dict[int, tuple[FrameFacts, bytes]]] = {}
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return sum(map(len, self._frames.values()))

    # As the driver uses it.

    def store(self, round_num: int, agent_id: str, payload: bytes, frame: Frame, facts: FrameFacts) -> None:
        """See `coordinator.driver.SpoolLike`; so do all that follow."""
        self._tick()
        frames = self._frames.setdefault((round_num, agent_id, bytes(frame.content_tag)), {})
        if frame.index not in frames:
            with self._disk.write():
                frames[frame.index] = (facts, bytes(frame.body))
                self._undo.append(lambda: frames.pop(frame.index, None) and None)

    def stored(self, round_num: int, agent_id: str, tag: bytes) -> Mapping[int, FrameFacts]:
        return {index: facts for index, (facts, _) in self._frames.get((round_num, agent_id, tag), {}).items()}

    def forget(self, round_num: int, agent_id: str, tag: bytes) -> None:
        self._tick()
        forgotten = self._frames.get((round_num, agent_id, tag))
        if forgotten is not None:
            with self._disk.write():
                del self._frames[round_num, agent_id, tag]
                self._undo.append(lambda: self._frames.update({(round_num, agent_id, tag): forgotten}))

    def sync(self) -> None:
        self._tick()
        assert not self._is_doubtful, "synced again after a sync that failed, without opening it again"
        try:
            with self._disk.write():
                pass
        except OSError:
            self._is_doubtful = True
            raise
        self._undo.clear()
        self._tick()

    def reopen(self) -> None:
        self._tick()
        if self._is_doubtful:
            with self._disk.write():
                self.lose_power(0)
            self._is_doubtful = False

    # As the simulation does.

    def prune(self, run_id: str, keep_from_round: int) -> None:
        """Forget earlier rounds."""
        self._frames = {key: frames for key, frames in self._frames.items() if key[0] >= keep_from_round}
        self._undo.clear()

    def elements(self, round_num: int, update: ev.AcceptedUpdate, num_frames: int) -> np.ndarray[Any, Any]:
        """The elements of an update whose frames are all there."""
        frames = self._frames[round_num, update.agent_id, content_tag(update.update_digest)]
        return np.frombuffer(b"".join(frames[index][1] for index in range(num_frames)), "<f4")

    def lose_power(self, num_kept: int) -> None:
        """Of what was not synced, only the first `num_kept` operations were done."""
        for undo in reversed(self._undo[num_kept:]):
            undo()
        self._undo.clear()

    def restarted(self) -> None:
        """Another process opens it."""
        self._is_doubtful = False


class MemoryModels:
    """The models by digest."""

    def __init__(self, disk: Disk, check: Callable[[Model], None]) -> None:
        self._models: dict[str, Model] = {}
        self._disk = disk
        self._check = check

    def __len__(self) -> int:
        return len(self._models)

    def save(self, model: Model) -> str:
        """Keep a model."""
        self._check(model)
        with self._disk.write():
            self._models[model.digest] = model
        return model.digest

    def open(self, digest: str) -> Model:
        """See `coordinator.models.ModelStore`."""
        return self._models[digest]

    def verify(self, digest: str) -> None:
        """See `coordinator.models.ModelStore`: memory does not decay."""
        assert digest in self._models

    def delete(self, digest: str) -> None:
        """See `coordinator.models.ModelStore`."""
        self._models.pop(digest, None)
