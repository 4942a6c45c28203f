"""Metrics of both sides: what each event does to them, what they start from, and that their page is true."""

import math
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import REFUSAL_REASONS, REJECT_REASONS, SYS_TOPICS, Metrics, render
from edge_agent.metrics import AgentMetrics, MetricsError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
NOW = 1_750_000_000.0
LEARNING = {"federation": "lab", "run": "a"}


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return Metrics("lab", registry, clock=lambda: NOW)


def everything_happens(metrics: Metrics, run: str = "a") -> None:
    metrics.connected(is_connected=True)
    metrics.agents({"online": 3, "silent": 1})
    metrics.run_state(run, "running")
    metrics.waiting(run, 2)
    metrics.waits(run, "updates", 1000.0, 1600.0)
    metrics.round_started(run, round_num=1, attempt=1, target=4, quorum=2)
    metrics.cohort(run, invited=4, accepted=3, reported=2)
    metrics.phase_ended(run, "collecting", 0.2)
    metrics.update_received(run)
    metrics.update(run, "accepted")
    metrics.refusal(run, "busy")
    metrics.message("in", "update", 100)
    metrics.invalid_message("control")
    metrics.stale_message("update")
    metrics.id_conflict()
    metrics.queue(7)
    metrics.disk_failed()
    metrics.disk_works()
    metrics.committed(run, 1, examples=30, delta_norm=0.5, update_norms=[1.0, 4.0, 2.0])
    for source in ("central", "federated"):
        metrics.evaluated(run, source, 0.25, {"accuracy": 0.75, "a task's own": 3.0})
    metrics.best(run, 0.75)
    metrics.agent_reported(run, "pi-1", norm=1.0, training_loss=0.5, loss=0.25, accuracy=0.75)
    metrics.round_ended(run, "committed", 0.3)
    for topic in SYS_TOPICS:
        metrics.broker_sys(topic, b"12")


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def run_samples(registry, run):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.labels.get("run") == run and not sample.name.endswith("_created")
    }


def test_the_build_says_version_and_protocol(registry, metrics):
    (sample,) = next(family for family in registry.collect() if family.name == "midge_build_info").samples
    assert (set(sample.labels), sample.labels["protocol"], sample.value) == ({"version", "protocol"}, "1", 1)


def test_a_round_that_starts_shows_its_number_and_an_empty_cohort(registry, metrics):
    metrics.cohort("a", invited=9, accepted=9, reported=9)
    metrics.waiting("a", 3)
    metrics.round_started("a", round_num=12, attempt=2, target=5, quorum=3)
    names = ("round_number", "round_attempt", "cohort_target", "quorum", "cohort_invited", "agents_missing")
    assert [value(registry, f"midge_{name}", **LEARNING) for name in names] == [12, 2, 5, 3, 0, 0]
    metrics.cohort("a", invited=7, accepted=6, reported=4)
    names = ("cohort_invited", "cohort_accepted", "cohort_reported")
    assert [value(registry, f"midge_{name}", **LEARNING) for name in names] == [7, 6, 4]


def test_rounds_and_phases_are_counted_and_timed(registry, metrics):
    metrics.round_ended("a", "committed", 2.0)
    metrics.round_ended("a", "committed", 0.004)
    metrics.round_ended("a", "abandoned", 7200.0)
    metrics.phase_ended("a", "collecting", 1.5)
    assert value(registry, "midge_rounds_total", outcome="committed", **LEARNING) == 2
    assert value(registry, "midge_rounds_total", outcome="abandoned", **LEARNING) == 1
    bucket = "midge_round_duration_seconds_bucket"
    assert [value(registry, bucket, le=le, **LEARNING) for le in ("0.005", "2.5", "3600.0", "+Inf")] == [1, 2, 2, 3]
    assert value(registry, "midge_phase_duration_seconds_sum", phase="collecting", **LEARNING) == 1.5
    assert value(registry, "midge_phase_duration_seconds_count", phase="selecting", **LEARNING) == 0


def test_the_state_of_a_run_is_one_of_five(registry, metrics):
    metrics.run_state("a", "waiting")
    metrics.run_state("a", "running")
    states = ("waiting", "running", "done", "failed", "stopped")
    assert [value(registry, "midge_run_state", state=state, **LEARNING) for state in states] == [0, 1, 0, 0, 0]


def test_a_commit_shows_norms_examples_and_its_time(registry, metrics):
    metrics.committed("a", 4, examples=310, delta_norm=0.5, update_norms=[1.0, 8.0, 2.0, 4.0])
    norms = [value(registry, "midge_update_norm", stat=stat, **LEARNING) for stat in ("min", "median", "max")]
    assert norms == [1.0, 3.0, 8.0]  # the median of 1, 2, 4, 8 is (2 + 4) / 2
    assert value(registry, "midge_mean_delta_norm", **LEARNING) == 0.5
    assert value(registry, "midge_round_examples", **LEARNING) == 310
    assert value(registry, "midge_last_commit_timestamp_seconds", **LEARNING) == NOW
    assert value(registry, "midge_round_number", **LEARNING) == 4


def test_a_commit_of_no_known_norms_shows_none(registry, metrics):
    metrics.committed("a", 1, examples=1, delta_norm=0.5, update_norms=[])
    assert value(registry, "midge_update_norm", stat="max", **LEARNING) is None


def test_evaluations_are_absent_until_there_is_one_and_keep_their_sources_apart(registry, metrics):
    metrics.run_state("a", "running")
    assert value(registry, "midge_accuracy_ratio", source="central", **LEARNING) is None
    metrics.evaluated("a", "central", 0.5, {"accuracy": 0.875})
    metrics.evaluated("a", "federated", 0.75, {"auc": 0.9})
    assert value(registry, "midge_accuracy_ratio", source="central", **LEARNING) == 0.875
    assert value(registry, "midge_accuracy_ratio", source="federated", **LEARNING) is None
    assert value(registry, "midge_loss", source="federated", **LEARNING) == 0.75


def test_every_update_that_came_in_has_one_outcome(registry, metrics):
    outcomes = [("accepted", None), ("rejected", "norm"), ("late", None), ("duplicate", None)]
    for outcome, reason in outcomes:
        metrics.update_received("a")
        metrics.update("a", outcome, reason)
    counted = {key: count for key, count in run_samples(registry, "a").items() if key[0] == "midge_updates_total"}
    assert sum(counted.values()) == value(registry, "midge_updates_received_total", **LEARNING) == 4
    assert value(registry, "midge_updates_total", outcome="rejected", reason="norm", **LEARNING) == 1
    assert value(registry, "midge_updates_total", outcome="accepted", reason="none", **LEARNING) == 1


@pytest.mark.fault(31)
def test_a_reason_that_is_none_of_ours_is_counted_as_other(registry, metrics):
    metrics.run_state("a", "running")
    before = len(run_samples(registry, "a"))
    for number in range(100):
        metrics.refusal("a", f"reason {number}")
        metrics.update("a", "rejected", f"reason {number}")
    assert value(registry, "midge_refusals_total", reason="other", **LEARNING) == 100
    assert value(registry, "midge_updates_total", outcome="rejected", reason="other", **LEARNING) == 100
    assert len(run_samples(registry, "a")) == before


def test_a_new_run_starts_with_a_0_for_everything_that_is_truly_0(registry, metrics):
    metrics.run_state("a", "waiting")
    for outcome in ("committed", "abandoned"):
        assert value(registry, "midge_rounds_total", outcome=outcome, **LEARNING) == 0
    for outcome in ("accepted", "late", "duplicate"):
        assert value(registry, "midge_updates_total", outcome=outcome, reason="none", **LEARNING) == 0
    for reason in REJECT_REASONS:
        assert value(registry, "midge_updates_total", outcome="rejected", reason=reason, **LEARNING) == 0
    for reason in REFUSAL_REASONS:
        assert value(registry, "midge_refusals_total", reason=reason, **LEARNING) == 0
    assert value(registry, "midge_round_duration_seconds_count", **LEARNING) == 0
    assert value(registry, "midge_last_commit_timestamp_seconds", **LEARNING) is None


def test_traffic_agents_and_connection_are_there_before_anything_happens(registry, metrics):
    for direction in ("in", "out"):
        for kind in ("control", "model", "update", "presence"):
            labels = {"federation": "lab", "direction": direction, "kind": kind}
            assert value(registry, "midge_traffic_bytes_total", **labels) == 0
            assert value(registry, "midge_messages_total", **labels) == 0
    assert value(registry, "midge_agents", federation="lab", state="online") == 0
    assert value(registry, "midge_broker_connected", federation="lab") == 0


def test_messages_count_once_and_their_bytes_add_up(registry, metrics):
    metrics.message("in", "update", 1000)
    metrics.message("in", "update", 24)
    labels = {"federation": "lab", "direction": "in", "kind": "update"}
    assert value(registry, "midge_messages_total", **labels) == 2
    assert value(registry, "midge_traffic_bytes_total", **labels) == 1024


def test_a_disk_that_fails_is_shown_for_as_long_as_it_does(registry, metrics):
    def shown() -> tuple[float | None, float | None]:
        return (
            value(registry, "midge_disk_failed", federation="lab"),
            value(registry, "midge_disk_failures_total", federation="lab"),
        )

    assert shown() == (0, 0)
    metrics.disk_failed()
    metrics.disk_failed()
    assert shown() == (1, 2)
    metrics.disk_works()
    assert shown() == (0, 2)


def test_a_state_that_no_agent_is_in_any_more_is_0_again(registry, metrics):
    metrics.agents({"online": 2, "silent": 5})
    metrics.agents({"online": 7})
    states = [value(registry, "midge_agents", federation="lab", state=s) for s in ("online", "silent", "offline")]
    assert states == [7, 0, 0]


def test_forgetting_a_run_removes_all_of_its_series_and_no_other(registry, metrics):
    everything_happens(metrics, "a")
    everything_happens(metrics, "b")
    before = run_samples(registry, "b")
    metrics.forget_run("a")
    metrics.forget_run("never seen")
    assert run_samples(registry, "a") == {}
    assert run_samples(registry, "b") == before


def test_a_run_that_comes_back_after_it_was_forgotten_starts_at_0(registry, metrics):
    everything_happens(metrics)
    metrics.forget_run("a")
    metrics.run_state("a", "running")
    assert value(registry, "midge_rounds_total", outcome="committed", **LEARNING) == 0


@pytest.mark.fault(31)
def test_only_the_gauges_by_agent_name_an_agent(registry, metrics):
    everything_happens(metrics)
    samples = [sample for family in registry.collect() for sample in family.samples]
    naming = {sample.name for sample in samples if "agent_id" in sample.labels}
    assert naming == {f"midge_agent_{name}" for name in ("loss", "accuracy_ratio", "training_loss", "update_norm")}
    labels = {label for sample in samples for label in sample.labels}
    allowed = {"federation", "run", "outcome", "reason", "phase", "state", "source", "stat", "direction", "kind", "le"}
    assert labels == allowed | {"version", "protocol", "agent_id"}


def by_agent(registry, name: str = "update_norm") -> dict[str, float]:
    """The values of a gauge by agent, in the order in which they came."""
    family = next(family for family in registry.collect() if family.name == f"midge_agent_{name}")
    return {sample.labels["agent_id"]: sample.value for sample in family.samples}


def test_what_an_agent_reported_last_is_shown_and_what_it_did_not_tell_is_absent(registry, metrics):
    metrics.agent_reported("a", "pi-1", norm=3.0, training_loss=0.5, loss=0.25, accuracy=0.75)
    metrics.agent_reported("a", "pi-1", norm=2.0, loss=0.125)
    metrics.agent_reported("a", "pi-2", norm=1.0)
    assert by_agent(registry) == {"pi-1": 2.0, "pi-2": 1.0}
    assert by_agent(registry, "loss") == {"pi-1": 0.125}
    assert by_agent(registry, "accuracy_ratio") == {"pi-1": 0.75}
    assert by_agent(registry, "training_loss") == {"pi-1": 0.5}


@pytest.mark.fault(31)
def test_only_so_many_agents_are_shown_and_one_that_is_gone_makes_room(registry):
    metrics = Metrics("lab", registry, max_agents=2)
    for number in range(1, 5):
        metrics.agent_reported("a", f"pi-{number}", norm=number)
    assert by_agent(registry) == {"pi-1": 1, "pi-2": 2}
    metrics.forget_agent("pi-1")
    metrics.forget_agent("pi-4")  # was never shown
    metrics.agent_reported("a", "pi-3", norm=30)
    metrics.agent_reported("a", "pi-1", norm=10)
    assert by_agent(registry) == {"pi-2": 2, "pi-3": 30}
    metrics.forget_agents()
    assert by_agent(registry) == {}
    metrics.forget_run("a")
    assert run_samples(registry, "a") == {}


def test_with_no_room_at_all_no_agent_is_named(registry):
    Metrics("lab", registry, max_agents=0).agent_reported("a", "pi-1", norm=1.0)
    assert by_agent(registry) == {}


def test_two_federations_in_one_process_share_nothing(registry, metrics):
    other = CollectorRegistry()
    Metrics("hall", other)
    metrics.agents({"online": 3})
    assert value(other, "midge_agents", federation="hall", state="online") == 0
    assert value(other, "midge_agents", federation="lab", state="online") is None


@pytest.mark.parametrize(
    ("topic", "payload", "name", "seen"),
    [
        ("$SYS/broker/clients/connected", b"3", "midge_broker_clients_connected", 3),
        ("$SYS/broker/publish/messages/dropped", b"1980", "midge_broker_messages_dropped_total", 1980),
        ("$SYS/broker/retained messages/count", b"54", "midge_broker_retained_messages", 54),
        ("$SYS/broker/uptime", b"4 seconds", "midge_broker_uptime_seconds", 4),
    ],
)
def test_what_mosquitto_says_of_itself_is_shown(registry, metrics, topic, payload, name, seen):
    assert topic in SYS_TOPICS
    assert value(registry, name, federation="lab") is None
    metrics.broker_sys(topic, payload)
    assert value(registry, name, federation="lab") == seen


@pytest.mark.parametrize(
    "payload",
    [b"", b"-1", b"nan", b"inf", b"1e9", b"12 minutes", b"12\n", b" 12", b"\xff\xfe", b"9" * 400, "\u0663".encode()],
)
def test_garbage_from_the_broker_is_ignored(registry, metrics, payload):
    metrics.broker_sys("$SYS/broker/heap/current", b"49192")
    metrics.broker_sys("$SYS/broker/heap/current", payload)
    assert value(registry, "midge_broker_heap_bytes", federation="lab") == 49192


def test_a_topic_that_was_not_asked_for_is_ignored(registry, metrics):
    before = render(registry)
    metrics.broker_sys("$SYS/broker/load/bytes/sent/1min", b"12")
    metrics.broker_sys("midge/1/lab/coordinator", b"12")
    assert render(registry) == before


def test_what_the_broker_said_is_forgotten_when_the_connection_ends(registry, metrics):
    metrics.connected(is_connected=True)
    metrics.broker_sys("$SYS/broker/heap/current", b"49192")
    metrics.connected(is_connected=False)
    assert value(registry, "midge_broker_heap_bytes", federation="lab") is None
    assert value(registry, "midge_broker_connected", federation="lab") == 0


def test_the_page_that_prometheus_reads_parses_and_has_no_created_series(registry, metrics):
    everything_happens(metrics)
    content_type, body = render(registry)
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert content_type.startswith("text/plain")
    assert not [name for name in families if name.endswith("_created")]
    assert families["midge_rounds"].type == "counter"
    assert families["midge_loss"].samples[0].value == 0.25


def test_a_diverged_loss_is_shown_as_what_it_is(registry, metrics):
    metrics.evaluated("a", "central", math.nan, {"accuracy": 0.1})
    assert b'midge_loss{federation="lab",run="a",source="central"} NaN' in render(registry)[1]


# The agent's.

AGENT = {"federation": "lab", "agent_id": "pi-3"}


@pytest.fixture
def agent_metrics():
    metrics = AgentMetrics("pi-3", "lab")
    yield metrics
    metrics.close()


def test_an_agent_shows_its_state_rounds_training_and_bytes(agent_metrics):
    agent_metrics.connected(is_connected=True)
    agent_metrics.state("TRAINING")
    agent_metrics.round_ended("accepted")
    agent_metrics.trained(2.5)
    agent_metrics.message("out", 100)
    agent_metrics.invalid_messages(3)
    registry = agent_metrics.registry
    assert value(registry, "midge_agent_state", state="TRAINING", **AGENT) == 1
    assert value(registry, "midge_agent_state", state="OFFLINE", **AGENT) == 0
    assert value(registry, "midge_agent_rounds_total", outcome="accepted", **AGENT) == 1
    assert value(registry, "midge_agent_rounds_total", outcome="refused", **AGENT) == 0
    assert value(registry, "midge_agent_training_duration_seconds_sum", **AGENT) == 2.5
    assert value(registry, "midge_agent_traffic_bytes_total", direction="out", **AGENT) == 100
    assert value(registry, "midge_agent_connected", **AGENT) == 1
    assert value(registry, "midge_agent_messages_invalid_total", **AGENT) == 3


def test_an_agent_serves_its_metrics_on_a_port_of_its_own_until_it_is_closed(agent_metrics):
    port = agent_metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        assert b'midge_agent_state{agent_id="pi-3",federation="lab",state="OFFLINE"} 1.0' in response.read()
    with pytest.raises(RuntimeError, match=f"served on port {port} already"):
        agent_metrics.serve(0)
    agent_metrics.close()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_a_port_that_is_taken_is_named_with_what_to_do(agent_metrics):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MetricsError, match=rf"metrics on 127.0.0.1:{port}: .*choose another, or 0 for any"):
            agent_metrics.serve(port)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MetricsError, match=r"pip install 'midge\[metrics\]'"):
        AgentMetrics("pi-3", "lab")


def test_the_agents_file_imports_the_library_only_when_it_is_used():
    code = "import sys, edge_agent.metrics; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Page and code. A row: | `name` | type | unit | `label`, `label` | meaning |

ROW = re.compile(r"\| `(midge_\w+)` \| (\w+) \| ([^|]+) \| ([^|]*) \| ([^|]+) \|")
UNITS = {"_seconds": "seconds", "_bytes": "bytes", "_bytes_total": "bytes", "_ratio": "fraction", "_info": "1"}


def page_rows() -> dict[str, tuple[str, str, set[str]]]:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len({row[0] for row in rows}) == len(rows), "a metric has two rows"
    return {name: (kind, unit.strip(), set(re.findall(r"`(\w+)`", labels))) for name, kind, unit, labels, _ in rows}


def described(family: Metric) -> tuple[str, tuple[str, set[str]]]:
    name = family.name + ("_total" if family.type == "counter" else "")
    return name, (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})


def all_families() -> list[Metric]:
    registry = CollectorRegistry()
    everything_happens(Metrics("lab", registry))
    return [*registry.collect(), *AgentMetrics("pi-3", "lab").registry.collect()]


def test_the_page_lists_every_metric_with_its_type_and_labels_and_no_other():
    in_code = dict(described(family) for family in all_families())
    on_page = {name: (kind, labels) for name, (kind, _, labels) in page_rows().items()}
    assert on_page == in_code


def test_names_end_in_their_unit_and_counters_in_total():
    for name, (kind, unit, _) in page_rows().items():
        assert name.endswith("_total") == (kind == "counter"), name
        for suffix, expected in UNITS.items():
            assert not name.endswith(suffix) or unit.startswith(expected), f"{name}: unit {unit}"
        if unit in {"seconds", "bytes"}:
            assert re.search(rf"_{unit}(_total)?$", name), f"{name}: unit {unit}"


def test_every_metric_has_a_help_text_that_is_a_sentence():
    for family in all_families():
        assert re.fullmatch(r"[A-Z0-9].*\.", family.documentation), f"{family.name}: {family.documentation!r}"


@pytest.mark.parametrize(("head", "reasons"), [("the update", REJECT_REASONS), ("the agent", REFUSAL_REASONS)])
def test_the_page_explains_every_reason_and_no_other(head, reasons):
    table = PAGE.read_text(encoding="utf-8").split(f"| reason | {head} |\n", maxsplit=1)[1].split("\n\n", maxsplit=1)[0]
    assert sorted(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", table, re.MULTILINE)) == sorted(reasons)
