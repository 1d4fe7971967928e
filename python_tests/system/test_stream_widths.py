"""Frames of every width are whole arrays, from every kind of source and with old and new PyAV."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.streams import ReaderNow, number_of, numbered, write_video
from zsseg_rt.runtime.frames import check_frame
from zsseg_rt.stream.uris import open_sources

pytest.importorskip("av")

WIDTHS = (854, 1366, 1080, 540, 600, 162, 161, 3, 2, 1)  # none is a multiple of 16


def read(uri, count):
    """So many pictures of a source, each of them what an engine takes."""
    (source,) = open_sources(uri)
    pictures = source.pictures(ReaderNow())
    found = list(itertools.islice(pictures, count))
    pictures.close()
    for picture in found:
        check_frame(picture.image)
        assert picture.image.flags.writeable
    return [picture.image for picture in found]


def graded(width, height=24):
    """A picture that grows brighter from left to right: rows that are out of step show."""
    row = np.linspace(40, 200, width).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_file(width, tmp_path):
    import av

    path, picture = tmp_path / "clip.nut", graded(width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, width, "yuv444p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv444p")))
        container.mux(stream.encode())
    images = read(path, 5)
    assert len(images) == 3
    for image in images:
        np.testing.assert_allclose(image.astype(int), picture, atol=4)  # 8 bits, twice


def test_frames_stay_what_they_were(tmp_path):
    path = write_video(tmp_path / "a.mp4", (numbered(n, (48, 162)) for n in range(8)))
    assert [number_of(image) for image in read(path, 8)] == list(range(8))


def test_all_of_this_with_the_oldest_pyav():
    folder = os.environ.get("ZSSEG_OLDEST_PYAV")
    if not folder:
        pytest.skip("needs ZSSEG_OLDEST_PYAV, a folder that PyAV 15 is in; tools/test.sh makes it")
    tests = [Path(__file__), Path(__file__).with_name("test_stream_video.py")]
    path = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH")) if p)
    code = "import av, sys; print(av.__version__, av.__file__); import pytest; "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "-n", "0", "-q", "-p", "no:cacheprovider",
         "-k", "not oldest_pyav and not pipeline", *map(str, tests)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.startswith("15."), done.stdout[:200]
    assert folder in done.stdout.splitlines()[0]
