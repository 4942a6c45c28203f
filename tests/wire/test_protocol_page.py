"""docs/protocol.md says what the code does: its tables, its numbers, its bytes, and that they suffice for another program."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import midge
from coordinator import uplink
from coordinator.round import MemberState, RoundState
from edge_agent import pull
from edge_agent.agent import AgentState
from midge.transport.base import Will
from midge.wire import codecs, frames, layout, messages, topics
from tests.wire import field_tables
from tests.wire.examples import TOPICS
from tests.wire.worked_example import BLOCKS

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
TEXT = PAGE.read_text(encoding="utf-8")


def bytes_of(name: str) -> str:
    """What stands in the fence below `<!-- bytes: name -->`."""
    found = re.findall(rf"<!-- bytes: {re.escape(name)} -->\n```\w*\n(.*?)\n```", TEXT, re.DOTALL)
    assert len(found) == 1, f"{PAGE.name} must show {name!r} once, below <!-- bytes: {name} -->"
    return found[0]


def table_of(name: str) -> list[list[str]]:
    """The cells of the table below `<!-- name -->`, without its heading."""
    found = re.findall(rf"<!-- {re.escape(name)} -->\n((?:\|.*\n)+)", TEXT)
    assert len(found) == 1, f"{PAGE.name} must have one table below <!-- {name} -->"
    lines = found[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def words_of(name: str) -> set[str]:
    """The first column of a table."""
    return {row[0].strip("`") for row in table_of(name)}


# Bytes.


@pytest.mark.parametrize("name", BLOCKS)
def test_the_bytes_on_the_page_are_what_the_code_makes(name):
    assert bytes_of(name) == BLOCKS[name], f"`python -m tests.wire.worked_example` prints what belongs below {name!r}"


def test_the_page_shows_no_other_bytes():
    assert set(re.findall(r"<!-- bytes: (.*?) -->", TEXT)) == set(BLOCKS)


def dump(name: str) -> bytes:
    """A frame that the page shows in hexadecimal, a field a line."""
    return bytes.fromhex("".join(line[:24].strip() for line in bytes_of(name).splitlines()))


def test_whoever_knows_only_the_page_finds_the_same_digests():
    head, update = json.loads(bytes_of("message head")), json.loads(bytes_of("message update"))
    canonical = json.dumps(head["layout"], separators=(",", ":"), ensure_ascii=False)
    assert canonical == bytes_of("layout")
    layout_digest = hashlib.sha256(b"midge-layout-1\n" + canonical.encode())
    assert layout_digest.hexdigest() == bytes_of("layout digest") == update["layout_digest"]

    vector = dump("model frame 0")[40:] + dump("model frame 1")[40:]
    assert struct.unpack("<8f", vector) == (0.5, -0.25, 1.0, 0.0, 2.0, -1.5, 0.125, -0.0625)
    counters = json.dumps(head["counters"], separators=(",", ":")).encode()
    model = hashlib.sha256(b"midge-model-1\n" + layout_digest.digest() + counters + vector)
    assert model.hexdigest() == bytes_of("model digest") == head["model_digest"] == update["model_digest"]

    bodies = [dump(f"update frame {index}")[40:] for index in range(2)]
    assert [hashlib.sha256(body).hexdigest() for body in bodies] == bytes_of("body digests").split()
    digests = b"".join(hashlib.sha256(body).digest() for body in bodies)
    assert hashlib.sha256(b"midge-update-1\n" + digests).hexdigest() == update["update_digest"]


@pytest.mark.parametrize("kind", ["model", "update"])
@pytest.mark.parametrize("index", [0, 1])
def test_whoever_knows_only_the_page_can_read_its_frames(kind, index):
    frame = dump(f"{kind} frame {index}")
    fields, at = {}, 0
    for offset, size, name in table_of("frame")[:-1]:
        assert int(offset) == at
        fields[name.split(":")[0].split(" of ")[0]] = frame[at : at + int(size)]
        at += int(size)
    version = json.loads(bytes_of("message head"))
    digest = {"model": version["model_digest"], "update": bytes_of("update digest")}[kind]
    numbers = {name: int.from_bytes(field, "little") for name, field in fields.items()}
    assert fields["magic"] == b"MF"
    assert fields["run tag"] == hashlib.sha256(version["run_id"].encode()).digest()[:8]
    assert fields["content tag"] == bytes.fromhex(digest)[:8]
    assert numbers["round number"] == {"model": 3, "update": 4}[kind]
    assert (numbers["version"], numbers["[codec](#codecs)"], numbers["index"]) == (1, 1, index)
    assert numbers["number"] * 4 == numbers["length"] == len(frame) - 40
    assert frame[36:40] == struct.pack("<I", zlib.crc32(frame[:36] + frame[40:]))


def test_the_table_of_a_frame_is_the_code_s():
    sizes = [struct.calcsize(f"<{code}") for code in re.findall(r"\d*[A-Za-z]", frames._FIELDS.format)]
    rows = table_of("frame")
    assert [int(row[1]) for row in rows[:-1]] == [*sizes, frames._CHECKSUM.size]
    assert rows[-1][0] == str(frames.HEADER_BYTES)


# Tables.


@pytest.mark.parametrize("name", [*field_tables.PARTS, *field_tables.KINDS])
def test_a_table_of_fields_is_the_code_s(name):
    kinds = {**field_tables.PARTS, **field_tables.KINDS}
    inherited = ()
    if issubclass(kinds[name], field_tables.ADDRESS):
        inherited = tuple(field.name for field in msgspec.structs.fields(field_tables.ADDRESS))
    expected = field_tables.rows(kinds[name], inherited)
    if not expected:
        assert f"<!-- fields: {name} -->" not in TEXT
        return
    rows = table_of(f"fields: {name}")
    assert [tuple(row[:3]) for row in rows] == expected
    assert all(len(row) == 4 and row[3] for row in rows), "each field says what it means"


def test_so_is_the_table_of_an_address():
    assert [tuple(row[:3]) for row in table_of("fields: address")] == field_tables.rows(field_tables.ADDRESS)


def test_so_is_the_table_of_types():
    expected = [(f"*{name}*", field_tables.spell_out(hint)) for name, hint in field_tables.NAMED.items()]
    assert [tuple(row[:2]) for row in table_of("types")] == expected


def test_each_message_has_its_heading():
    assert set(re.findall(r"^#### `(\w+)`$", TEXT, re.MULTILINE)) == set(field_tables.KINDS)


def test_the_topics_are_the_code_s():
    built = {
        TOPICS.coordinator,
        TOPICS.rollcall,
        TOPICS.head("run"),
        TOPICS.model_frame("run", 0, 99),
        TOPICS.presence("id"),
        TOPICS.inbox("id"),
        TOPICS.outbox("id"),
        TOPICS.update_frame("id", 7, 99),
    }
    sample = {"<run>": "run", "<id>": "id", "<slot>": "0", "<shard>": "7", "<frame>": "99"}
    shown = {re.sub(r"<\w+>", lambda match: sample[match[0]], row[0].strip("`")) for row in table_of("topics")}
    assert {f"midge/1/demo/{topic}" for topic in shown} == built


def test_each_message_is_on_the_topic_on_which_it_is_decoded():
    payloads = {row[0].strip("`"): set(re.findall(r"\[`(\w+)`\]", row[5])) for row in table_of("topics")}
    told = {kind.__struct_config__.tag for kind in messages.ToAgent.__args__}
    tells = {kind.__struct_config__.tag for kind in messages.ToCoordinator.__args__}
    assert payloads["agent/<id>/inbox"] == told
    assert payloads["agent/<id>/outbox"] == tells
    assert set.union(*payloads.values()) == set(field_tables.KINDS)


def test_the_codecs_are_the_code_s():
    assert {row[1].strip("`"): int(row[0]) for row in table_of("codecs")} == codecs.NAMES


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("reasons: refusal reason", messages.RefusalReason.__args__),
        ("reasons: reject reason", messages.RejectReason.__args__),
        ("reasons: cancel reason", messages.CancelReason.__args__),
        ("agent states", AgentState),
        ("round states", RoundState),
        ("member states", MemberState),
        ("verdicts", uplink.Verdict),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_of_words_is_the_code_s(table, words):
    assert words_of(table) == {str(word) for word in words}


NUMBERS = {
    "protocol": midge.PROTOCOL,
    "largest message": messages.MAX_MESSAGE_BYTES,
    "largest canonical layout": layout.MAX_CANONICAL_BYTES,
    "tensors in a layout": layout.MAX_TENSORS,
    "float elements in a layout": layout.MAX_ELEMENTS,
    "counters in a layout": layout.MAX_COUNTERS,
    "frames of a vector": frames.MAX_FRAMES,
    "header of a frame": frames.HEADER_BYTES,
    "least body of a frame of a large vector": frames.MIN_BODY_BYTES,
    "largest body of a frame": frames.MAX_BODY_BYTES,
    "kept free for topic and MQTT header": frames.TOPIC_ALLOWANCE_BYTES,
    "slots": topics.NUM_SLOTS,
    "window of a pull": pull.WINDOW,
    "ranges in a `credit`": messages.MAX_RANGES,
    "credit over all agents": uplink.TOTAL_CREDIT,
    "delay of a will": Will("", b"").delay_s,
}


def test_the_numbers_are_the_code_s():
    assert {row[0]: int(row[1].split()[0]) for row in table_of("numbers")} == NUMBERS


@given(st.integers(1, layout.MAX_ELEMENTS), st.none() | st.integers(70_000, 2**28))
def test_the_rule_for_the_size_of_frames_is_the_code_s(num_elements, packet_limit):
    body_bytes = min(max(4 * num_elements // 512, 65536), 262144)
    if packet_limit is not None:
        body_bytes = min(body_bytes, packet_limit - 40 - 512)
    assert frames.plan_framing(num_elements, packet_limit).frame_elements == min(
        body_bytes // 4 // 256 * 256, num_elements
    )


# Links.


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(targets) > 30
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (PAGE.parent / target).exists(), target
