"""Restart is replay: what is on disk of a run comes back as its machine wants it, in each state that a kill may leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.models import ModelError, ModelStore
from coordinator.resume import lately_stored, resume, unfinished
from coordinator.round import MemberState, RoundState
from coordinator.run import Resumed, Version
from coordinator.store import Store
from midge.wire.frames import Framing, plan_framing
from midge.wire.messages import Evaluation
from tests.machines import Talk, digest

SCORE = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75})
MEMBERS = {"a": MemberState.REPORTED, "b": MemberState.INVITED}


class Disk:
    """The state directory of a run of a model with ten weights."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(directory)
        self.models = ModelStore(directory / "models")
        self.run_id = self.store.create_run(federation="lab", task="digits", fingerprint="f", definition={}, rounds=3)
        self.store.set_framing(self.run_id, 4, 3)

    def version(self, round_num: int, *, evaluated: bool = True) -> str:
        made = self.models.save_state({"w": np.full(10, round_num, np.float32)})
        saves: list[ev.Save] = [ev.SaveVersion(round_num, made, None)]
        if evaluated:
            saves.append(ev.SaveEvaluation(round_num, "central", SCORE))
        self.store.save(self.run_id, saves)
        return made

    def attempt(self, number: int, state: RoundState, round_num: int = 1) -> None:
        self.store.save(self.run_id, [ev.SaveAttempt(round_num, number, state, "", MEMBERS)])

    def resumed(self) -> Resumed | None:
        return resume(self.store, self.models, self.run_id)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path)
    yield made
    made.store.close()


def test_runs_that_could_go_on_are_those_of_the_federation_that_are_not_over(disk):
    def add(federation: str = "lab", state: str = "stopped") -> str:
        run_id = disk.store.create_run(federation=federation, task="digits", fingerprint="g", definition={}, rounds=3)
        disk.store.save(run_id, [ev.SaveRun(state, "", 0, None, None)])
        return run_id

    other = add()
    for state in ("done", "failed"):
        add(state=state)
    add(federation="elsewhere")
    rows = disk.store.runs()
    assert [row["run_id"] for row in unfinished(rows, "lab", but=None)] == [other, disk.run_id]
    assert [row["run_id"] for row in unfinished(rows, "lab", but=other)] == [disk.run_id]


def test_a_run_without_a_model_begins_anew(disk):
    assert disk.resumed() is None
    assert resume(disk.store, disk.models, "no-such-run") is None


def test_a_run_that_had_its_model_and_no_round_goes_on_with_its_framing(disk):
    made = disk.version(0)
    resumed = disk.resumed()
    assert resumed is not None
    assert resumed.version == Version(0, made)
    assert resumed.framing == Framing(10, 4)
    assert resumed.layout.num_elements == 10
    assert (resumed.attempt, resumed.round_state, resumed.members) == (0, RoundState.ABANDONED, {})
    assert (list(resumed.accepted), list(resumed.unevaluated), resumed.best) == ([], [], None)


def test_a_model_that_was_never_cut_is_cut_as_a_new_one_would_be(disk):
    disk.store.set_framing(disk.run_id, 0, 0)
    disk.version(0)
    assert disk.resumed().framing == plan_framing(10)


@pytest.mark.parametrize(
    "state", [RoundState.SELECTING, RoundState.COLLECTING, RoundState.AGGREGATING, RoundState.ABANDONED]
)
def test_an_attempt_comes_back_as_it_stood_with_its_accepted_updates(disk, state):
    disk.version(0)
    disk.attempt(1, RoundState.ABANDONED)
    disk.attempt(2, state)
    update = ev.AcceptedUpdate("a", 1, digest("a"), 10, (), 1.0, 0.5, {"loss": 1.0}, SCORE)
    disk.store.save(disk.run_id, [ev.SaveUpdate(1, update)])
    resumed = disk.resumed()
    assert (resumed.attempt, resumed.round_state, resumed.members) == (2, state, MEMBERS)
    assert resumed.accepted == [update]


def test_a_round_that_was_committed_is_over_and_the_next_has_not_begun(disk):
    disk.version(0)
    update = ev.AcceptedUpdate("a", 1, digest("a"), 10, (), 1.0)
    disk.store.save(disk.run_id, [ev.SaveUpdate(1, update)])
    disk.attempt(1, RoundState.COMMITTED)
    made = disk.version(1)
    resumed = disk.resumed()
    assert resumed.version == Version(1, made)
    assert (resumed.attempt, resumed.round_state, resumed.members) == (0, RoundState.ABANDONED, {})
    assert resumed.accepted == []


def test_evaluations_that_are_owed_are_at_most_two_and_of_the_latest(disk):
    digests = [disk.version(round_num, evaluated=round_num == 3) for round_num in range(4)]
    assert list(disk.resumed().unevaluated) == [Version(2, digests[2])]
    digests.append(disk.version(4, evaluated=False))
    assert list(disk.resumed().unevaluated) == [Version(4, digests[4])]
    digests.append(disk.version(5, evaluated=False))
    assert list(disk.resumed().unevaluated) == [Version(4, digests[4]), Version(5, digests[5])]


def test_the_best_and_the_counts_come_back(disk):
    disk.version(0)
    disk.store.save(disk.run_id, [ev.SaveRun("in_round", "", 0, 0, 0.75), ev.SaveTallies({("received", ""): 4})])
    resumed = disk.resumed()
    assert resumed.best == (0, 0.75)
    assert resumed.tallies == {("received", ""): 4}


def test_a_best_value_of_zero_is_a_best_value(disk):
    disk.version(0)
    disk.store.save(disk.run_id, [ev.SaveRun("in_round", "", 0, 0, 0.0)])
    assert disk.resumed().best == (0, 0.0)


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_last_model_that_is_missing_or_damaged_is_an_error_that_names_it(disk, damage):
    disk.version(0)
    made = disk.version(1)
    path = disk.models.path / f"{made}.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=made):
        disk.resumed()


def test_whatever_was_saved_last_a_machine_resumes_with_every_accepted_update(disk):
    talk = Talk()
    disk.version(0)
    for stretch in (talk.to_collecting, lambda: talk.update("a"), lambda: talk.update("b")):
        saves = [command for command in stretch() if isinstance(command, ev.SAVES)]
        disk.store.save(disk.run_id, saves)
        again = Talk(resumed=disk.resumed(), connected=False)
        assert again.run.accepted == talk.run.accepted
        assert again.run.attempt is not None
        assert again.run.attempt.round.members.keys() == talk.run.attempt.round.members.keys()
    assert set(talk.run.accepted) == {"a", "b"}


def test_the_server_state_of_the_last_version_comes_back_with_it(disk):
    made = disk.models.save_state({"w": np.ones(10, np.float32)})
    state = disk.models.save_state({"v": np.full(10, 0.5, np.float32)})
    disk.version(0)
    disk.store.save(disk.run_id, [ev.SaveVersion(1, made, None, server_state=state)])
    assert disk.resumed().version == Version(1, made, state)
    path = disk.models.path / f"{state}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelError, match=state):
        disk.resumed()


def test_what_a_write_stored_that_failed_is_found_to_be_told_to_others(disk):
    assert lately_stored(disk.store, disk.run_id) == []
    digests = [disk.version(round_num, evaluated=round_num < 2) for round_num in range(3)]
    updates = [
        ev.AcceptedUpdate(agent_id, 1, digest(agent_id), 10, (), 1.0, 2.0, {"loss": 0.5}) for agent_id in ("a", "b")
    ]
    disk.store.save(disk.run_id, [ev.SaveUpdate(2, updates[0]), ev.SaveUpdate(3, updates[1])])
    assert lately_stored(disk.store, disk.run_id) == [
        ev.SaveVersion(2, digests[2], None),
        ev.SaveEvaluation(1, "central", SCORE),
        ev.SaveUpdate(2, updates[0]),
        ev.SaveUpdate(3, updates[1]),
    ]
