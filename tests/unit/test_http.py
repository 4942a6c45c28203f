"""What is served over HTTP: metrics, health and readiness with their reasons, and the state as JSON; it changes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from coordinator import run_events as ev
from coordinator.board import AgentView, Board, Shared
from coordinator.client import AwayError, RefusedError, Running
from coordinator.control import Asked, Closed, Control
from coordinator.http import SERVICE_FILE, Heart, HttpError, HttpServer, make_app
from coordinator.metrics import Metrics
from coordinator.store import Store
from midge.wire.messages import Evaluation
from tests.machines import version_digest

SCORE = Evaluation(num_examples=10, loss=0.5, metrics={"accuracy": 0.75})


class Talk:
    """An application, and all that it looks at."""

    def __init__(self, directory) -> None:
        self.shared = Shared(Board(federation="lab", broker="mqtt://broker:1883", is_connected=True))
        self.store = Store(directory)
        self.heart = Heart()
        self.registry = CollectorRegistry()
        self.metrics = Metrics("lab", self.registry)
        self.asked: list[Asked] = []
        self.closed = Closed(outcome="closed", round_num=3, num_updates=2, text="closed round 3 with 2 updates")
        self.control = Control(self.take)
        self.app = make_app(self.registry, self.shared, self.store, self.heart, self.control)

    def take(self, asked: Asked) -> None:
        """Answer at once what is asked, as the coordinator's loop does within a turn."""
        self.asked.append(asked)
        asked.answer.set_result(self.closed)

    def request(self, method: str, path: str, token: str = "") -> httpx.Response:
        """Ask the application itself: no socket, no server."""

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://lab") as client:
                headers = {"authorization": f"Bearer {token}"} if token else {}
                return await client.request(method, path, headers=headers)

        return asyncio.run(ask())

    def get(self, path: str) -> tuple[int, object]:
        answer = self.request("GET", path)
        assert answer.headers["content-type"].startswith("application/json")
        return answer.status_code, answer.json()

    def create_run(self) -> str:
        return self.store.create_run(federation="lab", task="digits", fingerprint="f", definition={}, rounds=3)


@pytest.fixture
def talk(tmp_path):
    made = Talk(tmp_path)
    yield made
    made.store.close()


def test_metrics_are_in_the_format_of_prometheus(talk):
    talk.metrics.round_ended("r1", "committed", 0.25)
    answer = talk.request("GET", "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["midge_rounds_total", "committed"] == 1
    assert samples["midge_rounds_total", "abandoned"] == 0


def test_health_is_well_while_the_loop_turns_and_says_for_how_long_it_has_not(talk):
    assert talk.get("/healthz") == (200, {"status": "ok"})
    talk.heart.beat_at = time.monotonic() - 45
    assert talk.get("/healthz") == (503, {"status": "stalled", "for_s": 45})
    talk.heart.beat()
    assert talk.get("/healthz") == (200, {"status": "ok"})


def test_health_is_not_well_where_the_network_thread_is_dead(talk):
    talk.heart.network_is_stuck = True
    assert talk.get("/healthz") == (503, {"status": "the network thread is dead or stuck"})


def test_readiness_needs_the_broker_and_says_what_stands_in_the_way(talk):
    assert talk.get("/readyz") == (200, {"status": "ready"})
    talk.shared.board.is_connected = False
    assert talk.get("/readyz") == (503, {"status": "the broker cannot be reached: connecting"})
    talk.shared.board.broker_problem = "not authorised: check the password"
    assert talk.get("/readyz") == (503, {"status": "the broker cannot be reached: not authorised: check the password"})
    talk.shared.board.is_connected = True
    talk.heart.problem = "the disk is full"
    assert talk.get("/readyz") == (503, {"status": "the disk is full"})


def test_the_status_is_the_board(talk):
    board = talk.shared.board
    board.run_id, board.rounds, board.status = "digits-1", 3, "round 1 of 3: 1 of 2 reported"
    board.agents["pi-1"] = AgentView("pi-1", activity="training", fraction=0.5)
    board.round_view(0).central = SCORE
    board.round_view(1).duration_s = 0.25
    status, body = talk.get("/api/v1/status")
    assert status == 200
    assert (body["run_id"], body["status"], body["is_connected"]) == ("digits-1", board.status, True)
    assert [(agent["agent_id"], agent["activity"], agent["fraction"]) for agent in body["agents"]] == [
        ("pi-1", "training", 0.5)
    ]
    assert [view["round_num"] for view in body["history"]] == [0, 1]
    assert body["history"][0]["central"] == {"num_examples": 10, "loss": 0.5, "metrics": {"accuracy": 0.75}}
    assert talk.get("/api/v1/agents") == (200, body["agents"])


def test_runs_and_their_versions_are_listed(talk):
    assert talk.get("/api/v1/runs") == (200, [])
    run_id = talk.create_run()
    talk.store.save(run_id, [ev.SaveVersion(0, version_digest(0), None)])
    talk.store.save(run_id, [ev.SaveEvaluation(0, "central", SCORE)])
    status, runs = talk.get("/api/v1/runs")
    assert (status, [run["run_id"] for run in runs]) == (200, [run_id])
    status, versions = talk.get(f"/api/v1/runs/{run_id}/versions")
    assert status == 200
    assert [(row["round_num"], row["digest"]) for row in versions] == [(0, version_digest(0))]
    assert versions[0]["central"]["metrics"] == {"accuracy": 0.75}


def test_what_each_update_said_is_listed_by_round_and_agent(talk):
    run_id = talk.create_run()
    assert talk.get(f"/api/v1/runs/{run_id}/updates") == (200, [])
    update = ev.AcceptedUpdate(
        agent_id="pi-1",
        attempt=1,
        update_digest="ab" * 32,
        num_examples=7,
        counters=(3,),
        norm=0.5,
        training_s=2.0,
        metrics={"train_loss": 0.25},
        evaluation=SCORE,
    )
    talk.store.save(run_id, [ev.SaveUpdate(1, update)])
    status, (view,) = talk.get(f"/api/v1/runs/{run_id}/updates")
    assert status == 200
    assert (view["round_num"], view["agent_id"], view["num_examples"]) == (1, "pi-1", 7)
    assert view["metrics"] == {"train_loss": 0.25}
    assert view["evaluation"]["metrics"] == {"accuracy": 0.75}
    assert "counters" not in view
    assert talk.get("/api/v1/runs/none/updates")[0] == 404


def test_a_run_without_versions_has_none_and_a_run_that_is_not_there_is_not_found(talk):
    assert talk.get(f"/api/v1/runs/{talk.create_run()}/versions") == (200, [])
    expected = (404, {"error": "there is no such run; /api/v1/runs lists them"})
    assert talk.get("/api/v1/runs/none/versions") == expected
    assert talk.get("/api/v1/runs/' OR 1=1 --/versions") == expected


def test_the_root_lists_what_there_is(talk):
    answer = talk.request("GET", "/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    lines = answer.text.splitlines()
    assert "GET  /metrics" in lines
    assert "GET  /api/v1/runs/{run_id}/versions" in lines
    assert "POST /api/v1/round/close" in lines
    assert "GET  /" not in lines
    paths = {route.path for route in talk.app.routes} - {"/"}
    assert {line.split()[1] for line in lines if line.startswith(("GET", "POST"))} == paths


@pytest.mark.parametrize("path", ["/api", "/api/v1", "/api/v1/runs/x", "/metrics/x", "/../etc/passwd", "/docs"])
def test_nothing_else_is_there(talk, path):
    assert talk.request("GET", path).status_code == 404


@pytest.mark.parametrize(
    "path", ["/metrics", "/healthz", "/readyz", "/api/v1/status", "/api/v1/runs", "/api/v1/agents"]
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_can_be_changed(talk, path, method):
    assert talk.request(method, path).status_code == 405


def test_a_watcher_hears_each_change_until_the_run_is_over(talk, tmp_path):
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path)
    server.start()
    try:
        lines = Running.find(tmp_path).lines("/api/v1/watch")
        assert json.loads(next(lines))["round_num"] == 0
        talk.shared.board.round_num = 1
        assert json.loads(next(lines))["round_num"] == 1
        talk.shared.board.state = "done"
        assert json.loads(next(lines))["state"] == "done"
        assert list(lines) == []
    finally:
        server.stop()


def test_the_last_word_still_goes_out_when_the_server_ends_right_after_it(talk, tmp_path):
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path)
    server.start()
    lines = Running.find(tmp_path).lines("/api/v1/watch")
    next(lines)
    talk.shared.board.state = "failed"
    server.stop()
    assert [json.loads(line)["state"] for line in lines] == ["failed"]


def test_watchers_beyond_a_number_are_sent_to_the_status(talk, tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.http._MAX_WATCHERS", 1)
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path)
    server.start()
    try:
        running = Running.find(tmp_path)
        first = running.lines("/api/v1/watch")
        next(first)
        with pytest.raises(RefusedError, match="1 are watching already; ask /api/v1/status"):
            next(running.lines("/api/v1/watch"))
        talk.shared.board.state = "done"
        assert len(list(first)) == 1
        assert len(list(running.lines("/api/v1/watch"))) == 1  # there is room again
    finally:
        server.stop()


# What an operator may change.


def test_whoever_has_the_token_closes_the_round_and_is_told_what_came_of_it(talk):
    answer = talk.request("POST", "/api/v1/round/close", talk.control.token)
    assert answer.status_code == 200
    assert answer.json() == {
        "outcome": "closed",
        "round_num": 3,
        "num_updates": 2,
        "text": "closed round 3 with 2 updates",
    }
    assert [type(asked.event) for asked in talk.asked] == [ev.CloseAsked]


@pytest.mark.parametrize("token", ["", "wrong"])
def test_without_the_token_nothing_is_asked_of_the_coordinator(talk, token):
    answer = talk.request("POST", "/api/v1/round/close", token)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "service.json in the state directory" in answer.json()["error"]
    assert talk.control.token not in answer.text
    assert talk.asked == []


def test_an_application_without_an_operator_lets_nobody_in(talk):
    talk.app = make_app(talk.registry, talk.shared, talk.store, talk.heart)
    assert talk.request("POST", "/api/v1/round/close", talk.control.token).status_code == 401


def test_closing_needs_a_post_and_a_loop_that_stalls_is_said_to(talk, monkeypatch):
    assert talk.request("GET", "/api/v1/round/close", talk.control.token).status_code == 405
    monkeypatch.setattr("coordinator.http._ANSWER_S", 0.01)
    talk.take = talk.control._put = talk.asked.append
    answer = talk.request("POST", "/api/v1/round/close", talk.control.token)
    assert answer.status_code == 503
    assert "see /healthz" in answer.json()["error"]
    # Who asked has gone: an answer that comes now is for nobody, and breaks nothing.
    assert not talk.asked[0].answer.set_running_or_notify_cancel()


# The server.


def test_a_server_tells_where_it_is_serves_and_leaves_nothing_behind(talk, tmp_path):
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path)
    server.start()
    url = json.loads((tmp_path / SERVICE_FILE).read_text())["url"]
    assert url == server.url == f"http://127.0.0.1:{server.port}"
    assert httpx.get(f"{url}/healthz", timeout=10).json() == {"status": "ok"}
    server.stop()
    assert not (tmp_path / SERVICE_FILE).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz", timeout=1)
    HttpServer(talk.app, "127.0.0.1", server.port, tmp_path)._socket.close()


def test_the_token_is_for_the_owner_of_the_state_directory_alone(talk, tmp_path, caplog):
    (tmp_path / "service.tmp").write_text("left by a process that died")
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path, talk.control.token)
    with caplog.at_level(logging.DEBUG):
        server.start()
        try:
            file = tmp_path / SERVICE_FILE
            assert json.loads(file.read_text())["token"] == talk.control.token
            assert file.stat().st_mode & 0o777 == 0o600
            assert talk.control.token not in caplog.text
            running = Running.find(tmp_path)
            assert running.post("/api/v1/round/close")["outcome"] == "closed"
            assert talk.control.token not in repr(running)
            with pytest.raises(RefusedError, match="this needs the token"):
                Running(running.url, "wrong").post("/api/v1/round/close")
            with pytest.raises(RefusedError, match="there is no such run"):
                running.get("/api/v1/runs/none/versions")
        finally:
            server.stop()
    with pytest.raises(AwayError, match=rf"no coordinator is running in {tmp_path}"):
        Running.find(tmp_path)
    with pytest.raises(AwayError, match=rf"{running.url} does not answer: Connection refused"):
        running.get("/api/v1/status")


def test_a_server_that_is_stopped_at_once_leaves_nothing_behind_either(talk, tmp_path):
    server = HttpServer(talk.app, "127.0.0.1", 0, tmp_path)
    server.start()
    server.stop()
    assert not server._thread.is_alive()
    assert not (tmp_path / SERVICE_FILE).exists()


def test_a_port_that_is_taken_is_an_error_with_what_to_do(talk, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            HttpError, match=f"http://127.0.0.1:{port}: Address already in use; choose another with --http-port"
        ):
            HttpServer(talk.app, "127.0.0.1", port, tmp_path)


def test_an_address_that_is_not_this_machines_is_an_error(talk, tmp_path):
    with pytest.raises(HttpError, match=r"http://192.0.2.1:0: .*; choose another with"):
        HttpServer(talk.app, "192.0.2.1", 0, tmp_path)  # an address that documentation alone may use


def test_a_name_that_nobody_knows_is_an_error_that_says_so(talk, tmp_path, monkeypatch):
    def look_up(*_, **__) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_server", look_up)
    with pytest.raises(
        HttpError, match="http://nowhere:0: Name or service not known; choose another with --set http_host"
    ):
        HttpServer(talk.app, "nowhere", 0, tmp_path)


def test_an_address_of_version_6_stands_in_brackets(talk, tmp_path):
    try:
        server = HttpServer(talk.app, "::1", 0, tmp_path)
    except HttpError:
        pytest.skip("this machine has no IPv6")
    server._socket.close()
    assert server.url == f"http://[::1]:{server.port}"
