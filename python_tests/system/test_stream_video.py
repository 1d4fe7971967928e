"""Videos and network cameras, made on the spot: whole, damaged, absent, of every width."""

import io
import itertools
import resource
import shutil
import socket
import time
import wave
from contextlib import closing

import numpy as np
import pytest

from support.command_line import run_with_other
from support.errors import refused
from support.streams import MjpegServer, ReaderNow, number_of, numbered, write_video
from zsseg_rt.errors import SourceError
from zsseg_rt.runtime.frames import check_frame
from zsseg_rt.stream import source, video
from zsseg_rt.stream.uris import open_sources

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """28 numbered pictures at 10 per second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    return write_video(path, (numbered(number) for number in range(28)))


def read(uri, limit=None):
    reader = ReaderNow()
    with closing(open_sources(uri)[0].pictures(reader)) as pictures:
        return list(itertools.islice(pictures, limit)), reader


def numbers(pictures):
    return [number_of(picture.image) for picture in pictures]


def test_a_file_gives_every_frame_with_its_time(clip):
    pictures, reader = read(clip)
    assert numbers(pictures) == list(range(28))
    assert [p.pts_seconds for p in pictures] == pytest.approx([n / 10 for n in range(28)])
    assert {p.clock for p in pictures} == {"file"}
    assert pictures[0].image.shape == (48, 64, 3)
    assert pictures[0].image.flags["C_CONTIGUOUS"]
    assert reader.damaged == 0


JOINED = {
    "ts": {"bf": "2"},
    "mpg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "mkv": {"bf": "2"},
    "h264": {"bf": "2"},
    "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("kind", JOINED)
def test_times_of_joined_recordings_go_on_frame_by_frame(kind, tmp_path, caplog):
    """Also where the format has no times, and frames are not shown in the order of decoding."""
    if kind == "mpg" and int(av.__version__.partition(".")[0]) < 18:
        pytest.skip("PyAV before 18 crashes where MPEG-PS is opened with options")
    settings = {"rate": 10, **JOINED[kind]}
    one = write_video(tmp_path / f"one.{kind}", map(numbered, range(12)), **settings)
    joined = tmp_path / f"joined.{kind}"
    joined.write_bytes(one.read_bytes() * 2)
    rate = 25 if kind == "mjpeg" else settings["rate"]  # a file of JPEGs states none
    for _ in range(2):
        times = [p.pts_seconds for p in read(joined)[0]]
        assert times == pytest.approx([n / rate for n in range(24)], abs=0.001)
    said = [f"{joined}: tells no times; {rate} frames count as a second"] if kind == "h264" else []
    assert [text for text in caplog.messages if "no times" in text] == said


def test_frames_of_an_avi_in_the_order_of_decoding_rise_in_time(tmp_path):
    pictures, _ = read(write_video(tmp_path / "a.avi", map(numbered, range(20)), bf="2", gop=20))
    times = np.array([p.pts_seconds for p in pictures])
    assert np.diff(times).min() > 0.04
    assert times[-1] == pytest.approx(1.9, abs=0.101)


def test_a_file_damaged_in_the_middle_keeps_its_good_frames(clip, tmp_path):
    data = bytearray(clip.read_bytes())
    middle = data.index(b"mdat") + 4
    length = int.from_bytes(data[middle - 8 : middle - 4], "big")
    start = middle + length // 2
    data[start : start + length // 8] = b"\xff" * (length // 8)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    pictures, reader = read(damaged)
    assert 14 <= len(pictures) < 28
    frames = numbers(pictures)
    assert frames == sorted(frames)  # old versions of FFmpeg patch a damaged one with its neighbour
    assert frames[:6] == list(range(6))
    assert frames[-6:] == list(range(22, 28))
    assert reader.damaged > 0


@pytest.mark.parametrize("kind", ["text", "truncated", "odd format", "sound"])
def test_files_without_a_frame_are_errors(kind, clip, tmp_path):
    path, data, sound = tmp_path / "clip.mp4", clip.read_bytes(), io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    contents = {
        "text": b"this is no video\n" * 50,
        "truncated": data[: data.index(b"mdat")],
        "odd format": data.replace(b"avc1", b"zzzz"),
        "sound": sound.getvalue(),
    }
    path.write_bytes(contents[kind])
    with pytest.raises(SourceError, match=rf"^{path}: ") as raised:
        read(path)
    assert raised.value.__cause__ is None
    assert "file:" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("absent.mp4", "No such file or directory. Check the path."),
        ("/dev/video99", "Plug the camera in"),
        ("rtsp://user:secret@127.0.0.1:1/x", "Connection refused. Check address and port"),
        ("HTTP://user:secret@127.0.0.1:1/x", "Connection refused. Check address and port"),
        ("RTSP://user:secret@no.such.invalid:81/x", "no.such.invalid"),
        ("http://user:secret@no.such.invalid:81/x", "no.such.invalid"),
    ],
)
def test_what_is_absent_is_told_with_its_remedy(uri, reason):
    with pytest.raises(SourceError, match=reason) as raised:
        read(uri)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "Check user and password"), (404, "Check the path"), (500, "5XX Server Error")],
)
def test_a_camera_that_refuses_is_told_with_its_remedy(status, reason):
    with MjpegServer(status=status) as server, pytest.raises(SourceError, match=reason) as raised:
        read(server.url)
    assert "secret" not in str(raised.value)


def test_a_camera_that_answers_nothing_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(video, "OPENS_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://user:secret@127.0.0.1:{silent.getsockname()[1]}/camera"
        with pytest.raises(SourceError, match="Check the address, and that the camera is on"):
            next(open_sources(url)[0].pictures(ReaderNow()))


def test_a_camera_leads_to_no_other_address():
    if int(av.__version__.split(".")[0]) < 18:
        pytest.skip("FFmpeg before 8.1 follows a redirect, whatever it is told")
    with MjpegServer(ready=40) as inside, MjpegServer(status=302, leads_to=inside.url) as camera:
        with pytest.raises(SourceError, match="redirects are not followed"):
            read(camera.url, limit=1)
        assert (inside.requests, camera.requests) == (0, 1)


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile clip.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\nclip.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_text_reads_no_files_beside_it(kind, clip, tmp_path):
    shutil.copy(clip, tmp_path / "clip.mp4")
    write_video(tmp_path / "clip.ts", [numbered(1)] * 4)
    for name in ("list.mp4", "list.m3u8", "list.ffconcat", "list.sdp"):
        (tmp_path / name).write_text(PLAYLISTS[kind])
        with pytest.raises(SourceError, match="Is it a video"):
            read(tmp_path / name)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MOST_PIXELS", 48 * 64 - 1)
    with refused(SourceError, None, "3071", "64x48", "3072"):
        read(clip)
    for module in (source, video):
        monkeypatch.setattr(module, "MOST_PIXELS", 48 * 64)
    both = tmp_path / "both.ts"
    parts = [write_video(tmp_path / f"{size[0]}.ts", [numbered(1, size)] * 8)
             for size in ((48, 64), (96, 64))]  # fmt: skip
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    pictures, reader = read(both)
    assert {p.image.shape for p in pictures} == {(48, 64, 3)}
    assert reader.damaged > 0


def test_a_camera_s_huge_picture_takes_no_memory(monkeypatch):
    monkeypatch.setattr(video, "SILENT_FOR", 2.0)  # nothing comes of it

    huge = MjpegServer.encode(0)
    place = huge.tobytes().index(b"\xff\xc0") + 5
    huge[place : place + 4] = (0x40, 0, 0x40, 0)  # 16384x16384
    with MjpegServer(ready=40, encode=lambda _: huge) as camera:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with refused(SourceError, None, "127.0.0.1"):
            read(camera.url, limit=1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


PARTS = {
    "as the standard says": {},
    "without a first boundary": {"first": "Content-Type: image/jpeg\r\n\r\n"},
    "nothing before the first": {"first": ""},
    "without the parts' type": {"first": "--frame\r\nContent-Length: {}\r\n\r\n"} | {
        "part": "--frame\r\nContent-Length: {}\r\n\r\n"
    },
    "boundaries alone": {"first": "--frame\r\n\r\n", "part": "--frame\r\n\r\n"},
    "another boundary": {"part": "--other\nContent-type:image/jpg\n\n", "end": "\n"},
    "no boundary at all": {"first": "", "part": "", "end": "", "kind": "video/x-motion-jpeg"},
}  # fmt: skip


@pytest.mark.parametrize("parts", PARTS)
def test_an_mjpeg_camera_is_read_image_by_image_as_browsers_do(parts):
    # No further one has to come for the third to be given.
    with MjpegServer(ready=3, **PARTS[parts]) as camera:
        assert numbers(read(camera.url, limit=3)[0]) == [0, 1, 2]
        assert camera.requests == 1


def test_an_image_of_a_camera_that_was_cut_costs_itself_alone():
    def encode(number):
        jpeg = MjpegServer.encode(number)
        return jpeg[: len(jpeg) // 2] if number == 1 else jpeg

    with MjpegServer(ready=4, encode=encode) as camera:
        pictures, reader = read(camera.url, limit=2)
        assert (numbers(pictures), reader.damaged) == ([0, 2], 1)


def test_an_address_of_one_image_is_read_again_every_second():
    with MjpegServer(ready=3, kind="image/jpeg", first="", end="", most=1) as camera:
        pictures, reader = read(camera.url, limit=3)
        assert (len(pictures), camera.requests) == (3, 3)
        assert reader.waits == [video.STILL_EVERY] * 2


def test_a_page_instead_of_a_stream_is_told_as_what_it_is():
    page = np.frombuffer(b"<html><body>a camera</body></html>", np.uint8)
    settings = {"kind": "text/html", "first": "", "end": "", "most": 1, "encode": lambda _: page}
    with (
        MjpegServer(ready=9, **settings) as server,
        pytest.raises(SourceError, match="address of the camera.s stream"),
    ):
        read(server.url)


def test_jpegs_over_http_have_no_clock_and_are_never_late():
    with MjpegServer(ready=20) as camera:
        pictures = open_sources(camera.url)[0].pictures(ReaderNow())
        next(pictures)
        time.sleep(1.5)  # longer than the 0.04 s that FFmpeg makes up
        camera.images.release(20)
        assert max(next(pictures).late for _ in range(20)) == 0.0
        pictures.close()


@pytest.mark.parametrize("width", [854, 161, 2, 1])  # none is a multiple of 16
def test_a_file_of_any_width(width, tmp_path):
    """Pixels grow brighter from left to right: rows that are out of step show."""
    row = np.linspace(40, 200, width).astype(np.uint8)
    pixels = row[:, None].repeat(3, 1)[None].repeat(24, 0)
    settings = {"codec": "rawvideo", "pix_fmt": "yuv444p"}
    pictures, _ = read(write_video(tmp_path / "clip.nut", [pixels] * 3, **settings))
    assert len(pictures) == 3
    for picture in pictures:
        check_frame(picture.image)
        assert picture.image.flags.writeable
        np.testing.assert_allclose(picture.image.astype(int), pixels, atol=4)  # 8 bits, twice


def test_all_of_this_with_the_oldest_pyav():
    run_with_other("ZSSEG_OLDEST_PYAV", "av", "15", __file__, skipped="oldest_pyav")
