"""`pytest tests/sim --seed N` replays one seed; `--seeds N` tries seeds 0 to N - 1."""

import logging

import pytest

NUM_SEEDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="Replay this seed alone.")
    parser.addoption("--seeds", type=int, default=NUM_SEEDS, help=f"How many seeds to try (default {NUM_SEEDS}).")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a `seed` once for each."""
    if "seed" in metafunc.fixturenames:
        config = metafunc.config  # the options are not there where another directory is collected first
        seed = config.getoption("--seed", default=None)
        seeds = range(config.getoption("--seeds", default=NUM_SEEDS)) if seed is None else [seed]
        metafunc.parametrize("seed", seeds)


@pytest.fixture(autouse=True)
def _silence():
    """What goes wrong here on purpose is not worth a log line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
