"""The coordinator is killed at each of its fail points (midge/failpoints.py), over a real Mosquitto, and started again.

Whatever it was doing: it comes back into the same round of the same attempt, no accepted update is lost or trained again, the
final model has the digest of the undisturbed run, and nothing in its state directory is wrong, neither after the kill nor at
the end. A training that was under way goes on; one that the coordinator itself cancelled begins anew.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import pytest

from coordinator.round import RoundState
from midge.failpoints import POINTS
from tests.broker import tasks
from tests.broker.conftest import BrokerUnderTest
from tests.broker.federation import Federation, Program, call
from tests.broker.undisturbed import BATCHES, accepted, digests, findings, undisturbed

pytestmark = pytest.mark.usefixtures("unmeasured")

ROUNDS = 3
READY_S = 30.0
"""The promise is 5 s. The table shows what it was; a machine that tests share with others is given more."""
Setting = Callable[[Federation, list[Program]], None]


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes:
        point: as the environment has it.
        task: of `tests/broker/tasks.py`; `wide` has many frames, and several blocks.
        hold: agent-1's first training waits until the coordinator is dead.
        disturb: what else has to happen for the point to be passed.
        agent_point: where agent-1 has a fail point of its own; it is killed once the coordinator is dead.
        is_short: whether `make test` has it too.
    """

    point: str
    task: str = "linear"
    hold: bool = False
    disturb: Setting | None = None
    agent_point: str = ""
    is_short: bool = False


def close_the_round(federation: Federation, agents: list[Program]) -> None:
    """agent-0 has reported, agent-1 works; the operator closes the round, which has no quorum."""
    federation.wait_for_update("agent-0", 1)
    federation.wait_for_training("agent-1", 1)
    call("coordinator", "round", "close", "--state-dir", str(federation.state_dir()))


def close_the_round_and_leave(federation: Federation, agents: list[Program]) -> None:
    """The same; and agent-1 is gone by then, so that the next attempt waits for agents."""
    federation.wait_for_update("agent-0", 1)
    federation.wait_for_training("agent-1", 1)
    agents[1].stop()
    call("coordinator", "round", "close", "--state-dir", str(federation.state_dir()))


def both(transition: str, nth: int, *, hold: bool = False, disturb: Setting | None = None) -> list[Case]:
    """Before and after a transition is persisted."""
    return [
        Case(f"coordinator.saving.{transition}:{nth}", hold=hold, disturb=disturb),
        Case(f"coordinator.saved.{transition}:{nth}", hold=hold, disturb=disturb, is_short=transition == "update"),
    ]


CASES = [
    Case("coordinator.epoch.raised"),
    Case("coordinator.run.created"),
    Case("coordinator.model.prepared"),
    *both("run", 2),
    *both("version", 1),
    *both("version", 3),
    *both("attempt-selecting", 1, hold=True, disturb=close_the_round_and_leave),
    *both("attempt-collecting", 2),
    *both("attempt-aggregating", 2),
    *both("attempt-committed", 2),
    *both("attempt-abandoned", 1, hold=True, disturb=close_the_round),
    *both("update", 3),
    *both("evaluation", 1),
    *both("tallies", 2),
    Case("coordinator.transaction.written:6"),
    Case("coordinator.frame.published:25", task="wide"),
    Case("coordinator.head.published:2"),
    Case("coordinator.frame.stored:45", task="wide"),
    Case("coordinator.spool.synced:3"),
    Case("coordinator.sent.invitation:3"),
    # Where the frames come with the header, or right after it, nothing is acknowledged but the whole.
    Case("coordinator.sent.credit:1", task="wide", agent_point="agent.header.sent:1:hang"),
    Case("coordinator.sent.receipt:3"),
    Case("coordinator.sent.cancel:1", hold=True, disturb=close_the_round),
    Case("coordinator.aggregation.block:10", task="wide"),
    Case("coordinator.model.written:2"),
    Case("coordinator.model.synced:2"),
    Case("coordinator.model.renamed:2"),
]


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory):
    """One Mosquitto for all: each test has a federation of its own."""
    broker = BrokerUnderTest("mosquitto", tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The undisturbed run's digests, and what each training begins from, by task."""

    @cache
    def of(task: str) -> tuple[list[str], list[str]]:
        models, versions = undisturbed(tmp_path_factory.mktemp("undisturbed"), 2, ROUNDS, getattr(tasks, task))
        return versions, [tasks.fingerprint(model) for model in models[:ROUNDS]]

    return of


def test_the_coordinator_is_killed_at_each_of_its_points():
    killed_at = {case.point.partition(":")[0] for case in CASES}
    assert killed_at == {name for name in POINTS if name.startswith("coordinator.")}


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.point, marks=() if case.is_short else pytest.mark.long) for case in CASES],
)
def test_a_coordinator_killed_at_a_point_goes_on(case, shared_broker, make_federation, expected, recovery):
    name = case.point.replace(".", "-").replace(":", "-")
    federation = make_federation(shared_broker.url, name=name, task=f"tests.broker.tasks:{case.task}")
    if case.hold:
        federation.hold("agent-1", training=1)
    agents = [
        federation.start_agent("agent-0", part=0, check_data="false"),
        federation.start_agent("agent-1", part=1, check_data="false", fail_point=case.agent_point),
    ]
    settings = {"rounds": ROUNDS, "min_agents": 2, **BATCHES}
    coordinator = federation.start_coordinator(fail_point=case.point, **settings)
    if case.disturb is not None:
        case.disturb(federation, agents)
    assert coordinator.wait() == -signal.SIGKILL

    assert findings(federation, only_damage=True) == []
    known, standing = accepted(federation, ROUNDS), under_way(federation)
    versions = len(federation.versions())
    if case.hold:
        federation.release("agent-1")
    if case.agent_point:
        agents[1].kill()
    if not agents[1].is_running:
        federation.start_agent("agent-1", part=1, check_data="false")
    with recovery.watch():
        again = federation.start_coordinator(**settings)
        ready_s = federation.wait_until_ready(again)
        federation.wait_for_round(max(versions, 1))
    recovery.ready(ready_s)
    assert ready_s < READY_S
    assert again.wait() == 0

    digests_expected, trainings = expected(case.task)
    assert digests(federation) == digests_expected
    kept = accepted(federation, ROUNDS)
    recovery.lost(sum(kept.get(key) != update_digest for key, update_digest in known.items()))
    if standing is not None:
        round_num, attempt = standing
        assert federation.attempts(round_num)[0] == attempt, "another attempt was begun"
    assert federation.trainings("agent-0") == trainings
    again_from = [start for start, _ in groupby(federation.trainings("agent-1"))]  # what was cancelled begins anew
    assert (again_from if case.disturb else federation.trainings("agent-1")) == trainings
    assert findings(federation) == []


def under_way(federation: Federation) -> tuple[int, int] | None:
    """The round and the attempt that the database has as unfinished."""
    for run in federation.runs():
        with federation.store() as store:
            for row in store.attempts(run["run_id"]):
                if RoundState(row["state"]) in (RoundState.SELECTING, RoundState.COLLECTING, RoundState.AGGREGATING):
                    return row["round_num"], row["attempt"]
    return None
