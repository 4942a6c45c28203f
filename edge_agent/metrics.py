"""What an agent shows Prometheus, where its operator asks for it. The one file of the agent that imports prometheus_client.

The coordinator's metrics name no agent (docs/metrics.md says why); these are served by the agent itself, on its device, and
name it. The library is optional, `pip install 'midge[metrics]'`, and imported only once an `AgentMetrics` is made, so that an
agent which serves nothing does not carry it. Every series that has a first value has it from the start.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from midge import PROTOCOL, __version__

AgentState = Literal["OFFLINE", "IDLE", "FETCHING", "TRAINING", "UPLOADING", "AWAITING_RECEIPT"]
RoundOutcome = Literal["accepted", "rejected", "refused", "cancelled", "failed"]
"""How a round ended for this agent: by a receipt of either kind, by its own refusal, by the coordinator's cancel, or here."""
Direction = Literal["in", "out"]

TRAINING_BUCKETS_S = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)


class MetricsError(Exception):
    """Metrics cannot be served here: the library is missing, or the port is taken. Says what to do."""


class AgentMetrics:
    """One agent's series, in a registry of their own.

    Args:
        agent_id: value of the label `agent_id`.
        federation: value of the label `federation`.

    Raises:
        MetricsError: prometheus_client is not installed.
    """

    def __init__(self, agent_id: str, federation: str) -> None:
        try:
            import prometheus_client as prometheus  # noqa: PLC0415 (optional, and not to be carried when not asked for)
        except ImportError as error:
            raise MetricsError(
                f"agent {agent_id}: metrics need prometheus_client, which is not installed ({error}): "
                "run `pip install 'midge[metrics]'`, or start the agent without a metrics port"
            ) from None
        own = ("federation", "agent_id")
        self._prometheus = prometheus
        self._labels = (federation, agent_id)
        self._server: Any = None
        self.registry = registry = prometheus.CollectorRegistry()
        gauge, counter = prometheus.Gauge, prometheus.Counter
        build = gauge(
            "midge_agent_build_info",
            "Always 1; what runs is in the labels.",
            (*own, "version", "protocol"),
            registry=registry,
        )
        build.labels(*self._labels, __version__, str(PROTOCOL)).set(1)
        self._state = gauge("midge_agent_state", "1 for the agent's state.", (*own, "state"), registry=registry)
        self._since = gauge(
            "midge_agent_state_since_timestamp_seconds", "When it came into that state.", own, registry=registry
        )
        self._connected = gauge("midge_agent_connected", "1 while connected to the broker.", own, registry=registry)
        self._rounds = counter(
            "midge_agent_rounds_total", "Rounds that ended for this agent.", (*own, "outcome"), registry=registry
        )
        self._training = prometheus.Histogram(
            "midge_agent_training_duration_seconds",
            "How long its trainings took.",
            own,
            registry=registry,
            buckets=TRAINING_BUCKETS_S,
        )
        self._traffic = counter(
            "midge_agent_traffic_bytes_total", "Bytes in its messages.", (*own, "direction"), registry=registry
        )
        self._invalid = counter(
            "midge_agent_messages_invalid_total", "Messages that broke the protocol.", own, registry=registry
        )
        self._begin()

    def state(self, state: AgentState) -> None:
        """The agent is now in `state`."""
        for each in get_args(AgentState):
            self._state.labels(*self._labels, each).set(each == state)
        self._since.labels(*self._labels).set_to_current_time()

    def connected(self, is_connected: bool) -> None:
        """The connection to the broker is up, or down."""
        self._connected.labels(*self._labels).set(is_connected)

    def round_ended(self, outcome: RoundOutcome) -> None:
        """A round that the agent was invited to is over for it."""
        self._rounds.labels(*self._labels, outcome).inc()

    def trained(self, duration_s: float) -> None:
        """A training took `duration_s`."""
        self._training.labels(*self._labels).observe(duration_s)

    def message(self, direction: Direction, size_bytes: int) -> None:
        """A message came `in` or went `out`; `size_bytes` is its payload's size."""
        self._traffic.labels(*self._labels, direction).inc(size_bytes)

    def invalid_messages(self, number: int) -> None:
        """So many messages came that broke the protocol, and were dropped."""
        self._invalid.labels(*self._labels).inc(number)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve `/metrics` from a thread until `close`.

        Args:
            port: where to listen; 0 for any free port.
            host: the address to listen on. There is no password: let only Prometheus reach it.

        Returns:
            The port that it listens on.

        Raises:
            MetricsError: that address cannot be listened on.
        """
        if self._server is not None:
            raise RuntimeError(f"metrics are served on port {self._server.server_port} already: call close() first")
        try:
            self._server, self._thread = self._prometheus.start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise MetricsError(
                f"metrics on {host}:{port}: {error}; expected a free port of this device: choose another, or 0 for any"
            ) from None
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving. Does nothing where nothing is served."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _begin(self) -> None:
        self.state("OFFLINE")
        self.connected(is_connected=False)
        self._training.labels(*self._labels)
        self._invalid.labels(*self._labels)
        for outcome in get_args(RoundOutcome):
            self._rounds.labels(*self._labels, outcome)
        for direction in get_args(Direction):
            self._traffic.labels(*self._labels, direction)
