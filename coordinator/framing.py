"""How a run cuts its vectors: as the narrowest connection needs it, whatever one agent may say of its own."""

from __future__ import annotations

from midge.wire.errors import FrameError
from midge.wire.frames import Framing, plan_framing


def choose_framing(num_elements: int, broker_limit_bytes: int | None, agents_limit_bytes: int | None) -> Framing:
    """Cut a vector of `num_elements` within the packet limits of our own connection and of the agents'.

    A limit that agents name and no run could keep to, such as one byte, is passed over: it must not keep all others waiting.

    Raises:
        FrameError: our own connection is too narrow for this model.
    """
    limits = [limit for limit in (broker_limit_bytes, agents_limit_bytes) if limit is not None]
    try:
        return plan_framing(num_elements, min(limits, default=None))
    except FrameError:
        return plan_framing(num_elements, broker_limit_bytes)
