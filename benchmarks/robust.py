"""What robust rules are worth, and what they cost: two of ten agents attack, on the digits.

    python benchmarks/robust.py [--seeds 1] [--rounds 30] [--partition shards:2] [--attack sign-flip] [--rule krum]

Ten agents train a perceptron of 64, 32 and 10 units with plain SGD (batches of 10, step size 0.1, one local epoch), all in each
round, on alike data (`iid`) or on two digits each (`shards:2`). Agents 1 and 2 send something else:

    none        what they learned
    sign-flip   the global model less ten times what they learned
    scaled      the global model and a hundred times what they learned
    nan         what they learned, with one element that is no number
    label-flip  what they learned from labels 9 - y
    free-rider  the global model as it came

Printed is the accuracy on the test images after the last round, in points, the median of the seeds. Everything that decides it
is what runs in the field: the task's own training and evaluation, the gates, the frames, the spool, the strategies, and the
aggregation with its divergence guard (`max_step_ratio` at 10). A round whose step is refused leaves the model as it is; `!`
marks cells where that happened. Only the broker and the processes of agents are left out.

A seed has 72 runs of 30 rounds. On two cores that others used too (load 24), the two partitions side by side took 20 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from benchmarks.accuracy import NUM_AGENTS, deal
from coordinator.admission import Gates
from coordinator.aggregate import AggregationError, CountedUpdate, aggregate
from coordinator.gates import delta_sum_squares
from coordinator.models import ModelStore
from coordinator.spool import RoundSpool
from coordinator.strategies import Strategy, make_strategy
from midge.tasks.base import State, TrainSpec, seed_of
from midge.tasks.digits import DigitsTask
from midge.tasks.flatten import layout_of, state_to_vector
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, plan_framing, run_tag, update_digest
from midge.wire.layout import Layout
from midge.wire.messages import UpdateHeader

Vector = NDArray[np.float32]
NUM_ATTACKERS = 2
PARTITIONS = ("iid", "shards:2")
ATTACKS = ("none", "sign-flip", "scaled", "nan", "label-flip", "free-rider")
RULES = ("mean", "clipped mean", "median", "trimmed-mean", "krum", "multi-krum")
_LARGEST_LABEL = 9
_MAX_STEP_RATIO = 10.0


@dataclass(frozen=True)
class Run:
    """One run: who attacks how, and what defends."""

    partition: str
    attack: str
    rule: str
    seed: int
    rounds: int


@dataclass(frozen=True)
class Outcome:
    """Accuracy after the last round, a fraction, and how often an update or a step was refused."""

    accuracy: float
    num_rejected: int
    num_refused: int


def strategy_of(rule: str) -> Strategy:
    """The rule, told that two may be hostile."""
    if rule == "mean":
        return make_strategy("fedavg")
    if rule == "clipped mean":
        return make_strategy("fedavg", clip_to_median=1.5)
    options = {"trim": NUM_ATTACKERS / NUM_AGENTS} if rule == "trimmed-mean" else {"num_byzantine": NUM_ATTACKERS}
    return make_strategy(rule, {} if rule == "median" else options)


def sent(attack: str, base: Vector, learned: Vector) -> Vector:
    """What an attacker sends, float32[n]."""
    delta = learned.astype(np.float64) - base
    match attack:
        case "sign-flip":
            return (base - 10 * delta).astype(np.float32)
        case "scaled":
            return (base + 100 * delta).astype(np.float32)
        case "nan":
            return np.concatenate([learned[:-1], np.full(1, np.nan, np.float32)])
        case "free-rider":
            return base.copy()
        case _:
            return learned


class _Round:
    """What the coordinator has of a round: its spool, its gates and the updates that passed them."""

    def __init__(self, path: Path, number: int, digest: str, base: Vector, layout: Layout, framing: Framing) -> None:
        self.spool = RoundSpool(path)
        self.counted: list[CountedUpdate] = []
        self.num_rejected = 0
        self._number, self._digest, self._base = number, digest, base
        self._layout, self._framing = layout, framing
        self._gates = Gates(layout=layout, num_frames=framing.num_frames, max_examples=10**6)

    def receive(self, agent_id: str, vector: Vector, num_examples: int, counters: tuple[int, ...]) -> None:
        """An update comes: its frames go to the spool, and the gates judge it."""
        spans = [self._framing.span(index) for index in range(self._framing.num_frames)]
        bodies = [encode_float32(vector[start:stop]) for start, stop in spans]
        digest, squares = update_digest(hashlib.sha256(body).digest() for body in bodies), []
        for index, ((start, stop), body) in enumerate(zip(spans, bodies, strict=True)):
            squares.append(delta_sum_squares(vector[start:stop], self._base[start:stop]))
            frame = encode_frame(
                codec=FLOAT32,
                run_tag=run_tag("robust"),
                round_num=self._number,
                index=index,
                num_elements=stop - start,
                content_tag=content_tag(digest),
                body=body,
            )
            self.spool.append(agent_id, frame, hashlib.sha256(body).digest(), squares[-1])
        header = UpdateHeader(
            run_id="robust",
            epoch=1,
            round_num=self._number,
            attempt=1,
            model_digest=self._digest,
            layout_digest=self._layout.digest,
            update_digest=digest,
            num_frames=len(bodies),
            num_examples=num_examples,
            counters=counters,
        )
        norm = float(np.sqrt(sum(squares)))
        if self._gates.check_header(header, self._digest) or self._gates.check_update(header, digest, norm):
            self.num_rejected += 1
        else:
            self.counted.append(CountedUpdate(agent_id, content_tag(digest), num_examples, counters))

    def close(self) -> None:
        """The round is over."""
        self.spool.close()
        self.spool.path.unlink()


def federate(run: Run, directory: Path) -> Outcome:
    """The whole of one run."""
    task, strategy = DigitsTask(split_seed=run.seed), strategy_of(run.rule)
    agents = [f"agent-{number:02}" for number in range(1, NUM_AGENTS + 1)]
    data = dict(zip(agents, deal(task, run.partition, run.seed), strict=True))
    hostile = set(agents[:NUM_ATTACKERS])
    if run.attack == "label-flip":
        data |= {agent_id: (data[agent_id][0], _LARGEST_LABEL - data[agent_id][1]) for agent_id in hostile}
    models = ModelStore(directory / "models")
    state = task.initial_state(run.seed)
    layout = layout_of(state)
    framing = plan_framing(layout.num_elements)
    digest = models.save_state(state)
    num_rejected = num_refused = 0
    for number in range(1, run.rounds + 1):
        base = state_to_vector(state, layout)[0]
        round_ = _Round(directory / f"{number}.spool", number, digest, base, layout, framing)
        for agent_id in agents:
            trained = task.train(state, data[agent_id], _spec(run.seed, number, agent_id), _nothing)
            learned, counters = state_to_vector(trained.state, layout)
            vector = sent(run.attack, base, learned) if agent_id in hostile else learned
            round_.receive(agent_id, vector, trained.num_examples, counters)
        num_rejected += round_.num_rejected
        try:
            with models.open(digest) as model:
                made = aggregate(
                    model, round_.spool, round_.counted, strategy, framing, models,
                    round_num=number, max_step_ratio=_MAX_STEP_RATIO,
                )  # fmt: skip
        except AggregationError:
            num_refused += 1
        else:
            if made.digest != digest:
                models.delete(digest)
            digest = made.digest
            state = _state(models, digest)
        round_.close()
    accuracy = task.evaluate(state, task.test_data()).metrics["accuracy"]
    return Outcome(accuracy, num_rejected, num_refused)


def _state(models: ModelStore, digest: str) -> State:
    with models.open(digest) as model:
        return {name: array.copy() for name, array in model.state().items()}


def _spec(seed: int, round_num: int, agent_id: str) -> TrainSpec:
    return TrainSpec(local_epochs=1, batch_size=10, learning_rate=0.1, seed=seed_of(seed, round_num, agent_id))


def _nothing(_: float) -> None:
    pass


def work(run: Run) -> Outcome:
    """One run, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="midge-robust-") as directory:
        return federate(run, Path(directory))


def table_of(partition: str, attacks: list[str], rules: list[str], done: dict[Run, Outcome]) -> Table:
    """Accuracy by attack and rule."""
    table = Table(title=f"{partition}: accuracy in points, {NUM_ATTACKERS} of {NUM_AGENTS} agents attack")
    table.add_column("attack")
    for rule in rules:
        table.add_column(rule, justify="right")
    for attack in attacks:
        cells = []
        for rule in rules:
            found = [
                one for run, one in done.items() if (run.partition, run.attack, run.rule) == (partition, attack, rule)
            ]
            mark = "!" if any(one.num_refused for one in found) else ""
            cells.append(f"{100 * statistics.median(one.accuracy for one in found):.1f}{mark}")
        table.add_row(attack, *cells)
    return table


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--rounds", type=int, default=30, help="of each run (default 30)")
    parser.add_argument(
        "--partition", action="append", choices=PARTITIONS, help="this one; may be given more than once"
    )
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="likewise")
    parser.add_argument("--rule", action="append", choices=RULES, help="likewise")
    parser.add_argument("--processes", type=int, default=1, help="at once (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write every run's outcome there")
    options = parser.parse_args()
    partitions, attacks = options.partition or list(PARTITIONS), options.attack or list(ATTACKS)
    rules = options.rule or list(RULES)
    runs = [
        Run(partition, attack, rule, seed, options.rounds)
        for partition in partitions
        for seed in range(options.seeds)
        for attack in attacks
        for rule in rules
    ]
    # The children's: a perceptron of this size is slower on several threads.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    began, done = time.monotonic(), {}
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(width=110)
    with (
        ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("runs", total=len(runs))
        pending: dict[Future[Outcome], Run] = {pool.submit(work, run): run for run in runs}
        for future in as_completed(pending):
            done[pending[future]] = future.result()
            progress.advance(bar)
    for partition in partitions:
        console.print(table_of(partition, attacks, rules, done))
    counts = sum(one.num_rejected for one in done.values()), sum(one.num_refused for one in done.values())
    console.print(
        f"{options.rounds} rounds, median of {options.seeds} seed(s); the gates rejected {counts[0]} updates, "
        f"{counts[1]} steps were refused (!); {time.monotonic() - began:.0f} s in {options.processes} process(es)",
        soft_wrap=True,
    )
    if options.json:
        found = [asdict(run) | asdict(one) for run, one in done.items()]
        Path(options.json).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
