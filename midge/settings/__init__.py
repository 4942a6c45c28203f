"""Settings: from a file, the environment and the command line to one frozen struct.

A kind of settings is a frozen `msgspec.Struct`. Each field carries `msgspec.Meta` with its limits and a description, and
its name ends in its unit (`round_deadline_s`). Sources, each overriding the ones before it:

    the struct's defaults  <  a .toml or .json file  <  MIDGE_<KEY>  <  options such as --rounds  <  --set key=value

Every value of every source is checked, also one that a later source overrides: a mistake that is hidden today bites on
the day the other source goes away. All problems are reported together, a line each: the place, what was seen, what was
expected. What is secret (a field of type `Secret`, the user's part of a URL) is in no message and in no `repr`.

The environment and `--set` hold text, which is read by the field's type: `true` or `no` for a switch, `1,2,3` for a list,
`site=lab,floor=2` for a table. An empty environment variable counts as not given, since Compose files leave them behind.

From the outside in: loading.py, the sources, one value, its words, names that are nearly right. common.py has what both sides
need; reference.py describes a kind of settings for the documentation.
"""

from __future__ import annotations

from midge.settings.common import CommonSettings, Seconds, Secret, Text, check_common, check_identifier
from midge.settings.loading import load
from midge.settings.problems import Problem, SettingsError
from midge.settings.reference import Setting, describe, markdown, redacted
from midge.settings.sources import ENVIRONMENT_PREFIX, Entry, Translate

__all__ = [
    "ENVIRONMENT_PREFIX",
    "CommonSettings",
    "Entry",
    "Problem",
    "Seconds",
    "Secret",
    "Setting",
    "SettingsError",
    "Text",
    "Translate",
    "check_common",
    "check_identifier",
    "describe",
    "load",
    "markdown",
    "redacted",
]
