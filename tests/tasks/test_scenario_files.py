"""The files of scenarios 2 to 4 are what their pages say, and the table of scenario 2 is made by its script."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from coordinator.config import load_settings

pytest.importorskip("torch")

from benchmarks.rounds_to_target import KNOBS, SPLITS, cell, rounds_to

ROOT = Path(__file__).parents[2]
TWO_OWNERS = ROOT / "examples" / "mnist_two_owners"
PAGE = (ROOT / "docs" / "scenarios" / "2-mnist-two-owners.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")


def test_fedavg_and_fedsgd_are_the_same_keys_with_other_values():
    fedavg, fedsgd = (tomllib.loads((TWO_OWNERS / name).read_text()) for name in ("fedavg.toml", "fedsgd.toml"))
    assert list(fedavg) == list(fedsgd)
    assert {key for key in fedavg if fedavg[key] != fedsgd[key]} == {
        "rounds",
        "batch_size",
        "learning_rate",
        "momentum",
    }
    settings = load_settings(file=TWO_OWNERS / "fedavg.toml")
    assert (settings.local_epochs, settings.batch_size, settings.learning_rate, settings.momentum) == (1, 64, 0.01, 0.5)
    assert (settings.strategy, settings.weighting) == ("fedavg", "examples")
    assert load_settings(file=TWO_OWNERS / "fedsgd.toml").batch_size == 0


def test_the_originals_file_of_scenario_3_is_read():
    settings = load_settings(file=ROOT / "examples" / "cifar10_resnet18" / "conf.json")
    assert (settings.task, settings.start_agents, settings.cohort, settings.weighting) == ("cifar10", 10, 6, "sum")


@pytest.mark.no_cover
def test_more_local_work_takes_fewer_rounds_and_fedsgd_does_not_see_the_split():
    alike, apart = SPLITS.values()
    target, seed, limit = 0.80, 1, 200
    fedsgd = rounds_to(target, alike, 1, 0, seed, limit)
    assert fedsgd == rounds_to(target, apart, 1, 0, seed, limit)
    assert rounds_to(target, alike, 1, 10, seed, limit) < rounds_to(target, alike, 5, 0, seed, limit) < fedsgd <= limit
    assert rounds_to(target, alike, 1, 10, seed, limit) < rounds_to(target, apart, 1, 10, seed, limit)
    assert rounds_to(1.01, alike, 1, 10, seed, 2) == 3  # a target that nothing reaches


def test_the_page_has_a_row_for_each_of_the_scripts_knobs():
    rows = re.findall(r"^\| (\d+) \| (\d+|all) \| \d+ \| ", PAGE, re.MULTILINE)
    assert rows == [(str(epochs), str(size or "all")) for epochs, size in KNOBS]
    assert f"| 1 | 50 | 15 | {cell([12, 11, 14], 1000)} |" in PAGE
    assert cell([7, 1001, 1001], 1000) == "above 1000"
    assert cell([3, 3, 3], 1000) == "3"


TUTORIAL = str(ROOT / "examples" / "flower_tutorial" / "tutorial.py")


def broken_torchvision(tmp_path, monkeypatch):
    """As one that was built for another torch: it is found, and raises while it is imported."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))


def absent_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)


@pytest.mark.parametrize(
    ("take", "words"),
    [
        (broken_torchvision, "torchvision is installed and does not load (operator torchvision::nms does not exist)"),
        (absent_torchvision, "import of torchvision halted; None in sys.modules"),
    ],
)
def test_digits_stand_in_where_torchvision_does_not_load_and_that_is_said(take, words, tmp_path, monkeypatch, capsys):
    take(tmp_path, monkeypatch)
    trainloader, testloader = runpy.run_path(TUTORIAL)["load_data"](str(tmp_path / "cifar"))
    assert (len(trainloader.dataset), len(testloader.dataset)) == (1437, 360)
    assert capsys.readouterr().out == f"digits stand in for the CIFAR-10 of {tmp_path / 'cifar'}: {words}\n"
