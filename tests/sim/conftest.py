"""`pytest tests/sim --seed N` replays one seed; `--seeds N` tries seeds 0 to N - 1 (tests/conftest.py declares both)."""

import logging

import pytest

from tests.sim import measured


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a `seed` once for each."""
    if "seed" in metafunc.fixturenames:
        seed = metafunc.config.getoption("--seed")
        seeds = range(metafunc.config.getoption("--seeds")) if seed is None else [seed]
        metafunc.parametrize("seed", measured.first(measured.NUM_SEEDS, seeds))


@pytest.fixture(autouse=True)
def _silence():
    """What goes wrong here on purpose is not worth a log line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
