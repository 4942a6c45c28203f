from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from tests.environment import unmeasured

torch = pytest.importorskip("torch")

from midge.tasks import digits  # noqa: E402
from midge.tasks.base import DataSpec, TaskError, TrainSpec, seed_of  # noqa: E402
from midge.tasks.registry import find_task  # noqa: E402

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return find_task("digits")


def nothing(_fraction):
    pass


def average(trained):
    total = sum(each.num_examples for each in trained)
    return {
        name: (sum(each.state[name].astype(np.float64) * each.num_examples for each in trained) / total).astype(
            np.float32
        )
        for name in trained[0].state
    }


def accuracy(task, state):
    return task.evaluate(state, task.test_data()).metrics["accuracy"]


def test_the_data_are_1437_images_to_train_on_and_360_to_test_on_of_each_digit_its_share(task):
    images, labels = task.load_data(DataSpec())
    test_images, test_labels = task.test_data()
    assert task.num_examples((images, labels)) == 1437
    assert task.num_examples((test_images, test_labels)) == 360
    assert images.shape == (1437, 64)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    share = torch.bincount(test_labels) / torch.bincount(torch.cat([labels, test_labels]))
    assert float((share - 360 / 1797).abs().max()) < 1 / 174  # within one image: a digit has 174 at least


def test_the_cut_into_train_and_test_is_the_same_on_every_device_and_leaves_none_in_both(task):
    # Written down: were it to change with a version of scikit-learn, agents would train on what the coordinator tests with.
    images, labels = task.test_data()
    digest = hashlib.sha256((images * 16).to(torch.uint8).numpy().tobytes() + labels.numpy().astype(np.uint8).tobytes())
    assert digest.hexdigest()[:16] == "33668cfbe0367fca"
    all_images = torch.cat([images, task.load_data(DataSpec(seed=5))[0]])
    assert len(all_images) == 1797
    assert len(all_images.unique(dim=0)) == 1797  # none in both


def test_skewed_agents_have_their_own_digits_whole_and_a_twentieth_of_the_others(task):
    _, everyone = task.load_data(DataSpec())
    _, mine = task.load_data(DataSpec(classes=(1, 2, 3), sel_prob=1.0, def_prob=0.05))
    have, of = torch.bincount(mine).tolist(), torch.bincount(everyone).tolist()
    assert have == [of[digit] if digit in (1, 2, 3) else int(of[digit] * 0.05 + 0.5) for digit in range(10)]


def test_the_model_has_2410_parameters(task):
    state = task.initial_state(0)
    assert [(name, array.shape) for name, array in state.items()] == [
        ("0.weight", (32, 64)),
        ("0.bias", (32,)),
        ("2.weight", (10, 32)),
        ("2.bias", (10,)),
    ]
    assert sum(array.size for array in state.values()) == 2410  # 64 · 32 + 32 + 32 · 10 + 10


def test_ten_like_agents_reach_in_five_rounds_what_one_place_does(task):
    # Five epochs a round: 96 % after 10 rounds in the mean of three seeds, so 90 % after 5 leaves room.
    agents = [task.load_data(DataSpec(partition="iid", part=part, num_parts=10)) for part in range(10)]
    state = task.initial_state(0)
    assert accuracy(task, state) < 0.25
    for round_num in range(1, 6):
        specs = [
            TrainSpec(local_epochs=5, batch_size=10, seed=seed_of(0, round_num, f"agent-{part}")) for part in range(10)
        ]
        trained = [task.train(state, data, spec, nothing) for data, spec in zip(agents, specs, strict=True)]
        state = average(trained)
    assert accuracy(task, state) > 0.90


def test_an_agent_with_few_of_some_digits_is_worse_at_those(task):
    data = task.load_data(DataSpec(classes=(1, 2, 3), sel_prob=1.0, def_prob=0.05))
    state = task.train(task.initial_state(0), data, TrainSpec(local_epochs=20, batch_size=10), nothing).state
    by_label = task.accuracy_by_label(state, task.test_data())
    assert list(by_label) == list(range(10))
    own = np.mean([by_label[digit] for digit in (1, 2, 3)])
    others = np.mean([by_label[digit] for digit in (0, 4, 5, 6, 7, 8, 9)])
    assert own > 0.95
    assert others < own - 0.10


def test_the_cut_that_is_written_down_is_the_one_that_scikit_learn_draws(monkeypatch):
    written = digits._splits(0)
    monkeypatch.setattr(digits, "_SPLIT_SEED", None)
    digits._splits.cache_clear()
    for ours, theirs in zip(written, digits._splits(0), strict=True):
        for some, same in zip(ours, theirs, strict=True):
            assert torch.equal(some, same)


def test_where_the_file_is_elsewhere_scikit_learn_itself_is_asked(monkeypatch, tmp_path):
    images, labels = digits._everything()
    monkeypatch.setattr(digits, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))
    again = digits._everything()
    assert np.array_equal(images, again[0])
    assert np.array_equal(labels, again[1])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r"scikit-learn, which cannot be imported .*: pip install 'midge\[torch\]'"):
        digits._everything()


def test_its_data_are_read_without_importing_scikit_learn():
    code = "import sys; from midge.tasks.digits import *; DigitsTask().test_data(); sys.exit('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=unmeasured())
    assert done.returncode == 0, done.stderr


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda _name: None)
    digits._splits.cache_clear()
    with pytest.raises(TaskError, match=r"scikit-learn, which is not installed: pip install 'midge\[torch\]'"):
        digits.DigitsTask().test_data()
