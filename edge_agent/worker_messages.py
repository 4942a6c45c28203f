"""What supervisor and worker say to each other over their pipes. Both are ours: this is not the wire."""

from __future__ import annotations

import msgspec

from midge.tasks.summary import DataSummary
from midge.wire.messages import Head, RefusalReason, TrainingConfig


class DataOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which data this agent has; see `midge.tasks.base.DataSpec`."""

    data_dir: str | None = None
    classes: tuple[int, ...] = ()
    sel_prob: float = 1.0
    def_prob: float = 0.0
    partition: str = ""
    part: int = 0
    num_parts: int = 1
    seed: int = 0
    download: bool = False


class SetUp(msgspec.Struct, frozen=True, kw_only=True, tag="set_up"):
    """The first request: what to load, and within which limits."""

    agent_id: str
    task: str
    data: DataOptions
    max_memory_mb: int = 0


class CheckData(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Load the data, and say what they are."""


class DataChecked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    """What the data are; where they cannot be used, the reason that a training would be refused for."""

    summary: DataSummary | None = None
    reason: RefusalReason = "data"
    detail: str = ""


class TrainModel(msgspec.Struct, frozen=True, kw_only=True, tag="train"):
    """Train, and write the update to disk."""

    request: int
    run_id: str
    round_num: int
    training: TrainingConfig
    run_seed: int
    head: Head
    model_path: str
    update_path: str


class CancelTraining(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Stop that training as soon as the task lets go of it."""

    request: int


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """So far along, 0 to 1."""

    request: int
    fraction: float


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The update is on disk."""

    request: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """There is no update, and why."""

    request: int
    reason: RefusalReason
    detail: str


class Cancelled(msgspec.Struct, frozen=True, kw_only=True, tag="cancelled"):
    """The training was stopped."""

    request: int


Request = SetUp | CheckData | TrainModel | CancelTraining
Reply = DataChecked | Progressed | Finished | Failed | Cancelled
