"""What a coordinator of bare machines persisted, what is true of it, and the invariants that one must keep of the other.

I1  versions grow by one, each with one digest and one parent
I2  an agent counts at most once in a round
I3  every counted update was trained on the version it claims
I5  a version is made of at least quorum updates
I7  a restarted coordinator never gives a round number new content; epochs grow
I9  accepted + rejected + late + duplicate = received, in the store and in what observers are told
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from coordinator import run_events as ev
from coordinator.quarantine import Strike
from coordinator.round import MemberState, RoundState
from coordinator.run import Resumed, Run, Version
from coordinator.uplink import FrameFacts
from edge_agent.agent_events import FinishedUpdate
from midge.wire.frames import Framing, content_tag
from midge.wire.messages import Head, Invitation, Receipt, ToAgent
from tests.machines import LAYOUT

SpoolKey = tuple[int, str, bytes]


class Ledger:
    """The ledger of one run, over all starts of its coordinator.

    Attributes:
        spool: frames by (round, agent, tag), then by index.
        bases: the version that each update was really trained on, by the update's digest.
        unsynced: for each operation of the spool that no sync has made durable, what takes it back.
    """

    def __init__(self, quorum: int, num_frames: int) -> None:
        self.epoch = 0
        self.versions: list[ev.SaveVersion] = []
        self.attempt: ev.SaveAttempt | None = None
        self.updates: dict[int, dict[str, ev.AcceptedUpdate]] = defaultdict(dict)
        self.tallies: dict[tuple[str, str], int] = {}
        self.strikes: list[Strike] = []
        self.spool: dict[SpoolKey, dict[int, FrameFacts]] = defaultdict(dict)
        self.bases: dict[str, str] = {}
        self.unsynced: list[Callable[[], object]] = []
        self._quorum = quorum
        self._num_frames = num_frames
        self._evaluated: set[int] = set()
        self._aggregated: tuple[ev.AcceptedUpdate, ...] = ()
        self._noted: dict[tuple[str, str], int] = {}

    def resumed(self, framing: Framing) -> Resumed | None:
        """What the next start finds."""
        if not self.versions:
            return None
        last = self.versions[-1]
        attempt = self.attempt if self.attempt and self.attempt.round_num == last.round_num + 1 else None
        owed = [Version(v.round_num, v.digest) for v in self.versions[-2:] if v.round_num not in self._evaluated]
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
            strikes=self.strikes,
        )

    def started(self, run: Run) -> None:
        """A coordinator starts."""
        assert run.epoch > self.epoch, f"I7: epoch {run.epoch} after {self.epoch}"
        self.epoch = run.epoch
        self._noted = dict(run.tallies.counts)

    # What it saves.

    def save(self, save: ev.Save) -> None:
        """Keep this."""
        match save:
            case ev.SaveAttempt():
                self.attempt = save
            case ev.SaveUpdate(round_num, update):
                self._save_update(round_num, update)
            case ev.SaveStrike(strike):
                self.strikes.append(strike)
            case ev.SaveTallies(tallies):
                self.tallies = dict(tallies)
            case ev.SaveVersion():
                self._save_version(save)
            case ev.SaveEvaluation(round_num, "central", _):
                self._evaluated.add(round_num)

    def _save_update(self, round_num: int, update: ev.AcceptedUpdate) -> None:
        assert round_num == len(self.versions), f"I3: an update of round {round_num} counts in {len(self.versions)}"
        assert update.agent_id not in self.updates[round_num], f"I2: {update.agent_id} counts twice in {round_num}"
        base = self.bases[update.update_digest]
        assert base == self.versions[-1].digest, f"I3: {update.update_digest} was trained on {base}"
        frames = self.spool[round_num, update.agent_id, content_tag(update.update_digest)]
        assert len(frames) == self._num_frames, "a frame of an update that counts is not stored"
        self.updates[round_num][update.agent_id] = update

    def _save_version(self, save: ev.SaveVersion) -> None:
        last = self.versions[-1] if self.versions else None
        assert save.round_num == len(self.versions), f"I1: version {save.round_num} after {len(self.versions)} others"
        assert save.parent == (last.digest if last else None), "I1: each has one parent"
        if last:
            assert save.num_updates == len(self._aggregated) >= self._quorum, f"I5: {save}"
            self._forget(save.round_num)
        self.versions.append(save)

    def _forget(self, round_num: int) -> None:
        """Earlier rounds are of no more use."""
        self.updates.pop(round_num, None)
        for key in [key for key in self.spool if key[0] <= round_num]:
            del self.spool[key]
        self.unsynced.clear()

    def aggregates(self, command: ev.AggregateUpdates) -> None:
        """It asks for an aggregation."""
        agents = [update.agent_id for update in command.updates]
        assert agents == sorted(set(agents)), f"I2: {agents}"
        assert len(agents) >= self._quorum, f"I5: {len(agents)} updates are aggregated"
        assert command.base_digest == self.versions[-1].digest, "I3: aggregated on another version"
        stored = self.updates[command.round_num]
        assert {update.agent_id: update for update in command.updates} == stored, "an accepted update was lost"
        for update in command.updates:
            frames = self.spool[command.round_num, update.agent_id, content_tag(update.update_digest)]
            assert len(frames) == self._num_frames, f"a frame of {update} was lost"
        self._aggregated = command.updates

    # The spool, which is a log: of what was not synced, a power loss keeps some of the first operations.

    def store_frame(self, key: SpoolKey, index: int, facts: FrameFacts) -> None:
        """A frame is appended."""
        frames = self.spool[key]
        if index not in frames:
            frames[index] = facts
            self.unsynced.append(lambda: frames.pop(index, None))

    def forget_frames(self, key: SpoolKey) -> None:
        """The frames of one update are never to be read again."""
        forgotten = self.spool.pop(key, None)
        if forgotten is not None:
            self.unsynced.append(lambda: self.spool.update({key: forgotten}))

    def sync(self) -> None:
        """All of it is durable."""
        self.unsynced.clear()

    def lose_power(self, num_kept: int) -> None:
        """Of what was not synced, only the first `num_kept` operations were done."""
        for undo in reversed(self.unsynced[num_kept:]):
            undo()
        self.unsynced.clear()

    # What it says.

    def publishes(self, head: Head) -> None:
        """It publishes a version."""
        digests = [version.digest for version in self.versions[head.round_num :]]
        assert digests == [head.model_digest], f"I7: head {head.round_num} is {head.model_digest}, stored are {digests}"

    def tells(self, agent_id: str, message: ToAgent) -> None:
        """It tells an agent something: it must be stored by then."""
        match message:
            case Receipt(round_num=round_num, accepted=True):
                counted = self.updates[round_num].get(agent_id)
                assert counted is not None, f"{agent_id} was told of an update that is not stored"
                assert counted.update_digest == message.update_digest, f"{agent_id} was told of another update"
            case Invitation(round_num=round_num, model_digest=model_digest):
                assert round_num == len(self.versions), f"I7: invited to {round_num}, not {len(self.versions)}"
                assert model_digest == self.versions[-1].digest, f"I7: invited to train {model_digest}"
                assert self.attempt is not None
                assert self.attempt.attempt == message.attempt, f"invited to an attempt that is not stored: {message}"
                assert agent_id in self.attempt.members, f"{agent_id} was invited before that was stored"

    def notes(self, note: ev.Note) -> None:
        """It tells its observers something."""
        match note:
            case ev.UpdateReceived():
                self._note("received", "")
            case ev.UpdateSettled(_, outcome, reason):
                self._note(outcome, reason)

    def check(self, run: Run) -> None:
        """After each of its steps."""
        run.check()
        counted = dict(run.tallies.counts)
        assert counted == self._noted, f"I9: counted {counted}, observers were told of {self._noted}"
        assert counted == self.tallies, f"I9: counted {counted}, stored {self.tallies}"

    def _note(self, outcome: str, reason: str) -> None:
        self._noted[outcome, reason] = self._noted.get((outcome, reason), 0) + 1

    # What agents do.

    def trained(self, update: FinishedUpdate, base_digest: str) -> None:
        """An agent trained on this version."""
        self.bases[update.update_digest] = base_digest
