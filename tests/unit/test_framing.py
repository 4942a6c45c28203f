"""How a run cuts its vectors, where connections are narrow or somebody says so."""

from __future__ import annotations

import pytest

from coordinator.framing import choose_framing
from midge.wire.errors import FrameError
from midge.wire.frames import Framing

LARGE = 2**30


def test_the_narrowest_connection_counts_whoever_has_it():
    assert choose_framing(100_000, None, None) == Framing(100_000, 16_384)
    # 8192 - 40 - 512 = 7640 bytes are 1910 elements, and 7 * 256 = 1792 of them.
    assert choose_framing(100_000, 8192, None) == choose_framing(100_000, None, 8192) == Framing(100_000, 1792)
    assert (
        choose_framing(100_000, 8192, 2_000_000) == choose_framing(100_000, 2_000_000, 8192) == Framing(100_000, 1792)
    )


@pytest.mark.fault(24)
@pytest.mark.parametrize(("num_elements", "said"), [(100_000, 1), (100_000, 1575), (LARGE, 2048)])
def test_a_limit_that_no_run_could_keep_to_is_passed_over(num_elements, said):
    assert choose_framing(num_elements, 2_000_000, said) == choose_framing(num_elements, 2_000_000, None)


def test_where_our_own_connection_is_too_narrow_nothing_helps():
    with pytest.raises(FrameError, match="packet limit of 1000 bytes: expected at least 2 KiB; raise it on the broker"):
        choose_framing(100_000, 1000, 1)
