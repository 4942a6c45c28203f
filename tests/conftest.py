"""For all tests: one that runs a program of ours in this process leaves the log as it found it."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _restored_log():
    loggers = [logging.getLogger(name) for name in (None, "midge", "coordinator", "edge_agent")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(capture=False)
