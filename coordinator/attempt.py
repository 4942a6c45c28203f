"""One attempt at a round, with its messages: what is said to the agents, and which of their updates count.

It wraps the machine of the round (round.py: who, how long, which end) with the transfers (uplink.py: which frames) and
the gates (admission.py: which updates). Pure like them. What the round machine decides about the whole, `Commit` and
`Abandon`, passes through to the run, which owns the versions.

Each update's header is counted once as received and, sooner or later, once as exactly one of accepted, rejected, late or
duplicate (invariant I9). A message that does not match the current (run, epoch, round, attempt) is stale: counted, and
answered where that helps its sender.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from coordinator import round_events as rounds
from coordinator import run_events as ev
from coordinator.admission import Gates, Rejection
from coordinator.quarantine import CONTENT_REASONS, Quarantine, Strike
from coordinator.round import WAITING, MemberState, Round, RoundState
from coordinator.run_config import RunConfig
from coordinator.uplink import Uplink, Verdict
from midge.wire.frames import Frame, Framing, run_tag
from midge.wire.messages import (
    Acceptance,
    Cancel,
    CancelReason,
    Credit,
    Invitation,
    Progress,
    Receipt,
    Refusal,
    ToCoordinator,
    UpdateHeader,
)

_MAX_DIGEST_RETRIES = 2
_MAX_REPLACEMENTS = 8
"""An agent that keeps changing its update would else fill the spool, which forgets frames but keeps their bytes."""
_SHOWN_DETAIL = 120
"""Characters of what an agent says of its refusal that go into the reason of an abandoned round."""

Output = ev.Command | rounds.Check | rounds.Commit | rounds.Abandon
M = TypeVar("M", Invitation, Credit, Receipt, Cancel)


class Address(NamedTuple):
    """What a message of a round must carry to be current."""

    run_id: str
    epoch: int
    round_num: int
    attempt: int

    def on(self, kind: type[M], **fields: Any) -> M:
        """A message of this kind to this address."""
        return kind(**self._asdict(), **fields)


def address_of(message: ToCoordinator) -> Address:
    """What a message of an agent carries."""
    return Address(message.run_id, message.epoch, message.round_num, message.attempt)


class Tallies:
    """Counts of updates by (outcome, reason) over a whole run."""

    def __init__(self, counts: Mapping[tuple[str, str], int] | None = None) -> None:
        self.counts: Counter[tuple[str, str]] = Counter(counts or {})
        self.changed = False
        unsettled = self.num_received - self.num_settled
        if unsettled:  # announced, and not settled when the process ended: they will be offered again
            self.add("late", "restart", unsettled)

    @property
    def num_received(self) -> int:
        """Headers that came."""
        return self.counts["received", ""]

    @property
    def num_settled(self) -> int:
        """Headers that met their fate."""
        return self.counts.total() - self.num_received

    def add(self, outcome: str, reason: str = "", count: int = 1) -> None:
        """Count."""
        self.counts[outcome, reason] += count
        self.changed = True


class Attempt:
    """The attempt. Its methods take what came and return what is to be done, in order.

    Args:
        config: the run's.
        round_machine: new or restored.
        epoch: of this coordinator.
        model_digest: of the version that this round starts from.
        server_state: of that version, what the strategy remembers.
        framing: the run's.
        gates: the run's.
        accepted: updates of this round that count, of this and earlier attempts; shared with the run.
        tallies: the run's; shared.
        quarantine: the run's; shared.
    """

    def __init__(
        self,
        config: RunConfig,
        round_machine: Round,
        *,
        epoch: int,
        model_digest: str,
        server_state: str | None = None,
        framing: Framing,
        gates: Gates,
        accepted: dict[str, ev.AcceptedUpdate],
        tallies: Tallies,
        quarantine: Quarantine,
    ) -> None:
        self.config = config
        self.round = round_machine
        self.uplink = Uplink(framing)
        self.address = Address(config.run_id, epoch, round_machine.round_num, round_machine.attempt)
        self.model_digest = model_digest
        self.server_state = server_state
        self.accepted = accepted
        self.tallies = tallies
        self.quarantine = quarantine
        self.began_at = self.phase_began_at = round_machine.now
        self._gates = gates
        self._is_selecting = round_machine.state is RoundState.SELECTING
        self._run_tag = run_tag(config.run_id)
        self._rejections: dict[str, Rejection] = {}
        self._replacements: Counter[str] = Counter()

    def step(self, event: rounds.Event, now: float) -> list[Output]:
        """Hand an event to the machine of the round."""
        return self._translate(self.round.step(event, now), now)

    def resume(self, now: float) -> list[Output]:
        """What a restored attempt does first."""
        return self._translate(self.round.resume(), now)

    def renew(self, epoch: int, now: float) -> list[Output]:
        """This coordinator has a higher epoch now: invite again whoever is still awaited."""
        self.address = self.address._replace(epoch=epoch)
        return self._invite(self.round.awaited, now) if self.round.state is RoundState.COLLECTING else []

    def deadline(self) -> float:
        """When time alone changes something."""
        return min(self.round.deadline(), self.uplink.deadline())

    def frame_verdict(self, agent_id: str, frame: Frame, topic_index: int) -> Verdict:
        """What to do with a frame that came under this agent's topic. Changes nothing."""
        if frame.run_tag != self._run_tag or frame.round_num != self.round.round_num:
            return Verdict.STALE
        if not self.round.is_open_to(agent_id):
            return Verdict.STALE
        if frame.index != topic_index:
            return Verdict.MALFORMED
        return self.uplink.verdict(agent_id, frame.content_tag, frame.index, frame.num_elements)

    # What agents send.

    def on_message(self, agent_id: str, message: Acceptance | Refusal | Progress, now: float) -> list[Output]:
        """An acceptance, a refusal or a word of progress."""
        if address_of(message) != self.address or not self.round.is_open_to(agent_id):
            return []
        match message:
            case Progress(phase=phase, fraction=fraction):
                return [ev.AgentSpoke(agent_id, phase, fraction)]
            case Acceptance():
                return [ev.AgentSpoke(agent_id, "accepted"), *self.step(rounds.AgentAccepted(agent_id), now)]
            case Refusal(reason=reason, detail=detail):
                note = ev.AgentSpoke(agent_id, "refused", 0.0, reason, detail)
                dropped = self._drop_transfer(agent_id, now)
                why = f"{reason}: {detail[:_SHOWN_DETAIL]}" if detail else reason
                return [note, *dropped, *self.step(rounds.AgentRefused(agent_id, why), now)]

    def on_offer(self, event: ev.UpdateOffered, now: float) -> list[Output]:
        """The header of an update."""
        agent_id, header = event.agent_id, event.header
        if address_of(header) != self.address:
            return self._on_stale_offer(agent_id, header, now)
        state = self.round.state_of(agent_id)
        if state is None:
            return self._reject(agent_id, header, Rejection("identity", "was not invited to this round"), now)
        if state is MemberState.REPORTED:
            return [self._settle(agent_id, "duplicate"), self._answer_again(agent_id, header)]
        if agent_id in self._rejections:
            receipt = self._reject_receipt(agent_id, header, self._rejections[agent_id])
            return [self._settle(agent_id, "duplicate"), receipt]
        if not self.round.is_open_to(agent_id):
            return [self._settle(agent_id, "late", "closed"), cancel(agent_id, self.address)]
        rejection = self._gates.check_header(header, self.model_digest)
        if rejection is not None:
            return self._reject(agent_id, header, rejection, now)
        if self._replacements[agent_id] >= _MAX_REPLACEMENTS and self._known_digest(agent_id) != header.update_digest:
            changed = f"offered {_MAX_REPLACEMENTS + 2} different updates in one attempt: training must repeat its bits"
            return self._reject(agent_id, header, Rejection("digest", changed), now)
        outputs = self._begin_transfer(event, now)
        if state is not MemberState.ACCEPTED:
            outputs += self.step(rounds.AgentAccepted(agent_id), now)
        return outputs + self._judge(agent_id, now)

    def on_frame(self, event: ev.FrameStored, now: float) -> list[Output]:
        """A wanted frame is in the spool."""
        if event.agent_id not in self.uplink.transfers:
            return []
        self.uplink.store(event.agent_id, event.index, event.facts, now)
        return self._judge(event.agent_id, now)

    def on_dropped_frame(self, agent_id: str, verdict: Verdict, now: float) -> None:
        """A frame came that is not wanted; where its sender has lost count, tell it what is missing."""
        if verdict in (Verdict.UNANNOUNCED, Verdict.DUPLICATE) and agent_id in self.uplink.transfers:
            self.uplink.remind(agent_id, now)

    # What is told unasked.

    def acknowledge(self, now: float) -> list[ev.Command]:
        """The acknowledgements that are due."""
        return [
            ev.Send(
                due.agent_id,
                self.address.on(Credit, missing=due.missing, credit=due.credit, need_header=due.need_header),
            )
            for due in self.uplink.acknowledgements(now)
        ]

    def close(self, now: float) -> list[Output]:
        """The attempt is over: every update that was announced and did not make it is late."""
        outputs: list[Output] = []
        for agent_id in list(self.uplink.transfers):
            outputs += self._drop_transfer(agent_id, now)
        return outputs

    # Judging updates.

    def _begin_transfer(self, event: ev.UpdateOffered, now: float) -> list[Output]:
        self.uplink.invite((event.agent_id,))
        known = self.uplink.transfers[event.agent_id].header
        self.uplink.offer(event.header, event.agent_id, event.stored, now)
        if known is None:
            return []
        if known.update_digest == event.header.update_digest:
            return [self._settle(event.agent_id, "duplicate")]
        self._replacements[event.agent_id] += 1
        return self._replace(event.agent_id, known)

    def _known_digest(self, agent_id: str) -> str:
        transfer = self.uplink.transfers.get(agent_id)
        return transfer.header.update_digest if transfer is not None and transfer.header is not None else ""

    def _judge(self, agent_id: str, now: float) -> list[Output]:
        """Decide about an update once it is complete."""
        transfer = self.uplink.transfers.get(agent_id)
        header = None if transfer is None else transfer.header
        if header is None or not self.uplink.is_complete(agent_id):
            return []
        norm = self.uplink.norm(agent_id)
        rejection = self._gates.check_update(header, self.uplink.digest(agent_id), norm)
        if rejection is None:
            return self._accept(agent_id, header, norm, now)
        forget = ev.ForgetFrames(agent_id, header.update_digest)
        if rejection.reason == "digest" and self.uplink.restart(agent_id, now) <= _MAX_DIGEST_RETRIES:
            return [forget]
        return [forget, *self._reject(agent_id, header, rejection, now)]

    def _accept(self, agent_id: str, header: UpdateHeader, norm: float, now: float) -> list[Output]:
        update = ev.AcceptedUpdate(
            agent_id=agent_id,
            attempt=self.round.attempt,
            update_digest=header.update_digest,
            num_examples=header.num_examples,
            counters=header.counters,
            norm=norm,
            training_s=header.training_s,
            metrics=header.metrics,
            evaluation=header.evaluation,
        )
        self.accepted[agent_id] = update
        self.uplink.end(agent_id, now)
        outputs: list[Output] = [ev.SaveUpdate(self.round.round_num, update), self._settle(agent_id, "accepted")]
        return [*outputs, self._accept_receipt(agent_id), *self.step(rounds.UpdateAccepted(agent_id), now)]

    def _reject(self, agent_id: str, header: UpdateHeader, rejection: Rejection, now: float) -> list[Output]:
        struck: list[Output] = []
        if self.round.state_of(agent_id) is not None and rejection.reason in CONTENT_REASONS:
            struck = self.strike(agent_id, rejection.reason)
            if agent_id in self.quarantine.held:
                rejection = Rejection(rejection.reason, f"{self.quarantine.why(agent_id)}; {rejection.detail}")
        outputs: list[Output] = [self._reject_receipt(agent_id, header, rejection), *struck]
        if self.round.state_of(agent_id) is not None:
            self._rejections[agent_id] = rejection
            outputs += self._end_transfer(agent_id, header, now)
        outputs.append(self._settle(agent_id, "rejected", rejection.reason, rejection.detail))
        if self.round.is_open_to(agent_id):
            outputs += self.step(rounds.UpdateRejected(agent_id, rejection.reason), now)
        return outputs

    def strike(self, agent_id: str, reason: str) -> list[Output]:
        """Note a strike against an agent; it is told where that puts it into quarantine."""
        strike = Strike(self.round.round_num, self.round.attempt, agent_id, reason)
        outputs: list[Output] = [ev.SaveStrike(strike)]
        if self.quarantine.add(strike):
            outputs += quarantined(agent_id, self.quarantine, self.address)
        return outputs

    def _end_transfer(self, agent_id: str, header: UpdateHeader, now: float) -> list[Output]:
        """End the transfer under way, if there is one; it may be of another update than the one of `header`."""
        transfer = self.uplink.transfers.get(agent_id)
        known = None if transfer is None else transfer.header
        self.uplink.end(agent_id, now)
        return [] if known is None or known is header else self._replace(agent_id, known)

    def _replace(self, agent_id: str, known: UpdateHeader) -> list[Output]:
        """An update gives way to another: it is late, and its frames must not fill the disk."""
        return [ev.ForgetFrames(agent_id, known.update_digest), self._settle(agent_id, "late", "replaced")]

    def _on_stale_offer(self, agent_id: str, header: UpdateHeader, now: float) -> list[Output]:
        """It belongs to another attempt, epoch, round or run: tell its sender what became of it, so that it stops asking."""
        address = address_of(header)
        if address.epoch > self.address.epoch:
            return [self._settle(agent_id, "late", "stale"), *turn_away(agent_id, header, self.address.epoch)]
        same_round = address.run_id == self.address.run_id and address.round_num == self.address.round_num
        known = self.accepted.get(agent_id)
        if same_round and known is not None and known.update_digest == header.update_digest:
            receipt = address.on(Receipt, update_digest=known.update_digest, accepted=True)
            return [self._settle(agent_id, "duplicate"), ev.Send(agent_id, receipt)]
        note = self._settle(agent_id, "late", "stale")
        if same_round and self.round.is_open_to(agent_id):
            # It does not know of our new epoch, or of the new attempt: it is invited as one that has just come.
            return [note, *self.step(rounds.AgentReturned(agent_id), now)]
        return [note, *turn_away(agent_id, header, self.address.epoch)]

    def _drop_transfer(self, agent_id: str, now: float, reason: str = "closed") -> list[Output]:
        """End a transfer; an update that was announced and did not make it is late."""
        transfer = self.uplink.transfers.get(agent_id)
        if transfer is None:
            return []
        self.uplink.end(agent_id, now)
        return [] if transfer.header is None else [self._settle(agent_id, "late", reason)]

    def _settle(self, agent_id: str, outcome: str, reason: str = "", detail: str = "") -> ev.UpdateSettled:
        self.tallies.add(outcome, reason)
        return ev.UpdateSettled(agent_id, outcome, reason, detail)

    def _accept_receipt(self, agent_id: str) -> ev.Send:
        digest = self.accepted[agent_id].update_digest
        return ev.Send(agent_id, self.address.on(Receipt, update_digest=digest, accepted=True))

    def _answer_again(self, agent_id: str, header: UpdateHeader) -> ev.Send:
        """What an agent is told whose update counts already: that it does, or that another one of it does."""
        if header.update_digest == self.accepted[agent_id].update_digest:
            return self._accept_receipt(agent_id)
        return cancel(agent_id, self.address, "closed")

    def _reject_receipt(self, agent_id: str, header: UpdateHeader, rejection: Rejection) -> ev.Send:
        receipt = address_of(header).on(
            Receipt,
            update_digest=header.update_digest,
            accepted=False,
            reason=rejection.reason,
            detail=rejection.detail[:500],
        )
        return ev.Send(agent_id, receipt)

    # What the machine of the round decides.

    def _translate(self, commands: Sequence[rounds.Command], now: float) -> list[Output]:
        outputs: list[Output] = []
        for command in commands:
            match command:
                case rounds.Invite(agent_ids):
                    outputs += self._invite(agent_ids, now)
                case rounds.Release(agent_ids):
                    for agent_id in agent_ids:
                        outputs += self._drop_transfer(agent_id, now, "lost")
                case rounds.Dismiss(agent_ids):
                    for agent_id in agent_ids:
                        outputs += self._drop_transfer(agent_id, now)
                        outputs.append(cancel(agent_id, self.address, "closed"))
                case rounds.Aggregate(agent_ids):
                    outputs.append(self._phase_ended("collecting", now))
                    updates = tuple(self.accepted[agent_id] for agent_id in agent_ids)
                    round_num, base = self.round.round_num, self.model_digest
                    outputs.append(ev.AggregateUpdates(round_num, base, updates, self.server_state))
                case rounds.Check():
                    outputs += [self._phase_ended("aggregating", now), command]
                case rounds.Commit():
                    outputs += [] if self.round.config.is_checked else [self._phase_ended("aggregating", now)]
                    outputs.append(command)
                case rounds.Abandon():
                    outputs.append(command)
        return outputs

    def _invite(self, agent_ids: Sequence[str], now: float) -> list[Output]:
        outputs: list[Output] = []
        if self._is_selecting:
            self._is_selecting = False
            outputs.append(self._phase_ended("selecting", now))
        fresh = [agent_id for agent_id in agent_ids if agent_id not in self.accepted]
        self.uplink.invite(fresh)
        left_s = max(0.0, self.round.ends_at - now)
        for agent_id in fresh:
            invitation = self.address.on(
                Invitation,
                model_digest=self.model_digest,
                task=self.config.task,
                training=self.config.training,
                seed=self.config.seed,
                credit=self.uplink.credit(agent_id),
                deadline_s=min(left_s, 1e9),
            )
            outputs.append(ev.Send(agent_id, invitation, left_s))
        for agent_id in agent_ids:
            # An update of an earlier attempt at this round counts again: the same base, data and seed give the same bits.
            if agent_id in self.accepted and self.round.is_open_to(agent_id):
                outputs += self.step(rounds.UpdateAccepted(agent_id), now)
        return outputs

    def _phase_ended(self, phase: str, now: float) -> ev.PhaseEnded:
        duration_s, self.phase_began_at = now - self.phase_began_at, now
        return ev.PhaseEnded(self.round.round_num, phase, duration_s)

    def check(self) -> None:
        """Assert what holds between any two steps."""
        self.round.check()
        self.uplink.check()
        states = self.round.members
        reported = {agent_id for agent_id, state in states.items() if state is MemberState.REPORTED}
        assert reported <= self.accepted.keys(), "an update that counts is not stored"
        awaited = {agent_id for agent_id, state in states.items() if state in WAITING}
        waiting = awaited if self.round.state is RoundState.COLLECTING else set()
        assert self.uplink.transfers.keys() <= waiting, "credit is kept for agents that are not waited for"


def quarantined(agent_id: str, quarantine: Quarantine, address: Address) -> list[ev.Command]:
    """What is said of an agent in quarantine, and to it."""
    note = ev.AgentQuarantined(agent_id, quarantine.held[agent_id], quarantine.why(agent_id))
    return [note, cancel(agent_id, address, "quarantined")]


def cancel(agent_id: str, address: Address, reason: CancelReason = "late") -> ev.Send:
    """Tell an agent that this work is not wanted any more."""
    return ev.Send(agent_id, address.on(Cancel, reason=reason))


def turn_away(agent_id: str, header: UpdateHeader, epoch: int, reason: CancelReason = "late") -> list[ev.Send]:
    """Tell an agent that its update is not wanted; one that works for a newer coordinator than ours is left to that."""
    return [] if header.epoch > epoch else [cancel(agent_id, address_of(header), reason)]
