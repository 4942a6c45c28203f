"""The operator's rules: what speaks against an invitation, in their order, and what a device says of its battery."""

from __future__ import annotations

import errno

import pytest

from edge_agent.agent_events import Objection
from edge_agent.config import Settings
from edge_agent.policy import objection, on_battery
from midge.wire.messages import Invitation, TrainingConfig


def invitation(task: str = "digits") -> Invitation:
    return Invitation(
        run_id="r1",
        epoch=1,
        round_num=1,
        attempt=1,
        model_digest="ab" * 32,
        task=task,
        training=TrainingConfig(),
        seed=7,
        credit=2,
        deadline_s=60.0,
    )


def asked(hour: int = 12, *, discharging: bool = False, task: str = "digits", **settings) -> Objection | None:
    return objection(invitation(task), Settings(agent_id="pi-1", **settings), hour, discharging=discharging)


def test_without_rules_nothing_speaks_against_any_hour_or_battery():
    assert [asked(hour, discharging=True) for hour in range(24)] == [None] * 24


def test_an_invitation_to_another_task_is_refused_and_both_are_named():
    expected = Objection("task", "invited to flowers, this agent was started with --task digits")
    assert asked(task="flowers") == expected


def test_a_task_in_a_file_is_the_same_wherever_the_file_lies():
    assert (
        objection(invitation("flowers.py"), Settings(agent_id="a", task="/opt/flowers.py"), 1, discharging=False)
        is None
    )
    other = objection(invitation("flowers.py:b"), Settings(agent_id="a", task="./flowers.py"), 1, discharging=False)
    assert other == Objection("task", "invited to flowers.py:b, this agent was started with --task ./flowers.py")


@pytest.mark.parametrize(
    ("hours", "open_hours"),
    [
        ("9-17", range(9, 17)),
        ("22-6", [0, 1, 2, 3, 4, 5, 22, 23]),
        ("0-24", range(24)),
        ("22-24", [22, 23]),
        ("23-0", [23]),
        ("0-1", [0]),
    ],
)
def test_invitations_are_taken_in_the_operators_hours_alone(hours, open_hours):
    assert [hour for hour in range(24) if asked(hour, hours=hours) is None] == list(open_hours)


def test_a_refusal_for_the_hour_says_which_hours_would_do():
    assert asked(12, hours="22-6") == Objection("hours", "this agent trains only in the hours 22-6")


def test_on_its_battery_a_device_trains_unless_its_operator_says_no():
    assert asked(discharging=True, train_on_battery=True) is None
    assert asked(discharging=False, train_on_battery=False) is None
    refusal = asked(discharging=True, train_on_battery=False)
    assert refusal == Objection("battery", "this device runs on its battery, and train_on_battery is off")


def test_of_several_reasons_the_one_that_no_waiting_will_mend_is_told():
    seen = asked(12, discharging=True, task="flowers", hours="22-6", train_on_battery=False)
    assert seen is not None
    assert seen.reason == "task"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({}, False),
        ({"AC": "Unknown"}, False),
        ({"BAT0": "Charging"}, False),
        ({"BAT0": "Full", "BAT1": "Discharging"}, True),
        ({"BAT0": "Not charging"}, False),
    ],
)
def test_a_battery_that_discharges_is_seen(tmp_path, statuses, expected):
    for name, status in statuses.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "status").write_text(status + "\n")
    assert on_battery(tmp_path) is expected


def test_a_battery_that_cannot_be_read_is_passed_over(tmp_path):
    (tmp_path / "BAT0" / "status").mkdir(parents=True)  # reading a directory is an error
    (tmp_path / "BAT1").mkdir()
    (tmp_path / "BAT1" / "status").write_text("Discharging\n")
    assert on_battery(tmp_path)
    assert not on_battery(tmp_path / "none")


def test_a_device_that_is_out_of_descriptors_is_not_on_its_battery(tmp_path, monkeypatch):
    def fail(self, pattern):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(type(tmp_path), "glob", fail)
    assert not on_battery(tmp_path)
