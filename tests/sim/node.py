"""An agent as a bare machine: its process, its journal and its connection, in a world without drivers."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from coordinator.uplink import FrameFacts
from edge_agent import agent_events as ev
from edge_agent.agent import Agent
from midge.wire.frames import Frame, Framing, content_tag, run_tag, update_digest
from midge.wire.messages import Head, Invitation
from tests.machines import LAYOUT, RUN_ID, presence

if TYPE_CHECKING:
    from tests.sim.world import World

_NOTES = frozenset(ev.NOTES)
_RUN_TAG = run_tag(RUN_ID)
_WILL_DELAY_S = 10.0


class Node:
    """One agent, over all its starts.

    Attributes:
        agent: the machine of the present start.
        journal: a finished update, which outlives a start.
        erased: what was erased from the journal last and would be there again after a power loss, for want of a sync.
        trained: the rounds in which it finished a training.
        connection: counts its connections; what was sent on an earlier one does not come.
        wake_at: when the machine wants to be called.
    """

    agent: Agent

    def __init__(self, world: World, agent_id: str) -> None:
        self.world = world
        self.agent_id = agent_id
        self.journal: ev.FinishedUpdate | None = None
        self.erased: ev.FinishedUpdate | None = None
        self.trained: list[int] = []
        self.is_connected = False
        self.wake_at = math.inf
        self.connection = 0
        self._training = 0
        self._down_at = self._up_at = 0.0
        self._start()

    def _start(self) -> None:
        rng = self.world.network.rng
        self.agent = Agent(random.Random(rng.random()), self.world.network.now, self.journal)
        self.incarnation = f"{rng.getrandbits(32):x}"
        self._training += 1
        self.wake_at = self.agent.deadline()

    # What comes to it.

    def tell(self, event: ev.Event) -> None:
        """A message goes from the broker to it, where it has a connection."""
        if self.is_connected:
            self._down_at = self.world.network.send(self._down_at, self._arrive, self.connection, event)

    def give_frames(self, head: Head, wanted: tuple[int, ...]) -> None:
        """Frames of a model go to it likewise."""
        if self.is_connected:
            for index in wanted:
                self._down_at = self.world.network.send(self._down_at, self._frame_came, self.connection, head, index)

    def _arrive(self, connection: int, event: ev.Event) -> None:
        if self.is_connected and self.connection == connection:
            self.step(event)

    def _frame_came(self, connection: int, head: Head, index: int) -> None:
        if self.agent.wants_frame(RUN_ID, index, content_tag(head.model_digest)):
            self._arrive(connection, ev.FrameStored(index))

    def step(self, event: ev.Event) -> None:
        """An event, and all that follows from it at once."""
        agent, now, events = self.agent, self.world.network.now, [event]
        while events:
            for command in agent.step(events.pop(0), now):
                if type(command) not in _NOTES:
                    self.world.tick(self)
                    result = self._perform(command)
                    if result is not None:
                        events.append(result)
            agent.check()
        self.world.tick(self)
        self.wake_at = agent.deadline()
        assert self.wake_at > now, f"{self.agent_id} is woken again and again in {agent.work}"

    # What it does.

    def _perform(self, command: ev.Command) -> ev.Event | None:
        world = self.world
        match command:
            case ev.Say(message):
                self._up(world.hear_message, message)
            case ev.SendFrames(update, indices):
                _, frames = work(world.framing, self.agent_id, update.round_num, update.model_digest)
                for index in indices:
                    self._up(world.hear_frame, *frames[index])
            case ev.AskFrames(head, wanted):
                world.give_frames(self, head, wanted)
            case ev.CheckModel():
                return ev.ModelChecked(is_right=not world.goes_wrong(0.02))
            case ev.Train(invitation):
                self._training += 1
                world.network.after(world.takes_s(0.5, 15.0), self._train, self._training, invitation)
            case ev.StopTraining():
                self._training += 1
            case ev.EraseWork():
                self.erased, self.journal = self.journal, None
            case ev.WatchHead():
                world.give_head(self)
            case ev.AnnouncePresence():
                said = presence(self.incarnation, epoch=self.agent.epoch)
                world.presences[self.agent_id] = said
                self._up(world.hear_presence, said)
        return None

    def _up(self, hear: Callable[..., None], *args: object) -> None:
        """A message goes from it to the coordinator."""
        if self.is_connected:
            self._up_at = self.world.network.send(self._up_at, self.world.come, hear, self.agent_id, *args)

    def _train(self, training: int, invitation: Invitation) -> None:
        if training != self._training:
            return
        if self.world.goes_wrong(0.03):
            self.step(ev.TrainingFailed(ev.Objection("worker", "killed")))
            return
        update, _ = work(self.world.framing, self.agent_id, invitation.round_num, invitation.model_digest)
        self.world.ledger.trained(update, invitation.model_digest)
        self.world.tick(self)
        self.trained.append(update.round_num)
        self.journal, self.erased = update, None
        self.world.tick(self)
        self.step(ev.TrainingFinished(update))

    # Its connection, and its life.

    def connect(self) -> None:
        """It reaches the broker, if it did not."""
        if not self.is_connected:
            self.is_connected = True
            self.connection += 1
            self.step(ev.BrokerConnected())
            if self.world.status is not None:
                self.tell(ev.CoordinatorSeen(self.world.status))

    def cut(self, seconds: float) -> None:
        """Its connection breaks."""
        if self.is_connected:
            self.is_connected = False
            self.step(ev.BrokerLost())
            self._gone(seconds)

    def crash(self, seconds: float) -> None:
        """Its process is killed; another one goes on from its journal."""
        incarnation = self.incarnation
        self.is_connected = False
        self._start()
        self._gone(seconds, incarnation)

    def _gone(self, seconds: float, incarnation: str = "") -> None:
        network = self.world.network
        network.after(_WILL_DELAY_S, self._publish_will, incarnation or self.incarnation)
        network.after(seconds, self.connect)

    def _publish_will(self, incarnation: str) -> None:
        """The broker publishes the will of a start, unless that came back."""
        if self.is_connected and self.incarnation == incarnation:
            return
        said = presence(incarnation, online=False)
        if not self.is_connected:
            self.world.presences[self.agent_id] = said
        self.world.network.send(0.0, self.world.come, self.world.hear_presence, self.agent_id, said)


@functools.lru_cache(maxsize=64)
def work(
    framing: Framing, agent_id: str, round_num: int, base: str
) -> tuple[ev.FinishedUpdate, list[tuple[Frame, FrameFacts]]]:
    """What an agent makes of a version, and its frames: the same at each training, since its seeds do not change."""
    text = f"{agent_id}/{round_num}/{base}"
    bodies = [hashlib.sha256(f"{text}/{index}".encode()).digest() for index in range(framing.num_frames)]
    made = update_digest(bodies)
    tag = content_tag(made)
    frames = []
    for index, body in enumerate(bodies):
        start, stop = framing.span(index)
        frame = Frame(0, _RUN_TAG, round_num, index, stop - start, tag, memoryview(b""))
        frames.append((frame, FrameFacts(body, 1.0)))
    return ev.FinishedUpdate(RUN_ID, round_num, base, LAYOUT.digest, made, framing.num_frames, 10, ()), frames
