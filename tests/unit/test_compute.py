"""Computations off the loop: an event follows each, whatever becomes of it, and house-keeping troubles nobody."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.compute import Compute, Computed
from coordinator.evaluator import EvaluatorSpoke, Made
from coordinator.models import ModelStore
from coordinator.spool import Spool
from coordinator.strategies import FedAvg, FedAvgM
from midge.eventqueue import EventQueue
from midge.wire.frames import FLOAT32, Framing, content_tag, encode_frame, run_tag, update_digest
from midge.wire.messages import Evaluation

ROOT = Path(__file__).parents[2]
BOUND_S = 20.0


class BrokenStrategy(FedAvg):
    """It raises what nobody expected."""

    def weight(self, num_examples: int) -> float:
        raise KeyError("no such weight")


class Talk:
    """Computations for a model of five zeros in frames of two, and updates that are in the spool."""

    def __init__(self, directory: Path, strategy: Any = None, max_step_ratio: float = 0.0) -> None:
        self.spool = Spool(directory / "spool")
        self.models = ModelStore(directory / "models")
        self.queue: EventQueue[Computed | EvaluatorSpoke] = EventQueue()
        self.compute = Compute(
            "r1",
            "tests.unit.tiny_tasks:tiny",
            self.spool,
            self.models,
            strategy or FedAvg(),
            self.queue.put,
            max_step_ratio=max_step_ratio,
        )
        self.compute.framing = Framing(5, 2)
        self.base = self.first = self.models.save_state({"w": np.zeros(5, np.float32)})

    def update(self, agent_id: str, value: float, num_examples: int, num_frames: int = 3) -> ev.AcceptedUpdate:
        """An update of five times `value`, of which so many frames came."""
        bodies = [np.full(size, value, "<f4").tobytes() for size in (2, 2, 1)]
        digest = update_digest(hashlib.sha256(body).digest() for body in bodies)
        for index, body in enumerate(bodies[:num_frames]):
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("r1"),
                round_num=1,
                index=index,
                num_elements=len(body) // 4,
                content_tag=content_tag(digest),
                body=body,
            )
            self.spool.round("r1", 1).append(agent_id, frame, hashlib.sha256(body).digest(), 0.0)
        return ev.AcceptedUpdate(agent_id, 1, digest, num_examples, (), 0.0)

    def aggregate(self, *updates: ev.AcceptedUpdate, base: str = "") -> ev.Event:
        self.compute.ask(ev.AggregateUpdates(1, base or self.base, updates), 0.0)
        (event,) = self.queue.take(BOUND_S)
        assert isinstance(event, Computed)
        return event.event


@pytest.fixture
def talk(tmp_path):
    made = Talk(tmp_path)
    yield made
    made.compute.stop()
    made.spool.close()


def test_updates_are_averaged_and_the_next_model_is_stored(talk):
    # (1 * 1.0 + 3 * 2.0) / 4 = 1.75, and from 0 it is sqrt(5 * 1.75^2) far.
    event = talk.aggregate(talk.update("a", 1.0, 1), talk.update("b", 2.0, 3))
    assert isinstance(event, ev.UpdatesAggregated)
    assert event.delta_norm == pytest.approx(np.sqrt(5) * 1.75, rel=1e-12)
    with talk.models.open(event.digest) as model:
        assert model.elements.tolist() == [1.75] * 5


def test_an_update_whose_frames_are_not_all_there_breaks_the_aggregation_with_its_name(talk):
    event = talk.aggregate(talk.update("a", 1.0, 1), talk.update("b", 2.0, 3, num_frames=2))
    assert isinstance(event, ev.AggregationBroke)
    assert "b" in event.reason
    assert talk.models.digests() == {talk.base}


def test_a_base_that_is_not_there_breaks_the_aggregation(talk):
    event = talk.aggregate(talk.update("a", 1.0, 1), base="ab" * 32)
    assert isinstance(event, ev.AggregationBroke)
    assert f"model {'ab' * 32} is not in" in event.reason


def fails_with(number: int) -> Any:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fails


def test_a_full_disk_is_no_fault_of_the_updates_and_is_raised_as_what_it_is(talk, monkeypatch):
    """So it costs no attempt: the run waits until there is room."""
    monkeypatch.setattr(talk.models, "writer", fails_with(errno.ENOSPC))
    talk.compute.ask(ev.AggregateUpdates(1, talk.base, (talk.update("a", 1.0, 1),)), 0.0)
    (computed,) = talk.queue.take(BOUND_S)
    with pytest.raises(OSError, match="No space left on device"):
        talk.compute.take(computed)


def test_an_error_of_the_system_that_will_not_pass_breaks_the_aggregation(talk, monkeypatch):
    monkeypatch.setattr(talk.models, "writer", fails_with(errno.EBADF))
    event = talk.aggregate(talk.update("a", 1.0, 1))
    assert event == ev.AggregationBroke("the disk failed: [Errno 9] Bad file descriptor")


def test_what_was_asked_for_before_a_reset_is_told_to_nobody(talk, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    writer = talk.models.writer

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(BOUND_S)
        return writer(*arguments)

    monkeypatch.setattr(talk.models, "writer", slow)
    command = ev.AggregateUpdates(1, talk.base, (talk.update("a", 1.0, 1),))
    talk.compute.ask(command, 0.0)  # under way when the reset comes
    assert begun.wait(BOUND_S)
    talk.compute.ask(command, 0.0)  # waits its turn, and is never begun
    talk.compute.reset()
    go_on.set()
    talk.compute.ask(command, 0.0)
    seen = []
    while sum(taken is not None for taken in seen) == 0:
        seen += [talk.compute.take(computed) for computed in talk.queue.take(BOUND_S)]
    assert [taken is None for taken in seen] == [True, False]


def test_a_strategy_that_raises_anything_breaks_the_aggregation_and_not_the_thread(tmp_path):
    talk = Talk(tmp_path, BrokenStrategy())
    update = talk.update("a", 1.0, 1)
    for _ in range(2):
        assert talk.aggregate(update) == ev.AggregationBroke("KeyError: 'no such weight'")
    talk.compute.stop()
    talk.spool.close()


def test_a_step_that_explodes_breaks_the_aggregation_with_what_to_do(tmp_path):
    talk = Talk(tmp_path, FedAvg(server_learning_rate=100), max_step_ratio=10)
    talk.base = talk.models.save_state({"w": np.ones(5, np.float32)})
    event = talk.aggregate(
        talk.update("a", 2.0, 1)
    )  # 100 times the delta of 1: the model has norm sqrt(5), the step 100 sqrt(5)
    assert isinstance(event, ev.AggregationBroke)
    assert event.reason.startswith(
        "the step has norm 224, the global model 2.24: 100 times as much, and max_step_ratio is 10, after FedAvg("
    )
    assert talk.models.digests() - {talk.base} == {talk.first}
    talk.compute.stop()
    talk.spool.close()


def test_what_the_strategy_remembers_goes_from_one_aggregation_to_the_next(tmp_path):
    talk = Talk(tmp_path, FedAvgM(momentum=0.5))
    update = talk.update("a", 2.0, 1)
    first = talk.aggregate(update)
    assert isinstance(first, ev.UpdatesAggregated)
    assert first.server_state is not None
    # v = 2, w = 2;  then a delta of 0: v = 1, w = 3
    talk.compute.ask(ev.AggregateUpdates(1, first.digest, (update,), first.server_state), 0.0)
    (event,) = talk.queue.take(BOUND_S)
    assert isinstance(event, Computed)
    assert isinstance(event.event, ev.UpdatesAggregated)
    with talk.models.open(event.event.digest) as model:
        assert model.elements.tolist() == [3.0] * 5
    talk.compute.stop()
    talk.spool.close()


def test_an_aggregation_before_the_framing_is_known_breaks_too(talk):
    talk.compute.framing = None
    assert isinstance(talk.aggregate(talk.update("a", 1.0, 1)), ev.AggregationBroke)


def test_house_keeping_is_done_between_aggregations_and_its_errors_are_logged(talk, caplog):
    order: list[str] = []
    gate = threading.Event()

    def keep() -> None:
        assert gate.wait(BOUND_S)
        order.append("kept")
        raise OSError("no such file")

    talk.compute.later(keep)
    update = talk.update("a", 1.0, 1)
    talk.compute.ask(ev.AggregateUpdates(1, talk.base, (update,)), 0.0)
    assert talk.queue.take(0.0) == []
    gate.set()
    (event,) = talk.queue.take(BOUND_S)
    assert isinstance(event, Computed)
    assert isinstance(event.event, ev.UpdatesAggregated)
    assert order == ["kept"]
    assert "house-keeping failed" in caplog.text


def test_models_and_evaluations_are_asked_of_the_evaluator_with_its_deadline(talk, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    talk.compute.ask(ev.PrepareModel(0), 100.0)
    assert talk.compute.deadline() == 700.0
    (event,) = talk.queue.take(BOUND_S)
    made = talk.compute.handle(event, 101.5)
    assert isinstance(made, Made)
    talk.compute.ask(ev.EvaluateModel(0, made.digest), 200.0)
    (event,) = talk.queue.take(BOUND_S)
    score = Evaluation(num_examples=4, loss=2.0, metrics={"accuracy": 0.75})
    assert talk.compute.handle(event, 202.5) == ev.ModelEvaluated(0, score)
    assert talk.compute.last_evaluation_s == 2.5
    talk.compute.ask(ev.EvaluateModel(0, made.digest), 300.0)
    late = talk.compute.tick(900.0)
    assert late == ev.ModelEvaluated(0, None, "not done after 600 s (evaluation_deadline_s)")


def test_an_aggregation_that_takes_too_long_is_given_up_and_its_result_is_not_heard_of(tmp_path, monkeypatch):
    talk = Talk(tmp_path)
    talk.compute._deadline_s = 60.0
    began, gate = threading.Event(), threading.Event()
    open_model = talk.models.open

    def open_slowly(digest: str) -> Any:
        began.set()
        assert gate.wait(BOUND_S)
        return open_model(digest)

    monkeypatch.setattr(talk.models, "open", open_slowly)
    talk.compute.ask(ev.AggregateUpdates(1, talk.base, (talk.update("a", 1.0, 1),)), 100.0)
    assert talk.compute.deadline() == talk.compute.ends_by("aggregation") == 160.0
    assert began.wait(BOUND_S)
    assert talk.compute.tick(159.0) is None
    late = talk.compute.tick(160.0)
    assert late == ev.AggregationBroke("averaging was not done after 60 s (aggregation_deadline_s)")
    assert talk.compute.deadline() == math.inf
    gate.set()
    (computed,) = talk.queue.take(BOUND_S)
    assert isinstance(computed, Computed)
    assert talk.compute.take(computed) is None
    talk.compute.stop()
    talk.spool.close()


def test_a_computation_that_does_not_end_keeps_nobody_from_stopping(talk, caplog):
    began, gate = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        gate.wait(BOUND_S)

    talk.compute.later(work)
    assert began.wait(BOUND_S)
    talk.compute.stop(timeout_s=0.01)
    assert "a computation did not end in time" in caplog.text
    gate.set()


def test_stopping_ends_an_aggregation_at_its_next_block(talk, monkeypatch):
    """All that is under way is given up; the round is aggregated anew after the restart."""
    began, gate = threading.Event(), threading.Event()
    open_model = talk.models.open

    def open_slowly(digest: str) -> Any:
        began.set()
        assert gate.wait(BOUND_S)
        return open_model(digest)

    monkeypatch.setattr(talk.models, "open", open_slowly)
    talk.compute.ask(ev.AggregateUpdates(1, talk.base, (talk.update("a", 1.0, 1),)), 0.0)
    assert began.wait(BOUND_S)
    threading.Timer(0.02, gate.set).start()
    talk.compute.stop(BOUND_S)
    (computed,) = talk.queue.take(BOUND_S)
    assert isinstance(computed, Computed)
    assert computed.event == ev.AggregationBroke("nobody waits for it any more")
    assert talk.compute.take(computed) is None
    assert talk.models.digests() == {talk.base}


def test_stopping_keeps_house_as_was_asked_and_averages_no_more(talk):
    """Else frames and models of the last round would lie there until another run begins, and agents' models be lost."""
    done: list[str] = []
    began, gate = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert gate.wait(BOUND_S)
        done.append("under way")

    talk.compute.later(work)
    talk.compute.ask(ev.AggregateUpdates(1, talk.base, (talk.update("a", 1.0, 1),)), 0.0)
    talk.compute.later(lambda: done.append("asked for"))
    assert began.wait(BOUND_S)
    threading.Timer(0.02, gate.set).start()
    talk.compute.stop()
    assert done == ["under way", "asked for"]
    assert talk.queue.take(0.0) == []
    assert talk.models.digests() == {talk.base}
