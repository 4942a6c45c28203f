"""A broker of our own on this machine: for the demonstration, the tests and the benchmarks.

    with start_local_broker(directory=path) as broker:
        Address.parse(broker.url)

Mosquitto where it is installed, else the embedded broker; on 127.0.0.1, open to every local user, nothing kept on disk.
The child is in a session of its own, so that Ctrl-C reaches us alone and we say goodbye through it first. It does not
outlive us, however we end: the embedded broker ends with its standard input, and Mosquitto has a watcher that does.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from midge.transport.base import TransportError

Kind = Literal["mosquitto", "embedded"]
HOST = "127.0.0.1"

_START_TIMEOUT_S = 20.0
_POLL_S = 0.02
_ATTEMPTS = 3
_MOSQUITTO_CONFIG = """\
listener {port} {host}
allow_anonymous true
persistence false
max_packet_size 2000000
max_inflight_messages 100
max_queued_messages 1000
max_queued_bytes 268435456
set_tcp_nodelay true
sys_interval 1
log_dest stderr
"""
_MOSQUITTO_RUNS = re.compile(r"mosquitto version \S+ running")
_WATCHER = 'read -r _; kill -TERM "$1"'
# Mosquitto's process waits until its watcher is there: killed in between, we would leave it behind.
_GATE = 'read -r _ && exec "$@" </dev/null >/dev/null'


class BrokerError(TransportError):
    """A local broker did not start. The message ends with what it said."""


class LocalBroker:
    """A broker that runs as our child; `start_local_broker` makes one.

    Attributes:
        kind: "mosquitto" or "embedded".
        port: TCP port on 127.0.0.1.
        url: what to connect to.
        pid: of the child.
    """

    def __init__(self, kind: Kind, port: int, process: subprocess.Popen[str], log: Path) -> None:
        self.kind: Kind = kind
        self.port = port
        self.url = f"mqtt://{HOST}:{port}"
        self.pid = process.pid
        self._process = process
        self._log = log
        self._watcher: subprocess.Popen[str] | None = None
        if kind == "mosquitto":
            self._watcher = _watch(process.pid)
            _open_gate(process)

    def __repr__(self) -> str:
        state = "running" if self.is_running() else f"ended with {self._process.returncode}"
        return f"LocalBroker({self.kind!r}, {self.url!r}, pid {self.pid}, {state})"

    def is_running(self) -> bool:
        """Whether the child lives."""
        return self._process.poll() is None

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(errors="replace")

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ask it to end, and make it after `timeout_s`. Does nothing where it has ended."""
        self._end_watcher()  # first: after the child is reaped, its pid may be somebody else's
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def kill(self) -> None:
        """End it as a crash would: nothing is said to anybody."""
        self._end_watcher()
        self._process.kill()
        self._reap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            _close(self._watcher.stdin)
            self._watcher = None

    def _reap(self) -> None:
        self._process.wait()
        _close(self._process.stdin)
        _close(self._process.stdout)


def start_local_broker(
    kind: Kind | Literal["auto"] = "auto", *, directory: Path, port: int = 0, options: Sequence[str] = ()
) -> LocalBroker:
    """Start a broker and return once it takes connections.

    Args:
        kind: which one; "auto" for Mosquitto where it is installed, else the embedded one.
        directory: where its log, and Mosquitto's configuration, are written; made where it does not exist.
        port: TCP port on 127.0.0.1; 0 for a free one.
        options: further lines of Mosquitto's configuration; a listener in them comes beside ours.

    Raises:
        BrokerError: it is not installed, or ended at once.
    """
    if kind == "auto":
        kind = "mosquitto" if find_mosquitto() is not None else "embedded"
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{kind}.log"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if kind == "mosquitto":
                return _start_mosquitto(directory, log, port or free_port(), options)
            return _start_embedded(log, port)
        except BrokerError:
            if port or attempt == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def find_mosquitto() -> str | None:
    """Mosquitto's program, also where Debian puts it, which is not on every user's path."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody used a moment ago."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _start_mosquitto(directory: Path, log: Path, port: int, options: Sequence[str]) -> LocalBroker:
    program = find_mosquitto()
    if program is None:
        raise BrokerError("mosquitto is not installed: install it (apt install mosquitto), or take the embedded broker")
    config = directory / "mosquitto.conf"
    # Started by root, Mosquitto would change to a user that may not exist, or not read the files named in `options`.
    user = ["user root"] if os.geteuid() == 0 else []
    config.write_text("\n".join([_MOSQUITTO_CONFIG.format(port=port, host=HOST), *user, *options, ""]))
    process = _spawn(["/bin/sh", "-c", _GATE, "sh", program, "-c", str(config)], log)
    broker = LocalBroker("mosquitto", port, process, log)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while broker.is_running() and time.monotonic() < deadline:
        if _MOSQUITTO_RUNS.search(
            broker.log()
        ):  # said once every listener is open; a port may answer for another program
            return broker
        time.sleep(_POLL_S)
    raise _failed(broker)


def _start_embedded(log: Path, port: int) -> LocalBroker:
    command = [sys.executable, "-m", "midge.transport.embedded", "--port", str(port)]
    process = _spawn(command, log)
    said = _first_line(process.stdout, _START_TIMEOUT_S)
    if said.strip().isdecimal():
        return LocalBroker("embedded", int(said), process, log)
    raise _failed(LocalBroker("embedded", port, process, log))


def _spawn(command: list[str], log: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    with log.open("w") as stderr:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, start_new_session=True)


def _watch(pid: int) -> subprocess.Popen[str]:
    """A shell that ends process `pid` when its standard input ends, which it does when we do, even by SIGKILL."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCHER, "sh", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _open_gate(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, as will be seen
        os.write(process.stdin.fileno(), b"\n")


def _first_line(stream: IO[str] | None, timeout_s: float) -> str:
    """What a process says first; empty where it ends, or is silent for `timeout_s`."""
    if stream is None:
        return ""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(timeout_s) else ""


def _failed(broker: LocalBroker) -> BrokerError:
    broker.stop()
    said = " | ".join(broker.log().strip().splitlines()[-3:]) or "nothing"
    return BrokerError(f"the {broker.kind} broker did not start on port {broker.port}. It said: {said}")


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        stream.close()
