"""Weights from a server that speaks the hub's protocol, and from one that misbehaves."""

import gzip
import hashlib
import resource
import socket
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub import constants

from support.hub_server import COMMIT, serve_hub
from support.tiny_set import FILE, KEY, REPOSITORY, tiny_set, weights_file
from zsseg_rt.bundles.pretrained import checkpoint_folder
from zsseg_rt.errors import FetchError
from zsseg_rt.fetch import Progress, checkpoints
from zsseg_rt.fetch.checkpoints import find_checkpoints


def use_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """This package's folder and the hub's cache, both empty; small parts; no proxy in between."""
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    getattr(huggingface_hub, "close_session", lambda: None)()
    return tmp_path / "home"


@pytest.fixture
def hub(home, monkeypatch):
    with serve_hub() as server:
        use_endpoint(monkeypatch, server.endpoint)
        server.files[KEY] = weights_file()
        yield server


class Heard(Progress):
    def __init__(self):
        self.lines, self.bytes = [], []

    def say(self, text):
        self.lines.append(text)

    def downloaded(self, done, total):
        self.bytes.append((done, total))


def find(heard=None, **pins):
    (checkpoint,) = find_checkpoints(replace(tiny_set(), **pins), heard or Heard())
    return checkpoint


def folder():
    return checkpoint_folder(REPOSITORY)


def left_behind():
    return sorted(path.name for path in folder().glob("*"))


def partial_file():
    (found,) = folder().glob("*.partial")
    return found


def refused(match, *, in_one_line=True, **pins):
    with pytest.raises(FetchError, match=match) as caught:
        find(**pins)
    assert not in_one_line or "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_comes_whole_and_is_told_beforehand(hub):
    heard, size = Heard(), len(weights_file())
    found = find(heard)
    assert found.path == folder() / FILE
    assert found.path.read_bytes() == weights_file()
    assert found.ours
    assert COMMIT[:12] in found.origin
    assert left_behind() == [FILE, f"{FILE}.json"]
    (line,) = heard.lines
    for part in (f"{hub.endpoint}/{REPOSITORY}/resolve/main/{FILE}", f"{size} bytes", "licence"):
        assert part in line
    assert heard.bytes[0] == (0, size)
    assert heard.bytes[-1] == (size, size)
    assert heard.bytes == sorted(heard.bytes)


def is_whole():
    """Another try gets the published file."""
    return find().path.read_bytes() == weights_file()


def test_a_file_that_is_here_is_not_downloaded_again(hub):
    path = find().path
    hub.requests.clear()
    assert find().ours
    assert hub.requests == []
    path.write_bytes(weights_file("other"))
    assert "then run this again" in refused("expected the published file")


@pytest.mark.parametrize("again", [False, True])
def test_a_broken_connection_goes_on_by_itself(hub, again):
    """Also where the server sends everything again; what is of other content is removed."""
    folder().mkdir(parents=True)
    (folder() / f"{FILE}.aaaaaaaaaaaa.partial").write_bytes(b"old")
    hub.cut_after, hub.ignores_ranges = [1 << 20], again
    assert is_whole()
    assert hub.ranges() == [None, f"bytes={1 << 20}-"]
    assert left_behind() == [FILE, f"{FILE}.json"]


class Stopped(Heard):
    def downloaded(self, done, total):
        if done >= 1 << 20:
            raise KeyboardInterrupt


def test_another_run_goes_on_where_the_last_one_stopped(hub):
    hub.cut_after = [1 << 20]
    with pytest.raises(KeyboardInterrupt):
        find(Stopped())
    assert partial_file().stat().st_size == 1 << 20
    assert not (folder() / FILE).exists()
    hub.cut_after, heard = [], Heard()
    assert find(heard).path.read_bytes() == weights_file()
    assert hub.ranges()[-1] == f"bytes={1 << 20}-"
    assert "from an earlier try" in heard.lines[0]


def test_a_refused_transfer_says_what_is_kept(hub):
    hub.body_status = 503
    assert "HTTP 503" in refused("expected to download")
    hub.body_status, hub.cut_after = 0, [1 << 20]

    class ThenRefuse(Heard):
        def downloaded(self, done, total):
            hub.body_status = 503 if done else 0

    with pytest.raises(FetchError, match=r"HTTP 503.* after \d+ bytes, which are kept"):
        find(ThenRefuse())
    assert partial_file().stat().st_size > 0


@pytest.mark.parametrize(
    ("served", "says"),
    [
        (weights_file("other"), "expected the published file, .* It was removed. Run this again"),
        (weights_file()[:-100], "expected to download"),
    ],
)
def test_other_content_than_announced_is_not_taken(hub, served, says):
    hub.served[KEY] = served
    refused(says)
    assert not (folder() / FILE).exists()
    hub.served.clear()
    assert is_whole()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_no_more_is_written_than_was_announced(hub, packed, resumed):
    """A server that sends more, or a gzip of zeros that unpacks to 30 times as much."""
    content = weights_file() + bytes(30 * len(weights_file()))
    hub.served[KEY] = gzip.compress(content) if packed else content
    hub.encoding = "gzip" if packed else ""
    hub.cut_after, hub.ignores_ranges = ([1 << 16] if resumed else []), packed
    heard = Heard()
    with pytest.raises(FetchError, match=r"expected \d+ bytes at most, as was announced, got more"):
        find(heard)
    assert max(done for done, _ in heard.bytes) <= len(weights_file())
    assert left_behind() == []
    hub.served.clear()
    hub.encoding = ""
    assert is_whole()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"status": 401}, "set HF_TOKEN"),
        ({"status": 404}, "HTTP 404, there is no such file"),
        ({"status": 503}, "the hub is in trouble; try again later"),
        ({"is_no_hub": True}, "does not come from a Hugging Face Hub"),
    ],
)
def test_a_refusal_says_what_to_do_by_hand(hub, how, says):
    vars(hub).update(how)
    message = refused("tiny-set: expected to download")
    for part in (says, FILE, f"{hub.endpoint}/{REPOSITORY}/resolve/main/", str(folder())):
        assert part in message
    assert len(hub.requests) <= 2
    assert folder().is_dir()  # where the file belongs


def test_without_a_server_the_way_by_hand_is_told(home, monkeypatch):
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        use_endpoint(monkeypatch, f"http://someone:secret@127.0.0.1:{port}")
        message = refused("no connection")
    assert f"http://127.0.0.1:{port}/{REPOSITORY}" in message
    assert "secret" not in message


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub, "close_session", lambda: None)()


def test_offline_the_hub_is_not_asked(hub, monkeypatch, caplog):
    go_offline(monkeypatch)
    message = refused("HF_HUB_OFFLINE=1")
    assert f"put the file into {folder()}, then run this again" in message
    assert hub.requests == []
    assert caplog.records == []


def put_by_hand(content):
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / FILE).write_bytes(content)


def digest():
    return hashlib.sha256(weights_file()).hexdigest()


def test_a_file_that_was_put_there_by_hand_is_used(hub, monkeypatch):
    """Compared with the hub, or with content that is known here, or told to be neither."""
    put_by_hand(weights_file())
    assert not find().ours
    go_offline(monkeypatch)
    heard = Heard()
    assert find(heard).path == folder() / FILE
    assert "cannot be compared" in heard.lines[0]
    assert not find(sha256={FILE: digest()}).ours
    put_by_hand(weights_file("other"))
    refused("expected the published file", sha256={FILE: digest()})
    assert hub.ranges() == []


@pytest.mark.parametrize("content", [weights_file()[:-1], weights_file("other")])
def test_a_file_by_hand_that_is_another_is_refused(hub, content):
    put_by_hand(content)
    assert "Remove" in refused("expected")
    assert (folder() / FILE).exists()  # it is the user's


@pytest.mark.parametrize("sound", [True, False])
def test_the_hugging_face_cache_is_used_where_it_is_sound(hub, tmp_path, sound):
    repository = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    blob = repository / "blobs" / digest()
    blob.write_bytes(weights_file() if sound else weights_file()[:-1])
    (repository / "snapshots" / COMMIT / FILE).symlink_to(f"../../blobs/{blob.name}")
    heard = Heard()
    found = find(heard)
    assert found.path.resolve() == (blob.resolve() if sound else folder() / FILE)
    assert found.ours != sound
    assert bool(hub.requests) != sound
    assert sound or "is damaged and not used" in heard.lines[0]


def test_too_little_space_is_told_before_the_download(hub, monkeypatch):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    assert "Free some, or set ZSSEG_HOME" in refused(r"expected .* of free space")
    assert hub.ranges() == []


def test_a_full_disk_keeps_what_came(hub):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert "set ZSSEG_HOME" in refused("cannot be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < partial_file().stat().st_size <= 1 << 20
    assert is_whole()


def plain_set(hub):
    """A set of two files on a server that is no hub."""
    hub.plain = {"/data/v2/vision.npz": b"v" * 300_000, "/data/v1/pieces.model": b"p" * 1000}
    files = tuple(path.removeprefix("/data/") for path in hub.plain)
    return replace(tiny_set(), repository=f"{hub.endpoint}/data", files=files)


def test_all_files_come_from_a_plain_address(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub_alone")
    chosen, heard = plain_set(hub), Heard()
    found = find_checkpoints(chosen, heard)
    assert [one.path.read_bytes() for one in found] == list(hub.plain.values())
    assert [one.path.name for one in found] == ["vision.npz", "pieces.model"]
    assert {one.path.parent for one in found} == {checkpoint_folder(chosen.repository)}
    assert not found[0].path.parent.name.startswith("http")
    assert all(one.ours for one in found)
    assert f"{hub.endpoint}/data/v2/vision.npz (300000 bytes" in heard.lines[0]
    assert set(hub.logins) == {None}
    hub.requests.clear()
    find_checkpoints(chosen, heard)
    assert hub.requests == []


def test_a_broken_plain_download_goes_on(hub):
    chosen = plain_set(hub)
    hub.cut_after = [100_000]
    found = find_checkpoints(chosen, Heard())
    assert found[0].path.read_bytes() == hub.plain["/data/v2/vision.npz"]
    assert any(wanted for _, _, wanted in hub.requests)


def test_the_pinned_commit_is_asked_for(hub):
    found = find(revision=COMMIT, sha256={FILE: digest()})
    assert found.path.read_bytes() == weights_file()
    asked = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert asked
    assert all(f"/resolve/{COMMIT}/" in path for path in asked)


def test_another_commit_or_content_than_the_pinned_one_is_refused(hub):
    """Whoever replaces a file at the hub also replaces the hash that the hub states."""
    assert f"for the pinned {'1' * 12}" in refused("expected to download", revision="1" * 40)
    hub.files[KEY] = weights_file("other")
    pins = {"revision": COMMIT, "sha256": {FILE: digest()}}
    refused(f"expected {FILE} with the sha256 {digest()[:12]}.* Nothing was downloaded", **pins)
    assert hub.ranges() == []
