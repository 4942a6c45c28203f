"""For all tests: one that runs a program of ours in this process leaves the log as it found it; no test is timed."""

import logging

import pytest
from hypothesis import settings

from tests import fault_table
from tests.fault_table import recovery  # noqa: F401  a fixture

NUM_SEEDS = 200

settings.register_profile("untimed", deadline=None)  # machines are shared and noisy
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    fault_table.add_options(parser)
    parser.addoption("--seed", type=int, default=None, help="Replay this seed of tests/sim alone.")
    parser.addoption(
        "--seeds", type=int, default=NUM_SEEDS, help=f"How many seeds tests/sim tries (default {NUM_SEEDS})."
    )


def pytest_configure(config: pytest.Config) -> None:
    fault_table.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    fault_table.choose(config, items)


@pytest.fixture(autouse=True)
def _restored_log():
    loggers = [logging.getLogger(name) for name in (None, "midge", "coordinator", "edge_agent")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(capture=False)
