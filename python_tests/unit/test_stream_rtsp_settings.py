"""Which library reads RTSP, with what settings, and how GStreamer's sources are written."""

import sys

import pytest

from support.errors import refused
from zsseg_rt.errors import BackendUnavailableError, ConfigError
from zsseg_rt.stream import rtsp
from zsseg_rt.stream.gstreamer.library import redact_pipeline
from zsseg_rt.stream.rtsp import rtsp_settings
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.video import VideoSource, split_login


def chosen(monkeypatch, uri="rtsp://cam/1", **variables):
    for name in ("LIBRARY", "PROTOCOLS", "LATENCY_MS"):
        monkeypatch.delenv(f"ZSSEG_RTSP_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"ZSSEG_RTSP_{name}", value)
    (source,) = open_sources(uri)
    return source


def test_pyav_reads_rtsp_where_it_is_asked_for(monkeypatch):
    source = chosen(monkeypatch, LIBRARY="pyav", PROTOCOLS="tcp,udp", LATENCY_MS="200")
    assert isinstance(source, VideoSource)
    assert (source.url, source.kind, source.live) == ("rtsp://cam/1", "rtsp", True)
    assert source.options == {"rtsp_transport": "tcp+udp", "max_delay": "200000"}
    assert isinstance(chosen(monkeypatch, "rtsps://cam/1"), VideoSource)


def test_pyav_reads_rtsp_where_gstreamer_is_absent_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gi", None)
    rtsp.tell_once.cache_clear()
    with caplog.at_level("INFO"):
        assert isinstance(chosen(monkeypatch), VideoSource)
        assert isinstance(chosen(monkeypatch), VideoSource)
    assert caplog.text.count("read with PyAV, since GStreamer is not complete") == 1
    with refused(BackendUnavailableError, "gi"):
        chosen(monkeypatch, LIBRARY="gstreamer")


@pytest.mark.parametrize(
    ("name", "value"),
    [("LIBRARY", "vlc"), ("PROTOCOLS", "tcp,pigeon"), ("LATENCY_MS", "-1"), ("LATENCY_MS", "9e9")],
)
def test_wrong_settings_are_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(f"ZSSEG_RTSP_{name}", value)
    with refused(ConfigError, f"ZSSEG_RTSP_{name}", value):
        rtsp_settings()


def test_logins_are_taken_out_of_urls():
    assert split_login("rtsp://cam/x@y") == ("rtsp://cam/x@y", None)
    assert split_login("rtsp://u@cam:1/x?a=b@c") == ("rtsp://cam:1/x?a=b@c", ("u", ""))
    assert split_login("rtsp://u:a:b@c@[::1]:5/") == ("rtsp://[::1]:5/", ("u", "a:b@c"))


def test_pipelines_are_named_without_their_secrets():
    text = "srtsrc uri=srt://h?passphrase=hush passphrase='hu sh' user-pw = \"hush\" key-int-max=3"
    assert "hu" not in redact_pipeline(text)
    assert "key-int-max=3" in redact_pipeline(text)
