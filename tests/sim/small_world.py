"""A small world, to be walked completely: two agents, two rounds, one crash, one message that comes twice.

Nothing is drawn here and no message takes any time, so a world is named by what befalls it (`Fate`), and the same fate gives
the same history. What there is to choose from:

* which process is killed, and at which of its operations: before and after each sync, each transaction and each write to a
  journal, before each thing that it says or asks for, and after each step of its machine;
* what a power loss takes with it: of the coordinator's spool, a log, all that was not synced but the first n operations, for
  each n; of an agent's journal, that it was erased, which is not synced;
* which message comes twice, and when: right after itself, or after any later thing that happens to its receiver. Between two
  such things the receiver does not change, so there are no other moments to try.

All else has one order: messages come as they were sent. `walk` goes through the whole product. Each of its loops ends where a
world shows that it has no such operation, message or moment; so what only a crash or a copy brings about is crashed and
doubled too.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from coordinator import run_events as ev
from tests.sim.node import Node
from tests.sim.world import World

ROUNDS = 2
AGENTS = ("a", "b")
COORDINATOR = "coordinator"
BOUND_S = 100.0
_FRAME_ELEMENTS = 5  # two frames
_ALL = 1_000_000


class Killed(BaseException):
    """A process was killed. Not an `Exception`: nothing in the code under test may catch it."""


@dataclass(frozen=True)
class Fate:
    """What befalls a world.

    Attributes:
        victim: who is killed: "coordinator" or an agent.
        operation: at which of its operations, from 1; 0: it lives.
        down_s: it is back after so many seconds.
        num_kept: of its operations on disk that were not synced, those that a power loss leaves.
        doubled: which message comes twice, counted from 1 as they are sent; 0: none.
        later: after how many further things that happen to its receiver the copy comes.
    """

    victim: str = COORDINATOR
    operation: int = 0
    down_s: float = 0.5
    num_kept: int = _ALL
    doubled: int = 0
    later: int = 0


class SmallWorld(World):
    """A world with its fate.

    Attributes:
        has_crashed: whether the victim was killed.
        num_unsynced: its operations on disk that a power loss could have taken then.
        was_sent: whether the message that comes twice was sent.
        was_doubled: whether its copy came.
        recovery_s: from the crash to the next version; 0 where there was none after it.
    """

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.has_crashed = self.was_sent = self.was_doubled = False
        self.num_unsynced = 0
        self.recovery_s = 0.0
        self.counted: Counter[tuple[int, str]] = Counter()
        self._crashed_at = 0.0
        self._num_operations = 0
        self._copy: tuple[Callable[..., None], tuple[Any, ...]] | None = None
        self._comes_after = 0
        super().__init__(1, AGENTS, rounds=ROUNDS, frame_elements=_FRAME_ELEMENTS, is_busy=False)
        self.network.send = self._send  # type: ignore[method-assign]

    def live(self) -> None:
        """From the beginning to the end of the run, which comes whatever its fate is (I6)."""
        for connect in (self.connect, *(node.connect for node in self.nodes.values())):
            self.network.call_at(0.0, connect)
        try:
            while not self._plays_to_the_end():
                self._restart()
        except AssertionError as error:
            raise AssertionError(f"SmallWorld({self.fate}).live(): {error}") from error

    def _plays_to_the_end(self) -> bool:
        try:
            self.play(BOUND_S)
        except Killed:
            return False
        return True

    # The crash.

    def tick(self, process: World | Node) -> None:
        name = process.agent_id if isinstance(process, Node) else COORDINATOR
        if self.has_crashed or name != self.fate.victim:
            return
        self._num_operations += 1
        if self._num_operations == self.fate.operation:
            self.has_crashed = True
            raise Killed

    def _start_run(self) -> None:
        try:
            super()._start_run()
        except Killed:
            super()._start_run()

    def _restart(self) -> None:
        fate = self.fate
        self._crashed_at = self.network.now
        self.tell(f"{fate.victim} is killed")
        if fate.victim == COORDINATOR:
            self.num_unsynced = len(self.ledger.unsynced)
            self.ledger.lose_power(fate.num_kept)
            self.crash(fate.down_s)
            return
        node = self.nodes[fate.victim]
        if node.erased is not None:
            self.num_unsynced = 1
            if fate.num_kept == 0:
                node.journal = node.erased
        node.crash(fate.down_s)

    def _save(self, saves: Sequence[ev.Save]) -> None:
        super()._save(saves)
        for save in saves:
            if isinstance(save, ev.SaveUpdate):
                self.counted[save.round_num, save.update.agent_id] += 1
            elif isinstance(save, ev.SaveVersion) and self.has_crashed and not self.recovery_s:
                self.recovery_s = self.network.now - self._crashed_at

    # The copy.

    def _send(self, last_at: float, act: Callable[..., None], *args: Any) -> float:
        network = self.network
        network.num_messages += 1
        at = max(network.now, last_at)
        network.call_at(at, act, *args)
        if network.num_messages == self.fate.doubled:
            self.was_sent = True
            network.call_at(at, functools.partial(self._original_came, act, args))
        return at

    def _original_came(self, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._copy, self._comes_after = (act, args), self.fate.later
        self._come_again_if_due()

    def acted(self, act: Callable[..., None]) -> None:
        if self._copy is not None and getattr(act, "__self__", None) is getattr(self._copy[0], "__self__", self):
            self._comes_after -= 1
            self._come_again_if_due()

    def _come_again_if_due(self) -> None:
        if self._copy is None or self._comes_after > 0:
            return
        (act, args), self._copy = self._copy, None
        self.was_doubled = True
        receiver = getattr(act, "__self__", None)
        if isinstance(receiver, Node):  # to its present connection: the broker keeps its session
            args = (receiver.connection, *args[1:])
        act(*args)


def walk(victim: str, down_s: float, *, doubles: bool = True, first: int = 1, step: int = 1) -> Iterator[SmallWorld]:
    """Every world in which this one is killed and is away for so long; each has lived, and none comes twice.

    Those in which nobody is killed, or nothing comes twice, are among them; without `doubles`, the latter alone. A walk in
    `step` parts has the `first` operation and every step-th after it in one of them.
    """
    for operation in count(first, step):
        has_crashed = False
        for num_kept, further in chain([(_ALL, 0)], ((number, number + 1) for number in count())):
            most_unsynced = 0
            fate = Fate(victim, operation, down_s, num_kept)
            for world in doubled(fate) if doubles else (lived(fate),):
                has_crashed |= world.has_crashed
                most_unsynced = max(most_unsynced, world.num_unsynced)
                if num_kept == _ALL or num_kept < world.num_unsynced:
                    yield world
            if most_unsynced <= further:
                break
        if not has_crashed:
            return


def doubled(fate: Fate) -> Iterator[SmallWorld]:
    """The world of this fate, and all in which one of its messages comes twice as well."""
    yield lived(fate)
    for number in count(1):
        for later in count():
            world = lived(replace(fate, doubled=number, later=later))
            if not world.was_doubled:
                break
            yield world
        if not world.was_sent:
            return


def lived(fate: Fate) -> SmallWorld:
    """The world of this fate, at its end."""
    world = SmallWorld(fate)
    world.live()
    return world
