"""What is broken in a federation is found, and named by its invariant."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from coordinator import run_events as ev
from coordinator.round import RoundConfig
from edge_agent.driver import Driver as AgentDriver
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation
from tests.sim.state import MemoryStore

INVARIANTS = {f"I{number}" for number in range(1, 12)}


def at_rest() -> Federation:
    """A federation of two agents after two rounds, in the middle of the third."""
    bounds = RoundConfig(minimum=2, quorum=2)
    slow = Behaviour(training_s=(5.0, 5.0))
    federation = Federation(40, [slow, slow], rounds=3, round_config=bounds, is_strict=True)
    federation.start()
    assert federation.run(lambda: federation.num_committed == 2, 60.0)
    federation.auditor.check()
    return federation


def lose_a_version(federation: Federation) -> None:
    del federation.store.version_rows[1]


def change_a_parent(federation: Federation) -> None:
    federation.store.version_rows[2]["parent"] = "ab" * 32


def count_another_update(federation: Federation) -> None:
    rows = federation.store.update_rows
    rows[2, "agent-0"] = rows[1, "agent-0"]


def train_on_another_version(federation: Federation) -> None:
    truth = federation.auditor.truth
    digest = federation.store.update_rows[2, "agent-0"].update_digest
    truth[digest].__dict__["base_digest"] = federation.store.version_rows[0]["digest"]


def break_the_model(federation: Federation) -> None:
    federation.models.open(federation.store.version_rows[-1]["digest"]).elements[0] = np.nan


def aggregate_below_the_quorum(federation: Federation) -> None:
    updates = federation.auditor._aggregated
    updates[2] = updates[2][:1]


def fall_back_an_epoch(federation: Federation) -> None:
    federation.store.epoch -= 1


def fill_the_broker(federation: Federation) -> None:
    federation.broker.retained |= {f"midge/1/sim/agent/{number}/presence": b"{}" for number in range(1000)}


def settle_what_never_came(federation: Federation) -> None:
    federation.store.tally_rows["rejected", "norm"] = 99


def make_another_model(federation: Federation) -> None:
    federation.expected_chain[2] = "cd" * 32


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (lose_a_version, "I1"),
        (change_a_parent, "I1"),
        (count_another_update, "I2"),
        (train_on_another_version, "I3"),
        (break_the_model, "I4"),
        (aggregate_below_the_quorum, "I5"),
        (fall_back_an_epoch, "I7"),
        (fill_the_broker, "I8"),
        (settle_what_never_came, "I9"),
        (make_another_model, "I10"),
    ],
)
def test_what_is_broken_at_any_moment_is_found(tamper: Callable[[Federation], None], found: str):
    federation = at_rest()
    tamper(federation)
    with pytest.raises(AssertionError, match=f"^{found}:"):
        federation.auditor.check()


def test_a_message_that_makes_a_process_raise_is_found(monkeypatch):
    federation = at_rest()

    def handle(*_: object) -> None:
        raise KeyError("frames")

    monkeypatch.setattr(AgentDriver, "handle", handle)
    with pytest.raises(AssertionError, match=r"^I11: .* raises KeyError"):
        federation.run(lambda: federation.is_done, 60.0)


def test_what_agents_are_told_before_it_is_stored_is_found(monkeypatch):
    federation = at_rest()
    save = MemoryStore.save

    def save_no_update(self, run_id, saves, agents):
        save(self, run_id, [each for each in saves if not isinstance(each, ev.SaveUpdate)], agents)

    monkeypatch.setattr(MemoryStore, "save", save_no_update)
    with pytest.raises(AssertionError, match="told of an update that is not stored"):
        federation.run(lambda: federation.is_done, 60.0)


def test_the_page_on_the_simulation_says_of_each_invariant_where_it_is_asserted(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "simulation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (I\d+) \|", page, re.MULTILINE)) == INVARIANTS
    for name in re.findall(r"`(\w+\.py)`", page):
        assert (pytestconfig.rootpath / "tests" / "sim" / name).exists(), f"docs/simulation.md names {name}"
