"""The environment of child processes that must be as a user's are: coverage would load modules in them, and mind signals."""

from __future__ import annotations

import os


def unmeasured(**more: str) -> dict[str, str]:
    """This process's environment without what makes coverage follow children, and with `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")} | more
