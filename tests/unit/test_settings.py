"""Where settings come from, what is said when they are wrong, and that nothing secret is said."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from midge.settings import (
    CommonSettings,
    Problem,
    Seconds,
    Secret,
    SettingsError,
    check_common,
    describe,
    load,
    markdown,
)

Scalar = bool | int | float | Annotated[str, Meta(max_length=20)]


class Oven(CommonSettings, frozen=True, kw_only=True):
    rounds: Annotated[int, Meta(ge=1, le=100, description="How often.")] = 3
    local_epochs: Annotated[int, Meta(ge=1, description="Passes.")] = 1
    learning_rate: Annotated[float, Meta(gt=0, le=10, description="Step size.")] = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    round_deadline_s: Annotated[Seconds, Meta(description="Longest wait.")] = 600.0
    keepalive_s: Annotated[int, Meta(ge=1, le=600)] = 30
    max_memory_mb: Annotated[int, Meta(ge=0)] = 0
    evaluate: bool = True
    classes: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    labels: Annotated[dict[str, Annotated[str, Meta(max_length=8)]], Meta(max_length=2)] = msgspec.field(
        default_factory=dict
    )
    task_options: dict[str, Scalar] = msgspec.field(default_factory=dict)
    patience: Annotated[int, Meta(ge=0)] | None = 5
    mode: Literal["max", "min"] = "max"


def problems(**sources) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(Oven, **sources)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def written(directory: Path, text: str, name: str = "midge.toml") -> Path:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file


def test_with_no_source_every_field_has_its_default():
    assert load(Oven) == Oven()


def test_each_source_overrides_the_ones_before_it(tmp_path):
    file = written(tmp_path, "rounds = 11\n")
    environ, options = {"MIDGE_ROUNDS": "12"}, {"rounds": 13}
    assert load(Oven, file=file).rounds == 11
    assert load(Oven, file=file, environ=environ).rounds == 12
    assert load(Oven, file=file, environ=environ, options=options).rounds == 13
    assert load(Oven, file=file, environ=environ, options=options, assignments=["rounds=14"]).rounds == 14


def test_sources_that_name_different_keys_add_up(tmp_path):
    settings = load(
        Oven, file=written(tmp_path, "rounds = 5"), environ={"MIDGE_MODE": "min"}, options={"evaluate": False}
    )
    assert (settings.rounds, settings.mode, settings.evaluate) == (5, "min", False)


def test_an_option_that_is_none_and_an_empty_variable_are_not_given():
    assert load(Oven, environ={"MIDGE_ROUNDS": ""}, options={"rounds": None}).rounds == 3


def test_the_last_assignment_of_a_key_counts():
    assert load(Oven, assignments=["rounds=4", "rounds = 5"]).rounds == 5


def test_json_and_toml_with_the_same_keys_give_the_same_settings(tmp_path):
    toml = written(tmp_path, 'rounds = 7\nclasses = [1, 2]\nround_deadline_s = 5\n[labels]\nsite = "lab"\n')
    json = written(
        tmp_path, '{"rounds": 7, "classes": [1, 2], "round_deadline_s": 5, "labels": {"site": "lab"}}', "midge.json"
    )
    settings = load(Oven, file=toml)
    assert settings == load(Oven, file=json)
    assert settings == Oven(rounds=7, classes=(1, 2), round_deadline_s=5.0, labels={"site": "lab"})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("rounds", " 7 ", 7),
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "1", 1.0),
        *(("evaluate", text, True) for text in ("true", "Yes", "1")),
        *(("evaluate", text, False) for text in ("false", "NO", "0")),
        ("classes", "7,8, 9,0", (7, 8, 9, 0)),
        ("labels", "site=lab, arch=arm=64", {"site": "lab", "arch": "arm=64"}),
        ("task_options", "a=1,b=0.5,c=true,d=x y,e=1x", {"a": 1, "b": 0.5, "c": True, "d": "x y", "e": "1x"}),
        ("patience", "none", None),
        ("patience", "0", 0),
        ("mode", "MIN", "min"),
        ("federation", " lab-1 ", "lab-1"),
        ("password", " with spaces ", " with spaces "),
    ],
)
def test_text_is_read_by_the_type_of_the_field(key, text, value):
    for sources in (
        {"environ": {f"MIDGE_{key.upper()}": text}},
        {"assignments": [f"{key}={text}"]},
        {"options": {key: text}},
    ):
        read = getattr(load(Oven, **sources), key)
        assert read == value
        assert type(read) is type(value)


def test_an_option_given_several_times_is_one_list():
    settings = load(Oven, options={"labels": ("site=lab", "arch=arm64"), "classes": ["1", "2,3"]})
    assert settings.labels == {"site": "lab", "arch": "arm64"}
    assert settings.classes == (1, 2, 3)


def test_empty_text_empties_a_list_and_a_table():
    settings = load(Oven, environ={"MIDGE_CLASSES": "1", "MIDGE_LABELS": "a=b"}, assignments=["classes=", "labels="])
    assert (settings.classes, settings.labels) == ((), {})


def test_all_problems_of_all_sources_are_told_at_once_each_with_its_place(tmp_path):
    file = written(
        tmp_path, '# of the lab\nmode = "best"\n\nrounds = "many"\n"local_epochs" = 0\n[labels]\nrounds = 3\n'
    )
    found = problems(
        file=file,
        environ={"MIDGE_ROUNDS": "0"},
        options={"learning_rate": 0},
        assignments=["evaluate=maybe", "classes=1,-2"],
    )
    table = 'such as a=1,b=2 (in a file a table, { a = "1", b = "2" })'
    numbers = "such as 1,2,3 (in a file [1, 2, 3])"
    assert found == [
        "midge.toml, line 2: mode is 'best': expected max or min",
        "midge.toml, line 4: rounds is 'many': expected a whole number, 1 to 100",
        "midge.toml, line 5: local_epochs is 0: expected a whole number, at least 1",
        f"midge.toml, line 6: labels is {{'rounds': 3}}: expected a table of names and values, at most 2 entries, {table}",
        "environment MIDGE_ROUNDS: rounds is '0': expected a whole number, 1 to 100",
        "--learning-rate: learning_rate is 0: expected a number, above 0 and at most 10",
        "--set evaluate: evaluate is 'maybe': expected true or false",
        f"--set classes: classes is '1,-2': expected a list of whole numbers, each at least 0, {numbers}",
    ]


def test_a_key_of_a_json_file_has_its_line_unless_it_stands_there_twice(tmp_path):
    file = written(tmp_path, '{\n  "rounds": 0,\n  "mode": 1,\n  "labels": {"mode": "x"}\n}', "midge.json")
    assert problems(file=file) == [
        "midge.json, line 2: rounds is 0: expected a whole number, 1 to 100",
        "midge.json: mode is 1: expected max or min",
    ]


def test_a_key_of_a_toml_file_that_is_not_found_by_looking_has_no_line_rather_than_a_wrong_one(tmp_path):
    file = written(tmp_path, '"m\\u006fde" = 1\n[labels]\nsite = "lab"\nmode = "x"\n')
    assert problems(file=file) == ["midge.toml: mode is 1: expected max or min"]


@pytest.mark.parametrize(
    ("key", "text", "hint"),
    [
        ("round_deadline_s", "2m", "2m is 120 seconds: write 120"),
        ("round_deadline_s", "30s", "30s is 30 seconds: write 30"),
        ("round_deadline_s", "1 h", "1 h is 3600 seconds: write 3600"),
        ("round_deadline_s", "10ms", "10ms is 0.01 seconds: write 0.01"),
        ("keepalive_s", "1.5 Minutes", "1.5 Minutes is 90 seconds: write 90"),
        ("max_memory_mb", "2GB", "2GB is 2048 MiB: write 2048"),
        ("max_memory_mb", "512M", "512M is 512 MiB: write 512"),
    ],
)
def test_a_value_with_a_unit_is_told_its_number_in_the_right_one(tmp_path, key, text, hint):
    from_text = problems(assignments=[f"{key}={text}"])
    from_file = problems(file=written(tmp_path, f'{key} = "{text}"'))
    assert from_text[0].endswith(f"; {hint}")
    assert from_file[0].endswith(f"; {hint}")


def test_an_unknown_unit_and_a_field_without_unit_get_no_hint():
    assert problems(assignments=["round_deadline_s=2 parsecs", "rounds=2m"]) == [
        "--set round_deadline_s: round_deadline_s is '2 parsecs': expected a number of seconds, 0.1 to 604800",
        "--set rounds: rounds is '2m': expected a whole number, 1 to 100",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("round_deadline", "round_deadline_s (seconds)"),
        ("round_deadline_ms", "round_deadline_s (seconds)"),
        ("round_deadline_minutes", "round_deadline_s (seconds)"),
        ("roundDeadlineMs", "round_deadline_s (seconds)"),
        ("timeout_s", "round_deadline_s (seconds)"),
        ("max_memory_gb", "max_memory_mb (MiB)"),
        ("lr", "learning_rate"),
        ("epochs", "local_epochs"),
        ("num_rounds", "rounds"),
        ("learningRate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("learnig_rate", "learning_rate"),
        ("url", "broker"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_right_one(key, meant):
    assert problems(assignments=[f"{key}=1"]) == [f"--set {key}: unknown setting {key}: did you mean {meant}?"]


def test_an_unknown_key_that_is_like_none_is_told_where_they_are_listed():
    expected = "--set colour: unknown setting colour: no name is near to it; docs/configuration.md lists them all"
    assert problems(assignments=["colour=red"]) == [expected]


def test_a_synonym_of_a_setting_that_this_kind_lacks_is_not_suggested():
    assert "did you mean" not in problems(assignments=["cohort=3", "k=3"])[1]


def test_an_unknown_table_of_a_file_is_told_that_keys_stand_at_the_top(tmp_path):
    assert problems(file=written(tmp_path, "[coordinator]\nrounds = 3\n")) == [
        "midge.toml, line 1: unknown setting coordinator: expected keys at the top of the file, under no [heading]"
    ]


def test_an_unknown_variable_is_told_in_the_spelling_of_variables_and_others_are_left_alone():
    environ = {"MIDGE_LR": "1", "MIDGE_CONFIG": "x.toml", "PATH": "/bin", "MIDGET_ROUNDS": "9"}
    assert problems(environ=environ, ignore={"MIDGE_CONFIG"}) == [
        "environment MIDGE_LR: unknown setting lr: did you mean MIDGE_LEARNING_RATE?"
    ]


def test_a_mistake_is_told_even_where_a_later_source_overrides_it(tmp_path):
    assert len(problems(file=written(tmp_path, "rounds = 0"), options={"rounds": 3})) == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("midge.yaml", b"rounds: 3", "the name ends in .yaml: expected .toml or .json"),
        ("midge", b"", "the name ends in no suffix: expected .toml or .json"),
        ("midge.toml", b"rounds = \n", "Invalid value (at line 1, column 10)"),
        ("midge.json", b'{"rounds": 3,\n}', "line 2 column 1"),
        ("midge.json", b"[3]", "expected one JSON object of keys and values, {...}"),
        ("midge.toml", b"rounds = 3 # \xff", "is not text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_as_settings_is_one_problem_beside_the_others(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    found = problems(file=tmp_path / name, environ={"MIDGE_ROUNDS": "0"})
    assert len(found) == 2
    assert name in found[0]
    assert problem in found[0]


def test_a_file_that_is_not_there_is_named_with_its_path(tmp_path):
    assert problems(file=tmp_path / "none.toml") == [f"{tmp_path}/none.toml: No such file or directory"]


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    assert load(Oven, file=written(tmp_path, "\ufeffrounds = 4")).rounds == 4


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", "1,5"])
def test_a_number_must_be_a_finite_one(text):
    assert len(problems(assignments=[f"momentum={text}"])) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, "\udc80", [1], None])
def test_what_no_message_could_carry_is_refused_inside_a_table_too(value):
    assert len(problems(options={"task_options": {"a": value}})) == 1


@pytest.mark.parametrize("value", [1e300, -(2**63), 2**63 - 1, "\u4e2d\U0001f980", True])
def test_what_a_message_can_carry_is_taken_inside_a_table(value):
    assert load(Oven, options={"task_options": {"a": value}}).task_options == {"a": value}


@pytest.mark.parametrize("text", ["site", "site=a,site=b", "a=1,b=2,c=3", "site=far-too-long"])
def test_a_table_in_text_needs_a_value_for_each_name_and_each_name_once(text):
    assert len(problems(assignments=[f"labels={text}"])) == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{mu=0.1}", "; here without braces: write task_options=mu=0.1"),
        ("{ mu = 0.1 }", "; here without braces: write task_options=mu=0.1"),
        ("{a=1,b=2}", "; here without braces"),
        ('{"mu": 0.1}', "; here without braces"),
        ("{", "; here without braces"),
        ("mu", ""),
    ],
)
def test_a_table_in_braces_is_met_with_how_it_is_written_here(text, hint):
    (said,) = problems(assignments=[f"task_options={text}"])
    assert said.endswith('such as a=1,b=2 (in a file a table, { a = "1", b = "2" })' + hint)


def test_types_are_not_bent(tmp_path):
    file = written(tmp_path, 'rounds = 2.0\nevaluate = 1\nlearning_rate = "0.1"\npassword = 12\nkeepalive_s = true')
    assert len(problems(file=file)) == 5


SECRET = "hunter2"


@pytest.mark.parametrize(
    "sources",
    [
        {"assignments": [SECRET]},
        {"assignments": [f"pasword={SECRET}"]},
        {"assignments": [f"password:{SECRET}"]},
        {"environ": {"MIDGE_PASSWD": SECRET}},
        {"options": {"password": {"is": SECRET}}},
        {"options": {"password": SECRET + "\udc80"}},
        {"environ": {"MIDGE_PASSWORD": SECRET * 10_000}},
        {"environ": {"MIDGE_BROKER": f"http://me:{SECRET}@host"}, "check": check_common},
        {"environ": {"MIDGE_BROKER": f"mqtt://me:a@b/{SECRET}@host" + "x" * 1000}},
        {"environ": {"MIDGE_BROKER": f"me:{SECRET}@host"}, "check": check_common},
        {"environ": {"MIDGE_BROKER": f"mqtt:/me:'{SECRET}@host"}, "check": check_common},
        {"options": {"broker": [f"mqtt://me:{SECRET}@host"], "rounds": 0}},
    ],
)
def test_a_secret_is_in_no_message(sources):
    assert SECRET not in "\n".join(problems(**sources))


def test_a_secret_is_in_no_representation():
    settings = Oven(password=SECRET, broker=f"mqtts://me:{SECRET}@host")
    assert SECRET not in repr(settings)
    assert "password='(hidden)', " in repr(settings)
    assert "broker='mqtts://(hidden)@host'" in repr(settings)


def test_a_check_across_fields_names_the_place_of_the_key_and_goes_on_to_the_next(tmp_path):
    def check(settings: Oven) -> list[Problem]:
        return [
            Problem("keepalive_s", "is odd"),
            Problem("momentum", f"needs rounds above {settings.rounds}", ("rounds",)),
        ]

    file = written(tmp_path, "\nrounds = 2\n")
    assert problems(file=file, check=check, assignments=["keepalive_s=3"]) == [
        "--set keepalive_s: keepalive_s is odd",
        "midge.toml, line 2: momentum needs rounds above 2",
    ]
    assert problems(check=check)[0] == "default: keepalive_s is odd"


def test_a_check_that_involves_a_wrong_field_is_not_reported_on_top():
    def check(settings: Oven) -> list[Problem]:
        return [Problem("momentum", "does not go with rounds", ("rounds",)), Problem("mode", "is never right")]

    assert problems(check=check, assignments=["rounds=0", "mode=min"]) == [
        "--set rounds: rounds is '0': expected a whole number, 1 to 100",
        "--set mode: mode is never right",
    ]


def test_a_field_without_default_must_be_given():
    class Strict(msgspec.Struct, frozen=True, kw_only=True):
        token: Secret
        rounds: Annotated[int, Meta(ge=1)]

    with pytest.raises(SettingsError) as caught:
        load(Strict, assignments=["rounds=0"])
    assert caught.value.problems == (
        "--set rounds: rounds is '0': expected a whole number, at least 1",
        "token is not given: expected text, at most 65535 characters",
    )
    assert load(Strict, assignments=["rounds=1", "token=x"]) == Strict(token="x", rounds=1)


def test_an_option_that_is_no_field_is_a_bug_of_the_command_line():
    with pytest.raises(TypeError, match="colour"):
        load(Oven, options={"colour": None})


@given(key=st.sampled_from([*Oven.__struct_fields__, "x\ny", "rounds\u2028"]), text=st.text(max_size=30))
def test_any_text_gives_settings_or_one_line_a_problem(key, text):
    sources = {"environ": {f"MIDGE_{key.upper()}": text}, "assignments": [f"{key}={text}", text]}
    try:
        load(Oven, **sources, check=check_common)
    except SettingsError:
        assert all(line.isprintable() for line in problems(**sources, check=check_common))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"broker": "localhost:1883"}, "broker"),
        ({"broker": "mqtt:///lab"}, "broker"),
        ({"federation": "Lab 1"}, "federation"),
        ({"federation": "lab\n"}, "federation"),
        ({"password": "x", "password_file": "y"}, "password_file"),
        ({"cert_file": "x"}, "cert_file"),
        ({"key_file": "x"}, "key_file"),
    ],
)
def test_what_both_sides_share_is_checked(given, key):
    assert [problem.key for problem in check_common(CommonSettings(**given))] == [key]
    assert check_common(CommonSettings(cert_file="a", key_file="b", broker="wss://host/mqtt", password_file="c")) == []


def test_the_password_comes_from_the_first_line_of_its_file(tmp_path):
    file = tmp_path / "password"
    file.write_bytes(b"p\xc3\xa4ss word \r\nanother line")
    assert CommonSettings(password_file=str(file)).read_password() == "p\u00e4ss word "
    assert CommonSettings(password="given").read_password() == "given"
    assert CommonSettings().read_password() == ""


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\nx", "its first line is empty"), (b"\xff", "is not text in UTF-8")]
)
def test_a_password_file_without_password_is_refused(tmp_path, content, reason):
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=reason):
        CommonSettings(password_file=str(file)).read_password()
    with pytest.raises(SettingsError, match="No such file or directory"):
        CommonSettings(password_file=str(tmp_path / "none")).read_password()


def test_the_reference_has_a_row_for_each_field_in_words():
    rows = {row.key: row for row in describe(Oven)}
    assert list(rows) == list(Oven.__struct_fields__)
    row = rows["round_deadline_s"]
    assert (row.type, row.default, row.limits, row.description) == (
        "number",
        "600",
        "seconds, 0.1 to 604800",
        "Longest wait.",
    )
    assert (rows["patience"].type, rows["patience"].default) == ("whole number, or none", "5")
    assert (rows["evaluate"].type, rows["evaluate"].default) == ("true or false", "true")
    assert rows["momentum"].limits == "at least 0 and below 1"
    assert "| `rounds` | whole number | 3 | 1 to 100 | How often. |" in markdown(Oven).splitlines()
