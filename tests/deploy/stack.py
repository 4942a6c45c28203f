"""The project's own Compose file, brought up under a name and on ports of its own, and what tests ask of it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
FEDERATION = "compose"
AGENTS = ("agent-1", "agent-2", "agent-3")
OURS = ("coordinator", *AGENTS)
SERVICES = ("mosquitto", *OURS, "prometheus")
"""All but Grafana, whose image is large: of it, its files are checked."""
PATIENCE_S = 90.0
BUILD_S = 1200.0
"""The first build downloads torch."""

T = TypeVar("T")


def missing() -> str:
    """Why Compose cannot be used on this machine; empty where it can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    engine = _run(["docker", "info", "--format", "{{.ServerVersion}}"], timeout_s=20.0)
    if engine.returncode != 0 or not engine.stdout.strip():
        last = (engine.stderr.strip() or engine.stdout.strip()).splitlines()[-1:]
        return f"no Docker engine answers: {' '.join(last) or 'docker info said nothing'}"
    return "" if compose_command() else "neither `docker compose` nor `docker-compose` is installed"


def compose_command() -> list[str]:
    """How Compose is called here; empty where it is not installed."""
    if _run(["docker", "compose", "version"], timeout_s=20.0).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def eventually(
    what: str, look: Callable[[], T], until: Callable[[T], object] = bool, *, patience_s: float = PATIENCE_S
) -> T:
    """What `look` returns, once `until` is true of it. A refused connection means to look again."""
    seen: object = None
    ends_at = time.monotonic() + patience_s
    while time.monotonic() < ends_at:
        try:
            value = look()
        except (OSError, ValueError) as error:  # not there yet, or in the middle of a start
            seen = error
        else:
            if until(value):
                return value
            seen = value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {patience_s:g} s; last seen: {seen!r}")


class Stack:
    """The services, under a project name of their own.

    Args:
        rounds: of the run.
    """

    def __init__(self, rounds: int) -> None:
        self.project = f"midge-test-{secrets.token_hex(4)}"
        self.ports = {name: _free_port() for name in ("MQTT_PORT", "COORDINATOR_PORT", "PROMETHEUS_PORT")}
        own = {name: str(port) for name, port in self.ports.items()}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MIDGE_")}
        self._environ = {**clean, **own, "IMAGE_TAG": "test", "ROUNDS": str(rounds), "COMPOSE_ANSI": "never"}
        self._command = [*compose_command(), "-p", self.project, "-f", str(ROOT / "docker-compose.yml")]

    # Compose and the engine.

    def compose(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run a Compose command and return what it printed."""
        return _checked([*self._command, *arguments], timeout_s=timeout_s, environ=self._environ)

    def up(self) -> None:
        """Build what is out of date and start everything; returns once the containers run."""
        self.compose("build", "coordinator", *AGENTS, timeout_s=BUILD_S)
        self.compose("up", "-d", *SERVICES, timeout_s=BUILD_S)

    def begin_run(self, rounds: int) -> None:
        """Give the coordinator another configuration, which makes another run."""
        self._environ["ROUNDS"] = str(rounds)
        self.compose("up", "-d", "--no-deps", "coordinator")

    def down(self) -> None:
        """Remove containers, network and volumes. Images stay, so that the next build is quick."""
        self.compose("down", "-v", "--remove-orphans", "-t", "5")

    @property
    def _network(self) -> str:
        return f"{self.project}_default"

    def container(self, service: str) -> str:
        """Id of the service's container, which may be stopped."""
        label = "label=com.docker.compose."
        filters = ["--filter", f"{label}project={self.project}", "--filter", f"{label}service={service}"]
        return _checked(["docker", "ps", "--all", "--quiet", *filters]).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of the service's container."""
        found: list[dict[str, Any]] = json.loads(_checked(["docker", "inspect", self.container(service)]))
        return found[0]

    def kill(self, service: str) -> None:
        """End the container as a power cut would."""
        _checked(["docker", "kill", self.container(service)])

    def freeze(self, service: str) -> None:
        """Stop the container's first process where it is: its connections stay open, and nobody answers."""
        _checked(["docker", "kill", "--signal", "STOP", self.container(service)])

    def thaw(self, service: str) -> None:
        """Let it go on."""
        _checked(["docker", "kill", "--signal", "CONT", self.container(service)])

    def cut_off(self, service: str) -> None:
        """Take the container from the network: what it sends is lost, and nobody is told."""
        _checked(["docker", "network", "disconnect", self._network, self.container(service)])

    def join_again(self, service: str) -> None:
        """Give it back to the network, under the name that the others know."""
        _checked(["docker", "network", "connect", "--alias", service, self._network, self.container(service)])

    def start_alone(self, service: str) -> None:
        """Start the container, whatever it depends on."""
        _checked(["docker", "start", self.container(service)])

    def inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the service's container."""
        return _run(["docker", "exec", self.container(service), *command], timeout_s=60.0)

    def logs(self) -> str:
        """The last lines of every service."""
        return self.compose("logs", "--no-color", "--tail", "60")

    # The federation.

    def status(self) -> dict[str, Any]:
        """The coordinator's board."""
        board: dict[str, Any] = _get_json(f"http://127.0.0.1:{self.ports['COORDINATOR_PORT']}/api/v1/status")
        return board

    def committed(self) -> int:
        """The last round that is committed."""
        return max((version["round_num"] for version in self.status()["history"]), default=0)

    def wait_for_rounds(self, more: int) -> int:
        """Wait until so many more rounds are committed, and say which is the last one."""
        wanted = more + eventually("the coordinator answers", self.committed, lambda _: True)
        return eventually(f"round {wanted} is committed", self.committed, lambda last: last >= wanted)

    def num_updates(self) -> int:
        """Updates that the last committed round is made of."""
        count: int = self.status()["history"][-1]["num_updates"]
        return count

    def presence(self, agent_id: str) -> str:
        """Whether the coordinator thinks that this agent is online, silent or offline."""
        return next((a["presence"] for a in self.status()["agents"] if a["agent_id"] == agent_id), "unknown")

    def query(self, expr: str) -> list[dict[str, Any]]:
        """What Prometheus answers; an error in the query fails the test."""
        url = f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}/api/v1/query?" + urllib.parse.urlencode(
            {"query": expr}
        )
        try:
            answer = _get_json(url)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: Prometheus says {error.read().decode()}") from None
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


def _get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5.0) as answer:  # noqa: S310  our own addresses
        return json.load(answer)


def _checked(command: Sequence[str], *, timeout_s: float = 60.0, environ: dict[str, str] | None = None) -> str:
    result = _run(command, timeout_s=timeout_s, environ=environ)
    if result.returncode != 0:
        said = f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        raise AssertionError(f"{' '.join(command)}: exit status {result.returncode}\n{said}")
    return result.stdout


def _run(
    command: Sequence[str], *, timeout_s: float, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT, env=environ
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
