"""The Compose file for real: a federation of containers that is watched, loses parts, and ends its run.

The tests tell one story, in this order, about one run: bringing it up for each would take an hour.
"""

import json
import time

import pytest

from tests.dashboard import panel_queries, substitute
from tests.deploy.stack import AGENTS, FEDERATION, OURS, ROOT, Stack, eventually

pytestmark = pytest.mark.deploy

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "midge.json"
FROZEN_S = 10.0
"""Longer than a round, and shorter than the keep-alive: nobody is told of it."""
COORDINATOR_PACKAGES = ("sqlalchemy", "starlette", "uvicorn", "prometheus_client", "rich", "matplotlib", "amqtt")
WHICH_CAN_BE_IMPORTED = (
    "import importlib.util, json, sys; print(json.dumps([p for p in sys.argv[1:] if importlib.util.find_spec(p)]))"
)


def importable(stack: Stack, service: str, *packages: str) -> set[str]:
    answer = stack.inside(service, "python", "-c", WHICH_CAN_BE_IMPORTED, *packages)
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout))


def health(stack: Stack, service: str) -> int:
    """Exit status of the service's own health check, now."""
    return stack.inside(service, *stack.inspect(service)["Config"]["Healthcheck"]["Test"][1:]).returncode


def test_rounds_are_committed_soon_after_it_came_up(stack: Stack) -> None:
    assert stack.wait_for_rounds(more=3) >= 3


def test_the_run_goes_on_without_an_agent_whose_container_is_killed(stack: Stack) -> None:
    stack.kill("agent-2")
    eventually("agent-2 is missed", lambda: stack.presence("agent-2"), lambda presence: presence != "online")
    stack.wait_for_rounds(more=2)
    assert stack.inspect("agent-2")["State"]["Running"] is False, "docker kill counts as a stop: no policy undoes it"
    assert stack.num_updates() == 2


def test_the_killed_agent_takes_part_again_once_it_is_started(stack: Stack) -> None:
    stack.compose("start", "agent-2")
    eventually("a round of all three", stack.num_updates, lambda number: number == 3)
    assert stack.presence("agent-2") == "online"


def test_an_agent_that_ends_by_itself_is_started_again_by_its_restart_policy(stack: Stack) -> None:
    before = stack.inspect("agent-3")
    stack.inside("agent-3", "python", "-c", "import os, signal; os.kill(1, signal.SIGTERM)")
    eventually(
        "agent-3 is started again", lambda: stack.inspect("agent-3")["RestartCount"] == before["RestartCount"] + 1
    )
    eventually("a round of all three", stack.num_updates, lambda number: number == 3)


def test_rounds_go_on_after_the_broker_was_stopped_and_started(stack: Stack) -> None:
    assert health(stack, "agent-1") == 0
    stack.compose("stop", "mosquitto")
    eventually("agent-1 has no connection", lambda: health(stack, "agent-1"), lambda status: status == 1)
    assert health(stack, "coordinator") == 0, "it works, and waits for the broker"
    stack.compose("start", "mosquitto")
    stack.wait_for_rounds(more=3)


def test_a_killed_coordinator_goes_on_with_the_same_run(stack: Stack) -> None:
    run_id, last_round = stack.status()["run_id"], stack.committed()
    stack.kill("coordinator")
    stack.compose("start", "coordinator")
    assert eventually("the coordinator answers", stack.status)["run_id"] == run_id
    assert stack.committed() >= last_round
    stack.wait_for_rounds(more=2)


def test_a_frozen_agent_is_missed_and_takes_part_again(stack: Stack) -> None:
    stack.freeze("agent-2")
    eventually("agent-2 is missed", lambda: stack.presence("agent-2"), lambda presence: presence != "online")
    stack.wait_for_rounds(more=2)
    stack.thaw("agent-2")
    eventually("a round of all three", stack.num_updates, lambda number: number == 3)


@pytest.mark.parametrize("service", ["coordinator", "mosquitto"])
def test_the_run_goes_on_where_it_was_after_a_service_was_frozen(stack: Stack, service: str) -> None:
    run_id, last_round = stack.status()["run_id"], stack.committed()
    stack.freeze(service)
    time.sleep(FROZEN_S)
    stack.thaw(service)
    assert stack.wait_for_rounds(more=2) >= last_round + 2
    assert stack.status()["run_id"] == run_id


@pytest.mark.parametrize("service", ["agent-2", "coordinator", "mosquitto"])
def test_a_service_that_was_cut_from_the_network_comes_back_by_itself(stack: Stack, service: str) -> None:
    run_id = stack.status()["run_id"]
    stack.cut_off(service)
    time.sleep(FROZEN_S)
    stack.join_again(service)
    assert eventually("the coordinator answers", stack.status)["run_id"] == run_id
    stack.wait_for_rounds(more=2)
    eventually("a round of all three", stack.num_updates, lambda number: number == 3)


@pytest.mark.parametrize(
    "order",
    [("agent-3", "coordinator", "agent-1", "agent-2", "mosquitto"), ("coordinator", "mosquitto", *reversed(AGENTS))],
    ids=["the broker last", "the coordinator first"],
)
def test_services_may_be_started_in_any_order(stack: Stack, order: tuple[str, ...]) -> None:
    run_id, last_round = stack.status()["run_id"], stack.committed()
    stack.compose("stop", "-t", "20", *order)
    for service in order:
        stack.start_alone(service)
    board = eventually("the coordinator answers", stack.status)
    assert (board["run_id"], stack.committed() >= last_round) == (run_id, True)
    stack.wait_for_rounds(more=1)
    eventually("a round of all three", stack.num_updates, lambda number: number == 3)


@pytest.mark.parametrize("service", ["mosquitto", *OURS])
def test_no_process_works_as_root(stack: Stack, service: str) -> None:
    # Mosquitto starts as root and gives it up; Prometheus' own image runs as nobody.
    status = stack.inside(service, "cat", "/proc/1/status").stdout
    real, effective, *_ = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert "0" not in {real, effective}


@pytest.mark.parametrize("service", OURS)
def test_ours_have_no_capabilities_and_write_only_to_their_state(stack: Stack, service: str) -> None:
    status = stack.inside(service, "cat", "/proc/1/status").stdout
    assert next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")) == "0" * 16
    script = "import os; print([d for d in ('/', '/usr/local/lib', '/var/lib/midge', '/tmp') if os.access(d, os.W_OK)])"
    assert stack.inside(service, "python", "-c", script).stdout.strip() == "['/var/lib/midge', '/tmp']"


def test_an_agent_has_torch_and_none_of_the_coordinators_packages(stack: Stack) -> None:
    wanted = ("torch", "sklearn", *COORDINATOR_PACKAGES)
    assert importable(stack, "agent-1", *wanted) == {"torch", "sklearn"}
    assert importable(stack, "coordinator", *wanted) == set(wanted)


@pytest.mark.parametrize("service", ["mosquitto", *OURS, "prometheus"])
def test_every_service_becomes_healthy(stack: Stack, service: str) -> None:
    eventually(f"{service} is healthy", lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy")


def test_every_panel_of_the_dashboard_has_data(stack: Stack) -> None:
    run_id = stack.status()["run_id"]
    queries = [(title, substitute(expr, FEDERATION, run_id)) for title, expr in panel_queries(DASHBOARD)]
    assert len(queries) > 20

    def empty() -> list[tuple[str, str]]:
        return [(title, expr) for title, expr in queries if not stack.query(expr)]

    # The broker speaks of itself every 10 s, and a rate needs two scrapes, 5 s apart.
    eventually("no panel is empty", empty, lambda left: not left)


def test_prometheus_shows_how_accuracy_grew(stack: Stack) -> None:
    run_id = stack.status()["run_id"]
    for source in ("central", "federated"):
        series = f'midge_accuracy_ratio{{federation="{FEDERATION}", run="{run_id}", source="{source}"}}'
        last = stack.query(f"max_over_time({series}[15m])")
        first = stack.query(f"min_over_time({series}[15m])")
        # Ten digits: a guess is right on 0.1 of them, an agent that knows its own three or four on at most 0.4.
        assert float(last[0]["value"][1]) > 0.6
        assert float(first[0]["value"][1]) < 0.6, "the curve has its beginning"


def test_another_configuration_begins_another_run_which_ends_though_an_agent_is_killed(stack: Stack) -> None:
    first_run = stack.status()["run_id"]
    stack.begin_run(rounds=20)
    eventually("the coordinator answers", stack.status, lambda board: board["run_id"] not in ("", first_run))
    stack.wait_for_rounds(more=1)
    stack.kill("agent-1")
    assert stack.status()["state"] != "done", "it was killed in the middle of the run"
    board = eventually("the run is done", stack.status, lambda board: board["state"] == "done")
    assert (board["round_num"], board["rounds"]) == (20, 20)
    assert stack.num_updates() == 2
    eventually(
        "Prometheus knows", lambda: stack.query(f'midge_run_state{{run="{board["run_id"]}", state="done"}} == 1')
    )
