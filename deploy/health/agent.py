"""Whether the agent in this container is connected: exit status 0 where it is, else 1 and a line that says why not.

An agent serves nothing that could be asked, and at rest it does nothing that could be watched. What there is to see is its
connection to the broker: TCP, established, held by a process of this container, with its other end elsewhere. It is
closed by the agent itself once the broker misses a keep-alive. Reading it costs the agent and the broker nothing.

Nothing restarts an unhealthy agent, and nothing should: it keeps its work and goes on trying.
"""  # noqa: INP001  copied into the image, never imported

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_ESTABLISHED = "01"
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def main(proc: Path = Path("/proc")) -> int:
    """The exit status."""
    inodes = set(_sockets(proc))
    connections = {ends for table in ("net/tcp", "net/tcp6") for ends in _connections(proc / table, inodes)}
    # Both ends of a pair by which a process wakes itself up are in this container: that is no broker.
    if any((there, here) not in connections for here, there in connections):
        return 0
    sys.stdout.write("no connection to the broker; see `docker logs` for why\n")
    return 1


def _sockets(proc: Path) -> Iterator[str]:
    """Inodes of the sockets that processes of this container hold open."""
    for link in proc.glob("[0-9]*/fd/*"):
        try:
            target = str(link.readlink())
        except OSError:  # it was closed meanwhile, or belongs to another user
            continue
        if match := _SOCKET.fullmatch(target):
            yield match[1]


def _connections(table: Path, inodes: set[str]) -> Iterator[tuple[str, str]]:
    """Both ends, local and remote, of the established connections among these sockets."""
    try:
        rows = table.read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # a kernel without IPv6
        return
    for row in rows:
        columns = row.split()
        if columns[3] == _ESTABLISHED and columns[9] in inodes:
            yield columns[1], columns[2]


if __name__ == "__main__":
    sys.exit(main())
