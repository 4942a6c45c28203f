"""The worker, called in this process: what it writes adds up, and whatever a task does wrong is a failure with its reason."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import worker_messages as msg
from edge_agent.journal import Journal
from edge_agent.worker import Worker
from midge.tasks.base import seed_of
from midge.tasks.flatten import layout_of, state_to_vector
from midge.tasks.summary import DataSummary
from midge.wire.frames import FLOAT32, Framing, content_tag, decode_frame, run_tag, update_digest
from midge.wire.layout import model_hash
from midge.wire.messages import Evaluation, Head, TrainingConfig, UpdateHeader, decode, encode
from tests.unit.tiny_tasks import tiny

RUN_ID = "tiny-1"
SEED = 7


def head(state: Any, frame_elements: int = 2) -> Head:
    layout = layout_of(state)
    vector, counters = state_to_vector(state, layout)
    hasher = model_hash(layout, counters)
    hasher.update(vector.tobytes())
    return Head(
        run_id=RUN_ID,
        epoch=1,
        round_num=2,
        slot=0,
        model_digest=hasher.hexdigest(),
        layout=layout.tensors,
        frame_elements=frame_elements,
        codec="float32",
        counters=counters,
        task="tiny",
    )


class Told:
    """A worker, and what it replied. Its task is `task`, and its agent has part 2 of the data."""

    def __init__(self, directory: Path, task: str = "tiny") -> None:
        self.journal = Journal(directory)
        self.worker = Worker()
        self.replies: list[msg.Reply] = []
        self._num_requests = 0
        options = msg.DataOptions(part=2, num_parts=3)
        self.say(msg.SetUp(agent_id="pi-1", task=f"tests.unit.tiny_tasks:{task}", data=options))

    def say(self, request: msg.Request) -> None:
        payload = msgspec.json.encode(request)
        if not self.worker.interrupt(payload):
            self.worker.handle(payload, lambda reply: self.replies.append(msgspec.json.decode(reply, type=msg.Reply)))

    def train(
        self,
        frame_elements: int = 2,
        state: Any = None,
        proximal_mu: float = 0.0,
        evaluate_every: int = 1,
        **options: Any,
    ) -> msg.Reply:
        """Train once, from version 2 and with these options of the task; returns the last reply."""
        state = tiny.initial_state(0) if state is None else state
        self._num_requests += 1
        of_model = head(state, frame_elements)
        vector, _ = state_to_vector(state, layout_of(state))
        self.journal.model_path.write_bytes(vector.tobytes())
        self.say(
            msg.TrainModel(
                request=self._num_requests,
                run_id=RUN_ID,
                round_num=3,
                training=TrainingConfig(proximal_mu=proximal_mu, evaluate_every=evaluate_every, extra=options),
                run_seed=SEED,
                head=of_model,
                model_path=str(self.journal.model_path),
                update_path=str(self.journal.update_path),
            )
        )
        return self.replies[-1]


@pytest.fixture
def told(tmp_path):
    made = Told(tmp_path)
    yield made
    made.journal.close()


def refusal(reply: msg.Reply) -> tuple[str, str]:
    assert isinstance(reply, msg.Failed), reply
    return reply.reason, reply.detail


def test_an_update_is_on_disk_when_the_worker_says_so_and_its_header_tells_all(told):
    assert told.train() == msg.Finished(request=1)
    update = told.journal.update()
    assert update is not None
    assert (update.run_id, update.round_num, update.num_frames, update.num_examples) == (RUN_ID, 3, 3, 3)
    assert update.model_digest == head(tiny.initial_state(0)).model_digest
    assert update.layout_digest == layout_of(tiny.initial_state(0)).digest
    assert update.counters == (1,)
    assert update.metrics == {"loss": 0.5, "seed": float(seed_of(SEED, 3, "pi-1") % 1000)}
    # Before training the weights are 0, 1, 2, 3, 4, and their mean is 2.
    assert update.evaluation == Evaluation(num_examples=3, loss=2.0, metrics={"accuracy": 0.75})
    assert update.training_s >= 0


def test_a_task_that_knows_of_no_proximal_term_refuses_one_and_says_what_to_do(told, monkeypatch):
    reason, detail = refusal(told.train(proximal_mu=0.5))
    assert reason == "task"
    assert detail.startswith(
        "task tiny knows no proximal term (fedprox, mu 0.5): add TrainSpec.proximal_mu to its loss"
    )
    seen = []
    monkeypatch.setattr(type(tiny), "supports_proximal", True, raising=False)
    train = type(tiny).train
    monkeypatch.setattr(type(tiny), "train", lambda *args: seen.append(args[3].proximal_mu) or train(*args))
    assert told.train(proximal_mu=0.5) == msg.Finished(request=2)
    assert seen == [0.5]


@pytest.mark.parametrize("frame_elements", [1, 2, 4, 5, 100])
def test_frames_decode_to_what_was_trained_and_add_up_to_the_digest(told, frame_elements):
    told.train(frame_elements)
    update = told.journal.update()
    framing = Framing(5, min(frame_elements, 5))
    frames = [decode_frame(told.journal.read_frame(update, index)) for index in range(update.num_frames)]
    assert update.num_frames == framing.num_frames
    assert update.frames_bytes == 5 * 4 + framing.num_frames * 40
    assert struct.unpack("<5f", b"".join(frame.body for frame in frames)) == (0.5, 1.5, 2.5, 3.5, 4.5)
    assert update_digest(hashlib.sha256(frame.body).digest() for frame in frames) == update.update_digest
    for index, frame in enumerate(frames):
        start, stop = framing.span(index)
        assert (frame.index, frame.num_elements, frame.round_num, frame.codec) == (index, stop - start, 3, FLOAT32)
        assert (frame.run_tag, frame.content_tag) == (run_tag(RUN_ID), content_tag(update.update_digest))


def test_progress_is_told_from_the_beginning(told):
    told.train()
    assert told.replies == [
        msg.Progressed(request=1, fraction=0.0),
        msg.Progressed(request=1, fraction=0.25),
        msg.Finished(request=1),
    ]


def test_the_same_round_trained_again_gives_the_same_bytes(told):
    told.train()
    first, path = told.journal.update(), told.journal.update_path
    frames = path.read_bytes()[: first.frames_bytes]
    told.train()
    assert told.journal.update().update_digest == first.update_digest
    assert path.read_bytes()[: first.frames_bytes] == frames


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("raise", "worker", "ValueError: the sensor is broken"),
        ("task", "task", "no labels: put some beside the images"),
        ("memory", "memory", "out of memory while training"),
        ("disk", "disk", "FileNotFoundError: [Errno 2] No such file or directory: 'images.npz'"),
        ("unplugged", "worker", "OSError: the sensor is unplugged"),
        ("nobody", "task", "tiny-1: training used 0 examples, expected at least 1"),
    ],
)
def test_what_a_task_raises_is_a_failure_with_its_reason(told, fault, reason, detail):
    assert refusal(told.train(fault=fault, value="the sensor is broken")) == (reason, detail)
    assert told.journal.update() is None
    assert told.train() == msg.Finished(request=2)


def test_a_state_of_another_shape_is_a_failure_that_names_the_tensor(told):
    reason, detail = refusal(told.train(fault="wider"))
    assert reason == "layout"
    assert "w (6,) float32" in detail


def test_a_model_that_is_not_the_task_s_own_is_refused_before_any_training(told):
    state = {"w": np.zeros((5, 1), np.float32), "n": np.array(0, np.int64)}
    reason, detail = refusal(told.train(state=state))
    assert reason == "layout"
    assert detail == (
        "round 3: this agent's model has w (5,) float32, expected (5, 1) float32: it is not the run's; give agent and "
        "coordinator the same version of task tiny"
    )
    assert msg.Progressed(request=1, fraction=0.0) not in told.replies
    assert told.train() == msg.Finished(request=2)


def test_tensors_in_another_order_are_the_same_model(told):
    state = tiny.initial_state(0)
    assert told.train(state={name: state[name] for name in reversed(state)}) == msg.Finished(request=1)


@pytest.mark.parametrize(("evaluate_every", "is_evaluated"), [(1, True), (2, True), (3, False)])
def test_a_version_is_evaluated_where_its_number_is_a_multiple(told, evaluate_every, is_evaluated):
    assert told.train(evaluate_every=evaluate_every) == msg.Finished(request=1)
    update = told.journal.update()
    assert (update.evaluation is not None) == is_evaluated
    assert update.metrics["loss"] == 0.5  # it was trained all the same


def test_a_round_is_told_of_before_the_evaluation_and_the_training(tmp_path):
    told = Told(tmp_path, "following")
    assert told.train(width=3) == msg.Finished(request=1)
    assert told.worker._task.seen == ["round 3, width 3", "evaluate", "train in round 3"]
    told.journal.close()


def test_a_long_explanation_is_cut_to_what_a_message_holds(told):
    _, detail = refusal(told.train(fault="raise", value="x" * 200))
    assert detail == "ValueError: " + "x" * 200
    told.say(msg.SetUp(agent_id="a", task="tests.unit.tiny_tasks:" + "x" * 900, data=msg.DataOptions()))
    told.worker._task = None
    assert len(refusal(told.train())[1]) == 500


def test_a_model_that_is_not_on_disk_is_a_failure_of_the_disk(told, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: None)
    reason, detail = refusal(told.train())
    assert reason == "disk"
    assert "model.bin" in detail


def test_a_full_disk_is_a_failure_that_says_so(told):
    told.journal.update_path.symlink_to("/dev/full")
    reason, detail = refusal(told.train())
    assert reason == "disk"
    assert "No space left on device" in detail


@pytest.mark.parametrize(
    ("task", "reason", "detail"),
    [
        ("dataless", "data", "no examples in None: put some there"),
        ("nothing", "task", "has no 'nothing'"),
    ],
)
def test_a_task_that_cannot_be_loaded_fails_each_training(tmp_path, task, reason, detail):
    told = Told(tmp_path, task)
    for _ in range(2):
        seen = refusal(told.train())
        assert seen[0] == reason
        assert detail in seen[1]
    told.journal.close()


def test_a_check_says_what_the_data_are_and_they_stay_for_the_training(told, capfd):
    told.say(msg.CheckData())
    assert told.replies == [msg.DataChecked(summary=DataSummary(num_examples=3))]
    assert told.train() == msg.Finished(request=1)
    assert capfd.readouterr().out.count("loading") == 1


@pytest.mark.parametrize(
    ("task", "reason", "detail"),
    [
        ("dataless", "data", "no examples in None: put some there"),
        ("unfed", "data", "task unfed: no examples; look at what load_data reads and at the partition"),
        ("clumsy", "data", "task clumsy: loading its data failed: KeyError: 'label'"),
        ("unplugged", "data", "task unplugged: loading its data failed: FileNotFoundError: [Errno 2] No such file"),
        ("greedy", "memory", "out of memory while"),
        ("nothing", "task", "has no 'nothing'"),
    ],
)
def test_data_that_cannot_be_used_are_refused_for_the_same_reason_as_a_check_gives(tmp_path, task, reason, detail):
    told = Told(tmp_path, task)
    told.say(msg.CheckData())
    (checked,) = told.replies
    assert checked.summary is None
    assert (checked.reason, detail in checked.detail) == (reason, True), checked
    seen = refusal(told.train())
    assert (seen[0], detail in seen[1]) == (reason, True), seen
    told.journal.close()


def test_data_that_came_after_the_check_are_trained_on(tmp_path):
    told = Told(tmp_path, "late")
    told.say(msg.CheckData())
    assert told.replies[0].detail == "not yet"
    assert told.train() == msg.Finished(request=1)
    told.journal.close()


def test_data_are_loaded_once(told, capfd):
    told.train()
    told.train()
    assert capfd.readouterr().out.count("loading") == 1


def test_an_evaluation_that_is_not_finite_is_left_out_and_the_update_goes(told):
    state = {"w": np.array([np.inf, 0, 0, 0, 0], np.float32), "n": np.array(0, np.int64)}
    assert told.train(state=state) == msg.Finished(request=1)
    assert told.journal.update().evaluation is None


@pytest.mark.parametrize("task", ["infinite", "diverged", "empty"])
def test_a_score_that_says_nothing_is_left_out_and_the_update_goes(tmp_path, task):
    told = Told(tmp_path, task)
    assert told.train() == msg.Finished(request=1)
    assert told.journal.update().evaluation is None
    told.journal.close()


def test_weights_that_are_not_finite_go_as_they_are_for_the_coordinator_to_reject(told):
    assert told.train(fault="not finite") == msg.Finished(request=1)
    frame = decode_frame(told.journal.read_frame(told.journal.update(), 0))
    assert np.isnan(np.frombuffer(frame.body, "<f4")).all()


@pytest.mark.parametrize("fault", ["metrics", "many", "numpy"])
def test_whatever_metrics_a_task_reports_the_header_can_be_sent(told, fault):
    assert told.train(fault=fault) == msg.Finished(request=1)
    update = told.journal.update()
    expected = {
        "metrics": {"x" * 64: 1.0, "good": -1e300},
        "many": {f"accuracy of label {label}": 1.0 for label in range(64)},
        "numpy": {"loss": 0.5, "accuracy": 0.25},
    }
    assert update.metrics == expected[fault]
    header = UpdateHeader(
        run_id=RUN_ID,
        epoch=1,
        round_num=3,
        attempt=1,
        model_digest=update.model_digest,
        layout_digest=update.layout_digest,
        update_digest=update.update_digest,
        num_frames=update.num_frames,
        num_examples=update.num_examples,
        counters=update.counters,
        metrics=update.metrics,
        evaluation=update.evaluation,
    )
    assert decode(encode(header), UpdateHeader) == header


def test_progress_of_any_kind_of_number_is_a_fraction(told):
    told.train(fault="numpy")
    fractions = [reply.fraction for reply in told.replies if isinstance(reply, msg.Progressed)]
    assert fractions == [0.0, 0.25, 0.5, 1.0, 0.0, 0.0]


def test_a_cancelled_training_lets_go_at_its_next_word_and_leaves_no_update(told):
    told.say(msg.CancelTraining(request=1))
    assert told.train() == msg.Cancelled(request=1)
    assert told.journal.update() is None
    assert told.train() == msg.Finished(request=2)


def test_a_cancellation_in_the_midst_of_a_training_ends_it(told):
    def cancel_at_first_word(reply: bytes) -> None:
        told.replies.append(msgspec.json.decode(reply, type=msg.Reply))
        assert told.worker.interrupt(msgspec.json.encode(msg.CancelTraining(request=1)))

    told.train()
    told.replies.clear()
    request = msg.TrainModel(
        request=1,
        run_id=RUN_ID,
        round_num=3,
        training=TrainingConfig(),
        run_seed=SEED,
        head=head(tiny.initial_state(0)),
        model_path=str(told.journal.model_path),
        update_path=str(told.journal.update_path),
    )
    told.worker.handle(msgspec.json.encode(request), cancel_at_first_word)
    assert told.replies == [msg.Progressed(request=1, fraction=0.0), msg.Cancelled(request=1)]


def test_a_late_cancellation_of_an_earlier_training_is_none_of_this_one(told):
    told.train()
    told.say(msg.CancelTraining(request=1))
    assert told.train() == msg.Finished(request=2)
