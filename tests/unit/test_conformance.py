"""The rules of strategies: all of ours hold to them, a user's can be checked, and a wrong one is told which it breaks."""

import functools
import re
from pathlib import Path

import pytest

from coordinator.config import load_settings, run_fingerprint
from coordinator.strategies import STRATEGIES, StrategyError, conformance, make_strategy
from coordinator.strategies.conformance import ConformanceError, check_strategy, main
from coordinator.strategies.registry import options_of
from midge.settings import SettingsError
from tests.unit import own_strategies
from tests.unit.own_strategies import WRONG, Clipped

OWN = "tests.unit.own_strategies:Clipped"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_built_in_strategy_conforms(name):
    check_strategy(functools.partial(make_strategy, name))


@pytest.mark.parametrize("weighting", ["uniform", "sum"])
@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_they_conform_with_other_weights_and_rates_too(name, weighting):
    check_strategy(functools.partial(make_strategy, name, server_learning_rate=0.3, weighting=weighting))


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_they_conform_when_they_clip_too(name):
    check_strategy(functools.partial(make_strategy, name, clip_to_median=1.0001))


def test_a_users_strategy_conforms():
    check_strategy(Clipped)


def test_the_example_of_the_page_conforms(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    (example,) = [
        part.partition("```")[0] for part in page.split("```python\n") if "class Clipped" in part.partition("```")[0]
    ]
    (tmp_path / "my_strategies.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    check_strategy(functools.partial(make_strategy, "my_strategies.py:Clipped", {"limit": 0.05}))


def test_the_page_has_every_strategy_with_its_options_and_defaults():
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    table = page.partition("## Which one")[2].partition("\n\n*")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .*? \| (.*?) \|", table, re.MULTILINE))
    del rows["strategy"]  # the head of the table
    assert list(rows) == list(STRATEGIES)
    for name, words in rows.items():
        shown = {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.]+)", words)}
        assert shown == options_of(make_strategy(name), {})


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_strategy_is_told_which_rule_it_breaks(wrong):
    with pytest.raises(ConformanceError, match=re.escape(WRONG[wrong])):
        check_strategy(wrong)


def test_every_rule_is_broken_by_some_wrong_strategy_but_those_that_aggregation_itself_keeps():
    kept = ("The order in which updates arrive", "Weights count relative to each other")
    for rule in conformance._RULES:
        assert any(text in rule.__doc__ for text in (*WRONG.values(), *kept)), rule.__doc__


def test_the_command_prints_a_line_for_each_rule(capsys):
    assert main([OWN, "limit=0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{OWN} conforms"
    assert main(["fedavg", "weighting=sum", "server_learning_rate=0.1"]) == 0
    assert main(["tests.unit.own_strategies:Ascends"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN Where all agents agree" in out
    assert "elements did: delta is local - global, to be added." in out
    assert out.splitlines()[-1] == "tests.unit.own_strategies:Ascends: 1 of 10 rules are broken"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["fedmagic"], ["fedavg", "limit"], [OWN, "limit=0"]])
def test_the_command_says_what_it_cannot_check(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


# A user's strategy in the configuration.


def test_a_strategy_is_named_by_its_module_and_class():
    strategy = make_strategy(OWN, {"limit": 0.5})
    assert strategy == Clipped(limit=0.5)
    assert strategy.name == "clipped"


def test_a_strategy_is_named_by_its_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(Path(own_strategies.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    strategy = make_strategy("mine.py:Clipped", {"limit": 0.5})
    assert repr(strategy) == "Clipped(limit=0.5)"
    assert type(make_strategy(f"{path}:Clipped")) is type(strategy)  # the same file is run once
    path.write_text(path.read_text().replace("limit: float = 0.1", "limit: float = 0.2"))
    assert repr(make_strategy("mine.py:Clipped")) == "Clipped(limit=0.2)"


def test_the_settings_take_a_users_strategy_and_its_options_define_the_run():
    settings = [
        load_settings(assignments=[f"strategy={OWN}", f"strategy_options=limit={limit}"]) for limit in (0.1, 0.2)
    ]
    default = load_settings(assignments=[f"strategy={OWN}"])
    assert run_fingerprint(settings[0]) == run_fingerprint(default) != run_fingerprint(settings[1])


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        (["strategy=tests.unit.own_strategies:Cliped"], "has no class 'Cliped'. Did you mean 'Clipped'?"),
        (
            ["strategy=tests.unit.no_such:Mine"],
            "no module 'tests.unit.no_such' is found: install it, name its directory",
        ),
        (["strategy=no/such.py:Mine"], "no/such.py: No such file or directory"),
        (["strategy=tests.unit.own_strategies:not_a_strategy"], "it gives a int: expected a subclass of"),
        ([f"strategy={OWN}", "strategy_options=limits=1"], "Did you mean 'limit'? Its options are limit"),
        ([f"strategy={OWN}", "strategy_options=limit=0"], "of clipped: limit is 0: expected a finite number above 0"),
        ([f"strategy={OWN}", "server_learning_rate=1"], "server_learning_rate is 1.0, and strategy"),
    ],
)
def test_what_is_wrong_with_a_users_strategy_is_said_at_the_start(assignments, problem):
    with pytest.raises(SettingsError) as caught:
        load_settings(assignments=assignments)
    assert problem in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_file_that_does_not_run_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import numpy\n1 / 0\n")
    with pytest.raises(StrategyError, match=r"running .*broken\.py failed: ZeroDivisionError: division by zero"):
        make_strategy(f"{tmp_path}/broken.py:Mine")
