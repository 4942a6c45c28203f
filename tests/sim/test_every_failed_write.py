"""A coordinator whose disk fails at each of its writes in turn, once or for a while: it waits, and goes on with the same round.

Nothing is lost, nothing is counted or trained twice, and every version is that of the run that nothing happened to. The auditor
asserts after each turn that what is in memory is what is stored, and on each message that what it says was stored before.
"""

from __future__ import annotations

import pytest

from coordinator.round import RoundConfig
from tests import measured
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation, told

ROUNDS = 3
LIMIT_S = 120.0


def federation_of(seed: int) -> Federation:
    federation = Federation(
        seed,
        [Behaviour(), Behaviour()],
        rounds=ROUNDS,
        round_config=RoundConfig(minimum=2, quorum=2, report_deadline_s=600.0),
        is_strict=True,
    )
    federation.restart_after = lambda _: federation.rng.uniform(0.1, 3.0)
    return federation


def outlives(federation: Federation, what: str) -> bool:
    """Run it to its end; false where nothing failed, since there are not that many writes."""
    with told(federation, what):
        federation.start()
        assert federation.run(lambda: federation.is_done, LIMIT_S), "I6: it did not come to its end"
        assert federation.num_committed == ROUNDS
        assert set(federation.auditor.trainings.values()) == {1}, "somebody trained twice"
    return federation.disk.num_failures > 0


@pytest.mark.fault(14)
@pytest.mark.parametrize("lands", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("times", measured.first(1, [2, 1, 3, 5], num_short=1))
def test_a_disk_that_fails_at_any_write_for_a_while_changes_no_version(times, lands):
    """Undone: no room. Done: an error of the device, after which nobody knows what is there."""
    write = 1
    while True:
        federation = federation_of(write)
        federation.disk.fail(write, times, lands=lands)
        if not outlives(federation, f"writes {write} to {write + times - 1} fail, lands={lands}"):
            break
        if write > 1:
            assert federation.num_crashes == 0, "it ended instead of waiting"
        write += 1
    assert write > 40


@pytest.mark.fault(3, 14)
@pytest.mark.parametrize("lands", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("later", measured.first(0, [2, 1, 4, 7], num_short=1))
def test_a_coordinator_killed_while_it_waits_for_the_disk_or_soon_after_goes_on(later, lands):
    num_crashes = 0
    for write in range(2, 52):
        federation = federation_of(write)
        federation.disk.fail(write, 2, lands=lands)
        federation.disk.on_failure = lambda federation=federation: federation.coordinator.light_fuse(later)
        assert outlives(federation, f"write {write} fails, and the coordinator is killed {later} operations later")
        num_crashes += federation.num_crashes
    assert num_crashes > 40  # a run whose last writes fail may be over before


@pytest.mark.no_cover
def test_agents_and_broker_may_come_and_go_while_the_disk_fails():
    """The coordinator hears what happens meanwhile, and a disk that fails for long costs no attempt."""
    for seed in range(30):
        federation = federation_of(seed)
        broker = federation.broker
        federation.at(0.5 + seed * 0.01, federation.disk.break_down, "the disk fails")
        federation.at(5.0, lambda federation=federation: federation.crash(federation.agents[0]), "an agent dies")
        federation.at(8.0, lambda broker=broker: broker.stop(forget=True), "the broker dies")
        federation.at(12.0, broker.start, "the broker starts")
        federation.at(20.0, federation.disk.mend, "the disk is mended")
        with told(federation, f"seed {seed}"):
            federation.start()
            assert federation.run(lambda federation=federation: federation.is_done, LIMIT_S)
            attempts = [attempt for _, attempt in federation.store.attempt_rows]
            assert set(attempts) == {1}, "a failing disk cost an attempt"
            assert federation.auditor.num_repeated == 0
