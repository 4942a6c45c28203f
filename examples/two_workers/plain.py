"""The same visits in plain PyTorch: no federation, no broker. Prints the loss on all four rows after each visit.

    python examples/two_workers/plain.py [SEED]

The same seed begins with the same model as a federation of that seed.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from two_workers import INPUTS, TARGETS

VISITS = 20
LEARNING_RATE = 0.1


def main() -> None:
    """Visit bob and alice in turn, one step each."""
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = {"bob": slice(0, 2), "alice": slice(2, 4)}
    for visit in range(VISITS):
        name = ("bob", "alice")[visit % 2]
        optimizer.zero_grad()
        ((model(INPUTS[rows[name]]) - TARGETS[rows[name]]) ** 2).sum().backward()
        optimizer.step()
        with torch.no_grad():
            loss = ((model(INPUTS) - TARGETS) ** 2).sum().item()
        print(f"{visit + 1:2}  {name:5}  {loss:.6f}")


if __name__ == "__main__":
    main()
