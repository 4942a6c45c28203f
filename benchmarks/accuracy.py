"""What federated averaging reaches on the digits, by the number of rounds, beside a reference that was measured elsewhere.

    python benchmarks/accuracy.py [--seeds 3] [--draws 4] [--only shards] [--json accuracy.json]

1437 images to train on and 360 to test on, cut anew by each seed; a perceptron of 64, 32 and 10 units; plain SGD in batches of
10 with step size 0.1; 10 agents, all in each round unless a row says otherwise, weighted by their examples. Everything that
decides the numbers is what runs in the field: the task's own training, evaluation and partitions, the frames, the spool, the
strategies and the aggregation. Only the broker and the processes of agents are left out: over MQTT the same would take hours.

The reference is three seeds of another implementation. So a seed cuts the images here too, and three are the default; a draw
is another start, deal and order of batches on a seed's cut. Between runs on shards these make a standard deviation of 0.9
points: with one draw of each cut, a mean is off by half a point by chance. Ours are printed as the mean and the standard
deviation s of n runs, seeds times draws. A number is **inside** where its mean differs from the reference's by no more than

    the reference's spread + our standard error, s / sqrt(n)

and rounds to 90 %, which are whole numbers, where our mean is no farther from the reference's range than half a round and our
standard error. That is said of the numbers whose spread or range the reference gives. The others are printed beside it, with
the difference, and judged by nobody: how far apart two of its own runs would be is not known. Exit status: 0 all are inside,
1 some are not.

The reference does not say how its shards were dealt nor where its weights began, and both matter. Here

- shards are as in McMahan et al. 2017 (https://arxiv.org/abs/1602.05629), who sort by label and cut pieces of one size: 20 of
  71 images, dealt at random, two to an agent. The 17 images that fill no shard, the last of label 9, are nobody's. A deal
  that leaves an agent with one label is dealt again: they are 2-label shards;
- weights begin as He et al. 2015 (https://arxiv.org/abs/1502.01852) have it for the backward pass, with variance 2 / units that
  they lead to. The task `digits` itself begins as they have it for the forward pass, 2 / units that they come from.

Of the deals and starts that were tried, these agree best with all rows together: docs/correctness.md says what others give.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor, nn

from coordinator.aggregate import CountedUpdate, aggregate
from coordinator.models import ModelStore
from coordinator.round import draw_order
from coordinator.spool import RoundSpool
from coordinator.strategies import make_strategy
from midge.tasks.base import DataSpec, State, TrainSpec, seed_of
from midge.tasks.digits import DigitsTask
from midge.tasks.flatten import layout_of, state_to_vector
from midge.tasks.partition import shards
from midge.wire.codecs import FLOAT32, encode_float32
from midge.wire.frames import Framing, content_tag, encode_frame, plan_framing, run_tag

NUM_AGENTS = 10
GOAL = 0.9
_SHARDS = 2
_HALF_A_ROUND = 0.5
_OF_A_DRAW = _OF_A_DEAL = 1000
"""Between the seeds of two draws, and of two runs' deals."""
_FEW = 20


@dataclass(frozen=True)
class Figure:
    """A number of the reference, in points: its mean, and its spread where one is given."""

    mean: float
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the reference.

    Attributes:
        partition: how the data are dealt; empty for all data in one place.
        epochs: passes an agent makes in a round.
        at: accuracy after so many rounds.
        last_ten: mean of the last ten of 100 rounds.
        to_goal: least and most rounds to 90 %.
        cohort: agents drawn a round.
        momentum: of the server.
    """

    name: str
    partition: str
    epochs: int
    at: tuple[tuple[int, Figure], ...] = ()
    last_ten: Figure | None = None
    to_goal: tuple[int, int] | None = None
    cohort: int = NUM_AGENTS
    momentum: float = 0.0
    rounds: int = 100


ROWS = (
    Row("IID, E=1", "iid", 1, ((10, Figure(90.6)), (50, Figure(96.0))), Figure(96.9, 0.1), (8, 11)),
    Row("IID, E=5", "iid", 5, ((10, Figure(96.2)), (50, Figure(97.4))), Figure(97.4, 0.1), (3, 3)),
    Row("shards, E=1", "shards:2", 1, ((10, Figure(77.6)), (50, Figure(93.6))), Figure(95.6, 0.3), (24, 33)),
    Row("shards, E=5", "shards:2", 5, ((10, Figure(84.4)), (50, Figure(94.4))), Figure(95.4, 0.6), (17, 23)),
    Row("shards, E=1, momentum .9", "shards:2", 1, ((60, Figure(96.4)),), momentum=0.9, rounds=60),
    Row("shards, E=1, 5 of 10", "shards:2", 1, ((60, Figure(90.0)),), cohort=5, rounds=60),
    Row("IID, E=1, 5 of 10", "iid", 1, ((60, Figure(96.1)),), cohort=5, rounds=60),
    Row("centralised, 50 epochs", "", 1, ((50, Figure(97.2, 0.5)),), rounds=50),
)


class Digits(DigitsTask):
    """`digits`, from the reference's start."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return model


def federate(row: Row, cut: int, seed: int, directory: Path) -> list[float]:
    """The accuracy on the test images after each round.

    Args:
        row: what is done.
        cut: seed of which images are to test on.
        seed: of all else.
        directory: for models and updates.
    """
    task = Digits(split_seed=cut)
    agents = [f"agent-{number}" for number in range(1, NUM_AGENTS + 1)]
    data = dict(zip(agents, deal(task, row.partition, seed), strict=True))
    models = ModelStore(directory / "models")
    state = task.initial_state(seed)
    framing = plan_framing(layout_of(state).num_elements)
    strategy = make_strategy("fedavgm", {"momentum": row.momentum}) if row.momentum else make_strategy("fedavg")
    digest, server_state = models.save_state(state), None
    accuracies = []
    for round_num in range(1, row.rounds + 1):
        spool = RoundSpool(directory / f"{round_num}.spool")
        counted = []
        for agent_id in sorted(draw_order(agents, seed, round_num)[: row.cohort]):
            trained = task.train(state, data[agent_id], _spec(row, seed, round_num, agent_id), _nothing)
            counted.append(_store(spool, framing, round_num, agent_id, trained.state, trained.num_examples))
        with models.open(digest) as base:
            made = aggregate(
                base, spool, counted, strategy, framing, models, round_num=round_num, server_state=server_state
            )
        spool.close()
        spool.path.unlink()
        for outlived in {digest, server_state} - {made.digest, made.server_state, None}:
            models.delete(outlived)
        digest, server_state = made.digest, made.server_state
        with models.open(digest) as model:
            state = {name: array.copy() for name, array in model.state().items()}
        accuracies.append(task.evaluate(state, task.test_data()).metrics["accuracy"])
    return accuracies


def deal(task: DigitsTask, partition: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each agent's data: inputs float32[n, 64] and labels int64[n]."""
    if partition == f"shards:{_SHARDS}":
        return _deal_shards(*task.load_data(DataSpec()), seed)
    return [
        task.load_data(DataSpec(partition=partition, part=part, num_parts=NUM_AGENTS, seed=seed))
        for part in range(NUM_AGENTS)
    ]


def _deal_shards(images: Tensor, labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`shards` of what is left of the data once every shard is of one size: the first deal with two labels for each agent."""
    num_dealt = len(labels) - len(labels) % (_SHARDS * NUM_AGENTS)
    dealt = np.sort(np.argsort(labels.numpy(), kind="stable")[:num_dealt])
    for deal_seed in itertools.count(_OF_A_DEAL * seed):
        hands = [dealt[part] for part in shards(labels.numpy()[dealt], _SHARDS, NUM_AGENTS, deal_seed)]
        if all(_num_labels(labels[hand]) >= _SHARDS for hand in hands):
            return [(images[hand], labels[hand]) for hand in hands]
    raise AssertionError


def _num_labels(labels: Tensor) -> int:
    """How many labels there are, but for those of a few examples, where a shard's end is not a label's."""
    return int((labels.bincount() >= _FEW).sum())


def centralize(row: Row, cut: int, seed: int) -> list[float]:
    """The accuracy on the test images after each epoch over all data."""
    task = Digits(split_seed=cut)
    data, state = task.load_data(DataSpec()), task.initial_state(seed)
    accuracies = []
    for epoch in range(1, row.rounds + 1):
        state = task.train(state, data, _spec(row, seed, epoch, "centralized"), _nothing).state
        accuracies.append(task.evaluate(state, task.test_data()).metrics["accuracy"])
    return accuracies


def run(row: Row, cut: int, draw: int) -> list[float]:
    """One run, in a process of its own."""
    seed = cut + _OF_A_DRAW * draw
    if not row.partition:
        return centralize(row, cut, seed)
    with tempfile.TemporaryDirectory(prefix="midge-accuracy-") as directory:
        return federate(row, cut, seed, Path(directory))


def _spec(row: Row, seed: int, round_num: int, trainer: str) -> TrainSpec:
    return TrainSpec(local_epochs=row.epochs, batch_size=10, learning_rate=0.1, seed=seed_of(seed, round_num, trainer))


def _store(
    spool: RoundSpool, framing: Framing, round_num: int, agent_id: str, state: State, num_examples: int
) -> CountedUpdate:
    """Put an update into the spool, as if its frames had come."""
    vector, counters = state_to_vector(state, layout_of(state))
    tag = content_tag(hashlib.sha256(vector.tobytes()).hexdigest())
    for index in range(framing.num_frames):
        start, stop = framing.span(index)
        frame = encode_frame(
            codec=FLOAT32,
            run_tag=run_tag("accuracy"),
            round_num=round_num,
            index=index,
            num_elements=stop - start,
            content_tag=tag,
            body=encode_float32(vector[start:stop]),
        )
        spool.append(agent_id, frame, bytes(32), 0.0)
    return CountedUpdate(agent_id, tag, num_examples, counters)


def _nothing(_: float) -> None:
    pass


@dataclass(frozen=True)
class Check:
    """One number of ours beside the reference's; `inside` is None where the reference gives no spread."""

    row: str
    what: str
    reference: str
    ours: str
    difference: str
    inside: bool | None


def checks_of(row: Row, runs: list[list[float]]) -> list[Check]:
    """All numbers of a row; `runs` has the accuracies by round, a list a run."""
    checks = [_check(row, f"after {number}", figure, [one[number - 1] for one in runs]) for number, figure in row.at]
    if row.last_ten is not None:
        checks.append(_check(row, "mean of 91-100", row.last_ten, [statistics.fmean(one[90:100]) for one in runs]))
    if row.to_goal is not None:
        least, most = row.to_goal
        counts = [next((number for number, one in enumerate(run, 1) if one >= GOAL), math.inf) for run in runs]
        mean, error = statistics.fmean(counts), _standard_error(counts)
        outside, allowed = max(least - mean, mean - most, 0.0), _HALF_A_ROUND + error
        checks.append(
            Check(
                row.name,
                "rounds to 90 %",
                f"{least}-{most}" if most > least else f"{most}",
                f"{mean:.1f} ({min(counts):g}-{max(counts):g})",
                f"{outside:.1f} outside, may be {allowed:.1f}",
                outside <= allowed,
            )
        )
    return checks


def _check(row: Row, what: str, reference: Figure, shares: list[float]) -> Check:
    points = [100 * share for share in shares]
    mean, error = statistics.fmean(points), _standard_error(points)
    difference = mean - reference.mean
    shown = f"{mean:.1f} ± {error * math.sqrt(len(points)):.1f}"
    if reference.spread is None:
        return Check(row.name, what, f"{reference.mean:.1f}", shown, f"{difference:+.1f}", None)
    known, allowed = f"{reference.mean:.1f} ± {reference.spread:.1f}", reference.spread + error
    text = f"{difference:+.1f}, may be {allowed:.1f}"
    return Check(row.name, what, known, shown, text, abs(difference) <= allowed)


def _standard_error(numbers: list[float]) -> float:
    """Of the mean; 0 for a single number, which tells nothing of how far others would be."""
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return 0.0
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def _show(checks: list[Check], num_runs: int) -> None:
    print(f"{'':26}{'':15}{'reference':>11}  {f'ours, {num_runs} runs':15}{'difference':25}")
    latest = ""
    for check in checks:
        verdict = {True: "inside", False: "NOT INSIDE", None: "no spread given"}[check.inside]
        name = "" if check.row == latest else check.row
        latest = check.row
        print(f"{name:26}{check.what:15}{check.reference:>11}  {check.ours:15}{check.difference:25}{verdict}")


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3, as the reference has)")
    parser.add_argument("--draws", type=int, default=4, help="of each seed (default 4; 1 takes a quarter of the time)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it")
    parser.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 8), help="at once (default: every core)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every accuracy of every round there")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.only in row.name]
    began = time.monotonic()
    os.environ.update(
        dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    )  # the children's
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        runs = list(itertools.product(range(options.seeds), range(options.draws)))
        pending = {(row, *each): pool.submit(run, row, *each) for row in rows for each in runs}
        done = {key: future.result() for key, future in pending.items()}
    found = [check for row in rows for check in checks_of(row, [done[row, *each] for each in runs])]
    _show(found, len(runs))
    num_missed = sum(check.inside is False for check in found)
    num_judged = sum(check.inside is not None for check in found)
    took = f"{time.monotonic() - began:.0f} s in {options.processes} processes"
    print(f"inside: |ours - reference| <= the reference's spread + our standard error. {took}")
    print(f"{num_judged - num_missed} of {num_judged} are inside; the reference gives no spread for the other numbers")
    if options.json:
        curves = [
            {"row": row.name, "seed": seed, "draw": draw, "accuracy": one} for (row, seed, draw), one in done.items()
        ]
        Path(options.json).write_text(json.dumps(curves), encoding="utf-8")
    sys.exit(1 if num_missed else 0)


if __name__ == "__main__":
    main()
