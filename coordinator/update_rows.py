"""The updates of a round as rows: the same elements of each, read from the frames that hold them and widened to float64.

Rows are in the order of agent ids. What is read is a block of columns, so memory does not depend on the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from coordinator.spool import RoundSpool, StoredFrame
from midge.wire.frames import Framing

Frames = Mapping[int, StoredFrame]
"""Of one update, by index; all are there."""

_NUM_LANES = 16
_BLOCK_VALUES = 1024 * 1024
_LEAST_BLOCK = 256


class UpdateRows:
    """The rows.

    Args:
        spool: where the frames are.
        frames: of each update.
        framing: of the run.
    """

    def __init__(self, spool: RoundSpool, frames: Sequence[Frames], framing: Framing) -> None:
        self.frames = frames
        self._spool = spool
        self._framing = framing

    def __len__(self) -> int:
        return len(self.frames)

    def load(self, first: int, start: int, out: NDArray[np.float64]) -> None:
        """Fill `out`, float64[k, n], with elements `start` to `start + n` of the k updates from `first` on."""
        group = self.frames[first : first + len(out)]
        for index, offset, columns in self._pieces(start, out.shape[1]):
            self._spool.load_rows([frames[index] for frames in group], offset, out[:, columns])

    def located(self, start: int, num_elements: int) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.int64]]]:
        """Where elements of all updates lie in the spool's map: the columns, the map's elements, where each row begins."""
        for index, offset, columns in self._pieces(start, num_elements):
            frames = [frames[index] for frames in self.frames]
            elements, starts = self._spool.located(frames, offset, columns.stop - columns.start)
            yield columns, elements, np.array(starts, np.int64)

    def _pieces(self, start: int, num_elements: int) -> Iterator[tuple[int, int, slice]]:
        """The frames that these elements lie in: index, first element within it, and where among these its elements are."""
        done = 0
        while done < num_elements:
            index, first = divmod(start + done, self._framing.frame_elements)
            stop = min(done + self._framing.frame_elements - first, num_elements)
            yield index, first, slice(done, stop)
            done = stop

    # What is known of updates as wholes.

    def norms(self) -> tuple[float, ...]:
        """L2 norm of each delta, of the sums that were taken as its frames came; exactly rounded."""
        return tuple(
            math.sqrt(math.fsum(frame.delta_sum_squares for frame in frames.values())) for frames in self.frames
        )

    def squared_distances(self, num_threads: int = 1) -> NDArray[np.float64]:
        """float64[k, k]: the squared L2 distance of each two updates, in one pass over all of them.

        Differences are squared and added, not taken from products, which would cancel. Block b adds to lane b % 16, and the
        lanes are added in order: so the number of threads changes no bit, and memory is 16 matrices and a block a thread.
        """
        num_rows = len(self.frames)
        block = min(self._framing.num_elements, max(_LEAST_BLOCK, _BLOCK_VALUES // max(1, num_rows)))
        starts = range(0, self._framing.num_elements, block)
        lanes = [starts[first::_NUM_LANES] for first in range(min(_NUM_LANES, len(starts)))]

        def add(lane: range) -> NDArray[np.float64]:
            return self._add_squares(lane, block)

        if num_threads == 1:
            sums = [add(lane) for lane in lanes]
        else:
            with ThreadPoolExecutor(min(num_threads, len(lanes)), thread_name_prefix="distances") as pool:
                sums = list(pool.map(add, lanes))
        total = np.zeros((num_rows, num_rows))
        for lane_sum in sums:
            total += lane_sum
        return total + total.T

    def _add_squares(self, starts: range, block: int) -> NDArray[np.float64]:
        """The part above the diagonal, over these blocks."""
        num_rows = len(self.frames)
        total = np.zeros((num_rows, num_rows))
        loaded, scratch = np.empty((num_rows, block)), np.empty((num_rows, block))
        for start in starts:
            rows = loaded[:, : min(block, self._framing.num_elements - start)]
            self.load(0, start, rows)
            for one in range(num_rows - 1):
                others = rows[one + 1 :]
                squares = np.subtract(others, rows[one], out=scratch[: len(others), : rows.shape[1]])
                np.multiply(squares, squares, out=squares)
                total[one, one + 1 :] += np.add.reduce(squares, axis=1)
        return total
