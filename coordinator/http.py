"""What the coordinator serves over HTTP: metrics for Prometheus, health for supervisors, and its state as JSON.

/metrics        Prometheus' text format
/healthz        200 while the loop and the network thread turn; 503 where one has not for a while
/readyz         200 while the broker can be reached and the state directory written; else 503 and why
/api/v1/status  the board: run, round, agents, history
/api/v1/watch   the board, a line each time that it changed, until the run is over
/api/v1/runs, /api/v1/runs/{run_id}/versions, /api/v1/agents
/api/v1/runs/{run_id}/updates  what each agent's updates said: metrics of the training and of the evaluation before it

With the token that `service.json` holds (`Authorization: Bearer ...`), models (downloads.py), and what changes something:

/api/v1/round/close  (POST) close the current round with what has come; the answer says what came of it
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from coordinator.board import Shared
from coordinator.control import Control
from coordinator.downloads import download_routes
from coordinator.metrics import CollectorRegistry, render
from coordinator.run import FINAL
from coordinator.store import Store
from midge.log import log_event

_log = logging.getLogger("coordinator")
SERVICE_FILE = "service.json"
_STALLED_S = 30.0
_WATCH_EVERY_S = 0.25
"""Less than what the server waits at its end: so the last line, that the run is over, still goes out."""
_SILENCE_S = 5.0
"""A watcher hears something at least this often, and knows that we live."""
_MAX_WATCHERS = 16
_FINAL_STATES = frozenset(FINAL)
_ANSWER_S = 20.0
"""A turn of the coordinator's loop takes milliseconds; one that takes so long is stalled, or over."""


class HttpError(Exception):
    """The address cannot be served; the message says why and what to do."""


class Heart:
    """When the coordinator's loop last turned, and what stands in the way of its work."""

    def __init__(self) -> None:
        self.beat_at = time.monotonic()
        self.problem = ""
        self.network_is_stuck = False

    def beat(self) -> None:
        """The loop turned."""
        self.beat_at = time.monotonic()


def make_app(
    registry: CollectorRegistry, shared: Shared, store: Store, heart: Heart, control: Control | None = None
) -> Starlette:
    """The application. Without `control` it changes nothing."""

    async def metrics(request: Request) -> Response:  # noqa: ARG001
        content_type, body = await run_in_threadpool(render, registry)
        return Response(body, headers={"content-type": content_type})

    async def healthz(request: Request) -> Response:  # noqa: ARG001
        stalled_s = time.monotonic() - heart.beat_at
        if stalled_s > _STALLED_S:
            return JSONResponse({"status": "stalled", "for_s": round(stalled_s)}, 503)
        if heart.network_is_stuck:
            return JSONResponse({"status": "the network thread is dead or stuck"}, 503)
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:  # noqa: ARG001
        problem = heart.problem
        if not shared.board.is_connected:
            problem = f"the broker cannot be reached: {shared.board.broker_problem or 'connecting'}"
        return JSONResponse({"status": problem or "ready"}, 503 if problem else 200)

    async def status(request: Request) -> Response:  # noqa: ARG001
        return _json(await run_in_threadpool(shared.snapshot))

    num_watchers = 0

    async def boards() -> AsyncIterator[bytes]:
        nonlocal num_watchers
        num_watchers += 1
        try:
            said, said_at = b"", -math.inf
            while True:
                line, is_over = await run_in_threadpool(_board_line, shared)
                if line != said or time.monotonic() - said_at > _SILENCE_S:
                    yield line
                    said, said_at = line, time.monotonic()
                if is_over:
                    return
                await asyncio.sleep(_WATCH_EVERY_S)
        finally:
            num_watchers -= 1

    async def watch(request: Request) -> Response:  # noqa: ARG001
        if num_watchers >= _MAX_WATCHERS:
            return JSONResponse({"error": f"{_MAX_WATCHERS} are watching already; ask /api/v1/status"}, 503)
        return StreamingResponse(boards(), media_type="application/x-ndjson")

    async def runs(request: Request) -> Response:  # noqa: ARG001
        return _json(await run_in_threadpool(store.runs))

    async def versions(request: Request) -> Response:
        run_id = request.path_params["run_id"]
        if await run_in_threadpool(store.run, run_id) is None:
            return JSONResponse({"error": "there is no such run; /api/v1/runs lists them"}, 404)
        return _json(await run_in_threadpool(store.versions, run_id))

    async def updates(request: Request) -> Response:
        run_id = request.path_params["run_id"]
        if await run_in_threadpool(store.run, run_id) is None:
            return JSONResponse({"error": "there is no such run; /api/v1/runs lists them"}, 404)
        kept = await run_in_threadpool(store.kept_updates, run_id)
        views = [{"round_num": round_num, **msgspec.to_builtins(update)} for round_num, update in kept]
        for view in views:
            del view["counters"]  # a part of the model, and up to 16384 numbers
        return _json(views)

    async def agents(request: Request) -> Response:  # noqa: ARG001
        return _json((await run_in_threadpool(shared.snapshot))["agents"])

    async def close_round(request: Request) -> Response:
        if control is None or not control.allows(request.headers.get("authorization", "")):
            return _unauthorized()
        try:
            closed = await asyncio.wait_for(asyncio.wrap_future(control.close_round()), _ANSWER_S)
        except TimeoutError:
            return JSONResponse({"error": f"no answer in {_ANSWER_S:g} s: see /healthz; it may be done still"}, 503)
        return JSONResponse(msgspec.to_builtins(closed))

    async def root(request: Request) -> Response:  # noqa: ARG001
        return PlainTextResponse(listing)

    app = Starlette(
        routes=[
            Route("/", root),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/api/v1/status", status),
            Route("/api/v1/watch", watch),
            Route("/api/v1/runs", runs),
            Route("/api/v1/runs/{run_id}/versions", versions),
            Route("/api/v1/runs/{run_id}/updates", updates),
            Route("/api/v1/agents", agents),
            Route("/api/v1/round/close", close_round, methods=["POST"]),
            *download_routes(store, control, _unauthorized),
        ]
    )
    listing = _listing(app)
    return app


class HttpServer:
    """The server, in a thread of its own. Its address is written to the state directory, where `coordinator status` looks.

    Args:
        app: what to serve.
        host: address to listen at.
        port: 0 for any free one.
        state_dir: where `service.json` goes.
        token: that `service.json` tells whoever may read it: its owner.

    Raises:
        HttpError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, app: Starlette, host: str, port: int, state_dir: Path, token: str = "") -> None:
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            # Of the address it says more than needed; of a name that is not known, its number says nothing to `os.strerror`.
            reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            what = "--set http_host" if isinstance(error, socket.gaierror) else "--http-port, 0 for any free one"
            raise HttpError(f"http://{host}:{port}: {reason}; choose another with {what}") from None
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._file = state_dir / SERVICE_FILE
        self._token = token
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    def start(self) -> None:
        """Serve."""
        _write_secret(self._file, json.dumps({"url": self.url, "token": self._token}))
        self._thread.start()
        log_event(_log, logging.INFO, "http served", url=self.url)

    def stop(self) -> None:
        """Serve no more."""
        self._server.should_exit = True
        self._thread.join(timeout=3.0)
        self._socket.close()
        self._file.unlink(missing_ok=True)


def _listing(app: Starlette) -> str:
    """What an application serves, for whoever opens its address to see what is there."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path != "/"]
    lines = [f"{'POST' if 'POST' in (route.methods or ()) else 'GET ':<4} {route.path}" for route in routes]
    return "\n".join(["This is a Midge coordinator. It serves:", "", *lines, ""])


def _board_line(shared: Shared) -> tuple[bytes, bool]:
    """The board as a line of JSON, and whether its run is over."""
    snapshot = shared.snapshot()
    return msgspec.json.encode(snapshot) + b"\n", snapshot["state"] in _FINAL_STATES


def _unauthorized() -> Response:
    text = f"this needs the token that {SERVICE_FILE} in the state directory holds: `Authorization: Bearer TOKEN`"
    return JSONResponse({"error": text}, 401, {"www-authenticate": "Bearer"})


def _write_secret(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, and that nobody ever sees in part."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # of a process that died; its mode is not known
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:  # noqa: PTH123
        file.write(text)
    temporary.replace(path)


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
