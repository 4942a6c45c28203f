"""What can be wrong with settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SettingsError(ValueError):
    """The settings cannot be used. Its text has one line for each of `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check found in settings whose fields are each right.

    Attributes:
        key: the field to complain about.
        text: what follows the key in the message, such as "is 5, above cohort (3): lower it, or raise cohort".
        involves: other fields that were looked at; the problem is dropped where one of them is itself wrong.
    """

    key: str
    text: str
    involves: tuple[str, ...] = ()
