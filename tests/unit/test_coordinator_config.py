"""The coordinator's settings: the names that scripts rely on, what contradicts what, and what defines a run."""

from pathlib import Path

import msgspec
import pytest

from coordinator.config import Settings, check, differences, load_settings, run_definition, run_fingerprint
from midge.settings import SettingsError, describe, markdown
from midge.wire.messages import Invitation, TrainingConfig, decode_to_agent, encode

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
DEFINING = {
    "task": "other",
    "rounds": 31,
    "seed": 1,
    "cohort": 5,
    "quorum": 3,
    "min_agents": 3,
    "over_select": 2.0,
    "select": {"site": "lab"},
    "local_epochs": 2,
    "batch_size": 0,
    "learning_rate": 0.2,
    "momentum": 0.9,
    "task_options": {"width": 32},
    "weighting": "uniform",
    "server_learning_rate": 0.5,
    "norm_bound": 1.0,
    "strategy": "fedprox",
    "clip_to_median": 2.0,
    "visit_order": ("bob", "alice"),
}
SILENT = {"strategy_options", "visit_order", "clip_to_median"}
"""Defining fields that are left out of a definition where they say nothing."""
UNKNOWN_STRATEGY = (
    "--set strategy: strategy is 'fedadm': not known. Did you mean 'fedadam'? Known are cyclic, fedadagrad, fedadam, fedavg, "
    "fedavgm, fedprox, fedyogi, krum, median, multi-krum, trimmed-mean; yours "
    "is named as package.module:object or path/to/file.py:object"
)
UNKNOWN_OPTION = (
    "--set strategy_options: strategy_options has 'beta_1': fedadam has no such option. Did you mean 'beta1'? "
    "Its options are beta1, tau, beta2"
)
WORKING = {
    "broker": "mqtt://elsewhere",
    "federation": "other",
    "username": "me",
    "password": "x",
    "password_file": "x",
    "ca_file": "x",
    "cert_file": "x",
    "key_file": "x",
    "log_format": "json",
    "log_level": "debug",
    "max_examples": 1,
    "start_agents": 9,
    "start_deadline_s": 1.0,
    "selection_deadline_s": 1.0,
    "acceptance_deadline_s": 1.0,
    "round_deadline_s": 1.0,
    "aggregation_deadline_s": 1.0,
    "max_attempts": 1,
    "max_step_ratio": 0.0,
    "max_loss_ratio": 2.0,
    "max_accuracy_drop": 0.1,
    "quarantine_after": 0,
    "quarantine_window": 1,
    "quarantine_rounds": 1,
    "evaluate": False,
    "evaluate_every": 5,
    "data_dir": "x",
    "download": True,
    "evaluation_deadline_s": 1.0,
    "best_metric": "loss",
    "best_mode": "min",
    "state_dir": "x",
    "keep_models": 1,
    "keep_agent_models": True,
    "aggregation_threads": 2,
    "http_host": "::",
    "http_port": 0,
    "keepalive_s": 5,
    "tensorboard_dir": "x",
    "mlflow_uri": "x",
    "agent_metrics": 0,
    "base_model": "x",  # the model that it names defines the run, the name does not
}


def test_the_names_and_defaults_that_scripts_rely_on():
    settings = Settings()
    relied_on = {
        "broker": "mqtt://127.0.0.1:1883",
        "federation": "default",
        "task": "digits",
        "rounds": 30,
        "seed": 0,
        "min_agents": 2,
        "cohort": 0,
        "quorum": 0,
        "over_select": 1.3,
        "round_deadline_s": 600,
        "local_epochs": 1,
        "batch_size": 10,
        "learning_rate": 0.1,
        "strategy": "fedavg",
        "server_learning_rate": None,
        "state_dir": "midge-state",
        "http_host": "127.0.0.1",
        "http_port": 8080,
    }
    assert {key: getattr(settings, key) for key in relied_on} == relied_on


def test_the_defaults_are_within_their_own_limits():
    assert load_settings() == Settings()
    assert msgspec.convert(msgspec.structs.asdict(Settings()), Settings) == Settings()


def test_a_json_file_with_the_same_keys_works(tmp_path):
    file = tmp_path / "conf.json"
    file.write_text('{"task": "digits", "rounds": 20, "cohort": 6, "local_epochs": 3, "task_options": {"width": 32}}')
    expected = Settings(rounds=20, cohort=6, local_epochs=3, task_options={"width": 32})
    assert load_settings(file=file) == expected


def test_the_variable_that_names_the_file_is_no_setting():
    assert load_settings(environ={"MIDGE_CONFIG": "midge.toml", "MIDGE_ROUNDS": "4"}).rounds == 4


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        (
            ["cohort=3", "min_agents=4"],
            "--set min_agents: min_agents is 4, above cohort (3): lower it, raise cohort, or let cohort be 0 (every agent)",
        ),
        (
            ["cohort=3", "quorum=4"],
            "--set quorum: quorum is 4, above cohort (3): lower it, raise cohort, or let cohort be 0 (every agent)",
        ),
        (
            ["cohort=1"],
            "--set cohort: min_agents is 2, above cohort (1): lower it, raise cohort, or let cohort be 0 (every agent)",
        ),
        (["cert_file=me.pem"], "--set cert_file: cert_file is given without key_file: the two go together"),
        (
            ["federation=Lab"],
            "--set federation: federation is 'Lab': expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9",
        ),
        (["http_port=65536"], "--set http_port: http_port is '65536': expected a whole number, 0 to 65535"),
        (["task="], "--set task: task is '': expected text, 1 to 1000 characters"),
        (["over_select=0.9"], "--set over_select: over_select is '0.9': expected a number, 1 to 10"),
        (
            ["strategy=fedadm"],
            UNKNOWN_STRATEGY,
        ),
        (
            ["strategy=fedadam", "strategy_options=beta_1=1"],
            UNKNOWN_OPTION,
        ),
        (
            ["strategy=fedadam", "strategy_options=tau=0"],
            "--set strategy_options: strategy_options of fedadam: tau is 0: expected a finite number above 0",
        ),
        (
            ["strategy_options=server_learning_rate=0.5"],
            "--set strategy_options: strategy_options has server_learning_rate: give it as the setting server_learning_rate",
        ),
        (
            ["strategy=cyclic", "server_learning_rate=0.5"],
            "--set server_learning_rate: server_learning_rate is 0.5, and strategy cyclic has none: leave it out",
        ),
        (
            ["strategy=cyclic", "weighting=sum"],
            "--set weighting: weighting is 'sum', and strategy cyclic has none: leave it out",
        ),
        (
            ["strategy=cyclic", "cohort=5"],
            "--set cohort: cohort is 5, and strategy cyclic visits one agent a round: leave it out",
        ),
        (
            ["strategy=cyclic", "visit_order=bob,alice,bob"],
            "--set visit_order: visit_order has bob more than once: expected each agent once",
        ),
        (
            ["strategy=cyclic", "visit_order=bob"],
            "--set visit_order: visit_order has 1 agents, below min_agents (2): name more, or lower that",
        ),
        (
            ["visit_order=bob,alice"],
            "--set visit_order: visit_order is given, and strategy fedavg visits nobody in turn",
        ),
        (["num_rounds=3"], "--set num_rounds: unknown setting num_rounds: did you mean rounds?"),
    ],
)
def test_what_cannot_work_is_refused(assignments, problem):
    with pytest.raises(SettingsError) as caught:
        load_settings(assignments=assignments)
    assert caught.value.problems == (problem,)


def test_a_base_model_defines_a_run_by_its_digest():
    one, other = Settings(base_model="one"), Settings(base_model="other")
    assert run_fingerprint(one, "a" * 64) == run_fingerprint(other, "a" * 64)
    assert run_fingerprint(one, "a" * 64) != run_fingerprint(one, "b" * 64)
    assert run_fingerprint(one, "a" * 64) != run_fingerprint(Settings())
    ours, theirs = run_definition(one, "a" * 64), run_definition(Settings())
    assert differences(ours, theirs) == ["base_model"]


def test_a_cohort_of_exactly_quorum_and_least_agents_works():
    settings = load_settings(assignments=["cohort=3", "min_agents=3", "quorum=3"])
    assert settings.needed_updates == 3


def test_without_a_cohort_there_is_no_target_to_exceed():
    assert load_settings(assignments=["quorum=50", "min_agents=40"]).needed_updates == 50


def test_the_quorum_is_the_least_agents_where_it_is_not_given():
    assert Settings(min_agents=7).needed_updates == 7
    assert Settings(min_agents=7, quorum=5).needed_updates == 5


def test_every_field_either_defines_a_run_or_does_not_and_this_file_says_which():
    assert DEFINING.keys() | WORKING.keys() | SILENT == set(Settings.__struct_fields__)
    assert set(run_definition(Settings())) == DEFINING.keys() - SILENT


@pytest.mark.parametrize("key", DEFINING)
def test_another_value_of_a_defining_field_is_another_run(key):
    other = Settings(**{key: DEFINING[key]})
    found = differences(run_definition(Settings()), run_definition(other))
    # The quorum stands for as many updates as min_agents where it is not given, so it differs with it.
    with_it = {"min_agents": ["quorum", "min_agents"], "strategy": ["strategy", "strategy_options"]}
    assert found == with_it.get(key, [key])
    assert run_fingerprint(Settings()) != run_fingerprint(other)


@pytest.mark.parametrize("key", WORKING)
def test_another_value_of_any_other_field_is_the_same_run(key):
    other = Settings(**{key: WORKING[key]})
    assert getattr(other, key) != getattr(Settings(), key)
    assert differences(run_definition(Settings()), run_definition(other)) == []
    assert run_fingerprint(Settings()) == run_fingerprint(other)


def test_two_ways_to_say_one_run_have_one_fingerprint():
    same = [
        (Settings(), Settings(quorum=2)),
        (Settings(learning_rate=1.0), Settings(learning_rate=1)),
        (Settings(select={"a": "1", "b": "2"}), Settings(select={"b": "2", "a": "1"})),
        (Settings(), Settings(server_learning_rate=1.0)),
        (Settings(strategy="fedyogi"), Settings(strategy="fedyogi", server_learning_rate=0.1)),
        (Settings(strategy="fedadam"), Settings(strategy="fedadam", strategy_options={"beta1": 0.9, "tau": 1e-3})),
        (
            Settings(strategy="fedprox", strategy_options={"mu": 1}),
            Settings(strategy="fedprox", strategy_options={"mu": 1.0}),
        ),
        (Settings(strategy="cyclic", min_agents=3), Settings(strategy="cyclic", min_agents=3, quorum=1)),
    ]
    for one, other in same:
        assert run_fingerprint(one) == run_fingerprint(other)
        assert differences(run_definition(one), run_definition(other)) == []


def test_an_option_of_a_strategy_defines_a_run_also_where_it_is_the_default():
    assert run_definition(Settings(strategy="fedadam"))["strategy_options"] == {
        "beta1": 0.9,
        "tau": 1e-3,
        "beta2": 0.99,
    }
    other = Settings(strategy="fedadam", strategy_options={"tau": 0.01})
    found = differences(run_definition(Settings(strategy="fedadam")), run_definition(other))
    assert found == ["strategy_options"]


def test_a_task_in_a_file_is_the_same_run_from_whatever_directory():
    one, other = Settings(task="./my_task.py:task"), Settings(task="/srv/my_task.py:task")
    assert run_definition(one)["task"] == "my_task.py:task"
    assert run_fingerprint(one) == run_fingerprint(other)


def test_a_task_s_name_is_as_short_as_a_message_holds_and_its_path_need_not_be():
    assert check(Settings(task="/" + "x" * 300 + "/my_task.py")) == []
    (problem,) = check(Settings(task="/srv/" + "x" * 201))
    assert problem.key == "task"
    assert "201 characters without directories, expected at most 200" in problem.text


def test_a_fingerprint_stays_what_it_was_since_stored_runs_carry_it():
    assert run_fingerprint(Settings()) == "af8b96555a9028cbfc5e92ab2463e7501e6baa203ddc6a5f0f0c564ffd21b643"


@pytest.mark.parametrize(
    "assignments",
    [
        [
            "local_epochs=1000000",
            "batch_size=2147483647",
            "learning_rate=1000000",
            "momentum=0.999",
            "seed=9007199254740992",
        ],
        ["local_epochs=1", "batch_size=0", "learning_rate=1e-12", "momentum=0", f"task={'x' * 200}"],
        ["task_options=" + ",".join(f"{'k' * 60}{n}={'v' * 200}" for n in range(64))],
    ],
)
def test_whatever_the_limits_let_through_the_agents_can_decode(assignments):
    settings = load_settings(assignments=assignments)
    training = TrainingConfig(
        local_epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        extra=settings.task_options,
    )
    invitation = Invitation(
        run_id="digits-1",
        epoch=1,
        round_num=settings.rounds,
        attempt=settings.max_attempts,
        model_digest="0" * 64,
        task=settings.task,
        training=training,
        seed=settings.seed,
        credit=16,
        deadline_s=settings.round_deadline_s,
    )
    assert decode_to_agent(encode(invitation)) == invitation


def test_the_page_has_the_table_of_these_settings():
    assert markdown(Settings) in PAGE.read_text(encoding="utf-8"), f"docs/configuration.md lacks:\n{markdown(Settings)}"


def test_the_examples_of_the_page_are_the_same_settings_in_toml_and_in_json(tmp_path):
    settings = []
    for name in ("toml", "json"):
        example = PAGE.read_text(encoding="utf-8").partition(f"```{name}\n")[2].partition("```")[0]
        (tmp_path / f"midge.{name}").write_text(example)
        settings.append(load_settings(file=tmp_path / f"midge.{name}"))
    assert settings[0] == settings[1]
    assert (settings[0].rounds, settings[0].select, settings[0].task_options) == (100, {"site": "lab"}, {"width": 32})


def test_the_mistakes_of_the_page_are_told_in_its_words(tmp_path):
    (tmp_path / "midge.toml").write_text("# lab\nrounds = 100\ncohort = 10\nround_deadline_ms = 5\n\nmin_agents = 20\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(file=tmp_path / "midge.toml", environ={"MIDGE_LR": "1"}, assignments=["evaluation_deadline_s=2m"])
    told = PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    assert sorted(told.splitlines()) == sorted(caught.value.problems)


def test_every_setting_is_described_in_a_sentence():
    for row in describe(Settings):
        assert row.description.endswith("."), row.key
        assert "|" not in row.description, row.key
