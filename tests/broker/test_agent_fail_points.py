"""An agent is killed at each of its fail points (midge/failpoints.py), over a real Mosquitto, and started again.

Whatever it was doing: the round and its attempt go on, the update that counts is the one that was in the journal, if there was
one, and a training that had finished is never done again. The final model has the digest of the undisturbed run.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from edge_agent.journal import read_update
from midge.failpoints import POINTS
from tests.broker import tasks
from tests.broker.conftest import BrokerUnderTest
from tests.broker.federation import wait_until
from tests.broker.undisturbed import BATCHES, accepted, digests, findings, undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes:
        point: as the environment has it.
        has_finished: whether a finished update is in the journal; None: either, as the worker sees its agent's end at once,
            and may yet have written one.
        is_in_training: whether a training may be cut short, and so begins anew.
        is_short: whether `make test` has it too.
    """

    point: str
    has_finished: bool | None = False
    is_in_training: bool = False
    is_short: bool = False


# `wide` has 19 frames: of round 2 they are the 20th to the 38th.
CASES = [
    Case("agent.invitation.written:2"),
    Case("agent.frame.fetched:25"),
    Case("agent.training.begins:2"),
    Case("agent.training.progressed:1", has_finished=None, is_in_training=True),
    Case("agent.training.ended:2", has_finished=True),
    Case("agent.header.sent:2", has_finished=True),
    Case("agent.frame.sent:25", has_finished=True, is_short=True),
    Case("agent.frames.sent:2", has_finished=True),
    Case("agent.receipt.heard:1", has_finished=True),
    Case("agent.work.erased:1"),
]


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory):
    """One Mosquitto for all: each test has a federation of its own."""
    broker = BrokerUnderTest("mosquitto", tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The undisturbed run's digests, and what each training begins from."""
    models, versions = undisturbed(tmp_path_factory.mktemp("undisturbed"), 2, ROUNDS, tasks.wide)
    return versions, [tasks.fingerprint(model) for model in models[:ROUNDS]]


def test_an_agent_is_killed_at_each_of_its_points():
    killed_at = {case.point.partition(":")[0] for case in CASES} | {"worker.update.written"}
    assert killed_at == {name for name in POINTS if not name.startswith("coordinator.")}


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.point, marks=() if case.is_short else pytest.mark.long) for case in CASES],
)
def test_an_agent_killed_at_a_point_goes_on(case, shared_broker, make_federation, expected, recovery):
    name = case.point.replace(".", "-").replace(":", "-")
    federation = make_federation(shared_broker.url, name=name, task="tests.broker.tasks:wide")
    killed = federation.start_agent("agent-1", part=1, fail_point=case.point, check_data="false")
    federation.start_agent("agent-0", part=0, check_data="false")
    coordinator = federation.start_coordinator(rounds=ROUNDS, min_agents=2, **BATCHES)
    assert killed.wait() == -signal.SIGKILL

    update = federation.journal("agent-1") / "update.bin"
    finished = read_update(update) if update.exists() else None
    assert case.has_finished in (None, finished is not None)
    known, versions = accepted(federation, ROUNDS), len(federation.versions())
    with recovery.watch():
        federation.start_agent("agent-1", part=1, check_data="false")
        federation.wait_for_round(min(versions, ROUNDS))
    assert coordinator.wait() == 0

    digests_expected, trainings = expected
    assert digests(federation) == digests_expected
    kept = accepted(federation, ROUNDS)
    recovery.lost(sum(kept.get(key) != update_digest for key, update_digest in known.items()))
    if finished is not None:
        assert kept[finished.round_num, "agent-1"] == finished.update_digest, "what is resent are other bytes"
    assert [federation.attempts(round_num)[0] for round_num in range(1, ROUNDS + 1)] == [1] * ROUNDS
    assert federation.trainings("agent-0") == trainings
    begun = federation.trainings("agent-1")
    assert begun == trainings or (case.is_in_training and begun == [trainings[0], *trainings])
    assert findings(federation) == []


@pytest.mark.fault(4)
@pytest.mark.long
def test_a_worker_killed_after_it_wrote_its_update_has_trained(shared_broker, make_federation, expected, recovery):
    federation = make_federation(shared_broker.url, name="worker", task="tests.broker.tasks:wide")
    agent = federation.start_agent("agent-1", part=1, fail_point="worker.update.written", check_data="false")
    federation.start_agent("agent-0", part=0, check_data="false")
    coordinator = federation.start_coordinator(rounds=1, min_agents=2, **BATCHES)
    wait_until(lambda: len(federation.versions()) > 1, "round 1 is committed")
    assert coordinator.wait() == 0
    assert "worker died" in agent.log()
    assert digests(federation) == expected[0][:2]
    assert federation.trainings("agent-1") == expected[1][:1]
    assert federation.attempts(1)[0] == 1
