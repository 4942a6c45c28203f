"""Rounds of FedAvg to a target, for local epochs E and batch sizes B: the table of docs/scenarios/2-mnist-two-owners.md.

    python benchmarks/rounds_to_target.py [--target 0.95] [--seeds 3] [--max-rounds 1000]

Two owners of scikit-learn's digits, momentum 0.5, learning rate 0.1, weights = examples. E = 1 with all examples in one batch
is FedSGD. It trains with the task's own code and averages as the coordinator does, in one process and without a broker:
tests/broker/test_models.py holds that a federation over MQTT has the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import torch

from midge.tasks.base import DataSpec, State, TrainSpec, seed_of
from midge.tasks.digits import DigitsTask

LEARNING_RATE = 0.1
MOMENTUM = 0.5
KNOBS = [(1, 0), (5, 0), (20, 0), (1, 50), (5, 50), (20, 50), (1, 10), (5, 10), (20, 10)]
"""Local epochs and batch size; 0 is all examples at once."""
SPLITS: Mapping[str, Mapping[str, DataSpec]] = {
    "half each, at random": {
        "alice": DataSpec(partition="iid", part=0, num_parts=2),
        "bob": DataSpec(partition="iid", part=1, num_parts=2),
    },
    "0 to 4, and 5 to 9": {"alice": DataSpec(classes=(0, 1, 2, 3, 4)), "bob": DataSpec(classes=(5, 6, 7, 8, 9))},
}


def mean(states: Sequence[State], num_examples: Sequence[int]) -> State:
    """Weighted by examples, in float64, as coordinator/aggregate.py has it."""
    weights = [number / sum(num_examples) for number in num_examples]
    return {
        name: sum(
            weight * state[name].astype(np.float64) for weight, state in zip(weights, states, strict=True)
        ).astype(np.float32)
        for name in states[0]
    }


def rounds_to(
    target: float, owners: Mapping[str, DataSpec], epochs: int, batch_size: int, seed: int, limit: int
) -> int:
    """The first round whose model reaches `target` on the test images; above `limit` where none does."""
    task = DigitsTask()
    data = {name: task.load_data(spec) for name, spec in owners.items()}
    state = task.initial_state(seed)
    for round_num in range(1, limit + 1):
        trained = [
            task.train(
                state,
                data[name],
                TrainSpec(
                    local_epochs=epochs,
                    batch_size=batch_size,
                    learning_rate=LEARNING_RATE,
                    momentum=MOMENTUM,
                    seed=seed_of(seed, round_num, name),
                ),
                lambda fraction: None,
            )
            for name in sorted(data)
        ]
        state = mean([one.state for one in trained], [one.num_examples for one in trained])
        if task.evaluate(state, task.test_data()).metrics["accuracy"] >= target:
            return round_num
    return limit + 1


def cell(rounds: Sequence[int], limit: int) -> str:
    low, middle, high = min(rounds), int(median(rounds)), max(rounds)
    if middle > limit:
        return f"above {limit}"
    return str(middle) if low == high else f"{middle} ({low} to {f'above {limit}' if high > limit else high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.95, help="accuracy on the test images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-rounds", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| E | B | steps in a round | {' | '.join(SPLITS)} |")
    print("| --- " * (3 + len(SPLITS)) + "|", flush=True)
    num_examples = 1437 // 2
    for epochs, batch_size in KNOBS:
        cells = []
        for owners in SPLITS.values():
            seeds = range(1, options.seeds + 1)
            rounds = [rounds_to(options.target, owners, epochs, batch_size, s, options.max_rounds) for s in seeds]
            cells.append(cell(rounds, options.max_rounds))
        steps = epochs * -(-num_examples // (batch_size or num_examples))
        print(f"| {epochs} | {batch_size or 'all'} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
