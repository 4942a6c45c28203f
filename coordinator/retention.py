"""What is kept on disk of a run: its latest models, the best one, the latest server state, the frames of the round at hand."""

from __future__ import annotations

from coordinator.models import ModelStore
from coordinator.spool import Spool
from coordinator.store import Store

_LEAST_KEPT = 3
"""Versions before the last may be under evaluation still, and turn out to be the best."""


class Retention:
    """Deletes what is not needed any more.

    Args:
        store: the database.
        models: the models.
        spool: the frames.
        keep_models: latest versions to keep, besides the best; at least three are.
    """

    def __init__(self, store: Store, models: ModelStore, spool: Spool, keep_models: int) -> None:
        self._store = store
        self._models = models
        self._spool = spool
        self._keep = max(keep_models, _LEAST_KEPT)
        self._best: int | None = None
        self._best_digest: str | None = None

    def committed(self, run_id: str, round_num: int, best_round: int | None) -> None:
        """A version was committed, or a better one was found."""
        self._spool.prune(run_id, round_num + 1)
        forgotten = self._store.lone_digest(run_id, round_num - 1, kept_from=round_num, of="server_state")
        if forgotten is not None:  # whatever goes on from here starts from the version that is stored now
            self._models.delete(forgotten)
        candidates = {round_num - self._keep}
        if self._best is not None and self._best != best_round and self._best <= round_num - self._keep:
            candidates.add(self._best)
        if best_round != self._best:
            self._best, self._best_digest = best_round, self._digest(run_id, best_round)
        candidates.discard(best_round if best_round is not None else -1)
        for candidate in candidates:
            digest = self._store.lone_digest(run_id, candidate, kept_from=round_num - self._keep + 1)
            if digest is not None and digest != self._best_digest:
                self._models.delete(digest)

    def refused(self, digest: str, server_state: str | None) -> None:
        """A candidate was refused: its files go, unless a version or a base model has the same content."""
        for one in (digest, server_state):
            if one is not None and not self._store.uses(one):
                self._models.delete(one)

    def _digest(self, run_id: str, round_num: int | None) -> str | None:
        versions = self._store.versions(run_id) if round_num is not None else []
        return next((row["digest"] for row in versions if row["round_num"] == round_num), None)
