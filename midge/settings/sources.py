"""The sources of settings, in rising precedence: a file, the environment, options, `--set`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midge.settings.problems import Problem
from midge.settings.words import plain_name, reason_of, shown

ENVIRONMENT_PREFIX = "MIDGE_"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a file whose keys are not ours: our key, the value, and the key that it was made of."""

    key: str
    value: object
    written: str


Translate = Callable[[Mapping[str, Any], Collection[str]], tuple[list[Entry], list[Problem]] | None]
"""Makes entries of a file's keys and values, given the names of our settings; None for a file with keys of ours."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value, the place it stands at, and how a key is spelled there."""

    place: str
    key: str
    value: object
    is_text: bool = False
    spelling: str = "{}"


def from_file(
    file: Path | None,
    problems: list[str],
    known: Collection[str],
    table: str,
    other_tables: Collection[str],
    translate: Translate | None,
) -> Iterator[Given]:
    """What a file says, each value with its line where that is certain; what is wrong with the file goes to `problems`."""
    if file is None:
        return
    try:
        text, values = _read(file)
    except (OSError, ValueError) as error:
        problems.append(f"{plain_name(str(file))}: {reason_of(error)}")
        return
    name = plain_name(file.name)
    if table:
        inner = values.get(table, {})
        if isinstance(inner, dict):
            yield from (Given(f"{name}, [{table}]", key, value) for key, value in inner.items())
        else:
            problems.append(f"{name}: {table} is {shown(inner)}: expected a table, [{table}]")
        return
    values = {key: value for key, value in values.items() if key not in other_tables}

    def place(key: str) -> str:
        line = _line_of(key, text, is_json=file.suffix == ".json")
        return f"{name}, line {line}" if line else name

    translated = translate(values, known) if translate else None
    if translated is None:
        for key, value in values.items():
            yield Given(place(key), key, value)
        return
    entries, found = translated
    problems += [f"{place(problem.key)}: {plain_name(problem.key)} {problem.text}" for problem in found]
    for entry in entries:
        written = "" if entry.written == entry.key else f" ({entry.written})"
        yield Given(f"{place(entry.written)}{written}", entry.key, entry.value)


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


def from_environment(environ: Mapping[str, str], ignore: Collection[str]) -> Iterator[Given]:
    """What the environment says: all names with our prefix, but for those to ignore and those without a value."""
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in ignore and environ[name]:
            key = name.removeprefix(ENVIRONMENT_PREFIX)
            key = key.lower() if key.isupper() else key
            yield Given(f"environment {plain_name(name)}", key, environ[name], is_text=True, spelling="MIDGE_{}")


def from_options(options: Mapping[str, object | None]) -> Iterator[Given]:
    """What the options of the command line say."""
    for key, value in options.items():
        if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
            yield Given(f"--{key.replace('_', '-')}", key, ",".join(value), is_text=True)
        elif value is not None:
            yield Given(f"--{key.replace('_', '-')}", key, value, is_text=isinstance(value, str))


def from_assignments(assignments: Sequence[str], problems: list[str]) -> Iterator[Given]:
    """What `--set key=value` says."""
    for number, assignment in enumerate(assignments, 1):
        key, equals, value = assignment.partition("=")
        if equals:
            yield Given(f"--set {plain_name(key.strip())}", key.strip(), value, is_text=True)
        else:  # and it is not shown, since it may be a password
            problems.append(f"--set, number {number} of {len(assignments)}: has no '=' in it: expected key=value")
