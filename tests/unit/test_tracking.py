"""What trackers are told: which values at which step, each once, whatever the tracker does; read with their own readers."""

from __future__ import annotations

import logging
import threading

import pytest

from coordinator import run_events as ev
from coordinator import trackers, tracking
from coordinator.config import Settings
from coordinator.store import Store
from coordinator.tracking import Teller, TrackerError, Tracking, history
from midge.wire.messages import Evaluation

SCORE = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75, "top-5 [%]": 0.875})


def update(agent_id: str, **fields) -> ev.AcceptedUpdate:
    return ev.AcceptedUpdate(agent_id, 1, "0" * 64, 10, (), 1.5, 2.5, **fields)


def version(round_num: int) -> ev.SaveVersion:
    return ev.SaveVersion(round_num, f"{round_num:064x}", None, 2, 30, 0.25, 4.0, 1)


ROUND_1 = [
    ev.SaveUpdate(1, update("pi-1", metrics={"loss": 0.125, "other": 1.0}, evaluation=SCORE)),
    ev.SaveUpdate(1, update("pi-2")),
    version(1),
    ev.SaveEvaluation(0, "federated", SCORE),
    ev.SaveEvaluation(1, "central", SCORE),
]
TOLD = {
    ("agent/pi-1/update_norm", 1): 1.5,
    ("agent/pi-1/training_s", 1): 2.5,
    ("agent/pi-1/training_loss", 1): 0.125,
    ("agent/pi-1/loss", 0): 0.5,
    ("agent/pi-1/accuracy", 0): 0.75,
    ("agent/pi-2/update_norm", 1): 1.5,
    ("agent/pi-2/training_s", 1): 2.5,
    ("round/duration_s", 1): 4.0,
    ("round/updates", 1): 2.0,
    ("round/examples", 1): 30.0,
    ("round/delta_norm", 1): 0.25,
    ("round/attempts", 1): 1.0,
    ("federated/loss", 0): 0.5,
    ("federated/accuracy", 0): 0.75,
    ("federated/top-5 ___", 0): 0.875,
    ("central/loss", 1): 0.5,
    ("central/accuracy", 1): 0.75,
    ("central/top-5 ___", 1): 0.875,
}


class Fake:
    """A tracker that the test plays."""

    name = "fake"

    def __init__(self, last: dict[str, int] | None = None, error: Exception | None = None) -> None:
        self.last = last or {}
        self.error = error
        self.told: list[tuple[str, int, float]] = []
        self.states: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def open(self, run_id, task, definition):
        return self.last

    def log(self, step, values):
        self.may_go_on.wait(20)
        if self.error is not None:
            raise self.error
        self.told += [(name, step, value) for name, value in values.items()]

    def close(self, state):
        self.states.append(state)


def tell(fake, saves=ROUND_1, known=(), max_agents: int = 50, state: str = "done") -> None:
    made = Tracking([Teller(fake, "r1", "digits", {}, known)], max_agents, known)
    for save in saves:
        made.saved(save)
    made.stop(state)


def test_all_that_is_persisted_of_a_round_is_told_at_its_step():
    fake = Fake()
    tell(fake, [ev.SaveVersion(0, "0" * 64, None), *ROUND_1, ev.SaveRun("in_round", "", 1, None, None)])
    assert {(name, step): value for name, step, value in fake.told} == TOLD
    assert len(fake.told) == len(TOLD)
    assert fake.states == ["done"]


def test_a_step_that_a_name_has_is_not_told_again():
    fake = Fake({"round/updates": 1, "central/loss": 0})
    tell(fake)
    assert {(name, step) for name, step, _ in fake.told} == TOLD.keys() - {("round/updates", 1)}
    twice = Fake()
    tell(twice, ROUND_1 * 2)
    assert len(twice.told) == len(TOLD)


def test_only_the_first_agents_are_told_of_each_by_itself_also_after_a_restart():
    fake = Fake()
    tell(fake, max_agents=1)
    assert {name.split("/")[1] for name, _, _ in fake.told if name.startswith("agent/")} == {"pi-1"}
    again = Fake()
    tell(again, known=[(0, {"agent/pi-2/loss": 0.5})], max_agents=1)
    assert {name.split("/")[1] for name, _, _ in again.told if name.startswith("agent/")} == {"pi-2"}


def test_names_that_a_task_makes_up_are_bounded(monkeypatch):
    monkeypatch.setattr(tracking, "_MAX_NAMES", 3)
    fake = Fake()
    scores = [Evaluation(num_examples=1, loss=0.5, metrics={f"m{number}": 1.0}) for number in range(9)]
    tell(fake, [ev.SaveEvaluation(number, "central", score) for number, score in enumerate(scores)])
    assert len({name for name, _, _ in fake.told}) <= 4  # one evaluation may bring its second name along
    assert sum(name == "central/loss" for name, _, _ in fake.told) == 9


def test_a_tracker_that_fails_is_said_to_once_and_nothing_else_suffers(caplog):
    broken, well = Fake(error=ConnectionError("no route")), Fake()
    made = Tracking([Teller(broken, "r1", "digits", {}), Teller(well, "r1", "digits", {})], 50)
    with caplog.at_level(logging.WARNING):
        for save in ROUND_1:
            made.saved(save)
        made.stop("failed")
    assert len(well.told) == len(TOLD)
    assert well.states == ["failed"]
    (record,) = caplog.records
    assert "tracker failed" in record.getMessage()
    assert "ConnectionError: no route" in str(record.__dict__)


def test_a_tracker_that_hangs_blocks_nobody_and_what_does_not_fit_is_dropped(caplog, monkeypatch):
    monkeypatch.setattr(tracking, "_MAX_WAITING", 10)
    fake = Fake()
    fake.may_go_on.clear()
    teller = Teller(fake, "r1", "digits", {})
    with caplog.at_level(logging.WARNING):
        for step in range(1000):
            teller.tell(step, {"x": 1.0})
        teller.stop("stopped", timeout_s=0.01)
    assert ["steps wait" in str(record.__dict__) for record in caplog.records].count(True) == 1
    assert any("were not written after" in str(record.__dict__) for record in caplog.records)
    fake.may_go_on.set()
    teller.stop("done")  # the first word on how it ended is the one that counts
    assert 10 <= len(fake.told) <= 11
    assert fake.states == ["stopped"]


def test_what_the_database_knows_is_what_was_told(tmp_path):
    store = Store(tmp_path)
    run_id = store.create_run(federation="lab", task="digits", fingerprint="f", definition={}, rounds=3)
    store.save(run_id, [ev.SaveVersion(0, "0" * 64, None)])
    store.save(run_id, ROUND_1)
    told = {(name, step): value for step, values in history(store, run_id, 50) for name, value in values.items()}
    assert told == TOLD
    few = {
        name.split("/")[1] for _, values in history(store, run_id, 1) for name in values if name.startswith("agent/")
    }
    assert few == {"pi-1"}
    store.close()


@pytest.mark.parametrize(
    ("setting", "library"), [("tensorboard_dir", "tensorboard"), ("mlflow_uri", "mlflow"), ("mlflow_uri", "alembic")]
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(setting, library, monkeypatch):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == library else find(name) or 1)
    extra = "tensorboard" if library == "tensorboard" else "mlflow"
    with pytest.raises(TrackerError, match=rf"{library} is not installed: pip install 'midge\[{extra}\]', or take"):
        trackers.make_trackers(Settings(**{setting: "sqlite:///x.db"}))


def test_without_settings_there_are_no_trackers_and_no_imports():
    assert trackers.make_trackers(Settings()) == []


# Read back.


def test_tensorboard_reads_each_value_once_also_after_a_restart(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(trackers.TensorBoard(tmp_path), ROUND_1[:-1], state="stopped")
    tell(trackers.TensorBoard(tmp_path), [*ROUND_1, version(2)])
    seen = accumulator.EventAccumulator(str(tmp_path / "r1"))
    seen.Reload()
    points = [(tag, point.step, point.value) for tag in seen.Tags()["scalars"] for point in seen.Scalars(tag)]
    assert {(tag, step): value for tag, step, value in points if step < 2} == TOLD
    assert len(points) == len(TOLD) + 5
    assert [point.step for point in seen.Scalars("round/updates")] == [1, 2]


def test_mlflow_reads_each_value_once_also_after_a_restart(tmp_path):
    tracking_client = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("alembic")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    definition = {"rounds": 3, "learning_rate": 0.1}
    first = Tracking([Teller(trackers.MLflow(uri, "midge-lab"), "r1", "digits", definition)], 50)
    for save in ROUND_1[:-1]:
        first.saved(save)
    for teller in first._tellers:
        teller.stop("stopped", 60)
    client = tracking_client.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("midge-lab").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    second = Teller(trackers.MLflow(uri, "midge-lab"), "r1", "digits", definition)
    again = Tracking([second], 50)
    for save in [*ROUND_1, version(2)]:
        again.saved(save)
    second.stop("done", 60)
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("r1", "FINISHED")
    assert run.data.params == {"rounds": "3", "learning_rate": "0.1"}
    assert (run.data.tags["midge.run_id"], run.data.tags["midge.task"]) == ("r1", "digits")
    points = [
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    assert {(name, step): value for name, step, value in points if step < 2} == TOLD
    assert len(points) == len(TOLD) + 5
