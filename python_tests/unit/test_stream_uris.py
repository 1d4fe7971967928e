"""Names of sources, refusals of what is none, and which library reads RTSP."""

import sys
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from support.recordings import open_writer, result, write
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ConfigError, SourceError
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.stream.gstreamer.pipelines import CsiCamera, GstSource
from zsseg_rt.stream.photo_folder import DemoCamera, PhotoSource
from zsseg_rt.stream.source import GivenName, log_once
from zsseg_rt.stream.uris import is_source, open_sources, source_names
from zsseg_rt.stream.video import VideoSource, split_login
from zsseg_rt.stream.writers import OVERLAY_MARK


@pytest.fixture(autouse=True)
def _pyav(monkeypatch):
    monkeypatch.setenv("ZSSEG_RTSP_LIBRARY", "pyav")


def one(uri, order="rgb"):
    (source,) = open_sources(uri, order)
    return source


V4L2_OPTIONS = {"video_size": "1280x720", "framerate": "30.0", "input_format": "mjpeg"}
PIPELINE = "rtspsrc location=rtsp://u:secret@cam user-pw=secret ! decodebin"
KINDS = [
    ("test://", DemoCamera, {"live": True, "size_hw": (360, 640)}),
    ("test://?demo=scenes", DemoCamera, {"size_hw": (720, 720)}),
    ("test://?size=640x360&rate=12.5&seed=7&frames=9", DemoCamera,
     {"size_hw": (360, 640), "rate": 12.5, "seed": 7, "num_frames": 9, "live": False}),
    ("http://cam/video", VideoSource, {"url": "http://cam/video", "kind": "http", "live": True}),
    ("https://cam/video", VideoSource, {"url": "https://cam/video", "kind": "http"}),
    ("0", VideoSource, {"url": "/dev/video0", "kind": "v4l2", "live": True, "name": "0"}),
    ("v4l2:///dev/video3", VideoSource, {"url": "/dev/video3", "kind": "v4l2"}),
    ("/dev/video1", VideoSource, {"url": "/dev/video1", "kind": "v4l2"}),
    ("v4l2:///dev/video0?size=1280x720&rate=30&format=mjpeg", VideoSource,
     {"url": "/dev/video0", "options": V4L2_OPTIONS}),
    ("clip.mp4", VideoSource, {"url": "file:clip.mp4", "kind": "file", "live": False}),
    ("odd:name.mkv", VideoSource, {"url": "file:odd:name.mkv", "name": "odd:name.mkv"}),
    ("rtsp://cam/1", VideoSource, {"url": "rtsp://cam/1", "kind": "rtsp", "live": True}),
    ("RTSP://u@cam/1?a=b", VideoSource, {"url": "rtsp://u@cam/1?a=b", "name": "rtsp://cam/1"}),
    ("rtsps://cam", VideoSource, {"url": "rtsps://cam"}),
    ("csi://1?size=640x480&rate=29.97&flip=2", GstSource,
     {"live": True, "recipe": CsiCamera(sensor=1, size_hw=(480, 640), rate=29.97, flip=2)}),
    ("CSI://0", GstSource, {"recipe": CsiCamera(sensor=0, size_hw=(720, 1280), rate=30, flip=0)}),
    *((f"{scheme}:{PIPELINE}", GstSource,
       {"live": scheme == "gst",
        "name": f"{scheme}:rtspsrc location=rtsp://cam user-pw=*** ! decodebin"})
      for scheme in ("gst", "gst-file")),
    *((text, PhotoSource, {}) for text in ("photo.jpg", "PHOTO.PNG", "*.jpg", ".")),
]  # fmt: skip


@pytest.mark.parametrize(("uri", "kind", "expected"), KINDS)
def test_what_a_source_is(uri, kind, expected):
    source = one(uri, "bgr")
    assert isinstance(source, kind)
    assert {key: getattr(source, key) for key in expected} == expected
    assert source.channel_order == "bgr"
    assert "secret" not in repr(source)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://user:secret@cam/1", "got ftp://cam/1"),
        ("u:secret@cam/1", ""), ("rtsp//u:secret@cam/1", ""), ("rtsp:/u:secret@cam/1", ""),
        ("rtsp:u:secret@cam", ""),
        ("", "expected test://, rtsp://"),
        ("gst:", "expected gst:PIPELINE"),
        ("csi://99", "expected csi://0 to csi://15"),
        ("csi://0 ! fakesink", "expected csi://0 to csi://15"),
        ("csi://0?flip=8", "expected flip from 0 to 7"),
        ("csi://0?size=0x0", "expected size=WIDTHxHEIGHT"),
        ("csi://0?rate=x", "expected rate from 1 to 1000"),
        ("rtsp://", "expected rtsp://HOST/PATH"),
        ("rtsp://cam/a b", "expected rtsp://HOST/PATH without spaces"),
        ("rtsp://cam/\r\nX: y", "expected rtsp://HOST/PATH without spaces"),
        ("test://picture", "expected test://?demo=.."),
        ("test://?size=999999x999999", "expected size=WIDTHxHEIGHT"),
        ("test://?demo=films", "expected demo=scenes|photos"),
        ("test://?rate=nan", "expected rate from 0.01 to 1000"),
        ("test://?seed=-1", "expected seed"),
        ("v4l2://video0", "expected v4l2:///dev/videoN"),
        ("v4l2:///dev/video0?zoom=3", "got 'zoom'"),
        ("a\0.mp4", "expected test://"),
        ("a\ud83d*.mp4", "expected test://"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(uri, message):
    with pytest.raises(ArgumentError) as raised:
        open_sources(uri)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_source_given_twice_and_none_are_refused(tmp_path):
    with refused(ArgumentError, "source", "rtsp://cam/1"):
        open_sources(["rtsp://a:b@cam/1", Path("0"), "rtsp://c:d@cam/1"])
    with refused(ArgumentError, "source"):
        open_sources([])
    with pytest.raises(SourceError, match="found none"):
        named(tmp_path, "# nothing")


def test_long_lists_are_read_in_one_pass(tmp_path):
    """Each source looked at all others: 30,000 took minutes."""
    assert len(named(tmp_path, *(f"c{n} = rtsp://10.0.0.1/{n}" for n in range(9000)))) == 9000


def named(tmp_path, *lines):
    listed = tmp_path / "cameras.txt"
    listed.write_text("\n".join(lines), encoding="utf-8-sig")
    return open_sources(f"@{listed}")


def test_a_list_gives_names(tmp_path):
    sources = named(
        tmp_path,
        "# the yard",
        "  front = rtsp://u:secret@cam/1?a=b  ",
        "",
        "Back_2=test://?size=64x48",
        "rtsp://cam/user=u_password=secret",
        "gst:videotestsrc pattern = 1 ! videoconvert",
        "./a=b.mp4",
        "../x = 0",
    )
    names = [source.name for source in sources]
    assert names == [
        "front", "Back_2", "rtsp://cam/", "gst:videotestsrc pattern = 1 ! videoconvert",
        "./a=b.mp4", "../x = 0",
    ]  # fmt: skip
    assert sources[0].url == "rtsp://u:secret@cam/1?a=b"
    assert "secret" not in repr(sources)
    assert [isinstance(name, GivenName) for name in names] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("fr ont = 0", "got NAME 'fr ont'"),
        ("Süd = 0", "got NAME 'Süd'"),
        (f"{'a' * 65} = 0", "at most 64 letters"),
        ("front =", "got NAME 'front' without a URI"),
        ("front = 0\nFront = 1", "also differ without their case"),
        ("2 = 0\n1", "from other sources' numbers"),
        ("20261123T120000Z = 0", "from time stamps"),
        ("a = rtsp://u:secret@cam/1\nb = rtsp://v:secret@cam/1", "got rtsp://cam/1 twice"),
        ("front = ftp://u:secret@cam/1", "got ftp://cam/1"),
    ],
)
def test_names_that_files_cannot_have_are_refused(lines, message, tmp_path):
    with pytest.raises(ArgumentError) as raised:
        named(tmp_path, lines)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_addresses_that_differ_where_it_is_not_shown_are_told_apart():
    sources = open_sources([f"rtsp://u:p@nvr/real?channel={n}" for n in (1, 2, 3)])
    names = [source.name for source in sources]
    assert names == ["rtsp://nvr/real", "rtsp://nvr/real #2", "rtsp://nvr/real #3"]


def test_reports_name_sources_and_pipelines_without_secrets():
    sources = [
        "http://u:se cret@cam/x?pw=secret",
        "@list.txt",
        'gst:rtspsrc location="rtsp://u:se cret@cam/secret=1" proxy-pw=(string)"se cret" '
        'extra-http-request-headers="h,Authorization=(string)secret" psw=secret ! decodebin',
        "gst:srtsrc uri=srt://h?pw=hush passphrase='hu sh' user-pw = \"hush\" key-int-max=3",
    ]
    assert source_names(sources) == [
        "http://cam/x",
        "@list.txt",
        'gst:rtspsrc location="rtsp://cam/" proxy-pw=*** extra-http-request-headers=*** '
        "psw=*** ! decodebin",
        "gst:srtsrc uri=srt://h passphrase=*** user-pw = *** key-int-max=3",
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of ordinary things, which names are relative to."""
    monkeypatch.chdir(tmp_path)
    for folder in ("videos", "photos", "both", "empty", "labels"):
        Path(folder).mkdir()
    for name in ("videos/b.mp4", "videos/a.MKV", "both/a.mp4", "clip.mp4", "other.mp4"):
        Path(name).write_bytes(b"moov" * 1000)
    for name in ("photos/1.jpg", "both/1.jpg", "photos/00000001.png"):
        Path(name).write_bytes(b"photo" * 1000)
    for name in ("videos/ours.mp4", "ours.mp4"):
        Path(name).write_bytes(b"moov" * 400 + OVERLAY_MARK.encode())
    Path("ours.jsonl").write_text('{"source": "a", "index": 0, "pts_seconds": 0.0}\n')
    Path("other.jsonl").write_text('{"source": "a", "text": "b"}\n')
    labels = encode_label_png(np.zeros((4, 4), np.uint8), palette("a"))
    Path("labels/00000000.png").write_bytes(labels)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("videos", ["videos/a.MKV", "videos/b.mp4"]),  # not our own overlay
        ("videos/*.mp4", ["videos/b.mp4"]),
        ("*.mp4", ["clip.mp4", "other.mp4"]),
        ("photos", ["photos"]),
        ("both", ["both"]),
        ("@list.txt", ["cam-1", "cam-2", "clip.mp4"]),
    ],
)
def test_a_folder_or_pattern_of_videos_is_each_of_them(text, names, caplog):
    Path("list.txt").write_text("cam = videos\nclip.mp4\n")
    assert [source.name for source in open_sources(text)] == names
    assert ("1 videos are not" in caplog.text) == (text == "both")


def test_more_videos_than_can_be_read_at_once_are_refused(tmp_path):
    for number in range(65):
        (tmp_path / f"{number}.mp4").write_bytes(b"moov" * 1000)
    with refused(ArgumentError, "source", "64", "65"):
        open_sources(tmp_path)


SOURCES = [
    "clip.mp4", "videos", "photos", "photos/", "*.mp4", "photos/1.jpg", "absent.mkv", "absent.jpg",
    "@list", "0", "/dev/video0", "http://cam/x.mp4", "rtsp://cam/1", "rtsp://me:pw@192.168.1.2/1", "test://",
    "rtsp://me:pw@cam:554/1", "gst:videotestsrc", "csi://0",
]  # fmt: skip
PLACES = [
    "absent.mp4", "absent.jsonl", "absent/", "empty", "empty/", "labels", "labels/", "ours.mp4",
    "ours.jsonl", "rtsp://@:8554/seg", "rtsp://@127.0.0.1:8554/seg", "rtsp://me:pw@:8554/seg",
    "other.jsonl",
]  # fmt: skip


@pytest.mark.usefixtures("place")
def test_a_first_word_is_a_source_unless_results_can_go_there():
    assert [word for word in SOURCES + PLACES if is_source(word)] == SOURCES
    for word in (*SOURCES[:5], "videos/", "both", "other.jsonl"):
        with refused(ArgumentError, "sink"):
            open_writer(word)
    for ours in ("ours.mp4", "ours.jsonl", "labels", "empty", "new/", "new.mp4"):
        open_writer(ours)


@pytest.mark.parametrize("name", ["a.mp4", "a.jsonl", "masks/"])
def test_what_a_sink_writes_is_its_own(name, tmp_path):
    place = f"{tmp_path}/{name}"
    write(place, [result(n, size_hw=(64, 96)) for n in range(3)])
    assert not is_source(place)
    open_writer(place)


def test_pyav_reads_rtsp_where_gstreamer_is_absent_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gi", None)
    monkeypatch.delenv("ZSSEG_RTSP_LIBRARY")
    log_once.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert isinstance(one("rtsp://cam/1"), VideoSource)
    assert caplog.text.count("read with PyAV, since GStreamer is not complete") == 1
    assert caplog.text.count(". ZSSEG_RTSP_LIBRARY chooses another.") == 1
    monkeypatch.setenv("ZSSEG_RTSP_LIBRARY", "gstreamer")
    with refused(BackendUnavailableError, "gi"):
        open_sources("rtsp://cam/1")
    monkeypatch.setenv("ZSSEG_RTSP_LIBRARY", "vlc")
    with refused(ConfigError, "ZSSEG_RTSP_LIBRARY", "vlc"):
        open_sources("rtsp://cam/1")


def test_logins_are_taken_out_of_urls():
    assert split_login("rtsp://cam/x@y") == ("rtsp://cam/x@y", None)
    assert split_login("rtsp://u@cam:1/x?a=b@c") == ("rtsp://cam:1/x?a=b@c", ("u", ""))
    assert split_login("rtsp://u:a:b@c@[::1]:5/") == ("rtsp://[::1]:5/", ("u", "a:b@c"))
