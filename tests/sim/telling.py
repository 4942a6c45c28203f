"""What stories of a federation are told with: run it to a point, lose, hear and repeat what is said."""

from __future__ import annotations

from collections.abc import Callable

from midge.transport.base import MessageReceived
from tests.sim.federation import Federation, told
from tests.sim.process import Process

Matches = Callable[[str, MessageReceived], bool]
"""Whether a message is meant, by the id of the client whom it reaches and the message."""


def run(federation: Federation, limit_s: float = 60.0) -> None:
    """Start it, unless it was, and run it to its end."""
    with told(federation, "this test"):
        if federation.coordinator.generation == 0:
            federation.start()
        assert federation.run(lambda: federation.is_done, limit_s), "I6: it did not come to its end"


def until_training(federation: Federation, round_num: int) -> None:
    """Start it, unless it was, and run it until somebody trains in this round."""
    if federation.coordinator.generation == 0:
        federation.start()
    assert federation.run(lambda: any(number == round_num for number, _ in federation.auditor.trainings), 60.0)


def until_committed(federation: Federation, limit_s: float) -> float:
    """Run it until the next version is committed; returns the seconds that this took."""
    before, began = federation.num_committed, federation.now
    with told(federation, "this test"):
        committed = federation.run(lambda: federation.num_committed > before, federation.now + limit_s)
        assert committed, f"I6: no version after version {before} within {limit_s} s"
    return federation.now - began


def losing(federation: Federation, matches: Matches, times: int) -> list[MessageReceived]:
    """Have the broker lose the first messages that match, `times` of them; they are noted in the list."""
    lost: list[MessageReceived] = []
    send = federation.broker.send

    def send_or_lose(client, event, *, faultless=False):
        if isinstance(event, MessageReceived) and len(lost) < times and matches(client.client_id, event):
            lost.append(event)
        else:
            send(client, event, faultless=faultless)

    federation.broker.send = send_or_lose
    return lost


def hearing(federation: Federation) -> list[tuple[Process, MessageReceived]]:
    """Note from now on whatever reaches somebody, in the list."""
    heard: list[tuple[Process, MessageReceived]] = []
    send = federation.broker.send

    def send_and_note(client, event, *, faultless=False):
        if isinstance(event, MessageReceived):
            heard.extend((process, event) for process in federation.processes if process.transport is client)
        send(client, event, faultless=faultless)

    federation.broker.send = send_and_note
    return heard


def repeat(federation: Federation, heard: list[tuple[Process, MessageReceived]]) -> None:
    """Have all of this reach the same processes again, as far as they are connected now."""
    for process, event in heard[:]:
        if process.transport is not None:
            federation.broker.send(process.transport, event)
