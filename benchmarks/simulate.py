"""How many rounds a second a whole federation does in memory: the real drivers and machines, no socket, no disk, no training.

    python benchmarks/simulate.py [--agents 2,3,10] [--rounds 500] [--frames 2] [--profile]

What is left of a round without network, disk and training is the cost of the protocol itself, in one process on one core:
encoding, decoding, checking and counting every message on both sides. Seconds are of CPU, in the best of five runs, since
other processes share the machine. Beside it, the same number of deliveries by the simulated broker alone: what of a round is
not ours. `--profile` shows where the rest goes.

The second table is of the machines alone (tests/sim/world.py): messages travel as objects, and every invariant is asserted
after each step; on a network without faults, and on one that loses and doubles one message of fifty, holds back one of twenty,
and delays each.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import math
import pstats
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from midge.transport.base import TransportEvent
from midge.transport.memory import Faults, MemoryBroker
from tests.machines import LAYOUT
from tests.sim.agent_process import Behaviour
from tests.sim.federation import Federation
from tests.sim.network import INSTANT
from tests.sim.scenario import LINKS
from tests.sim.world import World

_NUM_RUNS = 5
_BAD = LINKS[1]
_TURN_S = 0.002
"""A turn of the coordinator takes what came within so long, as its real loop takes what came while it was busy."""


@dataclass(frozen=True)
class Result:
    """What a run cost."""

    seconds: float
    num_deliveries: int


def simulate(num_agents: int, rounds: int, num_frames: int) -> Result:
    """Run a federation without faults to its end."""
    federation = Federation(
        1,
        [Behaviour(training_s=(0.0, 0.0))] * num_agents,
        rounds=rounds,
        num_frames=num_frames,
        has_faults=False,
        is_audited=False,
    )
    federation.turn_s = _TURN_S
    began = time.process_time()
    federation.start()
    if not federation.run(lambda: federation.is_done, 1e9):
        raise RuntimeError(f"{federation.num_committed} of {rounds} rounds were committed:\n{federation.story()}")
    return Result(time.process_time() - began, federation.broker.num_delivered)


def machines_alone(num_agents: int, rounds: int, num_frames: int, faults: Faults) -> Result:
    """Run bare machines to their end, with every invariant asserted."""
    agents = [f"agent-{index}" for index in range(num_agents)]
    frame_elements = math.ceil(LAYOUT.num_elements / num_frames)
    world = World(1, agents, rounds=rounds, frame_elements=frame_elements, faults=faults, is_busy=False)
    began = time.process_time()
    world.start()
    world.play(1e9)
    return Result(time.process_time() - began, world.network.num_messages)


def broker_alone(num_deliveries: int) -> float:
    """Seconds that the simulated broker takes for so many deliveries, half of them acknowledgements, which are ignored."""

    def ignore(event: TransportEvent) -> None:
        pass

    broker = MemoryBroker(random.Random(1))
    client = broker.transport("client", ignore)
    client.start()
    client.subscribe(["topic"])
    began = time.process_time()
    for _ in range(num_deliveries // 2):
        client.publish("topic", b"x" * 100)
        broker.deliver_next()
        broker.deliver_next()
    return time.process_time() - began


def report(num_agents: int, rounds: int, num_frames: int) -> str:
    """One line of the table."""
    best = min((simulate(num_agents, rounds, num_frames) for _ in range(_NUM_RUNS)), key=_seconds)
    alone = min(broker_alone(best.num_deliveries) for _ in range(_NUM_RUNS))
    per_delivery_us = best.seconds / best.num_deliveries * 1e6
    return (
        f"{num_agents:6} {rounds / best.seconds:10.0f} {best.seconds / rounds * 1e3:10.3f} "
        f"{best.num_deliveries / rounds:18.1f} {per_delivery_us:14.1f} {alone / best.seconds:14.0%}"
    )


def report_machines(num_agents: int, rounds: int, num_frames: int) -> str:
    """One line of the table of the machines alone."""
    good, bad = (
        min((machines_alone(num_agents, rounds, num_frames, faults) for _ in range(_NUM_RUNS)), key=_seconds)
        for faults in (INSTANT, _BAD)
    )
    return (
        f"{num_agents:6} {rounds / good.seconds:10.0f} {good.seconds / rounds * 1e3:10.3f} "
        f"{good.num_deliveries / rounds:16.1f} {rounds / bad.seconds:25.0f}"
    )


def _seconds(result: Result) -> float:
    return result.seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="2,3,10", help="numbers of agents (default 2,3,10)")
    parser.add_argument("--rounds", type=int, default=500, help="rounds of a run (default 500)")
    parser.add_argument(
        "--frames", type=int, default=2, choices=(1, 2, 3, 4, 5, 10), help="frames of a model (default 2)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where the time goes, for the first number of agents"
    )
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    numbers = [int(number) for number in options.agents.split(",")]
    if options.profile:
        with cProfile.Profile() as profile:
            simulate(numbers[0], options.rounds, options.frames)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    print("agents   rounds/s   ms/round   deliveries/round   us/delivery   broker alone")
    for number in numbers:
        print(report(number, max(1, options.rounds * 2 // number), options.frames))
    print("\nthe machines alone, every invariant asserted after each step")
    print("agents   rounds/s   ms/round   messages/round   rounds/s on a bad network")
    for number in numbers:
        print(report_machines(number, max(1, options.rounds * 2 // number), options.frames))


if __name__ == "__main__":
    main()
