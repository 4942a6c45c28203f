"""What can be said of data before any training, and how it is shown. No torch: stand-ins have the shape of its classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.tasks.base import TaskError
from midge.tasks.inspection import labels_of, summarize
from midge.tasks.summary import DataSummary, LabelCount, bar_chart, table
from tests.unit.tiny_tasks import TinyTask


class Sized(TinyTask):
    """Counts whatever has a length; a pair has that of its second."""

    def num_examples(self, data):
        return len(data[1]) if isinstance(data, tuple) else len(data)


class DataSet:
    """As torchvision's are."""

    classes = ("cat", "dog", "cow")

    def __init__(self, targets) -> None:
        self.targets = targets
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index):
        self.num_read += 1
        return np.zeros((3, 8, 8)), 0


class Unlabelled(DataSet):
    """Its labels come with its examples alone."""

    def __init__(self, labels) -> None:
        super().__init__(labels)
        self._labels = labels
        del self.targets

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index):
        self.num_read += 1
        return np.zeros(4), self._labels[index]


class Subset:
    def __init__(self, dataset, indices) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


class Loader:
    """As torch's loader of data: its length is that of its batches."""

    batch_sampler = ()

    def __init__(self, dataset, sampler) -> None:
        self.dataset = dataset
        self.sampler = sampler

    def __len__(self) -> int:
        return (len(self.sampler) + 1) // 2


PAIR = (np.zeros((4, 8)), np.array([1, 0, 1, 1]))


def line(data, num_examples=None, **attributes) -> str:
    task = Sized()
    if num_examples is not None:
        task.num_examples = lambda _: num_examples
    for name, value in attributes.items():
        setattr(task, name, value)
    return summarize(task, data).line()


def test_of_a_pair_of_arrays_all_is_known():
    assert summarize(Sized(), PAIR) == DataSummary(
        num_examples=4, input_shape=(8,), labels=(LabelCount(0, 1), LabelCount(1, 3))
    )
    assert line(PAIR) == "4 examples of shape (8,), labels 0:1 1:3"
    assert line(PAIR, label_names=("off", "on")) == "4 examples of shape (8,), labels off:1 on:3"
    assert line(PAIR, label_names=("off",)) == "4 examples of shape (8,), labels off:1 1:3"
    assert line((PAIR[0], PAIR[1] == 1)) == "4 examples of shape (8,), labels 0:1 1:3"


@pytest.mark.parametrize("targets", [np.zeros(4), np.zeros((4, 2), int), np.array(["a"] * 4)])
def test_targets_that_are_no_labels_are_not_counted(targets):
    assert line((np.zeros((4, 8)), targets)) == "4 examples of shape (8,)"


def test_a_data_set_s_targets_are_read_without_any_example_but_the_first():
    data = DataSet([2, 2, 0])
    assert line(data) == "3 examples of shape (3, 8, 8), labels cat:1 cow:2"
    assert data.num_read == 1


def test_labels_that_come_with_examples_alone_are_read_with_them_up_to_a_limit():
    data = Unlabelled([5, 3, 5])
    assert line(data) == "3 examples of shape (4,), labels 3:1 5:2"
    assert labels_of(data, max_read=3).tolist() == [5, 3, 5]
    assert labels_of(data, max_read=2) is None
    assert labels_of(Unlabelled([0.5, 1.5])) is None


def test_a_subset_and_a_loader_say_what_their_data_set_does():
    assert line(Subset(DataSet([2, 2, 0, 1]), [3, 0])) == "2 examples of shape (3, 8, 8), labels dog:1 cow:1"
    whole = Loader(DataSet([2, 2, 0]), range(3))
    assert line(whole, 3) == "3 examples of shape (3, 8, 8), labels cat:1 cow:2"
    assert line(Loader(DataSet([2, 2, 0]), range(2)), 2) == "2 examples"  # which two, its sampler knows


@pytest.mark.parametrize("data", [7, "text", None, {"a": 1}, {1, 2}, [{"x": 1}], (1, 2, 3)])
def test_of_anything_else_the_number_of_examples_is_said(data):
    assert line(data, 7) == "7 examples"
    assert summarize(TinyTask(), 1).line() == "1 example"


def test_a_table_that_is_not_counted_by_number_is_no_data_set():
    class Frame:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, name):
            raise KeyError(name)

    assert line(Frame()) == "3 examples"


def test_labels_that_are_not_as_many_as_the_examples_are_not_shown():
    assert line(PAIR, 3) == "3 examples of shape (8,)"


def test_no_example_is_an_error_that_says_where_to_look():
    with pytest.raises(TaskError, match="task tiny: no examples; look at what load_data reads and at the partition"):
        summarize(TinyTask(), 0)


def test_one_label_is_one_class_and_none_readable_is_not():
    assert summarize(Sized(), (np.zeros((2, 1)), np.array([4, 4]))).is_of_one_class
    assert not summarize(Sized(), PAIR).is_of_one_class
    assert not summarize(TinyTask(), 1).is_of_one_class


def test_data_without_labels_have_none():
    assert summarize(TinyTask(), 1).labels_line() == "none"


def test_of_many_labels_a_line_shows_the_first():
    counts = tuple(LabelCount(label, 1) for label in range(100))
    shown = DataSummary(num_examples=100, labels=counts).labels_line()
    assert shown == "0:1 1:1 2:1 3:1 4:1 5:1 6:1 7:1 8:1 9:1 10:1 11:1 and 88 more"


def test_data_without_labels_such_as_a_regression_s_are_no_failure_in_the_log():
    assert DataSummary(num_examples=100).labels_line() == "none"


# As a chart and as a table.


def test_bars_are_in_proportion_and_the_longest_fills_the_width():
    counts = [LabelCount(0, 40), LabelCount(1, 20), LabelCount(2, 5), LabelCount(10, 1)]
    # 20 columns: 2 of labels, 2 of counts, two gaps of 2: 12 for the bar. 1 of 40 is 0.3 columns: 2 eighths.
    assert bar_chart(counts, 20) == [
        " 0  40  ████████████",
        " 1  20  ██████",
        " 2   5  █▌",
        "10   1  ▎",
    ]
    assert bar_chart(counts, 20, blocks=False) == [
        " 0  40  ############",
        " 1  20  ######",
        " 2   5  ##",
        "10   1  #",
    ]


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 10**7), st.text("abc", max_size=40)), min_size=1, max_size=9),
    st.integers(40, 200),
    st.booleans(),
)
def test_no_bar_is_wider_than_the_terminal_and_none_is_invisible(counts, width, blocks):
    drawn = bar_chart([LabelCount(*one) for one in counts], width, blocks=blocks)
    assert max(map(len, drawn)) <= width
    assert all(bar.split()[-1][0] in "#█▏▎▍▌▋▊▉" for bar in drawn)


def test_a_table_has_a_line_for_each_part_and_their_sum():
    rows = [
        DataSummary(num_examples=5, labels=(LabelCount(0, 2, "cat"), LabelCount(1, 3, "dog"))),
        DataSummary(num_examples=40, labels=(LabelCount(1, 40, "dog"),)),
    ]
    assert table(rows, 40) == [
        "part  examples  cat  dog",
        "   0         5    2    3",
        "   1        40    .   40",
        " all        45    2   43",
    ]
    assert table(rows, 20) == [
        "part  examples  labels  largest label",
        "   0         5       2        dog 60%",
        "   1        40       1       dog 100%",
    ]
