"""The log: one event a line, for a person or for a machine.

    12:03:44 INFO  round committed  run=digits-1 round=3 agents=3 duration_s=0.21
    {"ts": "2025-03-01T11:03:44.123Z", "level": "INFO", "logger": "coordinator", "event": "round committed", "run": ...}

An event is a fixed phrase; what varies stands in fields, of which `run`, `round`, `attempt` and `agent` come first. Whatever
a peer sent belongs in a field. No text can end a line or begin one: what is not printable is escaped, and a value with
spaces is quoted.

An exception as a field is its one-line text: a user's mistake or a peer's needs no traceback, and gets one only where
the logger shows DEBUG. What nobody expected is logged with `exc_info`, and always has its traceback: for a machine as one
field, for a person below the line, behind a bar that no event starts with.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, cast

MAX_VALUE_LENGTH = 2000
"""Characters of a field that are logged; a traceback is not cut."""

_OURS = ("midge", "coordinator", "edge_agent")
_FIRST = ("run", "round", "attempt", "agent")
_RESERVED = frozenset({"ts", "level", "logger", "event", "traceback"})
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}
_PLAIN_EXCLUDES = frozenset(" \"'=\\")


class Stream(Protocol):
    """What lines are written to."""

    def write(self, text: str, /) -> object:
        """Take a part of a line, or several."""

    def flush(self) -> None:
        """Keep nothing back."""


def setup(
    format: Literal["human", "json"] = "human",  # noqa: A002 - as the setting log_format calls it
    level: Literal["debug", "info", "warning", "error"] = "info",
    stream: Stream | None = None,
) -> None:
    """Send every event of this process to `stream` (standard error), and none anywhere else. May be called again.

    `level` holds for our own loggers; libraries are heard from WARNING on, or from `level` where that is higher.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else HumanFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, JsonFormatter | HumanFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(number, logging.WARNING))
    for name in _OURS:
        logging.getLogger(name).setLevel(number)
    logging.captureWarnings(capture=True)


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    /,
    *,
    exc_info: BaseException | bool | None = None,
    **fields: object,
) -> None:
    """Log that `event` happened, a fixed phrase in the past tense, with what varies as `fields`.

    Args:
        logger: of the module.
        level: such as logging.INFO.
        event: never holds a peer's text.
        exc_info: an exception that nobody expected, or True for the one being handled: logged with its traceback.
        fields: by name, units in the names. An exception among them is shown without traceback, unless the logger
            shows DEBUG.
    """
    if not logger.isEnabledFor(level):
        return
    if exc_info is None and logger.isEnabledFor(logging.DEBUG):
        exc_info = next((value for value in fields.values() if isinstance(value, BaseException)), None)
    # The phrase is an argument, so that a % in it stays one.
    logger.log(level, "%s", event, exc_info=exc_info, extra={"midge_fields": fields}, stacklevel=2)


class Throttle:
    """Logs what a peer can bring about at will: at most `burst` times at once, and `burst` times a minute in the long run.

    A line after some that were held back says how many, as `held_back`.
    """

    def __init__(self, burst: int = 30) -> None:
        self._burst = burst
        self._room = float(burst)
        self._filled_at = -math.inf
        self._held_back = 0

    def log(self, logger: logging.Logger, level: int, event: str, now: float, /, **fields: object) -> None:
        """`log_event`, or not. `now` is monotonic seconds."""
        self._room = min(self._burst, self._room + (now - self._filled_at) * self._burst / 60.0)
        self._filled_at = now
        if self._room < 1.0:
            self._held_back += 1
            return
        self._room -= 1.0
        if self._held_back:
            fields["held_back"], self._held_back = self._held_back, 0
        log_event(logger, level, event, **cast("Any", fields))


class HumanFormatter(logging.Formatter):
    """Lines for a person, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`, and its traceback behind bars where it has one."""
        level = _LEVELS.get(record.levelname, record.levelname)
        # Local time is what a person's watch shows; the machine's format has UTC.
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")  # noqa: DTZ006
        line = f"{time} {level:<5} {_escaped(_message(record))}"
        fields = " ".join(f"{_token(key)}={_token(_text(value))}" for key, value in _fields(record).items())
        bars = "".join(f"\n         | {_escaped(part)}" for part in _traceback(record).splitlines())
        return f"{line}  {fields}{bars}" if fields else line + bars


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `ts` (UTC), `level`, `logger`, `event`, and the fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """The object of `record`; a field whose name is taken gets `_` behind it."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "event": _message(record),
        }
        for key, value in _fields(record).items():
            line[f"{key}_" if key in _RESERVED else key] = _json_value(value)
        if trace := _traceback(record):
            line["traceback"] = trace
        return json.dumps(line)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # a library's own call is wrong: what it meant is better than nothing
        return str(record.msg)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: Mapping[str, object] = getattr(record, "midge_fields", {})
    return {key: fields[key] for key in _FIRST if key in fields} | dict(fields)


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case BaseException():
            return _cut(f"{type(value).__name__}: {value}")
        case _:
            return _cut(str(value))


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON knows no NaN and no infinity
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _json_value(one) for key, one in value.items()}
    return _text(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}... ({len(text)} characters)"


def _token(text: str) -> str:
    """`text` as it is where it is one plain word, else escaped and in double quotes."""
    if text.isprintable() and text and _PLAIN_EXCLUDES.isdisjoint(text):
        return text
    return '"' + _escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _escaped(text: str) -> str:
    """`text` without anything that could end a line, move the cursor or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
