from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from midge.tasks import torch_task  # noqa: E402
from midge.tasks.base import DataSpec, TaskError, TrainSpec  # noqa: E402
from midge.tasks.torch_task import TorchTask, load_state, state_of  # noqa: E402
from tests.environment import unmeasured  # noqa: E402

ROOT = Path(__file__).parents[2]


class ModelTask(TorchTask):
    """A task around a model given to it."""

    name = "model"

    def __init__(self, build):
        self.build_model = build  # type: ignore[method-assign]

    def build_model(self):
        raise NotImplementedError

    def load_data(self, spec):
        return clusters()


class SquaresTask(ModelTask):
    """The same for regression."""

    def loss(self, outputs, targets):
        return functional.mse_loss(outputs, targets)


def clusters(num_examples=53):
    """Points around three centres and the number of the centre."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(num_examples) % 3
    return torch.randn(num_examples, 4, generator=generator) + labels[:, None], labels


def perceptron():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def line():
    return nn.Linear(1, 1, bias=False)


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def nothing(_fraction):
    pass


def same_bits(first, second):
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].tobytes() == second[name].tobytes()
        for name in first
    )


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Training


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [0, 1, 10, 53, 100])
def test_training_equals_plain_pytorch_sgd_bit_for_bit(batch_size, momentum):
    inputs, labels = clusters()
    task = ModelTask(perceptron)
    start = task.initial_state(3)
    spec = TrainSpec(local_epochs=4, batch_size=batch_size, learning_rate=0.1, momentum=momentum, seed=11)

    torch.manual_seed(3)
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    order = torch.Generator().manual_seed(11)
    for _ in range(4):
        permutation = torch.randperm(53, generator=order)
        for batch in permutation.split(batch_size or 53):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    expected = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    trained = task.train(start, (inputs, labels), spec, nothing)
    assert same_bits(trained.state, expected)
    assert not same_bits(trained.state, start)
    assert trained.num_examples == 53


def test_steps_are_those_worked_out_by_hand():
    # One example, x = 1 and y = 1, loss (w - 1)², gradient 2(w - 1), rate 0.25, momentum 0.5, from w = 0:
    # v = -2, w = 0.5; v = 0.5 · -2 + 2 · -0.5 = -2, w = 1; v = 0.5 · -2 + 0 = -1, w = 1.25. All exact in binary.
    data = torch.ones(1, 1), torch.ones(1, 1)
    start = {"weight": np.zeros((1, 1), np.float32)}
    weights = [
        SquaresTask(line)
        .train(start, data, TrainSpec(local_epochs=epochs, learning_rate=0.25, momentum=0.5), nothing)
        .state["weight"]
        .item()
        for epochs in (1, 2, 3)
    ]
    assert weights == [0.5, 1.0, 1.25]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_proximal_term_equals_plain_pytorch_with_the_term_in_its_loss(momentum):
    inputs, labels = clusters()
    task = ModelTask(perceptron)
    start = task.initial_state(3)
    spec = TrainSpec(local_epochs=4, batch_size=10, learning_rate=0.1, momentum=momentum, proximal_mu=0.5, seed=11)

    torch.manual_seed(3)
    model = perceptron()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    order = torch.Generator().manual_seed(11)
    for _ in range(4):
        for batch in torch.randperm(53, generator=order).split(10):
            optimizer.zero_grad()
            far = sum(((w - w_global) ** 2).sum() for w, w_global in zip(model.parameters(), before, strict=True))
            (nn.CrossEntropyLoss()(model(inputs[batch]), labels[batch]) + 0.5 / 2 * far).backward()
            optimizer.step()
    trained = task.train(start, clusters(), spec, nothing).state
    for name, tensor in model.state_dict().items():
        # Both round each gradient to float32, in another order: a few units of 2**-24 over 24 steps.
        np.testing.assert_allclose(trained[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-6)
    free = task.train(start, clusters(), dataclasses.replace(spec, proximal_mu=0.0), nothing).state
    distances = [sum(float(((state[name] - start[name]) ** 2).sum()) for name in start) for state in (trained, free)]
    assert distances[0] < distances[1]


def test_a_proximal_step_is_that_worked_out_by_hand():
    # w = 1, one example x = 1, y = 3, loss (w - 3)^2: the gradient is 2 (w - 3).  mu = 2, lr = 0.25:
    # step 1 from w = 1: gradient -4 + 2 (1 - 1) = -4, w = 2;  step 2: gradient -2 + 2 (2 - 1) = 0, w = 2
    task = SquaresTask(line)
    data = (torch.ones(1, 1), torch.full((1, 1), 3.0))
    spec = TrainSpec(local_epochs=2, learning_rate=0.25, proximal_mu=2.0)
    trained = task.train({"weight": np.ones((1, 1), np.float32)}, data, spec, nothing)
    assert trained.state["weight"].tolist() == [[2.0]]
    assert trained.metrics["loss"] == 1.0  # (2 - 3)^2: of the data alone


def test_the_metric_is_the_mean_loss_over_the_examples_of_the_last_epoch():
    # Rate 0: w stays 0, the losses of targets 1, 2, 3 are 1, 4, 9 whatever the batches: (1 + 4 + 9) / 3.
    data = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
    start = {"weight": np.zeros((1, 1), np.float32)}
    spec = TrainSpec(local_epochs=2, batch_size=2, learning_rate=0.0)
    assert SquaresTask(line).train(start, data, spec, nothing).metrics == {"loss": pytest.approx(14 / 3, rel=1e-6)}


def test_two_full_batch_agents_averaged_by_examples_equal_one_place():
    # The mean of gradients weighted by examples is the gradient of the whole: 13 and 40 of 53 examples, in float64.
    inputs, labels = clusters()
    inputs = inputs.double()
    task = ModelTask(lambda: perceptron().double())
    start = task.initial_state(0)
    step = TrainSpec(local_epochs=1, batch_size=0, learning_rate=0.5)
    first, second, whole = (
        task.train(start, (inputs[part], labels[part]), step, nothing)
        for part in (slice(0, 13), slice(13, 53), slice(0, 53))
    )
    for name, expected in whole.state.items():
        mean = (first.state[name] * first.num_examples + second.state[name] * second.num_examples) / 53
        assert expected.dtype == np.float64
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others_even_with_dropout():
    task = ModelTask(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    start = task.initial_state(0)
    runs = [
        task.train(start, clusters(), TrainSpec(local_epochs=2, batch_size=8, seed=seed), nothing).state
        for seed in (2**62, 2**62, 5)
    ]
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


@pytest.mark.parametrize("batch_size", [0, 10])
def test_a_data_set_gives_the_same_bits_as_its_tensors(batch_size):
    task = ModelTask(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    start = task.initial_state(0)
    spec = TrainSpec(local_epochs=3, batch_size=batch_size, seed=1)
    of_tensors, of_set = (task.train(start, data, spec, nothing) for data in (clusters(), TensorDataset(*clusters())))
    assert same_bits(of_tensors.state, of_set.state)
    assert of_tensors.metrics == of_set.metrics
    assert of_set.num_examples == 53
    assert task.evaluate(start, clusters()) == task.evaluate(start, TensorDataset(*clusters()))


def test_the_global_generator_is_left_as_it_was():
    task = ModelTask(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    before = torch.get_rng_state()
    start = task.initial_state(0)
    for data in (clusters(), TensorDataset(*clusters())):
        task.train(start, data, TrainSpec(), nothing)
        task.evaluate(start, data)
    assert torch.equal(before, torch.get_rng_state())


def test_arrays_given_are_only_read_and_arrays_returned_are_the_caller_s():
    task = ModelTask(normalised)
    start = task.initial_state(0)
    kept = {name: array.copy() for name, array in start.items()}
    for array in start.values():
        array.setflags(write=False)  # as a file mapped into memory is
    first = task.train(start, clusters(), TrainSpec(batch_size=10), nothing).state
    copied = {name: array.copy() for name, array in first.items()}
    task.train(first, clusters(), TrainSpec(batch_size=10), nothing)
    task.evaluate(start, clusters())
    assert same_bits(start, kept)
    assert same_bits(first, copied)


def test_a_warm_model_trains_as_a_new_one_and_keeps_no_gradients():
    task = ModelTask(perceptron)
    start = task.initial_state(0)
    spec = TrainSpec(batch_size=10, momentum=0.9, seed=1)
    cold = task.train(start, clusters(), spec, nothing).state
    task.evaluate(cold, clusters())
    assert same_bits(cold, task.train(start, clusters(), spec, nothing).state)
    assert all(parameter.grad is None for parameter in task._model.parameters())


def test_the_model_is_built_once_for_all_trainings_and_evaluations():
    built = []
    task = ModelTask(lambda: built.append(1) or perceptron())
    start = task.initial_state(0)
    for _ in range(3):
        task.evaluate(task.train(start, clusters(), TrainSpec(), nothing).state, clusters())
    assert len(built) == 2  # the initial model, and the one kept


def test_frozen_parameters_stay_and_another_optimizer_may_be_named():
    def half_frozen():
        model = perceptron()
        model[0].requires_grad_(requires_grad=False)
        return model

    class AdamTask(ModelTask):
        def make_optimizer(self, model, spec):
            return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=spec.learning_rate)

    for task in (ModelTask(half_frozen), AdamTask(half_frozen)):
        start = task.initial_state(0)
        state = task.train(start, clusters(), TrainSpec(batch_size=10), nothing).state
        assert np.array_equal(state["0.weight"], start["0.weight"])
        assert not np.array_equal(state["2.weight"], start["2.weight"])


def test_progress_is_told_every_fifth_of_a_second_and_at_the_end(monkeypatch):
    clock = itertools.count(0, 0.0625)  # each look at the clock is 62.5 ms after the last
    monkeypatch.setattr(torch_task, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told = []
    task = ModelTask(perceptron)
    task.train(task.initial_state(0), clusters(40), TrainSpec(local_epochs=5, batch_size=10), told.append)
    # 20 batches, one look after each: 0.2 s have passed at the fourth (0.25 s), and since then at the eighth (0.5 s)...
    assert told == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_short_training_tells_its_end_alone():
    told = []
    task = ModelTask(perceptron)
    task.train(task.initial_state(0), clusters(), TrainSpec(), told.append)
    assert told == [1.0]


def test_a_training_that_diverges_is_an_error_with_what_to_do():
    data = torch.full((2, 1), 1e20), torch.ones(2, 1)
    with pytest.raises(
        TaskError, match=r"the loss is inf in epoch 1 of 3: training diverged. Lower the learning rate \(0.1\)"
    ):
        SquaresTask(line).train({"weight": np.ones((1, 1), np.float32)}, data, TrainSpec(local_epochs=3), nothing)


def test_neither_import_nor_training_loads_torch_s_compiler():
    code = (
        "import sys, torch; from tests.tasks.test_torch_task import *; task = ModelTask(perceptron);"
        "state = task.train(task.initial_state(0), TensorDataset(*clusters()), TrainSpec(momentum=0.9), nothing).state;"
        "task.evaluate(state, clusters()); sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True, env=unmeasured()
    )
    assert done.returncode == 0, done.stderr


# Evaluation


def test_loss_and_accuracy_are_means_over_the_examples(monkeypatch):
    # The outputs are the inputs: two classes. Example 0 is right by 0 to 0 (argmax takes the first), loss ln 2;
    # example 1 is wrong, 0 to ln 3: of odds 1 : 3 the label has 1, loss ln 4; example 2 is right, loss ln(4 / 3).
    inputs = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(3)]])
    labels = torch.tensor([0, 0, 1])
    task = ModelTask(lambda: nn.Linear(2, 2, bias=False))
    state = {"weight": np.eye(2, dtype=np.float32)}
    for chunk in (1024, 2, 1):
        monkeypatch.setattr(torch_task, "EVALUATION_BATCH", chunk)
        score = task.evaluate(state, (inputs, labels))
        assert score.num_examples == 3
        assert score.loss == pytest.approx((math.log(2) + math.log(4) + math.log(4 / 3)) / 3, rel=1e-6)
        assert score.metrics == {"accuracy": pytest.approx(2 / 3)}
        assert task.accuracy_by_label(state, (inputs, labels)) == {0: 0.5, 1: 1.0}


def test_as_many_hits_are_the_same_accuracy_to_the_bit_whichever_batches_they_are_in():
    task = ModelTask(nn.Identity)
    outputs = torch.zeros(360, 2)
    outputs[:, 0] = 1  # all are told to be of class 0
    for first in range(190, 257):  # 290 hits in batches of 256 and 104, which added up in two ways are two numbers
        targets = torch.ones(360, dtype=torch.long)
        targets[:first] = 0
        targets[256 : 256 + 290 - first] = 0
        assert task.evaluate({}, (outputs, targets)).metrics == {"accuracy": 290 / 360}


def test_accuracy_by_pixel_is_the_mean_over_the_examples():
    outputs = torch.zeros(3, 2, 2, 2)
    outputs[:, 0] = 1
    targets = torch.ones(3, 2, 2, dtype=torch.long)
    targets[0] = 0
    targets[1, 0, 0] = 0  # 4, 1 and 0 hits of 4 each
    assert ModelTask(nn.Identity).evaluate({}, (outputs, targets)).metrics == {"accuracy": 5 / 12}


def test_a_regression_has_a_loss_and_no_accuracy():
    data = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])
    task, state = SquaresTask(line), {"weight": np.zeros((1, 1), np.float32)}
    score = task.evaluate(state, data)
    assert (score.loss, score.metrics) == (5.0, {})  # (1 + 9) / 2
    with pytest.raises(
        TaskError, match=r"outputs \(2, 1\) for targets \(2, 1\) torch.float32: accuracy by label needs"
    ):
        task.accuracy_by_label(state, data)


def test_evaluation_turns_dropout_off_and_leaves_batch_norm_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    task = ModelTask(lambda: model)
    state = task.initial_state(0)
    assert task.evaluate(state, clusters()) == task.evaluate(state, clusters())
    assert same_bits(state_of(task._model), state)


# States


def test_batch_norm_statistics_are_floats_and_its_counter_an_int64_that_survives_the_round_trip():
    task = ModelTask(normalised)
    start = task.initial_state(0)
    types = {name: (array.dtype, array.shape) for name, array in start.items() if name.startswith("1.")}
    assert types == {
        "1.weight": (np.float32, (6,)),
        "1.bias": (np.float32, (6,)),
        "1.running_mean": (np.float32, (6,)),
        "1.running_var": (np.float32, (6,)),
        "1.num_batches_tracked": (np.int64, ()),
    }
    state = task.train(start, clusters(40), TrainSpec(local_epochs=3, batch_size=10), nothing).state
    assert state["1.num_batches_tracked"] == 12  # 3 epochs of 4 batches
    assert not np.array_equal(state["1.running_mean"], start["1.running_mean"])
    state["1.num_batches_tracked"] = np.array(2**53 + 1)  # which float64 does not have
    model = normalised()
    load_state(model, state)
    assert same_bits(state_of(model), state)


def test_with_batch_norm_a_last_batch_of_one_joins_the_one_before():
    task = ModelTask(normalised)
    state = task.train(task.initial_state(0), clusters(21), TrainSpec(batch_size=10), nothing).state
    assert state["1.num_batches_tracked"] == 2  # of 10 and of 11


@pytest.mark.parametrize(
    ("dtype", "travels_as"),
    [
        (torch.float64, np.float64),
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
        (torch.int32, np.int32),
        (torch.uint8, np.uint8),
        (torch.bool, np.bool_),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_every_element_type_and_shape_makes_the_round_trip(dtype, travels_as, shape):
    def build(value):
        model = nn.Linear(1, 1)
        model.register_buffer("entry", torch.full(shape, value).to(dtype))
        return model

    source, target = build(1.5), build(0.0)
    state = state_of(source)
    assert (state["entry"].dtype, state["entry"].shape) == (travels_as, shape)
    load_state(target, state)
    assert target.entry.dtype == dtype
    assert torch.equal(target.entry, source.entry)


def test_the_initial_state_is_that_of_a_model_built_right_after_seeding():
    torch.manual_seed(9)
    expected = state_of(perceptron())
    task = ModelTask(perceptron)
    assert same_bits(task.initial_state(9), expected)
    assert not same_bits(task.initial_state(10), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("2.bias"), 'Missing key(s) in state_dict: "2.bias"'),
        (lambda state: state.update(extra=np.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
        (lambda state: state.update({"2.bias": np.zeros(4)}), "size mismatch for 2.bias"),
        (lambda state: state.update({"2.bias": np.zeros(1)}), "size mismatch for 2.bias"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_says_where(change, message):
    task = ModelTask(perceptron)
    state = dict(task.initial_state(0))
    change(state)
    for use in (
        lambda: task.train(state, clusters(), TrainSpec(), nothing),
        lambda: task.evaluate(state, clusters()),
    ):
        with pytest.raises(TaskError) as error:
            use()
        assert str(error.value).startswith("the state does not fit the task's model: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_what_cannot_travel_is_named():
    class Remembering(nn.Linear):
        def get_extra_state(self):
            return "something"

    with pytest.raises(TaskError, match="entry _extra_state of the state dictionary is of type str: expected a tensor"):
        state_of(Remembering(1, 1))
    model = nn.Linear(1, 1)
    model.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TaskError, match=r"entry waves .* is of torch.complex64: .* register .* persistent=False"):
        state_of(model)


def test_no_examples_and_unequal_counts_are_errors():
    task = ModelTask(perceptron)
    state = task.initial_state(0)
    inputs, labels = clusters()
    empty, unequal = (inputs[:0], labels[:0]), (inputs, labels[:50])
    for use in (task.num_examples, lambda data: task.train(state, data, TrainSpec(), nothing)):
        with pytest.raises(TaskError, match="no examples; look at what load_data reads"):
            use(empty)
        with pytest.raises(TaskError, match="53 inputs and 50 targets"):
            use(unequal)
    with pytest.raises(TaskError, match="no examples"):
        task.evaluate(state, TensorDataset(*empty))
    with pytest.raises(TaskError, match="no examples"):
        task.accuracy_by_label(state, empty)


def test_a_task_needs_a_model_and_data_and_has_no_test_data_of_its_own():
    with pytest.raises(TypeError, match="abstract"):
        TorchTask()
    task = ModelTask(perceptron)
    assert task.test_data() is None
    assert task.num_examples(task.load_data(DataSpec())) == 53


def test_max_steps_ends_a_training_in_the_midst_of_an_epoch_and_steps_are_counted():
    task = ModelTask(perceptron)
    state = task.initial_state(0)

    def train(local_epochs, max_steps):
        spec = TrainSpec(local_epochs=local_epochs, batch_size=20, seed=1, max_steps=max_steps)
        return task.train(state, clusters(), spec, nothing)

    whole = train(2, 0)
    assert whole.num_steps == 6  # 53 examples: 20, 20 and 13, twice
    cut = train(9, 6)
    assert cut.num_steps == 6
    assert same_bits(cut.state, whole.state)
    assert cut.metrics == whole.metrics
    short = train(2, 4)
    assert short.num_steps == 4
    assert not same_bits(short.state, whole.state)
    assert math.isfinite(short.metrics["loss"])
