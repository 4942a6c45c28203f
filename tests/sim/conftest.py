"""`pytest tests/sim --seed N` replays one seed; `--seeds N` tries seeds 0 to N - 1 (tests/conftest.py declares both).

A test that takes `seeds` gets a few at once: ten thousand tests are slow to collect and to report, and one test of ten thousand
seeds cannot be shared out. It goes through them with `each`, which names those that failed.
"""

import logging

import pytest

from tests import measured
from tests.sim import seeds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `seeds` once for each group of them."""
    if "seeds" in metafunc.fixturenames:
        seed, num_seeds = metafunc.config.getoption("--seed"), metafunc.config.getoption("--seeds")
        groups = seeds.groups(num_seeds) if seed is None else [range(seed, seed + 1)]
        metafunc.parametrize("seeds", measured.first(1, groups), ids=seeds.name)


@pytest.fixture(autouse=True)
def _silence():
    """What goes wrong here on purpose is not worth a log line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
