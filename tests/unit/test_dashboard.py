"""The Grafana dashboard, the alerts and the page's examples ask only for what is there, and Prometheus can read them."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from coordinator.metrics import SYS_TOPICS, Metrics
from edge_agent.metrics import AgentMetrics
from tests.dashboard import load, matchers, metrics_used, panel_queries, panels, substitute

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "midge.json"
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
PROMETHEUS = ROOT / "deploy" / "prometheus"
PAGE = ROOT / "docs" / "metrics.md"
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)"
)


def sample_labels() -> dict[str, dict[str, set[str]]]:
    """Each sample's name -> its labels -> the values that they can have, over all of both sides' metrics."""
    registry = CollectorRegistry()
    metrics = Metrics("lab", registry)
    metrics.run_state("a", "running")
    metrics.committed("a", 1, examples=1, delta_norm=1.0, update_norms=[1.0])
    metrics.waits("a", "updates", 1.0, 2.0)
    metrics.best("a", 0.5)
    metrics.evaluated("a", "central", 0.5, {"accuracy": 0.5})
    metrics.evaluated("a", "federated", 0.5, {"accuracy": 0.5})
    metrics.agent_reported("a", "pi-3", norm=1.0, training_loss=0.5, loss=0.5, accuracy=0.5)
    for topic in SYS_TOPICS:
        metrics.broker_sys(topic, b"1")
    labels: dict[str, dict[str, set[str]]] = {}
    for family in [*registry.collect(), *AgentMetrics("pi-3", "lab").registry.collect()]:
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                of_sample = labels.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    of_sample.setdefault(label, set()).add(value)
    return labels


SAMPLES = sample_labels()
QUERIES = panel_queries(DASHBOARD)
ALERTS = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
EXAMPLES = re.findall(r"```promql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
EXPRESSIONS = [
    *((title, substitute(expr, "lab", "a")) for title, expr in QUERIES),
    *((rule["alert"], rule["expr"]) for rule in ALERTS),
    *((f"docs/metrics.md, example {number}", expr) for number, expr in enumerate(EXAMPLES, start=1)),
]


@pytest.mark.parametrize(("place", "expr"), EXPRESSIONS)
def test_an_expression_uses_only_metrics_and_labels_that_exist(place, expr):
    assert metrics_used(expr) <= set(SAMPLES), place
    for metric, label, operator, value in matchers(expr):
        assert label in SAMPLES[metric], f"{place}: {metric} has no label {label}"
        if label not in {"federation", "run"}:
            wanted = value.split("|") if operator == "=~" else [value]
            assert set(wanted) <= SAMPLES[metric][label], f"{place}: {metric} never has {label}={value}"


@pytest.mark.parametrize(("title", "expr"), QUERIES)
def test_a_panel_asks_for_the_chosen_federation_and_the_chosen_runs(title, expr):
    for metric in metrics_used(expr):
        asked = {(label, operator, value) for of, label, operator, value in matchers(expr) if of == metric}
        if "federation" in SAMPLES[metric]:
            assert ("federation", "=", "$federation") in asked, f"{title}: {metric}"
        if "run" in SAMPLES[metric]:
            assert ("run", "=~", "$run") in asked, f"{title}: {metric}"


def test_every_metric_of_the_coordinator_is_on_the_dashboard():
    shown = set().union(*(metrics_used(expr) for _, expr in QUERIES))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    there = {re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", name) for name in SAMPLES}
    of_agents = {sample.name for family in AgentMetrics("pi-3", "lab").registry.collect() for sample in family.samples}
    of_agents = {re.sub(r"(_seconds)_(bucket|sum|count|created)$", r"\1", name) for name in of_agents}
    assert there - of_agents == shown


def test_the_rows_ask_the_five_questions_in_order():
    rows = [panel["title"] for panel in load(DASHBOARD)["panels"] if panel["type"] == "row"]
    assert rows == [
        "Is it learning?",
        "Who takes part?",
        "Where does the time go?",
        "What was refused and why?",
        "Are the broker and the disk well?",
    ]


@pytest.mark.parametrize("panel", list(panels(load(DASHBOARD))), ids=lambda panel: panel["title"])
def test_a_panel_has_a_title_a_description_a_unit_and_our_data_source(panel):
    assert re.fullmatch(r"[A-Z][^_]*[^.]", panel["title"])
    assert re.fullmatch(r"[A-Z].*\.", panel["description"])
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "midge-prometheus"} for source in sources)
    refs = [target["refId"] for target in panel["targets"]]
    assert refs
    assert len(set(refs)) == len(refs)


def test_panels_have_their_own_ids_and_titles_and_do_not_overlap():
    every = load(DASHBOARD)["panels"]
    assert len({panel["id"] for panel in every}) == len({panel["title"] for panel in every}) == len(every)
    places = [panel["gridPos"] for panel in every]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, f"{one} and {other} overlap"


def test_the_variables_of_the_dashboard_list_what_is_there_in_the_shown_time():
    variables = {variable["name"]: variable for variable in load(DASHBOARD)["templating"]["list"]}
    assert list(variables) == ["federation", "run", "window"]
    assert variables["federation"]["query"]["query"] == "label_values(midge_broker_connected, federation)"
    assert variables["run"]["query"]["query"] == 'label_values(midge_round_number{federation="$federation"}, run)'
    assert variables["run"]["refresh"] == 2  # on a change of the time range
    assert variables["window"]["current"]["value"] in variables["window"]["query"].split(",")


def test_substitute_leaves_no_variable_and_refuses_one_that_it_does_not_know():
    expr = 'sum(rate(midge_rounds_total{federation="$federation",run=~"$run"}[$__rate_interval]))'
    assert substitute(expr, "lab", "a") == 'sum(rate(midge_rounds_total{federation="lab",run=~"a"}[1m]))'
    assert substitute("x[$__range] + y[$window]", "lab", "a", window="2m") == "x[2m] + y[2m]"
    with pytest.raises(ValueError, match=r"expected no variables but"):
        substitute('x{agent="$agent"}', "lab", "a")


def test_grafana_is_given_the_data_source_and_the_folder_that_the_dashboard_needs():
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "midge.yml").read_text(encoding="utf-8"))["providers"]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    assert (source["uid"], source["type"]) == ("midge-prometheus", "prometheus")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_prometheus_scrapes_the_coordinator_under_the_name_that_the_alerts_ask_for():
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["coordinator:8080"]}]
    assert job["metrics_path"] == "/metrics"
    down = next(rule for rule in ALERTS if rule["alert"] == "MidgeCoordinatorDown")
    assert down["expr"] == f'up{{job="{job["job_name"]}"}} == 0'


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_what_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert len(rule["annotations"]["summary"]) <= 120
    assert len(rule["annotations"]["description"].split(". ")) >= 2
    assert f"`{rule['alert']}`" in PAGE.read_text(encoding="utf-8")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_accepts_its_configuration():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then():
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_each_alert_is_proved_to_fire_and_to_keep_quiet():
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    checks = [check for test in tests for check in test["promql_expr_test"]]
    fired = {name for check in checks for name in re.findall(r'alertname="(\w+)"', str(check["exp_samples"]))}
    assert fired == {rule["alert"] for rule in ALERTS}
    for test in tests:  # whatever fires in a test is also seen quiet in it
        assert any(not check["exp_samples"] for check in test["promql_expr_test"]), test["name"]


@needs_promtool
def test_prometheus_can_read_every_expression(tmp_path):
    rules = [{"record": f"place_{number}", "expr": expr} for number, (_, expr) in enumerate(EXPRESSIONS)]
    path = tmp_path / "expressions.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", path)
