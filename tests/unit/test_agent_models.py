"""Agents' models: the last of each, bounded, exact, and gone when they should be."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from coordinator import agent_models
from coordinator.agent_models import AgentModels
from coordinator.run_events import AcceptedUpdate
from coordinator.spool import Spool
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, run_tag
from midge.wire.layout import Layout, TensorSpec

LAYOUT = Layout((TensorSpec("w", (10,), "float32"), TensorSpec("n", (), "int64")))
FRAMING = Framing(10, 4)


class Disk:
    def __init__(self, directory) -> None:
        self.spool = Spool(directory / "spool")
        self.kept = AgentModels(directory)

    def report(self, round_num: int, agent_id: str, value: float, num_frames: int = 3) -> AcceptedUpdate:
        """An update whose elements are `value`, and whose counter is the round; only its first frames are there."""
        digest = hashlib.sha256(f"{round_num}/{agent_id}".encode()).hexdigest()
        for index in range(num_frames):
            start, stop = FRAMING.span(index)
            body = encode_float32(np.full(stop - start, value, np.float32))
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("r1"),
                round_num=round_num,
                content_tag=content_tag(digest),
                index=index,
                num_elements=stop - start,
                body=body,
            )
            self.spool.round("r1", round_num).append(agent_id, frame, hashlib.sha256(body).digest(), 0.0)
        return AcceptedUpdate(agent_id, 1, digest, 10, (round_num,), 1.0)

    def keep(self, round_num: int, *updates: AcceptedUpdate) -> None:
        self.kept.keep("r1", round_num, LAYOUT, FRAMING, self.spool.round("r1", round_num), updates)

    def values(self) -> dict[str, tuple[int, float, int]]:
        """Round, first element and counter of each agent's model."""
        found = {}
        for agent_id in self.kept.agents("r1"):
            number, model = self.kept.open("r1", agent_id)
            with model:
                state = model.state()
            assert len(set(state["w"].tolist())) == 1
            found[agent_id] = (number, float(state["w"][0]), int(state["n"]))
        return found


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path)
    yield made
    made.spool.close()


def test_the_last_model_of_each_agent_is_kept(disk):
    disk.keep(1, disk.report(1, "pi-1", 0.5), disk.report(1, "pi-2", 0.25))
    disk.keep(2, disk.report(2, "pi-2", 0.125))
    assert disk.values() == {"pi-1": (1, 0.5, 1), "pi-2": (2, 0.125, 2)}
    assert disk.kept.open("r1", "pi-3") is None
    assert disk.kept.open("r2", "pi-1") is None


def test_two_agents_with_the_same_model_have_a_file_each(disk):
    disk.keep(1, disk.report(1, "pi-1", 0.5), disk.report(1, "pi-2", 0.5))
    assert disk.values() == {"pi-1": (1, 0.5, 1), "pi-2": (1, 0.5, 1)}


def test_an_update_whose_frames_are_gone_is_passed_over_and_the_earlier_model_stays(disk):
    disk.keep(1, disk.report(1, "pi-1", 0.5))
    disk.keep(2, disk.report(2, "pi-1", 0.25, num_frames=2))
    assert disk.values() == {"pi-1": (1, 0.5, 1)}


def test_beyond_the_bound_those_that_reported_longest_ago_go_first(disk, monkeypatch):
    monkeypatch.setattr(agent_models, "MAX_AGENTS", 2)
    disk.keep(1, disk.report(1, "pi-1", 1.0), disk.report(1, "pi-2", 1.0))
    disk.keep(2, disk.report(2, "pi-3", 2.0))
    assert list(disk.values()) == ["pi-1", "pi-3"]
    disk.keep(3, disk.report(3, "pi-4", 3.0), disk.report(3, "pi-5", 3.0), disk.report(3, "pi-6", 3.0))
    assert list(disk.values()) == ["pi-4", "pi-5"]


def test_what_belongs_to_other_runs_is_forgotten(disk, tmp_path):
    disk.keep(1, disk.report(1, "pi-1", 0.5))
    disk.kept.forget(but="r1")
    assert list(disk.values()) == ["pi-1"]
    disk.kept.forget(but="r2")
    assert disk.values() == {}
    assert list((tmp_path / "agent-models").iterdir()) == []


def test_only_the_coordinators_user_may_look(disk, tmp_path):
    disk.keep(1, disk.report(1, "pi-1", 0.5))
    assert (tmp_path / "agent-models").stat().st_mode & 0o777 == 0o700
