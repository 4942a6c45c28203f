"""`coordinator verify`: every kind of damage is seen, named, and nothing sound is called damaged; a repair loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.cli import main
from coordinator.models import ModelStore
from coordinator.round import MemberState, RoundState
from coordinator.state_dir import InUseError, is_in_use, lock
from coordinator.upkeep.findings import Report
from coordinator.upkeep.verify import Verifier, WrongDirectoryError, repair, verify
from midge.wire.layout import Layout, TensorSpec
from tests.unit.state_dirs import StateDir, in_the_midst_of_round_3


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


def told(report: Report) -> list[tuple[str, str]]:
    return [(finding.severity, finding.where) for finding in report.findings]


def change(disk: StateDir, statement: str, *values: object) -> None:
    """Write to the database as no coordinator does."""
    with closing(sqlite3.connect(disk.path / "midge.db")) as connection:
        done = connection.execute(statement, values)
        assert done.rowcount > 0
        connection.commit()


def flip(path, offset: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def contents(path) -> dict[str, bytes]:
    """All files but SQLite's own notes on who reads."""
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file() and not each.name.endswith("-shm")
    }


def test_a_sound_directory_is_sound_and_stays_as_it_is(disk):
    before = contents(disk.path)
    report = verify(disk.path)
    assert (report.findings, report.is_sound, report.is_running) == ([], True, False)
    assert (report.runs, report.versions, report.models, report.updates) == (1, 3, 3, 1)
    assert contents(disk.path) == before


def test_a_finished_run_is_sound_too(disk):
    disk.add_version([disk.accept(3, "pi-2"), *disk.store.updates(disk.run_id, 3)[:1]])
    disk.save(ev.SaveRun("done", "", 3, 0, 0.5))
    disk.spool.prune(disk.run_id, 4)
    assert verify(disk.path).findings == []


# The files.


def test_a_model_that_is_missing_is_damage_only_where_it_is_needed(disk):
    disk.model(2).unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.where) == ("damage", f"models/{disk.digests[2]}.safetensors")
    assert finding.what == f"it is not there: {disk.run_id} needs it"


def test_versions_before_the_last_three_may_be_gone_unless_one_is_the_best(disk):
    disk.add_version([disk.accept(3, "pi-2"), *disk.store.updates(disk.run_id, 3)[:1]])
    disk.spool.prune(disk.run_id, 4)
    disk.model(0).unlink()
    assert verify(disk.path).findings == []
    disk.save(ev.SaveRun("in_round", "", 3, 0, 0.5))
    assert told(verify(disk.path)) == [("damage", f"models/{disk.digests[0]}.safetensors")]


@pytest.mark.parametrize("offset", [0, 20, -1])
def test_a_bit_of_a_model_that_flipped_is_damage(disk, offset):
    flip(disk.model(1), offset)
    assert told(verify(disk.path)) == [("damage", f"models/{disk.digests[1]}.safetensors")]


def test_a_model_cut_short_or_empty_is_damage(disk):
    for round_num, size_bytes in ((1, 0), (2, 100)):
        with disk.model(round_num).open("r+b") as file:
            file.truncate(size_bytes)
    assert [severity for severity, _ in told(verify(disk.path))] == ["damage", "damage"]


def test_a_model_that_is_not_finite_is_damage(disk):
    digest = disk.models.save_state({"w": np.full(10, np.nan, np.float32)})
    change(disk, "update versions set digest = ? where round_num = 2", digest)
    disk.model(2).unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.what) == ("damage", "elements 0 to 262144 are not all finite")


def test_a_model_of_another_layout_is_damage(disk):
    digest = disk.models.save_state({"v": np.zeros(10, np.float32)})
    change(disk, "update versions set digest = ? where round_num = 2", digest)
    disk.model(2).unlink()
    (finding,) = verify(disk.path).findings
    assert finding.where == f"{disk.run_id}, version 2"
    assert finding.what.startswith("I4: layout ")


def test_a_frame_of_an_accepted_update_that_was_damaged_is_damage(disk):
    body = disk.segment(3).read_bytes().index(b"pi-1") + 8 + 40
    flip(disk.segment(3), body)
    report = verify(disk.path)
    where = f"spool/{disk.run_id}/3.spool"
    assert told(report) == [("damage", f"{where}, pi-1"), ("note", where)]
    assert report.findings[0].what == "1 of the 3 frames of this accepted update are missing or damaged"


def test_a_damaged_frame_of_an_update_on_its_way_is_worth_a_note(disk):
    disk.spool.close()
    body = disk.segment(3).read_bytes().index(b"pi-2") + 8 + 40
    flip(disk.segment(3), body)
    report = verify(disk.path)
    assert (told(report), report.is_sound) == ([("note", f"spool/{disk.run_id}/3.spool")], True)


def test_a_segment_without_the_updates_that_count_is_damage(disk):
    disk.segment(3).unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.where) == ("damage", f"spool/{disk.run_id}/3.spool")
    assert finding.what == "it is not there; it held the updates of pi-1"


def test_a_torn_end_of_the_log_is_no_damage(disk):
    with disk.segment(3).open("ab") as file:
        file.write(b"MSP1 and half a record")
    assert verify(disk.path).findings == []


def test_an_update_stored_under_another_digest_than_it_was_accepted_by_is_damage(disk):
    other = disk.update_digest(3, "pi-1")[:16] + "0" * 48  # of the same content tag
    change(disk, "update updates set update_digest = ? where round_num = 3", other)
    (finding,) = verify(disk.path).findings
    assert "its frames add up to" in finding.what


# The database.


@pytest.mark.parametrize(
    ("statement", "where", "words"),
    [
        ("update versions set round_num = 5 where round_num = 2", "version 5", "I1: follows version 1"),
        ("update versions set parent = null where round_num = 2", "version 2", "I1: parent none"),
        ("update versions set parent = digest where round_num = 0", "version 0", "expected none"),
        ("update versions set num_updates = 0 where round_num = 1", "version 1", "I5: made of 0 updates, quorum is 1"),
        ("update versions set num_examples = 7 where round_num = 1", "version 1", "had 20 examples, it says 7"),
        ("delete from attempts where round_num = 2", "version 2", "no attempt is stored that committed it"),
        ("update attempts set state = 'abandoned' where round_num = 1", "round 1", "I1: 0 committed attempts"),
        (
            "update attempts set attempt = 2 where round_num = 3",
            "round 3",
            "attempts [2]: expected them to count from 1",
        ),
        ("update attempts set round_num = 4 where round_num = 3", "round 4", "I1: begun on version 2"),
        ("delete from updates where round_num = 2", "version 2", "is stored of pi-1, pi-2, which reported"),
        ("update tallies set count = 9 where outcome = 'accepted'", "tallies", "I9: 5 updates received, 9 met"),
        ("update tallies set count = 4", "tallies", "I9: 4 updates were accepted, 5 are stored"),
        ("update runs set round_num = 3", "", "stands at round 3, its last version is 2"),
        ("update runs set best_round = 3", "", "its best version is 3, its last is 2"),
        ("update runs set state = 'done'", "", "is done with version 2: expected 3"),
        ("delete from meta where key = 'epoch'", "midge.db", "it has no epoch"),
        ("update meta set value = '99' where key = 'schema'", "midge.db", "has schema 99"),
        ("update attempts set members = 'x'", "midge.db", "malformed"),
        ("drop table tallies", "midge.db", "no such table: tallies"),
    ],
)
def test_an_invariant_that_does_not_hold_is_named(disk, statement, where, words):
    with closing(sqlite3.connect(disk.path / "midge.db")) as connection:
        connection.execute(statement)
        connection.commit()
    report = verify(disk.path)
    assert not report.is_sound
    assert any(words in finding.what and where in finding.where for finding in report.findings), report.findings


def test_a_run_that_is_over_has_settled_all_that_it_received(disk):
    disk.save(ev.SaveTallies({("received", ""): 6, ("accepted", ""): 5}))
    assert verify(disk.path).findings == []  # it may be on its way
    disk.save(ev.SaveRun("failed", "no agents", 2, None, None))
    assert ("damage", f"{disk.run_id}, tallies") in told(verify(disk.path))


def test_a_database_that_is_none_is_damage_and_not_wrong_use(disk):
    disk.close()
    (disk.path / "midge.db").write_bytes(b"hello" * 1000)
    report = verify(disk.path)
    assert told(report) == [("damage", "midge.db")]
    assert report.findings[0].what == "file is not a database"


def test_pages_of_the_database_that_were_overwritten_are_damage(disk):
    disk.close()
    path = disk.path / "midge.db"
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 5 * 4096] = b"\xff" * 8192
    path.write_bytes(content)
    assert not verify(disk.path).is_sound


def test_a_missing_database_beside_models_is_damage(disk):
    disk.close()
    for path in disk.path.glob("midge.db*"):
        path.unlink()
    assert told(verify(disk.path)) == [("damage", "midge.db")]


def test_a_directory_that_is_no_coordinators_is_wrong_use(tmp_path):
    with pytest.raises(
        WrongDirectoryError, match=r"holds no midge.db: no coordinator has run there; name its state_dir"
    ):
        verify(tmp_path)


# What a strategy remembers, base models, agents' models.


def file_of(disk: StateDir, digest: str) -> Path:
    return disk.path / "models" / f"{digest}.safetensors"


def test_what_a_strategy_remembers_is_needed_of_the_last_version_alone(disk):
    """Retention deletes that of the version before, though it keeps that version's model; a kill may leave it there."""
    before, last = disk.remember(1.0), disk.remember(2.0)
    change(disk, "update versions set server_state = ? where round_num = 2", before)
    disk.commit_round_3(server_state=last)
    assert verify(disk.path).findings == []
    assert repair(disk.path).removed == []
    assert file_of(disk, before).exists()
    file_of(disk, before).unlink()
    assert verify(disk.path).findings == []
    file_of(disk, last).unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.where) == ("damage", f"models/{last}.safetensors")
    assert finding.what == f"it is not there: {disk.run_id} needs it"


def test_what_a_strategy_remembers_is_checked_bit_by_bit(disk):
    last = disk.remember(2.0)
    disk.commit_round_3(server_state=last)
    flip(file_of(disk, last), -1)
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.where) == ("damage", f"models/{last}.safetensors")
    assert finding.cure == "restore the directory from a backup"


def test_what_a_strategy_made_of_a_round_that_was_not_committed_is_a_leftover(disk):
    made = disk.remember(3.0)
    assert told(verify(disk.path)) == [("leftover", f"models/{made}.safetensors")]
    assert repair(disk.path).removed == [f"models/{made}.safetensors"]


def test_a_base_model_that_no_run_uses_is_needed_and_never_removed(disk):
    path = disk.add_base_model("base", 7.0)
    assert verify(disk.path).findings == []
    assert repair(disk.path).removed == []
    assert path.exists()
    flip(path, -1)
    (finding,) = repair(disk.path).findings
    assert (finding.severity, finding.cure) == ("damage", "restore the directory from a backup")
    path.unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.what) == ("damage", "it is not there: base model base needs it")


def test_a_model_that_became_a_base_model_after_the_look_is_not_removed(disk, monkeypatch):
    """`coordinator models push` works without a coordinator, and holds no lock: the name may come as the repair begins."""
    orphan = disk.models.save_state({"w": np.full(10, 7, np.float32)})
    look = Verifier.look

    def named_meanwhile(verifier: Verifier, *, is_running: bool) -> Report:
        report = look(verifier, is_running=is_running)
        disk.store.add_base_model("base", digest=orphan, task="digits", source="seed 7", num_elements=10)
        return report

    monkeypatch.setattr(Verifier, "look", named_meanwhile)
    report = repair(disk.path)
    assert (report.removed, report.findings) == ([], [])
    assert file_of(disk, orphan).exists()


def test_a_model_that_is_being_named_is_looked_at_again(disk, monkeypatch):
    orphan = disk.models.save_state({"w": np.full(10, 7, np.float32)})
    monkeypatch.setattr(
        time,
        "sleep",
        lambda _: disk.store.add_base_model("b", digest=orphan, task="digits", source="", num_elements=10),
    )
    assert verify(disk.path).findings == []


def test_a_model_that_is_being_written_is_left_alone(disk):
    with disk.models.writer(Layout((TensorSpec("w", (10,), "float32"),)), ()):
        assert repair(disk.path).findings == []
        assert len(list((disk.path / "models").glob(".*.tmp"))) == 1


def test_a_run_that_has_not_begun_needs_the_model_that_it_begins_from(disk):
    digest = disk.add_base_model("base", 7.0).stem
    run_id = disk.store.create_run(
        federation="lab", task="digits", fingerprint="g", definition={"base_model": digest}, rounds=3
    )
    disk.store.remove_base_model("base")
    assert repair(disk.path).findings == []
    file_of(disk, digest).unlink()
    (finding,) = verify(disk.path).findings
    assert (finding.severity, finding.what) == ("damage", f"it is not there: {run_id} needs it")


def test_agents_models_are_counted_and_never_removed(disk):
    kept = [disk.keep_agent_model("pi-1", 2), disk.keep_agent_model("pi-2", 1)]
    other = disk.keep_agent_model("pi-1", 9, run_id="gone-1")
    report = repair(disk.path)
    assert report.agent_models == 3
    assert (told(report), report.removed) == ([("note", "agent-models/gone-1")], [])
    assert all(path.exists() for path in [*kept, other])


def test_an_agents_model_that_is_cut_short_is_damage_that_no_run_minds(disk):
    path = disk.keep_agent_model("pi-1", 2)
    path.write_bytes(path.read_bytes()[:-1])
    (finding,) = repair(disk.path).findings
    where = f"agent-models/{disk.run_id}/pi-1.2.safetensors"
    assert (finding.severity, finding.where, finding.removable) == ("damage", where, False)
    assert finding.cure.startswith("delete the file: no run needs it")
    assert path.exists()


def test_unknown_files_beside_agents_models_are_noted_and_stay(disk):
    directory = disk.keep_agent_model("pi-1", 2).parent
    unnamed = directory / ("ab" * 32 + ".safetensors")
    foreign = [disk.path / "agent-models" / "readme", directory / "notes.txt", directory / "Pi.2.safetensors", unnamed]
    for path in foreign:
        path.write_text("mine")
    (directory / ".0123.tmp").write_bytes(b"half a model")
    report = repair(disk.path)
    assert report.removed == [f"agent-models/{disk.run_id}/.0123.tmp"]
    assert sorted(told(report)) == sorted(("note", str(path.relative_to(disk.path))) for path in foreign)
    assert all(path.exists() for path in foreign)


def test_a_directory_of_an_earlier_midge_is_looked_at_as_it_is(disk):
    """Schema 1 knew neither base models nor what strategies remember; to look changes nothing."""
    disk.close()
    with closing(sqlite3.connect(disk.path / "midge.db")) as connection:
        connection.executescript(
            "alter table versions drop column server_state; drop table base_models;"
            "update meta set value = '1' where key = 'schema'"
        )
    report = verify(disk.path)
    assert (report.findings, report.versions) == ([], 3)
    with closing(sqlite3.connect(disk.path / "midge.db")) as connection:
        assert connection.execute("select value from meta where key = 'schema'").fetchone() == ("1",)


# What is left over.


def litter(disk: StateDir) -> list[str]:
    """Leave there what a coordinator that dies may leave; what `verify` calls it."""
    orphan = disk.models.save_state({"w": np.full(10, 99, np.float32)})
    (disk.path / "models" / ".0123456789abcdef.tmp").write_bytes(b"half a model")
    (disk.path / "service.json").write_text("{}")
    (disk.path / "spool" / "gone-1").mkdir()
    (disk.path / "spool" / "gone-1" / "7.spool").write_bytes(b"")
    disk.segment(2).write_bytes(b"")
    disk.segment(4).write_bytes(b"")
    return sorted(
        [
            "models/.0123456789abcdef.tmp",
            f"models/{orphan}.safetensors",
            "service.json",
            "spool/gone-1/7.spool",
            f"spool/{disk.run_id}/2.spool",
            f"spool/{disk.run_id}/4.spool",
        ]
    )


def test_what_nobody_needs_is_no_damage_and_a_repair_removes_it_and_nothing_else(disk):
    before = contents(disk.path)
    left = litter(disk)
    report = verify(disk.path)
    assert told(report) == [("leftover", where) for where in left]
    assert report.is_sound
    repaired = repair(disk.path)
    assert (repaired.removed, repaired.findings) == (left, [])
    assert contents(disk.path) == before


def test_files_of_others_are_noted_and_never_touched(disk):
    foreign = ["notes.txt", "models/readme", "models/x.safetensors", "spool/x", f"spool/{disk.run_id}/old.bak"]
    for name in foreign:
        (disk.path / name).write_text("mine")
    report = repair(disk.path)
    assert sorted(told(report)) == sorted(("note", name) for name in foreign)
    assert all((disk.path / name).read_text() == "mine" for name in foreign)


def test_damage_is_never_removed_by_a_repair(disk):
    flip(disk.model(1), -1)
    assert not repair(disk.path).is_sound
    assert disk.model(1).exists()


def test_nothing_is_repaired_beside_a_running_coordinator(disk):
    left = litter(disk)
    fd = lock(disk.path)
    assert is_in_use(disk.path)
    with pytest.raises(InUseError), closing_fd(fd):
        repair(disk.path)
    assert not is_in_use(disk.path)
    assert all((disk.path / where).exists() for where in left)


def closing_fd(fd: int):
    return closing(os.fdopen(fd, "rb"))


def test_a_directory_without_a_lock_such_as_a_copy_can_be_repaired(disk, tmp_path):
    litter(disk)
    copy = tmp_path / "copy"
    shutil.copytree(disk.path, copy)
    (copy / "lock").unlink(missing_ok=True)
    assert repair(copy).findings == []


# Beside a running coordinator.


def test_what_moves_under_it_is_no_damage(disk):
    """A coordinator that commits round after round, deletes models and prunes the spool meanwhile."""
    fd = lock(disk.path)
    stop = threading.Event()
    models = ModelStore(disk.path / "models")

    def work() -> None:
        while not stop.is_set():
            round_num = len(disk.digests)
            there = {update.agent_id for update in disk.store.updates(disk.run_id, round_num)}
            for agent_id in {"pi-1", "pi-2"} - there:
                disk.accept(round_num, agent_id)
            disk.add_version(disk.store.updates(disk.run_id, round_num))
            disk.spool.prune(disk.run_id, round_num + 1)
            models.delete(disk.digests[round_num - 3])
            members = dict.fromkeys(("pi-1", "pi-2"), MemberState.INVITED)
            disk.save(disk.attempt(round_num + 1, RoundState.COLLECTING, members))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        while len(disk.digests) < 12:
            assert worker.is_alive()
            report = verify(disk.path)
            assert report.is_running
            assert report.findings == []
    finally:
        stop.set()
        worker.join()
        os.close(fd)


# The command.


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments], prog_name="coordinator")
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_exits_with_0_1_or_2(disk, capsys, tmp_path):
    code, out, _ = call(capsys, str(disk.path))
    assert code == 0
    assert f"sound: {disk.path}: checked 1 run, 3 versions, 3 models (0.0 MB), 1 accepted update" in out
    litter(disk)
    code, out, _ = call(capsys, str(disk.path), "--repair")
    assert code == 0
    assert out.count("removed ") == 6
    disk.model(2).unlink()
    code, out, _ = call(capsys, str(disk.path))
    assert code == 1
    assert "damage    models/" in out
    code, _, err = call(capsys, str(tmp_path / "nowhere"))
    assert code == 2
    assert "no coordinator has run there" in err


def test_the_report_as_json(disk, capsys):
    disk.model(2).unlink()
    code, out, _ = call(capsys, str(disk.path), "--json")
    report = json.loads(out)
    assert (code, report["is_sound"], report["versions"]) == (1, False, 3)
    (finding,) = report["findings"]
    assert (finding["severity"], finding["removable"]) == ("damage", False)


def test_a_repair_beside_a_running_coordinator_is_wrong_use(disk, capsys):
    fd = lock(disk.path)
    with closing_fd(fd):
        code, _, err = call(capsys, str(disk.path), "--repair")
    assert code == 2
    assert "a coordinator is running in it; stop it, then repair" in err
