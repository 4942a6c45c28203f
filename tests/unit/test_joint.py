"""A run and two agents, wired together over a network that loses, doubles and reorders, with crashes on every side.

No bytes, no clock, no sleep: messages travel as objects through virtual time. After each step all invariants are asserted,
and each of 300 seeds must commit five rounds within a bound (I6). What a machine waits for without asking again, or
answers to nobody, shows here as a run that stands still.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from coordinator import run_events as rev
from coordinator.cohort import Fleet
from coordinator.round import MemberState, RoundState
from coordinator.run import Resumed, Run, RunState, Version
from coordinator.uplink import FrameFacts, Verdict
from edge_agent import agent_events as aev
from edge_agent.agent import Agent
from midge.wire.frames import Frame, Framing, content_tag, run_tag, update_digest
from midge.wire.messages import (
    CoordinatorStatus,
    Evaluation,
    Head,
    Invitation,
    Presence,
    RollCall,
    UpdateHeader,
)
from tests.machines import LAYOUT, RUN_ID, TASK, config, digest, presence

NUM_SEEDS = 300
ROUNDS = 5
AGENTS = ("a", "b")
FAULTS_END_S = 200.0
BOUND_S = 900.0


@dataclass
class Disk:
    """What a coordinator persisted, as its database and its spool hold it."""

    epoch: int = 0
    versions: list[rev.SaveVersion] = field(default_factory=list)
    attempt: rev.SaveAttempt | None = None
    updates: dict[int, dict[str, rev.AcceptedUpdate]] = field(default_factory=lambda: defaultdict(dict))
    tallies: dict[tuple[str, str], int] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)
    spool: dict[tuple[int, str, bytes], dict[int, FrameFacts]] = field(default_factory=lambda: defaultdict(dict))

    def save(self, save: rev.Save) -> None:
        match save:
            case rev.SaveVersion():
                last = self.versions[-1] if self.versions else None
                assert save.round_num == (last.round_num + 1 if last else 0), "I1: versions grow by one"
                assert save.parent == (last.digest if last else None), "I1: each has one parent"
                self.versions.append(save)
            case rev.SaveAttempt():
                self.attempt = save
            case rev.SaveUpdate(round_num, update):
                assert update.agent_id not in self.updates[round_num], "I2: an agent counts at most once in a round"
                self.updates[round_num][update.agent_id] = update
            case rev.SaveTallies(tallies):
                self.tallies = dict(tallies)
            case rev.SaveEvaluation(round_num, "central", _):
                self.evaluated.add(round_num)

    def resumed(self, framing: Framing) -> Resumed | None:
        if not self.versions:
            return None
        last = self.versions[-1]
        attempt = self.attempt if self.attempt and self.attempt.round_num == last.round_num + 1 else None
        owed = [Version(v.round_num, v.digest) for v in self.versions[-2:] if v.round_num not in self.evaluated]
        return Resumed(
            version=Version(last.round_num, last.digest),
            layout=LAYOUT,
            framing=framing,
            attempt=attempt.attempt if attempt else 0,
            round_state=attempt.state if attempt else RoundState.ABANDONED,
            members={a: MemberState(s) for a, s in attempt.members.items()} if attempt else {},
            accepted=list(self.updates[last.round_num + 1].values()),
            unevaluated=owed,
            tallies=self.tallies,
        )


@dataclass(frozen=True)
class _FrameCame:
    """A retained frame of a model on its way to an agent."""

    head: Head
    index: int


@dataclass
class Node:
    """An agent's process, its journal and its connection."""

    agent: Agent
    incarnation: str
    connected: bool = False
    connection: int = 0
    training: int = 0
    journal: aev.FinishedUpdate | None = None


class World:
    """Everything between and around the machines.

    Args:
        seed: of the network, the faults and all delays.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.loss = self.rng.choice((0.0, 0.05, 0.2))
        self.doubling = self.rng.choice((0.0, 0.2))
        self.spread_s = self.rng.choice((0.02, 0.5, 3.0))
        self.framing = Framing(10, self.rng.choice((1, 4)))  # ten frames or three
        self.config = config(rounds=ROUNDS, report_deadline_s=60.0, max_attempts=10_000, start_deadline_s=1e6)
        self.disk = Disk()
        self.bases: dict[str, str] = {}
        self.published: tuple[Head, frozenset[str]] | None = None
        self.presences: dict[str, Presence] = {}
        self.status: CoordinatorStatus | None = None
        self.connected = False
        self.run_connection = self.publication = self.computation = 0
        self.story: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.nodes = {agent_id: self._start_agent(agent_id, None) for agent_id in AGENTS}
        self.run = self._start_run()
        self._connect_run()
        for agent_id in AGENTS:
            self._connect_agent(agent_id)
        self._plan_faults()

    # Time and the network.

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), act))

    def deliver(self, act: Callable[[], None]) -> None:
        """A message that may be lost, doubled and late."""
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.doubling else 1):
            self.after(0.005 + self.rng.uniform(0, self.spread_s), act)

    def play(self) -> None:
        """Until the run is done, or the bound is reached."""
        while self.run.state is not RunState.DONE:
            timers = [self.run.deadline(), *(node.agent.deadline() for node in self.nodes.values())]
            at = min(self._events[0][0] if self._events else math.inf, *timers)
            assert at < BOUND_S, f"round {self.run.current_round} is not committed at {at:.0f} s: {self.describe()}"
            self.now = max(self.now, at)
            if self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            else:
                self._fire_timers()

    def describe(self) -> str:
        works = ", ".join(f"{a} {n.agent.work} {n.agent.update is not None}" for a, n in self.nodes.items())
        return f"{self.run.status()}; {works}; " + "; ".join(self.story[-15:])

    def _fire_timers(self) -> None:
        if self.run.deadline() <= self.now:
            self.to_run(rev.TimePassed())
        for agent_id, node in self.nodes.items():
            if node.agent.deadline() <= self.now:
                self.to_agent(agent_id, aev.TimePassed())

    # The coordinator.

    def _start_run(self) -> Run:
        self.disk.epoch += 1
        self.fleet = Fleet()
        self.computation += 1
        run = Run(
            self.config,
            epoch=self.disk.epoch,
            fleet=self.fleet,
            now=self.now,
            resumed=self.disk.resumed(self.framing),
        )
        self.run = run
        self._perform_all(run.start() + run.end_turn())
        return run

    def to_run(self, event: rev.Event) -> None:
        commands = self.run.step(event, self.now) + self.run.end_turn()
        self.run.check()
        assert self.run.deadline() > self.now, f"the run is woken again and again: {self.run.status()}"
        self._perform_all(commands)

    def _perform_all(self, commands: list[rev.Command]) -> None:
        for command in commands:
            if isinstance(command, rev.SAVES):
                self.disk.save(command)
        for command in commands:
            self._perform(command)

    def _perform(self, command: rev.Command) -> None:
        match command:
            case rev.PrepareModel():
                self._compute(2.0, rev.ModelPrepared(digest("version 0"), LAYOUT, self.framing))
            case rev.PublishModel(round_num, model_digest):
                self._publish(round_num, model_digest)
            case rev.CallRoll():
                for agent_id in AGENTS:
                    self._tell(agent_id, aev.RollCalled(RollCall(epoch=self.run.epoch, spread_s=1.0)))
            case rev.Send(agent_id, message):
                invited = isinstance(message, Invitation)
                self._tell(agent_id, aev.Invited(message) if invited else aev.Told(message))
            case rev.ForgetFrames(agent_id, forgotten):
                self.disk.spool.pop((self.run.current_round, agent_id, content_tag(forgotten)), None)
            case rev.AggregateUpdates():
                self._aggregate(command)
            case rev.EvaluateModel(round_num):
                score = Evaluation(num_examples=10, loss=1.0, metrics={"accuracy": round_num / 10})
                self._compute(self.rng.uniform(0.1, 30.0), rev.ModelEvaluated(round_num, score))
            case rev.RoundEnded(round_num, attempt, outcome, reason):
                self.story.append(f"{self.now:.1f} round {round_num}.{attempt} {outcome} {reason}")

    def _compute(self, delay_s: float, event: rev.Event) -> None:
        """A result that comes later, to the process that asked for it alone."""
        process = self.computation

        def give() -> None:
            if process == self.computation:
                self.to_run(event)

        self.after(delay_s, give)

    def _aggregate(self, command: rev.AggregateUpdates) -> None:
        agents = [update.agent_id for update in command.updates]
        assert agents == sorted(set(agents)), "I2: an agent counts at most once"
        assert len(agents) >= self.config.round.quorum, "I5: fewer updates than the quorum"
        for update in command.updates:
            assert self.bases[update.update_digest] == command.base_digest, "I3: trained on another version"
            frames = self.disk.spool[command.round_num, update.agent_id, content_tag(update.update_digest)]
            assert len(frames) == self.framing.num_frames, "a frame of an update that counts is not stored"
        if self.rng.random() < 0.05:
            self._compute(1.0, rev.AggregationBroke("disk full"))
        else:
            made = digest(command.base_digest + "".join(update.update_digest for update in command.updates))
            self._compute(self.rng.uniform(0.1, 3.0), rev.UpdatesAggregated(made, 1.0))

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
        self.publication += 1  # it takes the place of one that is still under way
        this = self.publication, self.run_connection

        def done() -> None:
            if this != (self.publication, self.run_connection) or not self.connected:
                return
            before = self.published[0].model_digest if self.published else model_digest
            self.published = (head, frozenset((before, model_digest)))
            for agent_id in AGENTS:
                self._tell(agent_id, aev.HeadSeen(head))
            self.to_run(rev.ModelPublished(round_num))

        self.after(self.rng.uniform(0.1, 2.0), done)

    # Its connection.

    def _connect_run(self) -> None:
        self.connected = True
        self.run_connection += 1
        self._say_status(online=True)
        self.to_run(rev.BrokerConnected())
        for agent_id, said in self.presences.items():
            self._hear(agent_id, said, retained=True)

    def _say_status(self, *, online: bool) -> None:
        self.status = CoordinatorStatus(
            online=online, epoch=self.run.epoch, instance=f"i{self.run.epoch}", protocol=1, version="0.1"
        )
        for agent_id in AGENTS:
            self._tell(agent_id, aev.CoordinatorSeen(self.status), ours=False)

    def _cut_run(self, seconds: float) -> None:
        if not self.connected:
            return
        self._say_status(online=False)  # its will
        self.connected = False
        self.fleet.lose_all()
        self.to_run(rev.BrokerLost("cut"))
        self.after(seconds, lambda: None if self.connected else self._connect_run())

    def _crash_run(self, seconds: float) -> None:
        """The coordinator's process is killed; another one goes on from its disk a while later."""
        self.connected = False
        self.run_connection += 1
        self._start_run()
        self._say_status(online=False)
        self.after(seconds, lambda: None if self.connected else self._connect_run())

    # From the coordinator to an agent, and back.

    def _tell(self, agent_id: str, event: aev.Event | _FrameCame, *, ours: bool = True) -> None:
        if ours and not self.connected:
            return
        node = self.nodes[agent_id]
        if not node.connected:
            return
        connection = node.connection

        def arrive() -> None:
            if self.nodes[agent_id].connected and self.nodes[agent_id].connection == connection:
                self.to_agent(agent_id, event)

        self.deliver(arrive)

    def _send(self, agent_id: str, arrive: Callable[[], None]) -> None:
        if self.nodes[agent_id].connected:
            self.deliver(lambda: arrive() if self.connected else None)

    def _hear(self, agent_id: str, said: Presence, *, retained: bool) -> None:
        change = self.fleet.hear(agent_id, said, retained=retained)
        if change is not None:
            self.to_run(rev.FleetMoved(agent_id, change))

    def _hear_frame(self, agent_id: str, update: aev.FinishedUpdate, index: int) -> None:
        start, stop = self.framing.span(index)
        tag = content_tag(update.update_digest)
        frame = Frame(0, run_tag(update.run_id), update.round_num, index, stop - start, tag, memoryview(b""))
        verdict = self.run.frame_verdict(agent_id, frame, index)
        if verdict is not Verdict.WANTED:
            self.to_run(rev.FrameDropped(agent_id, verdict))
            return
        facts = FrameFacts(body_digest(agent_id, update, index), 1.0)
        self.disk.spool[update.round_num, agent_id, tag][index] = facts
        self.to_run(rev.FrameStored(agent_id, index, facts))

    def _hear_message(self, agent_id: str, message: Any) -> None:
        if not isinstance(message, UpdateHeader):
            self.to_run(rev.MessageCame(agent_id, message))
            return
        stored = self.disk.spool.get((message.round_num, agent_id, content_tag(message.update_digest)), {})
        self.to_run(rev.UpdateOffered(agent_id, message, dict(stored)))

    # Agents.

    def _start_agent(self, agent_id: str, before: Node | None) -> Node:
        journal = before.journal if before else None
        agent = Agent(random.Random(self.rng.random()), self.now, journal)
        incarnation = f"{self.rng.getrandbits(32):x}"
        connection = before.connection + 1 if before else 0
        return Node(agent, incarnation, False, connection, before.training + 1 if before else 0, journal)

    def to_agent(self, agent_id: str, event: aev.Event | _FrameCame) -> None:
        node = self.nodes[agent_id]
        if isinstance(event, _FrameCame):
            if not node.agent.wants_frame(RUN_ID, event.index, content_tag(event.head.model_digest)):
                return
            event = aev.FrameStored(event.index)
        events: list[aev.Event] = [event]
        while events:
            commands = node.agent.step(events.pop(0), self.now)
            node.agent.check()
            assert node.agent.deadline() > self.now, f"{agent_id} is woken again and again in {node.agent.work}"
            for command in commands:
                result = self._perform_for(agent_id, node, command)
                if result is not None:
                    events.append(result)

    def _perform_for(self, agent_id: str, node: Node, command: aev.Command) -> aev.Event | None:
        match command:
            case aev.AnnouncePresence():
                self._announce(agent_id, node, online=True)
            case aev.Say(message):
                self._send(agent_id, lambda: self._hear_message(agent_id, message))
            case aev.SendFrames(update, indices):
                for index in indices:
                    self._send(agent_id, lambda index=index: self._hear_frame(agent_id, update, index))
            case aev.WatchHead():
                if self.published is not None:
                    self._tell(agent_id, aev.HeadSeen(self.published[0]), ours=False)
            case aev.AskFrames(head, wanted):
                self._give_frames(agent_id, head, wanted)
            case aev.CheckModel():
                return aev.ModelChecked(is_right=self.rng.random() > 0.02)
            case aev.Train(invitation):
                self._train(agent_id, node, invitation)
            case aev.StopTraining():
                node.training += 1
            case aev.EraseWork():
                node.journal = None
        return None

    def _announce(self, agent_id: str, node: Node, *, online: bool) -> None:
        said = presence(node.incarnation, online=online, epoch=node.agent.epoch)
        self.presences[agent_id] = said
        if self.connected:
            self.deliver(lambda: self._hear(agent_id, said, retained=False) if self.connected else None)

    def _give_frames(self, agent_id: str, head: Head, wanted: tuple[int, ...]) -> None:
        if self.published is None or head.model_digest not in self.published[1]:
            return
        for index in wanted:
            self._tell(agent_id, _FrameCame(head, index), ours=False)

    def _train(self, agent_id: str, node: Node, invitation: Invitation) -> None:
        node.training += 1
        training = node.training

        def end() -> None:
            if self.nodes[agent_id] is not node or node.training != training:
                return
            if self.rng.random() < 0.03:
                self.to_agent(agent_id, aev.TrainingFailed(aev.Objection("worker", "killed")))
                return
            node.journal = self._update(agent_id, invitation)
            self.to_agent(agent_id, aev.TrainingFinished(node.journal))

        self.after(self.rng.uniform(0.5, 15.0), end)

    def _update(self, agent_id: str, invitation: Invitation) -> aev.FinishedUpdate:
        """The same round trained again gives the same bits, since its seeds do not change."""
        blank = aev.FinishedUpdate(
            RUN_ID, invitation.round_num, invitation.model_digest, LAYOUT.digest, "", self.framing.num_frames, 10, ()
        )
        bodies = (body_digest(agent_id, blank, index) for index in range(self.framing.num_frames))
        made = update_digest(bodies)
        self.bases[made] = invitation.model_digest
        return aev.FinishedUpdate(
            RUN_ID, invitation.round_num, invitation.model_digest, LAYOUT.digest, made, self.framing.num_frames, 10, ()
        )

    # Their connections.

    def _connect_agent(self, agent_id: str) -> None:
        node = self.nodes[agent_id]
        node.connected = True
        node.connection += 1
        self.to_agent(agent_id, aev.BrokerConnected())
        if self.status is not None:
            self._tell(agent_id, aev.CoordinatorSeen(self.status), ours=False)

    def _cut_agent(self, agent_id: str, seconds: float) -> None:
        node = self.nodes[agent_id]
        if not node.connected:
            return
        node.connected = False
        self.to_agent(agent_id, aev.BrokerLost())
        self._will(agent_id, node)
        self.after(seconds, lambda: None if self.nodes[agent_id].connected else self._connect_agent(agent_id))

    def _crash_agent(self, agent_id: str, seconds: float) -> None:
        node = self.nodes[agent_id]
        node.connected = False
        self._will(agent_id, node)
        self.nodes[agent_id] = self._start_agent(agent_id, node)
        self.after(seconds, lambda: None if self.nodes[agent_id].connected else self._connect_agent(agent_id))

    def _will(self, agent_id: str, node: Node) -> None:
        """The broker publishes an agent's will ten seconds after it is gone, unless it came back."""

        def publish() -> None:
            if self.nodes[agent_id] is node and node.connected:
                return
            if not self.nodes[agent_id].connected:
                self.presences[agent_id] = presence(node.incarnation, online=False)
            said = presence(node.incarnation, online=False)
            self.deliver(lambda: self._hear(agent_id, said, retained=False) if self.connected else None)

        self.after(10.0, publish)

    # Faults.

    def _plan_faults(self) -> None:
        at = self.rng.uniform(1.0, 30.0)
        often = self.rng.choice((10.0, 40.0, 1000.0))
        while at < FAULTS_END_S:
            self.after(at - self.now, self._do_harm)
            at += self.rng.uniform(1.0, often)

    def _do_harm(self) -> None:
        agent_id, seconds = self.rng.choice(AGENTS), self.rng.uniform(0.1, 20.0)
        kind = self.rng.randrange(6)
        self.story.append(f"{self.now:.1f} harm {kind} {agent_id} {seconds:.1f}")
        match kind:
            case 0:  # the broker restarts and has forgotten everything
                self.published = None
                self.presences.clear()
                self.status = None
                for each in AGENTS:
                    self._cut_agent(each, self.rng.uniform(0.1, seconds))
                self._cut_run(seconds)
            case 1 | 2:
                self._cut_agent(agent_id, seconds)
            case 3:
                self._crash_agent(agent_id, seconds)
            case 4:
                self._cut_run(seconds)
            case 5:
                self._crash_run(seconds)


def body_digest(agent_id: str, update: aev.FinishedUpdate, index: int) -> bytes:
    text = f"{agent_id}/{update.run_id}/{update.round_num}/{update.model_digest}/{index}"
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("part", range(10))
def test_five_rounds_are_committed_whatever_the_network_and_crashes_do(part: int):
    for seed in range(part, NUM_SEEDS, 10):
        world = World(seed)
        try:
            world.play()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {world.now:.1f} s: {error}") from error
        assert [version.round_num for version in world.disk.versions] == list(range(ROUNDS + 1))
        tallies = world.run.tallies
        assert tallies.num_received == tallies.num_settled, "I9"
