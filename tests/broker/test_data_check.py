"""An agent says what its data are, or what is wrong with them, before any coordinator asks: real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import psutil
import pytest

from midge.transport.brokers import free_port
from tests.broker.federation import PATIENCE_S, call, environment, wait_until

LABELLED = ["--task", "tests.unit.tiny_tasks:labelled", "--agent-id", "pi-1"]


@pytest.fixture
def alone(make_federation):
    """A federation whose broker is not there, and whose coordinator never comes."""
    return make_federation(f"mqtt://127.0.0.1:{free_port()}")


def test_an_agent_says_what_it_has_and_then_is_one_process_again(alone):
    agent = alone.start_agent(
        "agent-0",
        "--task",
        "tests.unit.tiny_tasks:labelled",
        part=2,
        partition="contiguous",
        check_data="true",
        worker_idle_s=0.2,
    )
    agent.wait_for_log("data checked")
    assert 'examples=20 labels="cat:6 dog:7 cow:7"' in agent.log()
    wait_until(lambda: not agent.children(), "the process that looked at the data is ended")
    assert agent.is_running
    assert agent.stop() == 0


def test_an_agent_of_one_class_is_warned(alone):
    agent = alone.start_agent("agent-0", "--task", "tests.broker.tasks:one_class", check_data="true")
    agent.wait_for_log("data of one class")
    assert "if that is not meant, look at data_dir, classes and partition" in agent.log()
    assert "labels=1:5" in agent.log()


def test_without_data_an_agent_says_so_stays_and_refuses_for_that_reason(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    fault = federation.control("agent-0") / "fault"
    fault.write_text("no-data")
    agent = federation.start_agent("agent-0", check_data="true")
    agent.wait_for_log("data cannot be used")
    assert f"no examples in {federation.control('agent-0')}: put some there" in agent.log()
    assert "Traceback" not in agent.log()
    federation.start_agent("agent-1", part=1)
    coordinator = federation.start_coordinator(rounds=1, cohort=2, min_agents=2, quorum=1)
    agent.wait_for_log("round refused")
    (line,) = [line for line in agent.log().splitlines() if "round refused" in line][:1]
    assert "reason=data" in line
    assert coordinator.wait() == 0
    assert agent.is_running


def test_data_that_come_later_are_found_without_a_restart(mosquitto, make_federation):
    federation = make_federation(mosquitto.url)
    fault = federation.control("agent-0") / "fault"
    fault.write_text("no-data")
    agent = federation.start_agent("agent-0", check_data="true")
    agent.wait_for_log("data cannot be used")
    fault.unlink()
    assert federation.start_coordinator(rounds=1, min_agents=1).wait() == 0
    assert [update.num_examples for update in federation.updates(1).values()] == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_check_under_way_ends_with_its_agent(alone, number):
    (alone.control("agent-0") / "fault").write_text("slow-data")
    agent = alone.start_agent("agent-0", check_data="true")
    children = wait_until(agent.children, "the data are being loaded")
    agent.send_signal(number)
    assert agent.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]


def test_the_check_can_be_turned_off(alone):
    agent = alone.start_agent("agent-0", check_data="false")
    agent.wait_for_log("broker lost")
    assert agent.children() == []
    assert agent.stop() == 0
    assert "data" not in agent.log()


def test_the_command_finds_a_task_in_the_directory_it_is_called_in_as_an_agent_does(tmp_path):
    (tmp_path / "here.py").write_text("from tests.unit.tiny_tasks import LabelledTask\n")
    program = "import sys; del sys.path[0]; from edge_agent.cli import main; main()"  # as the installed script has it
    arguments = ["data", "--task", "here:LabelledTask", "--agent-id", "pi-1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"60 examples" in done.stdout


def test_the_command_shows_data_as_a_program_too(tmp_path):
    done = call("edge_agent", "data", *LABELLED, "--partition", "iid", "--of", "2", "--plot", str(tmp_path / "x.png"))
    assert done.returncode == 0, done.stderr
    assert " all        60   20   20   20" in done.stdout
    assert (tmp_path / "x.png").stat().st_size > 1000
    done = call("edge_agent", "data", *LABELLED, "--json")
    assert json.loads(done.stdout)["parts"][0]["summary"]["num_examples"] == 60
