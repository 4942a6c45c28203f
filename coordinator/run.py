"""One run: rounds 1..N of one task, from the initial model to the end, through lost agents, brokers and restarts.

Purpose: own the versions of the model, and give each round as many attempts as it is allowed. What happens within an attempt
is in attempt.py. Like it, this must not know of sockets, disks, tensors or clocks (`now` is monotonic seconds).

States
    PREPARING    the model of round 0 is being made
    WAITING      for the broker, for `min_agents` agents, for an evaluation, or for the pause after an abandoned attempt
    PUBLISHING   the current version is on its way to the broker
    IN_ROUND     an attempt at a round is under way (its own states are in round.py)
    FINISHING    all rounds are committed; the last evaluation is under way
    DONE         every round is committed and evaluated (final)
    FAILED       it cannot go on, for the reason that it carries (final)
    STOPPED      the operator stopped it; it goes on when the coordinator is started again (final for this process)

Every event is legal in every state: what comes late (a result of a stopped computation, a message of an old attempt)
changes nothing. Only the machine of the round raises, for a result that it cannot have asked for.

While a version is evaluated the next round already runs; the one after waits for the evaluation, so evaluations never pile up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from coordinator import round_events as rounds
from coordinator import run_events as ev
from coordinator.admission import Gates
from coordinator.attempt import Address, Attempt, Output, Tallies, quarantined, turn_away
from coordinator.cohort import Change, Fleet
from coordinator.durations import in_words
from coordinator.held_out import Judging, furthest
from coordinator.muster import Muster
from coordinator.quarantine import HELD_OUT, Quarantine
from coordinator.round import MemberState, Round, RoundState
from coordinator.run_config import FINAL, Resumed, RunConfig, RunState, Version
from coordinator.scoring import Scoring
from coordinator.unsaved import Unsaved
from coordinator.uplink import Verdict
from coordinator.waits import Wait
from midge.wire.frames import Frame, Framing
from midge.wire.layout import Layout

__all__ = ["FINAL", "Resumed", "Run", "RunState", "Version"]

_ROLL_CALL_EVERY_S = 10.0
_ROLL_CALL_AT_LEAST_EVERY_S = 300.0
_HEARD_WITHIN_S = 60.0
"""Whoever is not heard of for so long after our connection was lost may have died meanwhile, its will lost with the broker."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


_SeenAttempt = tuple[int, int, RoundState, dict[str, MemberState]]
_SeenRun = tuple[RunState, str, int, tuple[int, float] | None]


class Run:
    """The machine. `step` takes an event and the time and returns commands; `deadline` says when to call it at the latest.

    A driver hands over all events that wait, then calls `end_turn`: what would be said or saved after each of them is said
    or saved once.

    Args:
        config: what the run is.
        epoch: of this coordinator.
        fleet: shared with the driver, which keeps it up to date before it sends `FleetMoved`.
        now: monotonic seconds.
        resumed: what is on disk of this run; None for a new one.
        connected: whether the broker can be reached already.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        epoch: int,
        fleet: Fleet,
        now: float,
        resumed: Resumed | None = None,
        connected: bool = False,
    ) -> None:
        self.config = config
        self.epoch = epoch
        self.fleet = fleet
        self.now = now
        self.state = RunState.PREPARING
        self.reason = ""
        self.version: Version | None = None
        self.attempt: Attempt | None = None
        self.accepted: dict[str, ev.AcceptedUpdate] = {}
        self.tallies = Tallies()
        self.scoring = Scoring(config)
        self.quarantine = Quarantine(config.quarantine, resumed.strikes if resumed else ())
        self.judging = Judging(config.held_out, resumed.score if resumed else None)
        self.framing: Framing | None = None
        self._muster = Muster(config, fleet, self.quarantine)
        self._gates: Gates | None = None
        self._connected = connected
        self._published = False
        self._publishing_since: float | None = None
        self._num_attempts = 0
        self._failures: Counter[str] = Counter()
        self._pause_until = math.inf
        self._starts_by = now + config.start_deadline_s
        self._started = False
        self._roll_call_at = -math.inf
        self._heard_by = math.inf
        self._delta_norm = 0.0
        self._server_state: str | None = None
        self._left_out: tuple[str, ...] = ()
        self._unsaved = Unsaved()
        if resumed is not None:
            self._restore(resumed)
        self._told_state = self.state

    # The public surface.

    def start(self) -> list[ev.Command]:
        """What a new or a resumed run does first."""
        commands: list[ev.Command] = []
        if self.version is None:
            commands.append(ev.PrepareModel(self.config.seed))
        commands += self.scoring.repeat()
        held = self.quarantine.held.items()
        commands += [ev.AgentQuarantined(agent_id, last, self.quarantine.why(agent_id)) for agent_id, last in held]
        if self.attempt is not None:
            commands += self._take(self.attempt.resume(self.now))
            commands += self._to_round(rounds.FleetChanged(self._available))
        return self._finish_step(commands)

    def step(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take one event at `now`, and return what is to be done. A peer can never make it raise."""
        self.now = max(self.now, now)
        if self.state in FINAL:
            return self._after_the_end(event)
        commands = self._settle()
        if self.state not in FINAL:
            commands += self._apply(event)
        return self._finish_step(commands)

    def end_turn(self) -> list[ev.Command]:
        """What the steps since the last call add up to: acknowledgements that are due, and what has changed, to be saved.

        It comes after any number of steps, and before anything that they decided is performed.
        """
        commands: list[ev.Command] = []
        if self.attempt is not None and self.state not in FINAL:
            commands += self.attempt.acknowledge(self.now)
        commands += self._save_attempt()
        if self.tallies.changed:
            self.tallies.changed = False
            commands.append(ev.SaveTallies(dict(self.tallies.counts)))
        commands += self._unsaved.run(self.state, self.reason, self.current_round - 1, self.best)
        if self.state is not self._told_state:
            self._told_state = self.state
            commands.append(ev.RunChanged(self.state, self.reason))
        return commands

    def raise_epoch(self, epoch: int) -> list[ev.Command]:
        """This coordinator has a higher epoch now: agents that still work are told."""
        self.epoch = epoch
        if self.attempt is None or self.state in FINAL:
            return []
        return self._take(self.attempt.renew(epoch, self.now))

    def deadline(self) -> float:
        """When time alone changes something; infinity where it never does."""
        if self.state in FINAL:
            return math.inf
        at = min(self._pause_until, self._roll_call_due_at())
        if self.attempt is not None:
            return min(at, self.attempt.deadline(), self._heard_by)
        return min(at, self._starts_by) if self._may_fail_to_start() else at

    def frame_verdict(self, agent_id: str, frame: Frame, topic_index: int) -> Verdict:
        """What to do with a frame that came under this agent's topic. Changes nothing."""
        return Verdict.STALE if self.attempt is None else self.attempt.frame_verdict(agent_id, frame, topic_index)

    def status(self) -> str:
        """One line for a person: what the run is doing, what is missing, and until when."""
        match self.state:
            case RunState.PREPARING:
                return "making the initial model"
            case RunState.WAITING if not self._connected:
                return "waiting for the broker"
            case RunState.WAITING if self._pause_until < math.inf:
                return f"attempt {self._num_attempts} failed; trying again in {in_words(self._pause_until - self.now)}"
            case RunState.WAITING if not self._started:
                there = f"{self.num_available} of {self.config.num_to_start} are there"
                return f"waiting for agents: {there} (at most {in_words(self._starts_by - self.now)}){self._misfits}"
            case RunState.WAITING:
                return f"waiting for the evaluation of round {min(self.scoring.owed, default=0)}"
            case RunState.IN_ROUND if self.attempt is not None:
                selecting = self.attempt.round.state is RoundState.SELECTING
                said = self.attempt.round.status(self.now) + (self._misfits if selecting else "")
                return f"round {self.current_round} of {self.config.rounds}: {said}"
            case RunState.FINISHING:
                return "evaluating the final model"
            case RunState.DONE:
                return f"done: {self.config.rounds} rounds"
            case RunState.FAILED | RunState.STOPPED:
                return f"{self.state}: {self.reason}"
            case _:
                return f"publishing the model of round {self.current_round - 1}"

    def wait(self) -> Wait | None:
        """What it waits for; None once it is over."""
        match self.state:
            case RunState.PREPARING | RunState.PUBLISHING:
                return Wait("publishing" if self.version else "model")
            case RunState.IN_ROUND if self.attempt is not None:
                return self.attempt.round.wait()
            case RunState.WAITING if not (self._connected and self._started):
                until = math.inf if self._started else self._starts_by
                return Wait("agents" if self._connected else "broker", self.num_missing, until)
            case RunState.WAITING if self._pause_until < math.inf:
                return Wait("pause", 0, self._pause_until)
            case RunState.WAITING | RunState.FINISHING:
                return Wait("evaluation")
            case _:
                return None

    @property
    def best(self) -> tuple[int, float] | None:
        """Round and value of the best version so far."""
        return self.scoring.best

    @property
    def num_available(self) -> int:
        """How many agents could take part now."""
        return len(self._available)

    @property
    def num_missing(self) -> int:
        """How many more agents must be there before the run can go on."""
        needed = self.config.round.minimum if self._started else self.config.num_to_start
        return max(0, needed - self.num_available)

    @property
    def _misfits(self) -> str:
        return self._muster.misfits(self._num_attempts)

    @property
    def _available(self) -> frozenset[str]:
        return self._muster.available(self._num_attempts)

    @property
    def _address(self) -> Address:
        return Address(self.config.run_id, self.epoch, self.current_round, self._num_attempts)

    @property
    def current_round(self) -> int:
        """The round that is under way, or that comes next."""
        return (self.version.round_num if self.version else 0) + 1

    def check(self) -> None:
        """Assert the invariants that hold between any two steps."""
        pending = 0
        if self.attempt is not None:
            self.attempt.check()
            assert self.attempt.round.round_num == self.current_round, "I1: a round that does not follow its base"
            pending = sum(1 for transfer in self.attempt.uplink.transfers.values() if transfer.header is not None)
        received, settled = self.tallies.num_received, self.tallies.num_settled
        assert received == settled + pending, f"I9: received {received}, settled {settled}, pending {pending}"
        assert len(self.scoring.owed) <= 3, "evaluations pile up"  # two that an earlier process left, and one

    # What events do.

    def _apply(self, event: ev.Event) -> list[ev.Command]:
        match event:
            case ev.FrameStored():
                return self._take(self.attempt.on_frame(event, self.now)) if self.attempt else []
            case ev.UpdateOffered():
                return self._on_offer(event)
            case ev.MessageCame(agent_id, message):
                return self._take(self.attempt.on_message(agent_id, message, self.now)) if self.attempt else []
            case ev.FrameDropped(agent_id, verdict):
                if self.attempt is not None:
                    self.attempt.on_dropped_frame(agent_id, verdict, self.now)
            case ev.FleetMoved(agent_id, change):
                return self._on_fleet(agent_id, change)
            case ev.ModelPrepared() if self.version is None:
                return self._on_prepared(event)
            case ev.PreparationFailed(reason) if self.version is None:
                self._end(RunState.FAILED, reason)
            case ev.BrokerConnected():
                self._connected = True
                self._forget_publication()
                self._roll_call_at = self.now + _ROLL_CALL_EVERY_S
                self._heard_by = self.now + _HEARD_WITHIN_S
                return [ev.CallRoll()]  # whatever the run does: nobody is known to be here any more
            case ev.BrokerLost():
                self._connected = False
                self._heard_by = math.inf
                self._forget_publication()
            case ev.ModelPublished(round_num):
                return self._on_published(round_num)
            case ev.UpdatesAggregated(digest, delta_norm, server_state):
                self._delta_norm = delta_norm
                self._server_state = server_state
                return self._to_round(rounds.Aggregated(digest))
            case ev.AggregationBroke(reason):
                return self._to_round(rounds.AggregationFailed(reason))
            case ev.ModelEvaluated():
                return self._on_evaluated(event)
            case ev.CloseAsked():
                return self._to_round(rounds.CloseRequested())
            case ev.StopAsked():
                self._end(RunState.STOPPED, "stopped by the operator; start it again to go on")
        return []

    def _on_prepared(self, event: ev.ModelPrepared) -> list[ev.Command]:
        self._take_layout(event.layout, event.framing)
        self.version = Version(0, event.digest)
        self._starts_by = self.now + self.config.start_deadline_s
        return [ev.SaveVersion(0, event.digest, None), *self.scoring.begin(self.version)]

    def _on_published(self, round_num: int) -> list[ev.Command]:
        if self.version is None or round_num != self.version.round_num or self._publishing_since is None:
            return []
        duration_s = self.now - self._publishing_since
        self._publishing_since = None
        self._published = True
        return [ev.PhaseEnded(round_num, "publishing", duration_s)]

    def _on_fleet(self, agent_id: str, change: Change) -> list[ev.Command]:
        commands: list[ev.Command] = []
        if agent_id in self.quarantine.held and agent_id not in self._available and change is not Change.LEFT:
            commands += quarantined(agent_id, self.quarantine, self._address)
        if self.attempt is None:
            return commands
        changed = rounds.FleetChanged(self._available)
        if change is Change.LEFT:
            return self._to_round(changed) + self._to_round(rounds.AgentLost(agent_id))
        return commands + self._to_round(rounds.AgentReturned(agent_id)) + self._to_round(changed)

    def _give_up_unheard(self) -> list[ev.Command]:
        """Lose the members of the cohort that answered no roll call since our connection was lost."""
        awaited = self.attempt.round.awaited if self.attempt is not None else ()
        available = self._available
        unheard = [agent_id for agent_id in awaited if agent_id not in available]
        return [command for agent_id in unheard for command in self._to_round(rounds.AgentLost(agent_id))]

    def _on_offer(self, event: ev.UpdateOffered) -> list[ev.Command]:
        self.tallies.add("received")
        received = ev.UpdateReceived(event.agent_id)
        if self.attempt is not None:
            return [received, *self._take(self.attempt.on_offer(event, self.now))]
        self.tallies.add("late", "stale")
        late = ev.UpdateSettled(event.agent_id, "late", "stale")
        return [received, late, *turn_away(event.agent_id, event.header, self.epoch)]

    # The current attempt.

    def _to_round(self, event: rounds.Event) -> list[ev.Command]:
        return self._take(self.attempt.step(event, self.now)) if self.attempt is not None else []

    def _take(self, outputs: list[Output]) -> list[ev.Command]:
        """Carry out what an attempt decided about the run, and pass on the rest."""
        commands: list[ev.Command] = []
        for output in outputs:
            match output:
                case rounds.Check(digest):
                    commands.append(ev.EvaluateModel(self.current_round, digest))
                case rounds.Commit(digest):
                    commands += self._commit(digest)
                case rounds.Abandon(reason):
                    commands += self._abandon(reason)
                case _:
                    commands.append(output)
        return commands

    def _on_evaluated(self, event: ev.ModelEvaluated) -> list[ev.Command]:
        """A version was evaluated, or the candidate of the round under way."""
        attempt = self.attempt
        if attempt is not None and attempt.round.state is RoundState.CHECKING and event.round_num == self.current_round:
            return self._judge(event, attempt)
        if self.version is not None and event.round_num == self.version.round_num:
            impossible = self.judging.take(event)
            if impossible:
                self._end(RunState.FAILED, impossible)
        return self.scoring.take(event)

    def _judge(self, event: ev.ModelEvaluated, attempt: Attempt) -> list[ev.Command]:
        """Commit the candidate, or refuse it and have the next attempt do without the update that reached furthest."""
        objection = self.judging.objection(event)
        if not objection:
            return self._to_round(rounds.CandidatePassed())
        machine = attempt.round
        left_out = self._to_leave_out(machine) if event.score is not None else ()
        reason = f"the candidate was refused: {objection}"
        commands: list[ev.Command] = [
            ev.DiscardModel(machine.digest, self._server_state),
            ev.CandidateJudged(machine.round_num, machine.attempt, reason, left_out),
        ]
        for agent_id in left_out:
            commands += self._take(attempt.strike(agent_id, HELD_OUT))
            reason += f"; the update of {agent_id} reached furthest, and is left out of this round"
        return commands + self._to_round(rounds.CandidateRefused(reason, left_out))

    def _to_leave_out(self, machine: Round) -> tuple[str, ...]:
        """Whose update the next attempt is to do without; nobody where too few would be left."""
        reported = machine.reported
        spare = self._available - machine.members.keys()
        if len(reported) - 1 + len(spare) < self.config.round.quorum:
            return ()
        return (furthest((agent_id, self.accepted[agent_id].norm) for agent_id in reported),)

    def _open_round(self) -> list[ev.Command]:
        self._started = True
        self._num_attempts += 1
        machine = Round(
            self.config.round,
            self.current_round,
            self._num_attempts,
            self.config.seed,
            self.now,
            left_out=self._left_out,
        )
        machine.failures = dict(self._failures)
        self.attempt = self._make_attempt(machine)
        note = ev.RoundOpened(machine.round_num, self._num_attempts)
        return [note, *self._to_round(rounds.FleetChanged(self._available))]

    def _make_attempt(self, machine: Round) -> Attempt:
        assert self.version is not None
        assert self.framing is not None
        assert self._gates is not None
        return Attempt(
            self.config,
            machine,
            epoch=self.epoch,
            model_digest=self.version.digest,
            server_state=self.version.server_state,
            framing=self.framing,
            gates=self._gates,
            accepted=self.accepted,
            tallies=self.tallies,
            quarantine=self.quarantine,
        )

    def _commit(self, digest: str) -> list[ev.Command]:
        assert self.attempt is not None
        assert self.version is not None
        parent, machine = self.version, self.attempt.round
        counted = [self.accepted[agent_id] for agent_id in machine.reported]
        num_examples = sum(update.num_examples for update in counted)
        duration_s = self.now - self.attempt.began_at
        saved = ev.SaveVersion(
            machine.round_num,
            digest,
            parent.digest,
            len(counted),
            num_examples,
            self._delta_norm,
            duration_s,
            machine.attempt,
            self._server_state,
        )
        commands: list[ev.Command] = [saved, *self.scoring.take_federated(parent, counted)]
        commands += self._close_round("committed", "", num_examples)
        self.version = Version(machine.round_num, digest, self._server_state)
        self.accepted = {}
        self._failures.clear()
        self._num_attempts = 0
        self._left_out = ()
        self._forget_publication()
        commands += [ev.AgentReleased(agent_id) for agent_id in self.quarantine.release(self.current_round)]
        scored = self.judging.commit()
        return commands + (self.scoring.take(scored) if scored is not None else self.scoring.begin(self.version))

    def _abandon(self, reason: str) -> list[ev.Command]:
        assert self.attempt is not None
        members = self.attempt.round.members
        self._failures.update(_unreported(members))
        self._left_out = _left_out(members)
        commands = self._close_round("abandoned", reason, 0)
        if self._num_attempts >= self.config.max_attempts:
            tries = f"round {self.current_round} was abandoned {self._num_attempts} times"
            self._end(RunState.FAILED, f"{tries}, the last time: {reason}")
        elif self._connected:  # maybe it failed for want of an agent whose birth was lost
            self._roll_call_at = self.now + _ROLL_CALL_EVERY_S
            commands.append(ev.CallRoll())
            if self._published and self.version is not None:
                # Or since the broker lost a part of the model, or somebody put something else in its place.
                commands.append(ev.PublishModel(self.version.round_num, self.version.digest))
        self._pause_until = self.now + min(_FIRST_PAUSE_S * 2.0 ** (self._num_attempts - 1), _LONGEST_PAUSE_S)
        return commands

    def _close_round(self, outcome: str, reason: str, num_examples: int) -> list[ev.Command]:
        assert self.attempt is not None
        machine = self.attempt.round
        norms = tuple(self.accepted[agent_id].norm for agent_id in machine.reported)
        commands = self._take(self.attempt.close(self.now)) + self._save_attempt()
        ended = ev.RoundEnded(
            machine.round_num,
            machine.attempt,
            outcome,
            reason,
            self.now - self.attempt.began_at,
            len(norms),
            num_examples,
            self._delta_norm if outcome == "committed" else 0.0,
            norms,
        )
        self.attempt = None
        return [*commands, ended]

    # From one step to the next.

    def _settle(self) -> list[ev.Command]:
        """Apply what the passing of time decides, before an event is looked at."""
        commands: list[ev.Command] = []
        if self.attempt is not None and self.now >= self.attempt.round.deadline():
            commands = self._to_round(rounds.TimePassed())
        if self.now >= self._heard_by:
            self._heard_by = math.inf
            commands += self._give_up_unheard()
        if self.now >= self._pause_until:
            self._pause_until = math.inf
            commands += self._go_on()
        self._settle_start()
        return commands

    def _settle_start(self) -> None:
        if self._may_fail_to_start() and self.now >= self._starts_by:
            within = f"within {self.config.start_deadline_s:g} s"
            came = f"{self.num_available} of {self.config.num_to_start} agents came {within}"
            setting = "start_agents" if self.config.start_agents == self.config.num_to_start else "min_agents"
            cure = f"start more agents, or lower {setting}" if self._connected else "the broker cannot be reached"
            self._end(RunState.FAILED, f"{came}; {cure}{self._misfits}")

    def _may_fail_to_start(self) -> bool:
        return not self._started and self.state is RunState.WAITING

    def _go_on(self) -> list[ev.Command]:
        """Go as far as possible without another event."""
        commands: list[ev.Command] = []
        while self.state not in FINAL:
            self.state, more = self._advance()
            commands += more
            if not more:
                break
        return commands

    def _finish_step(self, commands: list[ev.Command]) -> list[ev.Command]:
        """Go as far as possible without another event."""
        commands += self._go_on()
        self._settle_start()
        if self.state not in FINAL and self.now >= self._roll_call_due_at():
            self._roll_call_at = self.now + _ROLL_CALL_EVERY_S
            commands.append(ev.CallRoll())
        return commands

    def _advance(self) -> tuple[RunState, list[ev.Command]]:
        """The state to be in now, and commands where a step towards the next round could be taken."""
        if self.version is None:
            return RunState.PREPARING, []
        here = RunState.PUBLISHING if self.attempt is None else RunState.IN_ROUND
        if self._connected and not self._published and self._publishing_since is None:
            self._publishing_since = self.now
            return here, [ev.PublishModel(self.version.round_num, self.version.digest)]
        if self.attempt is not None:
            return RunState.IN_ROUND, []
        is_last = self.version.round_num >= self.config.rounds
        if self._connected and not self._published:
            return RunState.PUBLISHING, []
        if is_last:  # also where the broker is gone: the model is stored
            return (RunState.FINISHING if self.scoring.owed else RunState.DONE), []
        if not self._connected:
            return RunState.WAITING, []
        if len(self.scoring.owed) > 1 or self._pause_until < math.inf:
            return RunState.WAITING, []
        if not self._started and self.num_available < self.config.num_to_start:
            return RunState.WAITING, []
        return RunState.IN_ROUND, self._open_round()

    def _end(self, state: RunState, reason: str) -> None:
        self.state = state
        self.reason = reason

    def _after_the_end(self, event: ev.Event) -> list[ev.Command]:
        """Agents that have not heard of the end are told that their work is not wanted."""
        if isinstance(event, ev.UpdateOffered) and self.state is not RunState.STOPPED:
            return [*turn_away(event.agent_id, event.header, self.epoch, "run_ended")]
        return []

    def _save_attempt(self) -> list[ev.Command]:
        return [] if self.attempt is None else self._unsaved.attempt(self.attempt.round)

    # Small helpers.

    def _restore(self, resumed: Resumed) -> None:
        self._take_layout(resumed.layout, resumed.framing)
        self.version = resumed.version
        self.scoring.restore(resumed.best, resumed.unevaluated)
        self.tallies = Tallies(resumed.tallies)
        self.quarantine.release(resumed.version.round_num + 1)
        self.accepted = {update.agent_id: update for update in resumed.accepted}
        self._num_attempts = resumed.attempt
        self._started = resumed.attempt > 0 or resumed.version.round_num > 0
        if resumed.round_state not in (RoundState.COMMITTED, RoundState.ABANDONED):
            machine = Round.restore(
                self.config.round,
                round_num=self.current_round,
                attempt=resumed.attempt,
                seed=self.config.seed,
                now=self.now,
                state=resumed.round_state,
                members=resumed.members,
            )
            self.attempt = self._make_attempt(machine)
            self.state = RunState.IN_ROUND
        else:
            self._failures.update(_unreported(resumed.members))
            self._left_out = _left_out(resumed.members)

    def _take_layout(self, layout: Layout, framing: Framing) -> None:
        self.framing = framing
        self._gates = Gates(
            layout=layout,
            num_frames=framing.num_frames,
            max_examples=self.config.max_examples,
            norm_bound=self.config.norm_bound,
        )

    def _forget_publication(self) -> None:
        self._published = False
        self._publishing_since = None

    def _roll_call_due_at(self) -> float:
        """When to call the roll: soon where agents are wanted, else now and then, since a birth may have been lost."""
        if not self._connected or self.version is None:
            return math.inf
        return self._roll_call_at + (0.0 if self._wants_agents() else _ROLL_CALL_AT_LEAST_EVERY_S)

    def _wants_agents(self) -> bool:
        if self.attempt is not None:
            return self.attempt.round.state is RoundState.SELECTING
        return not self._started


def _left_out(members: Mapping[str, MemberState]) -> tuple[str, ...]:
    return tuple(sorted(agent_id for agent_id, state in members.items() if state is MemberState.LEFT_OUT))


def _unreported(members: Mapping[str, MemberState]) -> list[str]:
    return [agent_id for agent_id, state in members.items() if state is not MemberState.REPORTED]
