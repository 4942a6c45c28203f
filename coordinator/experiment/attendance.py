"""Who took part in which round, noted as rounds are committed: the database forgets it after a hundred of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.store import Store


class _Line(msgspec.Struct, frozen=True):
    round_num: int
    num_examples: dict[str, int]


class Attendance:
    """The examples that each counted update of each round was trained on.

    Args:
        path: a file of JSON lines, which is read and then appended to; a torn last line is dropped.

    Attributes:
        rounds: by round, agent ids and numbers of examples.
    """

    def __init__(self, path: Path) -> None:
        self.rounds: dict[int, dict[str, int]] = {}
        self._path = path
        text = path.read_bytes() if path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        for line in whole.splitlines():
            noted = msgspec.json.decode(line, type=_Line)
            self.rounds[noted.round_num] = noted.num_examples
        if torn:
            path.write_bytes(whole + b"\n" if whole else b"")

    def note(self, store: Store, run_id: str, last_round: int) -> None:
        """Note all rounds up to `last_round` that are committed and not noted yet.

        Raises:
            OSError: the disk is full or fails.
        """
        missing = range(max(self.rounds, default=0) + 1, last_round + 1)
        if not missing:
            return
        path = self._path
        with path.open("ab") as file:
            for round_num in missing:
                updates = store.updates(run_id, round_num)
                self.rounds[round_num] = {update.agent_id: update.num_examples for update in updates}
                file.write(msgspec.json.encode(_Line(round_num, self.rounds[round_num])) + b"\n")

    def clear(self) -> None:
        """Forget all: another run begins."""
        self.rounds.clear()
        self._path.unlink(missing_ok=True)
