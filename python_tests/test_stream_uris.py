"""What a user may call a source, and what is told of what is none."""

from pathlib import Path

import pytest

from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.stream.demo_camera import DemoCamera
from zsseg_rt.stream.photo_folder import PhotoSource
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.video import VideoSource


def one(uri, order="rgb"):
    (source,) = open_sources(uri, order)
    return source


def test_test_sources_take_size_rate_seed_and_frames():
    source = one("test://?size=640x360&rate=12.5&seed=7&frames=9", "bgr")
    assert isinstance(source, DemoCamera)
    assert (source.size_hw, source.rate, source.seed) == ((360, 640), 12.5, 7)
    assert (source.num_frames, source.live, source.channel_order) == (9, False, "bgr")
    assert one("test://").live


@pytest.mark.parametrize(
    ("uri", "url", "kind", "live"),
    [
        ("rtsp://cam/1", "rtsp://cam/1", "rtsp", True),
        ("RTSP://cam/1", "RTSP://cam/1", "rtsp", True),
        ("http://cam/video", "http://cam/video", "http", True),
        ("https://cam/video", "https://cam/video", "http", True),
        ("0", "/dev/video0", "v4l2", True),
        ("v4l2:///dev/video3", "/dev/video3", "v4l2", True),
        ("/dev/video1", "/dev/video1", "v4l2", True),
        ("clip.mp4", "file:clip.mp4", "file", False),
        ("odd:name.mkv", "file:odd:name.mkv", "file", False),
    ],
)
def test_videos_and_cameras(uri, url, kind, live):
    source = one(uri)
    assert isinstance(source, VideoSource)
    assert (source.url, source.kind, source.live, source.name) == (url, kind, live, uri)


def test_a_camera_s_size_rate_and_format_can_be_asked_for():
    source = one("v4l2:///dev/video0?size=1280x720&rate=30&format=mjpeg")
    assert source.url == "/dev/video0"
    assert source.options == {
        "video_size": "1280x720", "framerate": "30.0", "input_format": "mjpeg"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["photo.jpg", "PHOTO.PNG", "*.jpg", "."])
def test_photos_folders_and_patterns(text):
    assert isinstance(one(text), PhotoSource)


def test_paths_may_be_paths():
    assert one(Path("clip.mp4")).name == "clip.mp4"
    assert len(open_sources([Path("a.mp4"), "0"])) == 2


def test_a_file_lists_one_source_per_line(tmp_path):
    listed = tmp_path / "cameras.txt"
    listed.write_text("# the yard\nrtsp://user:secret@cam/1\n\n  0  \n", encoding="utf-8-sig")
    first, second = open_sources(f"@{listed}")
    assert (first.name, second.name) == ("rtsp://***@cam/1", "0")
    assert first.url == "rtsp://user:secret@cam/1"
    assert "secret" not in repr(first)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("ftp://cam/1", "expected test://, rtsp://"),
        ("", "expected test://, rtsp://"),
        ("csi://0", "needs GStreamer, which is not there yet"),
        ("gst:videotestsrc", "needs GStreamer, which is not there yet"),
        ("test://picture", "expected test://?size=.."),
        ("test://?colour=1", "got 'colour'"),
        ("test://?size=0x5", "expected size=WIDTHxHEIGHT"),
        ("test://?size=999999x999999", "expected size=WIDTHxHEIGHT"),
        ("test://?rate=nan", "expected rate from 0.01 to 1000"),
        ("test://?rate=0", "expected rate from 0.01 to 1000"),
        ("test://?seed=-1", "expected seed"),
        ("test://?frames=x", "expected frames"),
        ("v4l2://video0", "expected v4l2:///dev/videoN"),
        ("v4l2:///dev/video0?zoom=3", "got 'zoom'"),
        ("a\0.mp4", "expected test://"),
    ],
)
def test_what_is_no_source_is_refused(uri, told):
    with pytest.raises(ArgumentError) as raised:
        open_sources(uri)
    assert told in str(raised.value)


def test_a_refused_address_keeps_its_password():
    with pytest.raises(ArgumentError, match=r"got ftp://\*\*\*@cam/1"):
        open_sources("ftp://user:secret@cam/1")


def test_a_source_given_twice_is_refused():
    with pytest.raises(ArgumentError, match=r"got rtsp://\*\*\*@cam/1 twice"):
        open_sources(["rtsp://a:b@cam/1", "0", "rtsp://c:d@cam/1"])
    with pytest.raises(ArgumentError, match="got none"):
        open_sources([])


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot read it: No such file"), (b"\xff\xfe", "UTF-8"), (b"#\n", "found none")],
)
def test_a_list_that_cannot_be_used_is_an_error(tmp_path, content, told):
    listed = tmp_path / "cameras.txt"
    if content is not None:
        listed.write_bytes(content)
    with pytest.raises(SourceError, match=told):
        open_sources(f"@{listed}")
