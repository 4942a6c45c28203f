"""The blocks of bytes that docs/protocol.md shows. `python -m tests.wire.worked_example` prints them, to be pasted there."""

from __future__ import annotations

import hashlib
import sys

import msgspec

from midge.wire.frames import content_tag, run_tag
from midge.wire.messages import encode
from tests.wire.examples import (
    GLOBAL,
    LAYOUT,
    LOCAL,
    MESSAGES,
    MODEL_DIGEST,
    MODEL_FRAMES,
    RUN_ID,
    UPDATE_DIGEST,
    UPDATE_FRAMES,
    bodies,
)

_ELEMENTS = [
    *(f"fc.weight[{row},{column}]" for row in range(2) for column in range(3)),
    *(f"fc.bias[{index}]" for index in range(2)),
]
_FIELDS = (
    (2, 'magic, "MF"'),
    (1, "version of the format"),
    (1, "codec, float32"),
    (8, "run tag"),
    (4, "round number"),
    (4, "index"),
    (4, "elements"),
    (4, "bytes of body"),
    (8, "content tag"),
    (4, "CRC-32 of the 36 bytes above and of the body"),
)
_WIDTH = 26


def annotated(frame: bytes, elements: tuple[float, ...]) -> str:
    """A frame in hexadecimal, a line a field."""
    lines, at = [], 0
    for size, meaning in _FIELDS:
        part = frame[at : at + size]
        number = f": {int.from_bytes(part, 'little')}" if size in (1, 4) and "CRC" not in meaning else ""
        lines.append(f"{part.hex(' '):{_WIDTH}}{meaning}{number}")
        at += size
    first = int.from_bytes(frame[16:20], "little") * 6
    for offset in range(at, len(frame), 4):
        index = first + (offset - at) // 4
        lines.append(f"{frame[offset : offset + 4].hex(' '):{_WIDTH}}{_ELEMENTS[index]} = {elements[index]:g}")
    return "\n".join(lines)


def _messages() -> dict[str, str]:
    return {kind: encode(message).decode() for kind, message in MESSAGES.items()}


BLOCKS: dict[str, str] = {
    "layout": msgspec.json.encode(LAYOUT.tensors).decode(),
    "layout digest": LAYOUT.digest,
    "model digest": MODEL_DIGEST,
    "tags": f"{run_tag(RUN_ID).hex(' ')}   run tag\n{content_tag(MODEL_DIGEST).hex(' ')}   content tag",
    "model frame 0": annotated(MODEL_FRAMES[0], GLOBAL),
    "model frame 1": annotated(MODEL_FRAMES[1], GLOBAL),
    "body digests": "\n".join(hashlib.sha256(body).hexdigest() for body in bodies(LOCAL)),
    "update digest": UPDATE_DIGEST,
    "update frame 0": annotated(UPDATE_FRAMES[0], LOCAL),
    "update frame 1": annotated(UPDATE_FRAMES[1], LOCAL),
    **{f"message {kind}": text for kind, text in _messages().items()},
}
"""What stands on the page below each `<!-- bytes: NAME -->`."""


def main() -> None:
    """Print all blocks."""
    for name, block in BLOCKS.items():
        sys.stdout.write(f"<!-- bytes: {name} -->\n```\n{block}\n```\n\n")


if __name__ == "__main__":
    main()
