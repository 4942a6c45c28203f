"""The spool: what was stored is there again after a restart, whatever happened to the end of the file."""

import contextlib
import errno
import hashlib
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from coordinator.spool import Recovery, RoundSpool, Spool
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.errors import FrameError, TopicError
from midge.wire.frames import decode_frame, encode_frame, run_tag

TAG = bytes(range(8))
OTHER_TAG = bytes(8)
RECORD_BYTES = 56
EXTENT = 2 * 1024 * 1024


def frame_of(index, values, tag=TAG, codec=FLOAT32, num_elements=None):
    elements = np.array(values, np.float32)
    return encode_frame(
        codec=codec,
        run_tag=run_tag("run"),
        round_num=3,
        index=index,
        num_elements=len(elements) if num_elements is None else num_elements,
        content_tag=tag,
        body=encode_float32(elements),
    )


def put(spool, agent_id, index, values, tag=TAG, sum_squares=0.0):
    encoded = frame_of(index, values, tag)
    return spool.append(agent_id, encoded, hashlib.sha256(encoded[40:]).digest(), sum_squares)


def read(spool, agent_id, index, tag=TAG):
    stored = spool.stored(agent_id, tag)[index]
    out = np.empty(stored.num_elements, np.float32)
    spool.read_into(stored, out)
    return out.tolist()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "3.spool"


@pytest.fixture
def spool(path):
    opened = RoundSpool(path)
    yield opened
    opened.close()


@pytest.fixture
def reopened():
    """Closes a segment and opens it again, as a restart does."""
    with contextlib.ExitStack() as stack:

        def restart(spool):
            spool.close()
            return stack.enter_context(contextlib.closing(RoundSpool(spool.path)))

        yield restart


def test_a_stored_frame_is_found_by_agent_tag_and_index(spool):
    assert put(spool, "pi-1", 0, [1, 2, 3], sum_squares=0.5)
    assert put(spool, "pi-2", 0, [7])
    stored = spool.stored("pi-1", TAG)
    assert list(stored) == [0]
    assert (stored[0].num_elements, stored[0].delta_sum_squares) == (3, 0.5)
    assert stored[0].body_digest == hashlib.sha256(np.array([1, 2, 3], "<f4").tobytes()).digest()
    assert read(spool, "pi-1", 0) == [1, 2, 3]
    assert read(spool, "pi-2", 0) == [7]
    assert not spool.stored("pi-1", OTHER_TAG)


@pytest.mark.parametrize("agent_id", ["a", "pi-1", "a-name-of-eleven", "x" * 64])
def test_bodies_are_aligned_for_any_length_of_names_and_bodies(spool, agent_id):
    for index, num_elements in enumerate((1, 2, 3, 1001)):
        put(spool, agent_id, index, range(num_elements))
    assert [frame.offset % 8 for frame in spool.stored(agent_id, TAG).values()] == [0, 0, 0, 0]
    assert read(spool, agent_id, 2) == [0, 1, 2]


def test_a_second_frame_of_the_same_index_is_refused_and_changes_nothing(spool):
    assert put(spool, "pi-1", 0, [1, 2])
    size_bytes = spool.size_bytes
    assert not put(spool, "pi-1", 0, [9, 9])
    assert spool.size_bytes == size_bytes
    assert read(spool, "pi-1", 0) == [1, 2]


def test_what_was_stored_is_there_after_a_restart(spool, reopened):
    put(spool, "pi-1", 1, [1, 2, 3], sum_squares=0.25)
    put(spool, "pi-1", 0, [4, 5])
    put(spool, "pi-2", 0, [6], tag=OTHER_TAG)
    before = dict(spool.stored("pi-1", TAG))
    again = reopened(spool)
    assert again.recovery == Recovery(num_frames=3, num_damaged=0, truncated_bytes=0)
    assert again.stored("pi-1", TAG) == before
    assert read(again, "pi-2", 0, OTHER_TAG) == [6]
    assert put(again, "pi-2", 1, [8], tag=OTHER_TAG)
    assert read(again, "pi-2", 1, OTHER_TAG) == [8]


def test_a_torn_record_at_any_byte_is_cut_off_and_the_one_before_kept(spool, path):
    put(spool, "pi-1", 0, [1, 2])
    first = spool.size_bytes
    put(spool, "pi-1", 1, [3, 4])
    spool.close()
    whole = path.read_bytes()
    assert len(whole) == 2 * first == 2 * (RECORD_BYTES + 8 + 40 + 8)
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        again = RoundSpool(path)
        assert list(again.stored("pi-1", TAG)) == [0], length
        assert again.recovery.num_frames == 1
        assert path.stat().st_size == again.size_bytes == first
        assert put(again, "pi-1", 1, [5, 6])
        assert read(again, "pi-1", 1) == [5, 6]
        again.close()


def test_a_damaged_body_loses_its_frame_and_no_other(spool, path):
    for index in range(3):
        put(spool, "pi-1", index, [index])
    offset = spool.stored("pi-1", TAG)[1].offset
    spool.close()
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    again = RoundSpool(path)
    assert again.recovery == Recovery(num_frames=2, num_damaged=1, truncated_bytes=0)
    assert sorted(again.stored("pi-1", TAG)) == [0, 2]
    assert put(again, "pi-1", 1, [1])
    assert read(again, "pi-1", 1) == [1]
    again.close()


@pytest.mark.parametrize("byte", [0, 4, 6, 8, 12, 44, 52, 56])
def test_a_damaged_record_header_ends_the_log_there(spool, path, byte):
    put(spool, "pi-1", 0, [1])
    start = spool.size_bytes
    put(spool, "pi-1", 1, [2])
    put(spool, "pi-1", 2, [3])
    spool.close()
    damaged = bytearray(path.read_bytes())
    damaged[start + byte] ^= 0x10
    path.write_bytes(damaged)
    again = RoundSpool(path)
    assert sorted(again.stored("pi-1", TAG)) == [0]
    assert again.recovery.truncated_bytes > 0
    assert again.size_bytes == start
    again.close()


def test_zeros_that_a_power_failure_left_are_no_records(spool, path):
    put(spool, "pi-1", 0, [1])
    size_bytes = spool.size_bytes
    spool.close()
    with path.open("ab") as file:
        file.write(bytes(4096))
    again = RoundSpool(path)
    assert again.recovery == Recovery(num_frames=1)
    assert again.size_bytes == path.stat().st_size == size_bytes
    again.close()


def test_a_file_that_is_no_segment_is_emptied(path):
    path.write_bytes(b"not a spool, but long enough to hold the header of a record, and more")
    spool = RoundSpool(path)
    assert spool.recovery.truncated_bytes == 69
    assert spool.size_bytes == 0
    spool.close()


def test_a_forgotten_update_is_gone_also_after_a_restart_and_may_come_again(spool, reopened):
    put(spool, "pi-1", 0, [1])
    put(spool, "pi-2", 0, [2])
    spool.forget("pi-1", TAG)
    assert not spool.stored("pi-1", TAG)
    again = reopened(spool)
    assert not again.stored("pi-1", TAG)
    assert read(again, "pi-2", 0) == [2]
    assert put(again, "pi-1", 0, [3])
    once_more = reopened(again)
    assert read(once_more, "pi-1", 0) == [3]


def test_forgetting_what_is_not_there_writes_nothing(spool):
    spool.forget("pi-1", TAG)
    assert spool.size_bytes == 0


def test_many_appends_cost_one_sync_and_nothing_costs_none(spool, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    spool.sync()
    assert synced == []
    for index in range(100):
        put(spool, "pi-1", index, [index])
    spool.sync()
    spool.sync()
    assert len(synced) == 1


def test_a_new_segment_has_a_durable_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    Spool(tmp_path / "spool").round("run-a", 1).close()
    assert synced == [str(tmp_path / "spool"), str(tmp_path / "spool" / "run-a")]


def test_records_of_a_killed_process_are_synced_by_the_next(spool, monkeypatch, reopened):
    put(spool, "pi-1", 0, [1])
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    again = reopened(spool)
    again.sync()
    assert len(synced) == 1


def refuse(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_after_a_sync_that_failed_nothing_is_written_and_no_later_sync_says_that_all_is_well(spool, monkeypatch):
    """A second sync succeeds though the first one's data are lost: the kernel has dropped them."""
    put(spool, "pi-1", 0, [1])
    spool.sync()
    put(spool, "pi-1", 1, [2])
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        spool.sync()
    monkeypatch.undo()
    with pytest.raises(OSError, match="a sync failed; it must be opened again"):
        spool.sync()
    with pytest.raises(OSError, match="a sync failed; it must be opened again"):
        put(spool, "pi-1", 2, [3])


def test_opened_again_after_a_sync_that_failed_it_has_what_was_durable_and_no_more(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    segment = spool.round("run-a", 3)
    put(segment, "pi-1", 0, [1])
    segment.sync()
    durable = segment.size_bytes
    put(segment, "pi-2", 0, [2])
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        segment.sync()
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        spool.reopen()  # the disk still fails
    monkeypatch.undo()
    spool.reopen()
    again = spool.round("run-a", 3)
    assert again is not segment
    assert segment.closed
    assert again.size_bytes == durable
    assert read(again, "pi-1", 0) == [1]
    assert not again.stored("pi-2", TAG)
    assert put(again, "pi-2", 0, [2])
    again.sync()
    spool.close()


def test_a_segment_that_an_earlier_process_made_is_durable_from_its_opening_on(tmp_path, monkeypatch):
    """What was accepted before a restart must not be cut off with what came after it."""
    first = Spool(tmp_path)
    put(first.round("run-a", 3), "pi-1", 0, [1])
    first.close()
    spool = Spool(tmp_path)
    put(spool.round("run-a", 3), "pi-2", 0, [2])
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        spool.round("run-a", 3).sync()
    monkeypatch.undo()
    spool.reopen()
    assert read(spool.round("run-a", 3), "pi-1", 0) == [1]
    assert not spool.round("run-a", 3).stored("pi-2", TAG)
    spool.close()


def test_opened_again_after_a_full_disk_it_has_all_that_came(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    put(spool.round("run-a", 3), "pi-1", 0, [1])
    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        put(spool.round("run-a", 3), "pi-1", 1, [2])
    monkeypatch.undo()
    spool.reopen()
    assert list(spool.round("run-a", 3).stored("pi-1", TAG)) == [0]
    spool.close()


def test_a_full_disk_leaves_the_segment_as_it_was(spool, path, monkeypatch, reopened):
    put(spool, "pi-1", 0, [1])
    size_bytes = spool.size_bytes

    def refuse(fd, body, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: original(fd, b"".join(parts)[:20], offset))
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        put(spool, "pi-1", 1, [2])
    assert sorted(spool.stored("pi-1", TAG)) == [0]
    assert spool.size_bytes == path.stat().st_size == size_bytes
    monkeypatch.undo()
    assert put(spool, "pi-1", 1, [2])
    assert read(reopened(spool), "pi-1", 1) == [2]


def test_a_write_that_is_cut_short_is_finished(spool, monkeypatch, reopened):
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: os.pwrite(fd, b"".join(parts)[:20], offset))
    assert put(spool, "pi-1", 0, [1, 2, 3])
    assert read(reopened(spool), "pi-1", 0) == [1, 2, 3]


def test_a_segment_beyond_2_mib_grows_in_extents_and_is_recovered_to_its_end(spool, path, reopened):
    values = np.arange(200_000, dtype=np.float32)  # 800 kB: the third record crosses 2 MiB
    for index in range(2):
        put(spool, "pi-1", index, values)
    assert path.stat().st_size == spool.size_bytes < EXTENT
    put(spool, "pi-1", 2, values)
    assert EXTENT < spool.size_bytes < path.stat().st_size == 2 * EXTENT
    size_bytes = spool.size_bytes
    again = reopened(spool)
    assert again.recovery == Recovery(num_frames=3)
    assert again.size_bytes == path.stat().st_size == size_bytes
    put(again, "pi-1", 3, values)
    assert all(read(again, "pi-1", index) == values.tolist() for index in range(4))


def test_a_frame_larger_than_an_extent_fits(spool, reopened):
    values = np.arange(EXTENT // 4 + 1000, dtype=np.float32)
    put(spool, "pi-1", 0, [5])
    put(spool, "pi-1", 1, values)
    again = reopened(spool)
    out = np.empty(len(values), np.float32)
    again.read_into(again.stored("pi-1", TAG)[1], out)
    assert np.array_equal(out, values)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"MF", "at least the 40 of its header"),
        (frame_of(0, [1, 2], num_elements=3), "8 bytes for 3 elements"),
        (frame_of(0, [1, 2], codec=9), "codec 9"),
    ],
)
def test_what_is_no_float32_frame_is_refused(spool, encoded, message):
    with pytest.raises(FrameError, match=message):
        spool.append("pi-1", encoded, bytes(32), 0.0)
    assert spool.size_bytes == 0


def test_a_name_that_is_no_identifier_is_our_bug(spool):
    with pytest.raises(ValueError, match="agent id of 65 bytes: expected an identifier, of at most 64"):
        put(spool, "x" * 65, 0, [1])
    assert spool.size_bytes == 0


def test_a_frame_that_was_decoded_already_is_not_decoded_again(spool, monkeypatch):
    encoded = frame_of(0, [1, 2])
    frame = decode_frame(encoded)
    monkeypatch.setattr("coordinator.spool.decode_frame", None)
    assert spool.append("pi-1", encoded, bytes(32), 0.0, frame=frame)
    assert read(spool, "pi-1", 0) == [1, 2]


def test_rows_are_slices_of_frames_widened_to_float64(spool):
    put(spool, "pi-1", 0, [0.1, 1, 2, 3])
    put(spool, "pi-2", 0, [10, 11, 12, 13])
    frames = [spool.stored(agent_id, TAG)[0] for agent_id in ("pi-2", "pi-1")]
    out = np.empty((2, 2))
    spool.load_rows(frames, 0, out)
    assert out.tolist() == [[10.0, 11.0], [float(np.float32(0.1)), 1.0]]
    spool.load_rows(frames, 2, out)
    assert out.tolist() == [[12.0, 13.0], [2.0, 3.0]]
    with pytest.raises(ValueError, match="elements 3 to 5"):
        spool.load_rows(frames, 3, out)


def test_a_buffer_of_another_shape_or_type_is_our_bug(spool):
    put(spool, "pi-1", 0, [1, 2])
    for out in (np.empty(3, np.float32), np.empty(2)):
        with pytest.raises(ValueError, match=r"expected \(2,\) float32"):
            spool.read_into(spool.stored("pi-1", TAG)[0], out)


def test_a_large_hole_in_the_log_is_counted_as_lost(spool, path):
    put(spool, "pi-1", 0, [1])
    spool.close()
    os.truncate(path, 5 * EXTENT)
    again = RoundSpool(path)
    assert again.recovery.truncated_bytes == 5 * EXTENT - again.size_bytes
    again.close()


def test_rows_are_found_in_what_came_after_the_last_look(spool):
    out = np.empty((1, 1))
    for index in range(3):
        put(spool, "pi-1", index, [index])
        spool.load_rows([spool.stored("pi-1", TAG)[index]], 0, out)
        assert out.tolist() == [[float(index)]]


def test_threads_read_while_frames_are_appended(spool):
    put(spool, "pi-1", 0, [0] * 1000)
    failures = []
    done = threading.Event()

    def keep_reading():
        while not done.is_set():
            indices = list(spool.stored("pi-1", TAG))
            failures.extend(index for index in indices if read(spool, "pi-1", index) != [index] * 1000)

    threads = [threading.Thread(target=keep_reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(1, 50):
        put(spool, "pi-1", index, [index] * 1000)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_cut_segment_is_an_error_and_not_a_short_read(spool, path):
    put(spool, "pi-1", 0, [1, 2, 3])
    os.truncate(path, spool.size_bytes - 8)
    with pytest.raises(OSError, match="ends at byte"):
        read(spool, "pi-1", 0)


def test_the_form_of_a_record_stays_as_documented(spool, path):
    encoded = frame_of(0, [1])
    spool.append("pi-1", encoded, b"\x07" * 32, 2.5)
    magic, kind, name_bytes, frame_bytes, digest, sum_squares = struct.unpack_from("<4sBxHI32sd", path.read_bytes())
    assert (magic, kind, name_bytes, frame_bytes, digest, sum_squares) == (b"MSP1", 1, 4, 44, b"\x07" * 32, 2.5)
    assert path.read_bytes()[56:64] == b"pi-1\0\0\0\0"
    assert path.read_bytes()[64:108] == encoded
    assert len(path.read_bytes()) == 112


def test_each_round_has_a_segment_that_is_opened_once(tmp_path):
    spool = Spool(tmp_path / "spool")
    first = spool.round("run-a", 1)
    assert spool.round("run-a", 1) is first
    assert first.path == tmp_path / "spool" / "run-a" / "1.spool"
    assert spool.round("run-a", 2) is not first
    first.close()
    assert not spool.round("run-a", 1).closed
    spool.close()
    assert spool.round("run-a", 1).size_bytes == 0
    spool.close()


def test_a_run_that_is_no_identifier_is_refused(tmp_path):
    with pytest.raises(TopicError, match=r"run '\.\./etc'"):
        Spool(tmp_path).round("../etc", 1)


def test_pruning_deletes_older_rounds_of_the_run_and_nothing_else(tmp_path):
    spool = Spool(tmp_path)
    for run_id, round_num in (("run-a", 9), ("run-a", 10), ("run-a", 11), ("run-b", 1)):
        put(spool.round(run_id, round_num), "pi-1", 0, [round_num])
    (tmp_path / "run-a" / "notes.spool").write_text("not ours")
    assert spool.prune("run-a", 10) == 1
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.spool"))
    assert left == ["run-a/10.spool", "run-a/11.spool", "run-a/notes.spool", "run-b/1.spool"]
    assert spool.prune("run-c", 10) == 0
    assert read(spool.round("run-a", 11), "pi-1", 0) == [11]
    spool.close()


def test_a_removed_segment_is_gone(spool, path):
    put(spool, "pi-1", 0, [1])
    spool.remove()
    assert spool.closed
    assert not path.exists()
