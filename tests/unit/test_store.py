"""The store: what is saved is saved whole, survives a reopening, and can be read beside the process that writes."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from coordinator import run_events as ev
from coordinator.quarantine import Strike
from coordinator.round import MemberState, RoundState
from coordinator.store import DATABASE, KEPT_ROUNDS, SCHEMA_VERSION, AgentLeft, AgentRow, Store, StoreError, tables
from midge.wire.messages import Evaluation
from tests.machines import digest, version_digest

SCORE = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75})


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def create(store: Store, fingerprint: str = "f" * 64, federation: str = "lab", task: str = "digits") -> str:
    return store.create_run(
        federation=federation, task=task, fingerprint=fingerprint, definition={"rounds": 3}, rounds=3
    )


def version(round_num: int, text: str = "") -> ev.SaveVersion:
    """Version `round_num`, whose digest stands for `text` where one is given."""
    parent = version_digest(round_num - 1) if round_num else None
    return ev.SaveVersion(
        round_num, digest(text) if text else version_digest(round_num), parent, 2, 20, 1.5, 0.25, attempts=1
    )


def update(agent_id: str = "a", **changes: Any) -> ev.AcceptedUpdate:
    fields: dict[str, Any] = {
        "agent_id": agent_id,
        "attempt": 1,
        "update_digest": digest(agent_id),
        "num_examples": 10,
        "counters": (3, -(2**63)),
        "norm": 1.25,
        "training_s": 0.5,
        "metrics": {"loss": 0.125},
        "evaluation": SCORE,
    }
    return ev.AcceptedUpdate(**(fields | changes))


def attempt(number: int, state: RoundState, round_num: int = 1, **members: MemberState) -> ev.SaveAttempt:
    return ev.SaveAttempt(round_num, number, state, "", members)


def run_saved(state: str, round_num: int = 1) -> ev.SaveRun:
    return ev.SaveRun(state, "because", round_num, 1, 0.75)


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.path.parent)


# The epoch.


def test_the_epoch_grows_at_every_start_and_goes_above_what_others_have_seen(store, tmp_path):
    assert [store.raise_epoch(), store.raise_epoch()] == [1, 2]
    store = reopened(store)
    assert store.raise_epoch() == 3
    assert store.raise_epoch(above=40) == 41
    assert store.raise_epoch(above=7) == 42
    store.close()


# Saving.


def test_everything_that_is_saved_comes_back_after_a_reopening(store):
    run_id = create(store)
    members = {"a": MemberState.REPORTED, "b": MemberState.LOST}
    store.save(
        run_id,
        [
            version(0),
            attempt(1, RoundState.COLLECTING, **members),
            ev.SaveUpdate(1, update("b", metrics={}, evaluation=None)),
            ev.SaveUpdate(1, update("a")),
            ev.SaveTallies({("received", ""): 3, ("accepted", ""): 2, ("rejected", "norm"): 1}),
            run_saved("in_round", 0),
        ],
        [AgentRow("a", "online", "digits", {"site": "lab"}, "0.1")],
    )
    store.save(run_id, [ev.SaveEvaluation(0, "central", SCORE)])
    again = reopened(store)
    (row,) = again.versions(run_id)
    assert (row["digest"], row["parent"], row["num_updates"], row["num_examples"]) == (version_digest(0), None, 2, 20)
    assert (row["delta_norm"], row["duration_s"], row["attempts"]) == (1.5, 0.25, 1)
    assert (row["central"], row["federated"]) == (SCORE, None)
    assert again.last_attempt(run_id, 1) == (1, RoundState.COLLECTING, members)
    assert again.updates(run_id, 1) == [update("a"), update("b", metrics={}, evaluation=None)]
    assert again.tallies(run_id) == {("received", ""): 3, ("accepted", ""): 2, ("rejected", "norm"): 1}
    (agent,) = again.agents()
    assert (agent["agent_id"], agent["state"], agent["labels"]) == ("a", "online", {"site": "lab"})
    run = again.run(run_id)
    assert (run["state"], run["reason"], run["round_num"], run["best_round"], run["best_value"]) == (
        "in_round",
        "because",
        0,
        1,
        0.75,
    )
    again.close()


def test_what_one_turn_decides_is_saved_as_a_whole_or_not_at_all(store):
    run_id = create(store)
    store.save(run_id, [version(0), ev.SaveTallies({("received", ""): 1})])
    with pytest.raises(sa.exc.IntegrityError):
        store.save(
            run_id,
            [
                ev.SaveUpdate(1, update()),
                attempt(1, RoundState.COLLECTING),
                ev.SaveTallies({("received", ""): 9}),
                run_saved("failed"),
                version(0),
            ],
            [AgentRow("a", "online", "digits", {}, "0.1")],
        )
    assert store.updates(run_id, 1) == []
    assert store.last_attempt(run_id, 1) is None
    assert store.tallies(run_id) == {("received", ""): 1}
    assert store.run(run_id)["state"] == "preparing"
    assert store.agents() == []
    assert len(store.versions(run_id)) == 1
    store.save(run_id, [version(1)])
    assert [row["round_num"] for row in store.versions(run_id)] == [0, 1]


def test_a_version_is_written_once(store):
    run_id = create(store)
    store.save(run_id, [version(0)])
    with pytest.raises(sa.exc.IntegrityError):
        store.save(run_id, [version(0, "other content")])
    with pytest.raises(sa.exc.IntegrityError):
        store.save(run_id, [version(1), version(1, "other content")])
    assert [row["digest"] for row in store.versions(run_id)] == [version_digest(0)]


def test_of_two_saves_of_the_same_thing_in_one_turn_the_later_one_counts(store):
    run_id = create(store)
    store.save(
        run_id,
        [
            attempt(1, RoundState.SELECTING),
            run_saved("in_round"),
            ev.SaveTallies({("received", ""): 1}),
            attempt(1, RoundState.COLLECTING, a=MemberState.INVITED),
            attempt(2, RoundState.SELECTING),
            run_saved("failed"),
            ev.SaveTallies({("received", ""): 2}),
        ],
    )
    assert store.last_attempt(run_id, 1) == (2, RoundState.SELECTING, {})
    assert store.run(run_id)["state"] == "failed"
    assert store.tallies(run_id) == {("received", ""): 2}


@pytest.mark.parametrize("source", ["central", "federated"])
def test_the_evaluation_of_a_version_that_is_saved_in_the_same_turn_is_kept(store, source):
    run_id = create(store)
    store.save(run_id, [version(0)])
    later = Evaluation(num_examples=1, loss=0.25)
    store.save(run_id, [ev.SaveEvaluation(0, source, SCORE), version(1), ev.SaveEvaluation(1, source, later)])
    assert [row[source] for row in store.versions(run_id)] == [SCORE, later]


def test_an_agents_update_and_attempt_are_replaced_and_counted_once(store):
    run_id = create(store)
    store.save(run_id, [ev.SaveUpdate(1, update("a", attempt=1)), attempt(1, RoundState.COLLECTING)])
    store.save(run_id, [ev.SaveUpdate(1, update("a", attempt=2)), attempt(1, RoundState.ABANDONED)])
    assert store.updates(run_id, 1) == [update("a", attempt=2)]
    assert store.last_attempt(run_id, 1) == (1, RoundState.ABANDONED, {})


def test_saving_nothing_is_nothing(store):
    run_id = create(store)
    before = store.runs()
    store.save(run_id, [])
    store.save("", [], [AgentRow("a", "online", "digits", {}, "0.1")])  # no run is there yet
    assert store.runs() == before
    assert len(store.agents()) == 1


def test_an_agent_that_left_unseen_is_offline_and_one_that_was_never_known_stays_unknown(store):
    store.save("", [], [AgentRow("a", "online", "digits", {"site": "lab"}, "0.1")])
    store.save("", [], [AgentLeft("a"), AgentLeft("b")])
    (agent,) = store.agents()
    assert (agent["agent_id"], agent["state"], agent["task"], agent["labels"]) == (
        "a",
        "offline",
        "digits",
        {"site": "lab"},
    )
    store.save("", [], [AgentLeft("a")])
    assert store.agents() == [agent]  # when it left is not moved by hearing so again


def test_of_agents_that_are_gone_only_so_many_are_remembered_the_last_that_left(store, monkeypatch):
    monkeypatch.setattr("coordinator.store.store.KEPT_AGENTS", 3)
    monkeypatch.setattr("coordinator.store.store._FORGET_EVERY", 10)
    times = iter(range(100))
    monkeypatch.setattr("coordinator.store.rows.utc_now", lambda: f"{next(times):03}")
    store.save("", [], [AgentRow("here", "online", "digits", {}, "0.1")])
    for number in range(9):
        store.save("", [], [AgentRow(f"gone-{number}", "offline", "digits", {}, "0.1")])
    assert [row["agent_id"] for row in store.agents()] == ["gone-6", "gone-7", "gone-8", "here"]
    store.save("", [], [AgentRow("gone-9", "offline", "digits", {}, "0.1")])
    assert len(store.agents()) == 5  # looked at now and then


def test_strikes_come_back_in_order_and_old_ones_are_forgotten(store, monkeypatch):
    monkeypatch.setattr("coordinator.store.store.KEPT_STRIKES", 2)
    run_id = create(store)
    strikes = [Strike(3, 2, "a", "norm"), Strike(3, 1, "b", "held_out"), Strike(1, 1, "a", "not_finite")]
    store.save(run_id, [ev.SaveStrike(strike) for strike in strikes])
    assert store.strikes(run_id) == [strikes[2], strikes[1], strikes[0]]
    store.save(run_id, [version(4)])
    store = reopened(store)
    assert store.strikes(run_id) == [strikes[1], strikes[0]]
    assert store.strikes("another") == []
    store.close()


def test_updates_are_remembered_for_some_rounds_and_versions_for_ever(store, monkeypatch):
    assert KEPT_ROUNDS == 100
    kept_rounds = 4
    monkeypatch.setattr("coordinator.store.store.KEPT_ROUNDS", kept_rounds)
    run_id, other = create(store), create(store, "e" * 64)
    store.save(other, [ev.SaveUpdate(1, update())])
    store.save(run_id, [version(0)])
    num_rounds = kept_rounds + 3
    for round_num in range(1, num_rounds + 1):
        attempts = [
            ev.SaveAttempt(round_num, number, RoundState.ABANDONED, "", {"a": MemberState.REPORTED})
            for number in (1, 2)
        ]
        store.save(run_id, [*attempts, ev.SaveUpdate(round_num, update()), version(round_num)])
    kept = [round_num for round_num in range(num_rounds + 1) if store.updates(run_id, round_num)]
    assert kept == [4, 5, 6, 7]
    remembered = {(row["round_num"], row["attempt"]): bool(row["members"]) for row in store.attempts(run_id)}
    assert remembered == {(n, attempt): n >= 4 for n in range(1, num_rounds + 1) for attempt in (1, 2)}
    assert len(store.versions(run_id)) == num_rounds + 1
    assert store.updates(other, 1) == [update()]


# Runs.


def test_runs_have_ids_of_their_own_and_the_latest_comes_first(store):
    first, second = create(store, task="digits"), create(store, task="my.tasks:Image_Task")
    assert first.startswith("digits-")
    assert second.startswith("image-task-")
    assert [row["run_id"] for row in store.runs()] == [second, first]
    assert store.run(first)["number"] == 1
    assert store.run("none") is None
    assert create(store, task="a:---").startswith("run-")
    assert create(store, task="my_task.py").startswith("my-task-")
    assert create(store, task="my_task.py:Cnn").startswith("cnn-")
    assert create(store, task="my_task.py:task").startswith("my-task-")
    assert create(store, task="my.tasks.images:task").startswith("images-")
    assert len(create(store, task="x" * 200)) <= 64


def test_the_latest_run_of_a_definition_is_found_with_its_state(store):
    assert store.latest("lab", "f" * 64) == (None, "")
    first = create(store)
    assert store.latest("lab", "f" * 64) == (first, "preparing")
    assert store.latest("lab", "e" * 64) == (None, "")
    assert store.latest("attic", "f" * 64) == (None, "")
    for state in ("waiting", "in_round", "stopped", "done", "failed"):
        store.save(first, [run_saved(state)])
        assert store.latest("lab", "f" * 64) == (first, state)
    second = create(store)
    store.save(first, [run_saved("stopped")])
    assert store.latest("lab", "f" * 64) == (second, "preparing")


def test_what_is_at_the_broker_is_remembered(store):
    run_id = create(store)
    assert store.run(run_id)["is_published"] is False
    store.set_framing(run_id, 16_384, 7)
    run = store.run(run_id)
    assert (run["frame_elements"], run["num_frames"], run["is_published"]) == (16_384, 7, True)
    store.set_unpublished(run_id)
    assert store.run(run_id)["is_published"] is False


def test_a_digest_is_lone_where_no_kept_version_of_this_and_no_version_of_another_run_shares_it(store):
    one, two = create(store), create(store)
    texts = {0: "same seed", 1: "b", 2: "c", 3: "b", 4: "d"}
    store.save(one, [version(round_num, text) for round_num, text in texts.items()])
    store.save(two, [version(0, "same seed")])
    assert store.lone_digest(one, 0, kept_from=2) is None
    assert store.lone_digest(one, 1, kept_from=3) is None  # version 3 is kept, and has the same content
    assert store.lone_digest(one, 1, kept_from=4) == digest("b")
    assert store.lone_digest(one, 2, kept_from=3) == digest("c")
    assert store.lone_digest(one, 9, kept_from=3) is None
    assert store.lone_digest(one, -1, kept_from=3) is None


# Beside others, and where something is wrong.


def test_another_process_may_read_while_this_one_writes(store, tmp_path):
    run_id = create(store)
    reader = Store(tmp_path, read_only=True)
    seen: list[list[int]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append([row["round_num"] for row in reader.versions(run_id)])

    thread = threading.Thread(target=read)
    thread.start()
    for round_num in range(30):
        store.save(run_id, [version(round_num), ev.SaveUpdate(round_num + 1, update())])
    stop.set()
    thread.join()
    assert all(numbers == list(range(len(numbers))) for numbers in seen)
    assert reader.versions(run_id)[-1]["round_num"] == 29
    reader.close()


def test_a_reader_changes_nothing_and_needs_no_writer(store, tmp_path):
    run_id = create(store)
    store.close()
    reader = Store(tmp_path, read_only=True)
    assert reader.run(run_id)["state"] == "preparing"
    with pytest.raises(StoreError, match="readonly"):
        reader.save(run_id, [version(0)])
    reader.close()


def test_a_directory_without_a_database_is_no_state_directory(tmp_path):
    with pytest.raises(StoreError, match=f"holds no {DATABASE}: no coordinator has run there; check --state-dir"):
        Store(tmp_path, read_only=True)
    with pytest.raises(StoreError, match="check --state-dir"):
        Store(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_another_version_is_refused_and_left_alone(store, tmp_path, read_only):
    create(store)
    store.close()
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    connection.close()
    with pytest.raises(StoreError, match=f"has schema 99, this Midge reads {SCHEMA_VERSION}: use the Midge that wrote"):
        Store(tmp_path, read_only=read_only)


def as_schema_1(directory: Path) -> None:
    """Make of a database what the first Midge would have written."""
    with contextlib.closing(sqlite3.connect(directory / DATABASE)) as connection, connection:
        connection.execute("ALTER TABLE versions DROP COLUMN server_state")
        connection.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")


def test_a_database_of_the_first_schema_opens_and_goes_on(store, tmp_path):
    run_id = create(store)
    store.save(run_id, [version(0), version(1)])
    store.close()
    as_schema_1(tmp_path)
    reader = Store(tmp_path, read_only=True)
    before = reader.versions(run_id)
    reader.close()
    assert [(row["round_num"], row["server_state"]) for row in before] == [(0, None), (1, None)]
    for _ in range(2):  # and again, as one that is up to date
        opened = Store(tmp_path)
        assert opened.versions(run_id) == before
        opened.close()
    opened = Store(tmp_path)
    opened.save(run_id, [ev.SaveVersion(2, version_digest(2), version_digest(1), server_state=digest("state"))])
    assert [row["server_state"] for row in opened.versions(run_id)] == [None, None, digest("state")]
    opened.close()


def test_a_migration_that_is_cut_short_leaves_the_first_schema(store, tmp_path, monkeypatch):
    store.close()
    as_schema_1(tmp_path)
    monkeypatch.setattr(tables, "SCHEMA_VERSION", 3)
    monkeypatch.setitem(tables.MIGRATIONS, 2, "ALTER TABLE no_such ADD COLUMN any VARCHAR")
    with pytest.raises(StoreError, match="no such table: no_such"):
        Store(tmp_path)
    monkeypatch.undo()
    opened = Store(tmp_path)
    assert opened.versions("none") == []
    opened.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_database_is_refused(tmp_path, read_only):
    (tmp_path / DATABASE).write_bytes(b"this is not a database, though it has its name " * 100)
    with pytest.raises(StoreError, match="file is not a database; restore it from a backup, or choose another"):
        Store(tmp_path, read_only=read_only)


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose a writable state_dir"):
        Store(tmp_path / "file" / "state")


@pytest.mark.parametrize("name", ["a b", "a#b", "a?mode=ro", "100%41", "ü", "a&b=c"])
def test_a_state_directory_may_have_any_name(tmp_path, name):
    store = Store(tmp_path / name)
    run_id = create(store)
    store.close()
    assert (tmp_path / name / DATABASE).is_file()
    reader = Store(tmp_path / name, read_only=True)
    assert reader.run(run_id) is not None
    reader.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def limit_pages(store: Store) -> None:
    """No more room than there is now, as on a full disk."""

    def limit(connection: Any, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sa.event.listen(store._engine, "connect", limit)
    store._engine.dispose()


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_what_was_saved(store):
    run_id = create(store)
    store.save(run_id, [version(0)])
    limit_pages(store)
    members = {f"agent-{number:05d}": MemberState.INVITED for number in range(2000)}
    with pytest.raises(OSError, match="database or disk is full") as caught:
        store.save(run_id, [run_saved("in_round"), attempt(1, RoundState.COLLECTING, **members)])
    assert isinstance(caught.value, StoreError)
    assert store.run(run_id)["state"] == "preparing"
    assert store.last_attempt(run_id, 1) is None
    assert len(store.versions(run_id)) == 1


def test_each_way_of_writing_tells_a_failing_disk_from_a_bug(store, tmp_path):
    run_id = create(store)
    store.close()
    reader = Store(tmp_path, read_only=True)  # one that cannot write
    for write in (
        reader.raise_epoch,
        lambda: create(reader),
        lambda: reader.set_framing(run_id, 1, 1),
        lambda: reader.set_unpublished(run_id),
        lambda: reader.save(run_id, [version(0)]),
    ):
        with pytest.raises(OSError, match="readonly database"):
            write()
    reader.close()


def test_nothing_is_committed_without_a_sync(store):
    with store._engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2  # FULL
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
    assert Path(store.path).name == DATABASE
