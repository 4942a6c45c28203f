"""Models that other programs wrote: every type is read as its writer meant it, and what does not fit is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coordinator.model_format import ModelError
from coordinator.model_import import fit_state, read_state
from coordinator.models import ModelStore
from midge.tasks.flatten import layout_of
from midge.wire.errors import LayoutError

STATE = {"fc.weight": np.zeros((10, 4), np.float32), "fc.bias": np.ones(10, np.float32), "steps": np.array(3, np.int64)}
LAYOUT = layout_of(STATE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
    ids=str,
)
def test_each_type_is_read_as_torch_wrote_it(path, dtype):
    tensor = (torch.arange(6).reshape(2, 3) * 1.5).to(dtype)
    save_file({"x": tensor, "scalar": torch.tensor(7, dtype=dtype), "none": torch.empty(0, 4, dtype=dtype)}, path)
    state = read_state(path)
    assert {name: array.shape for name, array in state.items()} == {"x": (2, 3), "scalar": (), "none": (0, 4)}
    np.testing.assert_array_equal(state["x"], tensor.numpy(), strict=True)
    assert state["scalar"] == 7


def test_bfloat16_is_float32_and_booleans_are_booleans(path):
    tensor = torch.tensor([1.0, -2.5, 3.140625, 0.0], dtype=torch.bfloat16)
    save_file({"x": tensor, "mask": torch.tensor([True, False])}, path)
    state = read_state(path)
    np.testing.assert_array_equal(state["x"], tensor.float().numpy(), strict=True)
    assert state["mask"].tolist() == [True, False]
    assert state["mask"].dtype == np.bool_


def test_what_we_export_is_read_back(path, tmp_path):
    models = ModelStore(tmp_path / "models")
    models.export(models.save_state(STATE), path)
    read = fit_state(read_state(path), LAYOUT)
    assert list(read) == list(STATE)
    for name, array in STATE.items():
        np.testing.assert_array_equal(read[name], array, strict=True)


def write(path, header: dict | bytes, body: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "problem"),
    [
        ({"x": ENTRY}, bytes(7), r"x \(2,\) F32 lies in bytes 0 to 8 of 7: the file is damaged or cut"),
        ({"x": {**ENTRY, "shape": [3]}}, bytes(12), r"x \(3,\) F32 lies in bytes 0 to 8 of 12"),
        ({"x": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), "lies in bytes 8 to 0 of 8"),
        ({"x": {**ENTRY, "shape": [-2]}}, bytes(8), "its header is damaged"),
        ({"x": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(8), r"x \(2,\) is F8_E4M3: expected one of F64, F32"),
        ({"x": 3}, b"", "its header is damaged"),
        (b"{", b"", "its header is damaged"),
        (b'{"\xff": 1}', b"", "its header is damaged"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(path, header, body, problem):
    write(path, header, body)
    with pytest.raises(ModelError, match=problem):
        read_state(path)


def test_a_file_cut_anywhere_is_refused(path):
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_state(path)


@pytest.mark.fault(22)
def test_a_file_of_torch_save_is_refused_and_told_what_to_do(path):
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"save it with safetensors\.torch\.save_file"):
        read_state(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(path):
    with pytest.raises(ModelError, match=r"weights\.safetensors: No such file or directory"):
        read_state(path)


def test_tensors_are_matched_by_name_whatever_their_order():
    fitted = fit_state(dict(reversed(STATE.items())), LAYOUT)
    assert list(fitted) == ["fc.weight", "fc.bias", "steps"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"fc.weight": np.zeros((10, 8), np.float32)},
            r"has fc\.weight \(10, 8\) float32, expected \(10, 4\) float32",
        ),
        ({"fc.bias": np.ones(10)}, r"has fc\.bias \(10,\) float64, expected \(10,\) float32"),
        ({"fc.bias": None}, r"lacks fc\.bias \(10,\) float32"),
        ({"extra": np.ones(1)}, r"has extra, which the task's model has not"),
        ({"fc.bias": None, "bias": np.ones(10, np.float32)}, r"lacks fc\.bias .* and has bias, which"),
        ({"fc.bias": np.full(10, np.nan, np.float32)}, r"has a value in fc\.bias \(10,\) float32 that is not finite"),
    ],
)
def test_what_does_not_fit_the_task_is_named_with_both_shapes(changes, problem):
    state = {name: array for name, array in (STATE | changes).items() if array is not None}
    with pytest.raises(LayoutError, match=f"^{problem}"):
        fit_state(state, LAYOUT)
