"""Every system: what files and ``from_official`` take and refuse, the registry, laws of models."""

import copy
import re
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from support import golden_cat_seg, golden_tips, tiny, tiny_zegformer
from support.errors import refused
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.models import (
    build_image_encoder,
    build_text_encoder,
    load_checkpoint,
    load_clip,
    normalize_state_dict,
)
from zsseg_rt.models.registry import ARCHITECTURES, create_model, from_official
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.trained import TorchSegmenter

pytestmark = pytest.mark.usefixtures("without_gradients")

VISUAL = golden_cat_seg.CLIP + "visual."
FIRST = "backbone.transformer.resblocks.0."
BRIDGE = "backbone.region_level_bridge"
DECODER = "decode_head.decoder_1.layers."
MASK = golden_cat_seg.HEAD + "layers.0.swin_block.block_2.attn_mask"
# A tiny official state dict, what shapes do not tell, and the heads that each has besides others'.
SYSTEMS = {
    "zegclip": (tiny.zegclip_state_dict, tiny.zegclip_config(), "decoder_heads"),
    "clip_rc": (tiny.clip_rc_state_dict, tiny.zegclip_config(), "decoder_heads"),
    "zegformer": (tiny_zegformer.state_dict, {"num_heads": 4}, "clip_heads"),
    "cat_seg": (golden_cat_seg.tiny_weights, golden_cat_seg.TINY_SETTINGS, "clip_heads"),
}
DAMAGED = (
    ("zegclip", FIRST + "ln_1.weight", (65,), r"ln_1\.weight \[65\] instead of \[64\]"),
    ("zegclip", "backbone.conv1.weight", (64, 3, 16), "of 4 axes"),
    ("zegclip", "backbone.positional_embedding", (18, 64), "square grid, got 18 rows"),
    ("zegclip", DECODER + "1.norm3.bias", (31,), r"\[31\] instead of \[32\]"),
    ("zegclip", BRIDGE, (4, 64), r"got backbone\.region_level_bridge unknown"),
    ("clip_rc", BRIDGE, (5, 64), "square grid, got 5 rows"),
    ("clip_rc", BRIDGE, (0, 64), "square grid, got 0 rows"),
    ("clip_rc", BRIDGE, (4, 63), r"\[4, 63\] instead of \[4, 64\]"),
    ("clip_rc", "decode_head.lateral_proj.weight", (32, 64), r"\[32, 64\] instead of \[32, 96\]"),
    ("clip_rc", DECODER + "0.norm3.bias", (32,), r"norm3\.bias unknown"),
    (
        "zegformer",
        "backbone.res2.0.conv2.weight",
        (8, 8, 1, 1),
        r"1, 1\] instead of \[8, 8, 3, 3\]",
    ),
    ("zegformer", "backbone.stem.conv1.weight", (8, 3, 7), "of 4 axes"),
    ("zegformer", VISUAL + "positional_embedding", (18, 64), "square grid, got 18 rows"),
    ("zegformer", "backbone.fc.weight", (2, 2), r"backbone\.fc\.weight"),
    ("cat_seg", "backbone.stem.conv1.weight", (1, 1), "earlier generation"),
    ("cat_seg", VISUAL + "conv1.weight", (64, 3, 14, 14), "CAT-Seg B"),
    ("cat_seg", MASK, (4, 16, 16), "window"),
    ("cat_seg", "sem_seg_head.predictor.extra", (1,), "extra unknown"),
)


def build(name, weights, **settings):
    return from_official(name, weights, **(SYSTEMS[name][1] | settings))


every_system = pytest.mark.parametrize("name", SYSTEMS)


@every_system
def test_weights_load_again_and_are_copies(name):
    weights = {key: value.clone() for key, value in SYSTEMS[name][0]().items()}
    model = build(name, weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for value in weights.values():
        value.zero_()
    assert tiny.same(model.state_dict(), before)
    if name != "cat_seg":  # which names its parts otherwise
        assert tiny.same(build(name, before).state_dict(), before)


OPTIONAL = re.compile(
    r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode.*)|criterion.*|.*clip_model\.logit_scale"
)


@every_system
def test_a_missing_key_is_named(name):
    weights = SYSTEMS[name][0]()
    needed = [key for key in weights if not OPTIONAL.fullmatch(key)]
    assert len(needed) > 50
    for key in needed[::7]:
        with pytest.raises(CheckpointError, match=re.escape(key)):
            build(name, {k: v for k, v in weights.items() if k != key})


@pytest.mark.parametrize(("name", "key", "shape", "message"), DAMAGED)
def test_wrong_shapes_and_unknown_keys_are_named(name, key, shape, message):
    with pytest.raises(CheckpointError, match=message):
        build(name, SYSTEMS[name][0]() | {key: torch.zeros(shape)})


@every_system
def test_heads_must_divide_the_width(name):
    weights, _, others = SYSTEMS[name]
    for setting in ("num_heads", others, "text_heads"):
        for heads in (5, 0, -1):
            with pytest.raises(CheckpointError, match="_heads: expected a divisor"):
                build(name, weights(), **{setting: heads})


@every_system
def test_what_is_no_plain_state_dict_is_refused(name):
    weights = SYSTEMS[name][0]()
    arrays = {key: value.numpy() for key, value in weights.items()}
    halves = {key: value.half() for key, value in weights.items()}
    for content, *named in (
        ({},),
        ({"fc.weight": torch.zeros(3, 3)},),
        (SYSTEMS["zegclip" if name == "clip_rc" else "clip_rc"][0](),),
        (arrays,),
        ({"meta": {}, "state_dict": weights}, "load_checkpoint"),
        ({f"module.{key}": value for key, value in weights.items()}, "'module.'"),
        (halves, "float16", "normalize_state_dict"),
    ):
        with refused(CheckpointError, "state_dict", *named):
            build(name, content)
    plain = normalize_state_dict({f"module.{key}": value for key, value in halves.items()})
    assert tiny.same(plain, {key: value.float() for key, value in halves.items()})
    build(name, plain)


# --- one registry, and models that answer for themselves ---


def dense_clip(num_layers: int = 4, **settings: Any) -> Any:
    weights = tiny.clip_state_dict(tiny.TinySizes(num_layers=num_layers))
    heads = {"num_heads": 4, "text_heads": 4, "activation": "quick_gelu"}
    return from_official("dense_clip", weights, **heads, **settings)


TINY = {  # an image's size, and sizes that it alone refuses
    "zegclip": (partial(tiny.zegclip_model, seen_classes=()), (64, 80), ((64, 15),)),
    "clip_rc": (partial(tiny.clip_rc_model, seen_classes=()), (64, 80), ((8, 64),)),
    "cat_seg": (golden_cat_seg.tiny_model, (96, 96), ((96, 80),)),
    "tips": (
        partial(golden_tips.model_of, {"width": 32, "heads": 4}),
        (84, 126),
        ((100, 112), (112, 513), (7, 14)),
    ),
    "zeroseg": (zeroseg_model, (64, 80), ((8, 64),)),
    "naclip": (partial(dense_clip, head="naclip"), (64, 80), ((64, 8),)),
    "sfp l2": (partial(dense_clip, 12, head="sfp", pm="l2"), (96, 128), ((48, 48),)),
    "sfp lof": (partial(dense_clip, 12, head="sfp", pm="lof"), (96, 128), ((80, 96),)),
    "sc_clip": (partial(dense_clip, 12, head="sc_clip"), (96, 128), ((16, 16),)),
}
TEXT = tiny.text_embeds(7, 32)
every_tiny = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def tiny_models():
    return {name: build() for name, (build, *_) in TINY.items()}


OTHERS = {  # which have no tiny model of 32 dimensions that images alone are shown to
    "cosine_head": lambda: create_model("cosine_head", pretrained="demo", image_size=64),
    "zegformer": tiny_zegformer.model,
}


@pytest.mark.parametrize("protocol", ["whole", "slide"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_is_segmented_with(tiny_models, name, protocol):
    row = "naclip" if name == "dense_clip" else name
    model = tiny_models[row] if row in TINY else OTHERS[name]()
    if protocol == "slide" and model.windows is None:
        pytest.skip("takes whole pictures only")
    width = {"zegformer": 48, "cosine_head": 128}.get(name, 32)
    rows = {"text_embeds": tiny.text_embeds(3, width)}
    if model.region_templates:
        rows["region_embeds"] = tiny.text_embeds(3, width, "regions")
    config = model.config
    segmenter = TorchSegmenter(model, ["a, b", "c"], **rows, seen_names=["b"], protocol=protocol)
    labels = segmenter.segment(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    assert labels.shape == (64, 80)
    assert set(np.unique(labels)) <= {0, 1, 255}
    assert segmenter.describe()["architecture"] == name
    assert model.config is config  # the caller's model is untouched


def test_every_architecture_is_exported_and_all_but_training_free_ones_have_a_task():
    assert EXPORTERS.keys() == ARCHITECTURES.keys() == {*TASKS, "dense_clip", "tips"}
    assert not {"dense_clip", "tips"} & TASKS.keys()


def test_unknown_architectures_and_settings_are_named():
    with refused(CheckpointError, "architecture", *ARCHITECTURES):
        create_model("x")
    published = ", ".join(name for name, one in ARCHITECTURES.items() if one.from_official)
    with pytest.raises(CheckpointError, match=f"expected one of {published}, got 'zeroseg'"):
        from_official("zeroseg", {})
    with refused(ArgumentError, "pretrained"):
        create_model("zegclip", pretrained=None)
    with refused(ArgumentError, "windows"):  # of a model that takes whole images
        tiny_zegformer.model().slide(np.zeros((8, 8, 3), np.uint8), tiny.text_embeds(3, 48), None)
    for architecture in ("zegclip", "zegformer"):
        with refused(ArgumentError, "image_sise", "'image_size'"):
            create_model(architecture, image_sise=512)


# --- laws that every system keeps at every image and vocabulary ---


@every_tiny
def test_images_do_not_see_each_other_and_the_order_of_classes_changes_nothing(tiny_models, name):
    model, images = tiny_models[name], tiny.image(3, 3, *TINY[name][1])
    together = model.predict(images, TEXT)
    assert together.shape == (3, 7, *images.shape[2:])
    assert together.std() > 1e-3  # lively enough for the comparisons to mean something
    alone = torch.cat([model.predict(image[None], TEXT) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    order = torch.tensor([4, 1, 6, 0, 5, 2, 3])
    permuted = model.predict(images, TEXT[order])
    torch.testing.assert_close(permuted, together[:, order], rtol=1e-4, atol=1e-4)


@every_tiny
def test_wrong_images_and_text_embeddings_are_refused(tiny_models, name):
    _, (height, width), refuses = TINY[name]
    model, image = tiny_models[name], tiny.image(1, 3, height, width)
    for shape in ((7, 31), (0, 32), (32,), (1, 7, 32)):
        with refused(ShapeError, "text_embeds"):
            model.predict(image, torch.zeros(shape))
    shapes = [(3, height, width), (1, 4, height, width), (1, height, width, 3)]
    for shape in shapes + [(1, 3, *size_hw) for size_hw in refuses]:
        with refused(ShapeError, "image"):
            model.predict(torch.zeros(shape), TEXT)
    others = () if name == "zeroseg" else (image.half(), image.double(), image.numpy())
    for wrong in (image.to(torch.uint8), *others):  # ZeroSeg leaves the rest to torch
        with refused(DTypeError, "image"):
            model.predict(wrong, TEXT)
    for text in (TEXT.numpy(), torch.ones(7, 32, dtype=torch.int64)) if others else ():
        with refused(DTypeError, "text_embeds"):
            model.predict(image, text)


def test_nan_in_an_image_of_tips_is_refused(tiny_models):
    image = torch.rand(1, 3, 112, 112)
    image[0, 0, 3, 4] = float("nan")
    with refused(ArgumentError, "image", "NaN"):
        tiny_models["tips"](image, TEXT)


@pytest.mark.parametrize("head", ["maskclip", "sclip", "clearclip", "naclip"])
def test_an_image_tower_alone_gives_cosines(head):
    weights = tiny.clip_state_dict()
    tower = {k[7:]: value for k, value in weights.items() if k.startswith("visual.")}
    model = from_official("dense_clip", tower, head=head, num_heads=4)
    logits = model(tiny.image(1, 3, 96, 64), TEXT).mask_logits
    assert logits.shape == (1, 7, 6, 4)
    assert logits.abs().max() <= 1 + 1e-5
    assert dense_clip(head=head, logit_scale=40.0).logit_scale == 40.0
    del tower["ln_post.bias"]
    with refused(CheckpointError, "state_dict", "ln_post.bias"):
        from_official("dense_clip", tower, head=head, num_heads=4)
    with refused(ArgumentError, "pre"):  # a trunk with too few blocks
        dense_clip(6, head="sfp")


# --- checkpoint files and CLIP weights ---


def test_seen_classes_are_indices_of_any_kind_and_no_mask():
    def build(**settings):
        return from_official("zegclip", tiny.zegclip_state_dict(), num_heads=4, **settings)

    for seen in (np.array([0, 2]), torch.tensor([0, 2]), (0, np.int64(2))):
        assert build(seen_classes=seen).config.seen_classes == (0, 2)
    for seen in (None, 3, [0.7], ["a"], [True, False], np.ones(3, bool), torch.ones(3)):
        with refused(ArgumentError, "seen_classes"):
            build(seen_classes=seen)
    for size in (0, -3, (64, 64)):  # of masks: one side
        with refused(ArgumentError, "image_size"):
            build(image_size=size)


class Beside:
    """A class of a trainer's, which is not imported to read the weights."""


BESIDE = {
    "optimizer": Beside(),
    "args": Namespace(lr=1e-3, out=Path("runs"), device=torch.device("cpu"), kind=np.mean),
    "best": np.float64(0.5),
    "history": deque([1.0], maxlen=3),
    "per_class": defaultdict(list, road=[np.arange(3)]),
    "names": {"road", "car"},
    "sparse": torch.eye(2).to_sparse(),
    "model": "ViT-B-16",
}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("with_zip", [True, False])
def test_weights_are_read_from_whatever_a_trainer_saves(tmp_path, prefix, protocol, with_zip):
    state_dict = tiny.zegclip_state_dict()
    wrapped = OrderedDict((prefix + key, value) for key, value in state_dict.items())
    form = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": with_zip}
    torch.save(BESIDE | {"state_dict": wrapped}, tmp_path / "a.pth", **form)
    assert tiny.same(load_checkpoint(tmp_path / "a.pth"), state_dict)


SAVED = {
    "a pickled module": lambda model: model,
    "a module under a name, and none": lambda model: {"model": None, "ema": model.half().float()},
    "an average": AveragedModel,
    "an average's weights": lambda model: AveragedModel(model).state_dict(),
    "DeepSpeed's": lambda model: {"module": model.state_dict(), "optimizer": {"state": {}}},
    "holders in holders": lambda model: {"checkpoint": {"model": model.state_dict()}},
    "compiled inside": lambda model: {f"_orig_mod.{k}": v for k, v in model.state_dict().items()},
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_weights_are_found_where_trainers_put_them(tmp_path, saved):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    torch.save(saved(model), tmp_path / "a.pth")
    assert tiny.same(load_checkpoint(tmp_path / "a.pth"), model.state_dict())


def test_what_lies_beside_wrapped_weights_is_named(tmp_path, caplog):
    weights = {"model.a": torch.ones(1), "model.b": torch.ones(1), "loss.w": torch.ones(1)}
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").keys() == {"a", "b"}
    assert "loss.w" in caplog.text


def test_two_sets_of_weights_are_not_chosen_from(tmp_path):
    one = {"w": torch.ones(1)}
    torch.save({"student": one, "teacher": one}, tmp_path / "a.pth")
    with refused(CheckpointError, "a.pth", "student", "teacher"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world\n", b"\x80\x02]q\x00", b"PK\x03\x04" * 9])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: expected a checkpoint file"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3)])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with refused(CheckpointError, "a.pth"):
        load_checkpoint(tmp_path / "a.pth")
    torch.save(tiny.zegclip_state_dict(), tmp_path / "clip.pt")
    with refused(CheckpointError, "clip.pt"):
        load_clip(tmp_path / "clip.pt", activation="gelu")


@pytest.mark.parametrize("name", ["none.pth", "n" * 5000, "a\0b"], ids=["absent", "long", "zero"])
def test_absent_file_is_named(tmp_path, name):
    with refused(CheckpointError, "path"):
        load_checkpoint(tmp_path / name)


@pytest.fixture(scope="module")
def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 64, "layers": 3, "width": 128, "patch_size": 16},
        text_cfg={
            "context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2
        },
        quick_gelu=True,
    ).eval()  # fmt: skip
    assert open_clip.__version__
    return model


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["half archive", "state_dict", "safetensors"])
def test_towers_equal_open_clip(tmp_path, open_clip_model, form):
    image, tokens = tiny.image(2, 3, 64, 64), torch.randint(1, 60, (5, 16))
    tokens[torch.arange(5), torch.tensor([3, 15, 7, 9, 0])] = 63
    path, tolerance = tmp_path / "clip.pt", 1e-5
    if form == "half archive":
        model = copy.deepcopy(open_clip_model)
        for size in ("input_resolution", "vocab_size"):
            vars(model).pop(size, None)
            model.register_buffer(size, torch.tensor(64))
        torch.jit.trace(model, (image, tokens)).half().save(str(path))
        tolerance = 1e-2
    else:
        path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
        (save_file if form == "safetensors" else torch.save)(open_clip_model.state_dict(), path)
    weights = load_clip(path, activation="quick_gelu")
    cls_embed = build_image_encoder(weights)(image).cls_embed
    expected = open_clip_model.encode_image(image, normalize=True)
    torch.testing.assert_close(cls_embed, expected, rtol=0, atol=tolerance)
    text_embeds = build_text_encoder(weights)(tokens)
    torch.testing.assert_close(
        text_embeds, open_clip_model.encode_text(tokens), rtol=0, atol=10 * tolerance
    )


def test_tag_brings_weights_heads_and_activation(monkeypatch, open_clip_model):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: open_clip_model)
    weights = load_clip("openai")
    assert weights.settings[:3] == ("quick_gelu", 2, 1)
    assert build_image_encoder(weights).config.width == 128
