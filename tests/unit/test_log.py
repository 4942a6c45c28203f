"""Events become one line each, and nobody's text can make two of them."""

import io
import json
import logging
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.log import MAX_VALUE_LENGTH, HumanFormatter, JsonFormatter, Throttle, log_event, setup

LOGGER = logging.getLogger("midge.test")


@pytest.fixture(autouse=True)
def _root_as_it_was():
    names = (None, "midge", "coordinator", "edge_agent")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)


def logged(severity, event, /, *, format="human", shown="info", **fields) -> str:  # noqa: A002 - as in setup
    stream = io.StringIO()
    setup(format, shown, stream)
    log_event(LOGGER, severity, event, **fields)
    return stream.getvalue()


def without_time(line: str) -> str:
    time, _, rest = line.partition(" ")
    assert [len(part) for part in time.split(":")] == [2, 2, 2]
    return rest


def test_a_person_reads_the_event_then_its_fields_with_run_round_attempt_agent_first():
    line = logged(
        logging.INFO, "round committed", agents=3, duration_s=0.21, agent="pi-3", attempt=1, round=3, run="digits-1"
    )
    assert without_time(line) == (
        "INFO  round committed  run=digits-1 round=3 attempt=1 agent=pi-3 agents=3 duration_s=0.21\n"
    )


def test_a_machine_reads_one_object_with_time_in_utc():
    line = logged(logging.WARNING, "update rejected", format="json", reason="norm", round=3, run="digits-1")
    event = json.loads(line)
    assert list(event) == ["ts", "level", "logger", "event", "run", "round", "reason"]
    assert event["ts"].endswith("Z")
    assert len(event["ts"]) == len("2025-03-01T11:03:44.123Z")
    assert list(event.values())[1:] == ["WARNING", "midge.test", "update rejected", "digits-1", 3, "norm"]


def test_what_a_peer_can_bring_about_at_will_is_logged_in_measure(caplog):
    throttle = Throttle(burst=3)
    with caplog.at_level(logging.WARNING):
        for number in range(10):
            throttle.log(LOGGER, logging.WARNING, "message refused", 100.0, number=number)
        # 3 a minute: after 30 s there is room for one, 1.5 less that one is 0.5.
        throttle.log(LOGGER, logging.WARNING, "message refused", 130.0, number=10)
        throttle.log(LOGGER, logging.WARNING, "message refused", 130.0, number=11)
        throttle.log(LOGGER, logging.WARNING, "message refused", 140.0, number=12)
    fields = [record.midge_fields for record in caplog.records]
    assert [field["number"] for field in fields] == [0, 1, 2, 10, 12]
    assert [field.get("held_back") for field in fields] == [None, None, None, 7, 1]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain-1", "plain-1"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ("two\nlines", r'"two\nlines"'),
        ("\x1b[31mred", r'"\x1b[31mred"'),
        ("\u202eesrever", r'"\u202eesrever"'),
        ("caf\u00e9", "caf\u00e9"),
        (None, "-"),
        (True, "true"),
        (1 / 3, "0.333333"),
        (1437, "1437"),
        (ValueError("no such file"), '"ValueError: no such file"'),
        ([1, 2], '"[1, 2]"'),
    ],
)
def test_a_value_is_quoted_and_escaped_where_it_could_be_misread(value, shown):
    assert without_time(logged(logging.INFO, "seen", value=value)) == f"INFO  seen  value={shown}\n"


@pytest.mark.no_cover
@given(key=st.text(max_size=10), value=st.text(st.characters(), max_size=40), event=st.text(max_size=20))
def test_no_text_can_break_a_line_or_begin_one(key, value, event):
    record = logging.makeLogRecord({"name": "peer", "msg": "%s", "args": (event,), "midge_fields": {key: value}})
    human, machine = HumanFormatter().format(record), JsonFormatter().format(record)
    assert human.isprintable()
    assert machine.isascii()
    assert machine.isprintable()
    assert value in json.loads(machine).values()


def test_a_lone_surrogate_is_escaped_too():
    assert r"\udc80" in logged(logging.INFO, "seen", topic="a\udc80")
    assert json.loads(logged(logging.INFO, "seen", format="json", topic="a\udc80"))["topic"] == "a\udc80"


def test_a_long_value_is_cut_and_says_how_long_it_was():
    line = logged(logging.INFO, "seen", payload="x" * 1_000_000)
    assert "x... (1000000 characters)" in line
    assert len(line) < MAX_VALUE_LENGTH + 100


def test_a_percent_sign_in_an_event_or_a_field_stays_one():
    assert without_time(logged(logging.INFO, "100 %s done", share="%d")) == "INFO  100 %s done  share=%d\n"


def test_what_json_cannot_say_is_said_as_text():
    event = json.loads(
        logged(
            logging.INFO,
            "seen",
            format="json",
            loss=float("nan"),
            norms=[1.5, float("inf")],
            by={3: None},
            error=OSError("x"),
        )
    )
    assert (event["loss"], event["norms"], event["by"], event["error"]) == (
        "nan",
        [1.5, "inf"],
        {"3": None},
        "OSError: x",
    )


def test_a_field_cannot_take_the_name_of_a_part_of_the_event():
    event = json.loads(logged(logging.INFO, "seen", format="json", level="high", event="none", ts=1))
    assert (event["level"], event["level_"], event["event"], event["event_"], event["ts_"]) == (
        "INFO",
        "high",
        "seen",
        "none",
        1,
    )


def failed(text: str) -> ValueError:
    try:
        int(text)
    except ValueError as error:
        return error
    raise AssertionError(text)


def test_an_expected_exception_has_no_traceback():
    line = logged(logging.ERROR, "settings refused", error=failed("many"))
    text = "ValueError: invalid literal for int() with base 10: 'many'"
    assert without_time(line) == f'ERROR settings refused  error="{text}"\n'
    assert "traceback" not in json.loads(logged(logging.ERROR, "settings refused", format="json", error=failed("x")))


def test_an_expected_exception_has_its_traceback_where_debug_is_shown():
    line = logged(logging.ERROR, "settings refused", shown="debug", format="json", error=failed("x"))
    assert "in failed" in json.loads(line)["traceback"]


def test_an_unexpected_exception_has_its_traceback_as_one_field_of_the_object():
    line = logged(logging.ERROR, "bug", format="json", exc_info=RuntimeError("one\ntwo"))
    assert line.count("\n") == 1
    assert json.loads(line)["traceback"].endswith("RuntimeError: one\ntwo")


def test_an_unexpected_exception_stands_behind_bars_so_that_its_text_forges_no_event():
    forged = RuntimeError("x\n12:00:00 INFO  round committed  run=evil\u202812:00:00 FATAL \x1b[2J")
    first, *rest = logged(logging.ERROR, "bug", exc_info=forged).removesuffix("\n").split("\n")
    assert without_time(first) == "ERROR bug"
    assert rest[0] == "         | RuntimeError: x"
    assert rest[1] == "         | 12:00:00 INFO  round committed  run=evil"
    assert all(line.startswith("         | ") and line.isprintable() for line in rest)


def test_exc_info_true_takes_the_exception_being_handled_and_none_is_no_error():
    assert "traceback" not in logged(logging.ERROR, "bug", format="json", exc_info=True)
    try:
        failed.missing  # noqa: B018
    except AttributeError:
        assert "AttributeError" in logged(logging.ERROR, "bug", exc_info=True)


def test_the_level_holds_for_ours_and_libraries_are_heard_from_warning_on():
    stream = io.StringIO()
    setup("human", "debug", stream)
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("a %s", "warning")
    logging.getLogger("edge_agent.service").debug("detail")
    assert [without_time(line) for line in stream.getvalue().splitlines()] == ["WARN  a warning", "DEBUG detail"]
    setup("human", "error", stream)
    logging.getLogger("some.library").warning("no more")
    log_event(LOGGER, logging.WARNING, "no more")
    assert "no more" not in stream.getvalue()


def test_setting_up_again_replaces_the_stream_and_doubles_no_line():
    first, second = io.StringIO(), io.StringIO()
    setup("human", "info", first)
    setup("json", "info", second)
    log_event(LOGGER, logging.INFO, "once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_standard_error_is_the_stream_when_none_is_named(capsys):
    setup()
    log_event(LOGGER, logging.INFO, "seen")
    assert capsys.readouterr().err.endswith("INFO  seen\n")


def test_a_library_whose_own_call_is_wrong_still_gives_its_line():
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "%d of %d", "args": ("x",)})
    assert without_time(HumanFormatter().format(record)) == "ERROR %d of %d"


def test_a_warning_is_an_event_like_any_other():
    stream = io.StringIO()
    setup("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old\nway", stacklevel=1)
    assert json.loads(stream.getvalue())["logger"] == "py.warnings"
