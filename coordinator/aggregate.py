"""Aggregation: from the updates of a round and the model they were trained on to the next model.

It goes block by block: the same elements of every counted update, read from the frames that hold them and widened to
float64, give a block of the weighted mean; the strategy makes it a block of the next model, which is written in its place.
No vector is ever whole in memory: each thread has one set of blocks, whatever the cohort and the model. (A block is several
frames of a small model: threads share one interpreter, and work together only while each is in a long call.)

**The same set of updates gives the same bits**, whatever the order of arrival, the number of threads or a restart between,
because every element is computed by one fixed sequence of float64 operations:

1. updates are sorted by agent id; the weights are normalised in float64 with an exactly rounded sum; a strategy that looks at
   updates as wholes (norms, distances) makes of them shares, and what is missing to 1 is the global model's;
2. `mean = ((w_0 x_0 + w_1 x_1) + w_2 x_2) + ...`. Rows are taken in groups that bound the memory; a group after the first
   starts with the sum so far, at weight 1, which changes no bit, so neither does the size of a group. A strategy that has
   something else in place of the mean (a median, say) is given all rows of a block, which is then shorter;
3. no block looks at another; the squares for the norm are added in lanes, and the blocks' sums in the order of blocks;
4. what the strategy remembers comes from the file of the version that the round starts from, never from memory.

`einsum` does step 2, in plain loops; in large rounds a compiled loop does (kernel.py), and gives the same bits. BLAS would take
a sixth off NumPy's time, but the order in which it adds depends on the processor that it finds: on one machine, its kernels
for three processors gave three results. (Whether a multiply and an add are fused is fixed when NumPy is compiled: another
architecture may differ in a last bit of float64.)

Two equalities are exact by design. One agent with server learning rate 1 gives its own elements: its weight is n / n = 1.
Agents that all return the global model leave it as it is: a mean of equal numbers is off by some ulps of float64, and
rounding to float32 takes that away; the sign of a zero, which a sum loses, is taken from the global model.

**Integer buffers** (BatchNorm's `num_batches_tracked`) have no mean. Each takes the largest value that any counted update
reports; a boolean counts as 0 or 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.guard import explosion, statistics_spans, within
from coordinator.kernel import NUM_LANES, Kernel, kernel_for
from coordinator.models import ModelFile, ModelStore, ModelWriter
from coordinator.server_state import ServerState, ServerStateError
from coordinator.spool import RoundSpool, StoredFrame
from coordinator.strategies.base import Cohort, Shares, Step, Strategy
from coordinator.update_rows import UpdateRows
from midge.failpoints import fail_point
from midge.wire.frames import ELEMENT_BYTES, Framing

_Squares = tuple[float, float]
"""Sums over a block: of all elements, and of those that are learned."""
_GROUP_ROWS = 20
_BLOCK_ELEMENTS = 48 * 1024
_LEAST_BLOCK = 1024
_RELEASE_BYTES = 8 * 1024 * 1024
_ROUNDING = 1e-9
"""So much may shares miss 1 by."""


class AggregationError(Exception):
    """These updates do not make a model: too few are counted, one is incomplete, or the result is not finite or far off."""


@dataclass(frozen=True, slots=True)
class CountedUpdate:
    """An update that passed the gates, and whose frames are all in the spool.

    Attributes:
        agent_id: whose it is.
        content_tag: names it in the spool.
        num_examples: how many examples it was trained on.
        counters: its integer buffers' elements.
    """

    agent_id: str
    content_tag: bytes
    num_examples: int
    counters: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The next model, in the store.

    Attributes:
        digest: the model's.
        delta_norm: Euclidean norm of `next - global` over the flat vector.
        num_examples: that it was trained on, the sum over the updates.
        server_state: digest of what the strategy remembers, in the store too; None where it remembers nothing.
        held_back: agents whose updates the strategy left out, or lets count for less than their weight.
    """

    digest: str
    delta_norm: float
    num_examples: int
    server_state: str | None = None
    held_back: tuple[str, ...] = ()


def aggregate(
    base: ModelFile,
    spool: RoundSpool,
    updates: Sequence[CountedUpdate],
    strategy: Strategy,
    framing: Framing,
    models: ModelStore,
    num_threads: int = 1,
    *,
    round_num: int = 1,
    server_state: str | None = None,
    max_step_ratio: float = 0.0,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Aggregated:
    """Make the next model of `updates`, in any order, that were trained on `base`, and store it.

    Args:
        base: the model that the updates were trained on.
        spool: where their frames are.
        updates: of different agents.
        strategy: makes of a mean the next model.
        framing: of the run.
        models: where `base` is, and where the next model goes.
        num_threads: that work at once.
        round_num: of the next model, from 1.
        server_state: digest of what the strategy remembers since `base` was made; None before the first round.
        max_step_ratio: largest norm of the step over that of `base`; 0 for no bound. guard.py says what counts.
        is_wanted: asked before each block, by any thread: whether to go on.

    Raises:
        AggregationError: they do not make a model; nothing is stored.
        OSError: the disk is full or fails; nothing is stored.
    """
    if framing.num_elements != base.layout.num_elements:
        raise AggregationError(f"{framing}: the model has {base.layout.num_elements} elements")
    ordered = sorted(updates, key=lambda update: update.agent_id)
    _check_cohort(ordered, strategy)
    weights = _weights(ordered, strategy)
    counters = _largest_counters(ordered, base)
    rows = UpdateRows(spool, [_complete(spool, update, framing) for update in ordered], framing)
    shares = _shares(rows, weights, strategy, num_threads)
    counted = [number for number, share in enumerate(shares.updates) if share > 0]
    frames = [rows.frames[number] for number in counted]
    num_examples = sum(update.num_examples for update in ordered)
    step = Step(round_num, len(ordered), num_examples)
    try:
        state = ServerState(strategy, framing.num_elements, models, server_state, round_num)
    except ServerStateError as error:
        raise AggregationError(str(error)) from None
    with state, models.writer(base.layout, counters) as writer:
        kernel = kernel_for(len(frames) * framing.num_elements)
        kept = [shares.updates[number] for number in counted]
        fold = Fold(
            base,
            spool,
            frames,
            kept,
            strategy,
            framing,
            writer,
            state,
            step,
            kernel,
            base_share=shares.base,
            is_wanted=is_wanted,
        )
        sums = fold.run(num_threads)
        learned = sum(learned for _, learned in sums)
        reason = explosion(learned, base.elements, statistics_spans(base.layout), max_step_ratio)
        if reason:
            raise AggregationError(
                f"{reason}, after {strategy!r} on {len(ordered)} updates: the model stays as it is; lower the server's or the "
                "agents' learning rate, or raise max_step_ratio"
            )
        after = state.commit()  # first: a model whose state is lost could not go on
        held_back = tuple(
            update.agent_id
            for update, weight, share in zip(ordered, weights, shares.updates, strict=True)
            if share < weight
        )
        return Aggregated(writer.commit(), math.sqrt(sum(whole for whole, _ in sums)), num_examples, after, held_back)


class Fold:
    """All that the threads share while they make one model: nothing here changes.

    Args:
        base: the model that the updates were trained on.
        spool: where their frames are.
        frames: of each update, in the order of summation, its frames by index; all are there.
        weights: of each update, above 0; with `base_share` they add up to 1.
        strategy: makes of a mean the next model.
        framing: of the run.
        writer: of the next model.
        state: of the strategy.
        step: which one is made.
        kernel: does the arithmetic but for the strategy's; None: NumPy does.
        base_share: how much the global model weighs in the mean.
        is_wanted: whether to go on.
    """

    def __init__(
        self,
        base: ModelFile,
        spool: RoundSpool,
        frames: Sequence[Mapping[int, StoredFrame]],
        weights: Sequence[float],
        strategy: Strategy,
        framing: Framing,
        writer: ModelWriter,
        state: ServerState,
        step: Step,
        kernel: Kernel | None = None,
        *,
        base_share: float = 0.0,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_wanted = is_wanted
        self._base = base
        self._rows = UpdateRows(spool, frames, framing)
        self._strategy = strategy
        self._framing = framing
        self._base_share = base_share
        self._writer = writer
        self._kernel = kernel
        self._weights = np.array(weights, np.float64)
        self._state = state
        self._step = step
        self._statistics = statistics_spans(base.layout)
        self._block_elements = min(framing.num_elements, _BLOCK_ELEMENTS)
        if strategy.replaces_mean:  # all rows at once: no more memory than groups of rows need
            shortened = _BLOCK_ELEMENTS * (_GROUP_ROWS + 1) // len(frames)
            self._block_elements = min(self._block_elements, max(_LEAST_BLOCK, shortened))
        self._groups = [
            (first, np.array([1.0, *weights[first : first + _GROUP_ROWS]]))
            for first in range(0, len(frames), _GROUP_ROWS)
        ]

    def run(self, num_threads: int) -> list[_Squares]:
        """Write every block of the next model and of the state; each block's sum of `(next - global)^2`, in order."""
        starts = range(0, self._framing.num_elements, self._block_elements)
        num_threads = max(1, min(num_threads, len(starts)))
        if num_threads == 1:
            return self._fold_blocks(starts)
        sums = [(0.0, 0.0)] * len(starts)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="aggregate") as pool:
            shares = [starts[first::num_threads] for first in range(num_threads)]
            for first, share_sums in enumerate(pool.map(self._fold_blocks, shares)):
                sums[first::num_threads] = share_sums
        return sums

    def _fold_blocks(self, starts: Iterable[int]) -> list[_Squares]:
        num_rows = 0 if self._kernel else min(len(self._rows), _GROUP_ROWS) + 1
        if self._strategy.replaces_mean:
            num_rows = len(self._rows)
        rows = np.empty((num_rows, self._block_elements), np.float64)
        mean = np.empty(self._block_elements, np.float64)
        state = np.empty((self._state.num_vectors, self._block_elements), np.float32)
        sums = []
        resident_bytes = 0
        with np.errstate(all="ignore"):  # what is not finite is found by its sum of squares
            for start in starts:
                if not self._is_wanted():
                    raise AggregationError("nobody waits for it any more")
                sums.append(self._fold_block(start, rows, mean, state))
                fail_point("coordinator.aggregation.block")
                resident_bytes += self._block_elements * ELEMENT_BYTES
                if resident_bytes >= _RELEASE_BYTES:
                    self._base.release()
                    self._state.release()
                    resident_bytes = 0
        return sums

    def _fold_block(
        self, start: int, rows: NDArray[np.float64], mean: NDArray[np.float64], state: NDArray[np.float32]
    ) -> _Squares:
        stop = min(start + self._block_elements, self._framing.num_elements)
        block = mean[: stop - start]
        global_block = self._base.elements[start:stop]
        self._centre(start, rows[:, : stop - start], global_block, block)
        statistics = within(self._statistics, start, stop)
        next_block = self._apply(start, global_block, block, state[:, : stop - start], statistics)
        sum_squares = self._settle(next_block, global_block, mean)
        if not math.isfinite(sum_squares) or not np.isfinite(state[:, : stop - start]).all():
            what = "server state" if math.isfinite(sum_squares) else "next model"
            raise AggregationError(
                f"elements {start} to {stop} of the {what} are not all finite, after {self._strategy!r} "
                f"on {self._step.num_updates} updates: nothing is stored; lower the server's or the agents' learning rate"
            )
        self._writer.write(start, next_block)
        self._state.save(start, state[:, : stop - start])
        if not statistics:
            return sum_squares, sum_squares
        np.subtract(next_block, global_block, out=block, dtype=np.float64)
        for part in statistics:
            block[part] = 0
        return sum_squares, float(np.add.reduce(np.square(block, out=block)))

    def _apply(
        self,
        start: int,
        global_block: NDArray[np.float32],
        block: NDArray[np.float64],
        state: NDArray[np.float32],
        statistics: Sequence[slice],
    ) -> NDArray[np.float32]:
        """The strategy's step from `global_block` towards the mean in `block`; `state` becomes the next one's."""
        averaged = [block[part].astype(np.float32) for part in statistics]
        if self._strategy.averages_statistics:
            for part in statistics:
                block[part] = global_block[part]  # no step: it would make the state of something that it does not move
        self._state.load(start, state)
        next_block = self._strategy.apply(global_block, block, list(state), self._step)
        if next_block.dtype != np.float32 or next_block.shape != global_block.shape:
            raise AggregationError(
                f"{self._strategy!r} made {next_block.dtype}{list(next_block.shape)} of a block: "
                f"expected float32[{len(global_block)}]"
            )
        if not next_block.flags.owndata:
            next_block = next_block.copy()
        if self._strategy.averages_statistics:
            for part, means in zip(statistics, averaged, strict=True):
                next_block[part] = means
        return next_block

    def _settle(
        self, next_block: NDArray[np.float32], global_block: NDArray[np.float32], scratch: NDArray[np.float64]
    ) -> float:
        """Give zeros back their signs, and return the sum of `(next - global)^2`."""
        keep_zeros = len(self._rows) > 1
        if self._kernel is not None:
            lanes = np.zeros(NUM_LANES)
            self._kernel.settle(next_block, global_block, keep_zeros, lanes)
            return float(np.add.reduce(lanes))
        if keep_zeros:
            _restore_zero_signs(next_block, global_block)
        return float(np.add.reduce(_sums_of_squares(next_block, global_block, scratch)))

    def _centre(
        self, start: int, rows: NDArray[np.float64], global_block: NDArray[np.float32], out: NDArray[np.float64]
    ) -> None:
        """The weighted mean of the updates' elements from `start` on, or what the strategy has in its place, into `out`."""
        if self._strategy.replaces_mean:
            self._rows.load(0, start, rows)
            out[:] = self._strategy.centre(rows)
            return
        self._mean(start, rows, out)
        if self._base_share:
            np.add(out, np.multiply(global_block, self._base_share, dtype=np.float64), out=out)

    def _mean(self, start: int, rows: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        if len(self._rows) == 1 and self._weights[0] == 1:
            self._rows.load(0, start, out[np.newaxis])  # a sum would lose the sign of a zero
            return
        if self._kernel is not None:  # all updates at once, from where they lie in the spool's map
            for columns, elements, starts in self._rows.located(start, len(out)):
                self._kernel.add_rows(elements, starts, self._weights, out[columns])
            return
        for group_start, weights in self._groups:
            num_rows = len(weights) - 1
            self._rows.load(group_start, start, rows[1 : num_rows + 1])
            skip = 1 if group_start == 0 else 0
            rows[0] = out
            _add_rows(weights[skip:], rows[skip : num_rows + 1], out)


def _add_rows(weights: NDArray[np.float64], rows: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """`((0 + w_0 row_0) + w_1 row_1) + ...` into `out`."""
    if len(out) > 1:
        np.einsum("k,kc->c", weights, rows, out=out)
    else:  # einsum would run along the rows, and add in another order
        out[0] = 0.0 + np.add.accumulate(weights * rows[:, 0])[-1]


def _restore_zero_signs(next_block: NDArray[np.float32], global_block: NDArray[np.float32]) -> None:
    """Give zeros of `next_block` the sign of the global model's, where that is zero too."""
    zeros = next_block == 0
    if zeros.any():
        np.copyto(next_block, global_block, where=zeros & (global_block == 0))


def _sums_of_squares(
    next_block: NDArray[np.float32], global_block: NDArray[np.float32], scratch: NDArray[np.float64]
) -> NDArray[np.float64]:
    """float64[NUM_LANES]: the sums of `(next - global)^2`, that of element i in lane `i % NUM_LANES`."""
    squares = scratch[: len(next_block)]
    np.copyto(squares, next_block)
    np.subtract(squares, global_block, out=squares)
    np.multiply(squares, squares, out=squares)
    whole = len(squares) - len(squares) % NUM_LANES
    lanes: NDArray[np.float64] = np.add.reduce(squares[:whole].reshape(-1, NUM_LANES), axis=0)
    lanes[: len(squares) - whole] += squares[whole:]
    return lanes


def _check_cohort(ordered: Sequence[CountedUpdate], strategy: Strategy) -> None:
    if not ordered:
        raise AggregationError("no update is counted: expected at least one")
    if len(ordered) < strategy.min_updates:
        raise AggregationError(
            f"{len(ordered)} updates are counted, and {strategy!r} needs at least {strategy.min_updates}: raise quorum"
        )
    for one, other in itertools.pairwise(ordered):
        if one.agent_id == other.agent_id:
            raise AggregationError(f"two updates of {one.agent_id}: an agent counts at most once")


def _weights(ordered: Sequence[CountedUpdate], strategy: Strategy) -> list[float]:
    weights = [strategy.weight(update.num_examples) for update in ordered]
    total = math.fsum(weights)
    if min(weights) < 0 or not 0 < total < math.inf:
        raise AggregationError(
            f"{len(weights)} updates weigh {total} in all, the least {min(weights)}, by {strategy!r}: "
            "expected none below 0, and a finite sum above 0"
        )
    return [weight / total for weight in weights]


def _shares(rows: UpdateRows, weights: Sequence[float], strategy: Strategy, num_threads: int) -> Shares:
    """What the strategy makes of the weights, once it has seen the updates as wholes."""
    distances = rows.squared_distances(num_threads) if strategy.needs_distances else None
    shares = strategy.shares(Cohort(tuple(weights), rows.norms(), distances))
    least, total = min(shares.updates, default=0.0), math.fsum((*shares.updates, shares.base))
    if len(shares.updates) != len(rows) or min(least, shares.base) < 0 or not abs(total - 1) < _ROUNDING:
        raise AggregationError(
            f"{strategy!r} gives {len(rows)} updates {len(shares.updates)} shares, which with the global model's add up to "
            f"{total}, the least {min(least, shares.base)}: expected one for each, none below 0, and 1 in all"
        )
    if not any(shares.updates):
        raise AggregationError(f"{strategy!r} leaves out all of {len(rows)} updates: expected it to keep one")
    return shares


def _largest_counters(ordered: Sequence[CountedUpdate], base: ModelFile) -> tuple[int, ...]:
    for update in ordered:
        if len(update.counters) != base.layout.num_counters:
            raise AggregationError(
                f"update of {update.agent_id} has {len(update.counters)} counters: "
                f"the layout has {base.layout.num_counters}"
            )
    return tuple(max(values) for values in zip(*(update.counters for update in ordered), strict=True))


def _complete(spool: RoundSpool, update: CountedUpdate, framing: Framing) -> Mapping[int, StoredFrame]:
    frames = spool.stored(update.agent_id, update.content_tag)
    for index in range(framing.num_frames):
        start, stop = framing.span(index)
        seen = frames[index].num_elements if index in frames else 0
        if seen != stop - start:
            raise AggregationError(
                f"update {update.content_tag.hex()} of {update.agent_id}: frame {index} has {seen} elements in {spool!r}, "
                f"expected {stop - start}"
            )
    return frames
