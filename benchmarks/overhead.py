"""What federating costs: the same gradient steps with and without Midge, on the same cores, in one run.

    python benchmarks/overhead.py [--agents 1,2] [--rounds 10] [--epochs 5] [--examples 3000] [--repeat 3] [--evaluate-every 1]

The model is scenario 2's network (431,080 parameters, batches of 64, momentum 0.5), the data are scikit-learn's digits scaled
up to 28 by 28. With n agents there are three arms, all processes of each on the same n cores, one thread of torch each:

    plain       n processes at once, each a plain loop of PyTorch that makes the steps of one agent
    evaluating  the same, which before each round also do what an agent does: evaluate on their own data
    federated   Mosquitto, a coordinator and n agents

Wall time is from the start of the first process to the end of the last, with all that they import; a round is what lies
between two commits, or between two rounds of the plain loop. Processor time is the sum over all processes of the arm. With
one agent both must end with the same model to the bit, which is checked. Medians over the repetitions, arms in turn. On a
machine that others use too, look at processor time: wall time counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.overhead_task import BATCH_SIZE, LEARNING_RATE, MOMENTUM, digest
from coordinator.models import ModelStore
from coordinator.store import Store
from midge.transport.brokers import start_local_broker

ROOT = Path(__file__).resolve().parent.parent
TASK = "benchmarks.overhead_task:OverheadTask"


@dataclass(frozen=True)
class Took:
    """One repetition of an arm."""

    wall_s: float
    processor_s: float
    rounds_s: list[float]
    digests: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    rounds: int
    epochs: int
    examples: int
    evaluate_every: int = 1

    @property
    def environment(self) -> dict[str, str]:
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return {**os.environ, **one, "PYTHONPATH": str(ROOT), "BENCH_EXAMPLES": str(self.examples)}


class Clock:
    """Wall time since its making, and processor time of children that have ended since then."""

    def __init__(self) -> None:
        self._usage = self._now()
        self._began = time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began, self._now() - self._usage

    def _now(self) -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime


def run_plain(size: Size, num_processes: int, *, evaluate: bool) -> Took:
    clock = Clock()
    processes = []
    for part in range(num_processes):
        numbers = [str(size.rounds), str(size.epochs), str(part)]
        command = [sys.executable, "-m", "benchmarks.overhead_task", *numbers, *(["--evaluate"] if evaluate else [])]
        processes.append(subprocess.Popen(command, env=size.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    results = [json.loads(process.communicate()[0]) for process in processes]
    wall_s, processor_s = clock.read()
    slowest = [max(seconds) for seconds in zip(*(result["seconds"] for result in results), strict=True)]
    return Took(wall_s, processor_s, slowest[1:], {result["digest"] for result in results})


def run_federated(size: Size, num_agents: int, directory: Path) -> Took:
    with start_local_broker("mosquitto", directory=directory / "broker") as broker:
        broker_process = psutil.Process(broker.pid)
        broker_before_s = sum(broker_process.cpu_times()[:2])
        common = f"--broker {broker.url} --task {TASK} --log-level error".split()
        clock = Clock()
        agents = []
        for part in range(num_agents):
            own = f"--agent-id agent-{part} --index {part} --of {num_agents} --state-dir {directory / 'agents'}".split()
            command = [sys.executable, "-m", "edge_agent", "run", *common, *own]
            agents.append(subprocess.Popen(command, env=size.environment, cwd=ROOT))
        settings = {
            "local_epochs": size.epochs,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "keep_models": 3,
            "evaluate_every": size.evaluate_every,
        }
        command = [sys.executable, "-m", "coordinator", "run", *common, "--http-port", "0"]
        command += [
            "--rounds",
            str(size.rounds),
            "--min-agents",
            str(num_agents),
            "--state-dir",
            str(directory / "state"),
        ]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        try:
            subprocess.run(command, env=size.environment, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
            wall_s = clock.read()[0]
        finally:
            for agent in agents:
                agent.terminate()
            for agent in agents:
                agent.wait()
        processor_s = clock.read()[1] + sum(broker_process.cpu_times()[:2]) - broker_before_s
    store = Store(directory / "state", read_only=True)
    versions = store.versions(store.runs()[0]["run_id"])
    store.close()
    times = [datetime.fromisoformat(version["created_at"]).timestamp() for version in versions[1:]]
    with ModelStore(directory / "state" / "models").open(versions[-1]["digest"]) as model:
        last = digest(model.state())
    return Took(wall_s, processor_s, [after - before for before, after in itertools.pairwise(times)], {last})


def measure(size: Size, num_agents: int, repeat: int) -> None:
    took: dict[str, list[Took]] = {"plain": [], "evaluating": [], "federated": []}
    for _ in range(repeat):
        took["plain"].append(run_plain(size, num_agents, evaluate=False))
        took["evaluating"].append(run_plain(size, num_agents, evaluate=True))
        with tempfile.TemporaryDirectory(prefix="midge-bench-") as name:
            took["federated"].append(run_federated(size, num_agents, Path(name)))
        latest = ", ".join(f"{arm} {runs[-1].wall_s:.1f} ({runs[-1].processor_s:.1f})" for arm, runs in took.items())
        print(f"{num_agents} agents, wall (processor) seconds: {latest}", flush=True)
    steps = size.rounds * size.epochs * -(-size.examples // BATCH_SIZE)
    title = f"{num_agents} agent{'s' if num_agents > 1 else ''} on as many cores"
    print(f"\n{title}: {size.rounds} rounds of {size.epochs} epochs of {size.examples} examples, {steps} steps each")
    medians = {}
    for arm, runs in took.items():
        wall_s, processor_s = median(run.wall_s for run in runs), median(run.processor_s for run in runs)
        round_s = median(median(run.rounds_s) for run in runs)
        medians[arm] = wall_s, round_s, processor_s
        spread = f"{min(run.wall_s for run in runs):.1f} to {max(run.wall_s for run in runs):.1f}"
        print(f"  {arm:10}  wall {wall_s:6.1f} s ({spread}), a round {round_s:6.2f} s, processor {processor_s:6.1f} s")
    for base in ("plain", "evaluating"):
        ratios = [f"{ours / theirs:.3f}" for ours, theirs in zip(medians["federated"], medians[base], strict=True)]
        print(f"  federated / {base:10}  wall {ratios[0]}, a round {ratios[1]}, processor {ratios[2]}")
    if num_agents == 1:
        digests = set().union(*(run.digests for runs in took.values() for run in runs))
        print(f"  the same model to the bit: {'yes' if len(digests) == 1 else 'NO'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="1,2", help="how many agents")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5, help="local epochs of a round")
    parser.add_argument("--examples", type=int, default=3000, help="of each agent")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--evaluate-every", type=int, default=1, metavar="N", help="agents evaluate every N-th version")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    for num_agents in map(int, options.agents.split(",")):
        os.sched_setaffinity(0, cores[:num_agents])  # inherited by all that is started
        measure(
            Size(options.rounds, options.epochs, options.examples, options.evaluate_every), num_agents, options.repeat
        )
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    main()
