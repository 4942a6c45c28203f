"""The gates: each reason for which an update is rejected, the edge of each bound, and what the agent is told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator.admission import Gates
from coordinator.attempt import Address
from midge.wire.layout import Layout, TensorSpec
from midge.wire.messages import Evaluation
from tests.machines import LAYOUT, digest, header, version_digest

GATES = Gates(layout=LAYOUT, num_frames=3, max_examples=1000, norm_bound=5.0)
BASE = version_digest(0)
OTHER_LAYOUT = (
    f"layout {digest('other')[:12]}, the run's is {LAYOUT.digest[:12]}: "
    "agent and coordinator run different versions of the task"
)


def judged(gates: Gates = GATES, **changes: Any) -> tuple[str, str] | None:
    rejection = gates.check_header(header("a", Address("r1", 3, 1, 1), **changes), BASE)
    return None if rejection is None else (rejection.reason, rejection.detail)


def test_a_header_that_fits_passes():
    assert judged() is None


@pytest.mark.fault(11, 12)
@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        (
            {"model_digest": digest("other")},
            "model_digest",
            f"trained on model {digest('other')[:12]}, round 1 is on {BASE[:12]}",
        ),
        ({"layout_digest": digest("other")}, "layout", OTHER_LAYOUT),
        ({"num_frames": 2}, "num_frames", "2 frames, the run has 3"),
        ({"num_examples": 0}, "num_examples", "0 examples, expected 1 to 1000"),
        ({"num_examples": 1001}, "num_examples", "1001 examples, expected 1 to 1000"),
        ({"counters": (1,)}, "counters", "1 counters, the layout has 0"),
    ],
)
def test_each_field_of_a_header_that_does_not_fit_is_rejected(changes: dict[str, Any], reason: str, detail: str):
    assert judged(**changes) == (reason, detail)


@pytest.mark.fault(12)
@pytest.mark.parametrize("num_examples", [1, 1000])
def test_the_bounds_of_the_examples_are_allowed(num_examples: int):
    assert judged(num_examples=num_examples) is None


def test_an_evaluation_on_more_examples_than_an_update_may_claim_is_rejected():
    claimed = Evaluation(num_examples=1001, loss=0.1)
    reason, detail = judged(evaluation=claimed) or ("", "")
    assert (reason, detail) == ("num_examples", "evaluated on 1001 examples, expected 1 to 1000")
    assert judged(evaluation=Evaluation(num_examples=1000, loss=0.1)) is None


def test_counters_must_be_as_many_as_the_layout_has():
    layout = Layout((TensorSpec("w", (10,), "float32"), TensorSpec("n", (2,), "int64")))
    gates = Gates(layout=layout, num_frames=3, max_examples=1000)
    assert judged(gates, layout_digest=layout.digest, counters=(1, 2)) is None
    assert judged(gates, layout_digest=layout.digest, counters=(1,)) == ("counters", "1 counters, the layout has 2")


def complete(norm: float, gates: Gates = GATES, seen: str | None = None) -> tuple[str, str] | None:
    offered = header("a", Address("r1", 3, 1, 1))
    rejection = gates.check_update(offered, seen or offered.update_digest, norm)
    return None if rejection is None else (rejection.reason, rejection.detail)


def test_frames_that_do_not_add_up_to_the_header_are_rejected():
    said = header("a", Address("r1", 3, 1, 1)).update_digest
    assert complete(1.0, seen=digest("x")) == (
        "digest",
        f"frames add up to {digest('x')[:12]}, the header says {said[:12]}",
    )


@pytest.mark.fault(10)
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_elements_that_are_not_finite_are_rejected(norm: float):
    assert complete(norm) == ("not_finite", "NaN or infinite elements: training diverged; lower learning_rate")


@pytest.mark.fault(10)
def test_a_delta_above_the_norm_bound_is_rejected_and_at_the_bound_is_not():
    assert complete(5.0) is None
    assert complete(5.001) == ("norm", "delta of norm 5.001, at most 5 is allowed (norm_bound)")


def test_without_a_norm_bound_any_finite_norm_passes():
    assert complete(1e30, Gates(layout=LAYOUT, num_frames=3, max_examples=1000)) is None
