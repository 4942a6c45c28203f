"""Data in files: what is read, which share of it, and that whatever is wrong with a file is said with its place."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.tasks.base import DataSpec, TaskError
from midge.tasks.files import load_arrays, load_csv, load_images
from midge.tasks.partition import select

FLOWERS = """length,width,species
5.1,3.5,setosa
7.0,3.2,versicolor
6.3,3.3,virginica
4.9,3.0,setosa
"""


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def said(read, *arguments, **options) -> str:
    with pytest.raises(TaskError) as error:
        read(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Tables.


def table(directory: Path, text: str | bytes, **options):
    return load_csv(DataSpec(data_dir=written(directory / "data.csv", text)), **options)


def test_columns_are_inputs_and_the_last_is_the_label_whose_words_are_numbered_in_sorted_order(tmp_path):
    found = table(tmp_path, FLOWERS)
    assert found.inputs.dtype == np.float32
    assert found.inputs.tolist() == np.array([[5.1, 3.5], [7.0, 3.2], [6.3, 3.3], [4.9, 3.0]], np.float32).tolist()
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [0, 1, 2, 0]
    assert found.class_names == ("setosa", "versicolor", "virginica")


def test_a_label_may_be_any_column_and_a_whole_number(tmp_path):
    found = table(tmp_path, "digit, a ,b\n 7 , 1 ,2\n0,3,-4e-1\n", label="digit")
    assert found.inputs.tolist() == [[1.0, 2.0], [3.0, np.float32(-0.4)]]
    assert found.labels.tolist() == [7, 0]
    assert found.class_names == ()


def test_with_names_of_classes_a_word_is_the_same_label_on_a_device_that_has_it_alone(tmp_path):
    names = ("setosa", "versicolor", "virginica")
    found = table(tmp_path, "a,species\n1,virginica\n2,virginica\n", class_names=names)
    assert (found.labels.tolist(), found.class_names) == ([2, 2], names)


def test_files_of_a_directory_are_read_in_order_of_their_names(tmp_path):
    for name, row in (("b", "2,1"), ("a", "1,0"), ("c", "3,1")):
        written(tmp_path / f"day-{name}.csv", f"x,label\n{row}\n")
    written(tmp_path / "notes.txt", "none of these")
    assert load_csv(DataSpec(data_dir=tmp_path)).inputs.tolist() == [[1.0], [2.0], [3.0]]
    assert load_csv(DataSpec(data_dir=tmp_path), pattern="day-[ab].csv").inputs.tolist() == [[1.0], [2.0]]


def test_spreadsheets_marks_blank_lines_quotes_and_other_delimiters_are_understood(tmp_path):
    text = '\ufeffa;"b;c";label\r\n1;2;0\r\n\r\n3;"4";1\r\n'
    found = table(tmp_path, text, delimiter=";")
    assert found.inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.labels.tolist() == [0, 1]


def test_an_agent_has_its_share_of_the_rows(tmp_path):
    rows = "".join(f"{number},{number % 3}\n" for number in range(60))
    path = written(tmp_path / "data.csv", f"x,label\n{rows}")
    labels = np.arange(60) % 3
    for spec in (
        DataSpec(data_dir=path, partition="contiguous", part=1, num_parts=3),
        DataSpec(data_dir=path, partition="dirichlet:1", part=2, num_parts=3, seed=4),
        DataSpec(data_dir=path, classes=(2,), def_prob=0.1),
    ):
        found = load_csv(spec)
        assert found.inputs[:, 0].astype(int).tolist() == select(labels, spec).tolist()
        assert found.labels.tolist() == labels[select(labels, spec)].tolist()


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "the file is empty: expected a line of column names, and a row for each example"),
        ("\n\n", "", "the file is empty"),
        ("a,label\n", "", "no rows below the names of the columns"),
        ("label\n1\n", ", line 1", "1 columns: expected names of at least two, the label's and one more, with ',' between"),
        ("a;label\n1;2\n", ", line 1", "1 columns"),
        ("1,2,3\n4,5,6\n", ", line 1", "1, 2, 3 are numbers: expected the names of the columns"),
        ("a,a,label\n1,2,0\n", ", line 1", "column 'a' is there twice"),
        ("a,b,label\n1,2,0\n1,2\n", ", line 3", "2 cells: expected 3, as line 1 names columns"),
        ("a,b,label\n1,2,0\n1,,0\n", ", line 3, column b", "the value is missing: fill it in, or leave the row"),
        ("a,b,label\n1,NA,0\n", ", line 2, column b", "the value is missing ('NA')"),
        ("a,b,label\nnan,1,0\n", ", line 2, column a", "the value is missing ('nan')"),
        ("a,b,label\n1,blue,0\n", ", line 2, column b", "'blue' is no number that float32 can hold: features are numbers"),
        ("a,b,label\n1,1e39,0\n", ", line 2, column b", "'1e39' is no number that float32 can hold"),
        ("a,b,label\ninf,2,0\n", ", line 2, column a", "'inf' is no number"),
        ('a,b,label\n1,"2\n",0\n1,x,0\n', ", line 4, column b", "'x' is no number"),
        ("a,b,label\n1,2,\n", ", line 2, column label", "the label is missing: fill it in, or leave the row out"),
        ("a,b,label\n1,2,0\n1,2,-1\n", ", line 3, column label", "label -1: expected a whole number, 0 to 2147483647"),
        ("a,b,label\n1,2,0\n1,2,2.5\n", ", line 3, column label", "label 2.5: expected whole numbers or words"),
        ('a,b,label\n1,"2,0\n', ", line 2", "no CSV: unexpected end of data"),
        (b"a,b,label\n1,2,caf\xe9\n", "", "byte 17 is not UTF-8: save the table as CSV in UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_table_is_said_with_file_line_and_column(tmp_path, text, place, message):
    seen = said(table, tmp_path, text)
    assert seen.startswith(f"{tmp_path}/data.csv{place}: ")
    assert message in seen


def test_a_label_s_column_that_is_not_there_is_met_with_the_one_that_was_meant(tmp_path):
    assert said(table, tmp_path, FLOWERS, label="specie").endswith(
        "line 1: no column 'specie' for the label; the columns are length, width, species. Did you mean 'species'?"
    )


def test_a_word_that_is_no_class_is_said_with_its_place(tmp_path):
    seen = said(table, tmp_path, FLOWERS, class_names=("setosa", "virginica"))
    assert seen.endswith("data.csv, line 3, column species: 'versicolor' is none of the classes setosa, virginica")


def test_files_of_other_columns_do_not_mix(tmp_path):
    written(tmp_path / "a.csv", "x,label\n1,0\n")
    written(tmp_path / "b.csv", "y,label\n1,0\n")
    seen = said(load_csv, DataSpec(data_dir=tmp_path))
    assert seen == f"{tmp_path}/b.csv, line 1: the columns are y, label: expected those of {tmp_path}/a.csv, x, label"


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_examples_or_an_error_of_the_task(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    try:
        found = load_csv(DataSpec(data_dir=written(path, content)))
    except TaskError:
        return
    assert np.isfinite(found.inputs).all()
    assert len(found.inputs) == len(found.labels) > 0
    assert found.labels.min() >= 0


# Where data lie.


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (load_csv, "CSV files with a line of column names and a row for each example"),
        (load_arrays, "an .npz file with arrays inputs and labels, or inputs.npy and labels.npy"),
        (load_images, "a folder for each class, with images in it, such as cat/1.jpg"),
    ],
)
def test_without_data_it_is_said_where_they_should_be(tmp_path, read, expected):
    assert said(read, DataSpec()) == f"no data_dir is set: say with --data-dir where the data lie: {expected}"
    missing = tmp_path / "missing"
    assert said(read, DataSpec(data_dir=missing)) == f"{missing}: there is no such directory: expected {expected}"
    assert str(tmp_path) in said(read, DataSpec(data_dir=tmp_path))
    assert said(read, DataSpec(data_dir=tmp_path)).endswith(f"expected {expected}")


# Arrays.


def saved(directory: Path, **arrays) -> DataSpec:
    np.savez(directory / "data.npz", **arrays)
    return DataSpec(data_dir=directory)


INPUTS = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


def test_arrays_are_read_from_one_file_or_from_a_pair_alike(tmp_path):
    spec = saved(tmp_path, inputs=INPUTS, labels=LABELS)
    (tmp_path / "pair").mkdir()
    np.save(tmp_path / "pair" / "inputs.npy", INPUTS)
    np.save(tmp_path / "pair" / "labels.npy", LABELS)
    for data_dir in (spec.data_dir, spec.data_dir / "data.npz", tmp_path / "pair"):
        found = load_arrays(DataSpec(data_dir=data_dir), class_names=("a", "b", "c"))
        assert (found.inputs.dtype, found.labels.dtype) == (np.float32, np.int64)
        assert found.inputs.tolist() == INPUTS.tolist()
        assert found.labels.tolist() == LABELS.tolist()
        assert found.class_names == ("a", "b", "c")
        assert type(found.inputs) is np.ndarray


def test_an_agent_has_its_share_of_the_arrays(tmp_path):
    spec = saved(tmp_path, inputs=INPUTS, labels=LABELS)
    found = load_arrays(DataSpec(data_dir=spec.data_dir, partition="contiguous", part=1, num_parts=2))
    assert found.inputs.tolist() == INPUTS[3:].tolist()
    assert load_arrays(DataSpec(data_dir=spec.data_dir, classes=(2,))).labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": INPUTS}, "no array 'labels'; there is inputs: save it with np.savez(file, inputs=..., labels=...)"),
        ({"x": INPUTS, "y": LABELS}, "no array 'inputs'; there is x, y"),
        ({"inputs": INPUTS, "labels": LABELS[:5]}, "6 inputs and 5 labels: expected as many"),
        ({"inputs": INPUTS, "labels": LABELS / 2}, "labels (6,) float64: expected one whole number an example"),
        ({"inputs": INPUTS, "labels": np.eye(6, dtype=int)}, "labels (6, 6) int64: expected one whole number"),
        ({"inputs": np.array(["a"] * 6), "labels": LABELS}, "inputs (6,) <U1: expected numbers"),
        ({"inputs": np.array(1.0), "labels": LABELS}, "inputs () float64: expected numbers, examples along the first"),
        ({"inputs": INPUTS[:0], "labels": LABELS[:0]}, "no examples: expected at least one"),
        ({"inputs": INPUTS, "labels": LABELS - 1}, "label -1: expected 0 to 2147483647"),
        ({"inputs": np.where(INPUTS == 13, np.nan, INPUTS), "labels": LABELS}, "inputs[3] holds a value that is not"),
        ({"inputs": np.full((6, 1), 1e39), "labels": LABELS}, "inputs[0] holds a value that is not finite"),
        ({"inputs": np.array([None] * 6), "labels": LABELS}, "it holds objects, not numbers"),
    ],
)
def test_what_is_wrong_with_arrays_is_said(tmp_path, arrays, message):
    seen = said(load_arrays, saved(tmp_path, **arrays))
    assert seen.startswith(f"{tmp_path}/data.npz: ")
    assert message in seen


def test_a_label_beyond_the_classes_is_said(tmp_path):
    spec = saved(tmp_path, inputs=INPUTS, labels=LABELS)
    assert said(load_arrays, spec, class_names=("a", "b")).endswith("label 2: expected 0 to 1")


def test_of_several_files_it_is_said_which_are_there(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", inputs=INPUTS, labels=LABELS)
    assert "a.npz, b.npz found: expected an .npz file" in said(load_arrays, DataSpec(data_dir=tmp_path))
    np.save(tmp_path / "inputs.npy", INPUTS)
    assert said(load_arrays, DataSpec(data_dir=tmp_path)) == (
        f"{tmp_path}/labels.npy: there is no such file: inputs.npy and labels.npy go together"
    )


def whole_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, inputs=INPUTS, labels=LABELS)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x93NUMPY\x01", whole_archive()[:300], b"PK\x03\x04" + b"\0" * 40]
)
def test_a_file_that_is_broken_is_said_to_be(tmp_path, content):
    written(tmp_path / "data.npz", content)
    assert said(load_arrays, DataSpec(data_dir=tmp_path)).startswith(f"{tmp_path}/data.npz: ")


def test_an_archive_whose_member_is_damaged_is_said_to_be(tmp_path):
    spec = saved(tmp_path, inputs=INPUTS, labels=LABELS)
    path = tmp_path / "data.npz"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("inputs.npy").header_offset
    content[offset + 170] ^= 0xFF
    path.write_bytes(content)
    assert said(load_arrays, spec).startswith(f"{path}: ")
