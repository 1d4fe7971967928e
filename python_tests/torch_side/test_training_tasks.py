"""Training tasks on tiny models: what they train, what they look at, and that losses fall."""

import re
from dataclasses import replace

import pytest
import torch

from support import tiny, tiny_zegformer
from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models import create_model
from zsseg_rt.training.data import Batch
from zsseg_rt.training.tasks.cosine_head import CosineHeadTask
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.tasks.zegformer import ZegFormerTask

SIZES = tiny.TinySizes(num_layers=2, text_layers=1)
UNSEEN = {"zegclip": (2, 5), "clip_rc": (2, 5), "cosine_head": (2, 5), "zegformer": (6,)}
DESCRIPTORS = {"zegclip": tiny.zegclip_model, "clip_rc": tiny.clip_rc_model}


@pytest.fixture
def task(tmp_path):
    def build(system="zegclip", num_prompts=SIZES.num_prompts, **settings):
        sizes = replace(SIZES, num_prompts=num_prompts)
        text = tiny.text_embeds(sizes.num_classes, sizes.embed_dim)
        if system == "zegformer":
            model, text = tiny_zegformer.model(dropout=0.0), tiny_zegformer.text_features()
            settings = {"seen": tiny_zegformer.SEEN} | settings
            return ZegFormerTask(model, text, **settings).train()
        settings = {"seen": sizes.seen} | settings
        if system in DESCRIPTORS:
            model = DESCRIPTORS[system](sizes, prompt_dropout=0.0, decoder_dropout=0.0)
            return DescriptorTask(model, text, **settings).train()
        torch.save(tiny.clip_state_dict(sizes), tmp_path / "clip.pt")
        heads = {"num_heads": 4, "text_heads": 4, "activation": "quick_gelu", "image_size": 64}
        model = create_model("cosine_head", pretrained=tmp_path / "clip.pt", **heads)
        return CosineHeadTask(model, text, **settings).train()

    return build


def batch(system="zegclip", size=(64, 64), num_images=2):
    """Images whose halves are two classes, with a frame that is not annotated."""
    if system == "zegformer":
        size = (48, 72)
        images = torch.stack([tiny_zegformer.picture(*size, salt=salt) for salt in "ab"])
        labels = torch.full((2, *size), 255)
        labels[:, 4:20, 8:40], labels[:, 24:40, 8:60], labels[1, 10:30, 50:70] = 1, 4, 6
        return Batch(images, torch.tensor([size] * 2), labels, ("a", "b"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, *size), generator=generator)
    labels = torch.full((num_images, *size), 255)
    for index, rows in enumerate(labels):
        rows[4:-4, 4 : size[1] // 2] = index % 7
        rows[4:-4, size[1] // 2 : -4] = (index + 2) % 7
    names = tuple(f"image {index}" for index in range(num_images))
    return Batch(images.to(torch.uint8), torch.tensor([size] * num_images), labels, names)


COSINE = {"learning_rate": 1e-3}
CLIP_APART = r"(?!.*clip_model|sem_seg_head\.predictor\.logit_scale).*"


# Of the last layer's attention to pixels, the weights are all that masks are made of.
UNREAD = r"decoder_1\.layers\.2\.(multihead_attn\.(v|proj)|linear\d|norm[23])\."


@pytest.mark.parametrize(
    ("system", "settings", "share", "trained"),
    [
        *((s, {"protocol": p}, 0.8, None)
          for s in DESCRIPTORS for p in ("inductive", "transductive", "supervised")),
        ("cosine_head", COSINE, 1.0, r"image_encoder\..*|log_scale"),
        ("cosine_head", COSINE | {"train_backbone": False}, 1.0,
         r"image_encoder\.head\.weight|log_scale"),
        ("zegformer", {}, 0.9, CLIP_APART),
        ("zegformer", {"protocol": "supervised"}, 0.9, CLIP_APART),
    ],
)  # fmt: skip
def test_losses_fall_and_what_is_trained_moves(task, system, settings, share, trained):
    one, given = task(system, **settings), batch(system)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(one.parameter_groups()), []
    for _ in range(8 if system == "zegformer" else 12):
        total = sum(one(given).values())
        optimizer.zero_grad()
        total.backward()
        if system == "zegformer":
            torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.01)
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < share * losses[0]
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n, p in one.model.named_parameters() if p.requires_grad}
    if trained is not None:
        wanted = {n for n in before if re.fullmatch(trained, n) and before[n].numel()}
    assert moved == wanted


@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("zegclip", {}),
        ("clip_rc", {}),
        ("cosine_head", {}),
        ("zegformer", {}),
    ],
)
def test_inductive_training_cannot_tell_unseen_classes_from_nothing(task, system, settings):
    one, given = task(system, **settings), batch(system, num_images=4)
    labels = given.labels.clone()
    for index in UNSEEN[system]:
        labels[labels == index] = 255
    assert (labels != given.labels).any()
    assert one(given) == one(replace(given, labels=labels))


def test_transductive_training_cannot_tell_unseen_classes_apart(task):
    one, given = task(protocol="transductive"), batch(num_images=4)
    labels = given.labels.clone()
    labels[labels == 2] = 5
    assert (labels != given.labels).any()
    assert one(given) == one(replace(given, labels=labels))
    labels[labels == 5] = 255
    assert one(given)["focal"] != one(replace(given, labels=labels))["focal"]


def test_weights_are_factors(task):
    given = batch()
    once, twice = (
        task("clip_rc", focal_weight=f, dice_weight=f, recovery_weight=f)(given) for f in (1.0, 2.0)
    )
    assert set(once) == {"focal", "dice", "recovery_queries", "recovery_patches"}
    for name, value in once.items():
        torch.testing.assert_close(twice[name], 2 * value)


def test_a_stride_looks_at_every_so_many_th_label(task):
    given, images = batch(), torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        expected = task().losses(images, given.labels[:, 2::4, 2::4])
        found = task(label_stride=4).losses(images, given.labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("system", "colour"), [("zegclip", (0, 255)), ("zegformer", (128, 128))])
def test_padding_is_the_mean_colour_whatever_its_pixels(task, system, colour):
    one, given = task(system), batch(system)
    images = given.images.clone()
    images[0, :, :, 40:], images[1, :, 33:] = colour
    given = replace(given, valid_hw=torch.tensor([[images.shape[2], 40], [33, images.shape[3]]]))
    assert one(given) == one(replace(given, images=images))


def test_crops_of_another_size_than_the_models_keep_their_labels_resolution(task):
    terms = task()(batch(size=(48, 80)))
    assert all(value.isfinite() for value in terms.values())


def test_rates_and_decay_of_the_groups(task):
    def rates(one):
        names = {id(p): name for name, p in one.model.named_parameters()}
        groups = one.parameter_groups()
        return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    one = task("zegformer", learning_rate=1.0, weight_decay=0.5)
    assert rates(one) == {
        name: (
            0.1 if name.startswith("backbone.") else 1.0,
            0.0 if ".norm" in name or "query_embed" in name else 0.5,
        )
        for name, tensor in one.model.named_parameters()
        if tensor.requires_grad
    }
    one = task("cosine_head", learning_rate=3.0, backbone_learning_rate=2.0, weight_decay=0.5)
    head = {"image_encoder.head.weight": (3.0, 0.5), "log_scale": (3.0, 0.0)}
    tower = (name for name, _ in one.model.named_parameters() if name.startswith("image_encoder."))
    assert rates(one) == dict.fromkeys(tower, (2.0, 0.5)) | head


@pytest.mark.parametrize(
    ("system", "settings", "argument", "named"),
    [
        ("zegclip", {"focal_weight": -1.0}, "focal_weight", ()),
        ("zegclip", {"learning_rate": float("nan")}, "learning_rate", ()),
        ("zegclip", {"label_stride": 0}, "label_stride", ()),
        ("zegformer", {"protocol": "transductive"}, "protocol", ("'inductive'", "'supervised'")),
    ],
)
def test_settings_out_of_range_are_refused(task, system, settings, argument, named):
    with refused(ArgumentError, argument, *named):
        task(system, **settings)
