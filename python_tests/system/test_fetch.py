"""A name becomes a bundle that every command finds, from a hub that may misbehave in any way."""

import gzip
import hashlib
import json
import shutil
import socket
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.torch import save

from support import tiny
from support.command_line import ctrl_c_once, python, run
from support.errors import refused
from support.full_disk import disk_with_room_for
from support.hub_server import COMMIT, serve_hub
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundles.pretrained import (
    RECOMMENDED,
    PretrainedSet,
    bundle_place,
    checkpoint_folder,
)
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, BundleError, FetchError
from zsseg_rt.fetch import SETS, Progress, bundles, checkpoints, fetch_bundle
from zsseg_rt.fetch.checkpoints import find_checkpoints

SIZES = tiny.TinySizes(num_layers=2, text_vocab=49408, text_length=77)
FILE, REPOSITORY = "open_clip_model.safetensors", "someone/tiny-clip"
KEY = f"{REPOSITORY}/{FILE}"
TINY_SET = PretrainedSet(
    name="tiny-set", repository=REPOSITORY, clip="ViT-tiny", tag="made_on_the_spot", head="naclip",
    num_parameters=sum(value.numel() for value in tiny.clip_state_dict(SIZES).values()), size=64,
    activation="quick_gelu", licence="none", good_for="tests",
)  # fmt: skip


@cache
def weights_file(salt="", num_layers=SIZES.num_layers):
    """As the hub has them."""
    tensors = tiny.clip_state_dict(replace(SIZES, num_layers=num_layers), salt)
    return save({key: value.contiguous() for key, value in tensors.items()})


def by_hand(home):
    """A finder of weights files that asks no hub."""

    def find(entry, _):
        path = home / FILE
        path.write_bytes(weights_file())
        return [bundles.Checkpoint(path=path, origin=f"{entry.repository} {FILE}", ours=False)]

    return find


@pytest.fixture
def home(tmp_path, monkeypatch):
    """This package's folder and the hub's cache, both empty; small parts; no proxy in between."""
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    getattr(huggingface_hub, "close_session", lambda: None)()
    monkeypatch.setitem(SETS, "tiny-set", TINY_SET)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def offline(home, monkeypatch):
    """The folder for a set's files, without a hub; the set may be another one in part."""

    def folder_for(name, **changes):
        monkeypatch.setitem(SETS, name, replace(SETS[name], **changes))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        getattr(huggingface_hub, "close_session", lambda: None)()
        folder = checkpoint_folder(SETS[name].repository)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return folder_for


def labels(bundle, classes):
    """The bundle of an engine that labelled an image."""
    with Engine(bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(classes, templates=["a {}."])
        assert engine.segment(np.zeros((32, 48, 3), np.uint8)).labels.shape == (32, 48)
        return engine.bundle


def test_the_bundle_is_found_by_name_and_says_where_it_comes_from(home, monkeypatch, capsys):
    monkeypatch.setattr(bundles, "find_checkpoints", by_hand(home))
    assert fetch_bundle("tiny-set") == bundle_place("tiny-set")
    bundle = labels("tiny-set", ["road", "sky"])
    assert (bundle.path, bundle.name) == (bundle_place("tiny-set"), "tiny-set")
    assert bundle.text.space == "CLIP ViT-tiny made_on_the_spot"
    assert (bundle.licence, bundle.provenance["source"]) == ("none", f"{REPOSITORY} {FILE}")
    assert set(bundle.graphs["image_encoder"]) == {"float32", "float16"}
    monkeypatch.setattr(bundles, "find_checkpoints", None)  # another fetch downloads nothing
    assert run("fetch", "tiny-set") == EXIT_OK
    assert "tiny-set is here already" in capsys.readouterr().out
    assert run("fetch") == EXIT_OK
    assert "tiny-set  (here)\n" in capsys.readouterr().out
    (graph, *_) = bundle_place("tiny-set").glob("image_encoder*")
    graph.write_bytes(graph.read_bytes()[:-1])
    with refused(FetchError, None, "--overwrite"):
        fetch_bundle("tiny-set")


def test_names_are_listed_with_what_they_are(home, capsys):
    assert run("fetch") == EXIT_OK
    listed = capsys.readouterr().out
    for one in SETS.values():
        for part in (one.name, one.repository, one.files[0], one.licence, one.good_for,
                     one.published, one.cost):  # fmt: skip
            assert part in listed
    assert "598 MB: " in listed
    assert listed.count("(recommended)") == listed.count(f"{RECOMMENDED}  (recommended)") == 1
    assert max(map(len, listed.splitlines())) <= 102  # an address


def test_another_input_size_is_a_bundle_with_a_name_of_its_own(home, monkeypatch):
    monkeypatch.setattr(bundles, "find_checkpoints", by_hand(home))
    assert run("fetch", "tiny-set", "--size", "224") == EXIT_OK
    assert Bundle.load("tiny-set-224").preprocess.size_hw == (224, 224)
    with refused(BundleError, "tiny-set", "fetch"):
        Bundle.load("tiny-set")


def test_what_cannot_be_fetched_is_refused_before_the_download(home, capsys, monkeypatch):
    for asked, message in (
        ("sfp-b16 --size 300", "Inputs: --size 224, 336, 448"),
        ("cat-seg-b16 --size 224", "Inputs: --size 224, 336, 448"),
        ("naclip-b61", "Did you mean 'naclip-b16'? Known names: sfp-b16,"),
    ):
        assert run("fetch", *asked.split()) == EXIT_USAGE
        assert message in capsys.readouterr().err
    with refused(ArgumentError, "name"):
        fetch_bundle("nothing")
    assert not home.exists()
    monkeypatch.setattr(bundles, "find_checkpoints", None)
    with monkeypatch.context() as patch, refused(BackendUnavailableError, "sentencepiece"):
        patch.setitem(sys.modules, "sentencepiece", None)
        fetch_bundle("tipsv2-b14")
    shutil.rmtree(home, ignore_errors=True)
    home.write_text("a file")
    with refused(FetchError, None, "ZSSEG_HOME"):
        fetch_bundle("tiny-set")


@pytest.mark.parametrize(("name", "address"), [
    ("tipsv2-b14", "com/tips_data/v2_0/checkpoints/pytorch/tips_v2_oss_b14_vision.npz"),
    ("cat-seg-b16", "co/spaces/hamacojr/CAT-Seg-weights/resolve/main/model_base.pth"),
])  # fmt: skip
def test_other_weights_come_from_their_authors(offline, name, address):
    pytest.importorskip("sentencepiece", reason="needs pip install '.[tips]'")
    offline(name)
    with pytest.raises(FetchError) as caught:
        fetch_bundle(name)
    assert address in str(caught.value)


def test_weights_of_another_model_are_refused(offline):
    (offline("tiny-set") / FILE).write_bytes(weights_file(num_layers=1))
    with refused(FetchError, None, "open_clip_model.safetensors"):
        fetch_bundle("tiny-set")
    assert not bundle_place("tiny-set").exists()


def test_an_interrupted_export_leaves_no_bundle(home, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "find_checkpoints", by_hand(home))
    monkeypatch.setattr("zsseg_rt.export.bundle_writer.save_graphs", interrupted)
    assert run("fetch", "tiny-set") == EXIT_FAILURE
    printed = capsys.readouterr().err
    assert printed.startswith("zsseg-rt: interrupted; what was downloaded is kept")
    assert list((home / "bundles").iterdir()) == []


@pytest.mark.nightly
def test_cat_seg_is_made_of_its_file(offline):
    import torch

    from support import golden_cat_seg, tiny

    sizes = golden_cat_seg.TINY | {"v_layers": 9}
    weights = tiny.rule_state_dict(golden_cat_seg.official_shapes(sizes))
    count = sum(value.numel() for key, value in weights.items() if "logit_scale" not in key)
    folder = offline("cat-seg-b16", num_parameters=count)
    torch.save({"model": weights}, folder / "model_base.pth")
    bundle = Bundle.load(fetch_bundle("cat-seg-b16"))
    assert (bundle.family, bundle.licence) == ("aggregation", SETS["cat-seg-b16"].licence)
    assert bundle.text.space.startswith("CAT-Seg")


def test_tips_is_made_of_its_three_files(offline):
    """Files as the authors' in small."""
    pytest.importorskip("sentencepiece", reason="needs pip install '.[tips]'")
    from support import golden_tips

    name, vision, text = "tipsv2-b14", golden_tips.vision(), golden_tips.text()
    count = sum(value.size for tower in (vision, text) for value in tower.values())
    folder = offline(name, num_parameters=count, size=56)
    np.savez(folder / "tips_v2_oss_b14_vision.npz", **vision)
    np.savez(folder / "tips_v2_oss_b14_text.npz", **text)
    (folder / "tokenizer.model").write_bytes(golden_tips.pieces())
    bundle = labels(fetch_bundle(name), ["road", "sky"])
    assert (bundle.licence, bundle.text.space) == (SETS[name].licence, "TIPSv2 B/14")
    assert bundle.text.tokenizer.file == "tokenizer.model"
    offline(name, num_parameters=2 * count)
    with refused(FetchError, None, "tips_v2_oss_b14_vision.npz"):
        fetch_bundle(name, overwrite=True)


def use_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(home, monkeypatch):
    with serve_hub() as server:
        use_endpoint(monkeypatch, server.endpoint)
        server.files[KEY] = weights_file()
        yield server


def test_from_the_hub_to_a_bundle_with_an_interruption(hub, capsys):
    place, hub.pause = checkpoint_folder(REPOSITORY), 0.05
    with ctrl_c_once(lambda: any(p.stat().st_size for p in place.glob("*.partial"))):
        assert run("fetch", "tiny-set") == EXIT_FAILURE
    assert capsys.readouterr().err.splitlines()[-1].endswith("To go on: zsseg-rt fetch tiny-set")
    assert not (place / FILE).exists()
    hub.pause = 0.0
    assert run("fetch", "tiny-set") == EXIT_OK
    assert hub.ranges()[-1] is not None
    out = capsys.readouterr().out
    assert "from an earlier try" in out
    assert "were removed; --keep-checkpoint keeps them" in out
    assert list(place.iterdir()) == []
    Bundle.load("tiny-set").verify()


# What the command line runs, with another set; must not load torch.
CHILD = """
import json, sys
from zsseg_rt.cli import main
from zsseg_rt.bundles.pretrained import SETS, PretrainedSet
chosen = PretrainedSet(**json.loads(sys.argv[1]))
SETS[chosen.name] = chosen
code = main(["fetch", chosen.name])
assert not {"torch", "onnx", "open_clip"} & set(sys.modules)
sys.exit(code)
"""


def test_siglip_goes_from_the_hub_to_labels_without_torch(hub, home, tmp_path, shared_dir):
    """Weights of the published layout in small, and the tokenizer, by the hub's protocol."""
    from safetensors.numpy import save

    from support.golden_encoders import gemma_model, open_clips, towers

    weights = open_clips(towers(shared_dir, "siglip_small_public.npz", "")[2], "siglip")
    unused = ("logit_scale", "logit_bias", "visual.trunk.head.bias")
    count = sum(value.size for key, value in weights.items() if key not in unused)
    own = {"num_parameters": count, "revision": "main", "sha256": {}, "size": 96}
    entry = replace(SETS["siglip2-b16"], **own)
    contents = [save({k: np.ascontiguousarray(v) for k, v in weights.items()})]
    contents.append(json.dumps({"model": gemma_model()[1]}).encode())
    for file, content in zip(entry.files, contents, strict=True):
        hub.files[f"{entry.repository}/{file}"] = content
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hugging_face"),
              "PYTHONPATH": str(Path(bundles.__file__).parents[2])}  # fmt: skip
    done = python("-c", CHILD, json.dumps(asdict(entry)), more_env=places)
    assert done.returncode == EXIT_OK, done.stderr
    bundle = labels(entry.name, ["gata", "犬"])
    assert (bundle.licence, bundle.preprocess.size_hw) == (entry.licence, (96, 96))


class Heard(Progress):
    def __init__(self):
        self.lines, self.bytes = [], []

    def say(self, text):
        self.lines.append(text)

    def downloaded(self, done, total):
        self.bytes.append((done, total))


def find(heard=None, **pins):
    (checkpoint,) = find_checkpoints(replace(TINY_SET, **pins), heard or Heard())
    return checkpoint


def folder():
    return checkpoint_folder(REPOSITORY)


def left_behind():
    return sorted(path.name for path in folder().glob("*"))


def partial_file():
    (path,) = folder().glob("*.partial")
    return path


def failed(match, **pins):
    with pytest.raises(FetchError, match=match) as caught:
        find(**pins)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_whole():
    return find().path.read_bytes() == weights_file()


def test_the_file_comes_whole_told_beforehand_and_once(hub):
    heard, size = Heard(), len(weights_file())
    checkpoint = find(heard)
    assert (checkpoint.path, checkpoint.ours) == (folder() / FILE, True)
    assert checkpoint.path.read_bytes() == weights_file()
    assert COMMIT[:12] in checkpoint.origin
    (line,) = heard.lines
    for part in (f"{hub.endpoint}/{REPOSITORY}/resolve/main/{FILE}", f"{size} bytes", "licence"):
        assert part in line
    assert heard.bytes == sorted(heard.bytes)
    assert (heard.bytes[0], heard.bytes[-1]) == ((0, size), (size, size))
    assert left_behind() == [FILE, f"{FILE}.json"]
    hub.requests.clear()
    assert find().ours
    assert hub.requests == []
    checkpoint.path.write_bytes(weights_file("other"))
    assert "then run this again" in failed("expected the published file")


@pytest.mark.parametrize("again", [False, True])
def test_a_broken_connection_goes_on_by_itself(hub, again):
    """Also where the server sends everything again; what is of other content is removed."""
    folder().mkdir(parents=True)
    (folder() / f"{FILE}.aaaaaaaaaaaa.partial").write_bytes(b"old")
    hub.cut_after, hub.ignores_ranges = [1 << 20], again
    assert is_whole()
    assert hub.ranges() == [None, f"bytes={1 << 20}-"]
    assert left_behind() == [FILE, f"{FILE}.json"]


def test_a_failed_transfer_says_what_is_kept(hub, monkeypatch):
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1_000_000})
        patch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
        assert "Free some, or set ZSSEG_HOME" in failed(r"expected .* of free space")
    assert hub.ranges() == []
    hub.body_status = 503
    assert "HTTP 503" in failed("expected to download")
    hub.body_status, hub.cut_after = 0, [1 << 20]

    class ThenRefuse(Heard):
        def downloaded(self, done, total):
            hub.body_status = 503 if done else 0

    with pytest.raises(FetchError, match=r"HTTP 503.* after \d+ bytes, which are kept"):
        find(ThenRefuse())
    assert partial_file().stat().st_size > 0
    partial_file().unlink()
    hub.body_status = 0
    with disk_with_room_for(1 << 20):
        assert "set ZSSEG_HOME" in failed("cannot be written: File too large")
    assert 0 < partial_file().stat().st_size <= 1 << 20
    assert is_whole()


@pytest.mark.parametrize(("served", "says"), [
    (weights_file("other"), "expected the published file, .* It was removed. Run this again"),
    (weights_file()[:-100], "expected to download"),
])  # fmt: skip
def test_other_content_than_announced_is_not_taken(hub, served, says):
    hub.served[KEY] = served
    failed(says)
    assert not (folder() / FILE).exists()
    hub.served.clear()
    assert is_whole()


@pytest.mark.parametrize(("packed", "resumed"), [(False, False), (True, True)])
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


@pytest.mark.parametrize(("how", "says"), [
    ({"status": 401}, "set HF_TOKEN"),
    ({"status": 404}, "HTTP 404, there is no such file"),
    ({"status": 503}, "the hub is in trouble; try again later"),
    ({"is_no_hub": True}, "does not come from a Hugging Face Hub"),
])  # fmt: skip
def test_a_refusal_says_what_to_do_by_hand(hub, how, says):
    vars(hub).update(how)
    message = failed("tiny-set: expected to download")
    for part in (says, FILE, f"{hub.endpoint}/{REPOSITORY}/resolve/main/", str(folder())):
        assert part in message
    assert len(hub.requests) <= 2
    assert folder().is_dir()  # where the file belongs


def test_without_a_server_or_offline_the_way_by_hand_is_told(hub, offline, monkeypatch, caplog):
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        use_endpoint(monkeypatch, f"http://someone:secret@127.0.0.1:{port}")
        message = failed("no connection")
    assert f"http://127.0.0.1:{port}/{REPOSITORY}" in message
    assert "secret" not in message
    use_endpoint(monkeypatch, hub.endpoint)
    caplog.clear()
    offline("tiny-set")
    message = failed("HF_HUB_OFFLINE=1")
    assert f"put the file into {folder()}, then run this again" in message
    assert (hub.requests, caplog.records) == ([], [])


def digest():
    return hashlib.sha256(weights_file()).hexdigest()


def test_a_file_that_was_put_there_by_hand_is_used(hub, offline):
    """Compared with the hub, or with content that is known here, or told to be neither."""
    folder().mkdir(parents=True)
    (folder() / FILE).write_bytes(weights_file())
    assert not find().ours
    offline("tiny-set")
    heard = Heard()
    assert find(heard).path == folder() / FILE
    assert "cannot be compared" in heard.lines[0]
    assert not find(sha256={FILE: digest()}).ours
    for content in (weights_file()[:-1], weights_file("other")):
        (folder() / FILE).write_bytes(content)
        assert "Remove" in failed("expected", sha256={FILE: digest()})
        assert (folder() / FILE).exists()  # it is the user's
    assert hub.ranges() == []


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
    checkpoint = find(heard)
    assert checkpoint.path.resolve() == (blob.resolve() if sound else folder() / FILE)
    assert checkpoint.ours != sound
    assert bool(hub.requests) != sound
    assert sound or "is damaged and not used" in heard.lines[0]


def test_all_files_come_from_a_plain_address(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_hub_alone")
    hub.plain = {"/data/v2/vision.npz": b"v" * 300_000, "/data/v1/pieces.model": b"p" * 1000}
    entry = replace(TINY_SET, repository=f"{hub.endpoint}/data",
                    files=("v2/vision.npz", "v1/pieces.model"))  # fmt: skip
    heard = Heard()
    hub.cut_after = [100_000]  # a broken download goes on
    checkpoints = find_checkpoints(entry, heard)
    place = checkpoint_folder(entry.repository)
    assert [one.path for one in checkpoints] == [place / "vision.npz", place / "pieces.model"]
    assert [one.path.read_bytes() for one in checkpoints] == list(hub.plain.values())
    assert not place.name.startswith("http")
    assert all(one.ours for one in checkpoints)
    assert f"{hub.endpoint}/data/v2/vision.npz (300000 bytes" in heard.lines[0]
    assert set(hub.logins) == {None}
    assert any(wanted for _, _, wanted in hub.requests)
    hub.requests.clear()
    find_checkpoints(entry, heard)
    assert hub.requests == []


def test_the_pinned_commit_is_asked_for_and_other_content_refused(hub):
    """Whoever replaces a file at the hub also replaces the hash that the hub states."""
    assert f"for the pinned {'1' * 12}" in failed("expected to download", revision="1" * 40)
    hub.files[KEY], pins = weights_file("other"), {"revision": COMMIT, "sha256": {FILE: digest()}}
    failed(f"expected {FILE} with the sha256 {digest()[:12]}.* Nothing was downloaded", **pins)
    assert hub.ranges() == []
    hub.requests.clear()
    hub.files[KEY] = weights_file()
    assert find(**pins).path.read_bytes() == weights_file()
    asked = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert asked == {f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}"}
