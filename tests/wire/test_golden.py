"""Golden files: the very bytes of each message and of some frames. One of these failing means that the wire changed.

Agents in the field speak these bytes. Where a change is meant, raise the protocol's version or show in docs/protocol.md why old
and new understand each other; then delete the files and run this test with MIDGE_WRITE_GOLDEN=1.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from midge.wire.frames import decode_frame
from midge.wire.messages import decode, encode
from tests.wire.examples import MESSAGES, MODEL_FRAMES, UPDATE_FRAMES
from tests.wire.field_tables import KINDS

GOLDEN = Path(__file__).parent / "golden"

CONTENTS = {
    **{f"{kind}.json": encode(message) for kind, message in MESSAGES.items()},
    **{f"model-{index}.frame": frame for index, frame in enumerate(MODEL_FRAMES)},
    **{f"update-{index}.frame": frame for index, frame in enumerate(UPDATE_FRAMES)},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_encoded_today_is_what_was_encoded_before(name):
    path = GOLDEN / name
    if os.environ.get("MIDGE_WRITE_GOLDEN") and not path.exists():
        path.write_bytes(CONTENTS[name])
    assert path.read_bytes() == CONTENTS[name]


def test_each_golden_file_is_looked_at():
    assert {path.name for path in GOLDEN.iterdir()} == set(CONTENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_encoded_before_is_understood_today(kind):
    assert decode((GOLDEN / f"{kind}.json").read_bytes(), KINDS[kind]) == MESSAGES[kind]


def test_frames_of_before_are_understood_today():
    frames = [decode_frame((GOLDEN / f"update-{index}.frame").read_bytes()) for index in range(2)]
    assert [(frame.codec, frame.round_num, frame.index, frame.num_elements) for frame in frames] == [
        (1, 4, 0, 6),
        (1, 4, 1, 2),
    ]
    # 0.625, -0.5, 1, 0.25, 1.75, -1.5 and 0.25, -0.125
    assert frames[0].body.hex(" ", 4) == "0000203f 000000bf 0000803f 0000803e 0000e03f 0000c0bf"
    assert frames[1].body.hex(" ", 4) == "0000803e 000000be"
