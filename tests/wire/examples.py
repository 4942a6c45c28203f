"""One example of each message, and a whole small round in bytes: what golden files and docs/protocol.md show.

The model has two layers' worth of nothing: 6 weights, 2 biases and one counter. A real run of this size would cut it
into one frame; here frames of 6 elements make two, so that the last one is the shorter.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from midge.wire.frames import Framing, content_tag, encode_frame, run_tag, update_digest
from midge.wire.layout import Layout, TensorSpec, model_hash
from midge.wire.messages import (
    Acceptance,
    Cancel,
    CoordinatorStatus,
    Credit,
    Evaluation,
    Head,
    Invitation,
    Message,
    Presence,
    Progress,
    Receipt,
    Refusal,
    RollCall,
    TrainingConfig,
    UpdateHeader,
    encode,
)
from midge.wire.topics import Topics

TOPICS = Topics("demo")
AGENT_ID = "pi-3"
RUN_ID = "tiny"
ADDRESS: dict[str, Any] = {"run_id": RUN_ID, "epoch": 7, "round_num": 4, "attempt": 1}
VERSION = 3
"""Round 4 starts from the version that round 3 made."""

LAYOUT = Layout(
    (
        TensorSpec("fc.weight", (2, 3), "float32"),
        TensorSpec("fc.bias", (2,), "float32"),
        TensorSpec("norm.num_batches_tracked", (), "int64"),
    )
)
FRAMING = Framing(num_elements=8, frame_elements=6)
GLOBAL = (0.5, -0.25, 1.0, 0.0, 2.0, -1.5, 0.125, -0.0625)
GLOBAL_COUNTERS = (12,)
LOCAL = (0.625, -0.5, 1.0, 0.25, 1.75, -1.5, 0.25, -0.125)
"""After training: the delta is (0.125, -0.25, 0, 0.25, -0.25, 0, 0.125, -0.0625)."""
LOCAL_COUNTERS = (15,)


def floats(*elements: float) -> bytes:
    """Elements as float32, little-endian."""
    return struct.pack(f"<{len(elements)}f", *elements)


def bodies(elements: tuple[float, ...]) -> list[bytes]:
    """A vector cut into the bodies of its frames."""
    return [floats(*elements[slice(*FRAMING.span(index))]) for index in range(FRAMING.num_frames)]


def frames(elements: tuple[float, ...], round_num: int, digest: str) -> list[bytes]:
    """A vector as it travels."""
    return [
        encode_frame(
            codec=1,
            run_tag=run_tag(RUN_ID),
            round_num=round_num,
            index=index,
            num_elements=len(body) // 4,
            content_tag=content_tag(digest),
            body=body,
        )
        for index, body in enumerate(bodies(elements))
    ]


def _model_digest() -> str:
    hasher = model_hash(LAYOUT, GLOBAL_COUNTERS)
    hasher.update(floats(*GLOBAL))
    return hasher.hexdigest()


MODEL_DIGEST = _model_digest()
UPDATE_DIGEST = update_digest(hashlib.sha256(body).digest() for body in bodies(LOCAL))
MODEL_FRAMES = frames(GLOBAL, VERSION, MODEL_DIGEST)
UPDATE_FRAMES = frames(LOCAL, ADDRESS["round_num"], UPDATE_DIGEST)

MESSAGES: dict[str, Message] = {
    "coordinator": CoordinatorStatus(online=True, epoch=7, instance="b1946ac92492d234", protocol=1, version="0.1.0"),
    "rollcall": RollCall(epoch=7, spread_s=2.0),
    "head": Head(
        run_id=RUN_ID,
        epoch=7,
        round_num=VERSION,
        slot=1,
        model_digest=MODEL_DIGEST,
        layout=LAYOUT.tensors,
        frame_elements=FRAMING.frame_elements,
        codec="float32",
        counters=GLOBAL_COUNTERS,
        task="digits",
    ),
    "presence": Presence(
        online=True,
        incarnation="5f0c2a9b71e84d36",
        protocol=1,
        version="0.1.0",
        task="digits",
        labels={"site": "lab"},
        epoch=7,
        packet_limit_bytes=2_000_000,
    ),
    "invitation": Invitation(
        **ADDRESS,
        model_digest=MODEL_DIGEST,
        task="digits",
        training=TrainingConfig(local_epochs=1, batch_size=10, learning_rate=0.1, momentum=0.5, extra={"width": 32}),
        seed=42,
        credit=2,
        deadline_s=600.0,
    ),
    "credit": Credit(**ADDRESS, missing=((1, 2),), credit=2),
    "receipt": Receipt(**ADDRESS, update_digest=UPDATE_DIGEST, accepted=True),
    "cancel": Cancel(**ADDRESS, reason="closed"),
    "acceptance": Acceptance(**ADDRESS),
    "refusal": Refusal(**ADDRESS, reason="battery", detail="this device runs on its battery"),
    "progress": Progress(**ADDRESS, phase="training", fraction=0.25),
    "update": UpdateHeader(
        **ADDRESS,
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT.digest,
        update_digest=UPDATE_DIGEST,
        num_frames=FRAMING.num_frames,
        num_examples=120,
        counters=LOCAL_COUNTERS,
        training_s=1.5,
        metrics={"loss": 0.75},
        evaluation=Evaluation(num_examples=120, loss=0.875, metrics={"accuracy": 0.75}),
    ),
}

NOT_IDENTIFIERS = {
    "nothing": "",
    "65 characters": "a" * 65,
    "a capital": "Pi",
    "a sign at the start": "-pi",
    "an underscore at the start": "_pi",
    "a space": "pi 3",
    "a dot": "pi.3",
    "this directory": ".",
    "the directory above": "..",
    "a path": "../etc/passwd",
    "an absolute path": "/etc",
    "a backslash": "a\\b",
    "a level of a topic": "a/b",
    "a wildcard for one level": "+",
    "a wildcard at the end": "a+",
    "a wildcard for the rest": "#",
    "a topic of the broker": "$sys",
    "NUL": "a\0",
    "a line feed at the end": "a\n",
    "a line feed in the middle": "a\nb",
    "a carriage return": "a\r",
    "a tab": "a\tb",
    "a quote": 'a"b',
    "a brace": "a{b}",
    "a percent sign": "%u",
    "a Cyrillic a": "\u0430gent",
    "a fullwidth a": "\uff41",
    "an Arabic digit": "\u0663",
    "a superscript": "a\u00b2",
    "a sharp s": "stra\u00dfe",
    "a dotless i": "p\u0131",
    "a combining accent": "e\u0301",
    "a zero-width joiner": "a\u200db",
    "a lone surrogate": "a\ud800",
}


def sent(kind: str, **changes: object) -> bytes:
    """The example of a kind as it travels, with fields changed, added, or left out where the value is `...`."""
    fields = json.loads(encode(MESSAGES[kind])) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
