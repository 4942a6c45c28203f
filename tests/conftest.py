"""For all tests: one that runs a program of ours in this process leaves the log as it found it; no test is timed."""

import logging

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are shared and noisy
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _restored_log():
    loggers = [logging.getLogger(name) for name in (None, "midge", "coordinator", "edge_agent")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(capture=False)
