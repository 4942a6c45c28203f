"""What the federation is compared with, computed in a process of its own: `python -m coordinator.experiment.baselines`.

It trains on the first agent's data alone, then on all data in one place, with the task's own code, from the federation's
first model, on the same budget of epochs. As many epochs as an agent makes in a round are one round here: training alone is
what the first agent does when nobody else takes part, with the seeds that it had. The process also tests the federation's
last model label by label, and draws the report: so neither torch nor matplotlib is ever loaded where the agents are waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from coordinator.experiment.demo_report import Learned, Report, Round
from coordinator.models import ModelStore
from midge.tasks.base import DataSpec, State, TrainSpec, seed_of
from midge.tasks.process import serve

if TYPE_CHECKING:
    from midge.tasks.digits import DigitsTask

SINGLE_AGENT = "single_agent"
CENTRALIZED = "centralized"


class Compare(msgspec.Struct, frozen=True, kw_only=True, tag="compare"):
    """Train both, and test all three.

    Attributes:
        models_dir: where the federation's models lie.
        last_digest: of its last model.
        rounds: as many as it had.
        training: the round's configuration, without its seed.
        seed: of the run.
        data_seed: of the agents' choice of data.
        agent_id: of the first agent.
        classes: the labels that it owns.
        sel_prob: its share of those.
        def_prob: its share of the others.
    """

    models_dir: str
    last_digest: str
    rounds: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    data_seed: int
    agent_id: str
    classes: tuple[int, ...]
    sel_prob: float
    def_prob: float


class Draw(msgspec.Struct, frozen=True, kw_only=True, tag="draw"):
    """Draw the report into a PNG file."""

    report: Report
    path: str


class Advanced(msgspec.Struct, frozen=True, kw_only=True, tag="advanced"):
    """A round of one way of learning is done."""

    way: str
    round: Round


class Compared(msgspec.Struct, frozen=True, kw_only=True, tag="compared"):
    """What all three came to. Of the federation only what is found by testing is filled in."""

    federated: Learned
    single_agent: Learned
    centralized: Learned


class Drawn(msgspec.Struct, frozen=True, kw_only=True, tag="drawn"):
    """The file is written."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot be done."""

    reason: str


Request = Compare | Draw
Reply = Advanced | Compared | Drawn | Failed

encode = msgspec.json.Encoder().encode
decode_reply = msgspec.json.Decoder(Reply).decode
_decode_request = msgspec.json.Decoder(Request).decode


class _Comparison:
    """The data, and how each model does on them."""

    def __init__(self, job: Compare, reply: Callable[[bytes], None]) -> None:
        began = time.monotonic()
        from midge.tasks.digits import DigitsTask  # noqa: PLC0415  the parent imports this file for its messages

        self._job = job
        self._reply = reply
        self._task: DigitsTask = DigitsTask()
        self._test = self._task.test_data()
        images, labels = self._test
        others = np.flatnonzero(~np.isin(labels.numpy(), job.classes))
        self._others = (images[others], labels[others])
        self._start_s = time.monotonic() - began

    def run(self) -> Compared:
        """Train both and test all three."""
        job = self._job
        own = DataSpec(classes=job.classes, sel_prob=job.sel_prob, def_prob=job.def_prob, seed=job.data_seed)
        with ModelStore(Path(job.models_dir)).open(job.last_digest) as model:
            federated = self._tested(model.state(), [], 0.0)
        return Compared(
            federated=federated,
            single_agent=self._train(SINGLE_AGENT, job.agent_id, own),
            centralized=self._train(CENTRALIZED, CENTRALIZED, DataSpec()),
        )

    def _train(self, way: str, seed_name: str, spec: DataSpec) -> Learned:
        job, task = self._job, self._task
        data, state = task.load_data(spec), task.initial_state(job.seed)
        rounds: list[Round] = []
        for number in range(1, job.rounds + 1):
            began = time.monotonic()
            training = TrainSpec(
                local_epochs=job.local_epochs,
                batch_size=job.batch_size,
                learning_rate=job.learning_rate,
                seed=seed_of(job.seed, number, seed_name),
            )
            state = task.train(state, data, training, _nothing).state
            duration_s = time.monotonic() - began
            score = task.evaluate(state, self._test)
            accuracy = score.metrics["accuracy"]
            rounds.append(Round(round=number, accuracy=accuracy, loss=score.loss, duration_s=duration_s))
            self._reply(encode(Advanced(way=way, round=rounds[-1])))
        return self._tested(state, rounds, self._start_s + sum(one.duration_s for one in rounds))

    def _tested(self, state: State, rounds: Sequence[Round], wall_s: float) -> Learned:
        score = self._task.evaluate(state, self._test)
        by_label = self._task.accuracy_by_label(state, self._test)
        return Learned(
            accuracy=score.metrics["accuracy"],
            loss=score.loss,
            accuracy_other_labels=self._task.evaluate(state, self._others).metrics["accuracy"],
            accuracy_by_label={str(label): accuracy for label, accuracy in by_label.items()},
            wall_s=wall_s,
            rounds=list(rounds),
        )


def _handle(payload: bytes, reply: Callable[[bytes], None]) -> None:
    request = _decode_request(payload)
    try:
        reply(encode(_answer(request, reply)))
    except Exception as error:  # noqa: BLE001  whatever it is, the demonstration says so and ends
        reply(encode(Failed(reason=f"{type(error).__name__}: {error}")))


def _answer(request: Request, reply: Callable[[bytes], None]) -> Reply:
    if isinstance(request, Compare):
        return _Comparison(request, reply).run()
    from coordinator.experiment.demo_picture import draw  # noqa: PLC0415  with it comes matplotlib

    draw(request.report, Path(request.path))
    return Drawn()


def _nothing(_: Any) -> None:
    """A round here is too short to report a part of it."""


def main() -> None:
    """Entry point of the process."""
    serve(_handle, lambda _: False)


if __name__ == "__main__":
    main()
