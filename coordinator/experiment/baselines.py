"""What a federation is compared with, computed in a process of its own: `python -m coordinator.experiment.baselines`.

It trains on one agent's data alone, or on all data in one place, with the task's own code, from the federation's first model.
As many epochs as an agent makes in a round are one round here: training alone is what an agent does when nobody else takes
part, with the seeds that it had. The process also tests models label by label and agent by agent, and draws: so neither torch
nor matplotlib is ever loaded where the agents are waited for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.experiment.demo_report import Report
from coordinator.experiment.holding import Holding
from coordinator.experiment.scores import Assessed, Held, LabelScore, RoundScore, Score
from coordinator.models import ModelStore
from midge.tasks.base import FollowsRounds, State, Task, TaskError, TrainSpec, seed_of, test_data_of
from midge.tasks.inspection import labels_of
from midge.tasks.process import serve
from midge.tasks.registry import find_task
from midge.wire.messages import TrainingConfig

_MAX_READ = 20_000
"""Data sets of more examples, whose labels can only be had by reading each, are not read for them."""
CENTRALIZED = "centralized"
"""Who trains on all data in one place, for `seed_of`."""


class Survey(msgspec.Struct, frozen=True, kw_only=True, tag="survey"):
    """Look at everybody's data, and at what the task can tell.

    Attributes:
        test: where the test data are.
        central: all data in one place; None where nobody asks.
    """

    task: str
    test: Holding
    agents: dict[str, Holding]
    central: Holding | None


class Train(msgspec.Struct, frozen=True, kw_only=True, tag="train"):
    """Train without a federation.

    Attributes:
        way: what `Advanced` calls it.
        trainer: whose seeds: an agent's, or `CENTRALIZED`.
        holding: what is trained on.
        seed: of the run.
        rounds: how many.
        training: the round's configuration.
        steps: gradient steps to make in each round; empty for as many epochs a round as `training` says.
        counts_steps: whether the task can end a training after a number of steps. One that cannot makes whole passes, as
            many as fit, and what is left over is made later.
        agents: on whose data the last model is tested, besides the test data.
    """

    task: str
    test: Holding
    way: str
    trainer: str
    holding: Holding
    seed: int
    rounds: int
    training: TrainingConfig
    steps: tuple[int, ...] = ()
    counts_steps: bool = True
    agents: dict[str, Holding] = {}


class Assess(msgspec.Struct, frozen=True, kw_only=True, tag="assess"):
    """Test a stored model."""

    task: str
    test: Holding
    models_dir: str
    digest: str
    agents: dict[str, Holding] = {}


class Draw(msgspec.Struct, frozen=True, kw_only=True, tag="draw"):
    """Draw the demonstration's report into a PNG file."""

    report: Report
    path: str


class DrawComparison(msgspec.Struct, frozen=True, kw_only=True, tag="draw_comparison"):
    """Draw a comparison, of which `path` is the JSON file, into PNG files of a directory."""

    path: str
    directory: str


class Surveyed(msgspec.Struct, frozen=True, kw_only=True, tag="surveyed"):
    """What the data are.

    Attributes:
        agents: by agent.
        central: all data in one place; None where nobody asked.
        test: the test data.
        counts_steps: whether the task can end a training after a number of steps.
        versions: of the libraries that train.
    """

    agents: dict[str, Held]
    central: Held | None
    test: Held
    counts_steps: bool
    versions: dict[str, str]


class Advanced(msgspec.Struct, frozen=True, kw_only=True, tag="advanced"):
    """A round of one way of learning is done."""

    way: str
    round: RoundScore


class Learnt(msgspec.Struct, frozen=True, kw_only=True, tag="learnt"):
    """What training came to.

    Attributes:
        rounds: from 0, which is before any training.
        start_s: what it took to load torch and the data.
    """

    rounds: list[RoundScore]
    tested: Assessed
    start_s: float


class Drawn(msgspec.Struct, frozen=True, kw_only=True, tag="drawn"):
    """The files are written."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot be done. `is_of_task`: a task said what to do about it."""

    reason: str
    is_of_task: bool = False


Request = Survey | Train | Assess | Draw | DrawComparison
Result = Surveyed | Learnt | Assessed | Drawn
Reply = Advanced | Result | Failed

encode = msgspec.json.Encoder().encode
decode_reply = msgspec.json.Decoder(Reply).decode
_decode_request = msgspec.json.Decoder(Request).decode


class Bench:
    """A task, and the data that were asked for, kept from one request to the next."""

    def __init__(self, reference: str, test: Holding) -> None:
        began = time.monotonic()
        self.reference = reference
        self.where = test
        self.task: Task = find_task(reference)
        self.test: Any = test_data_of(self.task, test.spec())
        if self.test is None:
            raise TaskError(f"task {reference}: it has no test data, without which nothing can be compared")
        self._data: dict[Holding, Any] = {}
        self.start_s = time.monotonic() - began

    def data(self, holding: Holding) -> Any:
        """What somebody trains on."""
        if holding not in self._data:
            self._data[holding] = self.task.load_data(holding.spec())
        return self._data[holding]

    def survey(self, job: Survey) -> Surveyed:
        """Look at the data."""
        agents = {agent_id: self._held(self.data(holding), agent_id) for agent_id, holding in job.agents.items()}
        first = self.data(next(iter(job.agents.values())))
        probe = self.task.train(self.task.initial_state(0), first, TrainSpec(batch_size=8, max_steps=1), _nothing)
        return Surveyed(
            agents=agents,
            central=None if job.central is None else self._held(self.data(job.central), "all data in one place"),
            test=self._held(self.test, "the test data"),
            counts_steps=probe.num_steps == 1,
            versions=_versions(),
        )

    def train(self, job: Train, advanced: Callable[[RoundScore], None]) -> Learnt:
        """Train, and test after each round."""
        state = self.task.initial_state(job.seed)
        rounds = [self._scored(0, state, 0, 0.0)]
        advanced(rounds[0])
        data, seconds = self.data(job.holding), time.monotonic()
        for number, (trained, num_steps) in enumerate(self._train_rounds(job, state, data), start=1):
            state = trained
            rounds.append(self._scored(number, state, num_steps, time.monotonic() - seconds))
            advanced(rounds[-1])
            seconds = time.monotonic()
        return Learnt(rounds=rounds, tested=self.tested(state, job.agents), start_s=self.start_s)

    def _train_rounds(self, job: Train, state: State, data: Any) -> Iterator[tuple[State, int]]:
        """After each round the state, and the steps that were made in it."""
        steps_a_pass = steps_of(self.task.num_examples(data), job.training.batch_size)
        owed = 0
        for number in range(1, job.rounds + 1):
            epochs, most = job.training.local_epochs, 0
            if job.steps:
                owed += job.steps[number - 1]
                most = owed if job.counts_steps else 0
                epochs = math.ceil(owed / steps_a_pass) if job.counts_steps else owed // steps_a_pass
            made = 0
            if epochs:
                spec = TrainSpec(
                    local_epochs=epochs,
                    batch_size=job.training.batch_size,
                    learning_rate=job.training.learning_rate,
                    momentum=job.training.momentum,
                    seed=seed_of(job.seed, number, job.trainer),
                    round_num=number,
                    extra=job.training.extra,
                    max_steps=most,
                )
                if isinstance(self.task, FollowsRounds):
                    self.task.begin_round(spec)
                trained = self.task.train(state, data, spec, _nothing)
                state, made = trained.state, trained.num_steps or epochs * steps_a_pass
            owed -= made
            yield state, made

    def tested(self, state: State, agents: Mapping[str, Holding]) -> Assessed:
        """Test a model."""
        return Assessed(
            score=self._score(state, self.test),
            by_label=self._by_label(state),
            by_agent={agent_id: self._score(state, self.data(holding)) for agent_id, holding in agents.items()},
        )

    def _by_label(self, state: State) -> dict[str, LabelScore]:
        accuracy_by_label = getattr(self.task, "accuracy_by_label", None)
        labels = label_counts(self.test)
        if accuracy_by_label is None or not labels:
            return {}
        try:
            found = accuracy_by_label(state, self.test)
        except TaskError:
            return {}  # its targets are no classes
        return {
            str(label): LabelScore(num_examples=labels.get(str(label), 0), accuracy=accuracy)
            for label, accuracy in found.items()
        }

    def _score(self, state: State, data: Any) -> Score:
        score = self.task.evaluate(state, data)
        accuracy = score.metrics.get("accuracy")
        return Score(
            num_examples=score.num_examples,
            loss=float(score.loss),
            accuracy=None if accuracy is None else float(accuracy),
        )

    def _scored(self, number: int, state: State, num_steps: int, duration_s: float) -> RoundScore:
        score = self._score(state, self.test)
        return RoundScore(
            round=number, loss=score.loss, accuracy=score.accuracy, num_steps=num_steps, duration_s=duration_s
        )

    def _held(self, data: Any, whose: str) -> Held:
        num_examples = self.task.num_examples(data)
        if num_examples < 1:
            raise TaskError(f"task {self.reference}: {whose}: no example")
        return Held(num_examples=num_examples, by_label=label_counts(data))


def steps_of(num_examples: int, batch_size: int) -> int:
    """Gradient steps in one pass: batches, the last of which may be smaller; one where a batch holds all."""
    return math.ceil(num_examples / batch_size) if batch_size else 1


def label_counts(data: Any) -> dict[str, int]:
    """How many examples there are of each label, in order; nothing where there are no labels, or they take long to read."""
    labels = labels_of(data, max_read=_MAX_READ)
    if labels is None:
        return {}
    found, counts = np.unique(labels, return_counts=True)
    return {str(label): int(count) for label, count in zip(found.tolist(), counts.tolist(), strict=True)}


def _versions() -> dict[str, str]:
    import platform  # noqa: PLC0415
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    found = {"python": platform.python_version()}
    for name in ("midge", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class _Server:
    """Serves requests, with the task of the last one at hand."""

    def __init__(self) -> None:
        self._bench: Bench | None = None

    def handle(self, payload: bytes, reply: Callable[[bytes], None]) -> None:
        """Serve one request."""
        request = _decode_request(payload)
        try:
            reply(encode(self._answer(request, reply)))
        except TaskError as error:
            reply(encode(Failed(reason=str(error), is_of_task=True)))
        except Exception as error:  # noqa: BLE001  whatever it is, the experiment says so and ends
            reply(encode(Failed(reason=f"{type(error).__name__}: {error}")))

    def _answer(self, request: Request, reply: Callable[[bytes], None]) -> Result:
        match request:
            case Survey():
                return self._bench_of(request).survey(request)
            case Train():
                return self._bench_of(request).train(
                    request, lambda done: reply(encode(Advanced(way=request.way, round=done)))
                )
            case Assess():
                bench = self._bench_of(request)
                with ModelStore(Path(request.models_dir)).open(request.digest) as model:
                    return bench.tested(model.state(), request.agents)
            case Draw():
                from coordinator.experiment.demo_picture import draw  # noqa: PLC0415  with it comes matplotlib

                draw(request.report, Path(request.path))
                return Drawn()
            case DrawComparison():
                from coordinator.experiment.compare_pictures import draw_all  # noqa: PLC0415

                draw_all(Path(request.path), Path(request.directory))
                return Drawn()

    def _bench_of(self, request: Survey | Train | Assess) -> Bench:
        if self._bench is None or (self._bench.reference, self._bench.where) != (request.task, request.test):
            self._bench = Bench(request.task, request.test)
        return self._bench


def _nothing(_: Any) -> None:
    """A round here is too short to report a part of it."""


def main() -> None:
    """Entry point of the process."""
    serve(_Server().handle, lambda _: False)


if __name__ == "__main__":
    main()
