"""The auditor: asserts the invariants of a federation over its whole history, across every crash.

It sees what the machines cannot: the truth of each training, everything that was ever saved, and everything that a
coordinator publishes. Each assertion names its invariant, as docs and design do:

    I1  versions grow by one, each with one digest and one parent
    I2  an agent counts at most once in a round
    I3  every counted update was trained on the version it claims
    I4  a committed model is finite and fits the layout
    I5  a version is made of at least quorum updates
    I7  a restarted coordinator never gives a round number new content; epochs grow
    I8  nothing grows without bound
    I9  accepted + rejected + late + duplicate = received, in the store and in what observers are told
    I10 the same accepted set gives the same digest

Most are asserted on what is done, at the moment when it is done; `check` asserts them on what there is, at any moment. Two
are not here: I6, liveness, is for whoever lets time pass; I11, that nothing which comes can raise, is in the processes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from coordinator import run_events as ev
from coordinator.store import KEPT_ROUNDS
from midge.transport.memory import MAX_WAITING
from midge.wire.messages import CoordinatorStatus, Head, Invitation, Receipt, decode, decode_to_agent
from midge.wire.topics import CoordinatorTopic, HeadTopic, InboxTopic
from tests.sim.learning import Model, Trained, average
from tests.sim.state import PRUNED_EVERY

if TYPE_CHECKING:
    from tests.sim.federation import Federation


class Auditor:
    """The auditor of one federation."""

    def __init__(self, federation: Federation) -> None:
        self.truth: dict[str, Trained] = {}
        self.counted: dict[tuple[int, str], str] = {}
        self.trainings: Counter[tuple[int, str]] = Counter()
        self.num_repeated = 0
        self.noted: Counter[tuple[str, str]] = Counter()
        self._federation = federation
        self._aggregated: dict[int, tuple[ev.AcceptedUpdate, ...]] = {}
        self._epochs: set[int] = set()
        self._members: dict[tuple[int, int], set[str]] = defaultdict(set)
        self._noted_from: Counter[tuple[str, str]] = Counter()

    # What happens on the agents.

    def trained(self, update_digest: str, trained: Trained) -> None:
        """An agent finished a training: what it really did."""
        self.truth[update_digest] = trained

    def began_training(self, round_num: int, agent_id: str) -> None:
        """An agent begins to train."""
        self.trainings[round_num, agent_id] += 1
        self.num_repeated += (round_num, agent_id) in self.counted

    # What the coordinator saves.

    def started(self, epoch: int) -> None:
        """A coordinator starts, or raises its epoch."""
        assert all(epoch > earlier for earlier in self._epochs), f"I7: epoch {epoch} after {max(self._epochs)}"
        self._epochs.add(epoch)

    def restarted(self) -> None:
        """A new process: what it notes is counted from what is stored."""
        self.noted.clear()
        self._noted_from = Counter(self._federation.store.tally_rows)

    def saved(self, save: ev.Save) -> None:
        """This was persisted."""
        match save:
            case ev.SaveVersion():
                self._version_saved(save)
            case ev.SaveUpdate(round_num, update):
                self._update_saved(round_num, update)
            case ev.SaveAttempt():
                self._members[save.round_num, save.attempt] |= save.members.keys()
            case ev.SaveTallies(tallies):
                settled = sum(count for (outcome, _), count in tallies.items() if outcome != "received")
                assert settled <= tallies["received", ""], f"I9: {settled} settled of {tallies}"

    def _update_saved(self, round_num: int, update: ev.AcceptedUpdate) -> None:
        federation = self._federation
        version = federation.store.version_rows[-1]
        assert round_num == version["round_num"] + 1, f"I3: an update of round {round_num} on {version}"
        truth = self.truth[update.update_digest]
        assert (truth.agent_id, truth.round_num) == (update.agent_id, round_num), f"I2: {update} is of {truth}"
        assert truth.base_digest == version["digest"], f"I3: {update} was trained on {truth.base_digest}"
        assert truth.num_examples == update.num_examples, f"I3: {update} was trained on {truth.num_examples} examples"
        known = self.counted.setdefault((round_num, update.agent_id), update.update_digest)
        assert known == update.update_digest, f"I2: {update.agent_id} counts twice in round {round_num}"
        assert federation.framing is not None
        elements = federation.spool.elements(round_num, update, federation.framing.num_frames)
        assert np.array_equal(elements, truth.elements), f"I3: the spool holds something else for {update}"

    def _version_saved(self, save: ev.SaveVersion) -> None:
        federation = self._federation
        rows = federation.store.version_rows  # with this one
        assert save.round_num == len(rows) - 1, f"I1: version {save.round_num} after {len(rows) - 1} others"
        federation.models.open(save.digest)
        if save.round_num == 0:
            assert save.parent is None, "I1: the first version has no parent"
            return
        base = rows[-2]
        assert save.parent == base["digest"], f"I1: {save} does not follow {base}"
        updates = self._aggregated[save.round_num]
        assert save.num_updates == len(updates) >= federation.config.round.quorum, f"I5: {save}"
        expected = average(federation.models.open(base["digest"]), [self.truth[u.update_digest] for u in updates])
        assert save.digest == expected.digest, f"I10: {save} is not the mean of {[u.agent_id for u in updates]}"
        if federation.expected_chain:
            assert save.digest == federation.expected_chain[save.round_num], f"I10: {save} is not the fault-free run's"

    def aggregates(self, command: ev.AggregateUpdates) -> None:
        """The coordinator asks for an aggregation."""
        store = self._federation.store
        agents = [update.agent_id for update in command.updates]
        assert len(agents) == len(set(agents)), f"I2: {agents}"
        assert command.base_digest == store.version_rows[-1]["digest"], f"I3: {command} on another base"
        for update in command.updates:
            stored = store.update_rows.get((command.round_num, update.agent_id))
            assert stored == update, f"an update is aggregated that is not stored: {update}, stored {stored}"
        self._aggregated[command.round_num] = command.updates

    def model_saved(self, model: Model) -> None:
        """A model was stored."""
        assert np.isfinite(model.elements).all(), "I4: a stored model is not finite"
        assert model.elements.shape == (self._federation.layout.num_elements,), "I4: a stored model does not fit"

    # What the coordinator says.

    def published(self, topic: str, payload: bytes) -> None:
        """A coordinator publishes: nothing may be said that a crash could make untrue."""
        federation = self._federation
        match federation.topics.parse(topic):
            case CoordinatorTopic():
                assert decode(payload, CoordinatorStatus).epoch in self._epochs, "I7: an epoch that was not raised"
            case HeadTopic() if payload:
                head = decode(payload, Head)
                row = federation.store.version_rows[head.round_num]
                assert head.model_digest == row["digest"], f"I7: head {head.round_num} is {head.model_digest}"
                assert head.frame_elements == federation.store.row["frame_elements"], "the framing was not stored"
            case InboxTopic(agent_id):
                self._told(agent_id, payload)

    def _told(self, agent_id: str, payload: bytes) -> None:
        message = decode_to_agent(payload)
        match message:
            case Receipt(accepted=True):
                counted = self.counted.get((message.round_num, agent_id))
                assert counted == message.update_digest, f"{agent_id} was told of an update that is not stored"
            case Invitation():
                row = self._federation.store.version_rows[-1]
                current = (row["round_num"] + 1, row["digest"])
                assert (message.round_num, message.model_digest) == current, f"I7: invited to {message}, not {current}"
                members = self._members[message.round_num, message.attempt]
                assert agent_id in members, f"{agent_id} was invited before that was stored"

    def noted_update(self, outcome: str, reason: str = "") -> None:
        """An observer was told of an update's fate."""
        self.noted[outcome, reason] += 1

    # At any moment.

    def check(self) -> None:
        """Assert of what is stored, retained and on its way that no invariant is broken."""
        federation = self._federation
        store, rows = federation.store, federation.store.version_rows
        assert [row["round_num"] for row in rows] == list(range(len(rows))), f"I1: versions {rows}"
        assert [row["parent"] for row in rows] == [None, *(row["digest"] for row in rows)][: len(rows)], f"I1: {rows}"
        for (round_num, agent_id), update in store.update_rows.items():
            assert self.counted[round_num, agent_id] == update.update_digest, f"I2: {agent_id} in round {round_num}"
            base_digest = self.truth[update.update_digest].base_digest
            assert base_digest == rows[round_num - 1]["digest"], f"I3: {update} was trained on {base_digest}"
        if rows:
            assert np.isfinite(federation.models.open(rows[-1]["digest"]).elements).all(), "I4: the model is not finite"
        for round_num, updates in self._aggregated.items():
            assert len(updates) >= federation.config.round.quorum, f"I5: round {round_num} of {len(updates)} updates"
        assert store.epoch == max(self._epochs, default=0), f"I7: epoch {store.epoch} of {self._epochs}"
        self._check_growth()
        settled = sum(count for (outcome, _), count in store.tally_rows.items() if outcome != "received")
        assert settled <= store.tally_rows.get(("received", ""), 0), f"I9: {store.tally_rows}"
        expected = federation.expected_chain[: len(rows)]
        assert not expected or [row["digest"] for row in rows] == expected, "I10: not the fault-free run's versions"

    # After each turn of the coordinator.

    def turned(self) -> None:
        """A turn of the coordinator is over, and nothing is left to do."""
        federation = self._federation
        run = federation.coordinator.driver.run
        assert run is not None
        run.check()
        counted, seen = Counter(run.tallies.counts), self._noted_from + self.noted
        del counted["late", "restart"], seen["late", "restart"]  # settled when nobody was there to be told
        assert counted == seen, f"I9: counted {counted}, observers were told of {seen}"
        if federation.coordinator.driver.deadline() == math.inf:  # nothing waits to be saved
            assert run.tallies.counts == federation.store.tally_rows, f"I9: {run.tallies.counts} is not what is stored"
        self._check_growth()

    def _check_growth(self) -> None:
        federation = self._federation
        num_agents, num_frames = federation.num_agents, federation.num_frames
        assert len(federation.spool) <= 6 * num_agents * num_frames, f"I8: {len(federation.spool)} frames in the spool"
        assert len(federation.store.update_rows) <= (KEPT_ROUNDS + PRUNED_EVERY) * num_agents, (
            "I8: updates pile up in the store"
        )
        assert len(federation.models) <= 8, "I8: models pile up"
        broker = federation.broker
        assert len(broker.retained) <= 2 * num_frames + num_agents + 4, f"I8: {len(broker.retained)} retained messages"
        assert broker.num_waiting <= num_agents * MAX_WAITING, "I8: messages pile up at the broker"
        assert broker.queue_length <= 20_000, f"I8: {broker.queue_length} messages on their way"
