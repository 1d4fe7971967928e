"""The synthetic world: repeatable, labelled as it is described, split so that words recombine."""

import hashlib

import numpy as np
import pytest

from support.errors import refused
from tools.scenes import (
    CLASS_NAMES,
    IGNORE,
    SEEN,
    Kind,
    SceneDataset,
    World,
    words_of_world,
    write_folder,
)
from tools.scenes.__main__ import main as scenes_command
from tools.scenes.captions import (
    FUNCTION_WORDS,
    describe_one,
    describe_scene,
    with_article,
)
from tools.scenes.shapes import sprite
from tools.scenes.textures import TILE, tile
from tools.scenes.words import (
    NEVER_CAPTIONED,
    SHAPES,
    kind_of,
)
from tools.scenes.world import visible
from tools.studies.name_draws import other_unseen
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import Sample, SegmentationDataset, create_dataset

UNSEEN = [name for index, name in enumerate(CLASS_NAMES) if index not in SEEN]


def digest(scene):
    return hashlib.sha256(scene.image.tobytes() + scene.labels.tobytes()).hexdigest()


def test_a_scene_depends_on_seed_and_index_alone():
    forward = [digest(World(3).scene(index)) for index in range(4)]
    world = World(3)
    backward = [digest(world.scene(index, num_captions=1)) for index in (3, 2, 1, 0)]
    assert forward == backward[::-1]
    assert World(3).scene(2).captions == world.scene(2).captions
    assert digest(World(4).scene(0)) != forward[0]
    assert len(set(forward)) == 4


def test_splits_have_no_scene_in_common():
    splits = ("train", "val", "pretraining", "demo", "train_seen")
    images = [SceneDataset(split, length=3)[0].image.tobytes() for split in splits]
    images += [SceneDataset(split, length=3, seed=1)[0].image.tobytes() for split in splits]
    assert len(set(images)) == 10


def test_data_set_follows_the_protocol():
    dataset = SceneDataset("val", size=(96, 160), length=2)
    assert isinstance(dataset, SegmentationDataset)
    sample = dataset[1]
    assert isinstance(sample, Sample)
    assert sample.image.shape == (96, 160, 3)
    assert sample.image.dtype == sample.labels.dtype == np.uint8
    assert sample.labels.shape == (96, 160)
    assert len(dataset) == 2
    assert dataset.ignore_label == 255
    with pytest.raises(IndexError, match="expected 0 to 1, got 2"):
        dataset[2]


def test_unseen_names_recombine_words_of_seen_names():
    seen_words = [set(CLASS_NAMES[index].split()) for index in SEEN]
    known = set().union(*seen_words)
    assert len(UNSEEN) >= 8
    for name in UNSEEN:
        words = set(name.split())
        assert words <= known, name
        assert words not in seen_words
    shared = [max(len(set(name.split()) & other) for other in seen_words) for name in UNSEEN]
    close = [count >= len(name.split()) - 1 for name, count in zip(UNSEEN, shared, strict=True)]
    assert sum(close) > len(UNSEEN) / 2  # most differ from a seen name by one word only


def test_split_is_ascending_and_names_are_distinct():
    assert list(SEEN) == sorted(SEEN)
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)
    assert all(kind_of(name).name == name for name in CLASS_NAMES)


def test_labels_are_what_was_drawn():
    scene = World(5, class_share=0.5).scene(7)
    for number, kind in enumerate(scene.kinds):
        labels = scene.labels[scene.identities == number]
        expected = CLASS_NAMES.index(kind.name) if kind.name in CLASS_NAMES else IGNORE
        assert (labels == expected).all()
    assert (scene.labels[scene.identities == 255] == IGNORE).all()


def test_every_class_is_frequent_and_most_pixels_have_one():
    dataset = SceneDataset("train", length=200)
    counts = np.zeros(256, np.int64)
    pictures = np.zeros(256, np.int64)
    for index in range(len(dataset)):
        found = np.bincount(dataset[index].labels.ravel(), minlength=256)
        counts += found
        pictures += found > 0
    assert set(np.flatnonzero(counts)) <= {*range(len(CLASS_NAMES)), IGNORE}
    assert pictures[: len(CLASS_NAMES)].min() >= 5
    assert counts[: len(CLASS_NAMES)].sum() > 0.7 * counts.sum()


def test_things_have_the_colour_of_their_name():
    red, blue = [], []
    for index in range(60):
        scene = World(9).scene(index)
        for colour, means in (("red metal ball", red), ("blue metal box", blue)):
            pixels = scene.image[scene.labels == CLASS_NAMES.index(colour)]
            if len(pixels) > 300:
                means.append(pixels.mean(axis=0))
    assert len(red) > 5
    assert len(blue) > 2
    assert all(mean[0] > mean[2] + 20 for mean in red)
    assert all(mean[2] > mean[0] + 15 for mean in blue)


def test_captions_speak_of_visible_kinds():
    world = World(2, class_share=0.3)
    for index in range(30):
        scene = world.scene(index)
        seen = {
            word
            for part in visible(scene.identities, scene.kinds)
            for word in part.kind.name.split()
        }
        for caption in scene.captions:
            spoken = set(caption.replace(".", "").split()) & set(words_of_world())
            assert spoken <= seen, caption
            assert spoken
            others = set(caption.replace(".", " .").split()) - spoken
            assert others <= set(FUNCTION_WORDS), caption


def test_left_and_right_are_true():
    for index in range(200):
        scene = World(6, class_share=0.0).scene(index)
        parts = {part.kind.name: part for part in visible(scene.identities, scene.kinds)}
        names = [kind.name for kind in scene.kinds]
        for caption in scene.captions:
            for side, sign in (("left", -1), ("right", 1)):
                if f" to the {side} of " not in caption:
                    continue
                first, second = caption.split(f" to the {side} of ")
                pair = [
                    next(n for n in parts if text.find(n) in (2, 3)) for text in (first, second)
                ]
                if any(names.count(name) > 1 for name in pair):
                    continue
                x = [parts[name].centre_xy[0] for name in pair]
                assert (x[0] - x[1]) * sign > 0
                return
    pytest.fail("no caption said left or right")


def test_phrases():
    assert with_article("orange wooden cone") == "an orange wooden cone"
    assert with_article("blue sky") == "the blue sky"
    assert with_article("green grass") == "green grass"
    rng = np.random.default_rng(0)
    assert any(
        describe_one(Kind("red", "metal", "ball"), rng) == "a photo of a red metal ball."
        for _ in range(100)
    )
    assert describe_scene((), rng) == "nothing"


@pytest.mark.parametrize("shape", SHAPES)
def test_sprites_have_unit_normals_and_fill_their_canvas(shape):
    drawn = sprite(shape)
    inside = drawn.surface[..., 0] > 0.5
    lengths = np.linalg.norm(drawn.surface[inside][:, 1:], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    rows = np.flatnonzero(inside.any(axis=1))
    assert rows[-1] - rows[0] > 0.8 * len(inside)


def test_tiles_are_periodic():
    water = tile("water")[..., 0]
    across = np.abs(water[:, 0] - water[:, -1]).mean()
    within = np.abs(np.diff(water, axis=1)).mean()
    assert across < 2 * within
    assert water.shape == (TILE, TILE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "test"},
            "split",
        ),
        ({"size": 32}, "size"),
        ({"length": 0}, "length"),
        ({"seed": -1}, "seed"),
        ({"class_share": 1.5}, "class_share"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with refused(ArgumentError, message):
        SceneDataset(**settings)


def test_more_names_change_annotation_alone():
    usual, sixty, every = (SceneDataset("val", length=6, annotated=n) for n in (19, 60, "all"))
    assert usual.class_names == CLASS_NAMES
    assert usual.seen == SEEN
    for other, count in ((sixty, 60), (every, 353)):
        assert len(other.seen) == count
        assert len(set(other.class_names)) == count + 9
        unseen = set(other.class_names) - {other.class_names[index] for index in other.seen}
        assert unseen == {name for index, name in enumerate(CLASS_NAMES) if index not in SEEN}
        assert not set(other.class_names) & set(NEVER_CAPTIONED)
        for index in range(6):
            plain, more = usual[index], other[index]
            np.testing.assert_array_equal(plain.image, more.image)
            known = plain.labels != usual.ignore_label
            np.testing.assert_array_equal(plain.labels[known], more.labels[known])
    assert every.ignore_label == 65535
    annotated = [
        sum(int((d[i].labels != d.ignore_label).sum()) for i in range(6)) for d in (usual, every)
    ]
    assert annotated[1] > annotated[0]


def test_other_unseen_names_have_the_make_up_of_the_published():
    words = {word for index in SEEN for word in CLASS_NAMES[index].split()}
    drawn = [other_unseen(draw) for draw in range(40)]
    for names in drawn:
        assert [names[index] for index in SEEN] == [CLASS_NAMES[index] for index in SEEN]
        kinds = [kind_of(name) for index, name in enumerate(names) if index not in SEEN]
        assert [kind.is_thing for kind in kinds] == [True] * 5 + [False] * 4
        assert len({kind.noun for kind in kinds[:5]}) == 5
        assert [kind.noun for kind in kinds[5:8]] == ["wall", "sky", "floor"]
        assert kinds[8].noun in ("grass", "sand", "water")
        others = {kind.name for kind in kinds}
        assert not others & {*CLASS_NAMES, *NEVER_CAPTIONED}
        assert {word for name in others for word in name.split()} <= words
    assert drawn[3] == other_unseen(3)
    assert len(set(drawn)) == 40
    with refused(ArgumentError, "draw"):
        other_unseen(-1)


def test_scenes_are_made_of_the_common_names():
    names = other_unseen(0)
    scenes = [World(3, class_share=1.0, common=names).scene(index) for index in range(40)]
    shown = {kind.name for scene in scenes for kind in scene.kinds}
    assert shown <= set(names)
    assert len(shown - set(CLASS_NAMES)) == 9


def test_a_split_shows_unseen_names_as_rarely_as_any_others():
    shown = {}
    for split in ("train", "train_seen"):
        dataset = SceneDataset(split, length=200)
        assert (dataset.class_names, dataset.seen) == (CLASS_NAMES, SEEN)
        kinds = [kind.name for i in range(200) for kind in dataset.world.scene(i).kinds]
        shown[split] = sum(name in UNSEEN for name in kinds) / len(kinds)
    assert shown["train_seen"] < 0.03 < 0.2 < shown["train"]


def test_scenes_can_have_one_thing_each():
    dataset = SceneDataset("val", length=8, things=1)
    for index in range(8):
        kinds = dataset.world.scene(index, num_captions=0).kinds
        assert sum(kind.is_thing for kind in kinds) == 1


def test_a_zoom_shows_the_same_scene_in_more_pixels():
    small, large = (SceneDataset("val", size=96, length=2, zoom=zoom)[1] for zoom in (1, 2))
    assert large.image.shape == (192, 192, 3)
    assert (large.labels[::2, ::2] == small.labels).mean() > 0.95
    with refused(ArgumentError, "zoom"):
        SceneDataset("val", zoom=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"things": -1}, "things"),
        ({"annotated": 18}, "annotated"),
        ({"annotated": "most"}, "annotated"),
    ],
)
def test_worlds_that_cannot_be_are_refused(options, message):
    with refused(ArgumentError, message):
        SceneDataset("val", **options)


@pytest.mark.parametrize("options", [{}, {"annotated": "all"}, {"things": 1, "zoom": 2}])
def test_a_written_world_reads_as_it_is_drawn(options, tmp_path):
    write_folder(tmp_path, {"val": 3, "train_seen": 1}, **options)
    drawn, read = SceneDataset("val", **options), create_dataset("folder", tmp_path, "val")
    assert (read.class_names, tuple(read.seen)) == (drawn.class_names, drawn.seen)
    assert (len(read), read.ignore_label) == (3, drawn.ignore_label)
    for number in range(3):
        assert np.array_equal(read[number].image, drawn[number].image)
        assert np.array_equal(read[number].labels, drawn[number].labels)
    assert len(create_dataset("folder", tmp_path, "train_seen")) == 1


def test_the_command_writes_a_split_once_and_of_the_same_classes(tmp_path, capsys):
    assert scenes_command([str(tmp_path), "--length", "2", "--size", "64"]) == 0
    assert [len(create_dataset("folder", tmp_path, split)) for split in ("train", "val")] == [2, 2]
    for arguments in (["--split", "val"], ["--split", "demo", "--annotated", "60"]):
        assert scenes_command([str(tmp_path), "--length", "1", *arguments]) == 1
        assert "expected" in capsys.readouterr().err
    assert scenes_command([str(tmp_path / "a"), "--annotated", "some"]) == 1
    assert not (tmp_path / "a").exists()
