"""Identifiers: what may name a federation, a run or an agent, on every path and in every topic; and what names a task."""

from __future__ import annotations

import re

from midge.wire.errors import TopicError

PATTERN = r"\A[a-z0-9][a-z0-9_-]{0,63}\Z"
"""One to 64 of a-z, 0-9, `_` and `-`, not starting with a sign: safe as a topic level, a file name and a label.

It ends in `\\Z` because `$` also matches before a last line feed.
"""

MAX_TASK_NAME = 200
"""Characters of a task's name, as messages hold it."""

_IDENTIFIER = re.compile(PATTERN)


def is_identifier(text: str) -> bool:
    """Whether `text` may name a federation, a run or an agent."""
    return _IDENTIFIER.fullmatch(text) is not None


def check_identifier(kind: str, text: str) -> str:
    """Return `text` if it is an identifier.

    Raises:
        TopicError: it is not; the message says what `kind` of name was expected.
    """
    if not is_identifier(text):
        shown = repr(text if len(text) <= 80 else text[:77] + "...")
        raise TopicError(f"{kind} {shown}: expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9")
    return text


def task_name(reference: str) -> str:
    """The name of a task, as it travels and is compared: the reference to it, less the directories of a file.

    So `/opt/tasks/my_task.py:task` and `./my_task.py:task` name one task, wherever each machine keeps it. All other
    references are names as they are.
    """
    return reference.rpartition("/")[2]
