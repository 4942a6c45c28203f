"""A hostile agent over a real broker: refused, left out, quarantined, remembered by a coordinator that was killed."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.broker.federation import call, call_json, wait_until

pytestmark = pytest.mark.usefixtures("unmeasured")

HONEST = ("agent-0", "agent-1", "agent-2")


@pytest.mark.long
@pytest.mark.fault(32)
def test_an_agent_that_turns_the_model_around_is_left_out_and_then_quarantined(mosquitto, make_federation, recovery):
    federation = make_federation(mosquitto.url, task="tests.broker.tasks:AlikeLinearTask")
    (federation.control("hostile") / "fault").write_text("flip")
    settings = {"rounds": 6, "min_agents": 3, "start_agents": 4, "learning_rate": 0.05, "max_loss_ratio": 1.05}
    settings |= {"quarantine_after": 2, "quarantine_rounds": 3, "acceptance_deadline_s": 60}
    for part, agent_id in enumerate((*HONEST, "hostile")):
        federation.start_agent(agent_id, part=part)
    hostile = federation.programs[-1]
    federation.hold("agent-0", training=4)
    coordinator = federation.start_coordinator(**settings)
    with recovery.watch():
        federation.wait_for_round(1)

    # In two rounds a candidate is refused; the next attempt does without the hostile update, and trains nobody again.
    federation.wait_for_training("agent-0", 4)
    for round_num in (1, 2):
        number, members = federation.attempts(round_num)
        assert (number, members) == (2, dict.fromkeys(HONEST, "reported") | {"hostile": "left_out"})
    assert len(federation.trainings("agent-1")) == 4
    assert federation.attempts(3) == (1, dict.fromkeys(HONEST, "reported"))

    def assert_quarantined():
        view = federation.agent_views()["hostile"]
        assert view["quarantined_until"] == 5
        assert "2 updates rejected or left out within 20 rounds (held_out)" in view["quarantine"]
        (line,) = [
            one for one in federation.get("/metrics")[1].splitlines() if one.startswith("midge_agents_quarantined{")
        ]
        assert line.split()[-1] == "1.0"

    assert_quarantined()
    coordinator.wait_for_log("candidate refused")
    hostile.wait_for_log("quarantined by the coordinator")
    coordinator.kill()
    again = federation.start_coordinator(**settings)
    again.wait_for_log("http served")
    wait_until(lambda: "hostile" in federation.agent_views(), "the agent is heard")
    assert_quarantined()
    rows = call_json("coordinator", "agents", "--state-dir", str(federation.state_dir()))
    assert {row["agent_id"]: row.get("quarantined_until") for row in rows} == dict.fromkeys(HONEST, 0) | {"hostile": 5}
    federation.release("agent-0")
    assert again.wait() == 0

    # It is let in again for the sixth round. No version is worse than the one before it by more than the gate allows.
    assert "hostile" in federation.attempts(6)[1]
    assert all("hostile" not in federation.attempts(round_num)[1] for round_num in (3, 4, 5))
    losses = [version["central"].loss for version in federation.versions()]
    assert len(losses) == 7
    assert all(after <= 1.05 * before for before, after in itertools.pairwise(losses))
    found = json.loads(call("coordinator", "verify", str(federation.state_dir()), "--json").stdout)
    assert [one for one in found["findings"] if one["severity"] != "note"] == []
    kept = {path.stem for path in (federation.state_dir() / "models").iterdir()}
    assert kept == {version["digest"] for version in federation.versions()}
