"""What the coordinator and its evaluating process say to each other over their pipes. Both are ours: this is not the wire."""

from __future__ import annotations

import msgspec

from midge.wire.messages import Evaluation


class SetUp(msgspec.Struct, frozen=True, kw_only=True, tag="set_up"):
    """The first request: which task, and where the models and the test data lie."""

    task: str
    models_dir: str
    data_dir: str = ""
    download: bool = False


class MakeModel(msgspec.Struct, frozen=True, kw_only=True, tag="make"):
    """Make the model of round 0 and store it: the task's own, the base model of this digest, or that of a safetensors file."""

    request: int
    seed: int
    base_digest: str = ""
    file: str = ""


class Evaluate(msgspec.Struct, frozen=True, kw_only=True, tag="evaluate"):
    """Evaluate a stored model on the task's test data."""

    request: int
    digest: str


class Made(msgspec.Struct, frozen=True, kw_only=True, tag="made"):
    """The model is stored."""

    request: int
    digest: str


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, tag="evaluated"):
    """The score; None where the task has no test data."""

    request: int
    score: Evaluation | None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It could not be done; `errno` says why a model that was made could not be stored, and is 0 otherwise."""

    request: int
    reason: str
    errno: int = 0


Request = SetUp | MakeModel | Evaluate
Reply = Made | Evaluated | Failed
