"""The gates that every update passes, always: what its header may say, and what its frames must add up to.

A peer can never make these raise: they return the reason of the rejection and a sentence that says what was seen, what was
expected and what to do. The reasons are the wire's `RejectReason`, so that a label of theirs stays bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from msgspec import Struct

from midge.wire.errors import LayoutError
from midge.wire.layout import Layout
from midge.wire.messages import RejectReason, UpdateHeader


class Rejection(Struct, frozen=True):
    """Why an update does not count."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The bounds of a run.

    Attributes:
        layout: of the run's model; an update's must be equal.
        num_frames: that every update has.
        max_examples: an update may claim at most this many, of training and of evaluation.
        norm_bound: largest L2 norm of a delta; 0 for no bound.
    """

    layout: Layout
    num_frames: int
    max_examples: int
    norm_bound: float = 0.0

    def check_header(self, header: UpdateHeader, model_digest: str) -> Rejection | None:
        """Judge an update by its header, before any frame is stored."""
        if header.model_digest != model_digest:
            return Rejection(
                "model_digest",
                f"trained on model {header.model_digest[:12]}, round {header.round_num} is on {model_digest[:12]}",
            )
        if header.layout_digest != self.layout.digest:
            return Rejection(
                "layout",
                f"layout {header.layout_digest[:12]}, the run's is {self.layout.digest[:12]}: "
                "agent and coordinator run different versions of the task",
            )
        if header.num_frames != self.num_frames:
            return Rejection("num_frames", f"{header.num_frames} frames, the run has {self.num_frames}")
        if not 1 <= header.num_examples <= self.max_examples:
            return Rejection("num_examples", f"{header.num_examples} examples, expected 1 to {self.max_examples}")
        num_evaluated = 1 if header.evaluation is None else header.evaluation.num_examples
        if num_evaluated > self.max_examples:  # it is the weight of the agent's word on which version is best
            return Rejection(
                "num_examples", f"evaluated on {num_evaluated} examples, expected 1 to {self.max_examples}"
            )
        try:
            self.layout.check_counters(header.counters)
        except LayoutError as error:
            return Rejection("counters", str(error))
        return None

    def check_update(self, header: UpdateHeader, digest: str, norm: float) -> Rejection | None:
        """Judge a complete update: `digest` and `norm` are of what really came."""
        if digest != header.update_digest:
            return Rejection("digest", f"frames add up to {digest[:12]}, the header says {header.update_digest[:12]}")
        if not math.isfinite(norm):
            return Rejection("not_finite", "NaN or infinite elements: training diverged; lower learning_rate")
        if self.norm_bound and norm > self.norm_bound:
            return Rejection("norm", f"delta of norm {norm:.4g}, at most {self.norm_bound:.4g} is allowed (norm_bound)")
        return None
