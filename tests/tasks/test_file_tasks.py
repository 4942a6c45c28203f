"""Folders of images as data, and the tasks whose data lie in files: from files to a training."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from midge.tasks.base import DataSpec, TaskError, TrainSpec
from midge.tasks.file_tasks import ArraysTask, CsvTask, ImagesTask
from midge.tasks.files import load_csv, load_images
from midge.tasks.inspection import summarize


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def said(read, *arguments, **options) -> str:
    with pytest.raises(TaskError) as error:
        read(*arguments, **options)
    return str(error.value)


def image(path: Path, colour=(255, 0, 0), size=(4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def pets(tmp_path) -> DataSpec:
    """Three cats in red and two dogs in blue, four pixels wide and three high, and what lies about in such folders."""
    for number in range(3):
        image(tmp_path / "cat" / f"{number}.png")
    for number in range(2):
        image(tmp_path / "dog" / "big" / f"{number}.PNG", (0, 0, 255))
    written(tmp_path / "cat" / "Thumbs.db", b"none")
    written(tmp_path / "dog" / "._0.png", b"none")
    (tmp_path / ".cache").mkdir()
    return DataSpec(data_dir=tmp_path)


def test_folders_are_classes_and_files_in_them_examples(pets):
    found = load_images(pets)
    assert len(found) == 5
    assert (found.targets.tolist(), found.classes) == ([0, 0, 0, 1, 1], ("cat", "dog"))
    red, label = found[0]
    assert (red.shape, red.dtype, label) == ((3, 3, 4), np.float32, 0)
    assert red[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert found[4][0][:, 2, 3].tolist() == [0.0, 0.0, 1.0]


def test_images_are_scaled_turned_grey_and_transformed_as_asked(pets):
    grey, _ = load_images(pets, size=(2, 6), mode="L")[0]
    assert grey.shape == (1, 2, 6)
    assert grey[0, 0, 0] == np.float32(76) / 255  # 0.299 · 255, as ITU-R 601 weighs red
    assert load_images(pets, transform=lambda image: image.size)[0] == ((4, 3), 0)


def test_names_of_classes_hold_where_a_device_lacks_some(tmp_path):
    image(tmp_path / "dog" / "1.png")
    found = load_images(DataSpec(data_dir=tmp_path), class_names=("cat", "dog"))
    assert (found.targets.tolist(), found.classes) == ([1], ("cat", "dog"))
    assert said(load_images, DataSpec(data_dir=tmp_path), class_names=("cat", "cow")) == (
        f"{tmp_path}: folder 'dog' is none of the classes cat, cow: rename it or move it away"
    )


def test_an_agent_has_its_share_of_the_images(pets):
    assert load_images(DataSpec(data_dir=pets.data_dir, classes=(1,))).targets.tolist() == [1, 1]
    parts = [
        load_images(DataSpec(data_dir=pets.data_dir, partition="contiguous", part=part, num_parts=2)).targets.tolist()
        for part in range(2)
    ]
    assert parts == [[0, 0, 0], [1, 1]]


def test_images_in_memory_are_those_of_the_files(pets):
    found = load_images(pets)
    inputs, labels = found.tensors()
    assert tuple(inputs.shape) == (5, 3, 3, 4)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert all(np.array_equal(inputs[index].numpy(), found[index][0]) for index in range(5))


def test_a_folder_without_classes_or_without_images_is_said(tmp_path):
    image(tmp_path / "1.png")
    assert said(load_images, DataSpec(data_dir=tmp_path)).startswith(
        f"{tmp_path}: no folder in it: expected a folder for"
    )
    for name in ("cat", "dog"):
        written(tmp_path / name / "readme.txt", b"")
    assert said(load_images, DataSpec(data_dir=tmp_path)).startswith(f"{tmp_path}: no images in cat, dog: expected")


def test_a_file_that_is_no_image_is_said_before_any_training(pets):
    path = written(pets.data_dir / "dog" / "x.jpg", b"hello")
    assert said(load_images, pets) == f"{path}: no image that Pillow knows: mend it or move it away"


def test_an_image_that_is_cut_off_is_said_when_it_is_read(pets):
    path = pets.data_dir / "cat" / "0.png"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    seen = said(load_images(pets, size=(3, 4)).tensors)
    assert seen.startswith(f"{path}: the image cannot be read: ")


def test_images_of_two_sizes_need_one_to_be_scaled_to(pets):
    image(pets.data_dir / "dog" / "z.png", size=(9, 9))
    seen = said(load_images, pets)
    assert "has 4 by 3 pixels and" in seen
    assert seen.endswith("z.png 9 by 9: say which size all are to be scaled to")
    assert load_images(pets, size=(3, 4)).tensors()[0].shape[0] == 6


# Tasks.


class Pets(ImagesTask):
    name = "pets"
    class_names = ("bird", "cat", "dog")
    size = (4, 4)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Iris(CsvTask):
    name = "iris"
    class_names = ("setosa", "virginica")

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 2)


class Sensor(ArraysTask):
    name = "sensor"

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 2)


def learned(task, data) -> float:
    """The accuracy on what was trained with: these can be told apart."""
    spec = TrainSpec(local_epochs=60, batch_size=4, learning_rate=0.5)
    trained = task.train(task.initial_state(0), data, spec, lambda _: None)
    return task.evaluate(trained.state, data).metrics["accuracy"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_task_of_images_learns_from_a_folder_and_names_its_labels(pets, in_memory):
    task = Pets()
    task.in_memory = in_memory
    data = task.load_data(pets)
    summary = summarize(task, data)
    assert summary.line() == "5 examples of shape (3, 4, 4), labels cat:3 dog:2"
    assert learned(task, data) == 1.0


def test_images_from_memory_and_from_files_train_to_the_same_bits(pets):
    spec = TrainSpec(local_epochs=3, batch_size=2, seed=7)
    states = []
    for in_memory in (True, False):
        task = Pets()
        task.in_memory = in_memory
        states.append(task.train(task.initial_state(0), task.load_data(pets), spec, lambda _: None).state)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_tasks_of_tables_and_of_arrays_learn_and_say_what_they_have(tmp_path):
    written(tmp_path / "iris.csv", b"a,b,species\n0,1,setosa\n1,0,virginica\n0,2,setosa\n2,0,virginica\n")
    np.savez(tmp_path / "data.npz", inputs=np.array([[0, 1], [1, 0]]), labels=np.array([0, 1]))
    for task, line in (
        (Iris(), "4 examples of shape (2,), labels setosa:2 virginica:2"),
        (Sensor(), "2 examples of shape (2,), labels 0:1 1:1"),
    ):
        data = task.load_data(DataSpec(data_dir=tmp_path))
        assert summarize(task, data).line() == line
        assert learned(task, data) == 1.0


def test_the_coordinator_s_test_data_look_like_an_agent_s(tmp_path):
    written(tmp_path / "test.csv", b"a,b,species\n0,1,virginica\n")

    class Tested(Iris):
        test_path = str(tmp_path / "test.csv")

    inputs, labels = Tested().test_data()
    assert (inputs.tolist(), labels.tolist()) == ([[0.0, 1.0]], [1])
    assert Iris().test_data() is None


@pytest.mark.parametrize("wrap", ["data set", "subset", "loader", "loader of a subset"])
def test_torch_s_own_data_sets_subsets_and_loaders_are_read(wrap):
    labels = torch.tensor([3, 1, 3, 3])
    data = TensorDataset(torch.zeros(4, 2), labels)
    line = "4 examples of shape (2,), labels 1:1 3:3"
    if "subset" in wrap:
        data = Subset(data, [1, 2])
        line = "2 examples of shape (2,), labels 1:1 3:1"
    num_examples = len(data)
    if "loader" in wrap:
        data = DataLoader(data, batch_size=2, shuffle=True)
    task = Sensor()
    task.num_examples = lambda _: num_examples
    assert summarize(task, data).line() == line


def test_what_was_read_can_be_changed_in_place(tmp_path):
    path = written(tmp_path / "data.csv", b"a,label\n1,0\n2,1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an array that cannot be written to torch warns
        inputs, labels = load_csv(DataSpec(data_dir=path)).tensors()
    assert (inputs + 1).tolist() == [[2.0], [3.0]]
    assert labels.dtype == torch.int64
