"""State directories as a coordinator leaves them, made without one: a run of three rounds, stopped in the midst of round 3.

The model has ten elements in frames of four. In round 3, `pi-1` has reported, and of `pi-2` one of three frames came.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coordinator import run_events as ev
from coordinator.models import ModelStore
from coordinator.round import MemberState, RoundState
from coordinator.spool import Spool
from coordinator.store import Store
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import content_tag, encode_frame, run_tag, update_digest

AGENTS = ("pi-1", "pi-2")
FRAME_ELEMENTS = 4
SPANS = ((0, 4), (4, 8), (8, 10))
EXAMPLES = 10


def bodies(round_num: int, agent_id: str) -> list[bytes]:
    """The frames' bodies of an agent's update."""
    seed = int.from_bytes(hashlib.sha256(f"{round_num}/{agent_id}".encode()).digest()[:4], "big")
    elements = np.random.default_rng(seed).standard_normal(10).astype(np.float32)
    return [encode_float32(elements[start:stop]) for start, stop in SPANS]


class StateDir:
    """A directory in the making.

    Args:
        path: of the directory.
        quorum: of the run.
    """

    def __init__(self, path: Path, quorum: int = 1) -> None:
        self.path = path
        self.store = Store(path)
        self.models = ModelStore(path / "models")
        self.spool = Spool(path / "spool")
        self.store.raise_epoch()
        definition = {"quorum": quorum, "task": "digits"}
        self.run_id = self.store.create_run(
            federation="lab", task="digits", fingerprint="f", definition=definition, rounds=3
        )
        self.store.set_framing(self.run_id, FRAME_ELEMENTS, len(SPANS))
        self.digests: list[str] = []
        self.num_accepted = 0
        self.add_version(None)

    def copied_to(self, path: Path) -> StateDir:
        """A copy, open: cheaper than another one, since nothing is synced."""
        shutil.copytree(self.path, path)
        copy = object.__new__(StateDir)
        copy.path, copy.run_id, copy.num_accepted = path, self.run_id, self.num_accepted
        copy.digests = list(self.digests)
        copy.store = Store(path)
        copy.models = ModelStore(path / "models")
        copy.spool = Spool(path / "spool")
        return copy

    def save(self, *saves: ev.Save) -> None:
        self.store.save(self.run_id, saves)

    def add_version(self, updates: Sequence[ev.AcceptedUpdate] | None, *, server_state: str | None = None) -> None:
        """Commit the next version; the first where `updates` is None."""
        round_num = len(self.digests)
        digest = self.models.save_state({"w": np.full(10, round_num, np.float32)})
        parent = self.digests[-1] if self.digests else None
        self.digests.append(digest)
        counted = updates or ()
        saves: list[ev.Save] = [
            ev.SaveVersion(
                round_num,
                digest,
                parent,
                len(counted),
                sum(update.num_examples for update in counted),
                attempts=0 if updates is None else 1,
                server_state=server_state,
            ),
            ev.SaveRun("in_round", "", round_num, None, None),
        ]
        if updates is not None:
            saves.append(self.attempt(round_num, RoundState.COMMITTED, dict.fromkeys(AGENTS, MemberState.REPORTED)))
        self.save(*saves)

    def attempt(self, round_num: int, state: RoundState, members: dict[str, MemberState]) -> ev.SaveAttempt:
        return ev.SaveAttempt(round_num, 1, state, "", members)

    def accept(self, round_num: int, agent_id: str) -> ev.AcceptedUpdate:
        """Store an update whole, and save that it counts."""
        self.store_frames(round_num, agent_id, range(len(SPANS)))
        self.spool.round(self.run_id, round_num).sync()
        update = ev.AcceptedUpdate(agent_id, 1, self.update_digest(round_num, agent_id), EXAMPLES, (), 1.0)
        self.num_accepted += 1
        tallies = {("received", ""): self.num_accepted, ("accepted", ""): self.num_accepted}
        self.save(ev.SaveUpdate(round_num, update), ev.SaveTallies(tallies))
        return update

    def update_digest(self, round_num: int, agent_id: str) -> str:
        return update_digest(hashlib.sha256(body).digest() for body in bodies(round_num, agent_id))

    def store_frames(self, round_num: int, agent_id: str, indices: Sequence[int]) -> None:
        segment = self.spool.round(self.run_id, round_num)
        tag = content_tag(self.update_digest(round_num, agent_id))
        for index in indices:
            body = bodies(round_num, agent_id)[index]
            encoded = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag(self.run_id),
                round_num=round_num,
                index=index,
                num_elements=len(body) // 4,
                content_tag=tag,
                body=body,
            )
            segment.append(agent_id, encoded, hashlib.sha256(body).digest(), 1.0)

    def remember(self, value: float) -> str:
        """Store what a strategy remembers, as `server_state.py` does; its digest."""
        return self.models.save_state({"server_state.m": np.full(10, value, np.float32)})

    def commit_round_3(self, *, server_state: str | None = None) -> None:
        """As the run's last round is committed, but for its end; nothing is deleted."""
        updates = [self.accept(3, "pi-2"), *self.store.updates(self.run_id, 3)[:1]]
        self.add_version(updates, server_state=server_state)
        self.spool.prune(self.run_id, 4)

    def add_base_model(self, name: str, value: float) -> Path:
        """Register a model that no run uses; its file."""
        digest = self.models.save_state({"w": np.full(10, value, np.float32)})
        self.store.add_base_model(name, digest=digest, task="digits", source="seed 7", num_elements=10)
        return self.path / "models" / f"{digest}.safetensors"

    def keep_agent_model(self, agent_id: str, round_num: int, run_id: str = "") -> Path:
        """Keep an agent's model, as `AgentModels` does; its file."""
        models = ModelStore(self.path / "agent-models" / (run_id or self.run_id))
        digest = models.save_state({"w": np.full(10, round_num, np.float32)})
        path = models.path / f"{agent_id}.{round_num}.safetensors"
        (models.path / f"{digest}.safetensors").replace(path)
        return path

    def segment(self, round_num: int) -> Path:
        return self.path / "spool" / self.run_id / f"{round_num}.spool"

    def model(self, round_num: int) -> Path:
        return self.path / "models" / f"{self.digests[round_num]}.safetensors"

    def close(self) -> None:
        self.spool.close()
        self.store.close()


def in_the_midst_of_round_3(path: Path, **options: int) -> StateDir:
    """The directory, open."""
    made = StateDir(path, **options)
    for round_num in (1, 2):
        made.add_version([made.accept(round_num, agent_id) for agent_id in AGENTS])
        made.spool.prune(made.run_id, round_num + 1)
    members = {"pi-1": MemberState.INVITED, "pi-2": MemberState.INVITED}
    made.save(made.attempt(3, RoundState.COLLECTING, members))
    made.accept(3, "pi-1")
    members["pi-1"] = MemberState.REPORTED
    made.save(made.attempt(3, RoundState.COLLECTING, members))
    made.store_frames(3, "pi-2", range(1))
    return made
