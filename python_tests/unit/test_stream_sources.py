"""Sources: their names, times and order of channels, what is none; frames as a phone was held."""

import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.errors import refused
from support.recordings import open_writer, result, write
from support.streams import ReaderNow, write_video
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ConfigError, SourceError
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.stream.conversion import i420, upright
from zsseg_rt.stream.gstreamer.pipelines import CsiCamera, GstSource
from zsseg_rt.stream.photo_folder import DemoCamera, PhotoSource
from zsseg_rt.stream.source import GivenName, Lateness, RecordingTimes, log_once, redact, shown
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


def test_a_source_given_twice_and_none_are_refused_however_many_there_are(tmp_path):
    with refused(ArgumentError, "source", "rtsp://cam/1"):
        open_sources(["rtsp://a:b@cam/1", Path("0"), "rtsp://c:d@cam/1"])
    with refused(ArgumentError, "source"):
        open_sources([])
    with pytest.raises(SourceError, match="found none"):
        named(tmp_path, "# nothing")
    # Each source looked at all others: 30,000 took minutes.
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


def camera(**settings):
    defaults = {"demo": "scenes", "size_hw": (48, 64), "num_frames": 5, "now": lambda: 7.0}
    return DemoCamera(name="test://", **defaults | settings)


def test_the_demo_camera_gives_the_same_frames_for_the_same_seed():
    def frames(seed):
        pictures = camera(seed=seed, num_frames=200).pictures(ReaderNow())
        return [picture.image for picture in pictures]

    first, other = frames(3), frames(4)
    assert len(first) == 200
    assert first[0].shape == (48, 64, 3)
    assert first[0].flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(first, frames(3))
    assert (np.array(first) != np.array(other)).any(axis=(1, 2, 3)).mean() > 0.9
    assert (first[0] != first[1]).any()
    assert np.abs(first[0].astype(int) - first[199]).mean() > 10  # another picture by then


def test_the_clip_plays_at_its_own_speed_whatever_the_rate_and_begins_again():
    def frames(**settings):
        settings = {"demo": "photos", "size_hw": (90, 160), **settings}
        return np.array([p.image for p in camera(**settings).pictures(ReaderNow())])

    slow, fast = frames(rate=10.0, num_frames=38), frames(rate=30.0, num_frames=9)
    np.testing.assert_array_equal(fast[::3], slow[:3])
    np.testing.assert_array_equal(fast[2], fast[0])
    assert (slow[1:36] != slow[:35]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(slow[36:], slow[:2])
    np.testing.assert_array_equal(frames(rate=10.0, seed=3)[0], slow[3])


@pytest.mark.parametrize("demo", ["photos", "scenes"])
def test_the_demo_camera_has_any_size(demo):
    for size_hw in [(1, 1), (1, 300), (720, 1280)]:
        (picture,) = camera(size_hw=size_hw, num_frames=1, demo=demo).pictures(ReaderNow())
        assert picture.image.shape == (*size_hw, 3)


def test_the_demo_camera_keeps_its_rate_and_stops_when_told():
    reader = ReaderNow()
    pictures = camera(rate=20.0).pictures(reader)
    assert [p.pts_seconds for p in pictures] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert reader.waits == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert list(camera().pictures(ReaderNow(stop=True))) == []


def test_channels_come_in_the_order_asked_for(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((2, 3, 3), (1, 2, 3), np.uint8))
    demos = []
    for order, expected in (("rgb", [3, 2, 1]), ("bgr", [1, 2, 3])):
        (photo,) = one(tmp_path, order).pictures(ReaderNow())
        assert photo.image[0, 0].tolist() == expected
        demos.append(next(camera(channel_order=order).pictures(ReaderNow())).image)
    np.testing.assert_array_equal(demos[0], demos[1][..., ::-1])


def test_photos_come_in_order_without_broken_ones(tmp_path):
    source, reader = PhotoSource(name="photos", path=str(tmp_path / "*.png")), ReaderNow()
    with pytest.raises(SourceError, match="found nothing"):
        next(source.pictures(reader))
    for number in (2, 0, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((2, 3, 3), number, np.uint8))
    (tmp_path / "1.png").write_bytes(b"x")
    pictures = list(source.pictures(reader))
    assert [p.image[0, 0, 0] for p in pictures] == [0, 2, 3]
    assert [p.pts_seconds for p in pictures] == [0.0, 1.0, 2.0]
    assert {p.clock for p in pictures} == {"file"}
    assert reader.damaged == 1
    for number in (0, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    with refused(SourceError, "photos"):
        list(source.pictures(reader))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("rtsp://user:secret@cam:554/1", "rtsp://cam:554/1"),
        ("cannot open 'http://u:se@cr@et@cam/a?b=1': no", "cannot open 'http://cam/a': no"),
        ("rtsp://u:se/cr?et@cam/1", "rtsp://cam/1"),
        ("rtsp://u:se#cret@[fe80::1]:554/1", "rtsp://[fe80::1]:554/1"),
        ("http://cam/v?user=u&Password=secret&x=1", "http://cam/v"),
        ("http://cam/v?p=secret", "http://cam/v"),
        ("http://cam/v#sig=secret", "http://cam/v"),
        ("rtsp://cam/user=admin_password=secret_channel=1_stream=0.sdp", "rtsp://cam/"),
        ("rtsp://cam:554/live/user=admin&password=se/cret&channel=1", "rtsp://cam:554/live/"),
        ("rtsp://cam/user%3Dadmin_password%253Dsecret", "rtsp://cam/"),
        ("rtsp://cam/1;pass=secret", "rtsp://cam/1"),
        ("rtsp://cam/1&sig=secret/2", "rtsp://cam/1"),
        ("rtsp://u:12/secret@cam/1", "rtsp://***"),
        ("rtsp://u:p@cam/secret@1", "rtsp://***"),
        ("Failed at rtsp://cam/pw=secret. (Generic)", "Failed at rtsp://cam/. (Generic)"),
        ("test://?size=1x1", "test://?size=1x1"),
        ("a@b.mp4", "a@b.mp4"),
    ],
)
def test_passwords_are_blanked_out(uri, shown):
    assert redact(uri) == shown


def test_an_address_is_shown_without_any_login():
    assert shown("rtsp://u:se cret@cam/1") == shown("rtsp://u:se\ncret@cam/1") == "rtsp://cam/1"
    assert shown("rtsp:/u:secret@cam/1") == shown("u:secret@cam rtsp://x") == "***"


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([7.0, 7.5, 8.0], [0, 0.5, 1]),
        ([None, None, None], [0, 0.1, 0.2]),
        ([None, 5.0, None, 5.3], [0, 0.1, 0.2, 0.4]),  # between those that are told
        ([0.0, 0.2, 0.0, 0.2], [0, 0.2, 0.3, 0.5]),  # joined
        ([0.0, 0.2, 100.0, 100.3, 0.0], [0, 0.2, 0.3, 0.6, 0.7]),  # joined, and joined back
        ([0.0, 5.0, 5.1], [0, 5, 5.1]),  # a gap is none
        ([0.0, 0.1, 0.1, 0.3], [0, 0.1, 0.15, 0.3]),  # twice the same: no shift
        ([0.0, 0.3, 0.25, 0.5], [0, 0.3, 0.35, 0.5]),  # out of order: no shift
    ],
)
def test_times_of_a_recording_rise_and_keep_their_distances(stamps, times):
    clock = RecordingTimes("cut.ts", 10, joined=True)
    assert [clock.of(stamp) for stamp in stamps] == pytest.approx(times)


def test_without_a_rate_25_counts_and_formats_that_are_not_joined_keep_their_gaps():
    for rate in (None, 0, 90_000):
        clock = RecordingTimes("a.264", rate)
        assert [clock.of(None), clock.of(None)] == [0.0, 1 / 25]
    clock = RecordingTimes("a.mkv", 10)
    assert [clock.of(0.0), clock.of(3600.0)] == [0.0, 3600.0]


def test_lateness_is_what_a_frame_lost_against_the_best():
    def of(frames):
        lateness = Lateness()
        return [round(lateness.of(stamp, at), 2) for stamp, at in frames]

    # a slow start; then a link that carries half of what is sent; then one that catches up
    assert of([(0.0, 9.0), (1.0, 9.5), (2.0, 10.5)]) == [0.0, 0.0, 0.0]
    assert of([(n, 10.0 + 2 * n) for n in range(4)]) == [0.0, 1.0, 2.0, 3.0]
    assert of([(0, 10), (1, 13), (2, 13), (3, 13)]) == [0.0, 2.0, 1.0, 0.0]
    for jump in (-1000.0, -0.5, 1000.0):  # a source that sets its clock is not late
        frames = [(n / 10 + jump * (n >= 20), 5 + n / 10) for n in range(40)]
        assert max(of(frames)) == 0.0
    # nor is one without stamps, or with a slow crystal
    assert of([(None, 1.0), (None, 9.0)]) == [0.0, 0.0]
    assert max(of([(n * 60 * (1 - 1e-4), n * 60) for n in range(24 * 60)])) < 0.01  # a day


ONE = 1 << 16
# What the phone did with the upright picture, and (a, b, c, d) of the matrix that undoes it.
HELD = {
    "upright": (lambda p: p, (ONE, 0, 0, ONE)),
    "90": (lambda p: np.rot90(p, 1), (0, ONE, -ONE, 0)),
    "180": (lambda p: np.rot90(p, 2), (-ONE, 0, 0, -ONE)),
    "270": (lambda p: np.rot90(p, 3), (0, -ONE, ONE, 0)),
    "mirrored": (lambda p: p[:, ::-1], (-ONE, 0, 0, ONE)),
    "upside down": (lambda p: p[::-1], (ONE, 0, 0, -ONE)),
    "mirrored, 90": (lambda p: p.transpose(1, 0, 2), (0, ONE, ONE, 0)),
    "mirrored, 270": (lambda p: p[::-1, ::-1].transpose(1, 0, 2), (0, -ONE, -ONE, 0)),
}


def scene():
    """64x48, each corner of another colour."""
    corners = [[(200, 40, 40), (40, 200, 40)], [(40, 40, 200), (200, 200, 40)]]
    return np.array(corners, np.uint8).repeat(24, 0).repeat(32, 1)


def record(path, image, matrix):
    """A video whose header notes how to show it, as phones write it."""
    write_video(path, [np.ascontiguousarray(image)] * 3)
    data = bytearray(path.read_bytes())
    a, b, c, d = matrix
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("way", HELD)
def test_frames_are_upright_however_the_phone_was_held(tmp_path, way):
    order = "bgr" if "mirrored" in way else "rgb"
    pytest.importorskip("av")
    lie, matrix = HELD[way]
    path = record(tmp_path / "phone.mp4", lie(scene()), matrix)
    images = [picture.image for picture in one(path, order).pictures(ReaderNow())]
    assert len(images) == 3
    expected = scene()[..., :: 1 if order == "rgb" else -1]
    for image in images:
        assert image.flags["C_CONTIGUOUS"]
        assert image.shape == expected.shape
        off = np.abs(image.astype(int) - expected)
        assert np.median(off) <= 6  # lossy coding: 1 without turning, 160 if turned wrongly
        assert off[::47, ::63].max() <= 12  # the corners


SLANTED = round(ONE * 0.7071)


@pytest.mark.parametrize(
    "matrix",
    [None, (0,) * 9, (ONE, *(0,) * 8), (SLANTED, SLANTED, 0, -SLANTED, SLANTED, 0, 0, 0, 1 << 30)],
)
def test_without_a_usable_note_or_at_other_angles_nothing_is_turned(matrix):
    image = scene()
    assert upright(image, matrix) is image


# ITU-R BT.601, limited range: rows Y, U, V from R, G, B in [0, 255].
MATRIX = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
OFFSET = np.array([16.0, 128.0, 128.0])


def expected_planes(rgb):
    """Y per pixel, U and V as the mean over each 2x2 pixels; float64."""
    yuv = rgb.astype(np.float64) / 255.0 @ MATRIX.T + OFFSET
    height, width = rgb.shape[:2]
    means = yuv.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    return yuv[..., 0], means[..., 1], means[..., 2]


def split(planes):
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    u, v = planes[height:].reshape(2, height // 2, width // 2)
    return planes[:height], u, v


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size_hw", [(2, 6), (6, 2), (50, 322), (720, 1280)])
def test_planes_are_those_of_the_standard(size_hw, channel_order):
    rgb = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    image = np.ascontiguousarray(rgb[..., :: 1 if channel_order == "rgb" else -1])
    planes = split(i420(image, channel_order))
    for plane, expected in zip(planes, expected_planes(rgb), strict=True):
        # Rounded twice: the mean of four pixels, then 10-bit weights.
        assert np.abs(plane - expected).max() <= 2.0
        assert np.abs(plane - expected).mean() <= 0.5


@pytest.mark.parametrize("size_hw", [(1, 1), (47, 63), (48, 63), (47, 64)])
def test_odd_sides_repeat_their_last_row_or_column(size_hw):
    rgb = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    even = np.pad(rgb, ((0, size_hw[0] % 2), (0, size_hw[1] % 2), (0, 0)), mode="edge")
    np.testing.assert_array_equal(i420(rgb, "rgb"), i420(even, "rgb"))
