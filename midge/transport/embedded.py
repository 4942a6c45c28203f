"""A broker in one Python process, for machines without Mosquitto: demonstrations and tests, not production.

    python -m midge.transport.embedded --port 0

It listens on 127.0.0.1 alone, prints its port once it does, and ends when its standard input does, so that it cannot
outlive the process that started it. It speaks MQTT 3.1.1, keeps everything in memory, and lets everybody in.

amqtt reads a version 5 CONNECT as if it were 3.1.1: it takes the properties for the client id and waits for bytes that
never come. So the version is looked at before amqtt sees the connection, and answered as the 3.1.1 standard asks
([MQTT-3.1.2-2]: CONNACK with return code 1, then close).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from contextlib import suppress

from amqtt.adapters import ReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType

HOST = "127.0.0.1"

_LISTENER = "default"
_BUFFER_BYTES = 1024 * 1024
_CONNECT_TIMEOUT_S = 10.0
_MQTT_3_1_1 = b"\x00\x04MQTT\x04"
_CONNACK_WRONG_VERSION = b"\x20\x02\x00\x01"
_MAX_LENGTH_BYTES = 4


class _ResumedReader(ReaderAdapter):  # type: ignore[misc]  # amqtt has no type hints
    """A stream of which the first bytes, `seen`, were taken already: they are read again."""

    def __init__(self, reader: asyncio.StreamReader, seen: bytes) -> None:
        self._reader = reader
        self._seen = seen

    async def read(self, n: int = -1) -> bytes:
        taken, self._seen = (self._seen, b"") if n < 0 else (self._seen[:n], self._seen[n:])
        if n < 0:
            return taken + await self._reader.read()
        return taken + await self._reader.readexactly(n - len(taken)) if len(taken) < n else taken

    def feed_eof(self) -> None:
        self._reader.feed_eof()


async def _read_start(reader: asyncio.StreamReader) -> bytes:
    """The bytes of a CONNECT up to its protocol version: type, length, protocol name, version."""
    start = await reader.readexactly(2)
    while start[-1] & 0x80 and len(start) <= _MAX_LENGTH_BYTES:
        start += await reader.readexactly(1)
    return start + await reader.readexactly(len(_MQTT_3_1_1))


async def _serve(broker: Broker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        start = await asyncio.wait_for(_read_start(reader), _CONNECT_TIMEOUT_S)
        if start.endswith(_MQTT_3_1_1):
            await broker.external_connected(_ResumedReader(reader, start), StreamWriterAdapter(writer), _LISTENER)
            return
        writer.write(_CONNACK_WRONG_VERSION)
        await writer.drain()
    except (OSError, EOFError, TimeoutError):
        pass  # whoever connected is gone, or never spoke MQTT
    finally:
        with suppress(OSError):
            writer.close()


async def run(port: int) -> None:
    """Serve on `port` (0: any free one), print it, and return when standard input ends."""
    config = BrokerConfig(
        listeners={_LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)},
        plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    )
    broker = Broker(config)
    await broker.start()
    server = await asyncio.start_server(
        lambda reader, writer: _serve(broker, reader, writer), HOST, port, limit=_BUFFER_BYTES
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="An MQTT 3.1.1 broker on 127.0.0.1, until standard input ends.")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 for any free one (default)")
    parser.add_argument("--verbose", action="store_true", help="log to standard error")
    arguments = parser.parse_args()
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        logging.disable(logging.CRITICAL)
    asyncio.run(run(arguments.port))


if __name__ == "__main__":
    main()
