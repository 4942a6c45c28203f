"""The strategies side by side, on digits: 10 agents with two labels each, one local epoch, 60 rounds.

    python benchmarks/strategies.py [--seeds 3] [--partition shards:2] [strategy ...]

Prints the accuracy on the test data after 10 and 30 rounds, and its mean over rounds 51 to 60, as a mean over seeds. It runs in
one process: the task's own training, the strategy's own steps with what it remembers, and no network, for speed. A run over
MQTT takes the same steps (tests/broker/test_strategies.py).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.strategies import STRATEGIES, Step, make_strategy
from midge.tasks.base import DataSpec, TrainSpec, seed_of
from midge.tasks.digits import DigitsTask
from midge.tasks.flatten import layout_of, state_to_vector, vector_to_state
from midge.wire.messages import TrainingConfig

NUM_AGENTS = 10
ROUNDS = 60


def accuracies(name: str, partition: str, seed: int) -> list[float]:
    """Of each round, in per cent."""
    task, strategy = DigitsTask(), make_strategy(name)
    specs = [DataSpec(partition=partition, part=part, num_parts=NUM_AGENTS, seed=seed) for part in range(NUM_AGENTS)]
    data = [task.load_data(spec) for spec in specs]
    state = task.initial_state(seed)
    layout = layout_of(state)
    model, _ = state_to_vector(state, layout)
    memory = [np.full(len(model), value, np.float32) for value in strategy.initial_state()]
    told = strategy.training(TrainingConfig(local_epochs=1, batch_size=10, learning_rate=0.1))
    found = []
    for round_num in range(1, ROUNDS + 1):
        visited = [(round_num - 1) % NUM_AGENTS] if strategy.in_turn else range(NUM_AGENTS)
        vectors, weights, num_examples = [], [], 0
        for part in visited:
            spec = TrainSpec(
                local_epochs=told.local_epochs,
                batch_size=told.batch_size,
                learning_rate=told.learning_rate,
                proximal_mu=told.proximal_mu,
                seed=seed_of(seed, round_num, f"agent-{part}"),
            )
            trained = task.train(vector_to_state(model, (), layout), data[part], spec, lambda _: None)
            vectors.append(state_to_vector(trained.state, layout)[0].astype(np.float64))
            weights.append(strategy.weight(trained.num_examples))
            num_examples += trained.num_examples
        mean: NDArray[np.float64] = np.average(vectors, axis=0, weights=weights)
        model = strategy.apply(model, mean, memory, Step(round_num, len(vectors), num_examples))
        score = task.evaluate(vector_to_state(model, (), layout), task.test_data())
        found.append(100 * score.metrics["accuracy"])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--partition", default="shards:2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'strategy':12} {'after 10':>9} {'after 30':>9} {'51 to 60':>15}")
    for name in options.strategies:
        runs = np.array([accuracies(name, options.partition, seed) for seed in range(options.seeds)])
        last = runs[:, 50:].mean(axis=1)
        after_10, after_30 = runs[:, 9].mean(), runs[:, 29].mean()
        print(f"{name:12} {after_10:9.1f} {after_30:9.1f} {last.mean():9.1f} ± {last.std():3.1f}", flush=True)


if __name__ == "__main__":
    main()
