"""What the coordinator shows Prometheus. The one file of the coordinator that imports prometheus_client.

The driver calls a method named after what happened; which series follow from it is decided here and written down in
docs/metrics.md (a test holds page and code together). Four rules keep the numbers worth reading:

* **Nothing is global.** The registry is passed in, so two federations in one process, or two tests, never share a series.
* **Every label is bounded.** `federation` has one value and `run` one for each run until `forget_run`; all others come from the
  closed sets below, and a reason that is in none of them is counted as `other`. Agents are named in four gauges alone, and
  there `max_agents` at most: a fleet of ten thousand makes as many series as a fleet of fifty.
* **What is truly 0 is shown as 0 from the start**, so that `rate()` sees the first event and no panel is empty. What is not
  known yet (an accuracy before the first evaluation) is absent rather than 0.
* **The broker's own numbers are read on scrape** and forgotten when the connection ends, so an old value is never shown as new.

Every count is of this process: it starts at 0 when the coordinator does, and `rate()` and `increase()` allow for that.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from coordinator.waits import WaitReason
from midge import PROTOCOL, __version__
from midge.wire.messages import RefusalReason, RejectReason

__all__ = ["SYS_TOPICS", "CollectorRegistry", "Metrics", "render"]

RoundOutcome = Literal["committed", "abandoned"]
Phase = Literal["selecting", "collecting", "aggregating", "evaluating", "publishing"]
AgentState = Literal["online", "silent", "offline"]
RunState = Literal["waiting", "running", "done", "failed", "stopped"]
UpdateOutcome = Literal["accepted", "rejected", "late", "duplicate"]
Direction = Literal["in", "out"]
Kind = Literal["control", "model", "update", "presence"]
Source = Literal["central", "federated"]

NO_REASON = "none"
OTHER = "other"
REJECT_REASONS: tuple[str, ...] = (*get_args(RejectReason), OTHER)
REFUSAL_REASONS: tuple[str, ...] = (*get_args(RefusalReason), OTHER)

DURATION_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""From a round of a toy model in memory, 5 ms, to an hour on slow devices behind slow links."""

_SYS = "$SYS/broker/"
_BROKER_VALUES = {
    _SYS + "clients/connected": ("midge_broker_clients_connected", "Connections that the broker has."),
    _SYS + "publish/messages/dropped": (
        "midge_broker_messages_dropped_total",
        "Messages that the broker dropped: a queue or an in-flight limit was full.",
    ),
    _SYS + "heap/current": ("midge_broker_heap_bytes", "Memory that the broker has allocated."),
    _SYS + "bytes/received": ("midge_broker_received_bytes_total", "Bytes that the broker received from everyone."),
    _SYS + "bytes/sent": ("midge_broker_sent_bytes_total", "Bytes that the broker sent to everyone."),
    _SYS + "store/messages/count": ("midge_broker_stored_messages", "Messages that the broker holds, of any kind."),
    _SYS + "retained messages/count": ("midge_broker_retained_messages", "Messages that the broker retains."),
    _SYS + "subscriptions/count": ("midge_broker_subscriptions", "Subscriptions that the broker has."),
    _SYS + "uptime": ("midge_broker_uptime_seconds", "Time since the broker started."),
}
"""Topic -> name of the series, and what it means. A name that ends in `_total` is a counter's."""

SYS_TOPICS: tuple[str, ...] = tuple(_BROKER_VALUES)
"""Where Mosquitto (2.0.11) says how it is, each 10 s and retained. Where a broker lacks one, its series is absent."""

_SYS_PAYLOAD = re.compile(rb"(\d{1,18})(?: seconds)?")
"""A whole number; `uptime` alone has its unit behind it."""

M = TypeVar("M", Counter, Gauge, Histogram)
_Series: TypeAlias = tuple[Counter | Gauge | Histogram, tuple[str, ...]]
"""A metric and the values of its labels."""


class Metrics:
    """The coordinator's series of one federation.

    Called from the driver's thread; scrapes read from another.

    Args:
        federation: its identifier, the value of the label `federation`.
        registry: where the series are registered; each `Metrics` needs one of its own.
        max_agents: agents with series of their own: the first that report, until they are gone or their run is over.
        clock: the time now, in seconds since 1970 (UTC), as Prometheus has it.
    """

    def __init__(
        self,
        federation: str,
        registry: CollectorRegistry,
        *,
        max_agents: int = 50,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._federation = federation
        self._max_agents = max_agents
        self._by_agent: dict[str, set[tuple[str, _Series]]] = {}
        self._registry = registry
        self._clock = clock
        self._zeroes: list[_Series] = []
        self._runs: dict[str, set[_Series]] = {}
        self._waits: dict[str, list[_Series]] = {}
        self._declare_rounds()
        self._declare_learning()
        self._declare_messages()
        self._broker = _BrokerCollector(federation)
        registry.register(self._broker)
        build = Gauge(
            "midge_build_info", "Always 1; what runs is in the labels.", ("version", "protocol"), registry=registry
        )
        build.labels(__version__, str(PROTOCOL)).set(1)

    # What happened to a run and to its rounds.

    def run_state(self, run: str, state: RunState) -> None:
        """The run is now in `state`."""
        for each in get_args(RunState):
            self._of(self._run_state, run, each).set(each == state)

    def waiting(self, run: str, missing_agents: int) -> None:
        """The run needs `missing_agents` more agents before it can go on; 0 once it needs none."""
        self._of(self._agents_missing, run).set(missing_agents)

    def waits(self, run: str, reason: WaitReason | None, since: float, until: float) -> None:
        """The run waits for this, or for nothing.

        Args:
            run: the run.
            reason: what for.
            since: when the wait began, seconds since 1970.
            until: when it ends at the latest; infinity where nothing else ends it.
        """
        for series in self._waits.pop(run, ()):
            series[0].remove(*series[1])
            self._runs[run].discard(series)
        times = ((self._wait_since, since), (self._wait_until, until))
        for gauge, value in times if reason is not None else ():
            if value < math.inf:
                self._of(gauge, run, str(reason)).set(value)
                self._waits.setdefault(run, []).append((gauge, (self._federation, run, str(reason))))

    def round_started(self, run: str, round_num: int, attempt: int, target: int, quorum: int) -> None:
        """An attempt at a round began: it wants `target` updates and can do with `quorum`."""
        self._of(self._round_number, run).set(round_num)
        self._of(self._round_attempt, run).set(attempt)
        self._of(self._target, run).set(target)
        self._of(self._quorum, run).set(quorum)
        self.cohort(run, invited=0, accepted=0, reported=0)
        self.waiting(run, 0)

    def cohort(self, run: str, invited: int, accepted: int, reported: int) -> None:
        """So many agents were invited to this attempt, took the invitation, and had their update counted."""
        self._of(self._invited, run).set(invited)
        self._of(self._accepted, run).set(accepted)
        self._of(self._reported, run).set(reported)

    def phase_ended(self, run: str, phase: Phase, duration_s: float) -> None:
        """A phase of a round took `duration_s`."""
        self._of(self._phase_duration, run, phase).observe(duration_s)

    def round_ended(self, run: str, outcome: RoundOutcome, duration_s: float) -> None:
        """An attempt at a round ended, `duration_s` after it began."""
        self._of(self._rounds, run, outcome).inc()
        self._of(self._round_duration, run).observe(duration_s)

    def forget_run(self, run: str) -> None:
        """Remove the run's series. Call it for a run that ended when the next one begins, so that runs do not pile up."""
        self.waits(run, None, 0.0, 0.0)
        for metric, labels in self._runs.pop(run, ()):
            metric.remove(*labels)
        for agent_id, shown in list(self._by_agent.items()):
            shown -= {each for each in shown if each[0] == run}
            if not shown:
                del self._by_agent[agent_id]

    # What was learned.

    def committed(
        self, run: str, round_num: int, examples: int, delta_norm: float, update_norms: Sequence[float]
    ) -> None:
        """Version `round_num` is committed.

        Args:
            run: the run.
            round_num: the version's number.
            examples: that were trained on, summed over the counted updates.
            delta_norm: L2 norm of the mean delta.
            update_norms: L2 norm of each counted update's delta.
        """
        self._of(self._round_number, run).set(round_num)
        self._of(self._round_examples, run).set(examples)
        self._of(self._delta_norm, run).set(delta_norm)
        self._of(self._last_commit, run).set(self._clock())
        for stat, of in (("min", min), ("median", median), ("max", max)) if update_norms else ():
            self._of(self._update_norm, run, stat).set(of(update_norms))

    def evaluated(self, run: str, source: Source, loss: float, metrics: Mapping[str, float]) -> None:
        """The current version was evaluated: by the coordinator (`central`) or by the agents (`federated`).

        Of `metrics` only `accuracy` (a fraction from 0 to 1) is shown: other names are a task's own and not bounded.
        """
        self._of(self._loss, run, source).set(loss)
        if "accuracy" in metrics:
            self._of(self._accuracy, run, source).set(metrics["accuracy"])

    def agent_reported(
        self,
        run: str,
        agent_id: str,
        *,
        norm: float,
        training_loss: float | None = None,
        loss: float | None = None,
        accuracy: float | None = None,
    ) -> None:
        """An agent's update counts; shown where there is room for the agent.

        Args:
            run: the run.
            agent_id: the agent.
            norm: L2 norm of its delta.
            training_loss: mean loss of its training, where the task tells.
            loss: of the version that it trained from, on its own data, where it was evaluated.
            accuracy: of that version there, 0 to 1, where the task tells.
        """
        if agent_id not in self._by_agent and len(self._by_agent) >= self._max_agents:
            return
        shown = self._by_agent.setdefault(agent_id, set())
        gauges = (
            (self._agent_norm, norm),
            (self._agent_training_loss, training_loss),
            (self._agent_loss, loss),
            (self._agent_accuracy, accuracy),
        )
        for gauge, value in gauges:
            if value is not None:
                self._of(gauge, run, agent_id).set(value)
                shown.add((run, (gauge, (self._federation, run, agent_id))))

    def forget_agent(self, agent_id: str) -> None:
        """The agent is gone: its series go, and there is room for another."""
        for run, series in self._by_agent.pop(agent_id, ()):
            metric, labels = series
            metric.remove(*labels)
            self._runs[run].discard(series)

    def forget_agents(self) -> None:
        """The run is over: what its agents last said is not said for ever."""
        for agent_id in list(self._by_agent):
            self.forget_agent(agent_id)

    def best(self, run: str, value: float) -> None:
        """The best value so far of the metric that the run keeps its best model by."""
        self._of(self._best, run).set(value)

    # What came in and what became of it.

    def update_received(self, run: str) -> None:
        """An update is there as a whole. Exactly one `update` follows for it."""
        self._of(self._updates_received, run).inc()

    def update(self, run: str, outcome: UpdateOutcome, reason: str | None = None) -> None:
        """An update was accepted, rejected for `reason` (a `RejectReason`), too late, or there before."""
        label = NO_REASON if outcome != "rejected" else _bounded(reason, REJECT_REASONS)
        self._of(self._updates, run, outcome, label).inc()

    def candidate_refused(self, run: str) -> None:
        """The held-out gate refused what an attempt came to."""
        self._of(self._candidates_refused, run).inc()

    def quarantined(self, run: str, num_agents: int) -> None:
        """So many agents are in quarantine."""
        self._of(self._quarantined, run).set(num_agents)

    def refusal(self, run: str, reason: str) -> None:
        """An agent takes no part in a round, for `reason` (a `RefusalReason`)."""
        self._of(self._refusals, run, _bounded(reason, REFUSAL_REASONS)).inc()

    def agents(self, counts: Mapping[AgentState, int]) -> None:
        """So many agents are in each state; a state that is not named has none."""
        for state in get_args(AgentState):
            self._agents.labels(self._federation, state).set(counts.get(state, 0))

    def message(self, direction: Direction, kind: Kind, size_bytes: int) -> None:
        """A message came `in` or went `out`; `size_bytes` is its payload's size."""
        self._messages.labels(self._federation, direction, kind).inc()
        self._traffic.labels(self._federation, direction, kind).inc(size_bytes)

    def invalid_message(self, kind: Kind) -> None:
        """A message broke the protocol and was dropped: it did not decode, or its topic is none of ours."""
        self._invalid.labels(self._federation, kind).inc()

    def id_conflict(self) -> None:
        """An agent came back as the process that it was before the current one: two use its id in turn."""
        self._id_conflicts.labels(self._federation).inc()

    def stale_message(self, kind: Kind) -> None:
        """A message belongs to another run, epoch, round or attempt, and was dropped: normal after a fault."""
        self._stale.labels(self._federation, kind).inc()

    # How the disk is.

    def disk_failed(self) -> None:
        """The state directory could not be written; until `disk_works`, the run waits for that."""
        self._disk_failed.labels(self._federation).set(1)
        self._disk_failures.labels(self._federation).inc()

    def disk_works(self) -> None:
        """The state directory can be written again."""
        self._disk_failed.labels(self._federation).set(0)

    # How the broker and the way to it are.

    def connected(self, is_connected: bool) -> None:
        """The connection to the broker is up, or down. Down, what the broker said of itself is forgotten."""
        self._connected.labels(self._federation).set(is_connected)
        if not is_connected:
            self._broker.values.clear()

    def queue(self, size_bytes: int) -> None:
        """So many bytes wait in the driver's queue."""
        self._queue.labels(self._federation).set(size_bytes)

    def broker_sys(self, topic: str, payload: bytes) -> None:
        """The broker says how it is. Any topic but `SYS_TOPICS`, and any payload but a whole number, is ignored."""
        number = _SYS_PAYLOAD.fullmatch(payload)
        if topic in _BROKER_VALUES and number is not None:
            self._broker.values[topic] = float(number[1])

    # Declarations: every name, help text and label is here.

    def _declare_rounds(self) -> None:
        new = self._per_run
        self._rounds = new(
            Counter, "midge_rounds_total", "Attempts at rounds that ended.", ("outcome",), _each(RoundOutcome)
        )
        self._round_number = new(Gauge, "midge_round_number", "The round that is being tried or was tried last.")
        self._round_attempt = new(Gauge, "midge_round_attempt", "Which attempt at that round it is.")
        self._round_duration = new(
            Histogram, "midge_round_duration_seconds", "How long attempts at rounds took.", buckets=DURATION_BUCKETS_S
        )
        self._phase_duration = new(
            Histogram,
            "midge_phase_duration_seconds",
            "How long the phases of rounds took.",
            ("phase",),
            _each(Phase),
            buckets=DURATION_BUCKETS_S,
        )
        self._run_state = new(Gauge, "midge_run_state", "1 for the state of the run.", ("state",), _each(RunState))
        self._agents_missing = new(Gauge, "midge_agents_missing", "Agents that the run lacks before it can go on.")
        self._wait_since = new(
            Gauge, "midge_wait_since_timestamp_seconds", "When the present wait began.", ("reason",), zeroes=()
        )
        self._wait_until = new(
            Gauge, "midge_wait_until_timestamp_seconds", "When it ends at the latest.", ("reason",), zeroes=()
        )
        self._target = new(Gauge, "midge_cohort_target", "Updates that this attempt wants.")
        self._quorum = new(Gauge, "midge_quorum", "Updates that this attempt can do with.")
        self._invited = new(Gauge, "midge_cohort_invited", "Agents that were invited to this attempt.")
        self._accepted = new(Gauge, "midge_cohort_accepted", "Agents that took the invitation.")
        self._reported = new(Gauge, "midge_cohort_reported", "Agents whose update is counted.")

    def _declare_learning(self) -> None:
        new = self._per_run
        self._loss = new(Gauge, "midge_loss", "Mean loss of the version last evaluated.", ("source",), zeroes=())
        self._accuracy = new(
            Gauge, "midge_accuracy_ratio", "Accuracy of the version last evaluated.", ("source",), zeroes=()
        )
        self._best = new(Gauge, "midge_best_metric", "Best value of the metric that picks the best model.", zeroes=())
        self._delta_norm = new(Gauge, "midge_mean_delta_norm", "L2 norm of the last commit's mean delta.", zeroes=())
        self._update_norm = new(
            Gauge, "midge_update_norm", "L2 norms of the last commit's deltas.", ("stat",), zeroes=()
        )
        self._round_examples = new(Gauge, "midge_round_examples", "Examples behind the last commit.", zeroes=())
        self._last_commit = new(
            Gauge, "midge_last_commit_timestamp_seconds", "When the last version was committed.", zeroes=()
        )
        agent = ("agent_id",)
        self._agent_loss = new(
            Gauge, "midge_agent_loss", "Loss of the global model on an agent's data.", agent, zeroes=()
        )
        self._agent_accuracy = new(
            Gauge, "midge_agent_accuracy_ratio", "Accuracy of the global model on an agent's data.", agent, zeroes=()
        )
        self._agent_training_loss = new(
            Gauge, "midge_agent_training_loss", "Loss of an agent's last training.", agent, zeroes=()
        )
        self._agent_norm = new(Gauge, "midge_agent_update_norm", "L2 norm of an agent's last delta.", agent, zeroes=())
        self._updates_received = new(Counter, "midge_updates_received_total", "Updates that came in as a whole.")
        self._updates = new(
            Counter,
            "midge_updates_total",
            "What became of the updates that came in.",
            ("outcome", "reason"),
            [(outcome, NO_REASON) for outcome in get_args(UpdateOutcome) if outcome != "rejected"]
            + [("rejected", reason) for reason in REJECT_REASONS],
        )
        self._candidates_refused = new(
            Counter, "midge_candidates_refused_total", "Aggregated models that the held-out gate refused."
        )
        self._quarantined = new(Gauge, "midge_agents_quarantined", "Agents that are not invited for a while.")
        self._refusals = new(
            Counter, "midge_refusals_total", "Refusals by agents.", ("reason",), [(each,) for each in REFUSAL_REASONS]
        )

    def _declare_messages(self) -> None:
        new, kinds = self._per_federation, _each(Kind)
        both_ways = [(direction, *kind) for direction in get_args(Direction) for kind in kinds]
        self._agents = new(Gauge, "midge_agents", "Agents that are known, by state.", ("state",), _each(AgentState))
        self._id_conflicts = new(
            Counter, "midge_agent_id_conflicts_total", "Times that two processes took turns under one agent id."
        )
        self._messages = new(Counter, "midge_messages_total", "Messages in and out.", ("direction", "kind"), both_ways)
        self._traffic = new(
            Counter, "midge_traffic_bytes_total", "Bytes in these messages.", ("direction", "kind"), both_ways
        )
        self._invalid = new(
            Counter, "midge_messages_invalid_total", "Messages that broke the protocol.", ("kind",), kinds
        )
        self._stale = new(
            Counter, "midge_messages_stale_total", "Messages of another run, round or attempt.", ("kind",), kinds
        )
        self._connected = new(Gauge, "midge_broker_connected", "1 while the coordinator is connected to the broker.")
        self._disk_failed = new(
            Gauge, "midge_disk_failed", "1 while the state directory cannot be written, and the run waits for that."
        )
        self._disk_failures = new(
            Counter, "midge_disk_failures_total", "Times that writing to the state directory, or trying to, failed."
        )
        self._queue = new(Gauge, "midge_inbox_queue_bytes", "Bytes that wait in the coordinator's queue.")

    def _per_federation(
        self,
        kind: type[M],
        name: str,
        meaning: str,
        labels: tuple[str, ...] = (),
        zeroes: Iterable[tuple[str, ...]] = ((),),
    ) -> M:
        metric: M = kind(name, meaning, ("federation", *labels), registry=self._registry)
        for values in zeroes:
            metric.labels(self._federation, *values)
        return metric

    def _per_run(
        self,
        kind: type[M],
        name: str,
        meaning: str,
        labels: tuple[str, ...] = (),
        zeroes: Iterable[tuple[str, ...]] = ((),),
        **options: Any,
    ) -> M:
        metric: M = kind(name, meaning, ("federation", "run", *labels), registry=self._registry, **options)
        self._zeroes += [(metric, values) for values in zeroes]
        return metric

    def _of(self, metric: M, run: str, *values: str) -> M:
        """The series of a run; the first one asked for makes all of the run's that begin at 0."""
        if run not in self._runs:
            self._begin(run)
        labels = (self._federation, run, *values)
        self._runs[run].add((metric, labels))
        return metric.labels(*labels)

    def _begin(self, run: str) -> None:
        self._runs[run] = set()
        for metric, values in self._zeroes:
            labels = (self._federation, run, *values)
            self._runs[run].add((metric, labels))
            metric.labels(*labels)


class _BrokerCollector(Collector):
    """What the broker last said of itself, by `$SYS` topic."""

    def __init__(self, federation: str) -> None:
        self._federation = federation
        self.values: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        values = self.values.copy()
        for topic, (name, meaning) in _BROKER_VALUES.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, meaning, labels=("federation",))
            if topic in values:
                family.add_metric((self._federation,), values[topic])
            yield family


class _WithoutCreated(Collector):
    """A registry less its `_created` samples, one for each counter: they double a page, and nobody reads them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def render(registry: CollectorRegistry) -> tuple[str, bytes]:
    """Content type and body of `/metrics`."""
    return CONTENT_TYPE_LATEST, generate_latest(_WithoutCreated(registry))


def _each(literal: Any) -> list[tuple[str]]:
    return [(value,) for value in get_args(literal)]


def _bounded(reason: str | None, known: tuple[str, ...]) -> str:
    return reason if reason in known else OTHER
