"""What the tests of the pure machines share: a small run, updates of it that are made by hand, and conversations with a run.

The model has ten elements in frames of four, so three frames: [0, 4), [4, 8), [8, 10).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from coordinator import run_events as ev
from coordinator.attempt import Address
from coordinator.cohort import Change, Fleet
from coordinator.round import RoundConfig
from coordinator.run import FINAL, Resumed, Run
from coordinator.run_config import RunConfig
from coordinator.uplink import FrameFacts
from edge_agent.agent_events import FinishedUpdate
from midge import PROTOCOL
from midge.wire.frames import Framing, update_digest
from midge.wire.layout import Layout, TensorSpec
from midge.wire.messages import (
    Acceptance,
    Cancel,
    Credit,
    Evaluation,
    Invitation,
    Presence,
    Receipt,
    Refusal,
    UpdateHeader,
)

LAYOUT = Layout((TensorSpec("w", (10,), "float32"),))
FRAMING = Framing(10, 4)
RUN_ID = "r1"
TASK = "digits"
EPOCH = 3

M = TypeVar("M")


def digest(text: str) -> str:
    """64 hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def version_digest(round_num: int) -> str:
    """The digest of the version that round `round_num` made, in these tests."""
    return digest(f"version {round_num}")


def facts(agent_id: str, index: int, salt: str = "", sum_squares: float = 1.0) -> FrameFacts:
    """A frame of this agent's update."""
    return FrameFacts(hashlib.sha256(f"{agent_id}/{index}/{salt}".encode()).digest(), sum_squares)


def digest_of_update(agent_id: str, salt: str = "", num_frames: int = FRAMING.num_frames) -> str:
    """The digest of the update whose frames are `facts`."""
    return update_digest(facts(agent_id, index, salt).body_digest for index in range(num_frames))


def header(agent_id: str, address: Address, *, salt: str = "", **changes: Any) -> UpdateHeader:
    """A header that passes every gate in the first rounds, but for `changes`."""
    fields: dict[str, Any] = {
        "model_digest": version_digest(address.round_num - 1),
        "layout_digest": LAYOUT.digest,
        "update_digest": digest_of_update(agent_id, salt),
        "num_frames": FRAMING.num_frames,
        "num_examples": 10,
        "counters": (),
    }
    return UpdateHeader(**address._asdict(), **(fields | changes))


def finished(run_id: str, round_num: int, model_digest: str, num_frames: int = 3, salt: str = "") -> FinishedUpdate:
    """An update as it lies on an agent's disk."""
    return FinishedUpdate(
        run_id=run_id,
        round_num=round_num,
        model_digest=model_digest,
        layout_digest=LAYOUT.digest,
        update_digest=digest(f"update {run_id}/{round_num}/{salt}"),
        num_frames=num_frames,
        num_examples=10,
        counters=(),
    )


def presence(incarnation: str = "1", *, online: bool = True, **changes: Any) -> Presence:
    """An agent's birth message, or its will."""
    return Presence(online=online, incarnation=incarnation, **({"protocol": PROTOCOL, "task": TASK} | changes))


def config(rounds: int = 2, **changes: Any) -> RunConfig:
    """A run of agents that must all report, but for `changes`; those of the round's bounds go to it."""
    bounds = {key: changes.pop(key) for key in list(changes) if key in RoundConfig.__dataclass_fields__}
    of_round = RoundConfig(**({"minimum": 2, "quorum": 2} | bounds))
    return RunConfig(run_id=RUN_ID, task=TASK, rounds=rounds, seed=7, round=of_round, **changes)


def of_kind(commands: Iterable[Any], kind: type[M]) -> list[M]:
    """Those of this type."""
    return [command for command in commands if isinstance(command, kind)]


def only(commands: Iterable[Any], kind: type[M]) -> M:
    """The one of this type."""
    found = of_kind(commands, kind)
    assert len(found) == 1, f"expected one {kind.__name__}, found {found}"
    return found[0]


def sent(commands: Iterable[Any], kind: type[M]) -> dict[str, M]:
    """The messages of this type that are sent, by agent; two to one agent are an error."""
    sends = [send for send in of_kind(commands, ev.Send) if isinstance(send.message, kind)]
    messages = {send.agent_id: send.message for send in sends}
    assert len(messages) == len(sends), f"an agent is told the same twice: {sends}"
    return messages


class Talk:
    """A conversation with a run, in turns of one event: after each the invariants hold, and no deadline is left in the past.

    Args:
        settings: the run's.
        resumed: what is on disk of it.
        connected: whether the broker can be reached already.
        fleet: that is there already.
        epoch: of the coordinator.
        now: when it begins.
    """

    def __init__(
        self,
        settings: RunConfig | None = None,
        *,
        resumed: Resumed | None = None,
        connected: bool = True,
        fleet: Fleet | None = None,
        epoch: int = EPOCH,
        now: float = 0.0,
    ) -> None:
        self.now = now
        self.fleet = Fleet() if fleet is None else fleet
        self.run = Run(
            settings or config(), epoch=epoch, fleet=self.fleet, now=now, resumed=resumed, connected=connected
        )
        self.first = self._checked(self.run.start() + self.run.end_turn())

    # Time.

    def hear(self, event: ev.Event, after_s: float = 0.0) -> list[ev.Command]:
        """Hand over an event, `after_s` seconds later."""
        self.now += after_s
        return self._checked(self.run.step(event, self.now) + self.run.end_turn())

    def wait(self, seconds: float) -> list[ev.Command]:
        """Let time pass, with a timer at each deadline; returns all commands."""
        until = self.now + seconds
        commands: list[ev.Command] = []
        while self.run.deadline() <= until:
            self.now = self.run.deadline()
            commands += self.hear(ev.TimePassed())
        self.now = until
        return commands + self.hear(ev.TimePassed())

    # The fleet.

    def come(self, *agent_ids: str, incarnation: str = "1") -> list[ev.Command]:
        """Agents say that they are there."""
        commands: list[ev.Command] = []
        for agent_id in agent_ids:
            change = self.fleet.hear(agent_id, presence(incarnation), retained=False)
            if change is not None:
                commands += self.hear(ev.FleetMoved(agent_id, change))
        return commands

    def leave(self, *agent_ids: str) -> list[ev.Command]:
        """The wills of agents come."""
        commands: list[ev.Command] = []
        for agent_id in agent_ids:
            known = self.fleet.agents[agent_id].presence
            change = self.fleet.hear(agent_id, presence(known.incarnation, online=False), retained=False)
            assert change is Change.LEFT
            commands += self.hear(ev.FleetMoved(agent_id, change))
        return commands

    # What agents say, at the address of the attempt under way.

    @property
    def address(self) -> Address:
        """Of the attempt under way."""
        assert self.run.attempt is not None, f"no attempt is under way: {self.run.status()}"
        return self.run.attempt.address

    def accept(self, *agent_ids: str) -> list[ev.Command]:
        """They take their invitations."""
        commands: list[ev.Command] = []
        for agent_id in agent_ids:
            commands += self.hear(ev.MessageCame(agent_id, Acceptance(**self.address._asdict())))
        return commands

    def refuse(self, agent_id: str, reason: Any = "battery") -> list[ev.Command]:
        """It takes no part."""
        return self.hear(ev.MessageCame(agent_id, Refusal(**self.address._asdict(), reason=reason)))

    def offer(
        self,
        agent_id: str,
        *,
        address: Address | None = None,
        stored: Mapping[int, FrameFacts] | None = None,
        salt: str = "",
        **changes: Any,
    ) -> list[ev.Command]:
        """It sends its header."""
        offered = header(agent_id, address or self.address, salt=salt, **changes)
        return self.hear(ev.UpdateOffered(agent_id, offered, stored or {}))

    def frame(self, agent_id: str, index: int, salt: str = "", sum_squares: float = 1.0) -> list[ev.Command]:
        """A frame of its update comes and is stored."""
        return self.hear(ev.FrameStored(agent_id, index, facts(agent_id, index, salt, sum_squares)))

    def frames(self, agent_id: str, salt: str = "", sum_squares: float = 1.0) -> list[ev.Command]:
        """All frames of its update come."""
        commands: list[ev.Command] = []
        for index in range(FRAMING.num_frames):
            commands += self.frame(agent_id, index, salt, sum_squares)
        return commands

    def update(self, agent_id: str, **changes: Any) -> list[ev.Command]:
        """Header and frames come."""
        return self.offer(agent_id, **changes) + self.frames(agent_id)

    # What the coordinator's own parts answer.

    def prepared(self) -> list[ev.Command]:
        """The initial model is stored."""
        return self.hear(ev.ModelPrepared(version_digest(0), LAYOUT, FRAMING))

    def published(self) -> list[ev.Command]:
        """The current version is with the broker."""
        assert self.run.version is not None
        return self.hear(ev.ModelPublished(self.run.version.round_num))

    def evaluated(self, round_num: int, accuracy: float = 0.5) -> list[ev.Command]:
        """A version was evaluated on test data."""
        score = Evaluation(num_examples=100, loss=1.0 - accuracy, metrics={"accuracy": accuracy})
        return self.hear(ev.ModelEvaluated(round_num, score))

    def aggregated(self, delta_norm: float = 1.0) -> list[ev.Command]:
        """The next version is stored."""
        return self.hear(ev.UpdatesAggregated(version_digest(self.run.current_round), delta_norm))

    # Whole stretches.

    def to_collecting(self, *agent_ids: str) -> list[ev.Command]:
        """From the beginning until these agents (a and b, where none is named) are invited and have accepted."""
        agents = agent_ids or ("a", "b")
        self.prepared()
        self.evaluated(0)
        self.published()
        commands = self.come(*agents)
        assert set(sent(commands, Invitation)) == set(agents)
        self.accept(*agents)
        return commands

    def to_aggregating(self) -> list[ev.Command]:
        """From the beginning until the updates of a and b are being averaged."""
        self.to_collecting()
        return self.update("a") + self.update("b")

    def _checked(self, commands: list[ev.Command]) -> list[ev.Command]:
        self.run.check()
        if self.run.state in FINAL:
            assert self.run.deadline() == math.inf, "a run that is over wants to be woken"
        else:
            assert self.run.deadline() > self.now, (
                f"woken again and again at {self.run.deadline()}: {self.run.status()}"
            )
        return commands


TO_AGENT = (Invitation, Credit, Receipt, Cancel)
