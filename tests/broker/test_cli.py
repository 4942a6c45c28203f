"""The two commands as a person or a script uses them: exit codes, JSON, what is served over HTTP, help, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import time

import click
import psutil
import pytest
import torch
from safetensors.torch import load_file

from coordinator.cli import main as coordinator_main
from coordinator.watch import _Watcher
from edge_agent.cli import main as edge_agent_main
from midge.transport.brokers import free_port
from tests.broker.federation import call, call_json, wait_until

LINEAR = ["--task", "tests.broker.tasks:linear"]


@pytest.fixture
def look(capsys):
    """Call `coordinator` within this process, which takes a tenth of the time; its exit code, output and errors."""

    def call_main(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            coordinator_main(arguments, prog_name="coordinator")
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call_main


# Exit codes.


def test_a_run_prints_its_result_as_json_and_exits_with_0(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.start_agents(1)
    where = ["--broker", mosquitto.url, "--federation", "test", "--state-dir", str(federation.state_dir())]
    what = [*LINEAR, "--rounds", "2", "--min-agents", "1", "--http-port", "0", "--json"]
    done = call("coordinator", "run", *where, *what)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["run_id"], result["task"]) == (federation.run_id(), "tests.broker.tasks:linear")
    assert (result["state"], result["reason"]) == ("done", "")
    assert [version["round_num"] for version in result["history"]] == [0, 1, 2]
    assert [version["num_updates"] for version in result["history"]] == [0, 1, 1]


@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_fails_exits_with_1_and_says_why(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    coordinator = federation.start_coordinator(min_agents=2, start_deadline_s=0.3)
    assert coordinator.wait() == 1
    assert "failed: 0 of 2 agents came within 0.3 s; start more agents, or lower min_agents" in coordinator.log()
    run = federation.runs()[0]
    assert run["state"] == "failed"
    assert "Traceback" not in coordinator.log()


@pytest.mark.usefixtures("unmeasured")
def test_a_task_that_fails_only_when_it_is_imported_fails_the_run_and_says_why(mosquitto, make_federation, tmp_path):
    (tmp_path / "needy.py").write_text("import no_such_library\ntask = 1\n")
    federation = make_federation(mosquitto.url, task=f"{tmp_path}/needy.py")
    coordinator = federation.start_coordinator(min_agents=1)
    assert coordinator.wait() == 1
    assert "it imports 'no_such_library', which is not installed" in coordinator.log()
    assert "Traceback" not in coordinator.log()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "round=3"], ["--set round", "rounds"]),
        (["--set", "quorum=5", "--set", "cohort=3"], ["quorum is 5, above cohort (3): lower it, raise cohort"]),
        (["no-such-file.toml"], ["no-such-file.toml: ", "No such file"]),
        (["--broker", "http://127.0.0.1:1883"], ["broker", "mqtt://"]),
        (["--rounds", "0"], ["--rounds", "1"]),
        (["--no-such-option"], ["No such option"]),
        (["--task", "tests.broker.tasks:linaer"], ["tasks.py has no 'linaer'. Did you mean 'linear'?"]),
    ],
)
def test_wrong_use_exits_with_2_and_one_clear_line(arguments, words, tmp_path, look):
    status, _, said = look("run", "--state-dir", str(tmp_path / "state"), *arguments)
    assert status == 2
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not (tmp_path / "state").exists()


def test_wrong_use_of_an_agent_exits_with_2_too(tmp_path):
    done = call("edge_agent", "run", "--index", "3", "--of", "2", "--set", "treads=2", "--state-dir", str(tmp_path))
    assert done.returncode == 2
    assert "index is 3, and of is 2: expected 0 to 1" in done.stderr
    assert "treads" in done.stderr
    assert "threads" in done.stderr


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("digist", "task 'digist': not known. Did you mean 'digits'?"),
        ("./digist.py", "there is no file "),
        ("midge.tasks.digist:DigitsTask", "Did you mean 'midge.tasks.digits'?"),
    ],
)
def test_an_agent_whose_task_is_misspelt_ends_with_2_before_it_connects(task, said, tmp_path, capsys):
    arguments = ["run", "--task", task, "--state-dir", str(tmp_path / "state"), "--broker", "mqtt://127.0.0.1:1"]
    with pytest.raises(SystemExit) as ended:
        edge_agent_main(arguments, prog_name="edge-agent")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_an_http_port_that_is_taken_exits_with_2_and_names_another(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    first = federation.start_coordinator(min_agents=1)
    port = federation.http_url().rpartition(":")[2]
    second = federation.start_coordinator(state="second", http_port=port)
    assert second.wait() == 2
    assert f"http://127.0.0.1:{port}: Address already in use" in second.log()
    assert "choose another with --http-port, 0 for any free one" in second.log()
    assert first.is_running


# Looking into a state directory, beside a running coordinator and without one.


@pytest.fixture
def served(mosquitto, make_federation, tmp_path):
    """`coordinator serve --run` whose run of two rounds is done, and which stays up."""
    config = tmp_path / "experiment.toml"
    config.write_text('rounds = 2\nmin_agents = 2\nbest_metric = "loss"\nbest_mode = "min"\nlearning_rate = 0.02\n')
    federation = make_federation(mosquitto.url)
    federation.start_agents(2)
    program = federation.start_coordinator("serve", "--run", str(config))
    federation.wait_for_round(2)
    wait_until(lambda: federation.runs()[0]["state"] == "done", "the run is done")
    return federation, program


@pytest.mark.usefixtures("unmeasured")
def test_what_is_shown_beside_a_running_coordinator_is_shown_without_it_too(served, tmp_path, look):
    federation, program = served
    here = ["--state-dir", str(federation.state_dir()), "--json"]

    def shown(command: str):
        code, output, _ = look(command, *here)
        assert code == 0
        return json.loads(output)

    beside = {command: shown(command) for command in ("runs", "models")}
    assert call_json("coordinator", "runs", *here[:2]) == beside["runs"]
    status = shown("status")
    assert status["run_id"] == federation.run_id()
    assert (status["state"], status["is_connected"]) == ("done", True)
    assert [(agent["agent_id"], agent["presence"]) for agent in shown("agents")] == [
        ("agent-0", "online"),
        ("agent-1", "online"),
    ]
    (run,) = beside["runs"]
    assert {key: run[key] for key in ("run_id", "task", "state", "round_num")} == {
        "run_id": federation.run_id(),
        "task": "tests.broker.tasks:linear",
        "state": "done",
        "round_num": 2,
    }
    # Without test data a version is scored by the agents that train from it: the last one never is.
    losses = {model["round_num"]: model["federated"]["loss"] for model in beside["models"][:2]}
    assert beside["models"][2]["federated"] is None
    best = min(losses, key=losses.__getitem__)
    assert run["best"] == {"round_num": best, "value": losses[best]}
    assert [model["is_kept"] for model in beside["models"]] == [True, True, True]
    check_exports(federation, tmp_path, look, best)

    assert program.is_running
    assert program.stop() == 0
    assert {command: shown(command) for command in ("runs", "models")} == beside
    assert call_json("coordinator", "runs", *here[:2]) == beside["runs"]
    assert shown("status") == {"state": "stopped", "run": run}
    assert len(shown("agents")) == 2
    check_exports(federation, tmp_path, look, best)


def check_exports(federation, tmp_path, look, best: int) -> None:
    """Export by every name; all load into a plain torch model, and what does not exist is refused."""
    path = tmp_path / "model.safetensors"
    arguments = ["--to", str(path), "--state-dir", str(federation.state_dir())]
    for which, round_num in (("best", best), ("latest", 2), ("1", 1)):
        code, _, said = look("export", federation.run_id(), "--which", which, *arguments)
        assert code == 0
        assert f"wrote round {round_num} of {federation.run_id()} to {path}" in said
        model = torch.nn.Linear(4, 1)
        model.load_state_dict(load_file(path), strict=True)
        assert model.weight.tolist() == federation.model(round_num)["weight"].tolist()
        path.unlink()
    code, _, said = look("export", federation.run_id(), "--which", "3", *arguments)
    assert code == 2
    assert "--which 3: expected best, latest, or a round from 0 to 2" in said
    assert not path.exists()


def test_what_is_served_over_http_is_metrics_health_and_the_state(served):
    federation, _ = served
    assert federation.get("/healthz") == (200, '{"status":"ok"}')
    assert federation.get("/readyz") == (200, '{"status":"ready"}')
    run_id = federation.run_id()
    metrics = federation.get("/metrics")[1].splitlines()
    assert f'midge_rounds_total{{federation="test",outcome="committed",run="{run_id}"}} 2.0' in metrics
    assert [run["run_id"] for run in json.loads(federation.get("/api/v1/runs")[1])] == [run_id]
    versions = json.loads(federation.get(f"/api/v1/runs/{run_id}/versions")[1])
    assert [version["num_updates"] for version in versions] == [0, 2, 2]
    assert [agent["agent_id"] for agent in json.loads(federation.get("/api/v1/agents")[1])] == ["agent-0", "agent-1"]
    status, text = federation.get("/api/v1/runs/no-such-run/versions")
    assert status == 404
    assert "/api/v1/runs lists them" in text


@pytest.mark.parametrize("command", ["runs", "status", "agents", "models"])
def test_a_directory_that_no_coordinator_used_is_said_to_be_one(command, tmp_path, look):
    code, _, said = look(command, "--state-dir", str(tmp_path), "--json")
    assert code == 2
    assert "holds no midge.db: no coordinator has run there; check --state-dir" in said
    assert list(tmp_path.iterdir()) == []


# Watching.


@pytest.mark.usefixtures("unmeasured")
def test_a_watcher_waits_for_the_coordinator_follows_it_and_ends_with_the_run(mosquitto, make_federation, look):
    federation = make_federation(mosquitto.url)
    here = ["--state-dir", str(federation.state_dir())]
    code, _, said = look("watch", "--once", *here)
    assert (code, said) == (2, f"coordinator: no coordinator is running in {federation.state_dir()}\n")
    plain, scripted = (
        federation.start_watcher(name, *options) for name, options in (("plain", ()), ("json", ("--json",)))
    )
    plain.wait_for_log("waiting for one (Ctrl-C ends this)")
    scripted.wait_for_log("waiting for one")
    federation.hold("agent-0", training=1)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=3, min_agents=2)
    federation.wait_for_training("agent-0", 1)
    for watcher in (plain, scripted):
        watcher.wait_for_log(federation.run_id())
    federation.release("agent-0")
    assert (coordinator.wait(), plain.wait(), scripted.wait()) == (0, 0, 0)
    assert f"{federation.run_id()}  done: 3 rounds  after round 2: loss " in plain.log()
    boards = [json.loads(line) for line in scripted.log().splitlines() if line.startswith("{")]
    assert boards[-1]["state"] == "done"
    rounds = boards[-1]["agent_rounds"]
    assert {agent_id: [one["round_num"] for one in of] for agent_id, of in rounds.items()} == {
        "agent-0": [1, 2, 3],
        "agent-1": [1, 2, 3],
    }
    evaluation = federation.updates(2)["agent-1"].evaluation
    assert rounds["agent-1"][1]["evaluation"]["loss"] == evaluation.loss


@pytest.mark.usefixtures("unmeasured")
def test_a_watcher_that_missed_a_whole_run_says_how_it_ended(mosquitto, make_federation, capsys):
    federation = make_federation(mosquitto.url)
    watcher = _Watcher(federation.state_dir(), None, as_json=False)
    federation.start_agents(1)
    assert federation.start_coordinator(rounds=1, min_agents=1).wait() == 0
    assert watcher.follow() == 0
    assert f"{federation.run_id()}  done before it could be watched" in capsys.readouterr().err
    assert _Watcher(federation.state_dir(), None, as_json=False)._exit_code() is None


@pytest.mark.usefixtures("unmeasured")
def test_a_watcher_of_a_coordinator_that_was_killed_waits_and_exits_with_1_when_the_run_fails(
    mosquitto, make_federation
):
    federation = make_federation(mosquitto.url)
    coordinator = federation.start_coordinator(min_agents=1)
    watcher = federation.start_watcher("watcher")
    watcher.wait_for_log("waiting for agents: 0 of 1 are there")
    coordinator.kill()
    watcher.wait_for_log("does not answer: Connection refused; waiting for one")
    assert watcher.is_running
    assert federation.start_coordinator(min_agents=1, start_deadline_s=0.3).wait() == 1
    assert watcher.wait() == 1
    assert "Traceback" not in watcher.log()


@pytest.mark.usefixtures("unmeasured")
def test_ctrl_c_ends_a_watcher_and_nothing_else(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    coordinator = federation.start_coordinator(min_agents=1)
    watcher = federation.start_watcher("watcher")
    watcher.wait_for_log("waiting for agents")
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait() == 130
    assert "Traceback" not in watcher.log()
    assert coordinator.is_running


# Closing a round.


@pytest.mark.usefixtures("unmeasured")
def test_an_operator_closes_a_round_with_what_has_come(mosquitto, make_federation, look):
    federation = make_federation(mosquitto.url)
    here = ["--state-dir", str(federation.state_dir())]
    federation.hold("agent-1", training=1)
    federation.start_agents(2)
    coordinator = federation.start_coordinator(rounds=2, min_agents=2, quorum=1)
    federation.wait_for_update("agent-0", 1)
    federation.wait_for_training("agent-1", 1)
    code, said, _ = look("round", "close", *here)
    assert (code, said) == (0, "closed round 1 with 1 update\n")
    federation.wait_for_round(1)
    assert federation.versions()[1]["num_updates"] == 1
    federation.release("agent-1")
    assert coordinator.wait() == 0
    assert federation.versions()[2]["num_updates"] == 2
    code, _, error = look("round", "close", *here)
    assert (code, error) == (2, f"coordinator: no coordinator is running in {federation.state_dir()}\n")


@pytest.mark.usefixtures("unmeasured")
def test_below_the_quorum_a_closed_round_is_tried_again_and_the_operator_is_told_why(mosquitto, make_federation, look):
    federation = make_federation(mosquitto.url)
    here = ["--state-dir", str(federation.state_dir())]
    federation.hold("agent-0", training=1)
    federation.start_agents(1)
    coordinator = federation.start_coordinator(rounds=1, min_agents=1)
    federation.wait_for_training("agent-0", 1)
    code, said, _ = look("round", "close", *here, "--json")
    closed = json.loads(said)
    assert (code, closed["outcome"], closed["round_num"]) == (1, "abandoned", 1)
    assert "0 updates, quorum is 1, when the operator closed it: agent-0 took the invitation; " in closed["text"]
    federation.release("agent-0")
    assert coordinator.wait() == 0
    assert federation.attempts(1)[0] == 2


# Help.


def commands_of(group: click.Group) -> list[tuple[str, click.Command]]:
    return [(name, command) for name, command in sorted(group.commands.items())]


@pytest.mark.parametrize("group", [coordinator_main, edge_agent_main], ids=["coordinator", "edge-agent"])
def test_every_command_and_option_has_help_and_every_command_an_example(group):
    assert group.help
    assert len(commands_of(group)) > 1
    for name, command in commands_of(group):
        assert command.help, name
        assert "Examples:" in command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


# The doctor.


def test_the_doctor_finds_an_agent_well_and_exits_with_0(mosquitto, tmp_path):
    arguments = ["--broker", mosquitto.url, "--agent-id", "pi-3", *LINEAR, "--state-dir", str(tmp_path)]
    done = call("edge_agent", "doctor", *arguments)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert any("connected, MQTT 5" in line for line in lines)
    assert any("tests.broker.tasks:linear: 4 examples" in line for line in lines)


@pytest.mark.usefixtures("unmeasured")
def test_the_doctor_without_a_broker_exits_with_1_and_says_what_to_do(tmp_path):
    port = free_port()
    arguments = ["--broker", f"mqtt://127.0.0.1:{port}", "--agent-id", "pi-3", *LINEAR, "--timeout-s", "3"]
    done = call("edge_agent", "doctor", *arguments, "--state-dir", str(tmp_path))
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert f"mqtt://127.0.0.1:{port}" in line
    assert line.endswith("nothing listens there: is the broker running?")


# Ctrl-C.


def test_ctrl_c_ends_coordinator_and_agent_and_leaves_no_process(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    federation.hold("agent-0", training=1)
    (agent,) = federation.start_agents(1)
    coordinator = federation.start_coordinator(min_agents=1)
    federation.wait_for_training("agent-0", 1)
    children = {program.name: program.children() for program in (coordinator, agent)}
    assert len(children["agent-0"]) == len(children["coordinator"]) == 1
    for program in (coordinator, agent):
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        assert program.wait() == 0
        assert time.monotonic() - began < 5
        assert not psutil.wait_procs(children[program.name], timeout=5)[1]
        assert "Traceback" not in program.log()
    assert "agent stopped" in agent.log()
    assert "goes on when it is started again" in coordinator.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_coordinator_that_waits_for_its_broker_ends_when_asked(number, make_federation):
    federation = make_federation(f"mqtt://127.0.0.1:{free_port()}")
    coordinator = federation.start_coordinator(min_agents=1)
    coordinator.wait_for_log("broker lost")
    coordinator.send_signal(number)
    assert coordinator.wait() == 0
    assert "Traceback" not in coordinator.log()
