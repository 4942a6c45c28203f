"""Histories that nobody thought of: Hypothesis chooses what happens next, and shrinks what fails to its shortest form.

A few agents, their coordinator and a model broker. Each step is one of the rules below; after each, every invariant is asserted
of what there is. In the end faults stop, and a round must be committed within the bound (I6).

Scenarios (scenario.py) draw from their seed what happens and when, and run on; here each single message in flight may be
chosen, and a failure is printed as the calls that lead to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator.round import RoundConfig
from midge.transport.base import MessageReceived
from midge.transport.memory import Faults
from tests.fault_table import Recovery
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation
from tests.sim.process import Process
from tests.sim.scenario import BOUNDS, RECOVERY_S, heal
from tests.sim.wall import DAY_S, Wall

NUMBERS = st.integers(0, 50)
DELAYS = st.sampled_from([0.0, 0.05, 1.0, 20.0])
NOTICED = st.sampled_from([0.0, 5.0, 45.0])


class AnyHistory(RuleBasedStateMachine):
    """A federation to which anything may happen."""

    federation: Federation

    def __init__(self, recovery: Recovery) -> None:
        super().__init__()
        self._recovery = recovery
        self._wall = Wall()
        self._patch = pytest.MonkeyPatch()
        self._wall.install(self._patch)

    @initialize(seed=st.integers(0, 2**32), num_agents=st.integers(1, 3), delay_s=st.sampled_from([0.001, 0.3]))
    def begin(self, seed: int, num_agents: int, delay_s: float) -> None:
        self.federation = Federation(
            seed,
            [Behaviour(training_s=(0.5, 4.0))] * num_agents,
            rounds=200,
            round_config=RoundConfig(minimum=num_agents, quorum=num_agents, **BOUNDS),
            faults=Faults(delay_s=delay_s),
            is_strict=True,
        )
        self.federation.restart_after = lambda _: self.federation.rng.uniform(0.1, 5.0)
        self.federation.start()

    # Time, and the messages on their way.

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.5, 3.0, 15.0]))
    def advance(self, seconds: float) -> None:
        self._run(seconds)

    def in_flight(self) -> list[tuple]:
        """Messages that are to reach somebody, the next one first."""
        return sorted(item for item in self.federation.broker._queue if isinstance(item[4], MessageReceived))

    def has_messages(self) -> bool:
        return any(isinstance(item[4], MessageReceived) for item in self.federation.broker._queue)

    @precondition(has_messages)
    @rule(number=NUMBERS)
    def deliver(self, number: int) -> None:
        """One message overtakes all others."""
        self._send_again(self._intercept(number), 0.0)
        self._run(0.0)

    @precondition(has_messages)
    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        self._intercept(number)

    @precondition(has_messages)
    @rule(number=NUMBERS, after_s=DELAYS)
    def duplicate(self, number: int, after_s: float) -> None:
        items = self.in_flight()
        self._send_again(items[number % len(items)], after_s)

    @precondition(has_messages)
    @rule(number=NUMBERS, after_s=DELAYS)
    def hold_back(self, number: int, after_s: float) -> None:
        """All others overtake one message."""
        self._send_again(self._intercept(number), after_s)

    # Connections and processes.

    @rule(who=NUMBERS, for_s=DELAYS, noticed_after_s=NOTICED)
    def cut(self, who: int, for_s: float, noticed_after_s: float) -> None:
        transport = self._process(who).transport
        if transport is not None:
            transport.cut(for_s=for_s, noticed_after_s=noticed_after_s)

    @rule(who=NUMBERS, for_s=DELAYS)
    def go_dark(self, who: int, for_s: float) -> None:
        """A half-open connection."""
        transport = self._process(who).transport
        if transport is not None:
            transport.go_dark()
            self.federation.at(self.federation.now + for_s, transport.cut)

    @rule(who=NUMBERS, operation=st.integers(1, 60))
    def crash(self, who: int, operation: int) -> None:
        """Some operations from now, with the loss of some that were not synced."""
        self._process(who).light_fuse(operation)

    @rule(forgets=st.booleans(), for_s=DELAYS)
    def restart_the_broker(self, forgets: bool, for_s: float) -> None:
        broker = self.federation.broker
        if broker.is_up:
            broker.stop(forget=forgets)
            self.federation.at(broker.now + for_s, broker.start)

    # Clocks.

    @rule(days=st.sampled_from([-1, 1]))
    def set_the_wall_clock(self, days: int) -> None:
        self._wall.jump(days * DAY_S)

    @rule(who=NUMBERS, seconds=st.sampled_from([1.0, 60.0, DAY_S]))
    def leap(self, who: int, seconds: float) -> None:
        """A machine wakes up from its sleep."""
        process = self._process(who)
        if process.is_up:
            process.leap(seconds)

    # What must hold.

    @invariant()
    def every_invariant_holds(self) -> None:
        self.federation.auditor.check()

    def teardown(self) -> None:
        self._patch.undo()
        if not hasattr(self, "federation"):
            return
        federation = self.federation
        heal(federation)
        before, healed_at = federation.num_committed, federation.now
        commits = federation.run(
            lambda: federation.num_committed > before or federation.is_done, federation.now + RECOVERY_S
        )
        assert commits, f"I6: {before} versions when faults stopped, and none since\n{federation.story()}"
        federation.auditor.check()
        self._recovery.tried(1)
        self._recovery.took_virtual(federation.now - healed_at)

    def _process(self, who: int) -> Process:
        processes = self.federation.processes
        return processes[who % len(processes)]

    def _run(self, seconds: float) -> None:
        self.federation.run(lambda: False, self.federation.now + seconds)

    def _intercept(self, number: int) -> tuple:
        items, queue = self.in_flight(), self.federation.broker._queue
        item = items[number % len(items)]
        queue.remove(item)
        heapq.heapify(queue)
        return item

    def _send_again(self, item: tuple, after_s: float) -> None:
        broker = self.federation.broker
        broker._push(broker.now + after_s, *item[2:])


def explore(recovery: Recovery, num_histories: int, num_steps: int, **more: object) -> None:
    make: Callable[[], AnyHistory] = lambda: AnyHistory(recovery)  # noqa: E731
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=num_histories,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.mark.no_cover
@pytest.mark.fault(1, 3, 4, 5, 6, 7, 13, 16)
def test_a_few_histories_keep_every_invariant_and_end_well(recovery):
    explore(recovery, 25, 25, derandomize=True, phases=[Phase.generate])


@pytest.mark.long
@pytest.mark.fault(1, 3, 4, 5, 6, 7, 13, 16)
@pytest.mark.parametrize("part", range(4))
def test_many_histories_keep_every_invariant_and_end_well(part, recovery):
    """New ones each time; one that fails is printed as the calls that lead to it, and tried again first (.hypothesis)."""
    explore(recovery, 500, 60, print_blob=True)
