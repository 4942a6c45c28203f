"""What is kept of a run on disk: the latest models, the best one, whatever others share, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.models import ModelStore
from coordinator.retention import Retention
from coordinator.spool import Spool
from coordinator.store import Store


class Disk:
    """The state directory of a coordinator, with a run."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.store = Store(directory)
        self.models = ModelStore(directory / "models")
        self.spool = Spool(directory / "spool")
        self.keep = keep
        self.run_id = self.new_run()
        self.restart()

    def restart(self) -> None:
        self.retention = Retention(self.store, self.models, self.spool, self.keep)

    def new_run(self) -> str:
        return self.store.create_run(federation="lab", task="digits", fingerprint="f", definition={}, rounds=9)

    def commit(
        self,
        round_num: int,
        best: int | None = None,
        value: float | None = None,
        run_id: str = "",
        memory: float | None = None,
    ) -> str:
        """Commit a version whose weight is `value`, its number where none is given, and do as the service does."""
        run_id = run_id or self.run_id
        digest = self.models.save_state({"w": np.array([round_num if value is None else value], np.float32)})
        state = None if memory is None else self.models.save_state({"v": np.array([memory], np.float32)})
        self.store.save(run_id, [ev.SaveVersion(round_num, digest, None, server_state=state)])
        self.retention.committed(run_id, round_num, best)
        return digest

    def kept(self, run_id: str = "") -> list[int]:
        """The versions whose files are there."""
        there = self.models.digests()
        return [row["round_num"] for row in self.store.versions(run_id or self.run_id) if row["digest"] in there]

    def states(self) -> list[int]:
        """The versions whose server state is there."""
        there = self.models.digests()
        return [row["round_num"] for row in self.store.versions(self.run_id) if row["server_state"] in there]


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path, keep=3)
    yield made
    made.spool.close()
    made.store.close()


def test_the_latest_are_kept_and_what_is_older_is_deleted(disk):
    for round_num in range(7):
        disk.commit(round_num)
        assert disk.kept() == list(range(max(0, round_num - 2), round_num + 1))


def test_the_best_is_kept_until_there_is_a_better_one(disk):
    for round_num in range(6):
        disk.commit(round_num, best=1)
    assert disk.kept() == [1, 3, 4, 5]
    disk.commit(6, best=5)
    assert disk.kept() == [4, 5, 6]
    for round_num in range(7, 10):
        disk.commit(round_num, best=5)
    assert disk.kept() == [5, 7, 8, 9]


def test_a_better_one_that_is_found_later_lets_the_former_best_go_at_once(disk):
    for round_num in range(6):
        disk.commit(round_num, best=1)
    disk.retention.committed(disk.run_id, 5, 4)
    assert disk.kept() == [3, 4, 5]


def test_a_former_best_among_the_latest_stays_until_it_is_old(disk):
    for round_num in range(4):
        disk.commit(round_num, best=2)
    disk.commit(4, best=4)
    assert disk.kept() == [2, 3, 4]
    disk.commit(5, best=4)
    assert disk.kept() == [3, 4, 5]


def test_after_a_restart_the_best_is_kept_still(disk):
    for round_num in range(5):
        disk.commit(round_num, best=1)
    disk.restart()
    disk.retention.committed(disk.run_id, 4, 1)
    disk.commit(5, best=1)
    assert disk.kept() == [1, 3, 4, 5]


def test_a_version_whose_content_is_the_bests_is_not_deleted_with_its_number(disk):
    # Versions 1 and 4 are equal: training changed nothing but came back. Version 1 is the best.
    values = [0.0, 1.0, 2.0, 3.0, 1.0, 5.0, 6.0, 7.0, 8.0]
    for round_num, value in enumerate(values):
        disk.commit(round_num, best=1 if round_num >= 1 else None, value=value)
    assert 1 in disk.kept()
    assert disk.kept() == [1, 4, 6, 7, 8]


def test_a_version_whose_content_a_later_one_shares_is_kept_with_that(disk):
    values = [0.0, 1.0, 2.0, 1.0, 4.0, 5.0, 6.0, 7.0]
    for round_num, value in enumerate(values):
        disk.commit(round_num, value=value)
        latest = range(max(0, round_num - 2), round_num + 1)
        assert set(latest) <= set(disk.kept())
    assert disk.kept() == [5, 6, 7]


def test_the_same_initial_model_of_another_run_is_kept(disk):
    other = disk.new_run()
    disk.store.save(other, [ev.SaveVersion(0, disk.commit(0, value=0.5), None)])
    for round_num in range(1, 6):
        disk.commit(round_num)
    assert disk.kept(other) == [0]
    assert disk.kept() == [0, 3, 4, 5]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_version_is_kept_for_as_long_as_it_may_still_be_evaluated(tmp_path, keep):
    # While a version is evaluated the next round runs, and two evaluations may be owed.
    disk = Disk(tmp_path, keep)
    for round_num in range(6):
        disk.commit(round_num)
        assert disk.kept() == list(range(max(0, round_num - 2), round_num + 1))
    disk.spool.close()
    disk.store.close()


def test_of_the_spool_only_the_round_at_hand_is_kept_and_other_runs_are_left_alone(disk):
    for run_id in (disk.run_id, "other"):
        for round_num in (1, 2, 3):
            disk.spool.round(run_id, round_num)
    disk.commit(0)
    disk.retention.committed(disk.run_id, 1, None)
    names = sorted(f"{path.parent.name}/{path.stem}" for path in disk.spool.path.glob("*/*.spool"))
    assert names == sorted([f"{disk.run_id}/2", f"{disk.run_id}/3", "other/1", "other/2", "other/3"])


def test_of_the_server_state_only_that_of_the_latest_version_is_kept(disk):
    disk.commit(0)
    for round_num in range(1, 6):
        disk.commit(round_num, best=2, memory=0.5 + round_num)
        assert disk.states() == [round_num]
    assert disk.kept() == [2, 3, 4, 5]
    disk.restart()
    disk.retention.committed(disk.run_id, 5, 2)
    assert disk.states() == [5]


def test_a_server_state_that_stayed_as_it_was_is_kept_with_the_latest_version(disk):
    disk.commit(0)
    disk.commit(1, memory=0.5)
    disk.commit(2, memory=0.5)
    assert disk.states() == [1, 2]
    disk.commit(3, memory=0.75)
    assert disk.states() == [3]


def test_a_server_state_that_another_run_needs_is_kept(disk):
    other = disk.new_run()
    disk.commit(1, memory=0.5, run_id=other)
    disk.commit(0)
    disk.commit(1, memory=0.5)
    disk.commit(2, memory=0.75)
    assert disk.states() == [1, 2]


def test_a_refused_candidate_goes_unless_a_version_has_the_same_content(disk):
    digest = disk.commit(0, memory=5.0)
    state = disk.store.versions(disk.run_id)[0]["server_state"]
    candidate = disk.models.save_state({"w": np.array([9.0], np.float32)})
    disk.retention.refused(candidate, state)
    disk.retention.refused(digest, None)
    assert disk.models.digests() == {digest, state}
