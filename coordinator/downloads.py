"""Models over HTTP, as `coordinator export` writes them. They are what the federation works for, so the token is needed.

/api/v1/runs/{run_id}/models/{which}          best, latest, or a round; `run_id` may be "latest"
/api/v1/runs/{run_id}/agents/{agent_id}/model an agent's last accepted one, where they are kept

A model is first written to a file without a name, so that what is sent is whole and checked, whatever is pruned meanwhile.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coordinator.control import Control
from coordinator.exports import Chosen, ExportError, choose_agent, choose_version
from coordinator.models import ModelError, write_export
from coordinator.store import Store

_CHUNK_BYTES = 1024 * 1024
_MAX_DOWNLOADS = 4
"""Each takes the model's size on the disk while it lasts."""


def download_routes(store: Store, control: Control | None, refuse: Callable[[], Response]) -> list[Route]:
    """The routes.

    Args:
        store: of the state directory.
        control: knows the token; None: nobody may.
        refuse: makes the answer for whoever may not.
    """
    room = threading.BoundedSemaphore(_MAX_DOWNLOADS)

    async def answer(request: Request, choose: Callable[[], Chosen]) -> Response:
        if control is None or not control.allows(request.headers.get("authorization", "")):
            return refuse()
        if not room.acquire(blocking=False):
            return JSONResponse({"error": f"{_MAX_DOWNLOADS} downloads are under way; try again"}, 503)
        try:
            name, file, size_bytes = await run_in_threadpool(_exported, choose, store.path.parent)
        except (ExportError, ModelError) as error:
            room.release()
            return JSONResponse({"error": str(error)}, 404)
        except OSError as error:
            room.release()
            return JSONResponse({"error": f"the disk failed: {error.strerror or error}"}, 507)

        def end() -> None:
            file.close()
            room.release()

        headers = {
            "content-length": str(size_bytes),
            "content-disposition": f'attachment; filename="{name}.safetensors"',
        }
        return _Download(_chunks(file), end, headers)

    async def version(request: Request) -> Response:
        run_id, which = request.path_params["run_id"], request.path_params["which"]
        return await answer(request, lambda: choose_version(store, run_id, which))

    async def agent(request: Request) -> Response:
        run_id, agent_id = request.path_params["run_id"], request.path_params["agent_id"]
        return await answer(request, lambda: choose_agent(store, run_id, agent_id))

    return [
        Route("/api/v1/runs/{run_id}/models/{which}", version),
        Route("/api/v1/runs/{run_id}/agents/{agent_id}/model", agent),
    ]


class _Download(StreamingResponse):
    """Calls `end` once, also where the other side goes away in the middle."""

    def __init__(self, chunks: Iterator[bytes], end: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(chunks, media_type="application/octet-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _exported(choose: Callable[[], Chosen], directory: Path) -> tuple[str, IO[bytes], int]:
    """Write the chosen model to a file that has no name, and vanishes when it is closed."""
    chosen = choose()
    with chosen.model as model:
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  closed when it was sent
        try:
            write_export(model, file.fileno())
        except BaseException:
            file.close()
            raise
    return chosen.name, file, os.fstat(file.fileno()).st_size


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
