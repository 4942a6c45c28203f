"""What an agent of an experiment holds, in the words of the agent's own settings, and as a task takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from midge.tasks.base import DataSpec

Share = Annotated[float, Meta(ge=0, le=1)]
Classes = tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...]


class Holding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data of one agent. Keys mean what they mean in an agent's configuration file: docs/configuration.md."""

    data_dir: str = ""
    classes: Classes = ()
    sel_prob: Share = 1.0
    def_prob: Share = 0.0
    partition: str = ""
    index: Annotated[int, Meta(ge=0)] = 0
    of: Annotated[int, Meta(ge=1)] = 1
    data_seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    download: bool = False

    def spec(self) -> DataSpec:
        """As a task takes it."""
        return DataSpec(
            data_dir=Path(self.data_dir) if self.data_dir else None,
            classes=self.classes,
            sel_prob=self.sel_prob,
            def_prob=self.def_prob,
            partition=self.partition,
            part=self.index,
            num_parts=self.of,
            seed=self.data_seed,
            download=self.download,
        )

    def assignments(self) -> list[str]:
        """As `edge-agent run --set` takes it, without what is left at its default."""
        return [f"{key}={_text(value)}" for key, value in self.given().items()]

    def given(self) -> dict[str, Any]:
        """The keys that differ from their defaults."""
        values, defaults = msgspec.structs.asdict(self), msgspec.structs.asdict(Holding())
        return {key: value for key, value in values.items() if value != defaults[key]}

    def words(self) -> str:
        """For a person, such as `has 1,2,3` or `part 2 of 10 by shards:2`."""
        parts = []
        if self.partition:
            parts.append(f"part {self.index + 1} of {self.of} by {self.partition}")
        if self.classes:
            others = f" and {self.def_prob:.0%} of the others" if self.def_prob else ""
            most = "" if self.sel_prob == 1 else f"{self.sel_prob:.0%} of "
            parts.append(f"{most}{','.join(map(str, self.classes))}{others}")
        if self.data_dir:
            parts.append(f"from {self.data_dir}")
        return ", ".join(parts) or "all data"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
