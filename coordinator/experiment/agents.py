"""Agents of an experiment: processes of their own, that reach the coordinator by MQTT alone, as from any other machine.

Each is a plain `edge-agent run`, started with `--while-stdin-open`: its standard input is a pipe of ours, which ends when we
do, by SIGKILL too. So no agent outlives the experiment. Each is in a session of its own, so that Ctrl-C reaches us alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.experiment.holding import Holding

_TAIL_LINES = 8
_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class AgentPlan:
    """One agent: its name, and what it holds."""

    agent_id: str
    holding: Holding


class Agents:
    """Agents that run as our children.

    Args:
        federation: that they join.
        task: what they learn.
        directory: where their state lies, a folder each.
        log_dir: where each writes its log, such as `agent-1.log`.
        connection: settings as `MIDGE_...` in the environment: the broker's URL may hold a password, and everyone can
            read a command line. No other such setting reaches them.
        threads: that each trains with.
    """

    def __init__(
        self,
        federation: str,
        task: str,
        directory: Path,
        log_dir: Path,
        connection: Mapping[str, str],
        threads: int = 1,
    ) -> None:
        self._options = [f"--federation={federation}", f"--task={task}", f"--state-dir={directory}"]
        self._options += [f"--threads={threads}"]
        self._options += ["--set=check_data=false"]  # they train at once, and their data are ours
        self._log_dir = log_dir
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MIDGE_")}
        self._environ = {**inherited, **connection}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, plan: AgentPlan) -> None:
        """Start one."""
        own = [f"--agent-id={plan.agent_id}", *(f"--set={one}" for one in plan.holding.assignments())]
        with self._log_of(plan.agent_id).open("wb") as log:
            self._processes[plan.agent_id] = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", "run", "--while-stdin-open", *own, *self._options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )

    def obituary(self) -> str:
        """Who died, of what, and its last words; empty while all live."""
        for agent_id, process in self._processes.items():
            status = process.poll()
            if status is not None:
                cause = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
                return f"{agent_id} {cause}. {last_words(self._log_of(agent_id))}"
        return ""

    def stop(self) -> None:
        """Ask all to end, and make those that have not after 5 s."""
        for process in self._processes.values():
            process.terminate()
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _log_of(self, agent_id: str) -> Path:
        return self._log_dir / f"{agent_id}.log"


def last_words(log: Path) -> str:
    """The last lines of a log, to stand behind the news that its writer died."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-_TAIL_LINES:]
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in lines)]) if lines else f"{log} is empty."
