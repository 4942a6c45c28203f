"""What a task's caller may have to handle. A file of its own, since a process at rest needs it and no NumPy."""

from __future__ import annotations


class TaskError(Exception):
    """A task cannot do what was asked: it is not found, its data are missing, its model does not fit. Says what to do."""
