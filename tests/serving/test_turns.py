"""Short batches go between two tokens of long ones, which get as much time."""

import threading
import time

from hf_moe_ted.serving.turns import Turns


def test_a_short_turn_goes_between_two_tokens_of_a_long_one() -> None:
    turns, events = Turns(), []
    begun, wanted = threading.Event(), threading.Event()

    def long() -> None:
        with turns.long():
            begun.set()
            wanted.wait(10)
            while "short" not in events:
                events.append("token")
                turns.between_tokens()
            events.append("long goes on")

    thread = threading.Thread(target=long)
    thread.start()
    begun.wait(10)
    timer = threading.Timer(0.05, wanted.set)
    timer.start()
    with turns.short():
        events.append("short")
    thread.join(10)
    assert events[0] == "token"
    assert events[-2:] == ["short", "long goes on"]


def test_a_long_turn_gets_back_what_short_ones_took() -> None:
    turns = Turns()
    shares = {"short": 0.0, "long": 0.0}
    end = time.perf_counter() + 1.0

    def long() -> None:
        with turns.long():
            while time.perf_counter() < end:
                before = time.perf_counter()
                time.sleep(0.002)
                shares["long"] += time.perf_counter() - before
                turns.between_tokens()

    thread = threading.Thread(target=long)
    thread.start()
    time.sleep(0.01)
    while time.perf_counter() < end:
        with turns.short():
            before = time.perf_counter()
            time.sleep(0.02)
            shares["short"] += time.perf_counter() - before
    thread.join(10)
    assert 0.3 < shares["short"] / sum(shares.values()) < 0.7


def test_without_a_long_one_a_short_turn_starts_at_once() -> None:
    turns = Turns()
    for _ in range(3):
        with turns.short():
            pass
    with turns.long():
        turns.between_tokens()
    with turns.short():
        pass
