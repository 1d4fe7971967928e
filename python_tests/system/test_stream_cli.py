"""``zsseg-rt stream`` as people type it: sinks, reports, exit codes, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.command_line import run
from support.recordings import frames_of
from support.streams import MjpegServer, write_video

OPTIONS = ("--classes", "red,blue", "--device", "cpu")
COMMAND = (sys.executable, "-m", "zsseg_rt", "stream", *OPTIONS)
SMALL = "test://?size=64x48&rate=200"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip("av")
    colours = [np.full((48, 64, 3), COLOUR_WORDS[name], np.uint8) for name in ("red", "blue")]
    return write_video(tmp_path / "in.mp4", colours * 5, gop=1)


def stream(*arguments):
    return run("stream", *arguments, *OPTIONS)


def test_a_camera_that_is_off_at_the_start_is_waited_for(colour_bundle, tmp_path):
    with MjpegServer() as gone:
        pass
    lines = tmp_path / "labels.jsonl"
    call = (gone.url, lines, "-b", colour_bundle, "--frames", "1")
    assert stream(*call) == 1
    cameras = []
    timer = threading.Timer(1.0, lambda: cameras.append(MjpegServer(port=gone.port, ready=40)))
    timer.start()
    assert stream(*call, "--wait") == 0
    cameras[0].stop()
    assert len(lines.read_text().splitlines()) == 1


def test_a_video_becomes_all_kinds_of_files(clip, colour_bundle, tmp_path, capsys):
    out, masks, lines = tmp_path / "out.mp4", f"{tmp_path}/masks/", tmp_path / "out.jsonl"
    report = tmp_path / "report.json"
    assert stream(clip, out, masks, lines, "-b", colour_bundle, "--json", report) == 0
    assert len(frames_of(out)) == 10
    assert len(os.listdir(masks)) == 10
    names = [json.loads(line)["classes"][0]["name"] for line in lines.read_text().splitlines()]
    assert names == ["red", "blue"] * 5
    written = json.loads(report.read_text())
    assert written["engine"]["names"] == ["red", "blue"]
    assert written["sources"][str(clip)]["labelled"] == 10
    assert set(written["sources"][str(clip)]["age_ms"]) == {"p50", "p95", "p99"}
    assert [sink["written"] for sink in written["sinks"]] == [10, 10, 10]
    printed = capsys.readouterr().out
    assert re.search(rf"{re.escape(str(clip))}  10 of 10 frames labelled, [\d.]+ fps\n", printed)
    assert written["sources"][str(clip)]["fps"] > 0.0
    assert f"{out}  10 frames" in printed


def test_frames_and_seconds_end_a_camera(colour_bundle, tmp_path):
    lines = tmp_path / "a.jsonl"
    assert stream(SMALL, lines, "-b", colour_bundle, "--frames", 7) == 0
    assert len(lines.read_text().splitlines()) == 7
    assert stream(SMALL, "-b", colour_bundle, "--seconds", 0.2) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ((), 2, "name a source"),
        (("0",), 2, "--bundle NAME.zsseg"),
        (("ftp://u:secret@cam/1", "-b", "x"), 2, "source: expected test://"),
        (("0", "out.avi", "-b", "x"), 2, "sink: expected NAME.mp4"),
        (("0", "a.mp4", "-b", "x", "--rotate", "10m"), 2, "rotate: expected a time above 0"),
        (("0", "-b", "x", "--policy", "newest"), 2, "policy: expected one of latest, all"),
        (("0", "-b", "x", "--max-staleness", "0"), 2, "max_staleness: expected seconds above 0"),
        (("0", "-b", "x", "--every", "4"), 2, "every: expected none without follow"),
        (("@absent.txt", "-b", "x"), 1, "absent.txt: expected a text file"),
        (("0", "absent/out.jsonl", "-b", "x"), 1, "the folder absent does not exist"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(arguments, code, reason, capsys):
    assert stream(*arguments) == code
    message = capsys.readouterr().err
    assert reason in message
    assert "secret" not in message


def test_frames_between_say_whose_labels_they_have(colour_bundle, tmp_path, capsys):
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (6, 20, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    video = write_video(tmp_path / "in.mp4", [scene[:, 2 * n : 2 * n + 128] for n in range(11)])
    lines, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    options = ("--follow", "--every", "4", "--json", report)
    assert stream(video, lines, "-b", colour_bundle, *options) == 0
    assert "3 of 11 frames labelled, 11 given out with labels" in re.sub(
        r"[0-9.]+ fps, ", "", capsys.readouterr().out
    )
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["index"] for line in rows] == [*range(11)]
    assert [line["moved_from"] for line in rows] == [None, 0, 0, 4, None, 4, 4, 8, None, 8, 8]
    assert all(line["labelled_age"] > 0.0 for line in rows)
    (stats,) = json.loads(report.read_text())["sources"].values()
    assert (stats["labelled"], stats["given_out"]) == (3, 11)


def test_families_without_a_memory_are_refused_before_anything_opens(tmp_path, capsys):
    bundle = Path(__file__).parents[1] / "bundles" / "v1" / "proposals.zsseg"
    assert stream("absent.mp4", f"{tmp_path}/masks/", "-b", bundle, "--steady") == 2
    assert "of family aggregation, dense or descriptor, got proposals" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_an_absent_package_is_a_matter_of_the_environment(colour_bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    for arguments in (("in.mp4",), (SMALL, "out.mp4")):
        assert stream(*arguments, "-b", colour_bundle) == 4
        assert "pip install '.[stream]'" in capsys.readouterr().err


def test_what_fails_leaves_the_rest_and_the_last_sink_ends_the_stream(
    clip, colour_bundle, tmp_path, capsys
):
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    (tmp_path / "bad.png").write_bytes(b"x")
    listed, good = tmp_path / "sources.txt", tmp_path / "good.jsonl"
    listed.write_text(f"{tmp_path}/bad.png\n{clip}\n")
    endless = "test://?size=64x48&rate=100&frames=1000000"
    started = time.monotonic()
    for sources, sinks, failed in (
        (f"@{listed}", [], "1 of 2 sources and 0 of 0 sinks failed"),
        (clip, [tmp_path / "full.jsonl", good], "0 of 1 sources and 1 of 2 sinks failed"),
        (endless, [tmp_path / "full.jsonl"], "0 of 1 sources and 1 of 1 sinks failed"),
    ):
        assert stream(sources, *sinks, "-b", colour_bundle) == 1
        printed = capsys.readouterr()
        assert failed in printed.err
        assert (f"{clip}  10 of 10 frames labelled" in printed.out) == (sources != endless)
        assert ("No space left on device" in printed.out) == bool(sinks)
    assert time.monotonic() - started < 60
    assert len(good.read_text().splitlines()) == 10


def test_a_restart_keeps_what_was_recorded_and_names_whose_it_is(colour_bundle, tmp_path, capsys):
    pytest.importorskip("av")
    listed, report = tmp_path / "cameras.txt", tmp_path / "report.json"
    listed.write_text(f"slow = test://?size=64x48&rate=20&frames=2\n{SMALL}&frames=9\n")
    lines, video = tmp_path / "a.jsonl", tmp_path / "a.mp4"
    for _ in range(2):
        code = stream(f"@{listed}", lines, video, "-b", colour_bundle, "--json", report)
        assert code == 0
    sources = [json.loads(line)["source"] for line in lines.read_text().splitlines()]
    assert (sources.count("slow"), len(sources)) == (4, 22)
    assert len(frames_of(tmp_path / "a-slow.mp4")) == 2
    assert len(frames_of(tmp_path / "a-2.mp4")) == 9
    written = json.loads(report.read_text())
    assert set(written["sources"]) == {"slow", f"{SMALL}&frames=9"}
    whose = written["sinks"][1]["whose"]
    assert list(whose.values()).count("slow") == 1
    assert set(whose) == set(written["sinks"][1]["files"])
    assert len(list(tmp_path.glob("a*.mp4"))) == 4
    assert f"{tmp_path}/a-slow.mp4 (slow)" in capsys.readouterr().out


def test_a_video_of_one_s_own_is_what_the_demo_labels(clip, tmp_path, capsys):
    out, second = tmp_path / "out.mp4", tmp_path / "second.mp4"
    assert run("stream", "--demo", "scenes", clip, out, "--device", "cpu") == 0
    assert "10 of 10 frames labelled" in capsys.readouterr().out
    assert run("stream", "--demo", "--frames", "1", "--device", "cpu") == 0
    assert "test://  1 of" in capsys.readouterr().out
    second.write_bytes(before := clip.read_bytes())
    assert run("stream", "--demo", "scenes", clip, second) == 2
    assert str(second) in capsys.readouterr().err
    assert second.read_bytes() == before
    assert run("segment", "--demo", "scenes", clip) == 2
    assert "zsseg-rt stream" in capsys.readouterr().err


def test_recordings_are_rotated_and_removed(colour_bundle, tmp_path):
    old = tmp_path / "a-20200101T000000Z.jsonl"
    old.write_text("")
    os.utime(old, (1e9, 1e9))
    named = tmp_path / "a.jsonl"
    named.write_text(before := '{"source": "cam", "pts_seconds": 0.0}\n')
    options = ("--rotate", "1h,2kB", "--keep", "7d", "--frames", 30)
    assert stream(SMALL, named, "-b", colour_bundle, *options) == 0
    assert named.read_text() == before
    assert not old.exists()
    files = list(tmp_path.glob("a-*Z*.jsonl"))
    assert len(files) > 3
    assert sum(len(path.read_text().splitlines()) for path in files) == 30


@pytest.mark.parametrize(("out", "unbuffered"), [("/dev/full", ""), ("closed pipe", "1")])
def test_a_full_or_closed_output_is_one_line_and_loses_no_file(
    out, unbuffered, tmp_path, colour_bundle
):
    lines = tmp_path / "a.jsonl"
    call = [*COMMAND, SMALL, lines, "--frames", "3", "-b", colour_bundle]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as pipe, open("/dev/full", "w") as full:
        pipe.wait()  # nobody reads what is written into it any more
        taken = full if out == "/dev/full" else pipe.stdin
        done = subprocess.run(
            call, stdout=taken, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(lines.read_text().splitlines()) == 3
    if out == "/dev/full":
        assert done.stderr.count("\n") == 1
        assert "standard output: cannot be written: No space left" in done.stderr


def heed_signals():
    """As a shell starts a command; tests that run under nohup inherit an ignored SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def recording(tmp_path, colour_bundle):
    """A child that records a clip without end, and the lines it writes into a pipe."""
    pytest.importorskip("av")
    lines = tmp_path / "out.jsonl"
    os.mkfifo(lines)
    call = [*COMMAND, "test://?size=160x120&rate=60", tmp_path / "out.mp4", lines]
    child = subprocess.Popen(
        [*call, "-b", colour_bundle, "--frames", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals,
    )  # fmt: skip
    with lines.open() as pipe:
        yield child, pipe
    child.kill()
    child.communicate()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stream_and_leaves_its_files_playable(kind, recording, tmp_path):
    child, pipe = recording
    first = [pipe.readline() for _ in range(20)]
    sent = time.monotonic()
    child.send_signal(kind)
    rest = pipe.readlines()
    out, err = child.communicate(timeout=60)
    took = time.monotonic() - sent
    assert child.returncode == 0, err
    assert took < 30.0  # 0.5 s on a machine that is not busy
    lines, recorded = len(first) + len(rest), len(frames_of(tmp_path / "out.mp4"))
    assert recorded > 0
    # A busy machine may not write within half a second what waits in two queues of eight frames.
    assert all(line.endswith("not finished in time, left as it is") for line in err.splitlines())
    if not err:
        assert f"out.mp4  {recorded} frames" in out
        assert f"out.jsonl  {lines} frames" in out


def test_a_killed_recording_is_playable(recording, tmp_path):
    child, pipe = recording
    for _ in range(150):  # 2.5 s
        assert pipe.readline()
    child.kill()
    child.wait()
    assert len(frames_of(tmp_path / "out.mp4")) >= 30


ODD_NAME = os.fsdecode(b"caf\xe9\x1b[31m\n") + "\u202e\u2028\x85.mp4"
SPELLED = r"caf\udce9\x1b[31m\n\u202e\u2028\u0085.mp4"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\udc80-\udcff]")


def test_odd_names_of_sources_and_classes_are_escaped_wherever_they_stand(
    clip, colour_bundle, tmp_path, capfd
):
    odd, lines, report = tmp_path / ODD_NAME, tmp_path / "l.jsonl", tmp_path / "report.json"
    clip.rename(odd)
    classes = ["--class", "re\u202ed", "--class", "blue\u2028"]
    call = ("-v", "stream", odd, lines, "-b", colour_bundle, "--json", report, "--device", "cpu")
    assert run(*call, *classes) == 0  # marks that nobody sees do not make another word
    output = lines.read_text() + report.read_text()
    assert run(*call, "--classes", "red,blue") == 0
    printed = "".join(capfd.readouterr())
    output += printed + lines.read_text() + report.read_text()
    assert SPELLED in printed
    assert not RAW.search(output)
    assert json.loads(lines.read_text().splitlines()[0])["source"].endswith(SPELLED)
