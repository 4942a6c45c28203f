"""The wire can be imported where there is next to nothing: an agent at rest has no numpy, a tool has no MQTT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.environment import unmeasured

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import midge.wire.errors, midge.wire.frames, midge.wire.identifiers, midge.wire.layout, midge.wire.messages, midge.wire.topics
print(*sorted(name for name in sys.modules if "." not in name))
"""


def test_all_but_the_codecs_need_neither_numpy_nor_mqtt():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60, env=unmeasured())
    loaded = set(done.stdout.split())
    assert {"midge", "msgspec"} <= loaded
    assert not loaded & {
        "numpy",
        "paho",
        "torch",
        "sqlalchemy",
        "click",
        "prometheus_client",
        "socket",
        "ssl",
        "asyncio",
    }


def test_each_file_but_the_codecs_is_tried():
    files = {path.stem for path in (ROOT / "midge" / "wire").glob("*.py")} - {"__init__", "codecs"}
    assert {name for name in files if f"midge.wire.{name}" in PROGRAM} == files
