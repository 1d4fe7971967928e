"""The function for ``datasets.Dataset.map``, by itself and with the package where it is there."""

import io
import pickle
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from support import documents
from support.errors import refused
from zsseg_rt import ArgumentError, Engine, EngineConfig, VocabularyError
from zsseg_rt.integrations.datasets import PhotoSegmenter

NAMES = ["red", "blue", "green", "white"]
CONFIG = EngineConfig(device="cpu", use_cache=False)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8 + i, 1))).astype(np.uint8)
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def expected(colour_bundle, pictures):
    with Engine(colour_bundle, CONFIG) as engine:
        engine.set_classes(NAMES)
        return [engine.segment(picture) for picture in pictures]


@pytest.fixture
def segmenter(colour_bundle):
    made = PhotoSegmenter(colour_bundle, NAMES, config=CONFIG)
    yield made
    made.close()


def png(picture):
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def labels_of(mask):
    image = mask if hasattr(mask, "convert") else Image.open(io.BytesIO(mask["bytes"]))
    return np.asarray(image)


@pytest.mark.parametrize(
    "form",
    [Image.fromarray, lambda picture: {"bytes": png(picture), "path": None}, lambda same: same],
    ids=["pillow", "bytes", "array"],
)
def test_a_batch_gets_labels(segmenter, pictures, expected, form):
    new = segmenter({"image": [form(picture) for picture in pictures], "id": [1, 2, 3, 4]})
    assert set(new) == {"mask", "classes", "unknown_share", "error"}
    for mask, classes, seg in zip(new["mask"], new["classes"], expected, strict=True):
        np.testing.assert_array_equal(labels_of(mask), seg.labels)
        assert [c["name"] for c in classes] == [share.name for share in seg.present()]
    assert new["error"] == [None] * 4
    assert new["unknown_share"] == [0.0] * 4


def test_a_photo_that_cannot_be_read_is_its_rows_error(segmenter, pictures, expected, tmp_path):
    (tmp_path / "good.png").write_bytes(png(pictures[1]))
    rows = [
        {"bytes": b"none", "path": None},
        {"bytes": None, "path": str(tmp_path / "absent.png")},
        {"bytes": None, "path": str(tmp_path / "good.png")},
        None,
    ]
    new = segmenter({"image": rows})
    np.testing.assert_array_equal(labels_of(new["mask"][2]), expected[1].labels)
    assert [error is None for error in new["error"]] == [False, False, True, False]
    assert "absent.png" in new["error"][1]
    assert new["mask"][0] is new["classes"][1] is new["unknown_share"][3] is None


def test_wrong_calls_say_what_to_do(segmenter, colour_bundle, pictures):
    with refused(ArgumentError, "column"):
        segmenter({"photo": pictures})
    for one in (pictures[0], Image.fromarray(pictures[0]), {"bytes": b"", "path": None}):
        with refused(ArgumentError, "batch"):
            segmenter({"image": one})
    with pytest.raises(VocabularyError):
        PhotoSegmenter(colour_bundle, [])


def test_it_travels_without_its_engine(segmenter, pictures):
    before = pickle.dumps(segmenter)
    segmenter({"image": pictures[:1]})
    assert pickle.dumps(segmenter) == before
    copy = pickle.loads(before)
    assert copy({"image": pictures})["error"] == [None] * 4
    copy.close()


def test_what_it_is_made_of_tells_results_apart(colour_bundle, tmp_path):
    bundle = shutil.copytree(colour_bundle, tmp_path / "copy.zsseg")

    def state(**changes):
        return pickle.dumps(PhotoSegmenter(bundle, **{"classes": NAMES, **changes}))

    first = state()
    assert state() == first
    assert state(classes=NAMES[::-1]) != first
    assert state(background=["black"]) != first
    assert state(config=CONFIG) != first
    manifest = bundle / "bundle.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert state() != first


# --- with the package ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def photos(package, pictures, tmp_path):
    (tmp_path / "photos").mkdir()
    for index, picture in enumerate(pictures):
        (tmp_path / "photos" / f"{index}.png").write_bytes(png(picture))
    paths = [str(path) for path in sorted((tmp_path / "photos").iterdir())]
    made = package.Dataset.from_dict({"image": paths, "id": [5, 6, 7, 8]})
    return made.cast_column("image", package.Image())


def test_map_labels_a_data_set(segmenter, photos, expected):
    settings = {"batched": True, "batch_size": 3, "features": segmenter.features(photos.features)}
    labelled = photos.map(segmenter, **settings)
    assert labelled.column_names == ["image", "id", "mask", "classes", "unknown_share", "error"]
    for row, seg in zip(labelled, expected, strict=True):
        np.testing.assert_array_equal(labels_of(row["mask"]), seg.labels)
        assert [c["pixels"] for c in row["classes"]] == [s.pixels for s in seg.present()]
    assert labelled["id"][:] == [5, 6, 7, 8]
    assert photos.map(segmenter, **settings)._fingerprint == labelled._fingerprint


def test_map_goes_on_after_a_damaged_photo(segmenter, package, photos, tmp_path):
    (tmp_path / "photos" / "2.png").write_bytes(b"none")
    raw = photos.cast_column("image", package.Image(decode=False))
    labelled = raw.map(
        segmenter, batched=True, batch_size=2, features=segmenter.features(raw.features)
    )
    assert [row["error"] is None for row in labelled] == [True, True, False, True]
    assert labelled[2]["mask"] is None


def test_several_processes(colour_bundle, photos, expected):
    config = EngineConfig(device="cpu", use_cache=False, num_threads=1)
    segmenter = PhotoSegmenter(colour_bundle, NAMES, config=config)
    labelled = photos.map(
        segmenter, batched=True, num_proc=2, features=segmenter.features(photos.features)
    )
    for row, seg in zip(labelled, expected, strict=True):
        np.testing.assert_array_equal(labels_of(row["mask"]), seg.labels)


def test_taken_columns_are_refused(segmenter, photos):
    with pytest.raises(ArgumentError, match="'mask' already"):
        segmenter.features(photos.rename_column("id", "mask").features)


def test_the_documented_program_runs(package, photos, monkeypatch, tmp_path):
    page = documents.ROOT / "docs" / "scale.md"
    (block,) = (b for b in documents.blocks_of(page) if "load_dataset" in b.code)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block.code, page.name, "exec"), names)
    assert names["labelled"].num_rows == len(photos)
    assert names["labelled"][0]["mask"].size == names["labelled"][0]["image"].size
    names["segmenter"].close()
