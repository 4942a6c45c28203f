"""Scenarios: what goes wrong in a federation, drawn from a seed, and when it stops.

For its first `FAULTS_S` seconds a federation suffers: links lose, delay, double and reorder; connections are cut, or go dead
unnoticed; the broker dies, with or without what it kept; coordinator and agents are killed between any two operations, or
stopped; agents refuse, are slow, fail, lie, or go for good; the coordinator's disk is full or broken; a stranger sends garbage
and repeats what others said. Then all of it stops, and the federation must go on by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.round import RoundConfig
from midge.transport.memory import Faults
from tests.sim.agent_process import LIES, AgentProcess, Behaviour
from tests.sim.federation import CLEAN, Federation
from tests.sim.process import Process
from tests.sim.stranger import Stranger

FAULTS_S = 40.0
RECOVERY_S = 200.0
"""Once faults stop, the next version is committed within this time (I6). The sum of the longest waits: the report deadline
of the attempt under way (30 s), the pause after an abandoned one (60 s), selection (10 s) with its roll call (10 s), one
more report deadline for agents that never report (30 s), and a half on top."""
BOUNDS = {"selection_deadline_s": 10.0, "acceptance_deadline_s": 6.0, "report_deadline_s": 30.0}

LINKS = (
    CLEAN,
    Faults(loss=0.02, duplication=0.02, reorder=0.05, delay_s=0.05, reorder_s=1.0, uplink_s=0.02),
    Faults(loss=0.1, duplication=0.1, reorder=0.1, delay_s=0.2, reorder_s=5.0, uplink_s=0.1, reconnect_s=3.0),
    Faults(loss=0.3, duplication=0.3, reorder=0.3, delay_s=0.5, reorder_s=20.0, uplink_s=0.3, reconnect_s=5.0),
)


@dataclass
class Scenario:
    """A federation and what is to happen to it."""

    federation: Federation
    description: str
    mortals: list[AgentProcess]
    """Agents that may go for good: enough others are left."""


def draw(seed: int) -> Scenario:
    """The scenario of this seed, ready to start."""
    rng = random.Random(f"{seed}/scenario")
    is_strict = rng.random() < 0.5
    num_honest = rng.choice((1, 2, 2, 3, 3, 4, 5))
    num_lasting = num_honest if is_strict else rng.randint(1, num_honest)
    behaviours = [_honest(rng, may_vary=not is_strict) for _ in range(num_honest)]
    behaviours += [Behaviour(lie=rng.choice(list(LIES))) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    links = rng.choice(LINKS)
    federation = Federation(
        seed,
        behaviours,
        rounds=200,
        round_config=_strict_round(num_honest) if is_strict else _some_round(rng, num_lasting),
        num_frames=rng.choice((1, 2, 2, 3, 3, 5, 5, 5, 20, 70)),
        faults=links,
        delays_wills=rng.random() < 0.5,
        is_strict=is_strict,
    )
    federation.turn_s = rng.choice((0.0, 0.0, 0.01, 0.1))
    federation.restart_after = lambda _: rng.uniform(0.1, 8.0)
    scenario = Scenario(
        federation,
        f"{num_honest} honest agents, {behaviours}, {federation.config.round}, {links}",
        federation.agents[num_lasting:num_honest],
    )
    for _ in range(rng.randrange(1, 12)):
        _schedule(scenario, rng)
    federation.at(FAULTS_S, lambda: heal(federation), "faults stop")
    return scenario


def _honest(rng: random.Random, *, may_vary: bool) -> Behaviour:
    shortest_s = rng.choice((0.0, 0.1, 1.0))
    return Behaviour(
        training_s=(shortest_s, shortest_s + rng.choice((0.1, 1.0, 8.0))),
        refuses=rng.choice((0.0, 0.0, 0.3)),
        fails=rng.choice((0.0, 0.0, 0.2)),
        disk_fails=rng.choice((0.0, 0.0, 0.0, 0.05)),
        varies=may_vary and rng.random() < 0.5,
    )


def _strict_round(num_honest: int) -> RoundConfig:
    """Every honest agent counts in every round: each version is then that of the fault-free run."""
    return RoundConfig(minimum=num_honest, quorum=num_honest, **BOUNDS)


def _some_round(rng: random.Random, num_lasting: int) -> RoundConfig:
    quorum = rng.randint(1, num_lasting)
    target = rng.choice((0, rng.randint(quorum, num_lasting)))
    minimum = rng.randint(quorum, num_lasting)
    return RoundConfig(target=target, minimum=minimum, quorum=quorum, over_select=rng.choice((1.0, 1.3, 2.0)), **BOUNDS)


# What happens.


def _schedule(scenario: Scenario, rng: random.Random) -> None:
    kind = rng.choice(_KINDS)
    name = kind.__name__.strip("_").replace("_", " ")
    scenario.federation.at(rng.uniform(0.0, FAULTS_S * 0.95), lambda: kind(scenario, rng), name)


def _kill_coordinator(scenario: Scenario, rng: random.Random) -> None:
    scenario.federation.coordinator.light_fuse(rng.randint(1, 60))


def _stop_coordinator(scenario: Scenario, rng: random.Random) -> None:
    _stop(scenario.federation, scenario.federation.coordinator, rng)


def _close_the_round(scenario: Scenario, rng: random.Random) -> None:
    if scenario.federation.coordinator.is_up:
        scenario.federation.coordinator.close_round()


def _break_computations(scenario: Scenario, rng: random.Random) -> None:
    federation = scenario.federation
    federation.coordinator.computation_fails = rng.choice((0.3, 1.0))
    federation.at(federation.now + rng.uniform(0.0, 10.0), lambda: _mend_computations(federation))


def _mend_computations(federation: Federation) -> None:
    federation.coordinator.computation_fails = 0.0


def _break_the_disk(scenario: Scenario, rng: random.Random) -> None:
    federation, disk = scenario.federation, scenario.federation.disk
    if rng.random() < 0.5:
        disk.fail(disk.num_writes + rng.randint(1, 40), rng.choice((1, 1, 2, 4)), lands=rng.random() < 0.5)
    else:
        disk.break_down()
        federation.at(federation.now + rng.uniform(0.0, 10.0), disk.mend, "the disk is mended")


def _kill_the_broker(scenario: Scenario, rng: random.Random) -> None:
    broker = scenario.federation.broker
    if not broker.is_up:
        return
    if rng.random() < 0.3:
        older = dict(broker.retained)
        at = broker.now + rng.uniform(0.1, 5.0)
        scenario.federation.at(at, lambda: broker.is_up and broker.stop(restored=older), "with an older file")
    else:
        at = broker.now
        broker.stop(forget=rng.random() < 0.5)
    scenario.federation.at(at + rng.uniform(0.1, 10.0), broker.start, "broker starts")


def _cut_someone_off(scenario: Scenario, rng: random.Random) -> None:
    transport = rng.choice(scenario.federation.processes).transport
    if transport is not None:
        transport.cut(for_s=rng.choice((0.0, rng.uniform(0.0, 20.0))), noticed_after_s=rng.choice((0.0, 5.0, 45.0)))


def _let_a_connection_go_dead(scenario: Scenario, rng: random.Random) -> None:
    transport = rng.choice(scenario.federation.processes).transport
    if transport is not None:
        transport.go_dark()
        scenario.federation.at(scenario.federation.now + rng.uniform(0.0, 15.0), transport.cut)


def _kill_an_agent(scenario: Scenario, rng: random.Random) -> None:
    rng.choice(scenario.federation.agents).light_fuse(rng.randint(1, 40))


def _lose_an_agents_disk(scenario: Scenario, rng: random.Random) -> None:
    agent = rng.choice(scenario.federation.agents)
    scenario.federation.crash(agent)
    agent.journal.wipe()


def _stop_an_agent(scenario: Scenario, rng: random.Random) -> None:
    _stop(scenario.federation, rng.choice(scenario.federation.agents), rng)


def _lose_an_agent_for_good(scenario: Scenario, rng: random.Random) -> None:
    if scenario.mortals:
        victim = scenario.mortals.pop()
        scenario.federation.agents.remove(victim)
        scenario.federation.processes.remove(victim)
        victim.die(noticed_after_s=rng.choice((0.0, 45.0, 1e9)))


def _change_the_links(scenario: Scenario, rng: random.Random) -> None:
    scenario.federation.broker.faults = rng.choice(LINKS)


def _send_garbage(scenario: Scenario, rng: random.Random) -> None:
    stranger = Stranger(scenario.federation, rng)
    for _ in range(rng.randrange(30)):
        scenario.federation.at(scenario.federation.now + rng.uniform(0.0, 10.0), stranger.speak)


_KINDS: tuple[Callable[[Scenario, random.Random], None], ...] = (
    _kill_coordinator,
    _kill_coordinator,
    _kill_coordinator,
    _stop_coordinator,
    _close_the_round,
    _break_computations,
    _break_the_disk,
    _break_the_disk,
    _kill_the_broker,
    _kill_the_broker,
    _cut_someone_off,
    _cut_someone_off,
    _let_a_connection_go_dead,
    _kill_an_agent,
    _kill_an_agent,
    _lose_an_agents_disk,
    _stop_an_agent,
    _lose_an_agent_for_good,
    _change_the_links,
    _send_garbage,
)


def _stop(federation: Federation, process: Process, rng: random.Random) -> None:
    if process.is_up:
        process.stop()
        federation.at(federation.now + rng.uniform(0.1, 8.0), lambda: federation.restart(process))


def heal(federation: Federation) -> None:
    """Everything that can be well is well from now on; what is on its way still comes."""
    federation.broker.faults = CLEAN
    if not federation.broker.is_up:
        federation.broker.start()
    federation.coordinator.computation_fails = 0.0
    federation.disk.mend()
    for process in federation.processes:
        process.light_fuse(0)
        if process.transport is not None and process.transport.is_dark:
            process.transport.cut()
        federation.restart(process)
    for agent in federation.agents:
        agent.behaviour.refuses = agent.behaviour.fails = agent.behaviour.disk_fails = 0.0
