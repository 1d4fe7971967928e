"""``zsseg-rt calibrate``: settings chosen by held-out names, and by nothing that is unseen."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support.errors import refused  # noqa: E402
from support.small_runs import TABLES, save_clip  # noqa: E402
from tools.scenes import CLASS_NAMES, SEEN, SceneDataset  # noqa: E402
from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.cli import main  # noqa: E402
from zsseg_rt.common.cosine_rule import CosineRule  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError  # noqa: E402
from zsseg_rt.training.assembly import train  # noqa: E402
from zsseg_rt.training.calibration import calibrate as module  # noqa: E402
from zsseg_rt.training.calibration import judging  # noqa: E402
from zsseg_rt.training.calibration.calibrate import CalibrationSettings, choose_settings  # noqa: E402
from zsseg_rt.training.calibration.candidates import (  # noqa: E402
    Grid,
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


def test_a_quarter_of_the_names_is_held_out_and_none_twice():
    drawn = draw_names(SEEN, 4, 0)
    assert [len(names) for names in drawn] == [4, 4, 4, 4]
    assert len({row for names in drawn for row in names}) == 16
    assert {row for names in drawn for row in names} <= set(SEEN)
    assert draw_names(SEEN, 2, 0) == drawn[:2]
    assert draw_names(SEEN, 2, 1) != drawn[:2]
    with refused(ArgumentError, "data.seen"):
        draw_names((0, 1, 2), 1, 0)
    with refused(ArgumentError, "folds"):
        draw_names(SEEN, 5, 0)


def test_images_to_choose_by_are_not_trained_on():
    trained, judged = judged_images(10, 3)
    assert (trained, judged) == ([1, 2, 4, 5, 7, 8, 9], [0, 3, 6])
    assert len(judged_images(10, 100)[1]) == 5
    with refused(ArgumentError, "data"):
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


def trained_on(monkeypatch):
    """Notes the data that brief trainings are given."""
    plain, parts = module.assemble, []

    def noting(config, *, dataset):
        parts.append(dataset)
        return plain(config, dataset=dataset)

    monkeypatch.setattr(module, "assemble", noting)
    return parts


@pytest.mark.parametrize("hold_out", ["names", "pictures"])
def test_pictures_are_held_out_with_the_names_if_asked(config, tmp_path, monkeypatch, hold_out):
    parts = trained_on(monkeypatch)
    found = choose_settings(config, tmp_path, replace(BRIEF, hold_out=hold_out))
    assert found.hold_out == hold_out
    whole = SceneDataset("train", size=64, length=24)
    for part, held in zip(parts, found.hold_outs, strict=True):
        rows = [CLASS_NAMES.index(name) for name in held.names]
        showing = [image for image in part.images if np.isin(whole[image].labels, rows).any()]
        assert bool(showing) == (hold_out == "names")
        assert part.images


def test_calibrations_written_before_pictures_could_be_held_out(own_run):
    path = written().write(own_run)
    content = json.loads(path.read_text())
    assert content.pop("hold_out") == "names"
    path.write_text(json.dumps(content))
    assert read_calibration(own_run).hold_out == "names"
    with refused(ArgumentError, "hold_out"):
        CalibrationSettings(hold_out="all")


@pytest.mark.parametrize("hold_out", ["names", "pictures"])
def test_a_run_without_unseen_classes_chooses_unseen_weights_by_pictures_alone(
    config, tmp_path, monkeypatch, hold_out
):
    plain, tried = module.judge, []

    def noting(*arguments, **options):
        tried.append(plain(*arguments, **options))
        return tried[-1]

    monkeypatch.setattr(module, "judge", noting)
    changes = ["data.name=folder", f"data.root={photos(tmp_path, 'abcd')}", "data.options={}"]
    (tmp_path / "run.toml").write_text(config.to_toml())
    changed = TrainConfig.load(tmp_path / "run.toml", changes)
    settings = CalibrationSettings(iterations=1, folds=1, images=4, hold_out=hold_out)
    found = choose_settings(changed, tmp_path / "work", settings)
    rules = [setting.cosine for setting in tried[0].settings if setting.cosine is not None]
    assert rules
    assert any(rule.unseen_weight for rule in rules) == (hold_out == "pictures")
    assert found.cosine is None or hold_out == "pictures" or not found.cosine.unseen_weight


def test_pictures_that_all_show_a_held_out_name(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "shown_classes", lambda data, images: np.ones((len(images), 28)))
    with refused(DatasetError, "data"):
        choose_settings(config, tmp_path, replace(BRIEF, hold_out="pictures"))


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
    arguments = ["--iterations", "1", "--folds", "1", "--images", "12", "--hold-out", "pictures"]
    report = tmp_path / "choice.json"
    assert main(["calibrate", str(own_run), *arguments, "--json", str(report)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = read_calibration(own_run)
    assert found.described in printed
    assert "trained without:" in printed
    assert "names and the pictures that show them held out" in printed
    assert main(["calibrate", str(own_run), "--hold-out", "all"]) == 2
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

    with refused(CheckpointError, None, "calibration.json"):
        export_trained(own_run, own_run.parent / "a.zsseg")
    (own_run / CALIBRATION_FILE).write_text("{")
    with refused(CheckpointError, None, "calibration.json"):
        export_trained(own_run, own_run.parent / "a.zsseg")
    (own_run / CALIBRATION_FILE).write_text('{"seen_bias": 1}')
    with refused(CheckpointError, None, "calibration.json"):
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


def photos(root, names="abc"):
    """Images with a class each, all seen."""
    import cv2

    for folder in ("images", "masks"):
        (root / "photos" / folder).mkdir(parents=True)
    (root / "photos" / "classes.txt").write_text("\n".join(names) + "\n")
    for index in range(8):
        for folder in ("images", "masks"):
            picture = np.full((70, 70), index % len(names), np.uint8)
            cv2.imwrite(str(root / "photos" / folder / f"{index}.png"), picture)
    for split in ("train", "val"):
        (root / "photos" / f"{split}.txt").write_text("\n".join("01234567") + "\n")
    return root / "photos"


def test_images_that_show_no_held_out_name(config, tmp_path, monkeypatch):
    plain = SceneDataset.__getitem__

    def sky_only(dataset, index):
        sample = plain(dataset, index)
        sample.labels[:] = CLASS_NAMES.index("blue sky")
        return sample

    monkeypatch.setattr(SceneDataset, "__getitem__", sky_only)
    with refused(DatasetError, None, "train"):
        choose_settings(config, tmp_path, BRIEF)
