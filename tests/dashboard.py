"""Reads Grafana dashboards and PromQL for tests: which queries a dashboard makes, and which metrics and labels a query uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_METRIC = re.compile(r"\bmidge_[a-z0-9_]*")
_SELECTOR = re.compile(r"\b(midge_[a-z0-9_]*)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def load(path: Path) -> dict[str, Any]:
    """A dashboard's JSON."""
    dashboard: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dashboard


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Its panels, those of collapsed rows too; rows themselves are none."""
    for panel in dashboard["panels"]:
        yield from panel.get("panels", ())
        if panel["type"] != "row":
            yield panel


def panel_queries(path: Path) -> list[tuple[str, str]]:
    """Every query of a dashboard: the title of its panel, and its expression with Grafana's variables in it."""
    return [(panel["title"], target["expr"]) for panel in panels(load(path)) for target in panel["targets"]]


def substitute(expr: str, federation: str, run: str, *, window: str = "5m", rate_interval: str = "1m") -> str:
    """The expression that Grafana sends to Prometheus, with values for its variables.

    Args:
        expr: of a panel.
        federation: value of `$federation`.
        run: value of `$run`.
        window: value of `$window`, and of `$__range`, the shown time.
        rate_interval: value of `$__rate_interval`; at least four scrapes.

    Raises:
        ValueError: a variable is left over that this function does not know.
    """
    values = {
        "$__rate_interval": rate_interval,
        "$__range": window,
        "$window": window,
        "$federation": federation,
        "$run": run,
    }
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    if "$" in expr:
        raise ValueError(f"{expr}: expected no variables but {', '.join(values)}")
    return expr


def metrics_used(expr: str) -> set[str]:
    """Names of the series that an expression reads, as they are in it (`..._bucket`, not the histogram's)."""
    return set(_METRIC.findall(expr))


def matchers(expr: str) -> list[tuple[str, str, str, str]]:
    """(metric, label, operator, value) of each label matcher in an expression."""
    return [
        (metric, label, operator, value)
        for metric, inside in _SELECTOR.findall(expr)
        for label, operator, value in _MATCHER.findall(inside)
    ]
