"""The operator's rules on when this device may train. Each refusal names its reason, so that the coordinator can show it."""

from __future__ import annotations

from pathlib import Path

from edge_agent.agent_events import Objection
from edge_agent.config import Settings
from midge.wire.identifiers import task_name
from midge.wire.messages import Invitation

_POWER = Path("/sys/class/power_supply")


def on_battery(directory: Path = _POWER) -> bool:
    """Whether a battery of this device is discharging; false where it has none, or where that cannot be read."""
    try:
        paths = list(directory.glob("*/status"))
    except OSError:  # out of descriptors, say
        return False
    for status in paths:
        try:
            if status.read_text().strip() == "Discharging":
                return True
        except OSError:
            continue
    return False


def objection(invitation: Invitation, settings: Settings, hour: int, *, discharging: bool) -> Objection | None:
    """What speaks against this invitation in local hour `hour`, 0 to 23; None where nothing does."""
    if invitation.task != task_name(settings.task):
        return Objection("task", f"invited to {invitation.task}, this agent was started with --task {settings.task}")
    if not settings.is_open(hour):
        return Objection("hours", f"this agent trains only in the hours {settings.hours}")
    if discharging and not settings.train_on_battery:
        return Objection("battery", "this device runs on its battery, and train_on_battery is off")
    return None
