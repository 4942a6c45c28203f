"""The edge agent's settings: who it is, which data it has, and what it may use of its device.

An agent at rest is to stay below 40 MB, so this file imports nothing heavy; a test holds it to that.

docs/configuration.md lists the settings; `midge.settings` says where values come from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from midge import failpoints
from midge import settings as sources
from midge.settings import CommonSettings, Problem, Seconds, Text, check_identifier
from midge.wire.messages import Labels

NOT_SETTINGS = frozenset({"MIDGE_CONFIG", failpoints.VARIABLE})
"""Names in the environment that belong to the command line, and to tests."""

_HOURS = re.compile(r"([01]?\d|2[0-3])-([01]?\d|2[0-4])")


def agent_id_from(host_name: str) -> str:
    """The identifier nearest to a host's name: its first label in lower case, other characters replaced by `-`."""
    label = host_name.partition(".")[0].lower()
    return re.sub(r"[^a-z0-9_-]", "-", label).lstrip("_-")[:64] or "agent"


def _own_agent_id() -> str:
    return agent_id_from(os.uname().nodename)


class Settings(CommonSettings, frozen=True, kw_only=True):
    """Everything that an operator may tell an agent."""

    agent_id: Annotated[
        str,
        Meta(
            description="Name of this agent, unlike any other's: 1 to 64 of a-z, 0-9, `_` and `-`. Also its MQTT client id.",
            extra={"default": "from the host's name"},
        ),
    ] = msgspec.field(default_factory=_own_agent_id)
    labels: Annotated[Labels, Meta(description="What the coordinator may select agents by, as `site=lab`.")] = (
        msgspec.field(default_factory=dict)
    )
    data_dir: Annotated[Text, Meta(description="Where this device's data lie; empty: the task's own place.")] = ""
    download: Annotated[
        bool,
        Meta(description="Whether the task may download data that are not there: built-in ones do, to `data_dir`."),
    ] = False
    classes: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...],
        Meta(max_length=10_000, description="Labels that this agent owns; empty: all."),
    ] = ()
    sel_prob: Annotated[float, Meta(ge=0, le=1, description="Share of the examples with those labels that it has.")] = (
        1.0
    )
    def_prob: Annotated[float, Meta(ge=0, le=1, description="Share of the examples with other labels that it has.")] = (
        0.0
    )
    partition: Annotated[
        Text,
        Meta(
            description="How the data are dealt out: `iid`, `contiguous`, `shards:2`, `dirichlet:0.3`, `quantity:0.5`; "
            "empty: all data."
        ),
    ] = ""
    index: Annotated[int, Meta(ge=0, le=99_999, description="Which part is this agent's, counted from 0.")] = 0
    of: Annotated[int, Meta(ge=1, le=100_000, description="How many parts there are.")] = 1
    data_seed: Annotated[
        int, Meta(ge=0, le=2**53, description="Seed of the partition; agents that share data must share it.")
    ] = 0
    check_data: Annotated[
        bool, Meta(description="Whether the data are loaded once at the start, to say what they are or what is wrong.")
    ] = True
    state_dir: Annotated[
        str, Meta(min_length=1, max_length=1000, description="Directory of the journal and of work not yet delivered.")
    ] = "midge-agent"
    threads: Annotated[
        int, Meta(ge=1, le=256, description="Threads that training uses; with 1 its results repeat bit for bit.")
    ] = 1
    worker_idle_s: Annotated[
        Seconds, Meta(description="The process that trains is ended after this long without work.")
    ] = 120.0
    max_memory_mb: Annotated[
        int, Meta(ge=0, le=2**30, description="Address space that training may use; 0: no limit.")
    ] = 0
    hours: Annotated[Text, Meta(description="Local hours in which invitations are taken, as `22-6`; empty: all.")] = ""
    train_on_battery: Annotated[
        bool, Meta(description="Whether invitations are taken while a battery of this device is discharging.")
    ] = True
    keepalive_s: Annotated[
        int, Meta(ge=1, le=65_535, description="Longest silence towards the broker, which else thinks us gone.")
    ] = 30
    metrics_port: Annotated[
        int, Meta(ge=-1, le=65_535, description="Port of this agent's own metrics; -1: none, 0: any free one.")
    ] = -1

    def is_open(self, hour: int) -> bool:
        """Whether invitations are taken in the local hour `hour`, 0 to 23."""
        if not self.hours:
            return True
        first, end = map(int, self.hours.split("-"))
        return first <= hour < end if first < end else hour >= first or hour < end


S = TypeVar("S", bound=Settings)


def load_settings(
    kind: type[S] = Settings,  # type: ignore[assignment]  # a default of a type variable
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, object | None] | None = None,
    assignments: Sequence[str] = (),
    ignore: Collection[str] = NOT_SETTINGS,
) -> S:
    """The agent's settings, or those of a `kind` that adds to them, from all sources, see `midge.settings.load`.

    Raises:
        midge.settings.SettingsError: something is wrong; it says everything that is.
    """
    return sources.load(
        kind, file=file, environ=environ, options=options, assignments=assignments, check=check, ignore=ignore
    )


def check(settings: Settings) -> list[Problem]:
    """What is wrong between settings that are each right, or with an identifier or a range of hours."""
    found = sources.check_common(settings)
    found += check_identifier("agent_id", settings.agent_id)
    if settings.index >= settings.of:
        text = f"is {settings.index}, and of is {settings.of}: expected 0 to {settings.of - 1}"
        found.append(Problem("index", text, ("of",)))
    if settings.hours and not _are_hours(settings.hours):
        text = f"is {settings.hours[:80]!r}: expected first and past-the-last hour, 0 to 24, such as 22-6"
        found.append(Problem("hours", text))
    return found


def _are_hours(text: str) -> bool:
    match = _HOURS.fullmatch(text)
    return match is not None and int(match[1]) != int(match[2])
