"""What the coordinator waits for: of each wait, what is missing and until when. Who shows it remembers since when."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

WaitReason = Literal["model", "publishing", "broker", "agents", "updates", "aggregation", "evaluation", "pause", "disk"]


class Wait(Struct, frozen=True):
    """One wait.

    Attributes:
        reason: what is waited for; `pause` is the one after an abandoned attempt.
        num_missing: agents, or updates, that are not there yet.
        until: monotonic seconds at which it ends at the latest; infinity where nothing ends it but what it waits for.
    """

    reason: WaitReason
    num_missing: int = 0
    until: float = math.inf
