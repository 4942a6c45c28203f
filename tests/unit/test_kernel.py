"""The compiled arithmetic: the bits of NumPy's, and none of it where it cannot be had."""

from __future__ import annotations

import importlib.util
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coordinator.aggregate
from coordinator import kernel
from coordinator.aggregate import AggregationError, Fold
from coordinator.server_state import ServerState
from coordinator.spool import RoundSpool
from coordinator.strategies import FedAvg, Step
from midge.tasks.flatten import layout_of
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, encode_frame, run_tag
from tests.environment import unmeasured

ROOT = Path(__file__).parents[2]
SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0], np.float32)
NOT_FINITE = np.array([math.inf, -math.inf, math.nan], np.float32)

needs_numba = pytest.mark.usefixtures("works_here")


@pytest.fixture(scope="module")
def works_here():
    """Not a condition of the tests' marks: that would compile for two seconds where tests are only collected."""
    if kernel.compiled() is None:
        pytest.skip("numba is not installed, or rounds otherwise here")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere NumPy may fuse")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_where_numba_is_installed_the_kernel_is_used():
    assert kernel.compiled() is not None


def values(rng, num_elements, *odd):
    """Numbers of all sizes; about every third is one of `odd`."""
    scales = 2.0 ** rng.integers(-150, 60, num_elements)
    vector = (rng.standard_normal(num_elements) * scales).astype(np.float32)
    chosen = rng.random(num_elements) < 0.3
    vector[chosen] = rng.choice(np.concatenate(odd), chosen.sum())
    return vector


class Cohort:
    """Updates in a spool, and weights."""

    def __init__(self, directory, seed, num_updates, framing, *odd):
        rng = np.random.default_rng(seed)
        self.framing = framing
        self.base = values(rng, framing.num_elements, SPECIAL)
        self.weights = (rng.random(num_updates) / num_updates).tolist()
        self.vectors = [values(rng, framing.num_elements, *odd) for _ in range(num_updates)]
        self.spool = RoundSpool(directory / "1.spool")
        for index in range(framing.num_frames):
            for agent_num in rng.permutation(num_updates):
                self._receive(f"pi-{agent_num}", index, self.vectors[agent_num][slice(*framing.span(index))])

    def _receive(self, agent_id, index, elements):
        encoded = encode_frame(
            codec=FLOAT32,
            run_tag=run_tag("run"),
            round_num=1,
            index=index,
            num_elements=len(elements),
            content_tag=bytes(8),
            body=encode_float32(elements),
        )
        self.spool.append(agent_id, encoded, bytes(32), 0.0)

    def folded(self, strategy, num_threads, compiled):
        """The next model's bytes and the sums of squares, or why there is none."""
        after = np.empty(self.framing.num_elements, np.float32)

        def write(start, block):
            after[start : start + len(block)] = block

        frames = [self.spool.stored(f"pi-{agent_num}", bytes(8)) for agent_num in range(len(self.vectors))]
        layout = layout_of({"w": self.base})
        base = SimpleNamespace(elements=self.base, layout=layout, release=lambda: None)
        writer = SimpleNamespace(write=write)
        state = ServerState(strategy, self.framing.num_elements, None, None, 1)
        step = Step(1, len(frames), len(frames))
        fold = Fold(base, self.spool, frames, self.weights, strategy, self.framing, writer, state, step, compiled)
        try:
            return fold.run(num_threads), after.tobytes()
        except AggregationError as error:
            return str(error)


cohorts = {
    "seed": st.integers(0, 2**32),
    "num_updates": st.integers(1, 45),
    "num_elements": st.integers(1, 700),
    "frame_elements": st.integers(1, 300),
    "block_elements": st.sampled_from([1, 2, 63, 128, 129, 300, 1000]),
    "group_rows": st.sampled_from([1, 3, 20, 64]),
    "num_threads": st.integers(1, 3),
    "strategy": st.sampled_from([FedAvg(), FedAvg(server_learning_rate=0.3)]),
}


def both_ways(odd, seed, num_updates, num_elements, frame_elements, block_elements, group_rows, num_threads, strategy):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(coordinator.aggregate, "_BLOCK_ELEMENTS", block_elements)
        patch.setattr(coordinator.aggregate, "_GROUP_ROWS", group_rows)
        framing = Framing(num_elements, min(frame_elements, num_elements))
        cohort = Cohort(Path(directory), seed, num_updates, framing, *odd)
        one = cohort.folded(strategy, 1, None)
        other = cohort.folded(strategy, num_threads, kernel.compiled())
        cohort.spool.close()
        return one, other


@needs_numba
@settings(max_examples=60, deadline=None)
@given(**cohorts)
def test_any_cohort_gives_the_same_bits_either_way(**drawn):
    one, other = both_ways([SPECIAL], **drawn)
    assert one == other


@needs_numba
@settings(max_examples=30, deadline=None)
@given(**cohorts)
def test_what_is_not_finite_is_refused_either_way_and_the_same_place_named(**drawn):
    drawn["num_threads"] = 1  # of several, each comes to a place of its own
    one, other = both_ways([SPECIAL, NOT_FINITE], **drawn)
    assert one == other


@needs_numba
@pytest.mark.parametrize("num_rows", [*range(1, 10), 45])
def test_infinities_cancel_and_spread_as_in_numpy(num_rows):
    rng = np.random.default_rng(num_rows)
    rows = np.stack([values(rng, 999, SPECIAL, NOT_FINITE) for _ in range(num_rows)])
    weights = rng.random(num_rows)
    weights[-1] = 0.0  # at which an infinity is NaN
    seen = np.full(999, 7.0)
    kernel.compiled().add_rows(rows.ravel(), np.arange(num_rows) * 999, weights, seen)
    with np.errstate(all="ignore"):
        expected = np.einsum("k,kc->c", weights, rows.astype(np.float64))
    np.testing.assert_array_equal(seen, expected)
    numbers = ~np.isnan(expected)
    assert seen[numbers].tobytes() == expected[numbers].tobytes()


def test_rows_are_added_one_after_the_other():
    # ((0 + 1 * 2) + 3 * 4) + ... by hand, uncompiled: 2, 14, 44, 100, 190
    for num_rows, expected in enumerate([2.0, 14.0, 44.0, 100.0, 190.0], 1):
        out = np.full(1, np.nan)
        elements, weights = np.arange(0, 20, 2, dtype=np.float32), np.arange(1, 11, 2, dtype=np.float64)
        kernel.add_rows(elements, np.arange(1, 1 + num_rows), weights[:num_rows], out)
        assert out[0] == expected


def test_a_zero_keeps_the_sign_that_it_had_and_squares_go_to_their_lane():
    # Deltas 2, 0, 0, -3, 1 in two lanes: 4 + 0 + 1 = 5 and 0 + 9 = 9
    after, before = np.array([3, 0.0, -0.0, -2, 1], np.float32), np.array([1, -0.0, 0.0, 1, 0], np.float32)
    lanes = np.zeros(2)
    kernel.settle(after, before, True, lanes)
    assert lanes.tolist() == [5.0, 9.0]
    assert after.tolist() == [3, 0, 0, -2, 1]
    assert np.signbit(after).tolist() == [False, True, False, True, False]


# When it is used, and what happens where it cannot be.


@pytest.fixture
def anew():
    """The kernel is compiled again, if it is asked for, and again after the test."""
    kernel.compiled.cache_clear()
    yield
    kernel.compiled.cache_clear()


def test_a_small_round_neither_loads_nor_compiles(monkeypatch):
    monkeypatch.setattr(kernel, "compiled", lambda: "compiled")
    assert kernel.kernel_for(kernel.WORTH_ELEMENTS - 1) is None
    assert kernel.kernel_for(kernel.WORTH_ELEMENTS) == "compiled"


def test_numba_is_not_loaded_before_it_is_needed():
    program = "import sys, coordinator.aggregate; print('numba' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60, env=unmeasured())
    assert done.stdout == "False\n"


def test_without_numba_the_log_says_so_once_and_numpy_does_the_work(monkeypatch, anew, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    caplog.set_level("INFO", "coordinator")
    assert [kernel.kernel_for(kernel.WORTH_ELEMENTS) for _ in range(3)] == [None] * 3
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "large rounds would be faster with numba: the extra `fast`")
    ]


def test_a_numba_that_fails_is_done_without(monkeypatch, anew, caplog):
    def fail():
        raise RuntimeError("LLVM is of another version")

    monkeypatch.setattr(kernel, "_compile", fail)
    assert [kernel.compiled(), kernel.compiled()] == [None, None]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "numba does not work here: aggregating without it")
    ]


def add_rows_fused(elements, starts, weights, out):
    """As with one rounding for a multiply and an add, or nearly so."""
    total = np.zeros(len(out), np.longdouble)
    for start, weight in zip(starts, weights, strict=True):
        total = (total + np.longdouble(weight) * elements[start : start + len(out)]).astype(np.float64)
    out[:] = total


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is double here")
def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch, anew, caplog):
    caplog.set_level("INFO", "coordinator")
    monkeypatch.setattr(kernel, "_compile", lambda: kernel.Kernel(add_rows_fused, kernel.settle))
    assert kernel.compiled() is None
    assert "NumPy rounds otherwise than numba here" in caplog.text


def test_uncompiled_it_would_be_used_since_it_gives_the_same_bits(monkeypatch, anew):
    uncompiled = kernel.Kernel(kernel.add_rows, kernel.settle)
    monkeypatch.setattr(kernel, "_compile", lambda: uncompiled)
    assert kernel.compiled() == uncompiled


def test_a_big_endian_processor_does_without(monkeypatch, anew):
    monkeypatch.setattr(kernel, "_compile", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(kernel, "sys", SimpleNamespace(byteorder="big"))
    assert kernel.compiled() is None
