"""What a look at a state directory finds, and how bad it is.

damage    something that was stored is not there, or not as it was stored
leftover  something that nobody needs any more: it costs room, and can be removed
note      something to know of, and nothing to mend
"""

from __future__ import annotations

from typing import Literal

import msgspec

RESTORE = "restore the directory from a backup"


class Finding(msgspec.Struct, frozen=True):
    """Something to tell.

    Attributes:
        severity: see above.
        where: a file, relative to the state directory, or a run and what of it.
        what: what was seen, and what was expected.
        cure: what to do; empty where nothing need be done.
        removable: whether the file may be removed.
    """

    severity: Literal["damage", "leftover", "note"]
    where: str
    what: str
    cure: str = ""
    removable: bool = False


class Report(msgspec.Struct):
    """What a look at a state directory found.

    Attributes:
        state_dir: which.
        is_running: whether a coordinator runs in it.
        runs: checked.
        versions: of all runs.
        models: files that were read whole.
        model_bytes: in them.
        agent_models: that are kept (`keep_agent_models`).
        updates: that count in the current round of a run, whose frames were all compared with their digests.
        findings: what is wrong, the worst first.
        removed: what a repair removed.
    """

    state_dir: str
    is_running: bool
    runs: int = 0
    versions: int = 0
    models: int = 0
    model_bytes: int = 0
    agent_models: int = 0
    updates: int = 0
    findings: list[Finding] = []
    removed: list[str] = []

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged."""
        return all(finding.severity != "damage" for finding in self.findings)
