"""A TCP proxy between our programs and a broker, whose network a test spoils at will while it runs.

    with Proxy(broker.port) as proxy:
        federation.start_agent("pi-0", "--broker", proxy.url)
        proxy.up.is_held = True             # a black hole towards the broker: nothing comes through, nobody is told
        proxy.down.bytes_per_s = 50_000     # towards the client: a slow line
        proxy.cut(reset=True)               # every connection ends at once, by RST

What is held comes through once it is let go, as TCP does after a partition: packets are sent again until then.
A connection that is opened meanwhile is accepted, as by a middlebox, and hears nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 65_536
_QUEUED_CHUNKS = 64
_STEP_S = 0.01
_STEPS_PER_S = 20
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way:
    """One direction of all connections.

    Attributes:
        delay_s: how much later everything arrives.
        bytes_per_s: how much gets through, of each connection; 0 for no limit.
        is_held: nothing gets through, and the end of a connection does not either.
        num_bytes: that got through so far.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = 0
        self.is_held = False
        self.num_bytes = 0


class Proxy:
    """The proxy, with a thread of its own. To be used as a context.

    Args:
        port: where the broker is, on 127.0.0.1; it may come and go.

    Attributes:
        up: towards the broker.
        down: towards the client.
        url: what a client connects to.
        num_accepted: connections so far.
    """

    def __init__(self, port: int) -> None:
        self.up, self.down = Way(), Way()
        self.num_accepted = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: dict[tuple[socket.socket, socket.socket], asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def hold(self) -> None:
        """Let nothing through, either way."""
        self.up.is_held = self.down.is_held = True

    def let_go(self) -> None:
        """Let everything through again."""
        self.up.is_held = self.down.is_held = False

    def cut(self, *, reset: bool = False) -> int:
        """End every connection, with FIN or with RST; how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(reset=reset), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()
        self._listener.close()

    # The thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.run_until_complete(self._cut(reset=True))
        self._loop.close()

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.num_accepted += 1
            pair = (client, socket.socket())
            for end in pair:
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open[pair] = self._loop.create_task(self._serve(pair))

    async def _serve(self, pair: tuple[socket.socket, socket.socket]) -> None:
        client, broker = pair
        try:
            await self._while_held(self.up)
            await self._loop.sock_connect(broker, ("127.0.0.1", self._port))
            ways = [(client, broker, self.up), (broker, client, self.down)]
            pumps = [self._loop.create_task(self._pump(*way)) for way in ways]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
        except OSError:
            pass  # the broker is not there, or one end is gone: so is the other
        finally:
            self._open.pop(pair, None)
            for end in pair:
                end.close()

    async def _pump(self, source: socket.socket, target: socket.socket, way: Way) -> None:
        """Carry bytes one way, until that way has ended; then the other way may still carry some."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)
        reader = self._loop.create_task(self._read(source, queue, way))
        try:
            while True:
                due_at, chunk = await queue.get()
                await asyncio.sleep(max(0.0, due_at - self._loop.time()))
                await self._while_held(way)
                if not chunk:
                    target.shutdown(socket.SHUT_WR)
                    return
                await self._send(target, chunk, way)
        finally:
            reader.cancel()

    async def _read(self, source: socket.socket, queue: asyncio.Queue[tuple[float, bytes]], way: Way) -> None:
        chunk = b"-"
        while chunk:
            await self._while_held(way)
            try:
                chunk = await self._loop.sock_recv(source, _CHUNK_BYTES)
            except OSError:
                chunk = b""
            await queue.put((self._loop.time() + way.delay_s, chunk))

    async def _send(self, target: socket.socket, chunk: bytes, way: Way) -> None:
        left = memoryview(chunk)
        while left:
            await self._while_held(way)
            size = max(1, way.bytes_per_s // _STEPS_PER_S) if way.bytes_per_s else len(left)
            part, left = left[:size], left[size:]
            await self._loop.sock_sendall(target, part)
            way.num_bytes += len(part)
            if way.bytes_per_s:
                await asyncio.sleep(len(part) / way.bytes_per_s)

    @staticmethod
    async def _while_held(way: Way) -> None:
        while way.is_held:  # noqa: ASYNC110  set by another thread
            await asyncio.sleep(_STEP_S)

    async def _cut(self, *, reset: bool) -> int:
        cut = dict(self._open)
        for pair, task in cut.items():
            for end in pair:
                with contextlib.suppress(OSError):  # not connected yet
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    else:
                        end.shutdown(socket.SHUT_WR)
            task.cancel()
        await asyncio.gather(*cut.values(), return_exceptions=True)
        return len(cut)
