"""What each agent last made of the model: kept only where the operator says so (`keep_agent_models`).

An agent's own model tells more of its data than a mean over many does: it is what attacks that rebuild training examples work
on. So by default it exists only as frames in the spool, until its round is averaged. Where it is kept, it is:

    <dir>/<run_id>/<agent_id>.<round_num>.safetensors

one for each agent, its last accepted one, of at most `MAX_AGENTS` agents (those that reported longest ago go first), until
another run begins or the setting is taken back.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coordinator.models import ModelFile, ModelStore
from coordinator.run_events import AcceptedUpdate
from coordinator.spool import RoundSpool
from midge.wire.frames import Framing, content_tag
from midge.wire.layout import Layout

MAX_AGENTS = 100
DIRECTORY = "agent-models"


class AgentModels:
    """The agents' models of one state directory.

    Args:
        state_dir: of the coordinator.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / DIRECTORY

    def keep(
        self,
        run_id: str,
        round_num: int,
        layout: Layout,
        framing: Framing,
        spool: RoundSpool,
        updates: Sequence[AcceptedUpdate],
    ) -> None:
        """Write the models of a round's accepted updates, from their frames, in place of those agents' earlier ones.

        Frames carry local values (decision 0001), so an update is its agent's model. One whose frames are gone is passed over:
        the round was dealt with before a restart.

        Raises:
            OSError: the disk is full or fails.
        """
        models = ModelStore(_made(self._path) / run_id)
        scratch = np.empty(framing.frame_elements, np.float32)
        for update in sorted(updates, key=lambda update: update.agent_id)[:MAX_AGENTS]:
            frames = spool.stored(update.agent_id, content_tag(update.update_digest))
            if len(frames) < framing.num_frames:
                continue
            with models.writer(layout, update.counters) as writer:
                for index in range(framing.num_frames):
                    start, stop = framing.span(index)
                    spool.read_into(frames[index], scratch[: stop - start])
                    writer.write(start, scratch[: stop - start])
                digest = writer.commit()
            (models.path / f"{digest}.safetensors").replace(models.path / f"{update.agent_id}.{round_num}.safetensors")
        self._prune(models.path)

    def agents(self, run_id: str) -> dict[str, tuple[int, Path]]:
        """The agents whose models of this run are kept, each with its round and its file."""
        found: dict[str, tuple[int, Path]] = {}
        for path in sorted((self._path / run_id).glob("*.*.safetensors")):
            agent_id, _, number = path.stem.rpartition(".")
            if number.isdecimal() and int(number) >= found.get(agent_id, (0, path))[0]:
                found[agent_id] = (int(number), path)
        return found

    def open(self, run_id: str, agent_id: str) -> tuple[int, ModelFile] | None:
        """The round and the model that an agent's last accepted update of a run was; None where it is not kept."""
        for _ in range(2):  # the coordinator may replace it meanwhile
            found = self.agents(run_id).get(agent_id)
            if found is None:
                return None
            with contextlib.suppress(FileNotFoundError):
                return found[0], ModelFile(found[1], "")
        return None

    def forget(self, *, but: str = "") -> None:
        """Delete all of it, but for what belongs to one run."""
        for path in self._path.glob("*"):
            if path.name != but:
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, directory: Path) -> None:
        latest = self.agents(directory.name)
        kept = sorted(latest.values(), key=lambda of: of[0], reverse=True)[:MAX_AGENTS]
        paths = {path for _, path in kept}
        for path in directory.glob("*.*.safetensors"):
            if path not in paths:
                path.unlink(missing_ok=True)


def _made(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
