"""A run and its agents as bare machines, wired together in virtual time: no driver, no broker, no bytes.

Messages travel as the objects that they are, and a frame as its header, over the connections of network.py; harm.py breaks them
and kills processes. After each step of a machine the ledger asserts the invariants, no timer is left in the past, and one seed
gives one history. What a machine waits for without asking again, or answers to nobody, shows here as a run that stands still.

It is the federation of federation.py without all that surrounds the machines, and twice as fast.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any

from coordinator import run_events as ev
from coordinator.cohort import Fleet
from coordinator.run import Run, RunState
from coordinator.uplink import FrameFacts, Verdict
from edge_agent import agent_events as agent_ev
from midge.transport.memory import Faults
from midge.wire.frames import Frame, Framing, content_tag
from midge.wire.messages import CoordinatorStatus, Evaluation, Head, Invitation, Presence, RollCall, UpdateHeader
from tests.machines import LAYOUT, RUN_ID, TASK, config, digest
from tests.sim.ledger import Ledger
from tests.sim.network import INSTANT, Network
from tests.sim.node import Node

_SAVES = frozenset(ev.SAVES)
_NOTES = frozenset(ev.NOTES)


class World:
    """Everything between and around the machines. Nothing is connected before `start`.

    Args:
        seed: of the network, the faults and all delays.
        agents: their ids; all of them must report in each round.
        rounds: of the run.
        frame_elements: of the ten elements that a model has.
        faults: of the network.
        is_busy: whether computations take time, and fail now and then.

    Attributes:
        published: the head of the model at the broker, and which versions' frames are there.
        presences: of agents, as the broker retains them.
        status: of the coordinator, likewise.
    """

    def __init__(
        self,
        seed: int,
        agents: Sequence[str] = ("a", "b"),
        *,
        rounds: int = 5,
        frame_elements: int = 4,
        faults: Faults = INSTANT,
        is_busy: bool = True,
    ) -> None:
        self.rng = random.Random(seed)
        self.network = Network(self.rng, faults)
        self.framing = Framing(LAYOUT.num_elements, frame_elements)
        self.config = config(
            rounds=rounds,
            minimum=len(agents),
            quorum=len(agents),
            report_deadline_s=60.0,
            max_attempts=10_000,
            start_deadline_s=1e6,
        )
        self.ledger = Ledger(len(agents), self.framing.num_frames)
        self.published: tuple[Head, frozenset[str]] | None = None
        self.presences: dict[str, Presence] = {}
        self.status: CoordinatorStatus | None = None
        self.is_connected = False
        self.story: list[str] = []
        self._is_busy = is_busy
        self._connection = self._publication = self._computation = 0
        self.nodes = {agent_id: Node(self, agent_id) for agent_id in agents}
        self._start_run()

    # Time.

    def start(self) -> None:
        """Connect everyone."""
        self.connect()
        for node in self.nodes.values():
            node.connect()

    def play(self, bound_s: float) -> None:
        """Go on until the run is done, which must be so by `bound_s`."""
        network, queue, nodes = self.network, self.network.queue, list(self.nodes.values())
        act: Callable[..., None]
        args: tuple[Any, ...]
        while self.run.state is not RunState.DONE:
            at, act, args = self._wake_at, self.step, (ev.TimePassed(),)
            for node in nodes:
                if node.wake_at < at:
                    at, act, args = node.wake_at, node.step, (agent_ev.TimePassed(),)
            if queue and queue[0][0] <= at:
                at, _, act, args = heapq.heappop(queue)
            assert at < bound_s, f"round {self.run.current_round} is not committed at {at:.0f} s: {self.describe()}"
            network.now = max(network.now, at)
            act(*args)
            self.acted(act)

    def acted(self, act: Callable[..., None]) -> None:
        """Something was done; small_world.py looks at it."""

    def tick(self, process: World | Node) -> None:
        """An operation of this process is about to be done, or was just done; small_world.py kills it here."""

    def describe(self) -> str:
        """Where everyone stands, and what happened last."""
        works = ", ".join(f"{a} {n.agent.work} {n.agent.update is not None}" for a, n in self.nodes.items())
        return f"{self.run.status()}; {works}; " + "; ".join(self.story[-15:])

    def tell(self, what: str) -> None:
        """Note something for whoever reads the history of a failure."""
        self.story.append(f"{self.network.now:.1f} {what}")

    def takes_s(self, least_s: float, most_s: float) -> float:
        """How long something takes."""
        return self.rng.uniform(least_s, most_s) if self._is_busy else 0.0

    def goes_wrong(self, probability: float) -> bool:
        """Whether something fails that can."""
        return self._is_busy and self.rng.random() < probability

    # The coordinator.

    def _start_run(self) -> None:
        self.fleet = Fleet()
        self._computation += 1
        epoch, resumed = self.ledger.epoch + 1, self.ledger.resumed(self.framing)
        self.run = Run(self.config, epoch=epoch, fleet=self.fleet, now=self.network.now, resumed=resumed)
        self.ledger.started(self.run)
        self._take(self.run.start())

    def step(self, event: ev.Event) -> None:
        """A turn of the coordinator that has one event."""
        self._take(self.run.step(event, self.network.now))

    def _take(self, commands: list[ev.Command]) -> None:
        run, ledger = self.run, self.ledger
        commands += run.end_turn()
        saves = [command for command in commands if type(command) in _SAVES]
        if saves:
            self._save(saves)
        for command in commands:
            kind = type(command)
            if kind in _NOTES:
                ledger.notes(command)
                if kind is ev.RoundEnded:
                    self.tell(f"round {command.round_num}.{command.attempt} {command.outcome} {command.reason}")
            elif kind not in _SAVES:
                self.tick(self)
                self._perform(command)
        self.tick(self)
        ledger.check(run)
        self._wake_at = run.deadline()
        assert self._wake_at > self.network.now, f"the run is woken again and again: {run.status()}"

    def _save(self, saves: Sequence[ev.Save]) -> None:
        """One transaction; the spool is synced before, if updates are in it."""
        self.tick(self)
        if any(type(save) is ev.SaveUpdate for save in saves):
            self.ledger.sync()
            self.tick(self)
        for save in saves:
            self.ledger.save(save)

    def _perform(self, command: ev.Command) -> None:
        match command:
            case ev.Send(agent_id, message):
                self.ledger.tells(agent_id, message)
                if self.is_connected:
                    invited = isinstance(message, Invitation)
                    self.nodes[agent_id].tell(agent_ev.Invited(message) if invited else agent_ev.Told(message))
            case ev.PublishModel(round_num, model_digest):
                self._publish(round_num, model_digest)
            case ev.AggregateUpdates():
                self._aggregate(command)
            case ev.EvaluateModel(round_num):
                score = Evaluation(num_examples=10, loss=1.0, metrics={"accuracy": 1.0 - 1.0 / (1.0 + round_num)})
                self._compute(self.takes_s(0.1, 30.0), ev.ModelEvaluated(round_num, score))
            case ev.ForgetFrames(agent_id, forgotten):
                self.ledger.forget_frames((self.run.current_round, agent_id, content_tag(forgotten)))
            case ev.CallRoll():
                if self.is_connected:
                    for node in self.nodes.values():
                        node.tell(agent_ev.RollCalled(RollCall(epoch=self.run.epoch, spread_s=1.0)))
            case ev.PrepareModel():
                self._compute(self.takes_s(1.0, 2.0), ev.ModelPrepared(digest("version 0"), LAYOUT, self.framing))

    def _compute(self, delay_s: float, event: ev.Event) -> None:
        """A result that comes later, to the process that asked for it alone."""
        self.network.after(delay_s, self._computed, self._computation, event)

    def _computed(self, computation: int, event: ev.Event) -> None:
        if computation == self._computation:
            self.step(event)

    def _aggregate(self, command: ev.AggregateUpdates) -> None:
        self.ledger.aggregates(command)
        if self.goes_wrong(0.05):
            self._compute(1.0, ev.AggregationBroke("disk full"))
        else:
            made = digest(command.base_digest + "".join(update.update_digest for update in command.updates))
            self._compute(self.takes_s(0.1, 3.0), ev.UpdatesAggregated(made, 1.0))

    # What comes to it.

    def come(self, hear: Callable[..., None], *args: Any) -> None:
        """A message arrives, where the coordinator has a connection."""
        if self.is_connected:
            hear(*args)

    def hear_presence(self, agent_id: str, said: Presence, *, retained: bool = False) -> None:
        """An agent came or left."""
        change = self.fleet.hear(agent_id, said, retained=retained)
        if change is not None:
            self.step(ev.FleetMoved(agent_id, change))

    def hear_message(self, agent_id: str, message: Any) -> None:
        """An agent says something."""
        if not isinstance(message, UpdateHeader):
            self.step(ev.MessageCame(agent_id, message))
            return
        stored = self.ledger.spool.get((message.round_num, agent_id, content_tag(message.update_digest)), {})
        self.step(ev.UpdateOffered(agent_id, message, dict(stored)))

    def hear_frame(self, agent_id: str, frame: Frame, facts: FrameFacts) -> None:
        """A frame of an agent's update came."""
        verdict = self.run.frame_verdict(agent_id, frame, frame.index)
        if verdict is not Verdict.WANTED:
            self.step(ev.FrameDropped(agent_id, verdict))
            return
        self.ledger.store_frame((frame.round_num, agent_id, frame.content_tag), frame.index, facts)
        self.tick(self)
        self.step(ev.FrameStored(agent_id, frame.index, facts))

    # The model at the broker.

    def _publish(self, round_num: int, model_digest: str) -> None:
        head = Head(
            run_id=RUN_ID,
            epoch=self.run.epoch,
            round_num=round_num,
            slot=round_num % 2,
            model_digest=model_digest,
            layout=LAYOUT.tensors,
            frame_elements=self.framing.frame_elements,
            codec="float32",
            counters=(),
            task=TASK,
        )
        self._publication += 1  # it takes the place of one that is still under way
        self.network.after(self.takes_s(0.1, 2.0), self._publication_ended, self._publication, self._connection, head)

    def _publication_ended(self, publication: int, connection: int, head: Head) -> None:
        if (publication, connection) != (self._publication, self._connection) or not self.is_connected:
            return
        self.ledger.publishes(head)
        before = self.published[0].model_digest if self.published else head.model_digest
        self.published = (head, frozenset((before, head.model_digest)))
        for node in self.nodes.values():
            node.tell(agent_ev.HeadSeen(head))
        self.step(ev.ModelPublished(head.round_num))

    def give_head(self, node: Node) -> None:
        """An agent subscribes to the head, which is retained."""
        if self.published is not None:
            node.tell(agent_ev.HeadSeen(self.published[0]))

    def give_frames(self, node: Node, head: Head, wanted: tuple[int, ...]) -> None:
        """An agent subscribes to frames; two versions of them are retained."""
        if self.published is not None and head.model_digest in self.published[1]:
            node.give_frames(head, wanted)

    # The coordinator's connection, and its life.

    def connect(self) -> None:
        """It reaches the broker, if it did not."""
        if self.is_connected:
            return
        self.is_connected = True
        self._connection += 1
        self._say_status(online=True)
        self.step(ev.BrokerConnected())
        for agent_id, said in self.presences.items():
            self.hear_presence(agent_id, said, retained=True)

    def cut(self, seconds: float) -> None:
        """Its connection breaks."""
        if not self.is_connected:
            return
        self._say_status(online=False)  # its will
        self.is_connected = False
        self.fleet.lose_all()
        self.step(ev.BrokerLost("cut"))
        self.network.after(seconds, self.connect)

    def crash(self, seconds: float) -> None:
        """Its process is killed; another one goes on from the ledger, and is connected a while later."""
        self.is_connected = False
        self._connection += 1
        self._start_run()
        self._say_status(online=False)
        self.network.after(seconds, self.connect)

    def forget_all(self) -> None:
        """The broker loses what it retained."""
        self.published = self.status = None
        self.presences.clear()

    def _say_status(self, *, online: bool) -> None:
        self.status = CoordinatorStatus(
            online=online, epoch=self.run.epoch, instance=f"i{self.run.epoch}", protocol=1, version="0.1"
        )
        for node in self.nodes.values():
            node.tell(agent_ev.CoordinatorSeen(self.status))
