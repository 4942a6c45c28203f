"""Models as files: what is stored comes back bit for bit, plain safetensors reads it, and damage is seen."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading

import numpy as np
import pytest
import safetensors.numpy

from coordinator.models import ModelError, ModelStore
from midge.tasks.flatten import layout_of, state_to_vector, vector_to_state
from midge.wire.errors import LayoutError
from midge.wire.layout import Layout, TensorSpec, model_hash


def batch_norm_state():
    """A layer with batch normalisation, in torch's order: an int64 counter between floats, and buffers of other types."""
    return {
        "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8,
        "bn.running_mean": np.array([0.5, -0.0], np.float32),
        "bn.num_batches_tracked": np.array(41, np.int64),
        "mask": np.array([True, False, True]),
        "half": np.array([1.5, -2.0], np.float16),
        "double": np.array([[0.25]], np.float64),
        "small": np.array([-3, 7], np.int16),
        "fc.bias": np.array([1.0], np.float32),
    }


@pytest.fixture
def models(tmp_path):
    return ModelStore(tmp_path / "models")


def path_of(models, digest):
    return models.path / f"{digest}.safetensors"


def same(one, other):
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def test_a_state_comes_back_bit_for_bit_in_its_order_and_types(models):
    digest = models.save_state(batch_norm_state())
    with models.open(digest) as model:
        assert same(model.state(), batch_norm_state())
        assert model.layout == layout_of(batch_norm_state())
        assert model.counters == (41, 1, 0, 1, -3, 7)
        # 6 of conv.weight, 2 of running_mean, 2 of half, 1 of double, 1 of fc.bias
        assert model.elements.tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.5, 0, 1.5, -2, 0.25, 1]
        assert not model.elements.flags.writeable


def test_the_digest_is_that_of_the_wire(models):
    state = {"w": np.array([1, 2], np.float32), "n": np.array(3, np.int64)}
    hasher = model_hash(layout_of(state), [3])
    hasher.update(np.array([1, 2], "<f4").tobytes())
    assert models.save_state(state) == hasher.hexdigest()


def test_a_model_written_in_slices_by_threads_is_the_file_that_a_state_gives(models, tmp_path):
    state = batch_norm_state()
    digest = models.save_state(state)
    whole = path_of(models, digest).read_bytes()
    vector, counters = state_to_vector(state, layout_of(state))
    other = ModelStore(tmp_path / "other")
    with other.writer(layout_of(state), counters) as writer:
        slices = [(9, 12), (0, 4), (4, 9)]
        threads = [threading.Thread(target=writer.write, args=(a, vector[a:b])) for a, b in slices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.commit() == digest
    assert path_of(other, digest).read_bytes() == whole


def test_plain_safetensors_reads_a_model_with_all_floats_as_float32(models):
    digest = models.save_state(batch_norm_state())
    loaded = safetensors.numpy.load_file(path_of(models, digest))
    assert loaded.keys() == batch_norm_state().keys()
    for name, array in batch_norm_state().items():
        expected = array.astype(np.float32) if array.dtype.kind == "f" else array
        assert loaded[name].dtype == expected.dtype
        assert np.array_equal(loaded[name], expected)


def test_tensors_are_aligned_and_the_vector_starts_at_a_multiple_of_64(models):
    content = path_of(models, models.save_state(batch_norm_state())).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    metadata = entries.pop("__metadata__")
    assert metadata["format"] == "midge-model-1"
    sizes = {"I64": 8, "F32": 4, "I16": 2, "BOOL": 1}
    for entry in entries.values():
        assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
    assert (start + entries["conv.weight"]["data_offsets"][0]) % 64 == 0
    # The vector in one piece, in the layout's order: 6, 2, 2, 1 and 1 elements of 4 bytes, after the 8 of the counter.
    names = ("conv.weight", "bn.running_mean", "half", "double", "fc.bias")
    assert [entries[name]["data_offsets"] for name in names] == [[8, 32], [32, 40], [40, 48], [48, 52], [52, 56]]
    assert max(entry["data_offsets"][1] for entry in entries.values()) == len(content) - start == 56 + 4 + 3


def test_equal_models_are_one_file(models):
    digest = models.save_state(batch_norm_state())
    assert models.save_state(batch_norm_state()) == digest
    assert models.digests() == {digest}


def test_a_counter_or_a_bit_more_is_another_model(models):
    digests = {models.save_state(batch_norm_state())}
    for name, value in (
        ("bn.num_batches_tracked", np.array(42)),
        ("bn.running_mean", np.array([0.5, 0.0], np.float32)),
    ):
        digests.add(models.save_state(batch_norm_state() | {name: value}))
    assert models.digests() == digests
    assert len(digests) == 3


def test_a_model_is_not_there_before_it_is_committed_nor_after_it_is_given_up(models):
    layout = Layout((TensorSpec("w", (2,), "float32"),))
    writer = models.writer(layout, ())
    writer.write(0, np.ones(2, np.float32))
    assert models.digests() == set()
    writer.abort()
    with pytest.raises(RuntimeError), models.writer(layout, ()) as writer:
        raise RuntimeError
    assert list(models.path.iterdir()) == []


def test_a_model_is_synced_before_it_has_its_name_and_its_name_after(models, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((stat.S_ISDIR(os.fstat(fd).st_mode), models.digests())))
    digest = models.save_state(batch_norm_state())
    assert seen == [(False, set()), (True, {digest})]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_no_model_and_no_leftover(models, monkeypatch, call):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        models.save_state(batch_norm_state())
    assert list(models.path.iterdir()) == []


def test_a_write_that_is_cut_short_is_finished(models, monkeypatch):
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, body, offset: original(fd, bytes(body[:5]), offset))
    digest = models.save_state(batch_norm_state())
    monkeypatch.undo()
    models.verify(digest)


def test_a_model_with_elements_missing_is_not_committed(models):
    layout = Layout((TensorSpec("w", (4,), "float32"),))
    with models.writer(layout, ()) as writer:
        writer.write(1, np.ones(3, np.float32))
        with pytest.raises(ValueError, match="3 elements were written: expected all 4"):
            writer.commit()
    assert models.digests() == set()


@pytest.mark.parametrize(
    ("start", "elements"),
    [(3, np.ones(2, np.float32)), (-1, np.ones(1, np.float32)), (0, np.ones(1)), (0, np.ones((1, 1), np.float32))],
)
def test_a_slice_outside_the_vector_or_of_another_type_is_refused(models, start, elements):
    with (
        models.writer(Layout((TensorSpec("w", (4,), "float32"),)), ()) as writer,
        pytest.raises(ValueError, match=r"expected float32\[n\] within 0 to 4"),
    ):
        writer.write(start, elements)


def test_leftovers_of_a_dead_process_are_removed_and_those_of_a_live_one_kept(models):
    dead, live = models.path / ".dead.tmp", models.path / ".live.tmp"
    dead.write_bytes(b"half a model")
    with live.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ModelStore(models.path)
        assert [path.name for path in models.path.iterdir()] == [".live.tmp"]


def test_a_flipped_bit_is_seen(models):
    digest = models.save_state(batch_norm_state())
    models.verify(digest)
    content = bytearray(path_of(models, digest).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for offset in (start, start + 8, len(content) - 1):  # in the counter, in the vector, in the mask
        path_of(models, digest).write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        with pytest.raises(ModelError, match="its file was changed"):
            models.verify(digest)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_cut_file_is_refused_when_it_is_opened(models, length):
    digest = models.save_state(batch_norm_state())
    path_of(models, digest).write_bytes(path_of(models, digest).read_bytes()[:length])
    with pytest.raises(ModelError, match="restore it"):
        models.open(digest)


def test_a_safetensors_file_of_another_program_is_refused(models):
    digest = "0" * 64
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, path_of(models, digest))
    with pytest.raises(ModelError, match="no header of a model"):
        models.open(digest)
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, path_of(models, digest), {"format": "pt"})
    with pytest.raises(ModelError, match="has format 'pt': this version reads 'midge-model-1'"):
        models.open(digest)


def test_a_model_that_is_not_there_and_a_name_that_is_no_digest_are_errors(models):
    with pytest.raises(ModelError, match=r"model f{64} is not in"):
        models.open("f" * 64)
    with pytest.raises(ModelError, match="expected a digest of 64 hexadecimal digits"):
        models.delete("../../etc/passwd")


def test_a_deleted_model_is_gone_but_stays_readable_where_it_is_open(models):
    digest = models.save_state(batch_norm_state())
    with models.open(digest) as model:
        models.delete(digest)
        models.delete(digest)
        assert models.digests() == set()
        assert model.elements[1] == 0.125


def test_elements_outlive_their_file(models):
    model = models.open(models.save_state(batch_norm_state()))
    elements = model.elements
    model.close()
    model.close()
    assert elements[1] == 0.125


def test_releasing_memory_changes_nothing(models):
    with models.open(models.save_state(batch_norm_state())) as model:
        before = model.elements.tolist()
        model.release()
        assert model.elements.tolist() == before


def test_the_same_digest_is_the_same_bytes(models, tmp_path):
    digest = models.save_state(batch_norm_state())
    other = ModelStore(tmp_path / "other")
    assert other.save_state(batch_norm_state()) == digest
    one, two = (hashlib.sha256(path_of(store, digest).read_bytes()).hexdigest() for store in (models, other))
    assert one == two


def test_an_export_has_the_layouts_own_types(models, tmp_path):
    digest = models.save_state(batch_norm_state())
    models.export(digest, tmp_path / "out.safetensors")
    loaded = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert same({name: loaded[name] for name in batch_norm_state()}, batch_norm_state())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_rounds_bfloat16_to_the_nearest_and_ties_to_even(models, tmp_path):
    # bfloat16 keeps 7 bits: near 1 its steps are 2^-7. 1 + 2^-8 and 1 + 3 * 2^-8 are ties, to 1 and to 1 + 4 * 2^-8.
    layout = Layout((TensorSpec("w", (5,), "bfloat16"),))
    with models.writer(layout, ()) as writer:
        writer.write(0, np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5], np.float32))
        digest = writer.commit()
    models.export(digest, tmp_path / "out.safetensors")
    content = (tmp_path / "out.safetensors").read_bytes()
    assert b'"BF16"' in content
    bits = np.frombuffer(content[-10:], "<u2").astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -2.5]


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_an_export_that_would_overflow_is_refused_and_leaves_nothing(models, tmp_path, dtype, value):
    with models.writer(Layout((TensorSpec("w", (1,), dtype),)), ()) as writer:
        writer.write(0, np.array([value], np.float32))
        digest = writer.commit()
    with pytest.raises(ModelError, match=rf"w \(1,\) {dtype} holds a value that its type cannot"):
        models.export(digest, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_torch_loads_an_export_strictly(models, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(5, 1))
    network[2].to(torch.bfloat16)
    network[1](torch.ones(2, 3, 4, 4))
    expected = network.state_dict()
    specs = tuple(
        TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in expected.items()
    )
    layout = Layout(specs)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    vector, counters = state_to_vector({name: tensor.numpy() for name, tensor in state.items()}, layout)
    with models.writer(layout, counters) as writer:
        writer.write(0, vector)
        digest = writer.commit()
    models.export(digest, tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    network.load_state_dict(loaded, strict=True)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_tensor_named_like_the_metadata_is_refused(models):
    with pytest.raises(ModelError, match="__metadata__"):
        models.save_state({"__metadata__": np.ones(1, np.float32)})


def test_empty_tensors_and_odd_names_are_stored(models):
    state = {
        "empty": np.empty((0, 3), np.float32),
        'a "quoted" \u00fc name': np.array([1.0], np.float32),
        "no counters": np.empty(0, np.int64),
    }
    digest = models.save_state(state)
    with models.open(digest) as model:
        assert same(model.state(), state)
    assert safetensors.numpy.load_file(path_of(models, digest)).keys() == state.keys()


# A state and what travels of it.


def test_a_state_survives_the_way_through_vector_and_counters():
    layout = layout_of(batch_norm_state())
    vector, counters = state_to_vector(batch_norm_state(), layout)
    assert (vector.dtype, vector.shape, counters) == (np.float32, (12,), (41, 1, 0, 1, -3, 7))
    assert same(vector_to_state(vector, counters, layout), batch_norm_state())


def test_float64_is_rounded_to_float32_and_what_it_cannot_hold_is_infinite():
    vector, _ = state_to_vector({"w": np.array([1 + 2**-30, 1e300])}, layout_of({"w": np.zeros(2)}))
    assert vector.tolist() == [1.0, float("inf")]


def test_float32_tensors_of_a_state_are_views_of_the_vector():
    layout = layout_of({"w": np.zeros((2, 2), np.float32)})
    vector = np.zeros(4, np.float32)
    state = vector_to_state(vector, (), layout)
    vector[3] = 5
    assert state["w"][1, 1] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "state lacks w"),
        ({"extra": np.zeros(1)}, "state has unexpected extra"),
        ({"w": np.zeros((1, 2), np.float32)}, r"state has w \(1, 2\) float32: expected w \(2,\) float32"),
        ({"w": np.zeros(2, np.float64)}, r"state has w \(2,\) float64: expected w \(2,\) float32"),
        ({"n": np.array(1, np.int32)}, r"state has n \(\) int32: expected n \(\) int64"),
    ],
)
def test_a_state_that_does_not_fit_the_layout_is_refused(change, message):
    state = {"w": np.zeros(2, np.float32), "n": np.array(1, np.int64)}
    layout = layout_of(state)
    changed = {name: array for name, array in (state | change).items() if array is not None}
    with pytest.raises(LayoutError, match=message):
        state_to_vector(changed, layout)


@pytest.mark.parametrize("array", [np.zeros(1, np.complex64), np.array(["text"]), np.zeros(1, np.uint32)])
def test_an_array_of_a_type_that_cannot_travel_is_refused(array):
    with pytest.raises(LayoutError, match=rf"w \(1,\) is {array.dtype.name}: expected one of float32, float64"):
        layout_of({"w": array})


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        ((1,), "1 counters, the layout has 2"),
        ((128, 0), "counter 128 for a"),
        ((0, 2), "counter 2 for b"),
        ((-129, 0), "-128"),
    ],
)
def test_counters_that_do_not_fit_are_refused(models, counters, message):
    layout = Layout((TensorSpec("w", (1,), "float32"), TensorSpec("a", (), "int8"), TensorSpec("b", (1,), "bool")))
    with pytest.raises(LayoutError, match=message):
        vector_to_state(np.zeros(1, np.float32), counters, layout)
    with pytest.raises(LayoutError, match=message):
        models.writer(layout, counters)
    assert list(models.path.iterdir()) == []


def test_a_vector_of_another_length_or_type_is_refused():
    layout = layout_of({"w": np.zeros(2, np.float32)})
    for vector in (np.zeros(3, np.float32), np.zeros(2)):
        with pytest.raises(LayoutError, match=r"expected \(2,\) float32"):
            vector_to_state(vector, (), layout)
