"""What paho leaves to its caller, in code that does not need paho.

Seen in paho-mqtt 2.1 and 2.2:

* An error of the socket is logged and not handed out: `error_logger` gets at the exception.
* `_WebsocketWrapper.send` returns 0 for a packet that the socket took in part, and expects it again. `_packet_write` has
  taken it off its queue by then and forgets it; the rest goes out in front of the next packet, which is then cut short.
  `send_again` says it as a socket would, by BlockingIOError, which `_packet_write` understands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

OnError = Callable[[BaseException | None, str], None]


class _ErrorHandler(logging.Handler):
    def __init__(self, on_error: OnError) -> None:
        super().__init__()
        self._on_error = on_error

    def emit(self, record: logging.LogRecord) -> None:
        error = next((value for value in record.args or () if isinstance(value, BaseException)), None)
        self._on_error(error, record.getMessage())


def error_logger(on_error: OnError) -> logging.Logger:
    """A logger, of one connection, that hands over each error and the exception behind it, if there is one."""
    logger = logging.Logger("paho", level=logging.ERROR)  # noqa: LOG001  # not to be found by its name
    logger.addHandler(_ErrorHandler(on_error))
    return logger


def send_again(send: Callable[[Any], int]) -> Callable[[Any], int]:
    """A WebSocket's `send` that raises BlockingIOError where it wants to be called again with the same data."""

    def send_whole(data: Any) -> int:
        sent = send(data)
        if sent == 0 and data:
            raise BlockingIOError
        return sent

    return send_whole
