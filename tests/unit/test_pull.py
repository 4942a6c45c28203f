"""Pulling a model: the window, patience, and brokers that lose what they were asked for."""

from __future__ import annotations

import heapq
import itertools
import math
import random

import pytest

from edge_agent.pull import WINDOW, Ask, Pull


def pull(num_frames: int, now: float = 0.0) -> Pull:
    return Pull(num_frames, random.Random(1), now)


def test_it_asks_for_a_window_first():
    assert pull(5).start() == Ask((0, 1, 2, 3, 4))
    assert pull(100).start() == Ask(tuple(range(WINDOW)))


def test_the_window_moves_on_once_half_of_it_has_come_and_what_came_is_unsubscribed():
    made = pull(100)
    made.start()
    for index in range(7):
        assert made.take(index, 1.0) is None
    assert made.take(7, 1.0) == Ask(tuple(range(16, 24)), tuple(range(8)))


def test_the_last_frame_completes_it_and_nothing_stays_subscribed():
    made = pull(3)
    made.start()
    assert made.take(2, 1.0) == Ask((), (2,))
    assert made.take(0, 1.0) == Ask((), (0,))
    assert made.fraction == pytest.approx(2 / 3)
    assert not made.is_complete
    assert made.take(1, 1.0) == Ask((), (1,))
    assert made.is_complete
    assert made.deadline() == math.inf


def test_it_wants_what_is_missing_and_exists():
    made = pull(3)
    made.start()
    made.take(1, 1.0)
    assert [made.wants(index) for index in (-1, 0, 1, 2, 3)] == [False, True, False, True, False]


def test_silence_makes_it_ask_for_the_rest_of_the_window_again_with_growing_patience():
    made = pull(100)
    made.start()
    made.take(3, 0.0)
    rest = tuple(index for index in range(16) if index != 3)
    asked_at, now = [0.0], 0.0
    while now < 150:
        now = made.deadline()
        assert made.ask_again(now - 0.001) is None
        assert made.ask_again(now) == Ask(rest)
        asked_at.append(now)
    waits = [later - earlier for earlier, later in itertools.pairwise(asked_at)]
    for wait, patience in zip(waits, (2, 4, 8, 16, 30, 30), strict=False):
        assert 0.75 * patience <= wait <= 1.25 * patience


def test_a_frame_that_comes_resets_the_patience():
    made = pull(100)
    made.start()
    for _ in range(5):
        made.ask_again(made.deadline())
    now = made.deadline()
    made.take(0, now)
    assert made.deadline() - now <= 2.5


def test_after_a_reconnection_it_asks_for_the_window_again():
    made = pull(100)
    made.start()
    made.take(0, 1.0)
    assert made.reconnect(2.0) == Ask(tuple(range(1, 16)))


def test_a_model_that_does_not_add_up_is_pulled_anew():
    made = pull(20)
    made.start()
    for index in range(20):
        made.take(index, 1.0)
    assert made.is_complete
    assert made.restart(2.0) == Ask(tuple(range(16)))
    assert not made.is_complete
    assert made.wants(19)
    assert made.deadline() < math.inf


@pytest.mark.parametrize("seed", range(40))
def test_from_a_broker_that_loses_and_doubles_every_frame_comes(seed: int):
    rng = random.Random(seed)
    num_frames, loss = rng.choice((1, 5, 40, 200)), rng.choice((0.0, 0.3, 0.6))
    made = Pull(num_frames, rng, 0.0)
    subscribed: set[int] = set()
    waiting: list[tuple[float, int]] = []
    now = 0.0

    def perform(ask: Ask | None) -> None:
        if ask is None:
            return
        subscribed.difference_update(ask.done)
        subscribed.update(ask.wanted)
        assert len(subscribed) <= 2 * WINDOW
        for index in ask.wanted:
            for _ in range(rng.choice((1, 1, 2))):
                if rng.random() >= loss:
                    heapq.heappush(waiting, (now + rng.uniform(0.01, 3.0), index))

    perform(made.start())
    for _ in range(20_000):
        if made.is_complete:
            break
        if waiting and waiting[0][0] < made.deadline():
            now, index = heapq.heappop(waiting)
            if index in subscribed and made.wants(index):
                perform(made.take(index, now))
        else:
            now = max(now, made.deadline())
            perform(made.ask_again(now))
    assert made.is_complete
    assert subscribed == set()
    assert now < 1200
