"""Seeds in groups: each group is one test, and each seed of it is tried whatever becomes of the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable

GROUP = 20
"""Seconds of work: enough groups for every worker, and few enough to collect and report in no time."""
_MOST_TOLD = 3


def groups(num_seeds: int) -> list[range]:
    """Seeds 0 to `num_seeds` - 1, in groups."""
    return [range(first, min(first + GROUP, num_seeds)) for first in range(0, num_seeds, GROUP)]


def name(group: range) -> str:
    """Names a group in the name of its test."""
    return f"{group.start}-{group.stop - 1}"


def each(group: range, attempt: Callable[[int], None]) -> None:
    """Try every seed of a group.

    Raises:
        AssertionError: names the seeds that failed, and how to replay one; it tells the first few failures in full.
    """
    failures = {}
    for seed in group:
        try:
            attempt(seed)
        except Exception as error:
            failures[seed] = error
    if failures:
        first = next(iter(failures))
        told = "\n\n".join(f"seed {seed}: {error!s}" for seed, error in itertools.islice(failures.items(), _MOST_TOLD))
        raise AssertionError(
            f"{len(failures)} of {len(group)} seeds failed: {', '.join(map(str, failures))}. "
            f"Replay one: pytest tests/sim --seed {first}\n{told}"
        ) from failures[first]
