"""`coordinator new`: the project that it writes passes its own test, and trains as its README says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from coordinator.models import ModelStore
from coordinator.store import Store
from tests.broker.federation import Program, call, environment

pytestmark = pytest.mark.usefixtures("unmeasured")

SLOW_S = 240.0
"""Three processes import torch, perhaps on one core."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("projects") / "flowers"
    done = call("coordinator", "new", "flowers", "--dir", str(directory))
    assert done.returncode == 0, done.stderr
    assert f"next: cd {directory} && python -m pytest" in done.stderr
    return directory


def commands(project) -> list[list[str]]:
    """The calls of our programs in the first block of the README, in order."""
    block = re.search(r"^```\n(.*?)^```", (project / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line.partition("#")[0].strip() for line in block[1].splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("coordinator", "edge-agent"))]


def test_its_own_test_passes(project):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SLOW_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_it_trains_as_its_readme_says(project, mosquitto, tmp_path):
    (_, *of_coordinator), *agents = commands(project)
    assert of_coordinator == ["run", "midge.toml"]
    assert len(agents) == 2
    here = ["--broker", mosquitto.url, "--state-dir"]
    programs = []
    try:
        for number, (_, *of_agent) in enumerate(agents):
            arguments = [*of_agent, *here, str(tmp_path / "agents")]
            programs.append(Program(f"agent-{number}", "edge_agent", arguments, tmp_path, cwd=project))
        arguments = [*of_coordinator, *here, str(tmp_path / "state"), "--rounds", "2", "--http-port", "0"]
        programs.append(Program("coordinator", "coordinator", arguments, tmp_path, cwd=project))
        assert programs[-1].wait(SLOW_S) == 0, programs[-1].log()
    finally:
        for program in programs:
            program.end()

    store = Store(tmp_path / "state", read_only=True)
    (run,) = store.runs()
    versions = store.versions(run["run_id"])
    store.close()
    assert (run["state"], run["task"], run["federation"]) == ("done", "flowers.py", "flowers")
    assert [version["num_updates"] for version in versions] == [0, 2, 2]
    assert [version["num_examples"] for version in versions[1:]] == [1437, 1437]  # each example is one agent's
    accuracies = [version["central"].metrics["accuracy"] for version in versions]
    assert accuracies[0] < 0.3, accuracies  # of ten digits; 0.1 and 0.9 when this was written
    assert accuracies[2] > 0.7, accuracies
    with ModelStore(tmp_path / "state" / "models").open(versions[2]["digest"]) as model:
        assert model.state()["7.weight"].shape == (10, 64)
