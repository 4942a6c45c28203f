"""A whole federation in memory: one coordinator, its agents and their broker, in virtual time.

The drivers and the machines are the real ones; sockets, disks, clocks and torch are not there. One seed gives one history:
nothing sleeps, no thread runs, and `history` tells what happened last. `run` goes from one event to the next: a delivery
of the broker, a deadline of a process, or something that a scenario scheduled with `at`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from coordinator.round import RoundConfig
from coordinator.run_config import RunConfig
from midge.transport.memory import Faults, MemoryBroker
from midge.wire.frames import Framing
from midge.wire.messages import TrainingConfig
from midge.wire.topics import Topics
from tests.sim.agent_process import AgentProcess, Behaviour
from tests.sim.auditor import Auditor
from tests.sim.coordinator_process import CoordinatorProcess
from tests.sim.disk import Disk
from tests.sim.learning import chain, layout_of
from tests.sim.process import Crash, Process
from tests.sim.state import MemoryModels, MemorySpool, MemoryStore

RUN_ID = "sim-1"
TASK = "simulated"
FRAME_ELEMENTS = 4
CLEAN = Faults()


class Federation:
    """The federation. Nothing runs before `start`.

    Args:
        seed: of everything.
        behaviours: of agents `agent-0`, `agent-1` and so on.
        rounds: of the run.
        round_config: bounds of a round.
        num_frames: of a model; the last frame is shorter than the others.
        faults: of the broker.
        delays_wills: of the broker.
        has_faults: whether anything will ever go wrong; without, every delay is as short as can be.
        is_audited: whether every invariant is asserted after every step; without, it only runs, fast.
        is_strict: whether every version must be that of the fault-free run, since all honest agents count in each round.
    """

    def __init__(
        self,
        seed: int,
        behaviours: Sequence[Behaviour],
        *,
        rounds: int = 3,
        round_config: RoundConfig | None = None,
        num_frames: int = 3,
        faults: Faults = CLEAN,
        delays_wills: bool = True,
        has_faults: bool = True,
        is_audited: bool = True,
        is_strict: bool = False,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/processes")
        self.has_faults = has_faults
        self.is_audited = is_audited
        self.num_refused = 0
        self.num_crashes = 0
        self.history: deque[tuple[float, str, object]] = deque(maxlen=80)
        self.topics = Topics("sim")
        self.num_frames = num_frames
        self.num_agents = len(behaviours)
        self.layout = layout_of(FRAME_ELEMENTS * num_frames - 1)
        self.framing = Framing(self.layout.num_elements, FRAME_ELEMENTS)
        honest = [f"agent-{index}" for index, behaviour in enumerate(behaviours) if not behaviour.lie]
        self.config = RunConfig(
            run_id=RUN_ID,
            task=TASK,
            rounds=rounds,
            seed=seed,
            round=round_config or RoundConfig(minimum=len(honest), quorum=len(honest)),
            training=TrainingConfig(),
            start_deadline_s=1e6,
            max_attempts=1_000_000,
        )
        self.expected_chain = chain(seed, self.layout.num_elements, honest, rounds) if is_strict else []
        self.broker = MemoryBroker(random.Random(f"{seed}/broker"), faults, delays_wills=delays_wills)
        self.turn_s = 0.0
        self.disk = Disk()
        self.coordinator = CoordinatorProcess(self)
        self._make_state()
        self.agents = [AgentProcess(self, f"agent-{index}", behaviour) for index, behaviour in enumerate(behaviours)]
        self.processes: list[Process] = [self.coordinator, *self.agents]
        self.restart_after: Callable[[Process], float | None] = lambda _: 0.0

    # What a scenario sees.

    @property
    def is_done(self) -> bool:
        """Whether every round is committed."""
        return bool(self.store.row["state"] == "done")

    @property
    def num_committed(self) -> int:
        """Versions that were saved, the initial one aside."""
        return max(0, len(self.store.version_rows) - 1)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self.broker.now

    def at(self, time_s: float, action: Callable[[], None], what: str = "") -> None:
        """Have `action` called at this time."""

        def call() -> None:
            if what:
                self.tell("scenario", what)
            action()

        self.broker.call_at(time_s, call)

    def tell(self, who: str, what: object) -> None:
        """Note something for whoever reads the history of a failure."""
        self.history.append((self.broker.now, who, what))

    def story(self) -> str:
        """The end of the history, a line an event."""
        return "\n".join(f"{at:12.4f}  {who:12} {what}" for at, who, what in self.history)

    def computation_s(self) -> float:
        """How long the next computation of the coordinator takes."""
        return self.rng.uniform(0.0, 0.3) if self.has_faults else 0.0

    # Running.

    def start(self) -> None:
        """Start every process."""
        for process in self.processes:
            self._guard(process.boot)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Go on until `until` is true, which is asked after each event, or the time is past `limit_s`; whether it is."""
        while not until():
            try:
                if not self._step(limit_s):
                    return False
            except Crash as crash:
                self._crashed(crash.process)
        return True

    def crash(self, process: Process) -> None:
        """Kill a process now, if it is up."""
        if process.is_up:
            self._crashed(process)

    def restart(self, process: Process) -> None:
        """Start a process, if it is down and there is something left to do."""
        if not process.is_up and not (process is self.coordinator and self.is_done):
            self._guard(process.boot)

    def lose_state(self, run_id: str) -> None:
        """The coordinator's state directory is gone; what starts next is another run."""
        self.config = dataclasses.replace(self.config, run_id=run_id)
        self._make_state()

    def _make_state(self) -> None:
        self.auditor = Auditor(self)
        saved = self.auditor.saved if self.is_audited else None
        self.store = MemoryStore(self.coordinator.tick, self.disk, saved, self.auditor.started)
        self.spool = MemorySpool(self.coordinator.tick, self.disk)
        self.models = MemoryModels(self.disk, self.auditor.model_saved)

    def _step(self, limit_s: float) -> bool:
        broker = self.broker
        at = broker.next_at()
        due = self.coordinator.wake_at
        sleeper: Process = self.coordinator
        for agent in self.agents:
            if agent.wake_at < due:
                sleeper, due = agent, agent.wake_at
        if min(at, due) > limit_s or min(at, due) == math.inf:
            broker.wait_until(limit_s)
            return False
        if due < at:
            broker.wait_until(due)
            sleeper.wake()
        else:
            broker.deliver_next()
        return True

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Crash as crash:
            self._crashed(crash.process)

    def _crashed(self, process: Process) -> None:
        self.num_crashes += 1
        self.tell(process.name, "crashed")
        rng = self.rng
        process.die(noticed_after_s=rng.choice((0.0, 0.0, 5.0, 45.0)))
        if process is self.coordinator and rng.random() < 0.5:
            self.spool.lose_power(rng.randrange(20))
        delay_s = self.restart_after(process)
        if delay_s is not None:
            self.at(self.now + delay_s, lambda: self.restart(process), f"{process.name} starts again")


@contextlib.contextmanager
def told(federation: Federation, command: str) -> Iterator[None]:
    """Add to any failure what happened, and how to see it again."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error or place.line} ({place.filename}:{place.lineno})"
        raise AssertionError(f"{what}\nat {federation.now:.4f} s; replay: {command}\n{federation.story()}") from error
