"""What a federation is compared with: the steps that training in one place makes, and what is told of data and models."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from coordinator.experiment.baselines import Bench, Survey, Train, label_counts, steps_of  # noqa: E402
from coordinator.experiment.holding import Holding  # noqa: E402
from midge.tasks.base import TrainSpec, seed_of  # noqa: E402
from midge.tasks.digits import DigitsTask  # noqa: E402
from midge.wire.messages import TrainingConfig  # noqa: E402

TRAINING = TrainingConfig(local_epochs=2, batch_size=10, learning_rate=0.1)
OWN = Holding(classes=(1, 2), data_seed=4)


class WholePasses(DigitsTask):
    """A task that knows nothing of steps, as a user's may."""

    def train(self, state, data, spec, progress):
        spec = TrainSpec(local_epochs=spec.local_epochs, batch_size=spec.batch_size, seed=spec.seed)
        trained = super().train(state, data, spec, progress)
        return type(trained)(state=trained.state, num_examples=trained.num_examples)


@pytest.fixture(scope="module")
def bench():
    return Bench("digits", Holding())


def train(bench, **changes):
    values = {
        "task": "digits",
        "test": Holding(),
        "way": "way",
        "trainer": "agent-1",
        "holding": OWN,
        "seed": 3,
        "rounds": 3,
    }
    return bench.train(Train(**{**values, "training": TRAINING, **changes}), lambda done: None)


def test_training_alone_is_what_the_agent_does_when_nobody_else_takes_part(bench):
    learnt = train(bench, agents={"agent-1": OWN})
    task = DigitsTask()
    data, state = task.load_data(OWN.spec()), task.initial_state(3)
    for number in (1, 2, 3):
        spec = TrainSpec(local_epochs=2, batch_size=10, learning_rate=0.1, seed=seed_of(3, number, "agent-1"))
        state = task.train(state, data, spec, lambda fraction: None).state
    score = task.evaluate(state, task.test_data())
    assert learnt.tested.score.loss == pytest.approx(score.loss, rel=1e-6)
    assert learnt.tested.score.accuracy == score.metrics["accuracy"] == learnt.rounds[-1].accuracy
    assert [one.round for one in learnt.rounds] == [0, 1, 2, 3]
    assert [one.num_steps for one in learnt.rounds] == [0] + 3 * [2 * steps_of(len(data[1]), 10)]
    assert learnt.tested.by_agent["agent-1"].accuracy > learnt.tested.score.accuracy  # it knows two labels of ten
    assert learnt.tested.by_label["1"].accuracy > 0.5
    assert learnt.tested.accuracy_without((1, 2)) == 0.0


def test_a_budget_of_steps_is_kept_to_the_step_in_every_round(bench):
    # 1437 examples are 144 batches of 10: 150 steps are a pass and 6, 100 steps less than one.
    learnt = train(bench, holding=Holding(), steps=(150, 100, 1))
    assert [one.num_steps for one in learnt.rounds] == [0, 150, 100, 1]


def test_a_task_of_whole_passes_makes_as_many_as_fit_and_carries_over_what_is_left():
    bench = Bench("digits", Holding())
    bench.task = WholePasses()
    learnt = train(bench, holding=Holding(), steps=(150, 100, 300), counts_steps=False)
    # 150 are one pass of 144 and 6, which with 100 more are no pass yet, and with 300 more two.
    assert [one.num_steps for one in learnt.rounds] == [0, 144, 0, 288]


def test_a_survey_tells_what_everybody_holds_and_whether_steps_are_counted(bench):
    agents = {"agent-1": OWN, "agent-2": Holding(partition="iid", index=1, of=3)}
    survey = bench.survey(Survey(task="digits", test=Holding(), agents=agents, central=Holding()))
    assert set(survey.agents["agent-1"].by_label) == {"1", "2"}
    assert survey.agents["agent-2"].num_examples == 479
    assert survey.central.num_examples == 1437
    assert survey.test.num_examples == 360
    assert sum(survey.test.by_label.values()) == 360
    assert survey.counts_steps
    assert {"python", "torch", "numpy"} <= set(survey.versions)
    bench = Bench("digits", Holding())
    bench.task = WholePasses()
    survey = bench.survey(Survey(task="digits", test=Holding(), agents=agents, central=None))
    assert not survey.counts_steps
    assert survey.central is None


def test_labels_are_told_of_pairs_with_integer_labels_alone():
    inputs = np.zeros((3, 2))
    assert label_counts((inputs, np.array([2, 0, 2]))) == {"0": 1, "2": 2}
    assert label_counts((inputs, np.array([0.5, 1.0, 1.0]))) == {}
    assert label_counts((inputs, np.zeros((3, 1), int))) == {}
    assert label_counts(inputs) == {}


@pytest.mark.parametrize(("num_examples", "batch_size", "steps"), [(10, 10, 1), (11, 10, 2), (1, 10, 1), (500, 0, 1)])
def test_a_step_is_a_batch_the_last_of_which_may_be_smaller(num_examples, batch_size, steps):
    assert steps_of(num_examples, batch_size) == steps
