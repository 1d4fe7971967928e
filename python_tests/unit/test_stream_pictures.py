"""Sources without a camera: the demo's wandering window, and photos."""

import cv2
import numpy as np
import pytest

from support.errors import refused
from support.streams import ReaderNow
from zsseg_rt.demo import demo_photos
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import read_photo
from zsseg_rt.stream.photo_folder import DemoCamera, PhotoSource
from zsseg_rt.stream.source import RecordingTimes, redact, shown


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


def test_windows_of_the_drawn_world_show_nearly_the_whole_picture():
    still = read_photo(demo_photos("scenes")[0])
    (picture,) = camera(size_hw=(720, 720), num_frames=1).pictures(ReaderNow())
    side = still.shape[0]
    small = cv2.resize(picture.image, (round(side / 1.1),) * 2, interpolation=cv2.INTER_AREA)
    found = cv2.matchTemplate(still, small, cv2.TM_CCOEFF_NORMED)
    assert found.max() > 0.95


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
    ("given", "shown"),
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
def test_passwords_are_blanked_out(given, shown):
    assert redact(given) == shown


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("rtsp://u:se cret@cam/1", "rtsp://cam/1"),
        ("rtsp://u:se\ncret@cam/1", "rtsp://cam/1"),
        ("rtsp:/u:secret@cam/1", "***"),
        ("u:secret@cam rtsp://x", "***"),
    ],
)
def test_an_address_is_shown_without_any_login(address, told):
    assert shown(address) == told


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
