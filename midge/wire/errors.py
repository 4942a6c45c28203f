"""What can be wrong with bytes that came from outside: always the peer's fault, never ours."""

from __future__ import annotations


class WireError(ValueError):
    """Bytes, a topic or a value from a peer breaks the protocol. The receiver counts it and goes on."""


class TopicError(WireError):
    """A topic, or an identifier for one, is not of the protocol."""


class MessageError(WireError):
    """A message is not JSON of the expected type, or a field is outside its limits."""


class LayoutError(WireError):
    """A layout is not well formed, or two layouts that must be equal differ."""


class FrameError(WireError):
    """A frame is truncated, corrupt or not of the expected shape."""
