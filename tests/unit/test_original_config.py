"""Files with the ten keys of scenario 3's original: what they mean here, and what is said when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import Settings, load_settings
from coordinator.original_config import KEYS, TASKS
from midge.settings import SettingsError
from midge.tasks.references import task_names

ORIGINAL = {
    "model_name": "resnet18",
    "no_models": 10,
    "type": "cifar",
    "global_epochs": 20,
    "local_epochs": 3,
    "k": 6,
    "batch_size": 32,
    "lr": 0.001,
    "momentum": 0.0001,
    "lambda": 0.1,
}

KEEP = "keep to one kind, or use --set learning_rate=..."


def conf(directory: Path, *without: str, **changes: Any) -> Path:
    values = {key: value for key, value in ORIGINAL.items() if key not in without} | changes
    file = directory / "conf.json"
    file.write_text(json.dumps(values, indent=2))  # a key a line, the first on line 2
    return file


def problems(file: Path, **sources: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(file=file, **sources)
    return list(caught.value.problems)


def test_the_originals_file_is_read_as_it_is(tmp_path):
    assert load_settings(file=conf(tmp_path)) == Settings(
        task="cifar10",
        start_agents=10,
        cohort=6,
        min_agents=6,
        over_select=1.0,
        rounds=20,
        local_epochs=3,
        batch_size=32,
        learning_rate=0.001,
        momentum=0.0001,
        weighting="sum",
        server_learning_rate=0.1,
    )
    assert list(ORIGINAL) == list(KEYS)


def test_its_other_data_set_is_mnist(tmp_path):
    assert load_settings(file=conf(tmp_path, type="mnist", model_name="cnn")).task == "mnist"
    assert set(TASKS.values()) <= set(task_names())


def test_all_other_sources_win_over_it_as_over_any_file(tmp_path):
    settings = load_settings(
        file=conf(tmp_path),
        environ={"MIDGE_ROUNDS": "2"},
        options={"task": "digits"},
        assignments=["learning_rate=0.1", "weighting=uniform"],
    )
    seen = (settings.rounds, settings.task, settings.learning_rate, settings.weighting, settings.cohort)
    assert seen == (2, "digits", 0.1, "uniform", 6)


@pytest.mark.parametrize(
    ("without", "changes", "expected"),
    [
        (
            (),
            {"learning_rate": 0.1},
            f"conf.json, line 12: learning_rate is a key of Midge's own, among {', '.join(KEYS)}: {KEEP}",
        ),
        ((), {"epochs": 3}, f"conf.json, line 12: epochs is unknown: such a file has {', '.join(KEYS)}"),
        (
            ("lambda", "k"),
            {},
            f"conf.json, line 3: no_models is there, but not k, lambda: such a file has {', '.join(KEYS)}",
        ),
        ((), {"k": 12}, "conf.json, line 7: k is 12, above no_models (10): k of the no_models agents are drawn each round"),
        ((), {"k": 0}, "conf.json, line 7 (k): min_agents is 0: expected a whole number, 1 to 100000"),
        ((), {"lr": "fast"}, "conf.json, line 9 (lr): learning_rate is 'fast': expected a number, above 0 and at most 1000000"),
        ((), {"momentum": 1.5}, "conf.json, line 10: momentum is 1.5: expected a number, at least 0 and below 1"),
        (
            (),
            {"lambda": 0},
            "conf.json, line 11 (lambda): server_learning_rate is 0: expected a number, or none, above 0 and at most 1000000",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line_and_the_key_as_written(tmp_path, without, changes, expected):
    assert problems(conf(tmp_path, *without, **changes)) == [expected]


def test_another_model_or_data_set_is_refused_with_those_that_are_there(tmp_path):
    (said,) = problems(conf(tmp_path, model_name="vgg16"))
    assert said.startswith(
        "conf.json, line 4: type is 'cifar' with model_name 'vgg16': expected 'cifar' with 'resnet18', 'mnist' with 'cnn'; "
    )
    assert len(problems(conf(tmp_path, type=["x" * 1000]))[0]) < 400


def test_a_file_with_one_misspelt_setting_of_ours_is_not_taken_for_one_of_these(tmp_path):
    file = tmp_path / "conf.json"
    file.write_text('{"rounds": 3, "lr": 0.1, "k": 2, "model_name": "x"}')
    assert "conf.json, line 1: unknown setting lr: did you mean learning_rate?" in problems(file)


def test_everything_wrong_is_told_together(tmp_path):
    file = conf(tmp_path, "model_name", rounds=3, lr=-1, k=11)
    assert len(problems(file)) == 4
