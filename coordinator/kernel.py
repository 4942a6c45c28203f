"""The arithmetic of a large round in machine code: the one file that imports numba.

NumPy widens every row to float64 and then adds it: two passes through memory. `add_rows` does both at once, straight from the
spool's map, in two fifths of the time. It adds in NumPy's order and is compiled without `fastmath`, so no operation is moved
or fused: **it gives NumPy's bits**, and a round may be aggregated either way. That is checked when it is compiled, since
NumPy fuses a multiply and an add on some processors (64-bit ARM is one): there it is not used.

numba is an extra, `midge[fast]`. Where it is missing or fails, NumPy does the work, and the log says so once.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from midge.log import log_event

WORTH_ELEMENTS = 20_000_000
"""Elements of all updates of a round from which the loop is used.

Importing and compiling take 1 s and 150 MB, once in a process, and save 0.4 s in each thousand million elements. So the time
is paid back after about a hundred rounds of this size, or ten of 20 updates of 11 million.
"""

NUM_LANES = 128
"""Partial sums that `settle` adds a block's squares to: as many as one pass of a vector loop adds to without waiting."""


class Kernel(NamedTuple):
    """`add_rows` and `settle`, compiled."""

    add_rows: Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]], None]
    settle: Callable[[NDArray[np.float32], NDArray[np.float32], bool, NDArray[np.float64]], None]


_log = logging.getLogger("coordinator")


def kernel_for(num_elements: int) -> Kernel | None:
    """The kernel, for a round whose updates have so many elements in all; None: NumPy serves it better."""
    return compiled() if num_elements >= WORTH_ELEMENTS else None


@functools.cache
def compiled() -> Kernel | None:
    """The kernel, made at the first call; None where that is impossible or would give other bits than NumPy."""
    if sys.byteorder != "little":
        return None  # the spool's elements are
    started = time.perf_counter()
    try:
        kernel = _compile()
    except ImportError as error:
        log_event(_log, logging.INFO, "large rounds would be faster with numba: the extra `fast`", error=error)
        return None
    except Exception as error:  # noqa: BLE001  a compiler may raise anything, and its work can be done without it
        log_event(_log, logging.WARNING, "numba does not work here: aggregating without it", error=error)
        return None
    if not _gives_bits_of_numpy(kernel):
        log_event(_log, logging.INFO, "NumPy rounds otherwise than numba here: aggregating without it")
        return None
    log_event(_log, logging.INFO, "aggregation compiled", duration_s=round(time.perf_counter() - started, 1))
    return kernel


def add_rows(
    elements: NDArray[np.float32], starts: NDArray[np.int64], weights: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """`((0 + w_0 x_0) + w_1 x_1) + ...` into `out` (float64[n]), where x_k is `elements[starts[k] : starts[k] + n]`.

    Four rows at a time: each pass over `out` is then worth its while.
    """
    n = out.shape[0]
    num_rows = starts.shape[0]
    out[:] = 0.0
    for k in range(0, num_rows - 3, 4):
        a, b = elements[starts[k] :], elements[starts[k + 1] :]
        c, d = elements[starts[k + 2] :], elements[starts[k + 3] :]
        for i in range(n):
            out[i] = (((out[i] + weights[k] * a[i]) + weights[k + 1] * b[i]) + weights[k + 2] * c[i]) + weights[
                k + 3
            ] * d[i]
    for k in range(num_rows - num_rows % 4, num_rows):
        row = elements[starts[k] :]
        for i in range(n):
            out[i] += weights[k] * row[i]


def settle(
    next_block: NDArray[np.float32], global_block: NDArray[np.float32], keep_zeros: bool, lanes: NDArray[np.float64]
) -> None:
    """Add `(next - global)^2` of element i to `lanes[i % len(lanes)]`; with `keep_zeros`, leave what was and is zero as it was.

    Zeros differ by their sign only, so the order of the two does not matter.
    """
    n = next_block.shape[0]
    for start in range(0, n, lanes.shape[0]):
        after, before = next_block[start:], global_block[start:]
        for i in range(min(lanes.shape[0], n - start)):
            delta = np.float64(after[i]) - np.float64(before[i])
            lanes[i] += delta * delta
            after[i] = before[i] if keep_zeros and abs(after[i]) + abs(before[i]) == 0 else after[i]


def _compile() -> Kernel:
    import numba  # noqa: PLC0415  most federations never need it
    from numba import types  # noqa: PLC0415

    def array(dtype: Any, *, readonly: bool = False) -> Any:
        return types.Array(dtype, 1, "C", readonly=readonly)

    floats, doubles = array(types.float32), array(types.float64)
    stored = array(types.float32, readonly=True)
    return Kernel(
        numba.njit(types.void(stored, array(types.int64), doubles, doubles), nogil=True)(add_rows),
        numba.njit(types.void(floats, stored, types.boolean, doubles), nogil=True)(settle),
    )


def _gives_bits_of_numpy(kernel: Kernel) -> bool:
    """Whether the kernel and einsum agree on sums in which every rounding, and every one left out, would show."""
    num_rows, num_columns = 7, 1000
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((num_rows, num_columns), np.float32)
    weights = rng.random(num_rows)
    seen = np.empty(num_columns)
    kernel.add_rows(rows.ravel(), np.arange(num_rows) * num_columns, weights, seen)
    expected = np.einsum("k,kc->c", weights, rows.astype(np.float64))
    return bool(np.array_equal(seen, expected))
