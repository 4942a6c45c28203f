"""The process that trains without a federation, tests and draws, as its parent has it: it asks, waits, and minds signals."""

from __future__ import annotations

import queue
from collections.abc import Callable

from coordinator.experiment import baselines
from coordinator.experiment.federation import ExperimentError
from coordinator.experiment.interrupts import Interrupts
from coordinator.experiment.scores import Assessed, RoundScore
from midge.tasks.process import Child


class Helper:
    """The process.

    Args:
        interrupts: that end a wait for it.
        advanced: called with the way and the round for each round that a training has done.
        threads: that it trains with.
    """

    def __init__(self, interrupts: Interrupts, advanced: Callable[[str, RoundScore], None], threads: int = 1) -> None:
        self._interrupts = interrupts
        self._advanced = advanced
        self._replies: queue.SimpleQueue[baselines.Reply | None] = queue.SimpleQueue()
        number = str(threads)
        self._child = Child(
            "coordinator.experiment.baselines",
            [],
            lambda reply: self._replies.put(baselines.decode_reply(reply)),
            lambda reason: self._replies.put(baselines.Failed(reason=reason)),
            {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number},
        )

    def survey(self, request: baselines.Survey) -> baselines.Surveyed:
        """Have the data looked at. Raises as `_ask`."""
        result = self._ask(request)
        assert isinstance(result, baselines.Surveyed)
        return result

    def train(self, request: baselines.Train) -> baselines.Learnt:
        """Have a model trained, and hear of each round. Raises as `_ask`."""
        result = self._ask(request)
        assert isinstance(result, baselines.Learnt)
        return result

    def assess(self, request: baselines.Assess) -> Assessed:
        """Have a stored model tested. Raises as `_ask`."""
        result = self._ask(request)
        assert isinstance(result, Assessed)
        return result

    def draw(self, request: baselines.Draw | baselines.DrawComparison) -> None:
        """Have a picture drawn. Raises as `_ask`."""
        self._ask(request)

    def stop(self) -> None:
        """End it."""
        self._child.stop()

    def _ask(self, request: baselines.Request) -> baselines.Result:
        """Have it done.

        Raises:
            ExperimentError: it failed, or the process died.
            Interrupted: a signal came.
        """
        self._child.send(baselines.encode(request))
        # A SimpleQueue may be put to in the midst of a get, so by the signal handler too.
        with self._interrupts.waking(lambda: self._replies.put(None)):
            while True:
                match reply := self._replies.get():
                    case baselines.Advanced():
                        self._advanced(reply.way, reply.round)
                    case baselines.Failed():
                        what = reply.reason if reply.is_of_task else f"the comparison failed: {reply.reason}"
                        raise ExperimentError(what, status=2 if reply.is_of_task else 1)
                    case None:
                        break
                    case _:
                        return reply
        raise AssertionError("woken without a signal")
