"""Names that are nearly right: the setting that an unknown one was meant for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from midge.settings.fields import Field
from midge.settings.sources import Given
from midge.settings.words import plain_name

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


def unknown(given: Given, fields: Mapping[str, Field]) -> str:
    """What to say of a key that is no setting."""
    seen = f"unknown setting {plain_name(given.key)}"
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
