"""A comparison without processes: its plan, its budget, its directory, its summary and its page."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from coordinator.cli import main
from coordinator.experiment import compare
from coordinator.experiment.attendance import Attendance
from coordinator.experiment.baselines import Surveyed
from coordinator.experiment.budget import counted_steps, expected_steps, fedsgd_rounds, steps_a_round
from coordinator.experiment.compare_page import page
from coordinator.experiment.compare_plan import CompareSettings, load_plan
from coordinator.experiment.compare_runner import units_of
from coordinator.experiment.compare_screen import LiveScreen, PlainScreen
from coordinator.experiment.compare_store import CompareStore, Unit, UnitResult
from coordinator.experiment.compare_style import is_logarithmic, ticks
from coordinator.experiment.compare_summary import Stat, headline, shown, stat, summarize
from coordinator.experiment.compare_tables import table, write_csv
from coordinator.experiment.federation import ExperimentError
from coordinator.experiment.holding import Holding
from coordinator.experiment.scores import Assessed, Held, LabelScore, RoundScore, Score
from coordinator.run_events import AcceptedUpdate
from midge.settings import markdown

ROOT = Path(__file__).parents[2]


def plan_of(tmp_path, *, options=None, config=None, broker=None, assignments=(), **compare):
    file = None
    if config is not None:
        file = tmp_path / "experiment.toml"
        file.write_text(config)
    return load_plan(
        file, options=options or {}, compare=compare, assignments=assignments, broker=broker, out=tmp_path / "out"
    )


def complaint_of(tmp_path, **changes) -> str:
    with pytest.raises(ExperimentError) as caught:
        plan_of(tmp_path, **changes)
    assert caught.value.status == 2
    return str(caught.value)


# The plan.


def test_without_a_word_three_agents_hold_a_third_each(tmp_path):
    plan = plan_of(tmp_path)
    assert plan.arms == ("federated", "centralized", "alone:agent-1", "local-average")
    assert list(plan.seeds) == [0, 1, 2]
    assert plan.holdings == {
        f"agent-{number}": Holding(partition="iid", index=number - 1, of=3) for number in (1, 2, 3)
    }
    assert plan.central == Holding()
    assert plan.agents_a_round == 3
    settings = plan.settings
    assert (settings.min_agents, settings.start_agents, settings.over_select, settings.needed_updates) == (3, 3, 1.0, 3)


def test_the_table_is_read_from_the_file_and_options_win(tmp_path):
    config = (
        'seed = 7\nrounds = 5\n[compare]\nagents = 4\npartition = "shards:2"\nseeds = 2\narms = ["alone", "fedsgd"]\n'
    )
    plan = plan_of(tmp_path, config=config, seeds=4)
    assert list(plan.seeds) == [7, 8, 9, 10]
    assert plan.arms == ("alone:agent-1", "fedsgd")
    assert plan.holdings["agent-4"] == Holding(partition="shards:2", index=3, of=4)


def test_classes_count_the_agents_and_there_is_no_partition_then(tmp_path):
    plan = plan_of(tmp_path, classes=[[1, 2], [3]], def_prob=0.1)
    assert plan.holdings == {
        "agent-1": Holding(classes=(1, 2), def_prob=0.1),
        "agent-2": Holding(classes=(3,), def_prob=0.1),
    }


def test_a_table_an_agent_wins_over_what_all_have(tmp_path):
    config = """
        [compare]
        data_dir = "all"
        sel_prob = 0.5
        [[compare.agent]]
        data_dir = "kitchen"
        [[compare.agent]]
        data_dir = "cellar"
        sel_prob = 1
        [compare.centralized]
        def_prob = 1
    """
    plan = plan_of(tmp_path, config=config)
    assert plan.holdings == {
        "agent-1": Holding(data_dir="kitchen", sel_prob=0.5),
        "agent-2": Holding(data_dir="cellar", sel_prob=1.0),
    }
    assert plan.central == Holding(data_dir="all", def_prob=1.0)


def test_agents_and_their_data_are_those_of_the_run_where_the_table_says_nothing(tmp_path):
    config = 'start_agents = 4\ncohort = 2\ndata_dir = "mnist"\ndownload = true\n'
    plan = plan_of(tmp_path, config=config, partition="contiguous")
    assert plan.test == plan.central == Holding(data_dir="mnist", download=True)
    assert plan.holdings["agent-4"] == Holding(data_dir="mnist", download=True, partition="contiguous", index=3, of=4)
    assert (plan.agents_a_round, plan.settings.min_agents, plan.settings.start_agents) == (2, 2, 4)
    assert plan_of(tmp_path, data_dir="mine").test == Holding(data_dir="mine")


def test_the_file_of_the_original_is_compared_as_it_is_and_with_any_cohort(tmp_path):
    file = ROOT / "examples" / "cifar10_resnet18" / "conf.json"

    def plan(*assignments, **compare):
        return load_plan(
            file, options={"task": "digits"}, compare=compare, assignments=assignments, broker=None, out=tmp_path
        )

    given = plan(partition="contiguous")
    assert given.settings.task == "digits"
    assert (len(given.agents), given.agents_a_round, given.settings.min_agents) == (10, 6, 6)
    assert given.holdings["agent-10"] == Holding(partition="contiguous", index=9, of=10)
    assert (given.training.local_epochs, given.training.batch_size, given.training.momentum) == (3, 32, 0.0001)
    assert (given.settings.weighting, given.settings.server_learning_rate) == ("sum", 0.1)
    # As its k is both, a smaller cohort would be one below min_agents, which means nothing here.
    assert plan("cohort=3").settings.min_agents == 3
    alone = plan("cohort=1", agents=1)
    assert (len(alone.agents), alone.agents_a_round, alone.settings.needed_updates) == (1, 1, 1)


def test_agents_that_are_visited_in_turn_are_one_a_round(tmp_path):
    plan = plan_of(tmp_path, assignments=["strategy=cyclic"])
    assert plan.agents_a_round == 1
    assert plan.federated_settings("fedsgd", 0, 5).strategy == "fedavg"


def test_on_a_broker_of_somebody_else_agents_have_other_names(tmp_path):
    assert list(plan_of(tmp_path, broker="mqtt://host", agents=1).holdings) == ["compare-agent-1"]
    assert list(plan_of(tmp_path, broker="embedded", agents=1).holdings) == ["agent-1"]


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    config = "rounds = 0\n[compare]\nseed = 3\nseeds = 0\n"
    lines = complaint_of(tmp_path, config=config).splitlines()
    assert lines == [
        "experiment.toml, line 1: rounds is 0: expected a whole number, 1 to 1000000",
        "experiment.toml, [compare]: unknown setting seed: did you mean seeds?",
        "experiment.toml, [compare]: seeds is 0: expected a whole number, 1 to 100",
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('base_model = "mine"', "every arm begins with the task's own first model, leave it out"),
        ("compare = 3", "compare is 3: expected a table, [compare]"),
        (
            "[[compare.agent]]\ncolour = 3",
            "[[compare.agent]] number 1: Object contains unknown field `colour`; its keys are",
        ),
        (
            "[compare]\nclasses = [[1], [2]]\n[[compare.agent]]\n",
            "classes is of 2 agents, and there are 1 [[compare.agent]]",
        ),
        ("[compare]\nclasses = [[1], [2]]\nagents = 4", "classes is of 2 agents, and agents is 4"),
        ('[compare]\narms = ["federated:1"]', "arm 'federated:1': expected any of"),
        (
            '[[compare.agent]]\ndata_dir = "a"\n[[compare.agent]]\ndata_dir = "b"',
            "each agent has a data_dir of its own: say with [compare.centralized] where all data lie",
        ),
    ],
)
def test_a_wrong_table_is_refused_with_what_to_do(tmp_path, config, words):
    assert words in complaint_of(tmp_path, config=config)


def test_fedsgd_is_plain_averaging_of_one_step_over_all_data(tmp_path):
    plan = plan_of(tmp_path, assignments=["momentum=0.9", "server_learning_rate=2"], fedsgd_learning_rate=0.5)
    settings = plan.federated_settings("fedsgd", 4, 70)
    assert (settings.local_epochs, settings.batch_size, settings.rounds, settings.seed) == (1, 0, 70, 4)
    assert (settings.learning_rate, settings.momentum, settings.strategy) == (0.5, 0.0, "fedavg")
    assert settings.server_learning_rate == type(settings)().server_learning_rate
    federated = plan.federated_settings("federated", 5, 70)
    assert (federated.momentum, federated.server_learning_rate, federated.seed) == (0.9, 2.0, 5)


def test_the_units_of_a_seed_begin_with_the_federation_and_no_agent_trains_twice(tmp_path):
    plan = plan_of(tmp_path, arms="local-average,alone:agent-2,federated,centralized", agents=2, seeds=1)
    assert [unit.name for unit in units_of(plan)] == [
        "federated-seed-0",
        "centralized-seed-0",
        "alone-agent-1-seed-0",
        "alone-agent-2-seed-0",
    ]


def test_a_holding_is_told_to_an_agent_in_its_own_words():
    holding = Holding(classes=(1, 2), def_prob=0.05, data_seed=3)
    assert holding.assignments() == ["classes=1,2", "def_prob=0.05", "data_seed=3"]
    assert holding.spec().classes == (1, 2)
    assert holding.words() == "1,2 and 5% of the others"
    assert Holding(partition="iid", index=1, of=3, data_dir="x").words() == "part 2 of 3 by iid, from x"
    assert Holding().words() == "all data"


# The budget.


def held(*sizes):
    return {f"agent-{number}": Held(num_examples=size, by_label={}) for number, size in enumerate(sizes, 1)}


def test_steps_are_batches_times_passes():
    assert steps_a_round(held(10, 11, 3), local_epochs=2, batch_size=10) == {"agent-1": 2, "agent-2": 4, "agent-3": 2}
    assert steps_a_round(held(10, 11), local_epochs=2, batch_size=0) == {"agent-1": 2, "agent-2": 2}
    assert counted_steps({"agent-1": 10, "agent-3": 3}, local_epochs=2, batch_size=10) == 4


def test_expected_steps_add_up_to_the_mean_over_draws():
    steps = {"agent-1": 2, "agent-2": 4, "agent-3": 1}
    assert expected_steps(steps, rounds=3, agents_a_round=3) == (7, 7, 7)
    assert expected_steps(steps, rounds=3, agents_a_round=2) == (4, 5, 5)  # 14/3 a round: 4.67, 9.33, 14


def test_fedsgd_has_as_many_rounds_as_steps_but_for_its_bound():
    assert fedsgd_rounds((7, 7, 7), agents_a_round=3, most=500) == 7
    assert fedsgd_rounds((7, 7, 7), agents_a_round=3, most=5) == 5
    assert fedsgd_rounds((1,), agents_a_round=3, most=5) == 1


class UpdatesOfRounds:
    """Stands for the database."""

    def __init__(self, **rounds):
        self.rounds = rounds

    def updates(self, run_id, round_num):
        sizes = self.rounds.get(f"r{round_num}", {})
        return [AcceptedUpdate(name, 1, "0" * 64, size, (), 0.0) for name, size in sizes.items()]


def test_attendance_is_noted_once_and_outlives_a_kill_in_the_midst_of_a_line(tmp_path):
    path = tmp_path / "attendance.jsonl"
    store = UpdatesOfRounds(r1={"agent-1": 3}, r2={"agent-1": 3, "agent-2": 4})
    Attendance(path).note(store, "run", 2)
    path.write_bytes(path.read_bytes() + b'{"round_num": 3, "num_ex')
    again = Attendance(path)
    assert again.rounds == {1: {"agent-1": 3}, 2: {"agent-1": 3, "agent-2": 4}}
    again.note(UpdatesOfRounds(r3={"agent-2": 4}), "run", 3)
    assert Attendance(path).rounds[3] == {"agent-2": 4}
    again.clear()
    assert Attendance(path).rounds == {}


# The directory.


def test_a_directory_takes_more_arms_and_seeds_and_refuses_all_else(tmp_path):
    with CompareStore(plan_of(tmp_path), own_broker=True) as store:
        federation = store.federation
    with CompareStore(plan_of(tmp_path, seeds=5, arms="fedsgd"), own_broker=True) as store:
        assert store.federation == federation
    changed = plan_of(tmp_path, agents=2, options={"rounds": 31}, assignments=["learning_rate=0.2"])
    with pytest.raises(ExperimentError) as caught, CompareStore(changed, own_broker=False):
        pass
    assert caught.value.status == 2
    text = str(caught.value)
    assert "\n  rounds: 30 there, 31 here\n" in text
    assert "\n  learning_rate: 0.1 there, 0.2 here\n" in text
    assert "\n  agent-1 to agent-2.of: 3 there, 2 here\n" in text
    assert "\n  agent-3: one there, none here\n" in text
    assert "broker: it ran over one of its own" in text
    assert "choose another directory with --out" in text


def test_what_differs_is_named_down_to_the_value(tmp_path):
    first = plan_of(tmp_path, partition="dirichlet:0.3")
    with CompareStore(first, own_broker=True):
        pass
    changed = plan_of(
        tmp_path,
        partition="dirichlet:0.5",
        data_dir="x",
        assignments=["task_options=width=8"],
        options={"task": "mnist"},
    )
    with pytest.raises(ExperimentError) as caught, CompareStore(changed, own_broker=True):
        pass
    assert str(caught.value).splitlines()[1:-1] == [
        "  task: digits there, mnist here",
        "  task_options.width: nothing there, 8 here",
        "  centralized.data_dir: nothing there, x here",
        "  test.data_dir: nothing there, x here",
        "  agent-1 to agent-3.data_dir: nothing there, x here",
        "  agent-1 to agent-3.partition: dirichlet:0.3 there, dirichlet:0.5 here",
    ]


def test_whether_data_may_be_downloaded_makes_no_other_comparison(tmp_path):
    with CompareStore(plan_of(tmp_path), own_broker=True) as store:
        federation = store.federation
    with CompareStore(plan_of(tmp_path, options={"download": True}), own_broker=True) as store:
        assert store.federation == federation


def test_a_start_that_fails_before_anything_is_done_leaves_no_directory(tmp_path):
    plan = plan_of(tmp_path)
    with pytest.raises(ExperimentError), CompareStore(plan, own_broker=True):
        raise ExperimentError("no data")
    assert not plan.out.exists()
    with CompareStore(plan, own_broker=True) as store:
        store.save(unit_result(Unit(kind="federated", seed=3), [0.1, 0.9]))
    with pytest.raises(ExperimentError), CompareStore(plan, own_broker=True):
        raise ExperimentError("the second unit failed")
    assert {path.name for path in plan.out.iterdir()} == {"lock", "plan.json", "results", "work"}
    empty = plan_of(tmp_path / "there")
    empty.out.mkdir(parents=True)
    with pytest.raises(ExperimentError), CompareStore(empty, own_broker=True):
        raise ExperimentError("no data")
    assert empty.out.exists()


def test_the_advice_to_download_can_be_taken_at_the_command_line(monkeypatch):
    seen = {}
    monkeypatch.setattr(compare, "run", lambda config, **given: seen.update(given) or 0)
    done = CliRunner().invoke(main, ["compare", "--task", "mnist", "--download", "--data-dir", "here"])
    assert done.exit_code == 0, done.output
    assert seen["options"] == {"task": "mnist", "rounds": None, "seed": None, "download": True}
    assert seen["compare"]["data_dir"] == "here"


def test_only_one_comparison_at_a_time_has_a_directory(tmp_path):
    plan = plan_of(tmp_path)
    with CompareStore(plan, own_broker=True), pytest.raises(ExperimentError, match="another comparison is running"):
        CompareStore(plan, own_broker=True).__enter__()
    with CompareStore(plan, own_broker=True):
        pass


def test_a_result_is_there_whole_or_not_at_all(tmp_path):
    result = unit_result(Unit(kind="federated", seed=3), [0.1, 0.9])
    with CompareStore(plan_of(tmp_path), own_broker=True) as store:
        assert store.result(result.unit) is None
        store.save(result)
        assert store.result(result.unit) == result
        (path,) = (tmp_path / "out" / "results").iterdir()  # and nothing besides
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ExperimentError, match=r"federated-seed-3\.json: .*remove it"):
            store.result(result.unit)


# What came of it.


def unit_result(unit, accuracies, *, num_steps=4, agents=("agent-1", "agent-2"), has_accuracy=True):
    rounds = [
        RoundScore(
            round=number,
            loss=1 - accuracy,
            accuracy=accuracy if has_accuracy else None,
            num_steps=num_steps if number else 0,
            duration_s=0.5,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    last = accuracies[-1]
    score = Score(num_examples=10, loss=1 - last, accuracy=last if has_accuracy else None)
    tested = Assessed(
        score=score,
        by_label={"0": LabelScore(num_examples=5, accuracy=last), "1": LabelScore(num_examples=5, accuracy=last)}
        if has_accuracy
        else {},
        by_agent=dict.fromkeys((unit.agent,) if unit.agent else agents, score),
    )
    return UnitResult(
        unit=unit,
        rounds=rounds,
        tested=tested,
        steps=(num_steps,) * (len(accuracies) - 1),
        versions={"midge": "0.1.0"},
        finished_at="2026-01-02T03:04:05+00:00",
    )


def comparison_of(tmp_path, *, has_accuracy=True, **changes):
    """Two rounds of two agents with 10 examples each: four steps a round together."""
    arms = "federated,centralized,alone,local-average,fedsgd"
    changes = {"seeds": 2, "agents": 2, "arms": arms, "fedsgd_rounds": 3} | changes
    plan = plan_of(tmp_path, options={"rounds": 2}, assignments=["local_epochs=2"], **changes)
    ends = {
        "federated": ([0.1, 0.6, 0.8], [0.2, 0.7, 0.9]),
        "centralized": ([0.1, 0.9, 0.94], [0.2, 0.9, 0.96]),
        "fedsgd": ([0.1, 0.2, 0.2, 0.3], [0.2, 0.2, 0.2, 0.3]),
        "agent-1": ([0.1, 0.3, 0.4], [0.2, 0.3, 0.4]),
        "agent-2": ([0.1, 0.3, 0.6], [0.2, 0.3, 0.8]),
    }
    steps = {"fedsgd": 2, "agent-1": 2, "agent-2": 2}
    results = [
        unit_result(
            unit,
            ends[unit.agent or unit.kind][unit.seed],
            num_steps=steps.get(unit.agent or unit.kind, 4),
            has_accuracy=has_accuracy,
        )
        for unit in units_of(plan)
    ]
    survey = Surveyed(
        agents={name: Held(num_examples=10, by_label={"0": 10}) for name in ("agent-1", "agent-2")},
        central=Held(num_examples=20, by_label={"0": 10, "1": 10}),
        test=Held(num_examples=10, by_label={"0": 5, "1": 5} if has_accuracy else {}),
        counts_steps=True,
        versions={"python": "3", "midge": "0.1.0"},
    )
    return summarize(plan, survey, results), results


def test_means_and_spreads_are_over_the_seeds(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    arms = {arm.arm: arm for arm in comparison.arms}
    assert arms["federated"].accuracy == stat([0.8, 0.9])
    assert arms["federated"].accuracy.spread == pytest.approx(0.0707107, abs=1e-6)  # sqrt(2 * 0.05^2 / (2 - 1))
    assert arms["alone:agent-1"].accuracy.mean == pytest.approx(0.4)
    assert arms["local-average"].accuracy.values == pytest.approx((0.5, 0.6))  # (0.4 + 0.6) / 2, (0.4 + 0.8) / 2
    assert [agent.alone.mean for agent in comparison.agents] == pytest.approx([0.4, 0.7])
    assert arms["local-average"].by_agent.keys() == {"agent-1", "agent-2"}
    assert arms["alone:agent-1"].by_agent.keys() == {"agent-1"}
    assert stat([0.5]) == Stat(mean=0.5, spread=None, values=(0.5,))


def test_positions_are_shares_of_the_budget_as_rounds_of_the_federation(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    assert comparison.budget == 8  # two agents, two passes of one batch, two rounds
    arms = {arm.arm: arm for arm in comparison.arms}
    for name in ("federated", "centralized", "alone:agent-1", "local-average"):
        assert [one.position for one in arms[name].by_round] == [0, 1, 2], name
    assert [arm.num_steps for arm in comparison.arms] == [8, 8, 4, 8, 6]
    # FedSGD made 2 of the 8 steps in each of its three rounds, and was stopped by its bound.
    assert [one.position for one in arms["fedsgd"].by_round] == [0, 0.5, 1.0, 1.5]
    assert arms["fedsgd"].budget == 8
    # Two rounds of two passes; 8 steps of which two batches are a pass over all; one pass a round.
    assert {name: arm.passes for name, arm in arms.items()} == {
        "federated": 4,
        "centralized": 4,
        "alone:agent-1": 4,
        "local-average": 4,
        "fedsgd": 3,
    }


def test_the_headline_says_what_was_gained_and_what_it_cost(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    assert headline(comparison) == (
        "Together: 85.0 ± 7.1 %; +30.0 points over an agent alone, on average, +45.0 points over agent-1 alone, "
        "-10.0 points against all data in one place."
    )
    comparison, _ = comparison_of(tmp_path, arms="alone")
    assert headline(comparison) == ""


def test_numbers_are_shown_with_as_many_digits_as_they_need():
    assert shown(stat([0.5]), "accuracy") == "50.0 %"
    assert shown(stat([1.5, 1.6]), "loss") == "1.550 ± 0.071"
    assert shown(stat([0.000213, 0.000215]), "loss") == "0.000214 ± 0.000001"
    assert shown(stat([0.0]), "loss") == "0.000"
    assert shown(None, "loss") == ""


class Reader(HTMLParser):
    """What a page consists of; complains of tags that do not match."""

    VOID = ("meta", "line", "rect", "polygon", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.widths = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "table":
            self.widths.append([])
        elif tag == "tr":
            self.widths[-1].append(0)
        elif tag in ("td", "th"):
            self.widths[-1][-1] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.widths
    assert all(len(set(rows)) == 1 for rows in reader.widths), f"rows of a table differ in cells: {reader.widths}"
    return reader


def test_the_page_is_whole_by_itself_and_says_everything(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    text = page(comparison)
    reader = read(text)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not [each for each in reader.attributes if each[1] in ("src", "href")]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    words = " ".join(" ".join(reader.text).split())
    for expected in (
        "85.0 ± 7.1 %",
        "6 of 8",
        "seeds (0 to 1)",
        "2026-01-02 03:04 UTC",
        "python 3",
        "fedsgd_rounds",
        "8 steps",
    ):
        assert expected in words, expected
    assert reader.tags.count("table") == reader.tags.count("caption") == 4
    scopes = [value for tag, name, value in reader.attributes if tag == "th" and name == "scope"]
    assert len(scopes) == reader.tags.count("th")


def test_what_comes_from_a_task_cannot_become_markup(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    evil = "<script>alert(1)</script>&"
    text = page(
        msgspec.structs.replace(comparison, task=evil, broker=evil, definition={**comparison.definition, "task": evil})
    )
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text
    read(text)


def test_the_labels_of_the_chart_can_be_read_on_a_telephone(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    text = page(comparison)
    (drawing,) = re.findall(r'<div class="wide"[^>]*><svg viewBox="0 0 (\d+) ', text)  # which scrolls
    (least,) = re.findall(r"figure svg {[^}]*min-width: (\d+)rem", text)
    (font,) = re.findall(r"\.tick {[^}]*font-size: (\d+)px", text)
    assert int(font) * int(least) * 16 / int(drawing) >= 10  # pixels, on however narrow a screen


def test_a_page_of_one_seed_and_of_a_regression_has_no_spread_and_no_labels(tmp_path):
    comparison, _ = comparison_of(tmp_path, has_accuracy=False, seeds=1)
    text = page(comparison)
    read(text)
    assert comparison.metric == "loss"
    assert "±" not in text
    assert "By label" not in text
    assert "accuracy" not in text.lower()


def test_the_csv_files_hold_every_unit(tmp_path):
    comparison, results = comparison_of(tmp_path)
    write_csv(tmp_path, comparison, results)

    def rows(name):
        with (tmp_path / name).open(newline="") as file:
            return list(csv.DictReader(file))

    assert len(rows("rounds.csv")) == 2 * (4 * 3 + 4)
    assert [row["num_steps"] for row in rows("rounds.csv")[:3]] == ["0", "4", "8"]
    assert [row["arm"] for row in rows("arms.csv")] == [arm.arm for arm in comparison.arms]
    assert float(rows("arms.csv")[0]["accuracy_spread"]) == pytest.approx(0.0707107, abs=1e-6)
    assert len(rows("classes.csv")) == 2 * 2 * len(results) / 2
    assert {row["data_of"] for row in rows("agents.csv")} == {"agent-1", "agent-2"}


def test_the_table_fits_into_eighty_columns(tmp_path):
    comparison, _ = comparison_of(tmp_path)
    longest = msgspec.structs.replace(
        comparison.arms[-1], num_steps=125_000, budget=158_000, rounds=500, seconds=1234.5
    )
    comparison = msgspec.structs.replace(comparison, arms=[*comparison.arms, longest])
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115  closed with the console
    console.print(table(comparison))
    text = console.export_text()
    assert "…" not in text
    assert "85.0 ± 7.1 %" in text
    assert "6 of 8" in text


def test_screens_tell_what_is_done_and_what_is_under_way(tmp_path):
    _, results = comparison_of(tmp_path)
    plan = plan_of(tmp_path, options={"rounds": 2}, agents=2, seeds=2, arms="federated,alone")
    console = Console(width=100, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    plain = PlainScreen(plan, console)
    plain.finished(results[0], is_new=True)
    plain.finished(results[0], is_new=False)
    assert console.export_text().splitlines() == [
        "federated, seed 0: accuracy 80.0%, loss 0.2000 (2 rounds, 8 steps, 1.5 s)",
        "federated, seed 0: accuracy 80.0%, loss 0.2000 (2 rounds, 8 steps, done before)",
    ]
    live = LiveScreen(plan, console)
    live.surveyed(None, {"fedsgd": 3})
    live.finished(results[0], is_new=True)
    alone = Unit(kind="alone", seed=0, agent="agent-1")
    live.began(alone, None)
    live.advanced(alone, results[0].rounds[1])
    console.print(live.view())
    text = console.export_text()
    assert re.search(r"federated, 2 agents +\S+ +1/2 +accuracy 80\.0%", text)
    assert "agent-1 alone, seed 0: round 1 of 2" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.42, 1.0, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0, 5, [0, 1, 2, 3, 4, 5]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis():
    assert is_logarithmic("loss", [10.0, 0.4])
    assert not is_logarithmic("loss", [10.0, 0.6])
    assert not is_logarithmic("loss", [10.0, 0.0])
    assert not is_logarithmic("accuracy", [0.9, 0.001])
    assert not is_logarithmic("loss", [])


def test_the_page_of_the_docs_lists_the_table():
    text = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    assert markdown(CompareSettings) in text, f"docs/comparing.md lacks:\n{markdown(CompareSettings)}"
