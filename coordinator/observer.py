"""The observer: turns what happens into log lines, metrics and the board. Nothing depends on it.

What an agent says of itself reaches terminals through the board: there, as in the log, what is not printable is escaped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from coordinator import run_events as ev
from coordinator.board import AgentView, Shared
from coordinator.cohort import Agent, AgentState, Change, Fleet
from coordinator.metrics import Metrics
from coordinator.round import MemberState
from coordinator.tracking import Tracking
from coordinator.waits import Wait
from midge.log import Throttle, log_event
from midge.transport.base import Connected, Disconnected

_log = logging.getLogger("coordinator")

_RUN_STATES = {
    "preparing": "waiting",
    "waiting": "waiting",
    "publishing": "running",
    "in_round": "running",
    "finishing": "running",
}
_TELL_AFTER_S = 10.0
"""A wait that lasts so long is in the log, and again each time that it has become three times as long."""
_MAX_GONE = 1000
"""Agents that are gone and still shown, the last that left."""
_AFTER_ACCEPTANCE = (MemberState.ACCEPTED, MemberState.REPORTED, MemberState.REJECTED)


class Watch:
    """An `Observer`.

    Args:
        metrics: what Prometheus sees.
        shared: the board.
        clock: monotonic seconds.
    """

    def __init__(self, metrics: Metrics, shared: Shared, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_id = ""
        self.target = 0
        self.quorum = 0
        self._metrics = metrics
        self._shared = shared
        self._clock = clock
        self._refusals_logged, self._rejections_logged = Throttle(), Throttle()
        self._fleet = Fleet()
        self._misfits: dict[str, str] = {}
        self._wait_key: tuple[str, int, int] | None = None
        self._waits_since = 0.0
        self._shown_wait: Wait | None = None
        self._tell_at = math.inf
        self._incarnations: dict[str, tuple[str, str]] = {}
        """Of each agent, the one before the current one and the current one."""
        self._twins: set[str] = set()
        self._gone: dict[str, None] = {}
        """Agents that are shown as gone, in the order in which they left."""
        self.tracking: Tracking | None = None
        """What experiment trackers are told; None where there is none."""

    def begin_run(self, run_id: str, target: int, quorum: int) -> None:
        """From now on it is this run that things happen to."""
        if self.run_id and self.run_id != run_id:
            self._metrics.forget_run(self.run_id)
        self.run_id, self.target, self.quorum = run_id, target, quorum
        with self._shared.lock:
            for view in self._shared.board.agents.values():
                view.quarantined_until, view.quarantine = 0, ""
        self._metrics.run_state(run_id, "waiting")

    def note(self, note: ev.Note) -> None:
        """See `Observer.note`."""
        with self._shared.lock:
            self._note(note)
        if self.tracking is not None and isinstance(note, ev.RunChanged) and note.state in ("done", "failed"):
            self.tracking.end(note.state)

    def saved(self, save: ev.Save) -> None:
        """See `Observer.saved`."""
        with self._shared.lock:
            self._saved(save)
        if self.tracking is not None:
            self.tracking.saved(save)

    def traffic(self, direction: str, kind: str, size_bytes: int) -> None:
        """See `Observer.traffic`."""
        self._metrics.message(cast("Any", direction), cast("Any", kind), size_bytes)

    def refused(self, kind: str, error: Exception) -> None:
        """See `Observer.refused`."""
        known = {"presence": "presence", "update": "update"}.get(kind, "control")
        self._metrics.invalid_message(cast("Any", known))
        self._refusals_logged.log(_log, logging.WARNING, "message refused", self._clock(), kind=kind, error=error)

    def broker(self, event: Connected | Disconnected) -> None:
        """See `Observer.broker`."""
        is_up = isinstance(event, Connected)
        self._metrics.connected(is_up)
        with self._shared.lock:
            self._shared.board.is_connected = is_up
            self._shared.board.broker_problem = "" if isinstance(event, Connected) else event.reason
            for view in self._shared.board.agents.values():
                agent = self._fleet.agents.get(view.agent_id)
                if agent is not None:
                    view.presence = agent.state  # without a connection none is known to be here
        self._count_agents()
        if isinstance(event, Connected):
            log_event(_log, logging.INFO, "broker connected", mqtt=event.version)
        else:
            level = logging.ERROR if event.fatal else logging.WARNING
            log_event(_log, level, "broker lost", reason=event.reason)

    def fleet(self, fleet: Fleet, agent_id: str, change: Change | None) -> None:
        """See `Observer.fleet`."""
        self._fleet = fleet
        self._count_agents()
        agent = fleet.agents[agent_id]
        with self._shared.lock:
            view = self._agent(agent_id)
            view.presence = agent.state
            if agent.state is AgentState.OFFLINE:
                view.activity = "offline"
                self._metrics.forget_agent(agent_id)
                self._forget_gone(agent_id)
            elif view.activity == "offline":
                view.activity = "idle"
                self._gone.pop(agent_id, None)
            if change in (Change.CAME, Change.RESTARTED):
                view.detail = self._twin(agent) or self._judge(agent)
        if change is not None:
            log_event(_log, logging.INFO, f"agent {change}", agent=agent_id, task=agent.presence.task)

    def _twin(self, agent: Agent) -> str:
        """What to say where two processes take turns under one id: a start's incarnation is new, so none comes again."""
        agent_id, incarnation = agent.agent_id, agent.presence.incarnation
        former, current = self._incarnations.get(agent_id, ("", ""))
        if incarnation == current:
            return ""
        self._incarnations[agent_id] = current, incarnation
        if incarnation != former:
            return ""
        self._metrics.id_conflict()
        if agent_id not in self._twins:
            self._twins.add(agent_id)
            event = f"two processes use the agent id {agent_id} in turn; give each its own, or end one"
            self._shared.board.add_event(event)
            hint = "give each its own, or end one"
            log_event(_log, logging.ERROR, "two processes use one agent id", agent=agent_id, hint=hint)
        return "two processes use this agent id in turn: give each its own, or end one"

    def _forget_gone(self, agent_id: str) -> None:
        """This one has left too: the last that did are shown and remembered, and not all that ever were there."""
        self._gone[agent_id] = None
        while len(self._gone) > _MAX_GONE:
            longest = next(iter(self._gone))
            del self._gone[longest]
            self._shared.board.agents.pop(longest, None)
            self._misfits.pop(longest, None)
            self._incarnations.pop(longest, None)
            self._twins.discard(longest)

    def _judge(self, agent: Agent) -> str:
        """Why an agent that is here can take no part in the run; the log has it once for each reason."""
        task = self._shared.board.task
        misfit = _printable(agent.misfit(task)) if task else ""
        if misfit and self._misfits.get(agent.agent_id) != misfit:
            log_event(
                _log,
                logging.WARNING,
                "agent cannot take part",
                run=self.run_id,
                agent=agent.agent_id,
                detail=f"it {misfit}",
            )
        self._misfits[agent.agent_id] = misfit
        return misfit

    def broker_says(self, topic: str, payload: bytes) -> None:
        """See `Observer.broker_says`."""
        self._metrics.broker_sys(topic, payload)

    def evaluated_in(self, duration_s: float) -> None:
        """An evaluation took so long."""
        if self.run_id:
            self._metrics.phase_ended(self.run_id, "evaluating", duration_s)

    def parked(self, reason: str) -> None:
        """The state directory cannot be written, and the run waits for that; or another try came to nothing."""
        self._metrics.disk_failed()
        with self._shared.lock:
            board = self._shared.board
            event = _printable(f"the disk fails, the run waits: {reason}")
            if board.events[-1:] != [event]:
                board.add_event(event)

    def unparked(self, parked_s: float) -> None:
        """It can be written again."""
        self._metrics.disk_works()
        with self._shared.lock:
            self._shared.board.add_event(f"the disk can be written again after {parked_s:.0f} s")

    def catch_up(self, saves: Sequence[ev.Save]) -> None:
        """Be told of what a write stored that then failed: who was told of it already sees no difference."""
        for save in saves:
            if isinstance(save, ev.SaveEvaluation):
                view = self._shared.board.round_view(save.round_num)
                if getattr(view, save.source) is not None:
                    continue
            self.saved(save)

    def look(self, status: str, num_missing: int, queue_bytes: int, wait: Wait | None = None, now: float = 0.0) -> None:
        """Once a turn: what the run says of itself, and what it waits for."""
        if self.run_id:
            self._metrics.waiting(self.run_id, num_missing)
        self._metrics.queue(queue_bytes)
        with self._shared.lock:
            self._shared.board.status = _printable(status)
            self._look_at_wait(wait, now)

    def _look_at_wait(self, wait: Wait | None, now: float) -> None:
        board = self._shared.board
        key = None if wait is None else (wait.reason, board.round_num, board.attempt)
        if key != self._wait_key:
            self._wait_key, self._waits_since, self._shown_wait = key, now, None
            self._tell_at = now + _TELL_AFTER_S
        if wait != self._shown_wait or wait is None:
            self._show_wait(wait, now)
        if wait is not None and now >= self._tell_at:
            waits_s = now - self._waits_since
            self._tell_at = now + 2 * waits_s
            shown: dict[str, Any] = {"missing": wait.num_missing} if wait.num_missing else {}
            if wait.until < math.inf:
                shown["left_s"] = round(wait.until - now)
            what = {"run": self.run_id, "waits_for": wait.reason, "since_s": round(waits_s), **shown}
            log_event(_log, logging.INFO, "still waiting", **what, status=board.status)

    def _show_wait(self, wait: Wait | None, now: float) -> None:
        """On the board and in metrics: they have times, which stay as they are while the wait lasts."""
        board, self._shown_wait = self._shared.board, wait
        clock = time.time()
        since = clock - (now - self._waits_since)
        until = math.inf if wait is None else clock + (wait.until - now)
        board.waiting_for, board.num_missing = ("", 0) if wait is None else (wait.reason, wait.num_missing)
        board.waiting_since = "" if wait is None else _utc(since)
        board.waiting_until = "" if until == math.inf else _utc(until)
        if self.run_id:
            self._metrics.waits(self.run_id, None if wait is None else wait.reason, since, until)

    def _count_agents(self) -> None:
        self._metrics.agents({cast("Any", str(state)): count for state, count in self._fleet.count().items()})

    def _note(self, note: ev.Note) -> None:
        board, run = self._shared.board, self.run_id
        match note:
            case ev.RunChanged(state, reason):
                board.state, board.reason = state, _printable(reason)
                self._metrics.run_state(run, cast("Any", _RUN_STATES.get(state, state)))
                level = logging.ERROR if state == "failed" else logging.INFO
                if state in ("done", "failed", "stopped"):
                    self._metrics.forget_agents()
                    log_event(_log, level, f"run {state}", run=run, **cast("Any", {"reason": reason} if reason else {}))
            case ev.RoundOpened(round_num, attempt):
                board.round_num, board.attempt = round_num, attempt
                self._metrics.round_started(run, round_num, attempt, self.target, self.quorum)
                log_event(_log, logging.DEBUG, "round opened", run=run, round=round_num, attempt=attempt)
            case ev.PhaseEnded(_, phase, duration_s):
                self._metrics.phase_ended(run, cast("Any", phase), duration_s)
            case ev.RoundEnded():
                self._round_ended(note)
            case ev.CandidateJudged(round_num, attempt, reason, left_out):
                self._metrics.candidate_refused(run)
                left = ", ".join(left_out) or "nobody"
                at: dict[str, Any] = {"run": run, "round": round_num, "attempt": attempt}
                log_event(_log, logging.WARNING, "candidate refused", **at, reason=reason, left_out=left)
            case ev.AgentQuarantined(agent_id, last_round, detail):
                self._quarantine(agent_id, last_round, detail)
                log_event(_log, logging.WARNING, "agent quarantined", run=run, agent=agent_id, detail=detail)
            case ev.AgentReleased(agent_id):
                self._quarantine(agent_id, 0, "")
                log_event(_log, logging.INFO, "agent released from quarantine", run=run, agent=agent_id)
            case ev.AgentSpoke(agent_id, state, fraction, reason, detail):
                view = self._agent(agent_id)
                # Who took its invitation fetches the model first; "accepted" is said of updates here.
                view.activity = "fetching" if state == "accepted" else state
                view.fraction, view.detail = fraction, _printable(detail)
                if state == "refused":
                    self._metrics.refusal(run, reason)
                    fields = {"run": run, "round": board.round_num, "agent": agent_id}
                    log_event(
                        _log, logging.WARNING, "agent refused", **cast("Any", fields), reason=reason, detail=detail
                    )
            case ev.UpdateReceived():
                self._metrics.update_received(run)
            case ev.MessageStale(kind):
                self._metrics.stale_message(cast("Any", kind))
            case ev.UpdateSettled(agent_id, outcome, reason, detail):
                self._update_settled(agent_id, outcome, reason, detail)

    def _quarantine(self, agent_id: str, last_round: int, detail: str) -> None:
        view = self._agent(agent_id)
        if last_round and not view.quarantined_until:
            self._shared.board.add_event(f"{agent_id} is {detail}")
        view.quarantined_until, view.quarantine = last_round, detail
        agents = self._shared.board.agents.values()
        self._metrics.quarantined(self.run_id, sum(bool(one.quarantined_until) for one in agents))

    def _update_settled(self, agent_id: str, outcome: str, reason: str, detail: str) -> None:
        self._metrics.update(self.run_id, cast("Any", outcome), reason or None)
        board = self._shared.board
        # A stranger that offers an update gets no line on the screen: it could invent another name with each.
        is_stranger = reason == "identity" and agent_id not in board.agents
        if outcome in ("accepted", "rejected") and not is_stranger:
            view = self._agent(agent_id)
            view.activity, view.fraction, view.detail = outcome, 1.0, _printable(detail)
        if outcome == "rejected":
            self._rejections_logged.log(
                _log,
                logging.WARNING,
                "update rejected",
                self._clock(),
                run=self.run_id,
                round=board.round_num,
                agent=agent_id,
                reason=reason,
                detail=detail,
            )

    def _round_ended(self, note: ev.RoundEnded) -> None:
        run = self.run_id
        self._metrics.round_ended(run, cast("Any", note.outcome), note.duration_s)
        address: dict[str, Any] = {"run": run, "round": note.round_num, "attempt": note.attempt}
        if note.outcome == "committed":
            self._metrics.committed(run, note.round_num, note.num_examples, note.delta_norm, note.update_norms)
            log_event(
                _log,
                logging.INFO,
                "round committed",
                **address,
                updates=note.num_updates,
                examples=note.num_examples,
                duration_s=round(note.duration_s, 3),
            )
        else:
            event = f"round {note.round_num}, attempt {note.attempt} abandoned: {note.reason}"
            self._shared.board.add_event(_printable(event))
            log_event(_log, logging.WARNING, "round abandoned", **address, reason=note.reason)
        for view in self._shared.board.agents.values():
            if view.activity not in ("offline", "refused"):
                view.activity, view.fraction = "idle", 0.0

    def _saved(self, save: ev.Save) -> None:
        board, run = self._shared.board, self.run_id
        match save:
            case ev.SaveUpdate(round_num, update):
                board.add_update(round_num, update)
                score = update.evaluation
                self._metrics.agent_reported(
                    run,
                    update.agent_id,
                    norm=update.norm,
                    training_loss=update.metrics.get("loss"),
                    loss=None if score is None else score.loss,
                    accuracy=None if score is None else score.metrics.get("accuracy"),
                )
            case ev.SaveVersion():
                view = board.round_view(save.round_num)
                view.duration_s, view.num_updates = save.duration_s, save.num_updates
                view.num_examples, view.delta_norm = save.num_examples, save.delta_norm
                view.attempts = save.attempts
            case ev.SaveEvaluation(round_num, source, score):
                setattr(board.round_view(round_num), source, score)
                self._metrics.evaluated(run, cast("Any", source), score.loss, score.metrics)
                log_event(
                    _log,
                    logging.INFO,
                    "model evaluated",
                    run=run,
                    round=round_num,
                    source=source,
                    loss=score.loss,
                    **cast("Any", dict(score.metrics)),
                )
            case ev.SaveRun():
                board.best_round, board.best_value = save.best_round, save.best_value
                if save.best_value is not None:
                    self._metrics.best(run, save.best_value)
            case ev.SaveAttempt():
                states = [state for state in save.members.values() if state is not MemberState.LEFT_OUT]
                accepted = sum(state in _AFTER_ACCEPTANCE for state in states)
                self._metrics.cohort(run, len(states), accepted, states.count(MemberState.REPORTED))
                for agent_id, state in save.members.items():
                    member = self._agent(agent_id)
                    if state is MemberState.INVITED:
                        member.activity, member.fraction, member.detail = "invited", 0.0, ""
                    elif state is MemberState.LOST:
                        member.activity = "lost"
                    elif state is MemberState.LEFT_OUT:
                        member.activity = "left out"
            case _:
                pass

    def _agent(self, agent_id: str) -> AgentView:
        agents = self._shared.board.agents
        if agent_id not in agents:
            agents[agent_id] = AgentView(agent_id)
        return agents[agent_id]


def _utc(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
