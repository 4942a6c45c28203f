"""A duration in words, for status lines."""

from __future__ import annotations

_MINUTE_S = 60
_HOUR_S = 3600


def in_words(duration_s: float) -> str:
    """Such as "87 s", "9 min 58 s" and "2 h 5 min": seconds below two minutes, hours from two hours on; never below 0 s."""
    seconds = max(0, round(duration_s))
    if seconds < 2 * _MINUTE_S:
        return f"{seconds} s"
    if seconds < 2 * _HOUR_S:
        return _parts(seconds // _MINUTE_S, "min", seconds % _MINUTE_S, "s")
    return _parts(seconds // _HOUR_S, "h", seconds % _HOUR_S // _MINUTE_S, "min")


def _parts(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit} {small} {small_unit}" if small else f"{large} {large_unit}"
