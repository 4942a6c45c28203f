"""What `overhead.py` trains: scenario 2's network on scikit-learn's digits, scaled up to MNIST's 28 by 28.

    BENCH_EXAMPLES=3000 python -m benchmarks.overhead_task ROUNDS EPOCHS PART [--evaluate]

trains it without Midge's federation: a plain loop in one process, with the batches and steps that an agent would make.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from midge.tasks.base import DataSpec, State, seed_of
from midge.tasks.digits import DigitsTask
from midge.tasks.mnist import MnistTask
from midge.tasks.torch_task import EVALUATION_BATCH, Sgd, load_state, state_of

BATCH_SIZE = 64
LEARNING_RATE = 0.01
MOMENTUM = 0.5


class OverheadTask(MnistTask):
    """`mnist` without MNIST: as many examples as BENCH_EXAMPLES says, another draw for each part."""

    name = "overhead"

    def load_data(self, spec: DataSpec) -> tuple[Tensor, Tensor]:
        images, labels = DigitsTask().load_data(DataSpec())
        drawn = np.random.RandomState(spec.part).choice(len(labels), int(os.environ["BENCH_EXAMPLES"]))
        large = functional.interpolate(images.view(-1, 1, 8, 8), size=(28, 28), mode="bilinear")
        return (large[drawn] * 255).to(torch.uint8), labels[drawn]

    def load_test_data(self, spec: DataSpec) -> None:
        return None


def digest(state: State) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in state.values())).hexdigest()


def plain(rounds: int, epochs: int, part: int, *, evaluate: bool) -> dict[str, Any]:
    """Train; the seconds of each round, and the digest of the model at the end."""
    task = OverheadTask()
    images, labels = task.load_data(DataSpec(part=part))
    model = task.build_model()
    load_state(model, task.initial_state(0))
    seconds = []
    for round_num in range(1, rounds + 1):
        began = time.perf_counter()
        if evaluate:
            model.eval()
            with torch.no_grad():
                for start in range(0, len(labels), EVALUATION_BATCH):
                    outputs = model(task.prepare(images[start : start + EVALUATION_BATCH], training=False))
                    functional.nll_loss(outputs, labels[start : start + EVALUATION_BATCH]).item()
        model.train()
        optimizer = Sgd(list(model.parameters()), LEARNING_RATE, MOMENTUM)
        order = torch.Generator().manual_seed(seed_of(0, round_num, f"agent-{part}"))
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=order).split(BATCH_SIZE):
                optimizer.zero_grad()
                loss = functional.nll_loss(model(task.prepare(images[batch], training=True)), labels[batch])
                loss.backward()
                optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "digest": digest(state_of(model))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rounds", "epochs", "part"):
        parser.add_argument(name, type=int)
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    result = plain(options.rounds, options.epochs, options.part, evaluate=options.evaluate)
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
