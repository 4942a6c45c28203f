"""The evaluator: one request at a time, each with exactly one answer, whatever becomes of the process that holds the task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator import evaluator_messages as msg
from coordinator import run_events as ev
from coordinator.evaluation_worker import EvaluationWorker
from coordinator.evaluator import Evaluator, EvaluatorSpoke, Made
from coordinator.models import ModelStore
from midge.eventqueue import EventQueue
from midge.wire.messages import Evaluation
from tests.machines import version_digest
from tests.unit.tiny_tasks import tiny

ROOT = Path(__file__).parents[2]
BOUND_S = 20.0
DEADLINE_S = 30.0
SCORE = Evaluation(num_examples=4, loss=0.5, metrics={"accuracy": 0.75})


class FakeChild:
    """An evaluating process that the test plays."""

    def __init__(self, module, arguments, on_reply, on_exit, environment) -> None:
        self.module = module
        self.environment = environment
        self.on_reply = on_reply
        self.on_exit = on_exit
        self.requests: list[msg.Request] = []
        self.is_stopped = False

    def send(self, request: bytes) -> None:
        self.requests.append(msgspec.json.decode(request, type=msg.Request))

    def stop(self) -> None:
        self.is_stopped = True


class Talk:
    """An evaluator, and who asks it."""

    def __init__(self, directory: Path) -> None:
        self.now = 100.0
        self.children: list[FakeChild] = []
        self.queue: EventQueue[EvaluatorSpoke] = EventQueue()
        self.evaluator = Evaluator("tiny", directory, self.queue.put, num_threads=2, deadline_s=DEADLINE_S)

    @property
    def child(self) -> FakeChild:
        return self.children[-1]

    def ask(self, *round_nums: int) -> None:
        for round_num in round_nums:
            self.evaluator.ask(ev.EvaluateModel(round_num, version_digest(round_num)), self.now)

    def hear(self) -> list[ev.Event | Made]:
        heard = [self.evaluator.handle(event, self.now) for event in self.queue.take(0.0)]
        return [result for result in heard if result is not None]

    def says(self, reply: msg.Reply, child: FakeChild | None = None) -> list[ev.Event | Made]:
        (child or self.child).on_reply(msgspec.json.encode(reply))
        return self.hear()

    def dies(self, reason: str = "killed", child: FakeChild | None = None) -> list[ev.Event | Made]:
        (child or self.child).on_exit(reason)
        return self.hear()


@pytest.fixture
def talk(tmp_path, monkeypatch):
    made = Talk(tmp_path)

    def start(*arguments) -> FakeChild:
        made.children.append(FakeChild(*arguments))
        return made.child

    monkeypatch.setattr("coordinator.evaluator.Child", start)
    return made


def test_no_process_is_started_before_something_is_asked(talk):
    assert talk.evaluator.deadline() == math.inf
    assert talk.evaluator.tick(1e9) is None
    talk.evaluator.stop()
    assert talk.children == []


def test_the_process_is_told_its_task_and_then_asked(talk, tmp_path):
    talk.ask(1)
    assert talk.child.module == "coordinator.evaluation_worker"
    assert set(talk.child.environment.values()) == {"2"}
    assert talk.child.requests == [
        msg.SetUp(task="tiny", models_dir=str(tmp_path)),
        msg.Evaluate(request=1, digest=version_digest(1)),
    ]
    assert talk.says(msg.Evaluated(request=1, score=SCORE)) == [ev.ModelEvaluated(1, SCORE)]
    assert talk.evaluator.deadline() == math.inf


def test_one_request_is_under_way_and_others_wait_their_turn(talk):
    talk.ask(1, 2)
    assert len(talk.child.requests) == 2
    talk.now += 20
    assert talk.says(msg.Evaluated(request=1, score=SCORE)) == [ev.ModelEvaluated(1, SCORE)]
    assert talk.child.requests[-1] == msg.Evaluate(request=2, digest=version_digest(2))
    assert talk.evaluator.deadline() == talk.now + DEADLINE_S
    assert talk.says(msg.Evaluated(request=2, score=None)) == [ev.ModelEvaluated(2, None)]


def test_how_long_an_evaluation_took_does_not_count_how_long_it_waited(talk):
    talk.ask(1)
    talk.now += 4
    talk.ask(2)
    talk.now += 3
    talk.says(msg.Evaluated(request=1, score=SCORE))
    assert talk.evaluator.last_duration_s == 7
    talk.now += 2
    talk.says(msg.Evaluated(request=2, score=SCORE))
    assert talk.evaluator.last_duration_s == 2


def test_the_first_model_is_made_or_its_reason_is_told(talk):
    talk.evaluator.ask(ev.PrepareModel(7), talk.now)
    assert talk.child.requests[-1] == msg.MakeModel(request=1, seed=7)
    assert talk.says(msg.Made(request=1, digest=version_digest(0))) == [Made(version_digest(0))]
    talk.evaluator.ask(ev.PrepareModel(7), talk.now)
    assert talk.says(msg.Failed(request=2, reason="ValueError: no such network")) == [
        ev.PreparationFailed("the task could not make its model: ValueError: no such network")
    ]


def test_a_first_model_that_cannot_be_stored_is_an_error_of_the_disk_and_not_of_the_task(talk):
    talk.evaluator.ask(ev.PrepareModel(7), talk.now)
    with pytest.raises(OSError, match="No space left on device"):
        talk.says(msg.Failed(request=1, reason="the model cannot be stored", errno=28))
    talk.evaluator.ask(ev.PrepareModel(7), talk.now)
    assert talk.says(msg.Made(request=2, digest=version_digest(0))) == [Made(version_digest(0))]


def test_after_a_reset_no_answer_to_an_earlier_request_is_taken_for_a_later_ones(talk):
    talk.ask(1, 2)
    earlier = talk.child
    talk.evaluator.reset()
    assert earlier.is_stopped
    assert talk.evaluator.deadline() == math.inf
    talk.ask(3)
    assert talk.child is not earlier
    assert talk.says(msg.Evaluated(request=1, score=SCORE), earlier) == []
    assert talk.dies("killed", earlier) == []
    assert talk.says(msg.Evaluated(request=3, score=SCORE)) == [ev.ModelEvaluated(3, SCORE)]


def test_a_failed_evaluation_is_told_with_its_reason(talk):
    talk.ask(1)
    assert talk.says(msg.Failed(request=1, reason="loss is nan")) == [ev.ModelEvaluated(1, None, "loss is nan")]


def test_a_process_that_dies_costs_the_evaluation_under_way_and_no_other(talk):
    talk.ask(1, 2)
    assert talk.dies("the process was killed") == [ev.ModelEvaluated(1, None, "the process was killed")]
    assert len(talk.children) == 2
    assert talk.child.requests[-1] == msg.Evaluate(request=2, digest=version_digest(2))
    assert talk.says(msg.Evaluated(request=2, score=SCORE)) == [ev.ModelEvaluated(2, SCORE)]


def test_a_process_that_dies_while_it_is_idle_is_replaced_for_the_next_request(talk):
    talk.ask(1)
    talk.says(msg.Evaluated(request=1, score=SCORE))
    assert talk.dies("the process was killed") == []
    talk.ask(2)
    assert len(talk.children) == 2
    assert talk.says(msg.Evaluated(request=2, score=SCORE)) == [ev.ModelEvaluated(2, SCORE)]


def test_a_process_that_cannot_be_started_is_a_failed_evaluation(talk, monkeypatch):
    def fails(*_) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.evaluator.Child", fails)
        talk.ask(1)
        (failed,) = talk.hear()
    assert isinstance(failed, ev.ModelEvaluated)
    assert "Cannot allocate memory" in failed.reason
    talk.ask(2)
    assert talk.says(msg.Evaluated(request=2, score=SCORE)) == [ev.ModelEvaluated(2, SCORE)]


def test_what_takes_too_long_is_given_up_and_its_process_ended(talk):
    talk.ask(1, 2)
    late = talk.child
    assert talk.evaluator.tick(talk.now + DEADLINE_S - 0.001) is None
    talk.now += DEADLINE_S
    assert talk.evaluator.tick(talk.now) == ev.ModelEvaluated(1, None, "not done after 30 s (evaluation_deadline_s)")
    assert late.is_stopped
    assert talk.says(msg.Evaluated(request=1, score=SCORE), late) == []
    assert talk.dies("killed", late) == []
    assert talk.says(msg.Evaluated(request=2, score=SCORE)) == [ev.ModelEvaluated(2, SCORE)]


def test_a_first_model_that_takes_too_long_is_a_failed_preparation(talk):
    talk.evaluator.ask(ev.PrepareModel(7), talk.now)
    (failed,) = [talk.evaluator.tick(talk.now + DEADLINE_S)]
    assert isinstance(failed, ev.PreparationFailed)
    assert "not done after 30 s" in failed.reason


def test_after_stopping_nothing_is_heard(talk):
    talk.ask(1)
    talk.evaluator.stop()
    assert talk.child.is_stopped
    assert talk.says(msg.Evaluated(request=1, score=SCORE)) == []


# The process, called in this one.


class Asked:
    """An evaluating process's handler, and its store of models."""

    def __init__(self, directory: Path, task: str, **setup: Any) -> None:
        self.models = ModelStore(directory)
        self.worker = EvaluationWorker()
        self.replies: list[msg.Reply] = []
        self.say(msg.SetUp(task=f"tests.unit.tiny_tasks:{task}", models_dir=str(directory), **setup))

    def say(self, request: msg.Request) -> msg.Reply | None:
        def reply(payload: bytes) -> None:
            self.replies.append(msgspec.json.decode(payload, type=msg.Reply))

        self.worker.handle(msgspec.json.encode(request), reply)
        return self.replies[-1] if self.replies else None

    def evaluate(self) -> msg.Reply | None:
        digest = self.models.save_state(tiny.initial_state(0))
        return self.say(msg.Evaluate(request=1, digest=digest))


def test_a_model_is_made_stored_and_evaluated(tmp_path):
    asked = Asked(tmp_path, "tiny")
    made = asked.say(msg.MakeModel(request=1, seed=3))
    assert isinstance(made, msg.Made)
    with asked.models.open(made.digest) as model:
        assert model.elements.tolist() == [3, 4, 5, 6, 7]
    # The weights 3 to 7 have the mean 5, which is the loss; `worst` is not a number and is left out.
    expected = Evaluation(num_examples=4, loss=5.0, metrics={"accuracy": 0.75})
    assert asked.say(msg.Evaluate(request=2, digest=made.digest)) == msg.Evaluated(request=2, score=expected)


def test_without_test_data_there_is_no_score_and_no_failure(tmp_path):
    assert Asked(tmp_path, "dataless").evaluate() == msg.Evaluated(request=1, score=None)


def test_a_task_that_reads_test_data_from_disk_is_told_where_and_whether_it_may_fetch_them(tmp_path):
    answer = Asked(tmp_path, "on_disk", data_dir="/data").evaluate()
    assert answer == msg.Failed(request=1, reason="no test data in /data: put some there")
    answer = Asked(tmp_path, "on_disk").evaluate()
    assert answer == msg.Failed(request=1, reason="no test data in None: put some there")
    answer = Asked(tmp_path, "on_disk", data_dir="/data", download=True).evaluate()
    assert isinstance(answer, msg.Evaluated)
    assert answer.score.num_examples == 3


def test_a_score_with_a_thousand_metrics_of_numpy_is_cut_to_what_can_travel(tmp_path):
    answer = Asked(tmp_path, "lavish").evaluate()
    assert isinstance(answer, msg.Evaluated)
    assert (answer.score.num_examples, answer.score.loss, len(answer.score.metrics)) == (4, 0.25, 64)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("diverged", "loss is nan over 4 examples: the model diverged"),
        ("infinite", "loss is inf over 4 examples: the model diverged"),
        ("empty", "loss is 0.0 over 0 examples: the model diverged (lower learning_rate), or there are no test data"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_a_score_that_says_nothing_is_a_failure_with_its_reason(tmp_path, task, reason):
    answer = Asked(tmp_path, task).evaluate()
    assert isinstance(answer, msg.Failed)
    assert reason in answer.reason


def test_a_task_that_cannot_make_a_model_says_why(tmp_path):
    answer = Asked(tmp_path, "diverged").say(msg.MakeModel(request=1, seed=0))
    assert answer == msg.Failed(request=1, reason="ValueError: no such network")


def test_a_model_that_is_not_in_the_store_is_a_failure(tmp_path):
    answer = Asked(tmp_path, "tiny").say(msg.Evaluate(request=1, digest="ab" * 32))
    assert isinstance(answer, msg.Failed)
    assert "is not in" in answer.reason


# With a real one.


def test_a_real_process_makes_a_model_and_evaluates_it_and_one_that_is_killed_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    queue: EventQueue[EvaluatorSpoke] = EventQueue()
    models = ModelStore(tmp_path)
    answers = []
    for task in ("tiny", "deadly"):
        evaluator = Evaluator(f"tests.unit.tiny_tasks:{task}", tmp_path, queue.put)
        evaluator.ask(ev.PrepareModel(0), 0.0)
        digest = models.save_state({"w": np.arange(5, dtype=np.float32), "n": np.array(0, np.int64)})
        evaluator.ask(ev.EvaluateModel(0, digest), 0.0)
        for _ in range(2):
            (event,) = queue.take(BOUND_S, max_events=1)
            answers.append(evaluator.handle(event, 0.0))
        evaluator.stop()
    score = Evaluation(num_examples=4, loss=2.0, metrics={"accuracy": 0.75})
    assert answers[:2] == [Made(digest), ev.ModelEvaluated(0, score)]
    reason = "the process was killed (SIGKILL): most likely out of memory"
    assert answers[2:] == [Made(digest), ev.ModelEvaluated(0, None, reason)]
