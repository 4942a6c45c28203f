"""What `fuzz.py` throws: valid messages of every type, what can be made of them, and the decoders that they are thrown at."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coordinator.metrics import CollectorRegistry, Metrics
from midge.wire.codecs import FLOAT32, decode_float32
from midge.wire.errors import WireError
from midge.wire.frames import content_tag, decode_frame, encode_frame, run_tag, update_digest
from midge.wire.layout import Layout, TensorSpec
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
    decode,
    decode_to_agent,
    decode_to_coordinator,
    encode,
)
from midge.wire.topics import Topics

RUN_ID = "digits-1a2b3c"
ADDRESS: dict[str, Any] = {"run_id": RUN_ID, "epoch": 7, "round_num": 4, "attempt": 1}
LAYOUT = Layout((TensorSpec("fc.weight", (2, 3), "float32"), TensorSpec("steps", (), "int64")))
BODY = np.linspace(-1.0, 1.0, 6, dtype="<f4").tobytes()
DIGEST = update_digest([hashlib.sha256(BODY).digest()])
TOPICS = Topics("lab")

MESSAGES: dict[str, Message] = {
    "coordinator": CoordinatorStatus(online=True, epoch=7, instance="b1946ac9", protocol=1, version="0.1.0"),
    "rollcall": RollCall(epoch=7, spread_s=2.0),
    "head": Head(
        run_id=RUN_ID,
        epoch=7,
        round_num=3,
        slot=1,
        model_digest=DIGEST,
        layout=LAYOUT.tensors,
        frame_elements=6,
        codec="float32",
        counters=(12,),
        task="digits",
    ),
    "presence": Presence(
        online=True, incarnation="5f0c2a9b", protocol=1, version="0.1.0", task="digits", labels={"site": "lab"}, epoch=7
    ),
    "invitation": Invitation(
        **ADDRESS,
        model_digest=DIGEST,
        task="digits",
        training=TrainingConfig(batch_size=10, extra={"width": 32, "note": "x"}),
        seed=42,
        credit=2,
        deadline_s=600.0,
    ),
    "credit": Credit(**ADDRESS, missing=((0, 2), (5, 9)), credit=4),
    "receipt": Receipt(**ADDRESS, update_digest=DIGEST, accepted=False, reason="norm", detail="too far"),
    "cancel": Cancel(**ADDRESS, reason="closed"),
    "acceptance": Acceptance(**ADDRESS),
    "refusal": Refusal(**ADDRESS, reason="battery", detail="12 %"),
    "progress": Progress(**ADDRESS, phase="training", fraction=0.5),
    "update": UpdateHeader(
        **ADDRESS,
        model_digest=DIGEST,
        layout_digest=LAYOUT.digest,
        update_digest=DIGEST,
        num_frames=1,
        num_examples=100,
        counters=(15,),
        training_s=1.5,
        metrics={"loss": 0.5},
        evaluation=Evaluation(num_examples=10, loss=0.25, metrics={"accuracy": 0.5}),
    ),
}
FRAME = encode_frame(
    codec=FLOAT32,
    run_tag=run_tag(RUN_ID),
    round_num=4,
    index=0,
    num_elements=6,
    content_tag=content_tag(DIGEST),
    body=BODY,
)
SEEDS = {kind: encode(message) for kind, message in MESSAGES.items()} | {
    "frame": FRAME,
    "topic": TOPICS.update_frame("pi-3", 0, 17).encode(),
    "broker": b"1234 seconds",
}

_NUMBERS = (
    "0", "-1", "1e999", "-0.0", "NaN", "Infinity", "true", "null", '"1"', "9007199254740993", "2147483648", "1" + "0" * 400,
    "1e-400", "0.1", "[]", "{}",
)  # fmt: skip
_TEXTS = (
    "", "../../../../etc/passwd", "a/b", "+", "#", "$SYS", "\\u0000", "a\\nb", "\u0430gent", "x" * 300, "\\ud800", "\u202e",
    "cos\\nsystem\\n(S'true'", "A" * 65,
)  # fmt: skip
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_TEXT = re.compile(rb'"[^"]*"')
_OPENERS = (b"[", b'{"a":', b"[[", b"[0,")


def _size(rng: random.Random, largest: int) -> int:
    """Mostly small, so that many are tried; now and then as large as a message may be."""
    return largest if rng.random() < 0.02 else rng.choice((10, 100, 1000))


_BOMBS: tuple[Callable[[random.Random], bytes], ...] = (
    lambda rng: rng.choice(_OPENERS) * _size(rng, 100_000),
    lambda rng: b"[" + b"0," * _size(rng, 1_000_000) + b"0]",
    lambda rng: b"9" * _size(rng, 1_000_000),
    lambda rng: b'"' + b"a" * _size(rng, 4_000_000) + b'"',
    lambda rng: b"{" + b",".join(b'"%d":1' % n for n in range(_size(rng, 200_000))) + b"}",
    lambda rng: b'[["w",[%s],"float32"]]' % b",".join([b"17179869184"] * rng.choice((1, 8, 9))),
    lambda rng: b"\x80\x04\x95" + rng.randbytes(30),  # how a pickle begins
    lambda rng: b"\x28\xb5\x2f\xfd" + rng.randbytes(30),  # zstd
    lambda rng: b"\x1f\x8b\x08" + rng.randbytes(30),  # gzip
    lambda rng: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (8000000000,), }",
)


def mutated(rng: random.Random, payload: bytes, others: Sequence[bytes]) -> bytes:
    """Something that is nearly `payload`, in one to four ways; at times as it is."""
    changed = bytearray(payload)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        changed = bytearray(rng.choice(_WAYS)(rng, changed, others))
    if changed[:2] == b"MF" and len(changed) >= 40 and rng.random() < 0.7:
        # Whoever makes frames makes checksums too: what is behind them must hold as well.
        changed[36:40] = struct.pack("<I", zlib.crc32(changed[40:], zlib.crc32(changed[:36])))
    return bytes(changed)


def _flip(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if payload:
            payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return payload


def _cut(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    start = rng.choice((0, 0, rng.randrange(len(payload) + 1)))
    return payload[start : rng.randrange(start, len(payload) + 1)]


def _repeat(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(payload) + 1)
    stop = rng.randrange(start, min(len(payload), start + 40) + 1)
    return payload[:stop] + payload[start:stop] * rng.choice((1, 2, 100)) + payload[stop:]


def _insert(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(payload) + 1)
    return payload[:at] + rng.randbytes(rng.choice((1, 2, 9))) + payload[at:]


def _splice(rng: random.Random, payload: bytearray, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return payload[: rng.randrange(len(payload) + 1)] + other[rng.randrange(len(other) + 1) :]


def _other_number(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    return _replaced(rng, payload, _NUMBER, rng.choice(_NUMBERS).encode())


def _other_text(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    return _replaced(rng, payload, _TEXT, b'"' + rng.choice(_TEXTS).encode() + b'"')


def _bomb(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    bomb = rng.choice(_BOMBS)(rng)
    if rng.random() < 0.3:
        return bomb
    return _replaced(rng, payload, rng.choice((_NUMBER, _TEXT)), bomb)


def _other_field(rng: random.Random, payload: bytearray, _: Sequence[bytes]) -> bytes:
    """Another value in the header of a frame; of anything else, other bytes at its beginning."""
    at, size = rng.choice(((2, 1), (3, 1), (4, 8), (12, 4), (16, 4), (20, 4), (24, 4), (28, 8)))
    value = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    payload[at : at + size] = value
    return payload


def _replaced(rng: random.Random, payload: bytearray, pattern: re.Pattern[bytes], by: bytes) -> bytes:
    found = list(pattern.finditer(payload))
    if not found:
        return payload + by
    span = rng.choice(found).span()
    return payload[: span[0]] + by + payload[span[1] :]


_WAYS = (_flip, _cut, _repeat, _insert, _splice, _other_number, _other_number, _other_text, _bomb, _other_field)


def _read_frame(payload: bytes) -> None:
    frame = decode_frame(payload)
    if frame.codec != FLOAT32:
        raise WireError(f"codec {frame.codec}")
    decode_float32(frame.body, frame.num_elements)


def _read_head(payload: bytes) -> None:
    Layout(decode(payload, Head).layout)


def _read_topic(payload: bytes) -> None:
    TOPICS.parse(payload.decode("utf-8", errors="replace"))


def decoders() -> dict[str, tuple[Callable[[bytes], object], tuple[str, ...]]]:
    """Each decoder by name, and the seeds that suit it. What it may raise is `WireError`, and nothing else."""
    metrics = Metrics("lab", CollectorRegistry())
    to_agent = ("invitation", "credit", "receipt", "cancel")
    to_coordinator = ("acceptance", "refusal", "progress", "update")
    made: dict[str, tuple[Callable[[bytes], object], tuple[str, ...]]] = {
        kind: (_reader(type(message)), (kind,)) for kind, message in MESSAGES.items() if kind != "head"
    }
    return made | {
        "head": (_read_head, ("head",)),
        "inbox": (decode_to_agent, to_agent),
        "outbox": (decode_to_coordinator, to_coordinator),
        "frame": (_read_frame, ("frame",)),
        "topic": (_read_topic, ("topic",)),
        "broker's figures": (lambda payload: metrics.broker_sys("$SYS/broker/uptime", payload), ("broker",)),
    }


def _reader(kind: type[Message]) -> Callable[[bytes], object]:
    return lambda payload: decode(payload, kind)
