"""Brings the Compose file up once for the tests that need it, and shows every service's log beside a test that failed."""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Iterator

import pytest

from tests.deploy.stack import Stack, missing

ENDLESS = 1_000_000
"""Rounds: a run that no machine ends while the tests are in its middle."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The running services; skips where no Docker engine answers."""
    if reason := missing():
        pytest.skip(reason)
    stack = Stack(ENDLESS)
    try:
        stack.up()
        yield stack
    except BaseException:
        print(_logs(stack))  # noqa: T201  pytest shows it with the failed set-up
        raise
    finally:
        stack.down()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and call.when == "call" and isinstance(stack, Stack):
        report.sections.append(("logs of all services", _logs(stack)))
    return report


def _logs(stack: Stack) -> str:
    try:
        return stack.logs()
    except (AssertionError, subprocess.SubprocessError, OSError) as error:
        return f"there are none: {error}"
