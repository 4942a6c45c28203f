"""`coordinator runs forget`: a run goes with all that is its alone, and what others need stays."""

from __future__ import annotations

import json
import os

import pytest

from coordinator import run_events as ev
from coordinator.cli import main
from coordinator.state_dir import InUseError, lock
from coordinator.upkeep.forget import UnknownRunError, forget
from coordinator.upkeep.verify import repair, verify
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


def second_run(disk: StateDir) -> str:
    """Another run of the same directory: it begins from the same model, and has a version of its own."""
    run_id = disk.store.create_run(
        federation="lab", task="digits", fingerprint="g", definition={"quorum": 1, "task": "digits"}, rounds=3
    )
    disk.store.save(run_id, [ev.SaveVersion(0, disk.digests[0], None, 0, 0), ev.SaveRun("failed", "", 0, None, None)])
    return run_id


def files(disk: StateDir) -> set[str]:
    return {str(path.relative_to(disk.path)) for path in disk.path.rglob("*") if path.is_file()}


def test_a_run_goes_with_its_models_its_spool_and_its_agents_models(disk):
    disk.keep_agent_model("pi-1", 2)
    gone = forget(disk.path, disk.run_id)
    assert (gone.versions, gone.models, gone.shared) == (3, 3, 0)
    assert disk.store.runs() == []
    assert disk.store.versions(disk.run_id) == disk.store.attempts(disk.run_id) == []
    assert disk.store.kept_updates(disk.run_id) == []
    assert disk.store.tallies(disk.run_id) == {}
    assert {name for name in files(disk) if not name.startswith("midge.db")} == {"lock"}
    assert verify(disk.path).findings == []


def test_what_another_run_or_a_base_model_needs_stays(disk):
    other = second_run(disk)
    disk.store.add_base_model("kept", digest=disk.digests[1], task="digits", source="seed 0", num_elements=10)
    gone = forget(disk.path, disk.run_id)
    assert (gone.models, gone.shared) == (1, 2)
    assert disk.models.digests() == set(disk.digests[:2])
    assert [row["run_id"] for row in disk.store.runs()] == [other]
    assert verify(disk.path).findings == []
    assert forget(disk.path, other).models == 1
    assert disk.models.digests() == {disk.digests[1]}
    assert disk.store.base_model("kept")["digest"] == disk.digests[1]


def test_what_a_strategy_remembers_goes_too(disk):
    remembered = disk.remember(1.0)
    disk.commit_round_3(server_state=remembered)
    assert forget(disk.path, disk.run_id).models == 5  # versions 0 to 3, and what is remembered beside the last
    assert disk.models.digests() == set()


def test_what_two_strategies_remember_alike_stays_for_the_other(disk):
    remembered = disk.remember(1.0)
    disk.commit_round_3(server_state=remembered)
    other = second_run(disk)
    disk.store.save(other, [ev.SaveVersion(1, disk.digests[1], disk.digests[0], 1, 1, server_state=remembered)])
    forget(disk.path, disk.run_id)
    assert disk.models.digests() == {disk.digests[0], disk.digests[1], remembered}


def test_a_directory_at_work_is_left_alone(disk, capsys):
    fd = lock(disk.path)
    try:
        with pytest.raises(InUseError):
            forget(disk.path, disk.run_id)
        with pytest.raises(SystemExit) as ended:
            main(["runs", "forget", disk.run_id, "--state-dir", str(disk.path)])
    finally:
        os.close(fd)
    assert ended.value.code == 2
    assert "a coordinator is running in it; stop it, then forget the run" in capsys.readouterr().err
    assert disk.models.digests() == set(disk.digests)
    assert disk.store.run(disk.run_id) is not None


def test_an_unknown_run_and_a_directory_without_any_are_refused(disk, tmp_path, capsys):
    before = files(disk)
    with pytest.raises(UnknownRunError, match=r"has no run digits-0; `coordinator runs` lists them"):
        forget(disk.path, "digits-0")
    assert files(disk) - before <= {"lock"}
    with pytest.raises(SystemExit) as ended:
        main(["runs", "forget", "digits-0", "--state-dir", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "no coordinator has run there" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_is_retained_at_the_broker_is_remembered_until_it_is_cleared(disk):
    assert disk.store.published("lab") == [(disk.run_id, 3)]
    forget(disk.path, disk.run_id)
    assert disk.store.published("lab") == [(disk.run_id, 3)]
    assert disk.store.published("other") == []
    disk.store.set_unpublished(disk.run_id)
    assert disk.store.published("lab") == []


def test_a_kill_between_rows_and_files_leaves_what_a_repair_removes(disk):
    disk.store.forget_run(disk.run_id)
    assert {finding.severity for finding in verify(disk.path).findings} == {"leftover"}
    assert repair(disk.path).is_sound
    assert disk.models.digests() == set()


def test_the_command_says_what_went_and_the_list_no_longer_has_it(disk, capsys):
    other = second_run(disk)
    with pytest.raises(SystemExit) as ended:
        main(["runs", "forget", disk.run_id, "--state-dir", str(disk.path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert (
        f"forgot {disk.run_id}: 3 versions, 2 models, 0.0 MB; 1 model stays, since other runs or base models need it"
        in said
    )
    with pytest.raises(SystemExit):
        main(["runs", "--state-dir", str(disk.path), "--json"])
    assert [row["run_id"] for row in json.loads(capsys.readouterr().out)] == [other]
    with pytest.raises(SystemExit):
        main(["runs", "forget", other, "--state-dir", str(disk.path), "--json"])
    assert json.loads(capsys.readouterr().out)["models"] == 1
    assert disk.store.runs() == []
