"""Training tasks on tiny models: what they train, what they look at, and that losses fall."""

from dataclasses import replace

import pytest
import torch

from support import tiny
from support.errors import refused
from zsseg_rt.common.schema import setting_names
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models import create_model
from zsseg_rt.training.data.loading import Batch
from zsseg_rt.training.tasks.cosine_head import CosineHeadTask
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.tasks.labelled import PixelLossSettings

SIZES = tiny.TinySizes(num_layers=2, text_layers=1)
UNSEEN = (2, 5)
BUILDERS = {"zegclip": tiny.zegclip_model, "clip_rc": tiny.clip_rc_model}


def batch(size: tuple[int, int] = (64, 64), *, num_pictures: int = 2, seed: int = 0) -> Batch:
    """Pictures whose halves are two classes, with a frame that is not annotated."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_pictures, 3, *size), generator=generator)
    labels = torch.full((num_pictures, *size), 255)
    for index, picture in enumerate(labels):
        picture[4:-4, 4 : size[1] // 2] = index % 7
        picture[4:-4, size[1] // 2 : -4] = (index + 2) % 7
    return Batch(
        images=images.to(torch.uint8),
        valid_hw=torch.tensor([size] * num_pictures),
        labels=labels,
        names=tuple(f"picture {index}" for index in range(num_pictures)),
    )


def task(system: str = "zegclip", sizes: tiny.TinySizes = SIZES, **settings) -> DescriptorTask:
    arguments = {"seen": sizes.seen} | settings
    model = BUILDERS[system](sizes, prompt_dropout=0.0, decoder_dropout=0.0)
    text = tiny.text_embeds(sizes.num_classes, sizes.embed_dim)
    return DescriptorTask(model, text, **arguments).train()


def train(one: torch.nn.Module, given: Batch, steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW(one.parameter_groups())
    losses = []
    for _ in range(steps):
        total = sum(one(given).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("protocol", ["inductive", "transductive", "supervised"])
@pytest.mark.parametrize("system", list(BUILDERS))
def test_losses_fall_and_every_trainable_tensor_moves(system, protocol):
    one = task(system, protocol=protocol)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    losses = train(one, batch())
    assert losses[-1] < 0.8 * losses[0]
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in one.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("loss", ["masks", "cross_entropy"])
def test_inductive_training_cannot_tell_unseen_classes_from_nothing(loss):
    one, given = task(loss=loss), batch(num_pictures=4)
    labels = given.labels.clone()
    for index in UNSEEN:
        labels[labels == index] = 255
    assert (labels != given.labels).any()
    assert one(given) == one(replace(given, labels=labels))


def test_transductive_training_cannot_tell_unseen_classes_apart():
    one, given = task(protocol="transductive"), batch(num_pictures=4)
    labels = given.labels.clone()
    labels[labels == UNSEEN[0]] = UNSEEN[1]
    assert (labels != given.labels).any()
    assert one(given) == one(replace(given, labels=labels))
    labels[labels == UNSEEN[1]] = 255
    assert one(given)["focal"] != one(replace(given, labels=labels))["focal"]


def test_weights_are_factors():
    given = batch()
    once, twice = (
        task("clip_rc", focal_weight=f, dice_weight=f, recovery_weight=f)(given) for f in (1.0, 2.0)
    )
    assert set(once) == {"focal", "dice", "recovery_queries", "recovery_patches"}
    for name, value in once.items():
        torch.testing.assert_close(twice[name], 2 * value)


def test_a_stride_looks_at_every_so_many_th_label():
    strided, dense, given = task(label_stride=4), task(), batch()
    images = torch.zeros(2, 3, 64, 64)
    thinned = given.labels[:, 2::4, 2::4]
    with torch.no_grad():
        expected, found = dense.losses(images, thinned), strided.losses(images, given.labels)
    torch.testing.assert_close(found, expected)
    with refused(ArgumentError, "label_stride"):
        task(label_stride=0)


def test_padding_is_the_mean_colour_whatever_its_pixels():
    one, given = task(), replace(batch(), valid_hw=torch.tensor([[64, 40], [33, 64]]))
    images = given.images.clone()
    images[0, :, :, 40:] = 0
    images[1, :, 33:] = 255
    assert one(given) == one(replace(given, images=images))


def test_crops_of_another_size_than_the_models_keep_their_labels_resolution():
    terms = task()(batch((48, 80)))
    assert all(value.isfinite() for value in terms.values())


def test_fine_tuning_instead_of_prompts():
    one = task(sizes=replace(SIZES, num_prompts=0), trained="backbone", backbone_learning_rate=1e-4)
    head, backbone = one.parameter_groups()
    assert (head["lr"], backbone["lr"]) == (2e-4, 1e-4)
    expected = {id(p) for p in one.model.backbone.parameters()}
    assert {id(p) for p in backbone["params"]} == expected
    losses = train(one, batch())
    assert losses[-1] < losses[0]


def test_the_papers_fixed_baseline_trains_its_head_alone():
    one = task(sizes=replace(SIZES, num_prompts=0), trained="head", loss="cross_entropy")
    (head,) = one.parameter_groups()
    assert not any(p.requires_grad for p in one.model.backbone.parameters())
    held = {id(p) for p in one.model.decode_head.parameters() if p.requires_grad}
    assert {id(p) for p in head["params"]} == held
    losses = train(one, batch())
    assert losses[-1] < losses[0]


def test_cross_entropy_falls():
    losses = train(task(loss="cross_entropy"), batch())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"loss": "l2"}, "loss"),
        ({"trained": "all"}, "trained"),
        ({"focal_weight": -1.0}, "focal_weight"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused(settings, argument):
    with refused(ArgumentError, argument):
        task(**settings)


def test_labels_of_another_size_than_the_pictures_are_refused():
    one, given = task(), batch()
    with refused(ShapeError, "labels"):
        one(replace(given, labels=given.labels[:1]))


# ---------------------------------------------------------------- the cosine head


@pytest.fixture
def baseline(tmp_path):
    torch.save(tiny.clip_state_dict(SIZES), tmp_path / "clip.pt")

    def build(**settings) -> CosineHeadTask:
        model = create_model(
            "cosine_head",
            pretrained=tmp_path / "clip.pt",
            image_size=64,
            num_heads=4,
            text_heads=4,
            activation="quick_gelu",
        )
        text = tiny.text_embeds(SIZES.num_classes, SIZES.embed_dim)
        return CosineHeadTask(model, text, **{"seen": SIZES.seen} | settings).train()

    return build


@pytest.mark.parametrize("loss", ["cross_entropy", "masks"])
@pytest.mark.parametrize("train_backbone", [True, False])
def test_the_baseline_trains_what_it_says(baseline, train_backbone, loss):
    one = baseline(train_backbone=train_backbone, loss=loss, learning_rate=1e-3)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    losses = train(one, batch())
    assert losses[-1] < losses[0]
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    tower = {n for n in before if n.startswith("image_encoder.")}
    head = {"image_encoder.head.weight", "log_scale"}
    assert moved == (tower | head if train_backbone else head)


def test_rates_of_the_baselines_groups(baseline):
    one = baseline(learning_rate=3.0, backbone_learning_rate=2.0, weight_decay=0.5)
    settings = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in one.parameter_groups()]
    tower = len(list(one.model.image_encoder.parameters())) - 1
    assert settings == [(1, 3.0, 0.5), (1, 3.0, 0.0), (tower, 2.0, 0.5)]


def test_unseen_classes_are_nothing_to_the_baseline(baseline):
    one, given = baseline(), batch(num_pictures=4)
    labels = given.labels.clone()
    for index in UNSEEN:
        labels[labels == index] = 255
    assert one(given) == one(replace(given, labels=labels))


def test_settings_are_a_tasks_own_and_those_it_shares():
    own = {DescriptorTask: {"recovery_weight", "trained"}, CosineHeadTask: {"train_backbone"}}
    shared = set(setting_names(PixelLossSettings))
    for kind, names in own.items():
        found = setting_names(kind)
        assert sorted(found) == sorted(names | shared)
    assert setting_names(create_model) is None
    with pytest.raises(TypeError, match="focal_wait"):
        task(focal_wait=1.0)


def test_settings_that_are_not_given(baseline):
    dense, masks = baseline().settings, task().settings
    assert (dense.loss, dense.backbone_learning_rate) == ("cross_entropy", 2e-5)
    assert (masks.loss, masks.backbone_learning_rate) == ("masks", 1e-5)
    for made in (dense, masks):
        assert (made.learning_rate, made.weight_decay, made.label_stride) == (2e-4, 0.01, 1)
        assert (made.focal_weight, made.dice_weight) == (100.0, 1.0)
