"""ZeroSeg's student: MAE's names and numbers, grouping, GroupViT's labelling rule, training."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support.errors import refused
from support.tiny import same
from support.tiny_zeroseg import SIZES, zeroseg_model
from zsseg_rt.errors import ArgumentError, CheckpointError, ShapeError, TrainingError
from zsseg_rt.models import create_model
from zsseg_rt.models.base import SlideSettings
from zsseg_rt.models.zeroseg.model import (
    hard_assignment,
    load_mae_encoder,
    patchify,
    random_patch_mask,
    reconstruction_loss,
    sincos_positions,
    spread_scores,
)
from zsseg_rt.training.data import Batch
from zsseg_rt.training.tasks.zeroseg import (
    TeacherFeatures,
    TeacherViews,
    ZeroSegTask,
    scaled_learning_rate,
    segment_matching_loss,
    view_loss,
)

SIZES_OF_MODEL = SIZES | {"image_size": 64}
del SIZES_OF_MODEL["size_hw"]
HEADS = {"num_heads": 4, "head_heads": 4, "decoder_heads": 4}


@pytest.fixture(scope="module")
def model():
    return zeroseg_model()


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64)


def test_mae_weights_compute_what_timms_vit_does(tmp_path, image):
    """Which has MAE's names; its file in addition has what the decoder's start."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = create_model("zeroseg").encoder.state_dict()
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0}
    vit = timm.models.VisionTransformer(**sizes).eval()
    path, state_dict = tmp_path / "mae.pth", vit.state_dict()
    torch.save({"model": state_dict | {"mask_token": torch.zeros(1, 1, 8)}}, path)
    built = create_model("zeroseg", mae_weights=path, **SIZES_OF_MODEL)
    assert same(built.encoder.state_dict(), state_dict)
    expected = vit.forward_features(image)[:, 1:]
    torch.testing.assert_close(built.encoder(image).patch_tokens, expected)
    assert all(p.requires_grad for p in built.parameters())
    before = copy.deepcopy(built.state_dict())
    wrong = state_dict | {"pos_embed": torch.zeros(1, 10, 64)}
    with refused(CheckpointError, "state_dict", "pos_embed", "10", "17"):
        load_mae_encoder(built, wrong)
    with refused(CheckpointError, "state_dict", "cls_token", "float16"):
        load_mae_encoder(built, wrong | {"cls_token": state_dict["cls_token"].half()})
    assert same(built.state_dict(), before)


def test_positions_are_maes():
    """One entry by hand: columns first, sines before cosines, row 0 for the class token."""
    table = sincos_positions(16, 5)[0]
    assert table.shape == (26, 16)
    assert not table[0].any()
    row, column = 3, 2
    omega = [1.0, 10000**-0.25, 10000**-0.5, 10000**-0.75]
    expected = [
        f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega
    ]
    np.testing.assert_allclose(table[1 + 5 * row + column], expected, atol=1e-6)


@torch.no_grad()
def test_the_order_in_which_patches_are_encoded_does_not_matter(model, image):
    """Ratio 0 shuffles but drops nothing; sorted back it is the unmasked result."""
    mask = random_patch_mask(2, 16, 0.0)
    whole, shuffled = model.encoder(image), model.encoder(image, mask)
    order = mask.restore[..., None].expand_as(shuffled.patch_tokens)
    torch.testing.assert_close(shuffled.patch_tokens.gather(1, order), whole.patch_tokens)
    torch.testing.assert_close(shuffled.cls_token, whole.cls_token)
    mask = random_patch_mask(2, 16, 0.5)
    flipped = mask._replace(
        kept=mask.kept.flip(1),
        restore=torch.where(mask.removed == 0, 7 - mask.restore, mask.restore),
    )
    first, second = (model.decoder(model.encoder(image, m), m) for m in (mask, flipped))
    assert first.shape == (2, 16, 768)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_patches_are_cut_in_maes_order():
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    expected = [image[1, c, 2 + p, 4 + q].item() for p in (0, 1) for q in (0, 1) for c in range(3)]
    assert patches[1, 5].tolist() == expected  # row, column, channel of the last patch


def test_reconstruction_counts_hidden_patches_only(image):
    mask = random_patch_mask(2, 16, 0.6)
    pixels = patchify(image, 16) + mask.removed[..., None] * 0.5 + (1 - mask.removed[..., None]) * 9
    loss = reconstruction_loss(pixels, image, mask, patch_size=16)
    torch.testing.assert_close(loss, torch.tensor(0.25))


def test_noise_moves_assignments_in_training_only(image):
    model = zeroseg_model()
    tokens = model.encoder(image).patch_tokens.detach()
    model.train()
    draws = [model.seg(tokens).segment_embeds for _ in range(4)]
    assert any(not torch.equal(draws[0], other) for other in draws[1:])
    model.eval()
    first, second = model(image), model(image)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("noisy", [False, True])
def test_straight_through_gradient_is_the_softmaxs(noisy):
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    weights = torch.randn(2, 3, 5)
    torch.manual_seed(2)
    (hard_assignment(logits, noisy=noisy) * weights).sum().backward()
    noise = torch.zeros_like(logits)
    if noisy:
        torch.manual_seed(2)
        noise = -torch.empty_like(logits).exponential_().log()
    soft = (logits.detach() + noise).softmax(1)
    expected = soft * (weights - (soft * weights).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_a_checkpoint_says_its_sizes(image, tmp_path):
    model, path = zeroseg_model(head_layers=(1, 1, 2)), tmp_path / "a.safetensors"
    weights = model.state_dict()
    save_file(weights, path)
    loaded = create_model("zeroseg", weights=path, image_size=64, **HEADS)
    assert loaded.config == model.config
    assert torch.equal(loaded(image).segment_embeds, model(image).segment_embeds)
    assert create_model("zeroseg", weights=path, with_decoder=False, **HEADS).decoder is None
    with refused(ArgumentError, "embed_dim", "32"):
        create_model("zeroseg", weights=path, embed_dim=16, **HEADS)
    del weights["seg.norm.bias"]
    others = (model.encoder.state_dict(), "encoder.patch_embed.proj.weight")
    for content, key in (others, (weights, "seg.norm.bias")):
        save_file(content, path)
        with refused(CheckpointError, "state_dict", key):
            create_model("zeroseg", weights=path, **HEADS)


@pytest.mark.parametrize(
    ("best", "threshold", "background"),
    [
        ((0.9, 0.5, 0.2), 0.5, (False, False, True)),  # at the threshold is no background
        ((0.9, 0.4999, 0.2), 0.5, (False, True, True)),
        ((0.3, 0.2, 0.1), 0.95, (False, True, True)),  # the best segment never is
        ((0.3, 0.3, 0.3), 0.95, (False, False, False)),
        ((0.3, 0.2, 0.1), 0.0, (False, False, False)),
    ],
)
def test_background_rule_at_its_boundaries(best, threshold, background):
    scores = torch.tensor([[[b, b / 2] for b in best]])
    segments = torch.tensor([[[0, 1, 2]]])
    spread = spread_scores(scores, segments, threshold)
    assert spread.shape == (1, 3, 1, 3)
    assert (spread.argmax(1) == 0)[0, 0].tolist() == list(background)
    assert torch.equal(spread[:, 1:], spread_scores(scores, segments))


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_one_window_equals_the_whole_picture(threshold):
    model, text = zeroseg_model(background_threshold=threshold), torch.randn(5, 32)
    rgb = np.random.default_rng(7).integers(0, 256, (64, 64, 3), np.uint8)
    windows, whole = (
        model.slide(rgb, text, SlideSettings(short_side=64, crop_size=crop, stride=32))
        for crop in (64, 2048)
    )
    assert torch.equal(windows, whole)
    assert windows.shape == (64, 64)


def test_segment_agrees_with_the_scores(model, image):
    """Labels as the engine makes them equal the argmax of the scores where both are defined."""
    text = torch.randn(5, 32)
    labels, scores = model.segment(image, text, (64, 64))
    expected = model.predict(image, text)
    assert torch.equal(labels, expected.argmax(1))
    torch.testing.assert_close(scores, expected.amax(1))
    with_unknown = zeroseg_model(background_threshold=0.99)
    marked, _ = with_unknown.segment(image, text, (64, 64))
    reference = with_unknown.predict(image, text).argmax(1) - 1
    assert torch.equal(marked, reference)
    assert (marked == -1).any()
    assert (marked >= 0).any()


# --- training: views, the cache of the teacher's features, losses, the task ---


VIEWS = TeacherViews(size=16)


class MeanColours(nn.Module):
    """A teacher that embeds a view as its mean colour, repeated; counts what it is asked."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.encoded = 0

    def encode_image(self, views):
        self.encoded += len(views)
        return (self.gain * views.mean(dim=(2, 3))).repeat(1, 11)[:, :32]


def random_images(count=2, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def batch_of(count=2, side=64):
    return Batch(
        images=random_images(count, side),
        valid_hw=torch.tensor([[side, side]] * count),
        labels=torch.full((count, side, side), 255),
        names=tuple(f"p{i}" for i in range(count)),
    )


@pytest.mark.parametrize("size_hw", [(224, 224), (37, 101), (4, 5)])
def test_cells_of_a_grid_cover_every_pixel_once(size_hw):
    views = TeacherViews(grids=(1, 2, 3, 4))
    boxes, start = views.boxes(size_hw), 0
    for side in views.grids:
        covered = np.zeros(size_hw, int)
        for top, bottom, left, right in boxes[start : start + side**2]:
            covered[top:bottom, left:right] += 1
        assert (covered == 1).all()
        start += side**2


def cached(folder, teacher, views=VIEWS, num_images=3):
    return TeacherFeatures(teacher, views, cache_folder=folder, num_images=num_images)


def test_cache_serves_an_image_once_computed(tmp_path):
    teacher, images = MeanColours(), random_images(3)
    first = cached(tmp_path, teacher)
    start = teacher.encoded
    before = first(images[:2], (2, 0))
    assert teacher.encoded == start + 60
    again = cached(tmp_path, teacher)
    start = teacher.encoded
    assert torch.equal(again(images[:2], (2, 0)), before)
    assert teacher.encoded == start
    mixed = again(images, (2, 0, 1))
    assert teacher.encoded == start + 30
    assert torch.equal(mixed, again.compute(images))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 3 * (32 + 2 * 30 * 32)


@pytest.mark.parametrize("change", ["teacher", "grids", "size", "images"])
def test_cache_is_kept_apart_by_teacher_views_and_images(tmp_path, change):
    cached(tmp_path, MeanColours())(random_images(), (0, 1))
    teacher = MeanColours(2.0 if change == "teacher" else 1.0)
    views = {"grids": TeacherViews(grids=(1, 2), size=16), "size": TeacherViews(size=8)}
    images = random_images(seed=int(change == "images"))
    other = cached(tmp_path, teacher, views.get(change, VIEWS))
    start = teacher.encoded
    assert torch.equal(other(images, (0, 1)), other.compute(images))
    assert teacher.encoded > start + 2 * other.views.count
    assert len(list(tmp_path.iterdir())) == 1 + (change != "images")


def test_damaged_features_are_computed_again(tmp_path):
    images = random_images(2)
    expected = cached(tmp_path, MeanColours())(images, (0, 1))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = (content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in (100, 3))
    for damaged in (content[:-2000], *flipped):  # cut, a bit of features, of a digest
        file.write_bytes(damaged)
        assert torch.equal(cached(tmp_path, MeanColours())(images, (0, 1)), expected)
        assert file.read_bytes() == content


@pytest.mark.parametrize("unit", [False, True])
def test_losses_by_hand(unit):
    torch.manual_seed(0)
    z, g, v = torch.randn(2, 5), torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    losses = [
        view_loss(z, v, normalize_targets=unit),
        segment_matching_loss(g, v, normalize_targets=unit),
    ]
    targets = v / v.norm(dim=2, keepdim=True) if unit else v
    factor = 5**0.5 if unit else 1.0
    far = [[(z[b] - targets[b, j]).abs().mean() * factor for j in range(4)] for b in range(2)]
    near = [
        min((g[b, i] - targets[b, j]).abs().mean() * factor for j in range(1, 4))
        for b in range(2)
        for i in range(3)
    ]
    torch.testing.assert_close(losses[0], torch.tensor(far).mean())
    torch.testing.assert_close(losses[1], torch.tensor(near).mean())


def make_task(model=None, **settings):
    features = TeacherFeatures(MeanColours(), VIEWS)
    return ZeroSegTask(model or zeroseg_model(), features, **settings)


def test_task_gives_three_finite_terms_and_reaches_every_tensor():
    torch.manual_seed(0)
    task = make_task().train()
    terms = task(batch_of(4))
    assert set(terms) == {"reconstruction", "views", "segments"}
    assert all(term.ndim == 0 and term.isfinite() and term > 0 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    without = [name for name, p in task.model.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad is None for p in task.features.parameters())
    assert not any(module.training for module in task.features.teacher.modules())


def test_terms_that_are_switched_off():
    task = make_task(reconstruction_weight=0, matching_weight=0).train()
    terms = task(batch_of())
    assert set(terms) == {"views"}
    terms["views"].backward()
    trained = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert not any(name.startswith("decoder.") for name in trained)
    assert all(dict(task.model.named_parameters())[name].grad is not None for name in trained)
    task = make_task(zeroseg_model(decoder_layers=0), reconstruction_weight=0)
    assert set(task(batch_of())) == {"views", "segments"}
    task = ZeroSegTask(zeroseg_model(), TeacherFeatures(MeanColours(), WHOLE), matching_weight=0)
    assert set(task(batch_of())) == {"reconstruction", "views"}


def test_rates_grow_with_the_batch_and_norms_and_biases_are_not_decayed():
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_learning_rate(1.5e-4, 256) == 1.5e-4
    assert make_task().learning_rate == pytest.approx(2.4e-3)
    task = make_task(batch_size=512)
    decayed, plain = task.parameter_groups()
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr"] == plain["lr"] == pytest.approx(3e-4)
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)]
               or "group_projector.0" in names[id(p)] for p in plain["params"])  # fmt: skip
    assert {id(p) for group in (decayed, plain) for p in group["params"]} == set(names)
    assert not any(names[id(p)].endswith("bias") for p in decayed["params"])


WHOLE = TeacherViews(grids=(1,), size=16)


def create(**settings):
    return lambda: create_model("zeroseg", **(SIZES_OF_MODEL | settings))


@pytest.mark.parametrize(
    ("kind", "argument", "call"),
    [
        (ArgumentError, "top_k", create(top_k=0)),
        (ArgumentError, "logit_scale", create(logit_scale=-1.0)),
        (ArgumentError, "background_threshold", create(background_threshold=2.0)),
        (ArgumentError, "head_heads", create(head_heads=5)),
        (ShapeError, "image_size", create(image_size=50)),
        (ArgumentError, "heads", create(heads=4)),
        (ArgumentError, "head_layers", create(group_tokens=(8,))),
        (CheckpointError, "path", create(weights="absent.safetensors")),
        (ArgumentError, "mae_weights", create(weights="a", mae_weights="b")),
        *((ArgumentError, "grids", lambda grids=grids: TeacherViews(grids=grids))
          for grids in ((), (2, 3), (1, 3, 2), (1, 1, 2))),
        (ShapeError, "images", lambda: VIEWS.boxes((3, 9))),
        (ArgumentError, "mask_ratio", lambda: make_task(mask_ratio=1.0)),
        (ArgumentError, "view_weight", lambda: make_task(view_weight=-1.0)),
        (ArgumentError, "weight_decay", lambda: make_task(weight_decay=float("nan"))),
        (ArgumentError, "reconstruction_weight",
         lambda: make_task(zeroseg_model(decoder_layers=0))),
        (ArgumentError, "features", lambda: make_task(zeroseg_model(embed_dim=16))),
        (ArgumentError, "matching_weight",
         lambda: ZeroSegTask(zeroseg_model(), TeacherFeatures(MeanColours(), WHOLE))),
        (ShapeError, "batch", lambda: make_task()(batch_of(side=32))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kind, argument, call):
    with refused(kind, argument):
        call()


def test_a_cache_without_a_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(TrainingError, None, "file"):
        cached(tmp_path / "file", MeanColours())
    with refused(ArgumentError, "num_images"):
        cached(tmp_path, MeanColours(), num_images=0)
