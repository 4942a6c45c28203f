"""Settings: from a file, the environment and the command line to one frozen struct.

A kind of settings is a frozen `msgspec.Struct`. Each field carries `msgspec.Meta` with its limits and a description, and
its name ends in its unit (`round_deadline_s`). Sources, each overriding the ones before it:

    the struct's defaults  <  a .toml or .json file  <  MIDGE_<KEY>  <  options such as --rounds  <  --set key=value

Every value of every source is checked, also one that a later source overrides: a mistake that is hidden today bites on
the day the other source goes away. All problems are reported together, a line each: the place, what was seen, what was
expected. What is secret (a field of type `Secret`, the user's part of a URL) is in no message and in no `repr`.

The environment and `--set` hold text, which is read by the field's type: `true` or `no` for a switch, `1,2,3` for a list,
`site=lab,floor=2` for a table. An empty environment variable counts as not given, since Compose files leave them behind.

The file reads from the outside in: what callers use, the sources, one value, its words, names that are nearly right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta

from midge.wire.identifiers import MAX_TASK_NAME, is_identifier, task_name

ENVIRONMENT_PREFIX = "MIDGE_"

Secret = Annotated[str, Meta(max_length=65_535, extra={"secret": True})]
"""Text that no message shows."""
Text = Annotated[str, Meta(max_length=1000)]
Seconds = Annotated[float, Meta(ge=0.1, le=604_800)]
"""A duration, from a tenth of a second to a week."""

S = TypeVar("S", bound=msgspec.Struct)


class SettingsError(ValueError):
    """The settings cannot be used. Its text has one line for each of `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check found in settings whose fields are each right.

    Attributes:
        key: the field to complain about.
        text: what follows the key in the message, such as "is 5, above cohort (3): lower it, or raise cohort".
        involves: other fields that were looked at; the problem is dropped where one of them is itself wrong.
    """

    key: str
    text: str
    involves: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a file whose keys are not ours: our key, the value, and the key that it was made of."""

    key: str
    value: object
    written: str


Translate = Callable[[Mapping[str, Any], Collection[str]], tuple[list[Entry], list[Problem]] | None]
"""Makes entries of a file's keys and values, given the names of our settings; None for a file with keys of ours."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the reference, in words for a person."""

    key: str
    type: str
    default: str
    limits: str
    description: str


def load(
    kind: type[S],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, object | None] | None = None,
    assignments: Sequence[str] = (),
    check: Callable[[S], Sequence[Problem]] | None = None,
    ignore: Collection[str] = (),
    table: str = "",
    other_tables: Collection[str] = (),
    translate: Translate | None = None,
) -> S:
    """Settings of this `kind`, from all sources.

    Args:
        kind: a frozen struct with keyword-only fields.
        file: a .toml or .json file, or None.
        environ: the environment; of it, names that start with MIDGE_, which must all be known.
        options: the command line's own options by key; None where one was not given. Text is read as in the
            environment, several texts as one list.
        assignments: `key=value` each, from `--set`; the last one of a key counts.
        check: finds what is wrong between fields, or needs more than a limit to say.
        ignore: names in the environment that are no settings, such as MIDGE_CONFIG.
        table: of the file, take what stands in this table, where there is one; empty for the top of the file.
        other_tables: of the file, leave these to others.
        translate: reads files with other keys than these.

    Raises:
        SettingsError: something is wrong; it holds every problem that was found.
        TypeError: an option is no field of `kind`: a bug in the command line.
    """
    fields = _fields(kind)
    if unknown := set(options or {}) - set(fields):
        raise TypeError(f"options {sorted(unknown)}: {kind.__module__}.{kind.__name__} has no such fields")
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    wrong: set[str] = set()
    for given in (
        *_from_file(file, problems, fields, table, other_tables, translate),
        *_from_environment(environ or {}, ignore),
        *_from_options(options or {}),
        *_from_assignments(assignments, problems),
    ):
        if given.key not in fields:
            problems.append(f"{given.place}: {_unknown(given, fields)}")
            continue
        places[given.key] = given.place
        try:
            values[given.key] = _convert(given, fields[given.key])
        except ValueError as error:
            problems.append(f"{given.place}: {error}")
            wrong.add(given.key)
    missing = [field for field in fields.values() if field.default is NODEFAULT and field.key not in values]
    problems += [f"{one.key} is not given: expected {_expected(one)}" for one in missing if one.key not in wrong]
    if not missing:
        settings = kind(**values)
        for found in check(settings) if check else ():
            if wrong.isdisjoint(involved := (found.key, *found.involves)):
                place = next((places[key] for key in involved if key in places), "default")
                problems.append(f"{place}: {found.key} {found.text}")
    if problems:
        raise SettingsError(problems)
    return settings


def describe(kind: type[msgspec.Struct]) -> list[Setting]:
    """The reference of a kind of settings, in the order of its fields."""
    return [
        Setting(field.key, _type_words(field.type), _default_words(field), _limits(field), field.meta["description"])
        for field in _fields(kind).values()
    ]


def markdown(kind: type[msgspec.Struct]) -> str:
    """`describe` as a table in Markdown: docs/configuration.md holds it word for word."""
    rows = [(f"`{row.key}`", row.type, row.default, row.limits, row.description) for row in describe(kind)]
    header = [("key", "type", "default", "unit and range", "meaning"), ("---",) * 5]
    return "\n".join("| " + " | ".join(cell or "-" for cell in row) + " |" for row in header + rows)


def redacted(settings: msgspec.Struct) -> dict[str, Any]:
    """The values by key, with what is secret replaced: safe to print and to log."""
    shown = {}
    for key, field in _fields(type(settings)).items():
        value = getattr(settings, key)
        if isinstance(value, str):
            value = "(hidden)" if value and field.is_secret else _without_user(value)
        shown[key] = value
    return shown


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides need: the way to the broker, the federation, the task and the log."""

    broker: Annotated[
        Text, Meta(description="URL of the broker: `mqtt://`, `mqtts://`, `ws://` or `wss://`, then host and port.")
    ] = "mqtt://127.0.0.1:1883"
    federation: Annotated[
        str, Meta(description="Name that a coordinator and its agents share: 1 to 64 of a-z, 0-9, `_` and `-`.")
    ] = "default"
    task: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=1000,
            description="What is learned: a built-in, `package.module:object`, or a file, as `my_task.py`.",
        ),
    ] = "digits"
    username: Annotated[Text, Meta(description="User name at the broker; empty for none.")] = ""
    password: Annotated[Secret, Meta(description="Password at the broker; `password_file` keeps it off screens.")] = ""
    password_file: Annotated[Text, Meta(description="File whose first line is the password.")] = ""
    ca_file: Annotated[
        Text,
        Meta(description="PEM file of the authorities that may sign the broker's certificate; empty: the system's."),
    ] = ""
    cert_file: Annotated[Text, Meta(description="PEM file of our own certificate; goes with `key_file`.")] = ""
    key_file: Annotated[Text, Meta(description="PEM file of our own certificate's private key.")] = ""
    log_format: Annotated[
        Literal["human", "json"], Meta(description="Lines for a person, or one JSON object a line.")
    ] = "human"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least severe events that are logged.")
    ] = "info"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in redacted(self).items())})"

    def read_password(self) -> str:
        """The password, from wherever it is; empty for none.

        Raises:
            SettingsError: the password file cannot be read, or its first line is empty.
        """
        if not self.password_file:
            return self.password
        try:
            password = Path(self.password_file).read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError([f"password_file {_shown(self.password_file)}: {_reason(error)}"]) from None
        if not password:
            raise SettingsError([f"password_file {_shown(self.password_file)}: its first line is empty"])
        return password


def check_common(settings: CommonSettings) -> list[Problem]:
    """What is wrong with the fields that both sides have, beyond their limits."""
    found = []
    if not re.match(r"(?:mqtts?|wss?)://[^/]", settings.broker, re.IGNORECASE):
        expected = "expected a URL such as mqtt://127.0.0.1:1883 (or mqtts://, ws://, wss://)"
        found.append(Problem("broker", f"is {_shown(settings.broker)}: {expected}"))
    found += check_identifier("federation", settings.federation)
    name = task_name(settings.task)
    if len(name) > MAX_TASK_NAME:
        text = (
            f"is {_shown(settings.task)}: {len(name)} characters without directories, expected at most {MAX_TASK_NAME}"
        )
        found.append(Problem("task", text))
    if settings.password and settings.password_file:
        found.append(Problem("password_file", "is given, and password too: keep one of them", ("password",)))
    if bool(settings.cert_file) != bool(settings.key_file):
        given, other = ("cert_file", "key_file") if settings.cert_file else ("key_file", "cert_file")
        found.append(Problem(given, f"is given without {other}: the two go together", (other,)))
    return found


def check_identifier(key: str, text: str) -> list[Problem]:
    """Nothing, or that the field `key` holds no identifier."""
    expected = "expected 1 to 64 characters of a-z, 0-9, _ and -, starting with a-z or 0-9"
    return [] if is_identifier(text) else [Problem(key, f"is {_shown(text)}: {expected}")]


# The sources, in rising precedence.


@dataclass(frozen=True, slots=True)
class _Given:
    """A value, the place it stands at, and how a key is spelled there."""

    place: str
    key: str
    value: object
    is_text: bool = False
    spelling: str = "{}"


def _from_file(
    file: Path | None,
    problems: list[str],
    known: Collection[str],
    table: str,
    other_tables: Collection[str],
    translate: Translate | None,
) -> Iterator[_Given]:
    if file is None:
        return
    try:
        text, values = _read(file)
    except (OSError, ValueError) as error:
        problems.append(f"{_plain(str(file))}: {_reason(error)}")
        return
    name = _plain(file.name)
    if table:
        inner = values.get(table, {})
        if isinstance(inner, dict):
            yield from (_Given(f"{name}, [{table}]", key, value) for key, value in inner.items())
        else:
            problems.append(f"{name}: {table} is {_shown(inner)}: expected a table, [{table}]")
        return
    values = {key: value for key, value in values.items() if key not in other_tables}

    def place(key: str) -> str:
        line = _line_of(key, text, is_json=file.suffix == ".json")
        return f"{name}, line {line}" if line else name

    translated = translate(values, known) if translate else None
    if translated is None:
        for key, value in values.items():
            yield _Given(place(key), key, value)
        return
    entries, found = translated
    problems += [f"{place(problem.key)}: {_plain(problem.key)} {problem.text}" for problem in found]
    for entry in entries:
        written = "" if entry.written == entry.key else f" ({entry.written})"
        yield _Given(f"{place(entry.written)}{written}", entry.key, entry.value)


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    # Imported here, like difflib below, so that an agent which needs none of them stays small.
    if file.suffix not in {".toml", ".json"}:
        raise ValueError(f"the name ends in {file.suffix or 'no suffix'}: expected .toml or .json")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".toml":
        import tomllib  # noqa: PLC0415

        return text, tomllib.loads(text)
    import json  # noqa: PLC0415

    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("expected one JSON object of keys and values, {...}")  # noqa: TRY004 - the file is wrong
    return text, values


def _line_of(key: str, text: str, *, is_json: bool) -> int:
    """The line that the top-level `key` stands on, found by scanning; 0 where that is not certain."""
    word = re.escape(key)
    if is_json:
        starts = [match.start() for match in re.finditer(rf'"{word}"\s*:', text)]
        return text.count("\n", 0, starts[0]) + 1 if len(starts) == 1 else 0
    entry, table = re.compile(rf"""\s*["']?{word}["']?\s*[=.]"""), re.compile(rf"""\s*\[+\s*["']?{word}["']?\s*[].]""")
    at_top = True
    for number, line in enumerate(text.split("\n"), 1):
        if table.match(line) or (at_top and entry.match(line)):
            return number
        at_top = at_top and not line.lstrip().startswith("[")
    return 0


def _from_environment(environ: Mapping[str, str], ignore: Collection[str]) -> Iterator[_Given]:
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in ignore and environ[name]:
            key = name.removeprefix(ENVIRONMENT_PREFIX)
            key = key.lower() if key.isupper() else key
            yield _Given(f"environment {_plain(name)}", key, environ[name], is_text=True, spelling="MIDGE_{}")


def _from_options(options: Mapping[str, object | None]) -> Iterator[_Given]:
    for key, value in options.items():
        if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
            yield _Given(f"--{key.replace('_', '-')}", key, ",".join(value), is_text=True)
        elif value is not None:
            yield _Given(f"--{key.replace('_', '-')}", key, value, is_text=isinstance(value, str))


def _from_assignments(assignments: Sequence[str], problems: list[str]) -> Iterator[_Given]:
    for number, assignment in enumerate(assignments, 1):
        key, equals, value = assignment.partition("=")
        if equals:
            yield _Given(f"--set {_plain(key.strip())}", key.strip(), value, is_text=True)
        else:  # and it is not shown, since it may be a password
            problems.append(f"--set, number {number} of {len(assignments)}: has no '=' in it: expected key=value")


# One value: from what was given to what the field holds.

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_LIMITS = ("ge", "gt", "le", "lt", "min_length", "max_length", "description")


@dataclass(frozen=True, slots=True)
class _Field:
    key: str
    type: Any
    default: object
    meta: dict[str, Any]

    @property
    def unit(self) -> str:
        return next((unit for suffix, unit in _UNITS.items() if self.key.endswith(suffix)), "")

    @property
    def is_secret(self) -> bool:
        return bool(self.meta.get("secret"))


def _fields(kind: type[msgspec.Struct]) -> dict[str, _Field]:
    found = {}
    for info in msgspec.structs.fields(kind):
        _, meta, _ = _peel(info.type)
        default = info.default if info.default_factory is NODEFAULT else info.default_factory
        found[info.name] = _Field(info.name, info.type, default, {"description": ""} | meta)
    return found


def _peel(kind: Any) -> tuple[Any, dict[str, Any], bool]:
    """A type without its annotations, what they say, and whether None is allowed besides it."""
    meta: dict[str, Any] = {}
    optional = False
    while True:
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            for note in notes:
                said = {name: getattr(note, name) for name in _LIMITS} | (note.extra or {})
                meta |= {name: limit for name, limit in said.items() if limit is not None}
        elif get_origin(kind) in {Union, UnionType} and NoneType in get_args(kind):
            kind, optional = Union[tuple(one for one in get_args(kind) if one is not NoneType)], True  # noqa: UP007
        else:
            return kind, meta, optional


def _convert(given: _Given, field: _Field) -> object:
    """The field's value.

    Raises:
        ValueError: it is none; the message says what was seen and what was expected.
    """
    try:
        return _value(given, field)
    except (ValueError, KeyError, msgspec.ValidationError):
        seen = "(hidden)" if field.is_secret else _shown(given.value)
        hint = _unit_hint(field, given.value)
        raise ValueError(f"{field.key} is {seen}: expected {_expected(field)}{hint}") from None


def _value(given: _Given, field: _Field) -> object:
    value = given.value
    if given.is_text and isinstance(value, str):
        value = _parse(value if field.is_secret else value.strip(), field.type)
    if get_origin(_peel(field.type)[0]) is Literal and isinstance(value, str):
        value = value.lower()
    value = msgspec.convert(value, field.type)
    if not _travels(value):
        raise ValueError("not finite, above 64 bits, or not Unicode")
    return value


def _parse(text: str, kind: Any) -> object:
    base, _, optional = _peel(kind)
    if optional and text.lower() in {"", "none"}:
        return None
    if base is bool:
        return _SWITCH[text.lower()]
    if base is int or base is float:
        return base(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(base) is tuple:
        return tuple(_parse(part, get_args(base)[0]) for part in parts)
    if get_origin(base) is dict:
        pairs = {key.strip(): value.strip() for key, equals, value in (part.partition("=") for part in parts) if equals}
        if len(pairs) != len(parts):
            raise ValueError("a part without '=', or a name twice")
        return {key: _parse(value, get_args(base)[1]) for key, value in pairs.items()}
    return _parse_scalar(text) if get_origin(base) in {Union, UnionType} else text


def _parse_scalar(text: str) -> object:
    if text.lower() in {"true", "false"}:
        return _SWITCH[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _travels(value: object) -> bool:
    """Whether a message could carry `value`: finite, of 64 bits, encodable. What limits cannot say."""
    match value:
        case str():
            return re.search("[\ud800-\udfff]", value) is None
        case int():
            return -(2**63) <= value < 2**63
        case float():
            return math.isfinite(value)
        case dict():
            return all(map(_travels, value)) and all(map(_travels, value.values()))
        case _:
            return True


# Words: what was seen and what was expected.

_UNITS = {"_s": "seconds", "_mb": "MiB"}
_SCALES = {
    "seconds": {"ms": 0.001, "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600},
    "MiB": {"kb": 1 / 1024, "kib": 1 / 1024, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024},
}
_QUANTITY = re.compile(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]+)\s*", re.IGNORECASE)
_EXAMPLES = {tuple: "1,2,3 (in a file [1, 2, 3])", dict: 'a=1,b=2 (in a file a table, { a = "1", b = "2" })'}


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else _without_user(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _without_user(text: str) -> str:
    """`text` without the name and password of a URL, also of one that lacks its scheme."""
    pattern = r"(//).*@" if "//" in text else r"()[^\s'\"]*:.*@"
    return re.sub(pattern, r"\1(hidden)@", text, flags=re.DOTALL)


def _plain(name: str) -> str:
    """A key or a path: as it is where nobody could mistake it, else quoted; it never breaks the line."""
    return name if re.fullmatch(r"[\w./ -]{1,255}", name, re.ASCII) and name.strip() == name else _shown(name)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _type_words(kind: Any) -> str:
    base, _, optional = _peel(kind)
    if optional:
        return f"{_type_words(base)}, or none"
    if base in (words := {bool: "true or false", int: "whole number", float: "number", str: "text"}):
        return words[base]
    if get_origin(base) is Literal:
        *others, last = map(str, get_args(base))
        return f"{', '.join(others)} or {last}" if others else last
    return (
        f"list of {_plural(_type_words(get_args(base)[0]))}"
        if get_origin(base) is tuple
        else "table of names and values"
    )


def _plural(words: str) -> str:
    first, of, rest = words.partition(" of ")
    return f"{first}s{of}{rest}"


def _expected(field: _Field) -> str:
    base, _, _ = _peel(field.type)
    words = _type_words(field.type)
    article = "" if base in {bool, str} or get_origin(base) is Literal else "a "
    unit = f" of {field.unit}" if field.unit else ""
    limits = f", {_range(field.type)}" if _range(field.type) else ""
    example = _EXAMPLES.get(get_origin(base) or base)
    return f"{article}{words}{unit}{limits}{f', such as {example}' if example else ''}"


def _limits(field: _Field) -> str:
    return ", ".join(filter(None, (field.unit, _range(field.type))))


def _range(kind: Any) -> str:
    base, meta, _ = _peel(kind)
    if get_origin(base) is tuple:
        each = _range(get_args(base)[0])
        return f"each {each.removeprefix('each ')}" if each else ""
    least, most = meta.get("ge", meta.get("min_length")), meta.get("le", meta.get("max_length"))
    things = " entries" if get_origin(base) is dict else " characters" if base is str else ""
    if least is not None and most is not None:
        return f"{_number(least)} to {_number(most)}{things}"
    words = [("at least", least), ("above", meta.get("gt")), ("at most", most), ("below", meta.get("lt"))]
    said = " and ".join(f"{word} {_number(limit)}" for word, limit in words if limit is not None)
    return said and said + things


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")


def _default_words(field: _Field) -> str:
    if (words := field.meta.get("default")) is not None:
        return str(words)
    if field.default is NODEFAULT:
        return "must be given"
    value = field.default() if callable(field.default) else field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    return f"`{value}`" if value else ""


def _unit_hint(field: _Field, value: object) -> str:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) and field.unit else None
    if match is None:
        return ""
    scales, unit = _SCALES[field.unit], match[2].lower()
    if (scale := scales.get(unit, scales.get(unit.removesuffix("s")))) is None:
        return ""
    number = _number(float(match[1]) * scale)
    return f"; {match[0].strip()} is {number} {field.unit}: write {number}"


# Names that are nearly right.

_UNIT_SUFFIX = re.compile(
    r"_(?:ms|millis|milliseconds|s|secs?|seconds?|m|mins?|minutes?|h|hours?|kb|mb|mib|gb|gib|bytes)$"
)
_SYNONYMS = {
    "lr": "learning_rate", "server_lr": "server_learning_rate", "epochs": "local_epochs", "global_epochs": "rounds",
    "k": "cohort", "clients": "min_agents", "agents": "min_agents", "min_clients": "min_agents", "model": "task",
    "model_name": "task", "url": "broker", "host": "broker", "server": "broker", "mqtt": "broker", "user": "username",
    "id": "agent_id", "name": "agent_id", "client_id": "agent_id", "part": "index", "parts": "of", "port": "http_port",
    "ca": "ca_file", "cert": "cert_file", "key": "key_file", "deadline": "round_deadline_s", "timeout": "round_deadline_s",
}  # fmt: skip


def _unknown(given: _Given, fields: Mapping[str, _Field]) -> str:
    seen = f"unknown setting {_plain(given.key)}"
    if near := _nearest(given.key, fields):
        unit = f" ({fields[near].unit})" if fields[near].unit else ""
        right = given.spelling.format(near if given.spelling == "{}" else near.upper())
        return f"{seen}: did you mean {right}{unit}?"
    if isinstance(given.value, dict):
        return f"{seen}: expected keys at the top of the file, under no [heading]"
    return f"{seen}: no name is near to it; docs/configuration.md lists them all"


def _nearest(key: str, names: Collection[str]) -> str:
    """The setting that `key` was meant for: by another unit, by a synonym, by spelling; empty where there is none."""
    from difflib import get_close_matches  # noqa: PLC0415

    word = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:100]).lower().replace("-", "_")
    stem = _UNIT_SUFFIX.sub("", word)
    plain = re.sub(r"^(?:num|n|number_of)_", "", stem)
    for wanted in (word, stem, plain, *(_SYNONYMS.get(one, "") for one in (word, stem, plain))):
        for name in names:
            if wanted in {name, _UNIT_SUFFIX.sub("", name)}:
                return name
    return next(iter(get_close_matches(word, names, n=1, cutoff=0.7)), "")
