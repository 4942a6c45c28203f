"""Identifiers: what may name a federation, a run or an agent, on every path and in every topic."""

from __future__ import annotations

import re

from midge.wire.errors import TopicError

PATTERN = r"\A[a-z0-9][a-z0-9_-]{0,63}\Z"
"""One to 64 of a-z, 0-9, `_` and `-`, not starting with a sign: safe as a topic level, a file name and a label.

It ends in `\\Z` because `$` also matches before a last line feed.
"""

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
