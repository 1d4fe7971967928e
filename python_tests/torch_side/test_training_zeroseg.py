"""ZeroSeg's training: views, the cache of the teacher's features, losses, the task."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
from torch import nn  # noqa: E402

from support.errors import refused  # noqa: E402
from support.tiny_zeroseg import zeroseg_model  # noqa: E402
from zsseg_rt.errors import ArgumentError, ShapeError, TrainingError  # noqa: E402
from zsseg_rt.training.data import Batch  # noqa: E402
from zsseg_rt.training.tasks.zeroseg import (  # noqa: E402  # noqa: E402
    TeacherFeatures,
    TeacherViews,
    ZeroSegTask,
    scaled_learning_rate,
    segment_matching_loss,
    view_loss,
)

VIEWS = TeacherViews(size=16)


class MeanColours(nn.Module):
    """A teacher that embeds a view as its mean colour, repeated; counts what it is asked."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.seen = 0

    def encode_image(self, views):
        self.seen += len(views)
        return (self.gain * views.mean(dim=(2, 3))).repeat(1, 11)[:, :32]


def batch_of(images):
    count, _, height, width = images.shape
    return Batch(
        images=images,
        valid_hw=torch.tensor([[height, width]] * count),
        labels=torch.full((count, height, width), 255),
        names=tuple(f"p{i}" for i in range(count)),
    )


def pictures(count=2, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_thirty_views_with_exact_bounds():
    views = TeacherViews()
    boxes = views.boxes((224, 224))
    assert views.count == len(boxes) == 30
    assert boxes[0] == (0, 224, 0, 224)
    assert boxes[1:5] == ((0, 112, 0, 112), (0, 112, 112, 224), (112, 224, 0, 112),
                          (112, 224, 112, 224))  # fmt: skip
    assert boxes[5:9] == ((0, 75, 0, 75), (0, 75, 75, 149), (0, 75, 149, 224), (75, 149, 0, 75))
    assert boxes[14] == (0, 56, 0, 56)
    assert boxes[29] == (168, 224, 168, 224)


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


def test_views_are_cut_resized_and_normalised():
    """Cells of one colour each come back as that colour, in raster order."""
    colours = torch.tensor([[10, 200, 30], [90, 0, 255], [1, 2, 3], [128, 64, 32]])
    cells = colours.reshape(2, 2, 3).permute(2, 0, 1).to(torch.uint8)
    image = cells.repeat_interleave(32, 1).repeat_interleave(32, 2)[None]
    views = TeacherViews(grids=(1, 2), size=20, image_mean=(0.1, 0.2, 0.3), image_std=(2, 1, 0.5))
    cut = views.cut(image)
    assert cut.shape == (1, 5, 3, 20, 20)
    expected = (colours / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([2, 1, 0.5])
    flat = cut[0, 1:].flatten(2)
    torch.testing.assert_close(flat, expected[..., None].expand_as(flat), atol=1e-5, rtol=1e-5)
    low, high = (0 - torch.tensor([0.1, 0.2, 0.3])), (1 - torch.tensor([0.1, 0.2, 0.3]))
    bounds = torch.stack([low, high]) / torch.tensor([2, 1, 0.5])
    whole = cut[0, 0].flatten(1)
    assert (whole >= bounds[0][:, None] - 1e-6).all()
    assert (whole <= bounds[1][:, None] + 1e-6).all()


def cached(folder, teacher, views=VIEWS):
    return TeacherFeatures(teacher, views, cache_folder=folder)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.features")}


def test_cache_serves_an_image_once_computed(tmp_path):
    teacher, images = MeanColours(), pictures(3)
    first = cached(tmp_path, teacher)
    start = teacher.seen
    before = first(images[:2])
    assert teacher.seen == start + 60
    again = cached(tmp_path, teacher)
    start = teacher.seen
    assert torch.equal(again(images[:2]), before)
    assert teacher.seen == start
    mixed = again(images)
    assert teacher.seen == start + 30
    assert torch.equal(mixed, again.compute(images))
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("change", ["teacher", "grids", "size", "images"])
def test_cache_is_kept_apart_by_teacher_views_and_images(tmp_path, change):
    cached(tmp_path, MeanColours())(pictures())
    teacher = MeanColours(2.0 if change == "teacher" else 1.0)
    views = {"grids": TeacherViews(grids=(1, 2), size=16), "size": TeacherViews(size=8)}
    images = pictures(seed=int(change == "images"))
    other = cached(tmp_path, teacher, views.get(change, VIEWS))
    start = teacher.seen
    assert torch.equal(other(images), other.compute(images))
    assert teacher.seen > start + 2 * other.views.count


@pytest.mark.parametrize("change", [lambda b: b"", lambda b: b[:-200], lambda b: b[:-1] + b"x"])
def test_damaged_features_are_computed_again(tmp_path, change):
    images = pictures(2)
    expected, before = cached(tmp_path, MeanColours())(images), files(tmp_path)
    for path, content in before.items():
        path.write_bytes(change(content))
    assert torch.equal(cached(tmp_path, MeanColours())(images), expected)
    assert files(tmp_path) == before


@pytest.mark.parametrize("unit", [False, True])
def test_losses_by_hand(unit):
    torch.manual_seed(0)
    z, g, v = torch.randn(2, 5), torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    found = [
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
    torch.testing.assert_close(found[0], torch.tensor(far).mean())
    torch.testing.assert_close(found[1], torch.tensor(near).mean())


def make_task(model=None, **settings):
    features = TeacherFeatures(MeanColours(), VIEWS)
    return ZeroSegTask(model or zeroseg_model(), features, **settings)


def test_task_gives_three_finite_terms_and_reaches_every_tensor():
    torch.manual_seed(0)
    task = make_task().train()
    terms = task(batch_of(pictures(4)))
    assert set(terms) == {"reconstruction", "views", "segments"}
    assert all(term.ndim == 0 and term.isfinite() and term > 0 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    without = [name for name, p in task.model.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad is None for p in task.features.parameters())
    assert not any(module.training for module in task.features.teacher.modules())


def test_weights_scale_their_terms_and_labels_do_not_matter():
    batch = batch_of(pictures())
    plain = make_task().eval()
    torch.manual_seed(3)
    expected = plain(batch)
    weights = {"reconstruction_weight": 2.0, "view_weight": 3.0, "matching_weight": 0.5}
    other = Batch(batch.images, batch.valid_hw, batch.labels * 0, batch.names)
    weighted = make_task(**weights).eval()
    torch.manual_seed(3)
    found = weighted(other)
    for name, factor in zip(("reconstruction", "views", "segments"), (2, 3, 0.5), strict=True):
        torch.testing.assert_close(found[name], factor * expected[name])


def test_terms_that_are_switched_off():
    task = make_task(reconstruction_weight=0, matching_weight=0).train()
    terms = task(batch_of(pictures()))
    assert set(terms) == {"views"}
    terms["views"].backward()
    trained = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert not any(name.startswith("decoder.") for name in trained)
    assert all(dict(task.model.named_parameters())[name].grad is not None for name in trained)
    task = make_task(zeroseg_model(decoder_layers=0), reconstruction_weight=0)
    assert set(task(batch_of(pictures()))) == {"views", "segments"}
    task = ZeroSegTask(zeroseg_model(), TeacherFeatures(MeanColours(), WHOLE), matching_weight=0)
    assert set(task(batch_of(pictures()))) == {"reconstruction", "views"}


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


@pytest.mark.parametrize(
    ("kind", "argument", "call"),
    [
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
        (ShapeError, "batch", lambda: make_task()(batch_of(pictures(side=32)))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kind, argument, call):
    with refused(kind, argument):
        call()


def test_a_cache_without_a_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(TrainingError, None, "file"):
        cached(tmp_path / "file", MeanColours())(pictures())
