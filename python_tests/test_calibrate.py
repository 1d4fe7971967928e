"""``zsseg-rt calibrate``: settings chosen by held-out names, and by nothing that is unseen."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support import tiny  # noqa: E402
from support.small_runs import TABLES, save_clip  # noqa: E402
from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.cli import main  # noqa: E402
from zsseg_rt.cosine_rule import CosineRule  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError  # noqa: E402
from zsseg_rt.evaluation.datasets.scenes import CLASS_NAMES, SEEN, SceneDataset  # noqa: E402
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score  # noqa: E402
from zsseg_rt.training.assembly import train  # noqa: E402
from zsseg_rt.training.calibration import calibrate as module  # noqa: E402
from zsseg_rt.training.calibration import judging  # noqa: E402
from zsseg_rt.training.calibration.calibrate import CalibrationSettings, choose_settings  # noqa: E402
from zsseg_rt.training.calibration.candidates import (  # noqa: E402
    CandidateCounts,
    Grid,
    ImageMaps,
    Setting,
)
from zsseg_rt.training.calibration.held_out import draw_names, judged_images  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402
from zsseg_rt.training.trained.calibration import (  # noqa: E402
    CALIBRATION_FILE,
    Calibration,
    FoldFigures,
    HoldOut,
    read_calibration,
)

BRIEF = CalibrationSettings(iterations=2, folds=2, images=12)
RULE = CosineRule(seen_weight=0.2, unseen_weight=0.6, scale=8.0)
NONE = FoldFigures(seen=0.0, unseen=0.0, harmonic_mean=0.0)


@pytest.fixture(scope="module", autouse=True)
def _few_settings_one_thread():
    """Enough to choose from; threads would only wait for each other in models so small."""
    few = partial(Grid, seen_weights=(0.0, 0.3), unseen_weights=(0.0, 0.5), scales=(10.0, 40.0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "Grid", few)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors")


@pytest.fixture(scope="module")
def config(clip_file):
    """Crops are drawn again if one class fills them, so that labels decide what is trained on."""
    options = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64}
    augmentation = {"crop_hw": [64, 64], "scale": [80, 64], "max_class_share": 0.5}
    data = {"options": {"size": 64, "length": 24}, "augmentation": augmentation}
    return TrainConfig.from_dict(
        TABLES
        | {
            "data": TABLES["data"] | data,
            "model": {"options": options | {"num_prompts": 2}},
            "evaluation": {"limit": 2},
        }
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    plain = tmp_path_factory.mktemp("runs") / "run.toml"
    plain.write_text(config.to_toml())
    train(TrainConfig.load(plain, [f"output.folder={folder}"]))
    return folder


@pytest.fixture
def own_run(run, tmp_path):
    """A copy that a test may write into."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def choice(config, tmp_path_factory):
    return choose_settings(config, tmp_path_factory.mktemp("work"), BRIEF)


def written(cosine=RULE, seen=tuple(CLASS_NAMES[row] for row in SEEN)):
    return Calibration(
        cosine=cosine,
        seen_bias=0.15,
        seen=seen,
        iterations=1,
        images=1,
        seed=0,
        hold_outs=(HoldOut(names=seen[:1], before=NONE, after=NONE),),
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("make", [tiny.zegclip_model, tiny.clip_rc_model])
def test_counts_are_those_of_the_model_s_own_labels(make, activation):
    """For images no larger than the lattice, every pixel is judged."""
    model = make().eval()
    model.config = replace(model.config, score_activation=activation)
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (40, 46, 3), np.uint8) for _ in range(2)]
    truths = [rng.integers(0, 7, (40, 46)) for _ in images]
    rows = tiny.text_embeds(6, model.config.image_encoder.embed_dim)
    seen, classes, shares = (0, 1, 4), np.array([0, 1, 2, 2, 3, 4]), (1.0, 1.0, 0.5, 0.5, 1.0, 1.0)
    grid = Grid(seen_weights=(0.0, 0.3), unseen_weights=(0.0, 0.7), scales=(4.0, 12.0))
    is_seen = np.array([True, True, False, True, False])
    counts = CandidateCounts(
        grid=grid, classes=classes, shares=shares, seen=is_seen, activation=activation, own_bias=0.1
    )
    twin = model.with_seen(np.flatnonzero(is_seen[classes]).tolist(), shares=shares)
    for image, truth in zip(images, truths, strict=True):
        counts.add(maps_of(twin, image, truth, rows))
    assert counts.settings[counts.own] == Setting(None, 0.1)
    for place in range(0, len(counts.settings), 7):
        setting = counts.settings[place]
        confusion = ConfusionMatrix(5, ignore_label=255)
        judged = twin.with_cosine(setting.cosine, seen_bias=setting.seen_bias)
        for image, truth in zip(images, truths, strict=True):
            with torch.inference_mode():
                labels = classes[judged.label(image, rows).numpy()]
            confusion.update(np.where(truth < 5, truth, 255), labels)
        expected = score(confusion.counts, np.flatnonzero(is_seen).tolist())
        found = counts.predicted[place]
        assert np.abs(found - confusion.counts.sum(axis=0)[:5]).sum() <= 4  # of 4000, near ties
        assert counts.harmonic_means()[place] == pytest.approx(100 * expected.hiou, abs=0.2)
    assert len({tuple(found) for found in counts.predicted}) > 20  # settings do differ
    assert seen[0] == 0


def maps_of(model, image, truth, rows):
    with torch.inference_mode():
        logits, cosines = judging.grid_maps(model, image, rows)
    return ImageMaps(mask_logits=logits, cosines=cosines, labels=truth)


def test_the_grid_knows_no_rule_of_two_zeros_and_tries_the_run_s_own_bias():
    grid = Grid().with_bias(0.07)
    assert None in grid.rules()
    assert 0.07 in grid.biases
    assert grid.with_bias(0.07) == grid
    assert len(grid.settings()) == len(grid.rules()) * len(grid.biases)
    assert len({(s.cosine, s.seen_bias) for s in grid.settings()}) == len(grid.settings())


def test_a_quarter_of_the_names_is_held_out_and_none_twice():
    drawn = draw_names(SEEN, 4, 0)
    assert [len(names) for names in drawn] == [4, 4, 4, 4]
    assert len({row for names in drawn for row in names}) == 16
    assert {row for names in drawn for row in names} <= set(SEEN)
    assert draw_names(SEEN, 2, 0) == drawn[:2]
    assert draw_names(SEEN, 2, 1) != drawn[:2]
    with pytest.raises(ArgumentError, match="expected at least 4 seen classes.*got 3"):
        draw_names((0, 1, 2), 1, 0)
    with pytest.raises(ArgumentError, match="folds: expected 1 to 4, got 5"):
        draw_names(SEEN, 5, 0)


def test_images_to_choose_by_are_not_trained_on():
    trained, judged = judged_images(10, 3)
    assert (trained, judged) == ([1, 2, 4, 5, 7, 8, 9], [0, 3, 6])
    assert len(judged_images(10, 100)[1]) == 5
    with pytest.raises(ArgumentError, match="expected at least 2 images"):
        judged_images(1, 1)


def test_equal_calls_choose_equally_and_the_choice_is_the_best(choice, config, tmp_path):
    assert choose_settings(config, tmp_path, BRIEF) == choice
    assert choice.mean(chosen=True) >= choice.mean(chosen=False)
    assert choice.seen == tuple(CLASS_NAMES[row] for row in SEEN)
    held = [name for hold_out in choice.hold_outs for name in hold_out.names]
    assert len(held) == len(set(held)) == 8
    assert set(held) <= set(choice.seen)
    assert all(hold_out.after.unseen >= 0 for hold_out in choice.hold_outs)


def test_no_unseen_label_and_no_other_split_is_read(choice, config, tmp_path, monkeypatch):
    """Unseen classes' labels are mixed up or removed, and the choice stays the same."""
    plain, drawn = SceneDataset.__getitem__, []

    def without_unseen(dataset, index):
        sample = plain(dataset, index)
        drawn.append(dataset.name)
        unseen = ~np.isin(sample.labels, [*SEEN, 255])
        drawn.extend(["unseen"] * bool(unseen.any()))
        sample.labels[unseen] = (255, CLASS_NAMES.index("red striped ball"))[index % 2]
        return sample

    monkeypatch.setattr(SceneDataset, "__getitem__", without_unseen)
    assert choose_settings(config, tmp_path, BRIEF) == choice
    assert set(drawn) == {"scenes/train", "unseen"}


def test_labels_of_seen_names_do_decide(choice, config, tmp_path, monkeypatch):
    """What the test above would miss if labels had no influence at all."""
    plain = SceneDataset.__getitem__

    def swapped(dataset, index):
        sample = plain(dataset, index)
        known = sample.labels != 255
        sample.labels[known] = (sample.labels[known] + 1) % len(CLASS_NAMES)
        return sample

    monkeypatch.setattr(SceneDataset, "__getitem__", swapped)
    found = choose_settings(config, tmp_path, BRIEF)
    assert found.hold_outs != choice.hold_outs


def test_an_interrupted_choice_goes_on(choice, config, tmp_path, monkeypatch):
    plain, calls = module.train_assembled, []

    def stops_in_the_second(parts, **options):
        calls.append(parts.config.output.folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(parts, **options)

    monkeypatch.setattr(module, "train_assembled", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        choose_settings(config, tmp_path, BRIEF)
    first = next((tmp_path / calls[0]).glob("checkpoints/*/model.safetensors"))
    before = first.stat().st_mtime_ns
    assert choose_settings(config, tmp_path, BRIEF) == choice
    assert first.stat().st_mtime_ns == before
    assert len(set(calls)) == 2


def test_the_command_chooses_and_export_and_evaluate_take_it(own_run, tmp_path, capsys):
    arguments = ["--iterations", "1", "--folds", "1", "--images", "12"]
    report = tmp_path / "choice.json"
    assert main(["calibrate", str(own_run), *arguments, "--json", str(report)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = read_calibration(own_run)
    assert found.described in printed
    assert "trained without:" in printed
    assert json.loads(report.read_text())["seen_bias"] == found.seen_bias
    assert not (own_run / "calibration").exists()
    assert read_calibration(next((own_run / "checkpoints").iterdir())) == found


def test_chosen_settings_are_used_and_told(own_run, tmp_path, capsys):
    written().write(own_run)
    bundle = tmp_path / "run.zsseg"
    assert (
        main(["export", "trained", str(own_run), "-o", str(bundle), "--precision", "float32"]) == 0
    )
    told = "calibration.json: --cosine 0.2,0.6,8, seen bias 0.15; --cosine 0,0 leaves it out"
    assert told in " ".join(capsys.readouterr().out.split())
    head = Bundle.load(bundle).head
    assert (head.cosine, head.seen_bias) == (RULE, 0.15)
    assert agreement(own_run, bundle, tmp_path) > 0.95  # of random weights, near ties
    assert told in " ".join(capsys.readouterr().out.split())
    assert agreement(own_run, bundle, tmp_path, "--cosine", "0,0") < 0.9
    assert told not in " ".join(capsys.readouterr().out.split())


def agreement(run, bundle, folder, *options):
    """Share of pixels that a run and a bundle label alike."""
    report = folder / "report.json"
    data = ["--dataset", "scenes", "--limit", "2", "--option", "size=64"]
    call = ["evaluate", str(run), "--against", str(bundle), *data, "--json", str(report)]
    assert main([*call, *options]) == 0
    return json.loads(report.read_text())["agreement"]


def test_a_cosine_of_the_caller_s_own_leaves_it_out(own_run, tmp_path, capsys, monkeypatch):
    written().write(own_run)
    given = []

    def export_bundle(model, path, **options):
        given.append((model.config.cosine, model.config.seen_bias, options.get("cosine")))
        return path

    monkeypatch.setattr("zsseg_rt.training.trained.bundle.export_bundle", export_bundle)
    call = ["export", "trained", str(own_run), "-o", str(tmp_path / "run.zsseg")]
    assert main([*call, "--cosine", "0,0"]) == 0
    assert main([*call, "--cosine", "0.1,0.2,9"]) == 0
    assert "calibration" not in capsys.readouterr().out
    own = CosineRule(seen_weight=0.1, unseen_weight=0.2, scale=9.0)
    assert given == [(None, 0.1, None), (None, 0.1, own)]


def test_settings_that_are_damaged_or_another_run_s(own_run):
    written(seen=("cat", "dog")).write(own_run)
    from zsseg_rt.training.trained.bundle import export_trained

    with pytest.raises(CheckpointError, match="expected settings chosen for this run's seen names"):
        export_trained(own_run, own_run.parent / "a.zsseg")
    (own_run / CALIBRATION_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="expected what zsseg-rt calibrate wrote"):
        export_trained(own_run, own_run.parent / "a.zsseg")
    (own_run / CALIBRATION_FILE).write_text('{"seen_bias": 1}')
    with pytest.raises(CheckpointError, match="calibration.json: missing key"):
        export_trained(own_run, own_run.parent / "a.zsseg")


def test_runs_without_anything_to_choose(config, tmp_path, capsys):
    def refused(match, *changes, error=ArgumentError):
        plain = tmp_path / "run.toml"
        plain.write_text(config.to_toml())
        with pytest.raises(error, match=match):
            choose_settings(TrainConfig.load(plain, changes), tmp_path / "work", BRIEF)

    refused("model.architecture: expected zegclip or clip_rc.*'zegformer'",
            "model.architecture=zegformer")  # fmt: skip
    refused("task.protocol: expected 'inductive'", "task.protocol=supervised")
    refused("model.start_from: expected none", "model.start_from=runs/other")
    refused("expected at least 4 seen classes", "data.name=folder", f"data.root={photos(tmp_path)}",
            "data.options={}")  # fmt: skip
    assert main(["calibrate", str(tmp_path)]) == 1
    assert "expected the folder of a training run" in capsys.readouterr().err


def photos(root):
    """Images with three classes, all seen."""
    import cv2

    for folder in ("images", "masks"):
        (root / "photos" / folder).mkdir(parents=True)
    (root / "photos" / "classes.txt").write_text("a\nb\nc\n")
    for index in range(4):
        for folder in ("images", "masks"):
            picture = np.full((70, 70), index % 3, np.uint8)
            cv2.imwrite(str(root / "photos" / folder / f"{index}.png"), picture)
    for split in ("train", "val"):
        (root / "photos" / f"{split}.txt").write_text("0\n1\n2\n3\n")
    return root / "photos"


def test_images_that_show_no_held_out_name(config, tmp_path, monkeypatch):
    plain = SceneDataset.__getitem__

    def sky_only(dataset, index):
        sample = plain(dataset, index)
        sample.labels[:] = CLASS_NAMES.index("blue sky")
        return sample

    monkeypatch.setattr(SceneDataset, "__getitem__", sky_only)
    with pytest.raises(DatasetError, match="expected images that show a name which was held out"):
        choose_settings(config, tmp_path, BRIEF)
