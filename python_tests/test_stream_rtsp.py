"""Network cameras over RTSP: a real server that is killed, stopped and started again."""

import itertools
import time

import pytest

from support.rtsp_camera import shown_time
from support.streams import ReaderNow
from zsseg_rt.stream.uris import open_sources

pytest.importorskip("av")


def read(url, count, order="rgb"):
    """So many pictures of a camera."""
    (source,) = open_sources(url, order)
    pictures = source.pictures(ReaderNow())
    found = list(itertools.islice(pictures, count))
    pictures.close()
    return found


def ordered(times):
    """Whether no picture was damaged, repeated or shown before one that is older."""
    return None not in times and times == sorted(set(times))


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_picture_of_a_camera_is_one_that_it_made(rtsp_cameras, codec):
    started = time.monotonic()
    found = read(rtsp_cameras(codec=codec).url, 20)
    times = [shown_time(picture.image) for picture in found]
    assert ordered(times)
    assert started < times[0]
    assert all(made < p.captured_at for made, p in zip(times, found, strict=True))
    assert {p.clock for p in found} == {"arrival"}
    assert {p.image.shape for p in found} == {(240, 320, 3)}
