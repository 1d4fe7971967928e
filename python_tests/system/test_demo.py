"""The demos work without torch, label right, know what they see, and say what they cannot see."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.command_line import python
from support.errors import refused
from tools.scenes import CLASS_NAMES, SEEN, SceneDataset, words_of_world
from tools.studies.photo_bundle import THINGS
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundles.specs import ConceptSpec
from zsseg_rt.cli import main
from zsseg_rt.demo import demo_bundle, demo_classes, demo_clip, demo_photos
from zsseg_rt.errors import BundleError, ShapeError, VocabularyError
from zsseg_rt.evaluation.datasets.published import class_table
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.photos import decode_photo, read_photo
from zsseg_rt.text.class_names import split_synonyms


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    cache = {"device": "cpu", "cache_dir": tmp_path_factory.mktemp("cache")}
    with (
        Engine(Bundle.demo("photos"), EngineConfig(**cache)) as photos,
        Engine(Bundle.demo("scenes"), EngineConfig(**cache)) as scenes,
    ):
        yield photos, scenes


@pytest.fixture
def engine(engines):
    return engines[0]


def shares(seg):
    return {name: float((seg.labels == i).mean()) for i, name in enumerate(seg.names)}


def test_the_photos_show_what_is_in_them(engine):
    named = engine.set_classes(demo_classes("photos"), background="auto")
    assert named.background == ("background", "airplane", "cow", "motorcycle", "sheep", "train")
    expected = {
        "dining_room": {"chair", "dining table"},
        "pickup": {"car"},
        "bird": {"bird"},
        "dog_walk": {"person", "dog"},
    }
    for photo in demo_photos("photos"):
        areas = shares(engine.segment(read_photo(photo)))
        stem = photo.rsplit("/", 1)[-1].split(".")[0]
        assert {name for name, share in areas.items() if share > 0.02} == expected[stem]


def test_the_background_is_chosen_by_one_rule_at_every_door(engine, tmp_path):
    from zsseg_rt.integrations.ray import PhotoSegmenter
    from zsseg_rt.server.api import NewVocabulary
    from zsseg_rt.server.labeller import Labeller
    from zsseg_rt.server.settings import Limits

    names = ["cat", "sheep", "motorcycle", "airplane"]
    expected = engine.set_classes(names, background="auto")
    assert expected.background == ("background", *(t for t in THINGS if t not in names))
    assert engine.set_classes(names).phrases == expected.phrases
    labeller = Labeller(engine, Limits())
    for fields in ({}, {"background": "auto"}):
        new = NewVocabulary.model_validate({"classes": names, **fields})
        state = labeller.describe(labeller.set_classes(new.classes, new.background))
        assert (tuple(state["background"]), state["auto_background"]) == (expected.background, True)
    report = tmp_path / "r.json"
    call = ["segment", demo_photos()[2], "--demo", "--classes", ",".join(names)]
    assert main([*call, "-o", str(tmp_path), "--json", str(report)]) == 0
    written = json.loads(report.read_text())["engine"]["background"]
    assert tuple(written) == expected.background
    ray = PhotoSegmenter(Bundle.demo("photos").path, names, config=EngineConfig(device="cpu"))
    with ray.engine as opened:
        assert opened.vocabulary.phrases == expected.phrases
    for left_out in ([], (), "none"):
        assert engine.set_classes(names, background=left_out).background == ()
    rows = np.ones((4, 512), np.float32)
    assert engine.set_classes(names, embeddings=rows).background == ()


WORDS = [
    ("people", "person"), ("Pedestrians", "person"), ("baby", "person"), ("babies", "person"),
    ("rider", "person"), ("motorbike", "motorcycle"), ("MotorBikes", "motorcycle"),
    ("aeroplane", "airplane"), ("diningtable", "dining table"), ("tv-monitors", "tv"),
    ("tvmonitor", "tv"), ("buses", "bus"), ("puppies", "puppy"), ("sheeps", "sheep"),
    ("knives", "knife"), ("traffic_lights", "traffic light"), ("wall-brick", "background"),
    ("building-other", "building"), ("trouser", "trousers"), ("sofa", "sofa"), ("bus", "bus"),
]  # fmt: skip
NEAR = {"racing bike": "bicycle", "old woman": "woman", "pedestrain": "person", "doggo": "dog"}


def test_words_and_names_of_published_sets_find_their_rows_and_others_what_is_near(engine):
    for table in ("voc2012", "pascal_context", "cocostuff164k", "cityscapes", "camvid"):
        names = split_synonyms(class_table(table).names)
        assert engine.set_classes(names, background=()).names == tuple(name[0] for name in names)
    for word, name in WORDS:
        rows = [engine.set_classes([asked], background=()).embeds for asked in (word, name)]
        np.testing.assert_array_equal(*rows, err_msg=word)
    for word, name in NEAR.items():
        with refused(VocabularyError, "class_names") as caught:
            engine.set_classes([word])
        assert f"Did you mean '{name}'" in str(caught.value)


def test_what_is_no_frame_is_refused_with_the_call_that_takes_it(engine):
    frame = np.zeros((4, 6, 3), np.uint8)
    for several in ([frame, frame], (frame, frame), (frame,), np.stack([frame, frame])):
        with refused(ShapeError, "frame") as caught:
            engine.segment(several)
        assert "engine.segment_batch(frames)" in str(caught.value)
    with refused(ShapeError, "frames"):
        engine.segment_batch(frame)


def test_what_nobody_named_takes_no_name_of_another(engine):
    street = read_photo(demo_photos("photos")[3])
    named = engine.set_classes(["cat", "sofa"], background="auto")
    assert {"dog", "person", "potted plant"} < set(named.background)
    assert not {"cat", "couch", "chair"} & set(named.background)
    assert max(shares(engine.segment(street)).values()) < 0.01
    named = engine.set_classes(["vehicle"], background="auto")
    assert not {"car", "bus", "boat", "bicycle"} & set(named.background)
    assert shares(engine.segment(street))["vehicle"] < 0.01
    assert shares(engine.segment(read_photo(demo_photos("photos")[1])))["vehicle"] > 0.1
    named = engine.set_classes(["woman", "cat"], background="auto")  # a dog is nearest to the cat
    assert "dog" in named.background
    assert "person" not in named.background
    assert engine.set_classes(["background", "dog"], background="auto").background == ()
    vocab = engine.set_classes(["motorbikes", "sheep"], background=["Sheep", "motorcycle", "cat"])
    assert vocab.background == ("cat",)
    assert not vocab.auto_background
    road = engine.set_classes(["road", "car"])
    assert road.background == tuple(thing for thing in THINGS if thing != "car")
    assert "'road' (as background, all else)" in road.remarks[0]


def test_names_of_what_it_never_saw_draw_one_remark(engines):
    engine, scenes = engines
    (remark,) = engine.set_classes(["dog", "tree", "window", "taxi"]).remarks
    assert "'tree' (nearest: potted plant)" in remark
    assert "'window'" in remark
    assert "taxi" not in remark
    assert all(thing in remark for thing in THINGS)
    assert engine.set_classes(["dog"], background=["tree"]).remarks == ()
    (*_, remark) = engine.set_classes(engine.bundle.text_bank.names[:200]).remarks
    assert remark.count("(nearest: ") == 20
    assert " more: this model" in remark
    (remark,) = engine.set_classes([["person", "people"], "pedestrian"]).remarks
    assert "'person', 'pedestrian'" in remark  # two classes of one meaning
    assert engine.set_classes([["person", "people"]]).remarks == ()
    (remark,) = scenes.set_classes(["ball", "red striped ball"]).remarks
    assert "'ball'" in remark
    assert all(name in remark for name in demo_classes("scenes"))
    assert scenes.set_classes(demo_classes("scenes")).remarks == ()


def test_the_bundles_are_small_checked_and_say_where_they_come_from(engines, capsys):
    engine, scenes = engines
    bundle = engine.bundle
    shown = repr(bundle).splitlines()
    assert (len(shown), "513x513" in shown[1], "1597 names" in shown[2]) == (3, True, True)
    bundle.verify()
    assert engine.self_check().passed
    assert sum(entry.bytes for entry in bundle.files()) < 10e6
    assert "Apache-2.0" in bundle.licence
    assert "google-coral" in bundle.provenance["source"]
    notice = (demo_bundle("photos").parent / "NOTICE").read_text()
    for photo in [*demo_photos("photos"), "dog_walk.zip"]:
        assert photo.rsplit("/", 1)[-1] in notice
    assert main(["info", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "potted plant" in shown
    assert "windows that keep a frame's shape" in shown
    bundle = scenes.bundle
    bundle.verify()
    assert scenes.self_check().passed
    assert set(bundle.graphs) == {"image_encoder", "decoder", "text_encoder"}
    assert bundle.text.words == words_of_world()
    assert bundle.licence
    source = json.loads(bundle.provenance["source"])
    assert source["world_version"] >= 1
    assert source["zegclip"]["seed"] == source["clip"]["config"]["seed"] == 0
    assert source["commit"]
    assert bundle.head.seen == tuple(CLASS_NAMES[index] for index in SEEN)
    files = [path for path in demo_bundle("scenes").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 18_000_000


def test_the_clip_is_small_and_no_frame_of_it_is_labelled_wrongly(engine):
    clip = demo_clip("photos")
    assert sum(map(len, clip)) < 1.5e6
    engine.set_classes(demo_classes("photos"), background="auto")
    for index, frame in enumerate(clip):
        seg = engine.segment(decode_photo(frame, Path("clip")))
        rows = {part.name: np.nonzero(seg.labels == part.index)[0] for part in seg.present()}
        assert set(rows) == {"person", "dog"}, index
        assert min(len(rows["person"]), len(rows["dog"])) > 0.01 * seg.labels.size, index
        assert rows["dog"].min() > 0.4 * len(seg.labels), f"{index}: the woman is called a dog"
    assert demo_clip("scenes") == []


@pytest.mark.parametrize(
    "changes", [{"names": ()}, {"least_cosine": 2.0}, {"least_words": 0}, {"also": ("a\nb",)}]
)
def test_concepts_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ConceptSpec(**{"names": ("dog",), **changes})


BLOCKED = """
import socket, sys
sys.modules.update(dict.fromkeys(["torch", "open_clip", "onnx", "torchvision"]))
socket.socket.connect = None
from zsseg_rt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_demo_needs_no_arguments_no_torch_no_network(tmp_path):
    done = python("-c", BLOCKED, "segment", "--demo", "scenes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for photo in demo_photos("scenes"):
        stem = photo.rsplit("/", 1)[-1].removesuffix(".png")
        overlay = read_photo(tmp_path / "zsseg_out" / f"{stem}.overlay.png")
        assert overlay.shape == read_photo(photo).shape
        assert stem in done.stdout
    assert sum(name in done.stdout for name in CLASS_NAMES) >= 4
    assert "This model was trained on" in done.stdout
    assert "checkered" in done.stdout


def test_the_default_is_the_photo_demo_and_own_photos_are_asked_for_all_it_sees(tmp_path, capsys):
    assert Bundle.demo().path == demo_bundle() == demo_bundle("photos")
    assert (demo_photos(), demo_classes()) == (demo_photos("photos"), demo_classes("photos"))
    assert main(["segment", "--demo", "--out", str(tmp_path)]) == 0
    assert "chair" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.overlay.png"))) == len(demo_photos())
    report, photo = tmp_path / "r.json", demo_photos("photos")[2]
    for call in (["--demo"], ["--bundle", "demo"]):
        assert main(["segment", photo, *call, "-o", str(tmp_path), "--json", str(report)]) == 0
        assert json.loads(report.read_text())["engine"]["names"] == list(THINGS)


def test_scenes_never_seen_are_labelled_right(engines):
    _, scenes = engines
    dataset = SceneDataset("val", length=40)
    scenes.set_classes(list(CLASS_NAMES))
    confusion = ConfusionMatrix(len(CLASS_NAMES), ignore_label=dataset.ignore_label)
    for index in range(len(dataset)):
        sample = dataset[index]
        confusion.update(sample.labels, scenes.segment(sample.image).labels)
    scores = score(confusion.counts, SEEN)
    assert scores.pixel_accuracy > 0.65, scores
    assert scores.miou_seen > 0.58, scores
    assert scores.miou_unseen > 0.3, scores  # chance is about 0.01


def test_an_installation_without_the_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("zsseg_rt.demo.__file__", str(tmp_path / "__init__.py"))
    with refused(BundleError, None, "scenes.zsseg"):
        demo_bundle("scenes")
