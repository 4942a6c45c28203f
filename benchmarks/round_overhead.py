"""What a round costs when nothing is trained: the time from one committed version to the next.

    python benchmarks/round_overhead.py [--agents 2,5,10] [--rounds 40] [--large-rounds 6]

Coordinator and agents are processes of their own, as in the field, over a Mosquitto that this script starts; everything is
persisted as always. For the 45 MB model it also prints how long Mosquitto alone takes, in the same run, to carry the same bytes
(one version to each agent, one update from each) between bare connections.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

from coordinator.store import Store
from midge.eventqueue import EventQueue
from midge.transport.address import Address
from midge.transport.base import Connected, MessageReceived, Published
from midge.transport.brokers import start_local_broker
from midge.transport.mqtt import MqttTransport

ROOT = Path(__file__).parent.parent
FRAME_BYTES = 88 * 1024


def federation_s(url: str, directory: Path, task: str, num_agents: int, rounds: int) -> list[float]:
    """Seconds between commits, the first few left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    common = f"--broker {url} --federation bench-{num_agents} --task {task} --log-level error".split()
    state_dir = directory / f"coordinator-{num_agents}-{rounds}"
    run = (
        f"--rounds {rounds} --min-agents {num_agents} --http-port 0 --set keep_models=2 --state-dir {state_dir}".split()
    )
    agents = []
    for i in range(num_agents):
        own = f"--agent-id agent-{i} --state-dir {directory / 'agents'}".split()
        agents.append(subprocess.Popen([sys.executable, "-m", "edge_agent", "run", *common, *own], env=environment))
    try:
        command = [sys.executable, "-m", "coordinator", "run", *common, *run]
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait()
    store = Store(state_dir, read_only=True)
    versions = store.versions(store.runs()[0]["run_id"])
    store.close()
    times = [datetime.fromisoformat(version["created_at"]).timestamp() for version in versions]
    return [after - before for before, after in itertools.pairwise(times[2:])]


def raw_s(url: str, num_bytes: int, num_agents: int) -> float:
    """Seconds in which the broker alone carries a version to each agent, then an update from each, in frames."""
    num_frames = -(-num_bytes // FRAME_BYTES)
    frame = bytes(FRAME_BYTES)
    queues = [EventQueue() for _ in range(num_agents + 1)]
    ends = [MqttTransport(Address.parse(url), f"raw-{i}", queue, clean_start=True) for i, queue in enumerate(queues)]
    for end, queue in zip(ends, queues, strict=True):
        end.start()
        _wait(queue, Connected, 1)
    server, server_queue = ends[0], queues[0]
    for i, end in enumerate(ends[1:]):
        end.subscribe(["raw/down/+"])
        server.subscribe([f"raw/up/{i}/+"])
    time.sleep(0.3)
    began = time.perf_counter()
    _publish(server, server_queue, [f"raw/down/{i}" for i in range(num_frames)], frame)
    for queue in queues[1:]:
        _wait(queue, MessageReceived, num_frames)
    for i, (end, queue) in enumerate(zip(ends[1:], queues[1:], strict=True)):
        _publish(end, queue, [f"raw/up/{i}/{k}" for k in range(num_frames)], frame)
    _wait(server_queue, MessageReceived, num_frames * num_agents)
    took_s = time.perf_counter() - began
    for end in ends:
        end.stop()
    return took_s


def _publish(end: MqttTransport, queue: EventQueue, topics: list[str], frame: bytes) -> None:
    outstanding = 0
    for topic in topics:
        end.publish(topic, frame)
        outstanding += 1
        while outstanding >= 64:
            outstanding -= _take(queue, Published)


_seen: dict[tuple[int, type], int] = {}


def _take(queue: EventQueue, kind: type) -> int:
    """Take what waits; how many were of this kind. Others are remembered for `_wait`."""
    taken = queue.take(5.0)
    for event in taken:
        _seen[id(queue), type(event)] = _seen.get((id(queue), type(event)), 0) + 1
    return sum(isinstance(event, kind) for event in taken)


def _wait(queue: EventQueue, kind: type, count: int) -> None:
    end = time.monotonic() + 60
    while _seen.get((id(queue), kind), 0) < count:
        _take(queue, kind)
        if time.monotonic() > end:
            raise SystemExit(f"raw: {_seen.get((id(queue), kind), 0)} of {count} {kind.__name__} after 60 s")
    _seen[id(queue), kind] -= count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="2,5,10", help="how many agents, for the 10 KB model")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--large-rounds", type=int, default=6, help="rounds of the 45 MB model; 0 for none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="midge-bench-") as name:
        directory = Path(name)
        with start_local_broker("mosquitto", directory=directory / "broker") as broker:
            for num_agents in map(int, options.agents.split(",")):
                seconds = federation_s(broker.url, directory, "benchmarks.null_task:small", num_agents, options.rounds)
                spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
                print(
                    f"10 KB, {num_agents:2} agents: median {median(seconds) * 1e3:6.1f} ms a round ({spread})",
                    flush=True,
                )
            if options.large_rounds:
                raw = median(raw_s(broker.url, 45_000_000, 2) for _ in range(3))
                seconds = federation_s(broker.url, directory, "benchmarks.null_task:large", 2, options.large_rounds)
                middle = median(seconds)
                print(f"45 MB,  2 agents: median {middle:6.2f} s a round ({min(seconds):.2f} to {max(seconds):.2f})")
                print(
                    f"45 MB,  2 agents: {raw:13.2f} s, the same bytes through Mosquitto alone; ratio {middle / raw:.1f}"
                )


if __name__ == "__main__":
    main()
