"""What an agent keeps on disk: whole or not at all, wherever it is killed, and byte for byte what it was."""

from __future__ import annotations

import hashlib
import os
import stat

import msgspec
import pytest

from edge_agent.agent_events import FinishedUpdate
from edge_agent.journal import Journal, JournalError, read_update, write_update
from midge.wire.frames import FLOAT32, HEADER_BYTES, Framing, content_tag, encode_frame, run_tag, update_digest
from midge.wire.layout import Layout, TensorSpec, model_hash
from midge.wire.messages import Evaluation, Head, Invitation, TrainingConfig

DIGEST = "ab" * 32


def frames_of(body: bytes, frame_elements: int, run_id: str = "r1", round_num: int = 1) -> tuple[str, list[bytes]]:
    """The digest and the encoded frames of an update whose elements are `body`."""
    framing = Framing(len(body) // 4, frame_elements)
    spans = [framing.span(index) for index in range(framing.num_frames)]
    bodies = [body[4 * start : 4 * stop] for start, stop in spans]
    digest = update_digest(hashlib.sha256(each).digest() for each in bodies)
    encoded = [
        encode_frame(
            codec=FLOAT32,
            run_tag=run_tag(run_id),
            round_num=round_num,
            index=index,
            num_elements=len(each) // 4,
            content_tag=content_tag(digest),
            body=each,
        )
        for index, each in enumerate(bodies)
    ]
    return digest, encoded


def made(body: bytes = bytes(range(40)), frame_elements: int = 4) -> tuple[FinishedUpdate, list[bytes]]:
    """An update of ten elements in frames of 4, 4 and 2, unless said otherwise."""
    digest, frames = frames_of(body, frame_elements)
    update = FinishedUpdate(
        run_id="r1",
        round_num=1,
        model_digest=DIGEST,
        layout_digest=DIGEST,
        update_digest=digest,
        num_frames=len(frames),
        num_examples=10,
        counters=(3, -1),
        training_s=0.25,
        metrics={"loss": 0.5},
        evaluation=Evaluation(num_examples=10, loss=1.5, metrics={"accuracy": 0.25}),
        frames_bytes=sum(map(len, frames)),
    )
    return update, frames


def head(elements: bytes, frame_elements: int = 4, counters: tuple[int, ...] = ()) -> Head:
    """The head of a model of these elements."""
    specs = [TensorSpec("w", (len(elements) // 4,), "float32")]
    specs += [TensorSpec("n", (len(counters),), "int64")] if counters else []
    layout = Layout(tuple(specs))
    hasher = model_hash(layout, counters)
    hasher.update(elements)
    return Head(
        run_id="r1",
        epoch=1,
        round_num=0,
        slot=0,
        model_digest=hasher.hexdigest(),
        layout=layout.tensors,
        frame_elements=frame_elements,
        codec="float32",
        counters=counters,
        task="digits",
    )


def invitation(attempt: int = 1) -> Invitation:
    return Invitation(
        run_id="r1",
        epoch=1,
        round_num=1,
        attempt=attempt,
        model_digest=DIGEST,
        task="digits",
        training=TrainingConfig(),
        seed=7,
        credit=2,
        deadline_s=60.0,
    )


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "agent")
    yield opened
    opened.close()


# Updates.


def test_an_update_comes_back_as_it_was_with_each_frame_byte_for_byte(journal):
    update, frames = made()
    write_update(journal.update_path, frames, update)
    assert journal.update() == update
    assert [journal.read_frame(update, index) for index in range(3)] == frames
    assert [len(frame) for frame in frames] == [HEADER_BYTES + 16, HEADER_BYTES + 16, HEADER_BYTES + 8]


@pytest.mark.parametrize(("num_elements", "frame_elements"), [(1, 1), (3, 4), (8, 4), (9, 4), (1000, 1)])
def test_frames_come_back_byte_for_byte_however_they_divide(journal, num_elements, frame_elements):
    update, frames = made(os.urandom(4 * num_elements), frame_elements)
    write_update(journal.update_path, frames, update)
    assert journal.update() == update
    assert [journal.read_frame(update, index) for index in range(update.num_frames)] == frames


def test_an_update_that_was_cut_off_at_any_byte_does_not_exist(journal):
    update, frames = made()
    write_update(journal.update_path, frames, update)
    assert journal.update() == update
    for length in reversed(range(journal.update_path.stat().st_size)):
        os.truncate(journal.update_path, length)
        assert journal.update() is None, f"cut after {length} bytes"


def test_an_update_with_anything_behind_its_end_does_not_exist(journal):
    update, frames = made()
    write_update(journal.update_path, frames, update)
    with journal.update_path.open("ab") as file:
        file.write(b"\0")
    assert journal.update() is None


def test_an_update_of_which_any_byte_changed_does_not_exist(journal):
    update, frames = made()
    write_update(journal.update_path, frames, update)
    with journal.update_path.open("r+b", buffering=0) as file:
        for offset, byte in enumerate(file.read()):
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), offset)
            assert journal.update() is None, f"byte {offset}"
            os.pwrite(file.fileno(), bytes([byte]), offset)
    assert journal.update() == update


def test_a_footer_without_its_frames_is_no_update(journal):
    # What a power failure may leave: the end of the file was written back, what is before it was not.
    update, frames = made()
    write_update(journal.update_path, frames, update)
    with journal.update_path.open("r+b", buffering=0) as file:
        for offset in range(0, update.frames_bytes, 8):
            os.pwrite(file.fileno(), bytes(8), offset)
            assert journal.update() is None


def test_a_frame_that_is_cut_off_while_it_is_sent_is_a_failure_of_the_disk(journal):
    update, frames = made()
    write_update(journal.update_path, frames, update)
    assert journal.read_frame(update, 1) == frames[1]
    os.truncate(journal.update_path, 2 * len(frames[0]) - 1)
    assert journal.read_frame(update, 0) == frames[0]
    with pytest.raises(OSError, match="ends within frame 1: it was cut"):
        journal.read_frame(update, 1)


def test_an_update_that_lies_about_its_frames_is_none(journal):
    update, frames = made()
    short = FinishedUpdate(**{field: getattr(update, field) for field in update.__slots__} | {"num_frames": 2})
    write_update(journal.update_path, frames, short)
    assert journal.update() is None


def test_no_file_and_an_empty_one_are_no_update(journal):
    assert journal.update() is None
    journal.update_path.touch()
    assert journal.update() is None
    journal.update_path.write_bytes(b"MUPD" * 3)
    assert journal.update() is None
    with pytest.raises(FileNotFoundError):
        read_update(journal.path / "none.bin")


def test_a_header_that_is_no_update_is_none(journal):
    update, _ = made()
    write_update(journal.update_path, [], update)  # frames_bytes says that there are some
    assert journal.update() is None


def test_a_new_update_in_place_of_the_old_is_read_once_the_old_is_forgotten(journal):
    old, old_frames = made()
    write_update(journal.update_path, old_frames, old)
    journal.read_frame(old, 0)
    new, new_frames = made(os.urandom(48))
    write_update(journal.update_path, new_frames, new)
    journal.forget_update_file()
    assert journal.read_frame(new, 2) == new_frames[2]


# Erasing.


def test_erasing_ends_invitation_and_update_and_may_be_repeated(journal):
    update, frames = made()
    journal.erase()
    write_update(journal.update_path, frames, update)
    journal.write_invitation(invitation())
    journal.erase()
    assert journal.update() is None
    assert journal.invitation() is None
    journal.erase()
    write_update(journal.update_path, frames, update)
    assert journal.update() == update


def test_an_invitation_comes_back_and_a_later_one_takes_its_place(journal):
    assert journal.invitation() is None
    journal.write_invitation(invitation(1))
    journal.write_invitation(invitation(2))
    assert journal.invitation() == invitation(2)
    assert sorted(path.name for path in journal.path.iterdir()) == ["invitation.json", "lock"]


# The model.


def test_a_model_is_the_heads_once_every_frame_is_at_its_place_in_any_order(journal):
    elements = os.urandom(40)
    of_model = head(elements)
    journal.open_model(of_model)
    for index, (start, stop) in reversed(list(enumerate([(0, 16), (16, 32), (32, 40)]))):
        assert not journal.model_is(of_model)
        journal.write_frame(of_model, index, memoryview(elements)[start:stop])
    assert journal.model_is(of_model)
    assert journal.model_path.read_bytes() == elements


def test_a_model_is_not_anothers_not_by_one_bit_and_not_by_one_counter(journal):
    elements = bytes(40)
    journal.open_model(head(elements))
    assert journal.model_is(head(elements))
    assert not journal.model_is(head(b"\x01" + elements[1:]))
    of_counted = head(elements, counters=(0,))
    assert journal.model_is(of_counted)
    assert not journal.model_is(msgspec.structs.replace(of_counted, counters=(1,)))


def test_a_model_above_a_megabyte_is_hashed_to_its_end(journal):
    elements = os.urandom(2**20 + 4)
    of_model = head(elements, 2**20)
    journal.open_model(of_model)
    journal.write_frame(of_model, 0, memoryview(elements))
    assert journal.model_is(of_model)
    os.pwrite(journal._model_fd, b"\xff\xff\xff\xff", 2**20)
    assert journal.model_is(of_model) == (elements[-4:] == b"\xff" * 4)


def test_a_smaller_model_leaves_nothing_of_the_larger_one_before_it(journal):
    journal.open_model(head(bytes(400)))
    journal.open_model(head(bytes(40)))
    assert journal.model_path.stat().st_size == 40


@pytest.mark.parametrize(("index", "num_bytes"), [(0, 12), (0, 20), (2, 16), (3, 16), (2**20, 16)])
def test_a_frame_that_does_not_fit_its_place_is_refused_and_changes_nothing(journal, index, num_bytes):
    of_model = head(bytes(40))
    journal.open_model(of_model)
    with pytest.raises(ValueError, match=f"frame {index} of {num_bytes} bytes: expected"):
        journal.write_frame(of_model, index, memoryview(b"\x01" * num_bytes))
    assert journal.model_path.read_bytes() == bytes(40)


# The directory.


def test_two_agents_cannot_share_a_directory_and_one_can_follow_the_other(tmp_path):
    first = Journal(tmp_path / "agent")
    with pytest.raises(
        JournalError, match="an agent with this id is running in it already; give this one another --agent-id"
    ):
        Journal(tmp_path / "agent")
    first.close()
    Journal(tmp_path / "agent").close()


def test_a_directory_that_is_a_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "agent").write_text("not a directory")
    with pytest.raises(JournalError, match="choose a writable --state-dir"):
        Journal(tmp_path / "agent")


def test_what_is_kept_is_for_its_owner_alone(journal):
    journal.open_model(head(bytes(40)))
    for name in ("lock", "model.bin"):
        assert stat.S_IMODE((journal.path / name).stat().st_mode) & 0o077 == 0
