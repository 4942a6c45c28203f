"""The settings that both sides have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from midge.settings.problems import Problem, SettingsError
from midge.settings.reference import redacted
from midge.settings.words import reason_of, shown
from midge.wire.identifiers import MAX_TASK_NAME, is_identifier, task_name

Secret = Annotated[str, Meta(max_length=65_535, extra={"secret": True})]
"""Text that no message shows."""
Text = Annotated[str, Meta(max_length=1000)]
Seconds = Annotated[float, Meta(ge=0.1, le=604_800)]
"""A duration, from a tenth of a second to a week."""


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
            raise SettingsError([f"password_file {shown(self.password_file)}: {reason_of(error)}"]) from None
        if not password:
            raise SettingsError([f"password_file {shown(self.password_file)}: its first line is empty"])
        return password


def check_common(settings: CommonSettings) -> list[Problem]:
    """What is wrong with the fields that both sides have, beyond their limits."""
    found = []
    if not re.match(r"(?:mqtts?|wss?)://[^/]", settings.broker, re.IGNORECASE):
        expected = "expected a URL such as mqtt://127.0.0.1:1883 (or mqtts://, ws://, wss://)"
        found.append(Problem("broker", f"is {shown(settings.broker)}: {expected}"))
    found += check_identifier("federation", settings.federation)
    name = task_name(settings.task)
    if len(name) > MAX_TASK_NAME:
        text = (
            f"is {shown(settings.task)}: {len(name)} characters without directories, expected at most {MAX_TASK_NAME}"
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
    return [] if is_identifier(text) else [Problem(key, f"is {shown(text)}: {expected}")]
