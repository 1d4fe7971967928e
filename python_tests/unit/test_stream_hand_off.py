"""Between capture and labels: what waits, what is dropped, whose turn it is."""

import threading

import numpy as np
import pytest

from zsseg_rt.stream.hand_off import QUEUE, HandOff
from zsseg_rt.stream.source import Picture

ALWAYS = lambda: True  # noqa: E731


def picture(number=0, captured_at=0.0):
    image = np.full((2, 2, 3), number, np.uint8)
    return Picture(image=image, captured_at=captured_at, clock="arrival")


def hand_off(*keeps_all, **settings):
    return HandOff({f"s{i}": keeps for i, keeps in enumerate(keeps_all)}, **settings)


def taken(hand_off):
    frame = hand_off.take(0)
    return None if frame is None else (frame.source, frame.index, frame.dropped_before)


@pytest.mark.parametrize("way", ["closed", "abandoned"])
def test_a_reader_that_waits_for_room_goes(way):
    slots = hand_off(True)
    for _ in range(QUEUE):
        slots.put(0, picture(), ALWAYS)
    wanted, answers = [True], []
    thread = threading.Thread(
        target=lambda: answers.append(slots.put(0, picture(), lambda: bool(wanted)))
    )
    thread.start()
    if way == "closed":
        slots.close()
    else:
        wanted.clear()
        slots.nudge()
    thread.join(10)
    assert answers == [False]
    assert way == "abandoned" or slots.take(None) is None


def test_sources_take_turns_however_busy_one_is():
    slots = hand_off(False, False, False)
    order = []
    for _ in range(4):
        slots.put(0, picture(), ALWAYS)
        slots.put(1, picture(), ALWAYS)
        order.append(slots.take(0).source)
    assert order == ["s0", "s1", "s0", "s1"]


def test_pictures_that_waited_too_long_are_dropped():
    now = [100.0]
    slots = hand_off(True, max_staleness=0.5, now=lambda: now[0])
    slots.put(0, picture(captured_at=99.6), ALWAYS)
    slots.put(0, picture(captured_at=100.0), ALWAYS)
    now[0] = 100.3
    assert not slots.is_empty
    assert taken(slots) == ("s0", 1, 1)
    slots.put(0, picture(captured_at=100.0), ALWAYS)
    now[0] = 101.0
    assert slots.is_empty
    assert taken(slots) is None
    assert slots.counts(0) == (3, 2)


def test_a_nudge_wakes_who_waits_and_what_nobody_wants_is_discarded():
    slots = hand_off(False)
    slots.nudge()
    assert slots.take(None) is None
    assert not slots.put(0, picture(), lambda: False)
    assert slots.counts(0) == (0, 0)


@pytest.mark.parametrize("keeps_all", [False, True])
def test_frames_carry_what_the_source_said(keeps_all):
    slots = hand_off(keeps_all)
    given = Picture(
        image=np.zeros((2, 2, 3), np.uint8), captured_at=1.5, clock="driver", pts_seconds=0.25
    )
    slots.put(0, given, ALWAYS)
    frame = slots.take(0)
    assert (frame.captured_at, frame.clock, frame.pts_seconds) == (1.5, "driver", 0.25)
    assert frame.image is given.image
    assert "array" not in repr(frame)
