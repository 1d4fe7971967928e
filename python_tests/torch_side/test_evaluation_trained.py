"""Runs are evaluated like the bundles made of them."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support import tiny  # noqa: E402
from support.errors import refused  # noqa: E402
from zsseg_rt import Bundle, cli  # noqa: E402
from zsseg_rt.errors import CheckpointError, DeviceError, VocabularyError  # noqa: E402
from zsseg_rt.training.class_embeddings import embed_phrases  # noqa: E402
from zsseg_rt.training.loop.checkpointing import Checkpoint, CheckpointFolder  # noqa: E402
from zsseg_rt.training.trained import (  # noqa: E402
    TrainedClasses,
    describe_model,
    trained_segmenter,
)

NAMES = ("sky", "grass, lawn", "road", "water")
PHRASES = ("sky", "grass", "lawn", "road", "water")


def save_run(folder, model, embeds, protocol="inductive", **changes):
    classes = {"names": NAMES, "seen": (0, 1), "phrases": PHRASES} | changes
    classes = TrainedClasses(
        **classes, templates=("a photo of a {}.",), space="tiny", protocol=protocol
    )
    card = describe_model(model, classes)
    checkpoint = Checkpoint(
        step=1,
        num_processes=1,
        batch_size=1,
        model=model.state_dict(),
        constants={"text_embeds": embeds},
        model_card=card,
    )
    CheckpointFolder(folder / "checkpoints").save(checkpoint)
    return folder


@pytest.fixture(scope="module")
def run(zegclip_model, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), zegclip_model, tiny.text_embeds(5, 32))


@pytest.fixture
def photos(tmp_path):
    """Blurred noise with random masks of seven classes."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(3):
        picture = cv2.resize(rng.integers(0, 256, (9, 11, 3), np.uint8), (110, 90))
        cv2.imwrite(str(tmp_path / "data" / "images" / f"{index}.png"), picture)
        mask = rng.integers(0, 7, (90, 110), np.uint8)
        cv2.imwrite(str(tmp_path / "data" / "masks" / f"{index}.png"), mask)
    (tmp_path / "data" / "classes.txt").write_text("\n".join(f"name {i}" for i in range(7)))
    return tmp_path / "data"


def test_a_run_and_its_bundle_label_alike(
    zegclip_model, zegclip_bundle, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    bundle = Bundle.load(zegclip_bundle)
    names = tuple(f"name {index}" for index in range(7))
    seen = tuple(names.index(name) for name in bundle.head.seen)
    embeds = embed_phrases(zegclip_model.text_encoder, names, bundle.text.templates)
    run = save_run(tmp_path / "run", zegclip_model, embeds, names=names, phrases=names, seen=seen)
    report = tmp_path / "report.json"
    arguments = [run, "--dataset", "folder", "--root", photos, "--split", "all", "--device", "cpu"]
    arguments += ["--against", zegclip_bundle, "--against-precision", "float32", "--json", report]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0, capsys.readouterr().err
    written = json.loads(report.read_text())
    assert written["agreement"] > 0.999  # float32 against float32
    kinds = [written[side]["segmenter"]["kind"] for side in ("first", "second")]
    assert kinds == ["torch", "bundle"]
    predicted = [row["predicted_pixels"] for row in written["first"]["classes"]]
    assert sum(pixels > 0 for pixels in predicted) > 1
    assert cli.main(["evaluate", *map(str, arguments), "--precision", "float16"]) == 2
    assert "float16" in capsys.readouterr().err
    assert cli.main(["evaluate", *map(str, arguments), "--min-region-score", "0.1"]) == 2
    assert "--min-region-score: expected None for the model" in capsys.readouterr().err


def test_seen_classes_are_lowered_only_where_some_were_unseen(run, zegclip_model, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    embeds = tiny.text_embeds(5, 32)
    everywhere = save_run(tmp_path / "all", zegclip_model, embeds, protocol="supervised")
    shares = [
        np.isin(trained_segmenter(folder, NAMES, device="cpu").segment(image), (0, 1)).mean()
        for folder in (run, everywhere)
    ]
    assert shares[0] < shares[1]


def test_new_names_come_from_the_text_tower(run):
    known = trained_segmenter(run, NAMES, device="cpu")
    other = trained_segmenter(run, ("sky", "meadow, lawn", "road", "water"), device="cpu")
    assert not torch.equal(other.text_embeds[1], known.text_embeds[1])
    assert torch.equal(other.text_embeds[2], known.text_embeds[2])
    prompted = trained_segmenter(run, NAMES, templates=["the {}."], device="cpu")
    assert not torch.isclose(prompted.text_embeds, known.text_embeds).all(dim=1).any()


def test_without_a_text_tower_new_names_are_refused(tmp_path):
    model = tiny.zegclip_model()
    model.config, model.text_encoder = replace(model.config, text_encoder=None), None
    run = save_run(tmp_path, model, tiny.text_embeds(5, 32))
    trained_segmenter(run, NAMES, device="cpu")
    with refused(VocabularyError, "class_names"):
        trained_segmenter(run, ["meadow"], device="cpu")


def test_errors_say_what_is_wrong(run, tmp_path):
    with refused(CheckpointError, None, tmp_path.name):
        trained_segmenter(tmp_path, NAMES)
    with refused(DeviceError, "device"):
        trained_segmenter(run, NAMES, device="cuda:99")
