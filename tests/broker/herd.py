"""Many agents: `python -m tests.broker.herd NUMBER DIRECTORY ARGUMENTS OF edge-agent run...`.

Each is a process with the code, the connection and the journal of `edge-agent run`, forked from one that has imported it all,
which makes two hundred of them affordable. Each writes a log of its own, as JSON, and ends with that parent, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from edge_agent import cli, service  # noqa: F401  imported once, for all


def be(agent_id: str, directory: Path, arguments: list[str]) -> None:
    """Run an agent in this process, to its end."""
    log = os.open(directory / f"{agent_id}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    own = ["--agent-id", agent_id, "--state-dir", str(directory / "state"), "--set", "log_format=json"]
    cli.main.main(["run", "--while-stdin-open", *arguments, *own], standalone_mode=False)


def main() -> None:
    """Fork the agents, and wait for the end: with this process their standard input ends."""
    number, directory, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    directory.mkdir(parents=True)
    their_end, our_end = os.pipe()
    for index in range(number):
        if os.fork() == 0:
            os.close(our_end)
            os.dup2(their_end, 0)
            try:
                be(f"agent-{index:03}", directory, arguments)
            finally:
                os._exit(0)
    signal.pause()


if __name__ == "__main__":
    main()
