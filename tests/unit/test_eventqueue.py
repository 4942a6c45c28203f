"""The event queue: order, turns, the bytes that wait, and when a producer pauses and goes on."""

from __future__ import annotations

import threading
import time

from midge.eventqueue import EventQueue

SOON_S = 5.0


def test_events_come_out_in_the_order_in_which_they_went_in():
    queue = EventQueue[int]()
    for number in range(5):
        queue.put(number)
    assert queue.take(0) == [0, 1, 2, 3, 4]
    assert queue.take(0) == []


def test_a_turn_takes_at_most_max_events_and_leaves_the_rest():
    queue = EventQueue[int]()
    for number in range(5):
        queue.put(number)
    assert queue.take(0, max_events=3) == [0, 1, 2]
    assert len(queue) == 2
    assert queue.take(0, max_events=3) == [3, 4]


def test_the_bytes_that_wait_are_those_put_in_less_those_taken_out():
    queue = EventQueue[str](limit_bytes=100)
    queue.put("a", 30)
    queue.put("b")
    queue.put("c", 12)
    assert queue.size_bytes == 42
    queue.take(0, max_events=2)
    assert queue.size_bytes == 12
    queue.take(0)
    assert queue.size_bytes == 0


def test_it_is_full_above_its_limit_and_not_at_it():
    queue = EventQueue[str](limit_bytes=100)
    queue.put("a", 100)
    assert not queue.is_full()
    queue.put("b", 1)
    assert queue.is_full()


def test_a_full_queue_still_takes_what_is_put_in():
    queue = EventQueue[str](limit_bytes=10)
    queue.put("a", 100)
    queue.put("b", 100)
    assert queue.take(0) == ["a", "b"]


def test_a_paused_producer_is_called_back_once_when_half_is_free_again():
    queue = EventQueue[int](limit_bytes=100)
    calls = []
    queue.on_drained = lambda: calls.append(queue.size_bytes)
    for number in range(4):
        queue.put(number, 30)
    assert queue.is_full()  # 120 of 100 bytes
    queue.take(0, max_events=2)
    assert calls == []  # 60 bytes wait: more than half
    queue.take(0, max_events=1)
    assert calls == [30]
    queue.take(0, max_events=1)
    assert calls == [30]


def test_nobody_is_called_back_who_did_not_ask_whether_it_is_full():
    queue = EventQueue[int](limit_bytes=100)
    calls = []
    queue.on_drained = lambda: calls.append(1)
    queue.put(1, 200)
    queue.take(0)
    assert calls == []


def test_draining_without_a_callback_is_fine():
    queue = EventQueue[int](limit_bytes=1)
    queue.put(1, 2)
    assert queue.is_full()
    assert queue.take(0) == [1]
    assert not queue.is_full()


def test_take_gives_up_after_its_timeout():
    queue = EventQueue[int]()
    started = time.monotonic()
    assert queue.take(0.05) == []
    assert 0.04 <= time.monotonic() - started < SOON_S


def test_take_is_woken_by_an_event_of_another_thread():
    queue = EventQueue[str]()
    producer = threading.Thread(target=queue.put, args=("here",))
    started = time.monotonic()
    producer.start()
    assert queue.take(SOON_S) == ["here"]
    assert time.monotonic() - started < SOON_S
    producer.join()


def test_no_event_is_lost_or_doubled_between_threads():
    queue = EventQueue[tuple[int, int]](limit_bytes=50)

    def produce(name):
        for number in range(500):
            queue.put((name, number), 1)
            queue.is_full()

    producers = [threading.Thread(target=produce, args=(name,)) for name in range(4)]
    for producer in producers:
        producer.start()
    taken = []
    while len(taken) < 2000:
        events = queue.take(SOON_S, max_events=64)
        assert events, f"only {len(taken)} of 2000 events came"
        taken += events
    for producer in producers:
        producer.join()
    assert queue.size_bytes == 0
    for name in range(4):
        assert [number for producer, number in taken if producer == name] == list(range(500))
