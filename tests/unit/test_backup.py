"""`coordinator backup`: the copy is sound at whatever moment it is made, and never half of one."""

from __future__ import annotations

import json
import os
import tarfile
import threading

import numpy as np
import pytest

from coordinator.cli import main
from coordinator.models import ModelStore
from coordinator.resume import resume
from coordinator.round import MemberState, RoundState
from coordinator.spool import RoundSpool
from coordinator.store import Store, StoreError
from coordinator.upkeep import backup as backup_file
from coordinator.upkeep.backup import BackupError, WrongTargetError, backup
from coordinator.upkeep.verify import verify
from midge.wire.frames import content_tag
from tests.unit.state_dirs import AGENTS, in_the_midst_of_round_3


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    made = in_the_midst_of_round_3(tmp_path_factory.mktemp("template") / "state")
    made.close()
    return made


@pytest.fixture
def disk(template, tmp_path):
    made = template.copied_to(tmp_path / "state")
    yield made
    made.close()


def names_in(path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()}


def expected_names(disk) -> set[str]:
    models = {f"models/{digest}.safetensors" for digest in disk.digests}
    return {"midge.db", f"spool/{disk.run_id}/3.spool", *models}


def test_a_copy_has_all_that_a_run_needs_to_go_on(disk, tmp_path):
    to = tmp_path / "copy"
    made = backup(disk.path, to)
    assert names_in(to) == expected_names(disk)
    assert (made.runs, made.versions, made.models, made.updates) == (1, 3, 3, 1)
    assert made.standing == {disk.run_id: 2}
    assert made.size_bytes == sum((to / name).stat().st_size for name in names_in(to))
    assert verify(to).findings == []
    store = Store(to)
    here, there = (
        resume(one, ModelStore(path / "models"), disk.run_id) for one, path in ((disk.store, disk.path), (store, to))
    )
    assert here == there
    assert here is not None
    assert [update.agent_id for update in here.accepted] == ["pi-1"]
    store.close()


def add_what_no_version_is(disk) -> set[str]:
    """What a strategy remembers, a base model that no run uses, agents' models; the names of their files."""
    remembered = disk.remember(2.0)
    disk.commit_round_3(server_state=remembered)
    paths = [disk.add_base_model("base", 7.0), disk.keep_agent_model("pi-1", 3), disk.keep_agent_model("pi-2", 2)]
    return {f"models/{remembered}.safetensors", *(str(path.relative_to(disk.path)) for path in paths)}


@pytest.mark.parametrize("ending", ["", ".tar"])
def test_what_strategies_remember_base_models_and_agents_models_are_copied(disk, tmp_path, ending):
    added = add_what_no_version_is(disk)
    to = tmp_path / f"copy{ending}"
    made = backup(disk.path, to)
    if ending:
        with tarfile.open(to) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        to = tmp_path / "unpacked"
    models = {f"models/{digest}.safetensors" for digest in disk.digests}
    assert names_in(to) == {"midge.db", *models, *added}
    assert all((to / name).read_bytes() == (disk.path / name).read_bytes() for name in added)
    assert (made.models, made.agent_models, made.versions) == (6, 2, 4)
    report = verify(to)
    assert (report.findings, report.agent_models) == ([], 2)
    store = Store(to)
    assert [row["name"] for row in store.base_models()] == ["base"]
    resumed = resume(store, ModelStore(to / "models"), disk.run_id)
    assert resumed is not None
    assert f"models/{resumed.version.server_state}.safetensors" in added
    store.close()


def test_a_base_model_is_copied_where_there_was_never_a_run(tmp_path):
    store, models = Store(tmp_path / "state"), ModelStore(tmp_path / "state" / "models")
    digest = models.save_state({"w": np.zeros(10, np.float32)})
    store.add_base_model("base", digest=digest, task="digits", source="seed 0", num_elements=10)
    store.close()
    assert verify(tmp_path / "state").findings == []
    made = backup(tmp_path / "state", tmp_path / "copy")
    assert (made.runs, made.models) == (0, 1)
    assert names_in(tmp_path / "copy") == {"midge.db", f"models/{digest}.safetensors"}
    assert verify(tmp_path / "copy").findings == []


def test_a_base_model_that_is_damaged_is_not_copied(disk, tmp_path):
    path = disk.add_base_model("base", 7.0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackupError, match=f"model {path.stem} is damaged"):
        backup(disk.path, tmp_path / "copy")


def test_an_archive_holds_the_same_as_a_directory(disk, tmp_path):
    backup(disk.path, tmp_path / "copy")
    for name in ("copy.tar", "copy.tar.gz", "copy.tgz"):
        backup(disk.path, tmp_path / name)
        unpacked = tmp_path / f"from-{name}"
        with tarfile.open(tmp_path / name) as archive:
            archive.extractall(unpacked, filter="data")
        assert names_in(unpacked) == expected_names(disk)
        assert verify(unpacked).findings == []
    assert (tmp_path / "copy.tgz").stat().st_size < (tmp_path / "copy.tar").stat().st_size
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == []


def test_a_large_segment_and_a_large_model_are_copied_whole(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(backup_file, "_CHUNK_BYTES", 7)
    backup(disk.path, tmp_path / "copy")
    backup(disk.path, tmp_path / "copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert verify(tmp_path / "copy").findings == []
    assert verify(tmp_path / "unpacked").findings == []


def test_of_a_segment_everything_up_to_the_end_of_its_log_is_copied(disk, tmp_path):
    with disk.segment(3).open("ab") as file:
        file.write(b"MSP1 half a record")
    backup(disk.path, tmp_path / "copy")
    copied = RoundSpool(tmp_path / "copy" / "spool" / disk.run_id / "3.spool")
    assert copied.recovery.truncated_bytes == 0
    assert copied.recovery.num_frames == 4
    assert list(copied.stored("pi-2", content_tag(disk.update_digest(3, "pi-2")))) == [0]
    copied.close()


def test_a_copy_changes_nothing_in_the_original_and_locks_nothing(disk, tmp_path):
    before = {name: (disk.path / name).stat().st_mtime_ns for name in names_in(disk.path) if not name.endswith("-shm")}
    backup(disk.path, tmp_path / "copy")
    after = {name: (disk.path / name).stat().st_mtime_ns for name in names_in(disk.path) if not name.endswith("-shm")}
    assert after == before


# Epochs.


def test_the_first_epoch_in_a_copy_is_far_above_the_originals_and_the_next_follows_it(disk, tmp_path):
    backup(disk.path, tmp_path / "copy")
    original = [disk.store.raise_epoch() for _ in range(5)]
    store = Store(tmp_path / "copy")
    first = store.raise_epoch()
    assert first > original[-1] + 9_000
    assert first < 30_000  # what the protocol takes for an epoch at all: see `MAX_EPOCH_JUMP`
    assert store.raise_epoch() == first + 1
    assert store.raise_epoch(above=first + 100) == first + 101
    store.close()


def test_two_copies_of_one_backup_do_not_get_the_same_epoch(disk, tmp_path, monkeypatch):
    epochs = set()
    for chance in (3, 5):
        monkeypatch.setattr("secrets.randbelow", lambda _, chance=chance: chance)
        backup(disk.path, tmp_path / f"copy-{chance}")
        store = Store(tmp_path / f"copy-{chance}")
        epochs.add(store.raise_epoch())
        store.close()
    assert len(epochs) == 2


# While a coordinator works.


def test_a_copy_that_is_made_while_rounds_are_committed_is_sound_each_time(disk, tmp_path):
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            round_num = len(disk.digests)
            there = {update.agent_id for update in disk.store.updates(disk.run_id, round_num)}
            for agent_id in set(AGENTS) - there:
                disk.accept(round_num, agent_id)
            disk.add_version(disk.store.updates(disk.run_id, round_num))
            disk.spool.prune(disk.run_id, round_num + 1)
            disk.models.delete(disk.digests[round_num - 3])
            members = dict.fromkeys(AGENTS, MemberState.INVITED)
            disk.save(disk.attempt(round_num + 1, RoundState.COLLECTING, members))
            stop.wait(0.02)  # a round in no time at all would leave no model long enough to be opened

    worker = threading.Thread(target=work)
    worker.start()
    try:
        number = 0
        while number < 10 or len(disk.digests) < 8:
            assert worker.is_alive()
            backup(disk.path, tmp_path / f"copy-{number}")
            number += 1
    finally:
        stop.set()
        worker.join()
    for index in range(number):
        assert verify(tmp_path / f"copy-{index}").findings == []


def commit_round_3(disk) -> None:
    disk.accept(3, "pi-2")
    disk.add_version(disk.store.updates(disk.run_id, 3))
    disk.spool.prune(disk.run_id, 4)
    disk.model(0).unlink()


def test_a_round_that_commits_once_all_was_opened_changes_nothing_in_the_copy(disk, tmp_path, monkeypatch):
    opened = backup_file._open_all

    def then_commit(*arguments):
        held = opened(*arguments)
        commit_round_3(disk)
        return held

    monkeypatch.setattr(backup_file, "_open_all", then_commit)
    made = backup(disk.path, tmp_path / "copy")
    assert (made.standing, made.updates) == ({disk.run_id: 2}, 1)
    assert verify(tmp_path / "copy").findings == []
    assert names_in(tmp_path / "copy") == expected_names(disk) - {f"models/{disk.digests[3]}.safetensors"}


def test_a_round_that_commits_before_all_was_opened_makes_it_begin_again(disk, tmp_path, monkeypatch):
    opened, tries = backup_file._open_all, []

    def commit_first(*arguments):
        tries.append(arguments)
        if len(tries) == 1:
            commit_round_3(disk)
        return opened(*arguments)

    monkeypatch.setattr(backup_file, "_open_all", commit_first)
    made = backup(disk.path, tmp_path / "copy")
    assert len(tries) == 2
    assert made.standing == {disk.run_id: 3}
    assert verify(tmp_path / "copy").findings == []


# What cannot be done.


def test_what_is_there_already_is_never_written_over(disk, tmp_path):
    for name in ("copy", "copy.tar"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
        with pytest.raises(WrongTargetError, match="is there already: name a new directory or archive"):
            backup(disk.path, tmp_path / name)
        assert names_in(tmp_path / name) == {"mine"}
    (tmp_path / "empty").mkdir()
    backup(disk.path, tmp_path / "empty")
    assert verify(tmp_path / "empty").findings == []
    with pytest.raises(WrongTargetError, match="is not there: make it first"):
        backup(disk.path, tmp_path / "no" / "where")


def test_a_damaged_model_is_not_copied_and_nothing_is_left(disk, tmp_path):
    content = bytearray(disk.model(2).read_bytes())
    content[-1] ^= 1
    disk.model(2).write_bytes(content)
    for name in ("copy", "copy.tar"):
        with pytest.raises(BackupError, match="is damaged"):
            backup(disk.path, tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_model_that_is_missing_for_good_is_said_to_be(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(backup_file, "_PAUSE_S", 0.0)
    disk.model(2).unlink()
    with pytest.raises(BackupError, match=f"{disk.digests[2]}.safetensors is not there, though the database names it"):
        backup(disk.path, tmp_path / "copy")
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_directory_without_a_database_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(StoreError, match=r"holds no midge.db"):
        backup(tmp_path / "state", tmp_path / "copy")
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_full_disk_leaves_nothing_behind(disk, tmp_path, monkeypatch):
    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        backup(disk.path, tmp_path / "copy")
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_a_backup_that_was_killed_is_in_the_way_of_none(disk, tmp_path):
    (tmp_path / ".copy.partial").mkdir()
    (tmp_path / ".copy.partial" / "midge.db").write_bytes(b"half")
    backup(disk.path, tmp_path / "copy")
    assert verify(tmp_path / "copy").findings == []
    assert not (tmp_path / ".copy.partial").exists()


# The command.


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["backup", *arguments], prog_name="coordinator")
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_says_what_is_in_the_copy(disk, capsys, tmp_path):
    code, out, _ = call(capsys, str(disk.path), "--to", str(tmp_path / "copy"))
    assert code == 0
    assert f"{tmp_path / 'copy'}: 1 run, 3 models, 1 accepted update, " in out
    assert f"run {disk.run_id} as it was in round 3" in out
    code, out, _ = call(capsys, str(disk.path), "--to", str(tmp_path / "copy.tar"), "--json")
    assert (code, json.loads(out)["standing"]) == (0, {disk.run_id: 2})


def test_the_command_exits_with_2_for_wrong_use_and_with_1_where_there_is_no_backup(disk, capsys, tmp_path):
    code, _, err = call(capsys, str(disk.path), "--to", str(disk.path))
    assert (code, "is there already" in err) == (2, True)
    code, _, err = call(capsys, str(tmp_path / "nowhere"), "--to", str(tmp_path / "copy"))
    assert (code, "holds no midge.db" in err) == (2, True)
    content = disk.model(2).read_bytes()
    disk.model(2).write_bytes(content[:-1])
    code, _, err = call(capsys, str(disk.path), "--to", str(tmp_path / "copy"))
    assert (code, "is damaged" in err) == (1, True)
