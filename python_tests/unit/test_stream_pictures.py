"""Sources without a camera, names and times of sources, and frames turned as a phone was held."""

import struct

import cv2
import numpy as np
import pytest

from support.errors import refused
from support.streams import ReaderNow, write_video
from zsseg_rt.errors import SourceError
from zsseg_rt.stream.conversion import i420, upright
from zsseg_rt.stream.photo_folder import DemoCamera, PhotoSource
from zsseg_rt.stream.source import Lateness, RecordingTimes, redact, shown
from zsseg_rt.stream.uris import open_sources


def camera(**settings):
    defaults = {"demo": "scenes", "size_hw": (48, 64), "num_frames": 5, "now": lambda: 7.0}
    return DemoCamera(name="test://", **defaults | settings)


def test_the_demo_camera_gives_the_same_frames_for_the_same_seed():
    def frames(seed):
        pictures = camera(seed=seed, num_frames=200).pictures(ReaderNow())
        return [picture.image for picture in pictures]

    first, again, other = frames(3), frames(3), frames(4)
    assert len(first) == 200
    assert first[0].shape == (48, 64, 3)
    assert first[0].flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(first, again)
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
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 300), (720, 1280)])
def test_the_demo_camera_has_any_size(size_hw, demo):
    (picture,) = camera(size_hw=size_hw, num_frames=1, demo=demo).pictures(ReaderNow())
    assert picture.image.shape == (*size_hw, 3)


def test_the_demo_camera_keeps_its_rate_and_stops_when_told():
    reader = ReaderNow()
    pictures = camera(rate=20.0).pictures(reader)
    assert [p.pts_seconds for p in pictures] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert reader.waits == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert list(camera().pictures(ReaderNow(stop=True))) == []


def test_channels_come_in_the_order_asked_for(tmp_path):
    rgb, bgr = (
        next(camera(channel_order=order).pictures(ReaderNow())).image for order in ("rgb", "bgr")
    )
    np.testing.assert_array_equal(rgb, bgr[..., ::-1])
    cv2.imwrite(str(tmp_path / "a.png"), np.full((2, 3, 3), (1, 2, 3), np.uint8))
    for order, expected in (("rgb", [3, 2, 1]), ("bgr", [1, 2, 3])):
        source = PhotoSource(name="photos", path=str(tmp_path), channel_order=order)
        (picture,) = source.pictures(ReaderNow())
        assert picture.image[0, 0].tolist() == expected


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
        (
            "Failed to connect to rtsp://cam/pw=secret. (Generic)",
            "Failed to connect to rtsp://cam/. (Generic)",
        ),
        ("test://?size=1x1", "test://?size=1x1"),
        ("a@b.mp4", "a@b.mp4"),
    ],
)
def test_passwords_are_blanked_out(uri, shown):
    assert redact(uri) == shown


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("rtsp://u:se cret@cam/1", "rtsp://cam/1"),
        ("rtsp://u:se\ncret@cam/1", "rtsp://cam/1"),
        ("rtsp:/u:secret@cam/1", "***"),
        ("u:secret@cam rtsp://x", "***"),
    ],
)
def test_an_address_is_shown_without_any_login(address, expected):
    assert shown(address) == expected


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
    image = np.zeros((48, 64, 3), np.uint8)
    colours = (200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)
    for place, colour in enumerate(colours):
        top, left = place // 2 * 24, place % 2 * 32
        image[top : top + 24, left : left + 32] = colour
    return image


def record(path, image, matrix):
    """A video whose header notes how to show it, as phones write it."""
    write_video(path, [np.ascontiguousarray(image)] * 3)
    data = bytearray(path.read_bytes())
    a, b, c, d = matrix
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("way", sorted(HELD))
def test_frames_are_upright_however_the_phone_was_held(tmp_path, way):
    order = "bgr" if "mirrored" in way else "rgb"
    pytest.importorskip("av")
    lie, matrix = HELD[way]
    path = record(tmp_path / "phone.mp4", lie(scene()), matrix)
    (source,) = open_sources(path, order)
    images = [picture.image for picture in source.pictures(ReaderNow())]
    assert len(images) == 3
    expected = scene() if order == "rgb" else scene()[..., ::-1]
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
    image = rgb if channel_order == "rgb" else np.ascontiguousarray(rgb[..., ::-1])
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
