"""From all sources to one struct."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import NODEFAULT

from midge.settings.fields import fields_of
from midge.settings.names import unknown
from midge.settings.problems import Problem, SettingsError
from midge.settings.sources import Translate, from_assignments, from_environment, from_file, from_options
from midge.settings.values import convert
from midge.settings.words import expected

S = TypeVar("S", bound=msgspec.Struct)


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
    fields = fields_of(kind)
    if strangers := set(options or {}) - set(fields):
        raise TypeError(f"options {sorted(strangers)}: {kind.__module__}.{kind.__name__} has no such fields")
    problems: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    wrong: set[str] = set()
    for given in (
        *from_file(file, problems, fields, table, other_tables, translate),
        *from_environment(environ or {}, ignore),
        *from_options(options or {}),
        *from_assignments(assignments, problems),
    ):
        if given.key not in fields:
            problems.append(f"{given.place}: {unknown(given, fields)}")
            continue
        places[given.key] = given.place
        try:
            values[given.key] = convert(given, fields[given.key])
        except ValueError as error:
            problems.append(f"{given.place}: {error}")
            wrong.add(given.key)
    missing = [field for field in fields.values() if field.default is NODEFAULT and field.key not in values]
    problems += [f"{one.key} is not given: expected {expected(one)}" for one in missing if one.key not in wrong]
    if not missing:
        settings = kind(**values)
        for found in check(settings) if check else ():
            if wrong.isdisjoint(involved := (found.key, *found.involves)):
                place = next((places[key] for key in involved if key in places), "default")
                problems.append(f"{place}: {found.key} {found.text}")
    if problems:
        raise SettingsError(problems)
    return settings
