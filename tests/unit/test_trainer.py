"""The trainer: whatever becomes of the worker, the agent hears of it once, and the next training begins.

Most of it is with a worker that the test plays itself. Time is an argument, so nothing waits.
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import msgspec
import pytest

from edge_agent import agent_events as ev
from edge_agent import worker_messages as msg
from edge_agent.journal import Journal, write_update
from edge_agent.trainer import Trainer, WorkerExited, WorkerReplied
from midge.eventqueue import EventQueue
from midge.tasks.summary import DataSummary
from midge.wire.messages import Invitation, TrainingConfig
from tests.unit.test_journal import made
from tests.unit.test_worker import RUN_ID, head
from tests.unit.tiny_tasks import tiny

ROOT = Path(__file__).parents[2]
BOUND_S = 20.0
PATIENCE_S = 10.0
SETUP = msg.SetUp(agent_id="pi-1", task="tests.unit.tiny_tasks:tiny", data=msg.DataOptions())


def invitation(round_num: int = 3, **options) -> Invitation:
    return Invitation(
        run_id=RUN_ID,
        epoch=1,
        round_num=round_num,
        attempt=1,
        model_digest="ab" * 32,
        task="tiny",
        training=TrainingConfig(extra=options),
        seed=7,
        credit=2,
        deadline_s=60.0,
    )


class FakeChild:
    """A worker that the test plays."""

    def __init__(self, module, arguments, on_reply, on_exit, environment) -> None:
        self.module = module
        self.environment = environment
        self.on_reply = on_reply
        self.on_exit = on_exit
        self.requests: list[msg.Request] = []
        self.is_stopped = False
        self.pid = 4711

    def send(self, request: bytes) -> None:
        self.requests.append(msgspec.json.decode(request, type=msg.Request))

    def stop(self) -> None:
        self.is_stopped = True

    def reply(self, reply: msg.Reply) -> None:
        self.on_reply(msgspec.json.encode(reply))

    @property
    def numbers(self) -> list[int]:
        """Of the trainings that were asked for."""
        return [request.request for request in self.requests if isinstance(request, msg.TrainModel)]


class Talk:
    """A trainer, and the agent that hears of it."""

    def __init__(self, directory: Path) -> None:
        self.now = 100.0
        self.children: list[FakeChild] = []
        self.directory = directory
        self.queue: EventQueue[WorkerReplied | WorkerExited] = EventQueue()
        self.trainer = Trainer(SETUP, directory, self.queue.put, num_threads=3, idle_s=120.0)

    @property
    def child(self) -> FakeChild:
        return self.children[-1]

    def train(self, round_num: int = 3) -> None:
        self.trainer.train(invitation(round_num), head(tiny.initial_state(0)), self.now)

    def cancel(self) -> None:
        self.trainer.cancel(self.now)

    def hear(self) -> list[ev.Event]:
        """Hand over what is in the queue; returns what the agent hears."""
        heard = [self.trainer.handle(event, self.now) for event in self.queue.take(0.0)]
        return [event for event in heard if event is not None]

    def says(self, reply: msg.Reply, child: FakeChild | None = None) -> list[ev.Event]:
        (child or self.child).reply(reply)
        return self.hear()

    def dies(self, reason: str = "the process was killed", child: FakeChild | None = None) -> list[ev.Event]:
        (child or self.child).on_exit(reason)
        return self.hear()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.trainer.tick(self.now)


@pytest.fixture
def talk(tmp_path, monkeypatch):
    made_up = Talk(tmp_path)

    def start(*arguments) -> FakeChild:
        made_up.children.append(FakeChild(*arguments))
        return made_up.child

    monkeypatch.setattr("edge_agent.trainer.Child", start)
    return made_up


def write(directory: Path) -> ev.FinishedUpdate:
    update, frames = made()
    write_update(directory / "update.bin", frames, update)
    return update


def train_for(talk: Talk, update: ev.FinishedUpdate) -> None:
    """Begin the training that this update is of."""
    asked = msgspec.structs.replace(invitation(update.round_num), run_id=update.run_id)
    talk.trainer.train(
        asked, msgspec.structs.replace(head(tiny.initial_state(0)), model_digest=update.model_digest), 0.0
    )


def failure(events: list[ev.Event]) -> tuple[str, str]:
    (event,) = events
    assert isinstance(event, ev.TrainingFailed), event
    return event.objection.reason, event.objection.detail


# One training.


def test_at_rest_there_is_no_worker_and_nothing_to_do(talk):
    assert talk.trainer.pid is None
    assert talk.trainer.deadline() == math.inf
    talk.cancel()
    talk.wait(1e6)
    talk.trainer.stop()
    assert talk.children == []


def test_a_worker_is_told_who_it_is_and_then_what_to_train(talk, tmp_path):
    talk.train()
    assert talk.child.module == "edge_agent.worker"
    assert set(talk.child.environment.values()) == {"3"}
    setup, request = talk.child.requests
    assert setup == SETUP
    assert (request.run_id, request.round_num, request.run_seed) == (RUN_ID, 3, 7)
    assert (request.model_path, request.update_path) == (f"{tmp_path}/model.bin", f"{tmp_path}/update.bin")
    assert talk.trainer.pid == 4711


def test_progress_and_the_finished_update_are_heard(talk, tmp_path):
    talk.train()
    assert talk.says(msg.Progressed(request=1, fraction=0.5)) == [ev.TrainingProgressed(0.5)]
    update = write(tmp_path)
    assert talk.says(msg.Finished(request=1)) == [ev.TrainingFinished(update)]


def test_a_finished_update_that_is_not_whole_on_disk_is_a_failure_of_the_disk(talk, tmp_path):
    talk.train()
    assert failure(talk.says(msg.Finished(request=1))) == (
        "disk",
        "the worker's update cannot be read: No such file or directory",
    )
    talk.train()
    (tmp_path / "update.bin").write_bytes(b"half")
    assert failure(talk.says(msg.Finished(request=2))) == ("disk", "the worker's update is not whole on disk")


def test_a_failure_keeps_its_reason_and_the_worker_stays_for_the_next(talk):
    talk.train()
    failed = talk.says(msg.Failed(request=1, reason="memory", detail="out of memory while training"))
    assert failure(failed) == ("memory", "out of memory while training")
    talk.train()
    assert len(talk.children) == 1
    assert talk.child.numbers == [1, 2]


def test_a_worker_that_dies_is_one_failed_training_and_the_next_starts_another(talk):
    talk.train()
    assert failure(talk.dies("the process was killed " + "x" * 900)) == (
        "worker",
        ("the process was killed " + "x" * 900)[:500],
    )
    assert talk.trainer.pid is None
    talk.train()
    assert len(talk.children) == 2
    assert isinstance(talk.child.requests[0], msg.SetUp)


def test_a_worker_that_dies_with_its_update_written_has_trained(talk, tmp_path):
    """Killed between the sync of the update and its last word: for lack of memory, say."""
    update, _ = made()
    train_for(talk, update)
    assert write(tmp_path) == update
    assert talk.dies() == [ev.TrainingFinished(update)]


@pytest.mark.parametrize("field", ["run_id", "round_num", "model_digest"])
def test_what_is_left_on_disk_of_another_training_is_no_result_of_one_whose_worker_died(talk, tmp_path, field):
    update, _ = made()
    other = {"run_id": "other", "round_num": update.round_num + 1, "model_digest": "cd" * 32}[field]
    train_for(talk, msgspec.structs.replace(update, **{field: other}))
    write(tmp_path)
    assert failure(talk.dies()) == ("worker", "the process was killed")


def test_an_earlier_update_of_the_same_round_is_no_result_either(talk, tmp_path):
    """A damaged one, say, which the journal did not take."""
    update = write(tmp_path)
    train_for(talk, update)
    assert failure(talk.dies()) == ("worker", "the process was killed")


def test_a_worker_that_cannot_be_started_is_a_failed_training_too(talk, monkeypatch):
    def fails(*_) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("edge_agent.trainer.Child", fails)
        talk.train()
        reason, detail = failure(talk.hear())
    assert reason == "worker"
    assert "Cannot allocate memory" in detail
    talk.train()
    assert talk.child.numbers == [2]


# A check of the data.

CHECKED = msg.DataChecked(summary=DataSummary(num_examples=3))


def test_a_check_starts_a_worker_that_is_ended_soon_after_it_has_said_what_it_found(talk):
    talk.trainer.check_data()
    assert talk.child.requests == [SETUP, msg.CheckData()]
    assert talk.trainer.deadline() == math.inf
    assert talk.says(CHECKED) == []
    assert talk.trainer.deadline() == talk.now + 10.0
    talk.wait(9.9)
    assert not talk.child.is_stopped
    talk.wait(0.2)
    assert talk.child.is_stopped
    assert talk.trainer.pid is None


def test_a_training_that_is_wanted_soon_after_a_check_finds_the_data_loaded(talk):
    talk.trainer.check_data()
    talk.says(CHECKED)
    talk.wait(5.0)
    talk.train()
    assert len(talk.children) == 1
    assert [type(request) for request in talk.child.requests] == [msg.SetUp, msg.CheckData, msg.TrainModel]
    talk.wait(100.0)
    assert not talk.child.is_stopped


def test_a_worker_that_found_the_data_wanting_is_ended_at_once(talk):
    talk.trainer.check_data()
    assert talk.says(msg.DataChecked(detail="no examples")) == []
    assert talk.child.is_stopped


def test_an_operator_s_shorter_rest_holds_after_a_check_too(talk):
    talk.trainer = Trainer(SETUP, talk.directory, talk.queue.put, idle_s=0.5)
    talk.trainer.check_data()
    talk.says(CHECKED)
    assert talk.trainer.deadline() == talk.now + 0.5


def test_a_training_that_is_wanted_meanwhile_goes_to_the_same_worker(talk, tmp_path):
    talk.trainer.check_data()
    talk.train()
    assert len(talk.children) == 1
    assert [type(request) for request in talk.child.requests] == [msg.SetUp, msg.CheckData, msg.TrainModel]
    assert talk.says(CHECKED) == []
    assert not talk.child.is_stopped
    update = write(tmp_path)
    assert talk.says(msg.Finished(request=1)) == [ev.TrainingFinished(update)]


def test_a_worker_that_dies_of_the_data_fails_no_training_but_one_that_waits(talk):
    talk.trainer.check_data()
    assert talk.dies() == []
    assert talk.trainer.pid is None
    talk.trainer.check_data()
    talk.train()
    assert failure(talk.dies()) == ("worker", "the process was killed")


def test_an_agent_that_stops_ends_a_check(talk):
    talk.trainer.check_data()
    talk.trainer.stop()
    assert talk.child.is_stopped
    assert talk.says(CHECKED) == []


# Cancelling.


def test_after_a_cancellation_nothing_more_is_heard_of_that_training(talk, tmp_path):
    talk.train()
    talk.cancel()
    assert talk.child.requests[-1] == msg.CancelTraining(request=1)
    assert talk.says(msg.Progressed(request=1, fraction=0.9)) == []
    write(tmp_path)
    assert talk.says(msg.Finished(request=1)) == []
    assert talk.says(msg.Finished(request=1)) == []


def test_another_training_waits_until_the_cancelled_one_lets_go(talk, tmp_path):
    talk.train(3)
    talk.cancel()
    talk.train(4)
    assert talk.child.numbers == [1]
    assert talk.says(msg.Cancelled(request=1)) == []
    assert talk.child.numbers == [1, 2]
    update = write(tmp_path)
    assert talk.says(msg.Finished(request=2)) == [ev.TrainingFinished(update)]


def test_of_several_that_wait_the_last_one_is_trained(talk):
    talk.train(3)
    for round_num in (4, 5, 6):
        talk.cancel()
        talk.train(round_num)
    talk.says(msg.Cancelled(request=1))
    assert talk.child.numbers == [1, 4]
    assert talk.child.requests[-1].round_num == 6


def test_a_training_that_waited_and_is_cancelled_is_never_begun(talk):
    talk.train(3)
    talk.cancel()
    talk.train(4)
    talk.cancel()
    assert talk.says(msg.Cancelled(request=1)) == []
    assert talk.child.numbers == [1]


def test_a_worker_that_does_not_let_go_is_ended_after_the_patience_and_another_trains(talk):
    talk.train(3)
    talk.cancel()
    talk.train(4)
    assert talk.trainer.deadline() == talk.now + PATIENCE_S
    talk.wait(PATIENCE_S - 0.001)
    assert not talk.child.is_stopped
    talk.wait(0.001)
    first, second = talk.children
    assert first.is_stopped
    assert second.numbers == [2]
    assert talk.says(msg.Finished(request=1), first) == []
    assert talk.dies("killed", first) == []
    assert failure(talk.dies("out of memory", second)) == ("worker", "out of memory")


def test_cancelling_again_and_again_does_not_prolong_the_patience(talk):
    talk.train(3)
    talk.cancel()
    for round_num in range(4, 7):
        talk.wait(PATIENCE_S / 4)
        talk.train(round_num)
        talk.cancel()
    talk.train(8)
    talk.wait(PATIENCE_S / 4)
    assert talk.children[0].is_stopped
    assert talk.child.requests[-1].round_num == 8


def test_one_that_dies_while_another_waits_is_followed_by_that(talk):
    talk.train(3)
    talk.cancel()
    talk.train(4)
    assert talk.dies() == []
    assert len(talk.children) == 2
    assert talk.child.numbers == [2]


# Idling.


def test_a_worker_without_work_is_ended_after_the_quiet_time(talk):
    talk.train()
    talk.wait(1000.0)
    assert not talk.child.is_stopped
    talk.says(msg.Failed(request=1, reason="task", detail=""))
    assert talk.trainer.deadline() == talk.now + 120.0
    talk.wait(119.0)
    assert not talk.child.is_stopped
    talk.wait(1.0)
    assert talk.child.is_stopped
    assert talk.trainer.deadline() == math.inf
    talk.train()
    assert len(talk.children) == 2


def test_work_before_the_quiet_time_is_over_keeps_the_worker_warm(talk):
    talk.train()
    talk.says(msg.Failed(request=1, reason="task", detail=""))
    talk.wait(119.0)
    talk.train()
    talk.wait(1000.0)
    assert len(talk.children) == 1
    assert not talk.child.is_stopped


def test_a_worker_that_dies_while_it_is_idle_is_no_failure_and_the_next_training_has_a_live_one(talk):
    talk.train()
    talk.says(msg.Failed(request=1, reason="task", detail=""))
    assert talk.dies() == []
    assert talk.trainer.pid is None
    talk.train()
    assert talk.child.numbers == [2]
    talk.wait(1000.0)
    assert not talk.child.is_stopped


def test_stopping_ends_the_worker_and_nothing_more_is_heard_of_it(talk):
    talk.train()
    talk.trainer.stop()
    assert talk.child.is_stopped
    assert talk.says(msg.Finished(request=1)) == []
    assert talk.trainer.deadline() == math.inf


# With a real one.


@pytest.fixture
def real(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    journal = Journal(tmp_path)
    state = tiny.initial_state(0)
    journal.model_path.write_bytes(state["w"].tobytes())
    queue: EventQueue[WorkerReplied | WorkerExited] = EventQueue()
    trainer = Trainer(SETUP, tmp_path, queue.put)

    def train(**options) -> ev.Event:
        """Train, and wait for the end."""
        trainer.train(invitation(**options), head(state), 0.0)
        while True:
            events = queue.take(BOUND_S)
            assert events, f"nothing came within {BOUND_S} s"
            for event in events:
                heard = trainer.handle(event, 0.0)
                if heard is not None and not isinstance(heard, ev.TrainingProgressed):
                    return heard

    yield trainer, train, journal
    trainer.stop()
    journal.close()


def test_a_real_worker_trains_and_dies_and_trains_again_and_is_ended_though_it_is_stuck(real):
    trainer, train, journal = real
    finished = train()
    assert isinstance(finished, ev.TrainingFinished)
    assert finished.update == journal.update()
    first = trainer.pid
    assert failure([train(fault="kill")]) == (
        "worker",
        "the process was killed (SIGKILL): most likely out of memory",
    )
    assert failure([train(fault="raise", value="no sensor")]) == ("worker", "ValueError: no sensor")
    assert trainer.pid != first
    second = trainer.pid
    trainer.train(invitation(fault="stuck"), head(tiny.initial_state(0)), 0.0)
    trainer.cancel(0.0)
    trainer.tick(PATIENCE_S)
    assert trainer.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(second, signal.SIG_DFL)
