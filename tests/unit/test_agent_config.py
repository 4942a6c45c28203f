"""The agent's settings: its name, its data, its hours, and that reading them stays small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import Settings, agent_id_from, load_settings
from midge.settings import SettingsError, describe, markdown
from midge.wire.identifiers import is_identifier
from tests.environment import unmeasured

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def test_the_names_and_defaults_that_scripts_rely_on():
    settings = Settings(agent_id="pi-3")
    relied_on = {
        "broker": "mqtt://127.0.0.1:1883",
        "federation": "default",
        "agent_id": "pi-3",
        "task": "digits",
        "classes": (),
        "sel_prob": 1.0,
        "def_prob": 0.0,
        "partition": "",
        "index": 0,
        "of": 1,
        "data_dir": "",
        "state_dir": "midge-agent",
        "threads": 1,
        "labels": {},
        "worker_idle_s": 120,
        "max_memory_mb": 0,
        "hours": "",
        "keepalive_s": 30,
        "metrics_port": -1,
    }
    assert {key: getattr(settings, key) for key in relied_on} == relied_on


def test_the_defaults_are_within_their_own_limits():
    assert load_settings() == Settings()
    assert msgspec.convert(msgspec.structs.asdict(Settings()), Settings) == Settings()


@pytest.mark.parametrize(
    ("host_name", "agent_id"),
    [
        ("pi-3", "pi-3"),
        ("Lab_PC.example.org", "lab_pc"),
        ("M\u00fcllers Mac.local", "m-llers-mac"),
        ("-_x", "x"),
        ("9" * 80, "9" * 64),
        ("", "agent"),
        ("\u4e2d", "agent"),
    ],
)
def test_a_host_name_becomes_the_nearest_identifier(host_name, agent_id):
    assert agent_id_from(host_name) == agent_id
    assert is_identifier(agent_id)


def test_an_agent_without_a_name_has_its_host_s():
    assert load_settings().agent_id == agent_id_from(os.uname().nodename)


def test_three_skewed_agents_are_told_apart_by_their_options():
    settings = load_settings(
        environ={"MIDGE_BROKER": "mqtt://broker:1883"},
        options={
            "agent_id": "agent-3",
            "classes": "7,8,9,0",
            "sel_prob": 1.0,
            "def_prob": 0.05,
            "labels": ("site=lab",),
        },
    )
    assert (settings.classes, settings.sel_prob, settings.def_prob) == ((7, 8, 9, 0), 1.0, 0.05)
    assert settings.labels == {"site": "lab"}


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        (["index=3", "of=3"], "--set index: index is 3, and of is 3: expected 0 to 2"),
        (["index=1"], "--set index: index is 1, and of is 1: expected 0 to 0"),
        (["sel_prob=100"], "--set sel_prob: sel_prob is '100': expected a number, 0 to 1"),
        (
            ["hours=22:00"],
            "--set hours: hours is '22:00': expected first and past-the-last hour, 0 to 24, such as 22-6",
        ),
        (
            ["threads=2m"],
            "--set threads: threads is '2m': expected a whole number, 1 to 256",
        ),
        (["worker_idle=60"], "--set worker_idle: unknown setting worker_idle: did you mean worker_idle_s (seconds)?"),
        (["client_id=x"], "--set client_id: unknown setting client_id: did you mean agent_id?"),
        (
            ["agent_id=Pi 3"],
            "--set agent_id: agent_id is 'Pi 3': expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9",
        ),
        (["key_file=k.pem"], "--set key_file: key_file is given without cert_file: the two go together"),
    ],
)
def test_what_cannot_work_is_refused(assignments, problem):
    with pytest.raises(SettingsError) as caught:
        load_settings(assignments=assignments)
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(
    ("hours", "open_hours"),
    [
        ("", range(24)),
        ("0-24", range(24)),
        ("9-17", range(9, 17)),
        ("22-6", [0, 1, 2, 3, 4, 5, 22, 23]),
        ("22-24", [22, 23]),
        ("23-0", [23]),
        ("08-9", [8]),
    ],
)
def test_invitations_are_taken_in_the_hours_given_also_across_midnight(hours, open_hours):
    settings = load_settings(assignments=[f"hours={hours}"])
    assert [hour for hour in range(24) if settings.is_open(hour)] == list(open_hours)


@pytest.mark.parametrize("hours", ["6-6", "24-6", "6-25", "6", "6-", "-6", "6-8-10", "six-8", "6 - 8"])
def test_hours_that_say_nothing_or_too_much_are_refused(hours):
    with pytest.raises(SettingsError, match="hours"):
        load_settings(assignments=[f"hours={hours}"])


def test_reading_settings_and_logging_loads_nothing_heavy_and_stays_small(tmp_path):
    (tmp_path / "agent.json").write_text('{"threads": 2}')
    code = """
import json, logging, pathlib, sys
import edge_agent.config, midge.log
edge_agent.config.load_settings(file=pathlib.Path(sys.argv[1]), environ={"MIDGE_THREADS": "3"})
midge.log.setup()
midge.log.log_event(logging.getLogger("midge"), logging.INFO, "started")
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps([sorted(sys.modules), int(status.partition("VmRSS:")[2].split()[0])]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "agent.json")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60, env=unmeasured()).stdout
    modules, memory_kib = json.loads(output)
    heavy = {"numpy", "torch", "rich", "asyncio", "ssl", "paho", "sqlalchemy", "click", "tomllib", "difflib"}
    assert heavy.isdisjoint(modules)
    assert memory_kib < 40 * 1024


def test_the_page_has_the_table_of_these_settings():
    assert markdown(Settings) in PAGE.read_text(encoding="utf-8"), f"docs/configuration.md lacks:\n{markdown(Settings)}"


def test_every_setting_is_described_in_a_sentence():
    for row in describe(Settings):
        assert row.description.endswith("."), row.key
        assert "|" not in row.description, row.key
