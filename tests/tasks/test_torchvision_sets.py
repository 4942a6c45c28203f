"""The tasks over torchvision's data sets, with small files in the real formats and torchvision's own loaders."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")

import torch  # noqa: E402

from midge.tasks.base import DataSpec, TaskError, TrainSpec, seed_of, test_data_of  # noqa: E402
from midge.tasks.cifar10 import Cifar10Task  # noqa: E402
from midge.tasks.mnist import MnistTask  # noqa: E402
from midge.tasks.registry import find_task  # noqa: E402
from midge.tasks.torchvision_compat import import_torchvision  # noqa: E402
from tests.environment import unmeasured  # noqa: E402
from tests.tasks import small_sets  # noqa: E402
from tests.tasks.small_sets import SmallCifar10  # noqa: E402

test_data_of.__test__ = False


def nothing(fraction: float) -> None:
    pass


@pytest.fixture
def mnist_dir(tmp_path):
    small_sets.write_mnist(tmp_path)
    return tmp_path


@pytest.fixture
def cifar_dir(tmp_path):
    small_sets.write_cifar10(tmp_path)
    return tmp_path


def test_images_and_labels_are_those_of_the_files(mnist_dir):
    images, labels = find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))
    expected, expected_labels = small_sets.grey_images(200, 10, 0)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (200, 1, 28, 28))
    np.testing.assert_array_equal(images[:, 0].numpy(), expected)
    assert (labels.dtype, labels.tolist()) == (torch.int64, expected_labels.tolist())


def test_packed_files_are_unpacked_once_and_unpacked_ones_are_enough(mnist_dir):
    raw = mnist_dir / "MNIST" / "raw"
    find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))
    assert (raw / "train-labels-idx1-ubyte").read_bytes() == gzip.decompress(
        (raw / "train-labels-idx1-ubyte.gz").read_bytes()
    )
    for packed in raw.glob("*.gz"):
        packed.unlink()
    (mnist_dir / ".midge.lock").unlink()
    assert len(find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))[0]) == 200
    assert not (mnist_dir / ".midge.lock").exists()  # a folder that is complete is only read


def test_an_agent_has_its_share_and_the_coordinator_the_test_images(mnist_dir):
    task = find_task("mnist")
    spec = DataSpec(data_dir=mnist_dir, classes=(1, 2), def_prob=0.25)
    # 20 of each digit: all of two, a quarter of eight.
    assert torch.bincount(task.load_data(spec)[1]).tolist() == [5, 20, 20, 5, 5, 5, 5, 5, 5, 5]
    images, labels = test_data_of(task, DataSpec(data_dir=mnist_dir))
    np.testing.assert_array_equal(images[:, 0].numpy(), small_sets.grey_images(50, 10, 1)[0])
    assert len(labels) == 50


def test_without_a_directory_data_lie_below_the_current_one(mnist_dir, monkeypatch):
    (mnist_dir / "data").mkdir()
    shutil.move(mnist_dir / "MNIST", mnist_dir / "data")
    monkeypatch.chdir(mnist_dir)
    assert len(find_task("mnist").load_data(DataSpec())[0]) == 200
    assert len(find_task("mnist").test_data()[0]) == 50


@pytest.mark.parametrize(
    ("name", "write", "num_train", "num_test", "num_classes"),
    [
        ("fashion-mnist", lambda root: small_sets.write_mnist(root, folder="FashionMNIST"), 200, 50, 10),
        ("emnist", small_sets.write_emnist, 94, 47, 47),
    ],
)
def test_sets_in_the_same_format_train_too(name, write, num_train, num_test, num_classes, tmp_path):
    write(tmp_path)
    task = find_task(name)
    assert task.name == name
    data, test = (load(DataSpec(data_dir=tmp_path)) for load in (task.load_data, task.load_test_data))
    assert [len(data[1]), len(test[1])] == [num_train, num_test]
    trained = task.train(task.initial_state(0), data, TrainSpec(batch_size=32), nothing)
    assert trained.state["fc2.bias"].shape == (num_classes,)
    assert trained.num_examples == num_train


def test_the_network_of_scenario_2(mnist_dir):
    state = MnistTask().initial_state(0)
    assert [(name, array.shape) for name, array in state.items()] == [
        ("conv1.weight", (20, 1, 5, 5)),
        ("conv1.bias", (20,)),
        ("conv2.weight", (50, 20, 5, 5)),
        ("conv2.bias", (50,)),
        ("fc1.weight", (500, 800)),
        ("fc1.bias", (500,)),
        ("fc2.weight", (10, 500)),
        ("fc2.bias", (10,)),
    ]
    # 28 -> 24 by 5 x 5, 12 by pooling, 8, 4: 50 channels of 4 x 4 are 800.
    assert sum(array.size for array in state.values()) == 520 + 25_050 + 400_500 + 5_010 == 431_080
    outputs = MnistTask().build_model()(torch.zeros(3, 1, 28, 28))
    torch.testing.assert_close(outputs.exp().sum(dim=1), torch.ones(3))  # logarithms of probabilities


def test_mnist_is_learned(mnist_dir):
    task = find_task("mnist")
    data, test = task.load_data(DataSpec(data_dir=mnist_dir)), task.load_test_data(DataSpec(data_dir=mnist_dir))
    spec = TrainSpec(local_epochs=5, batch_size=20, learning_rate=0.05, momentum=0.5)
    state = task.initial_state(0)
    before = task.evaluate(state, test)
    after = task.evaluate(task.train(state, data, spec, nothing).state, test)
    assert before.loss == pytest.approx(np.log(10), abs=0.2)
    assert before.metrics["accuracy"] < 0.5
    assert after.metrics["accuracy"] > 0.9


def test_the_model_sees_what_torchvisions_transforms_make_of_an_image(mnist_dir, tmp_path):
    import_torchvision()
    from torchvision import datasets, transforms

    loaded = MnistTask().load_data(DataSpec(data_dir=mnist_dir))[0]
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    expected = torch.stack([image for image, _ in datasets.MNIST(mnist_dir, transform=usual)])
    assert torch.equal(MnistTask().prepare(loaded, training=False), expected)
    assert torch.equal(MnistTask().prepare(loaded, training=True), expected)  # no augmentation
    assert loaded.dtype == torch.uint8

    small_sets.write_cifar10(tmp_path)
    task = SmallCifar10()
    loaded = task.load_data(DataSpec(data_dir=tmp_path))[0]
    usual = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    )
    expected = torch.stack([image for image, _ in task.dataset_class()(tmp_path, transform=usual)])
    assert torch.equal(task.prepare(loaded, training=False), expected)


# CIFAR-10.


def test_cifar_images_are_those_of_the_files_channels_first(cifar_dir):
    images, labels = SmallCifar10().load_data(DataSpec(data_dir=cifar_dir))
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (100, 3, 32, 32))
    assert labels.tolist() == list(range(10)) * 10
    label_5 = images[5]  # bright in channel 5 % 3, rows 0 to 8 + 2 · 5
    assert label_5[2, :18].min() >= 150
    assert label_5[2, 18:].max() < 100
    assert label_5[:2].max() < 100
    assert len(SmallCifar10().load_test_data(DataSpec(data_dir=cifar_dir))[1]) == 20


def test_resnet_18_is_torchvisions_with_ten_classes(cifar_dir):
    state = Cifar10Task().initial_state(0)
    assert (
        sum(array.size for name, array in state.items() if "running" not in name and "num_" not in name) == 11_181_642
    )
    assert state["fc.weight"].shape == (10, 512)
    assert state["bn1.num_batches_tracked"].dtype == np.int64
    import_torchvision()
    from torchvision.models import resnet18

    assert list(resnet18(num_classes=10).state_dict()) == list(state)


def test_another_architecture_is_a_subclass_of_one_line():
    class Squeezed(Cifar10Task):
        name, architecture = "squeezed", "squeezenet1_1"

    assert Squeezed().initial_state(0)["classifier.1.weight"].shape == (10, 512, 1, 1)


def test_augmentation_moves_and_mirrors_each_image_by_itself():
    image = torch.arange(3 * 32 * 32, dtype=torch.int64).reshape(3, 32, 32).remainder(251).to(torch.uint8) + 1
    torch.manual_seed(0)
    augmented = Cifar10Task().augment(image.expand(64, 3, 32, 32))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = {
        window.flatten().numpy().tobytes(): (row, column, mirrored)
        for row in range(9)
        for column in range(9)
        for mirrored, window in enumerate(
            (padded[:, row : row + 32, column : column + 32], padded[:, row : row + 32, column : column + 32].flip(2))
        )
    }
    seen = [windows[one.flatten().numpy().tobytes()] for one in augmented]
    assert len(set(seen)) > 40  # of 162
    assert 16 < sum(mirrored for _, _, mirrored in seen) < 48


def test_the_same_round_trained_again_gives_the_same_bits_with_augmentation(cifar_dir):
    task, other = SmallCifar10(), SmallCifar10()
    data = task.load_data(DataSpec(data_dir=cifar_dir, classes=(0, 1), def_prob=0.0))
    state = task.initial_state(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec = TrainSpec(batch_size=10, learning_rate=0.01, seed=seed_of(7, 1, "pi-1"))
        first = task.train(state, data, spec, nothing).state
        torch.rand(100)  # the global generator is somewhere else now
        task.evaluate(state, data)
        again = other.train(state, data, spec, nothing).state
        elsewhere = other.train(
            state, data, TrainSpec(batch_size=10, learning_rate=0.01, seed=seed_of(7, 2, "pi-1")), nothing
        )
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["fc.weight"], elsewhere.state["fc.weight"])
    assert first["bn1.num_batches_tracked"] == 2  # 20 examples in batches of 10


def test_evaluation_never_augments(cifar_dir):
    task = SmallCifar10()
    data = task.load_test_data(DataSpec(data_dir=cifar_dir))
    state = task.initial_state(0)
    assert task.evaluate(state, data) == task.evaluate(state, data)


def test_a_file_of_another_sum_is_never_opened(cifar_dir):
    task = SmallCifar10()
    with pytest.raises(
        TaskError, match=r"^task cifar10: torchvision cannot read .* in .*/cifar-10-batches-py .*corrupted"
    ):
        Cifar10Task().load_data(DataSpec(data_dir=cifar_dir))  # not the sums of the real files
    (cifar_dir / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(TaskError, match=r"corrupted.*Delete them, and get them again\.$"):
        task.load_data(DataSpec(data_dir=cifar_dir))


# What is missing.


def test_what_is_missing_is_named_with_its_place_and_source(tmp_path, monkeypatch):
    with pytest.raises(TaskError) as caught:
        find_task("mnist").load_data(DataSpec(data_dir=tmp_path / "here"))
    assert str(caught.value) == (
        f"task mnist: {tmp_path}/here/MNIST/raw lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte. Put them there, from "
        "https://ossci-datasets.s3.amazonaws.com/mnist/ (packed as .gz will do); "
        "or start with --download, and torchvision fetches them."
    )
    assert len(str(caught.value)) < 500  # what a message holds
    assert not (tmp_path / "here").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=rf"^task cifar10: {tmp_path}/data/cifar-10-batches-py lacks data_batch_1, .*"):
        find_task("cifar10").test_data()


def test_one_missing_file_is_named_alone(cifar_dir):
    (cifar_dir / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(TaskError, match=r"cifar-10-batches-py lacks data_batch_4\. Put"):
        SmallCifar10().load_data(DataSpec(data_dir=cifar_dir))


def test_a_broken_archive_and_a_broken_file_are_named(mnist_dir):
    raw = mnist_dir / "MNIST" / "raw"
    packed = raw / "t10k-labels-idx1-ubyte.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-20])
    with pytest.raises(TaskError, match=r"t10k-labels-idx1-ubyte\.gz cannot be unpacked .*: get it again"):
        find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))
    packed.write_bytes(whole)
    find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))
    (raw / "train-images-idx3-ubyte").write_bytes(b"not images")
    with pytest.raises(TaskError, match=r"torchvision cannot read the files of MNIST in .*/MNIST/raw \("):
        find_task("mnist").load_data(DataSpec(data_dir=mnist_dir))
    assert not list(raw.glob("*.part"))


def test_only_with_download_is_torchvision_told_to_fetch(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import mnist

    def fetch(url, download_root, filename, md5):
        fetched.append((url, filename, md5))
        source = tmp_path / "elsewhere" / "MNIST" / "raw" / filename
        Path(download_root, filename.removesuffix(".gz")).write_bytes(gzip.decompress(source.read_bytes()))

    fetched = []
    small_sets.write_mnist(tmp_path / "elsewhere")
    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    with pytest.raises(TaskError):
        find_task("mnist").load_data(DataSpec(data_dir=tmp_path / "data"))
    assert fetched == []
    assert len(find_task("mnist").load_data(DataSpec(data_dir=tmp_path / "data", download=True))[0]) == 200
    assert [name for _, name, _ in fetched] == [name for name, _ in mnist.MNIST.resources]
    assert len(find_task("mnist").load_test_data(DataSpec(data_dir=tmp_path / "data", download=True))[0]) == 50
    assert len(fetched) == 4  # what is there is not fetched again


def test_a_download_that_fails_says_where_else_the_files_come_from(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import cifar

    def fail(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    with pytest.raises(TaskError) as caught:
        find_task("cifar10").load_data(DataSpec(data_dir=tmp_path, download=True))
    assert str(caught.value) == (
        f"task cifar10: torchvision cannot download CIFAR10 to {tmp_path}: no route to host. Or put its files into "
        f"{tmp_path}/cifar-10-batches-py by hand, from https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    )


def test_agents_of_one_device_that_start_together_unpack_once(mnist_dir):
    code = (
        "import sys; from pathlib import Path\n"
        "from midge.tasks.base import DataSpec; from midge.tasks.registry import find_task\n"
        "print(len(find_task('mnist').load_data(DataSpec(data_dir=Path(sys.argv[1])))[0]))"
    )
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(mnist_dir)], stdout=subprocess.PIPE, text=True, cwd=root, env=unmeasured()
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["200", "200"]
