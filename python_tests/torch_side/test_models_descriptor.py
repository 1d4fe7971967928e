"""ZegCLIP and CLIP-RC: laws for any weights and sizes, what they refuse, the official outputs."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import tiny
from support.descriptor_models import run_parts
from support.errors import refused
from support.golden import (
    MIN_AGREEMENT,
    REAL_TOLERANCE,
    arguments_of,
    assert_close,
    config_of,
    load,
    state_dict_of,
)
from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.export import export_graphs
from zsseg_rt.models import create_model, from_official, slide_predict
from zsseg_rt.models.base import prepare_image, slide_scores
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.clip.weights import build_text_encoder
from zsseg_rt.networks.descriptor import cells_of_patches
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower

pytestmark = pytest.mark.usefixtures("without_gradients")


IMAGE, TEXT = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)


def overlapping(clip_file, stride, size=64):
    return create_model(
        "zegclip", pretrained=clip_file, activation="quick_gelu", num_heads=4, text_heads=4,
        image_size=size, patch_stride=stride, num_prompts=2,
    )  # fmt: skip


@pytest.mark.parametrize("stride", [8, 4])
def test_overlapping_patches_make_a_finer_grid(clip_file, stride):
    model, side = overlapping(clip_file, stride), 64 // stride
    image, text = IMAGE, TEXT
    output = model(image, text)
    assert model.size_hw == (64, 64)
    assert output.mask_logits.shape == (1, 7, side, side)
    torch.testing.assert_close(run_parts(model, image, text), output.mask_logits, rtol=0, atol=1e-5)
    # A patch sees 16 pixels around the middle of its cell; outside of the image are zeros.
    encoder = model.backbone
    rim = (16 - stride) // 2
    padded = torch.nn.functional.pad(image, (rim,) * 4)
    row, column = 1, side - 1
    window = padded[0, :, row * stride :, column * stride :][:, :16, :16]
    token = (encoder.conv1.weight * window).sum((1, 2, 3))
    place = 1 + row * side + column
    rest = encoder.input_tokens(image)[0, place] - encoder.patch_positions((side, side))[place - 1]
    torch.testing.assert_close(rest, token, rtol=0, atol=1e-5)


def test_impossible_strides_are_refused(clip_file):
    for stride in (3, 0, 32):
        with pytest.raises(ShapeError, match=f"one of 2, 4, 8, 16 for .* 16 pixels, got {stride}"):
            overlapping(clip_file, stride)


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.1])
@pytest.mark.parametrize("decoder_dropout", [0.0, 0.1])
def test_dropout_acts_in_training_only(prompt_dropout, decoder_dropout):
    rates = {"prompt_dropout": prompt_dropout, "decoder_dropout": decoder_dropout}
    model = tiny.zegclip_model(**rates)
    image, text = tiny.image(2, 3, 64, 64), tiny.text_embeds(7, 32)
    expected = model(image, text)
    assert torch.equal(model(image, text).mask_logits, expected.mask_logits)
    trained = model.train()(image, text)
    features_equal = torch.equal(trained.patch_embeds, expected.patch_embeds)
    assert features_equal == (prompt_dropout == 0)
    assert torch.equal(trained.mask_logits, expected.mask_logits) == (not any(rates.values()))


def slide(rgb, **windows):
    return lambda: slide_predict(tiny.zegclip_model(), rgb, TEXT, **windows)


def read(tokens):
    return lambda: tiny.zegclip_model().text_encoder(tokens)


REFUSED = [
    *((ShapeError, "seen_classes",
       lambda seen=seen: tiny.zegclip_model(seen_classes=(seen,)).predict(IMAGE, TEXT))
      for seen in (7, -1)),
    (ShapeError, "tokens", read(torch.zeros(2, 15, dtype=torch.int64))),
    (DTypeError, "tokens", read(torch.zeros(2, 16))),
    (ShapeError, "rgb", slide(np.zeros((4, 4), np.uint8))),
    (ShapeError, "rgb", slide(np.zeros((0, 4, 3), np.uint8))),
    (DTypeError, "rgb", slide(np.zeros((4, 4, 3), np.float32))),
    (DTypeError, "rgb", slide(torch.zeros(4, 4, 3))),
    (ShapeError, "stride", slide(np.zeros((8, 8, 3), np.uint8), crop_size=64, stride=65)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "argument", "call"), REFUSED)
def test_what_does_not_fit_is_refused(error, argument, call):
    with refused(error, argument):
        call()


def cell_of_patches(grid_hw, num_cells, **official):
    return torch.from_numpy(cells_of_patches(grid_hw, num_cells, **official))


@pytest.mark.parametrize("grid_hw", [(32, 32), (4, 4), (8, 24), (5, 7), (1, 4), (2, 2)])
@pytest.mark.parametrize("num_cells", [1, 4, 16])
def test_cells_cut_the_grid_evenly(grid_hw, num_cells):
    cells = cell_of_patches(grid_hw, num_cells).reshape(grid_hw)
    side = int(num_cells**0.5)
    assert cells.min() == 0
    rows, columns = cells // side, cells % side
    assert (rows == rows[:, :1]).all()
    assert (columns == columns[:1]).all()
    for line, size in ((rows[:, 0], grid_hw[0]), (columns[0], grid_hw[1])):
        assert (line.diff() >= 0).all()
        sizes = torch.bincount(line, minlength=side)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.sum() == size


def test_recovery_is_for_training_only_and_changes_no_mask():
    image, text = IMAGE, TEXT
    rates = {"prompt_dropout": 0.0, "decoder_dropout": 0.0}
    weights = tiny.clip_rc_state_dict()
    bare = {k: v for k, v in weights.items() if not k.startswith("decode_head.recovery_decoder.")}
    model, lean = (clip_rc(content, **rates) for content in (weights, bare))
    assert model(image, text).recovery is None
    trained = model.train()(image, text)
    assert trained.recovery.queries.shape == trained.recovery.query_targets.shape == (1, 28, 64)
    assert trained.recovery.patches.shape == trained.recovery.patch_targets.shape == (1, 16, 32)
    without = lean.train()(image, text)
    assert without.recovery is None
    assert torch.equal(without.mask_logits, trained.mask_logits)


def clip_rc(state_dict, **config):
    return from_official("clip_rc", state_dict, **tiny.zegclip_config(), **config)


@pytest.mark.parametrize(
    ("architecture", "weights", "unread"),
    [("zegclip", tiny.zegclip_state_dict, 19), ("clip_rc", tiny.clip_rc_state_dict, 48)],
)
def test_unread_keys_may_be_absent_as_in_the_jittor_port(architecture, weights, unread):
    whole = weights()
    names = (".self_attn.", ".norm1.", "empty_weight")
    lean = {k: v for k, v in whole.items() if not any(name in k for name in names)}
    assert len(whole) - len(lean) == unread
    image, text = IMAGE, TEXT
    scores, expected = (
        from_official(architecture, content, **tiny.zegclip_config())(image, text).mask_logits
        for content in (lean, whole)
    )
    assert torch.equal(scores, expected)
    optional = ("decode_head.recovery_decoder.", "text_encoder.")
    less = {key: value for key, value in lean.items() if not key.startswith(optional)}
    assert from_official(architecture, less, **tiny.zegclip_config()).text_encoder is None


# --- against their official codes' outputs, by torch, NumPy and OpenVINO ---


# What the two systems' files are called, and what the vectors' models are built without.
FILES = {"zegclip": "zegclip", "clip_rc": "cliprc"}
_SKIPPED = {
    "zegclip": ("text_encoder.",),
    "clip_rc": ("text_encoder.", "decode_head.recovery_decoder."),
}


class SmallCase:
    def __init__(self, shared_dir: Path, architecture: str) -> None:
        self.architecture = architecture
        self.golden = load(shared_dir, f"{FILES[architecture]}_small_public.npz")
        self.config = config_of(self.golden)
        self.state_dict = state_dict_of(self.golden)
        self.model = self.build()
        self.image = torch.from_numpy(self.golden["image"])
        self.text = torch.from_numpy(self.golden["text_embeddings"])

    def build(self, **settings: Any) -> Any:
        arguments = arguments_of(self.config) | settings
        return from_official(self.architecture, self.state_dict, **arguments)


class RealCase:
    """Vectors at the official size, and the model of their rule."""

    def __init__(self, shared_dir: Path, architecture: str, dataset: str) -> None:
        self.golden = load(shared_dir, f"{FILES[architecture]}_real_{dataset}_public.npz")
        config = config_of(self.golden)
        shapes = official_layouts(shared_dir, architecture)[config["config"]]["shapes"]
        skipped = _SKIPPED[architecture]
        shapes = {key: size for key, size in shapes.items() if not key.startswith(skipped)}
        state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
        self.model = from_official(architecture, state_dict, seen_classes=config["seen"])
        num_classes = self.golden["low_logits"].shape[1]
        self.text: Tensor = tiny.text_embeds(num_classes, 512, config["salt"])
        self.image: Tensor = tiny.image(1, 3, 512, 512, salt=config["salt"])


def official_layouts(shared_dir: Path, architecture: str) -> dict[str, Any]:
    path = shared_dir / "specs" / f"statedict_{FILES[architecture]}.json"
    return json.loads(path.read_text())


def unread(key: str) -> bool:
    """Whether it names a tensor of official checkpoints that no forward pass reads."""
    return "self_attn." in key or "norm1." in key


ARCHITECTURES = ("zegclip", "clip_rc")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request, shared_dir):
    return SmallCase(shared_dir, request.param)


def test_small_scores(small):
    output = small.model(small.image, small.text)
    assert_close(output.mask_logits, small.golden["low_logits"])
    assert_close(output.patch_embeds, small.golden["patch_feat"])
    assert_close(output.cls_embed, small.golden["cls_feat"])
    if small.architecture == "clip_rc":
        assert_close(output.cell_embeds, small.golden["rlb_feat"])
    scores = small.model.predict(small.image, small.text)
    assert_close(small.model.upsample(output.mask_logits), small.golden["mask_logits_up"])
    assert_close(scores, small.golden["pred"])
    assert np.mean(scores.argmax(1).numpy() == small.golden["pred_argmax"]) >= MIN_AGREEMENT
    trained = small.build(self_trained=True).predict(small.image, small.text)
    assert_close(trained, small.golden["pred_self_training"])
    if "alt_image" in small.golden.files:  # another size
        image = torch.from_numpy(small.golden["alt_image"])
        low_logits = small.model(image, small.text).mask_logits
        assert_close(low_logits.flatten(2), small.golden["alt_low_attn"])
        assert_close(small.model.upsample(low_logits), small.golden["alt_mask_logits_up"])
        assert_close(small.model.predict(image, small.text), small.golden["alt_pred"])


def test_small_whole_image(small):
    golden, model, text = small.golden, small.model, small.text
    rgb, crop, stride = golden["raw_rgb"], small.config["crop"], small.config["stride"]
    image = prepare_image(rgb, short_side=crop, mean=model.image_mean, std=model.image_std)
    assert_close(image, golden["pipe_image"])
    averaged = slide_scores(
        lambda window: model.predict(window, text), image, crop_size=crop, stride=stride
    )
    assert_close(averaged, golden["slide_raw"])
    sizes = {"short_side": crop, "crop_size": crop, "stride": stride}
    rescaled = slide_predict(model, rgb, text, **sizes, softmax=False)
    assert_close(rescaled[None], golden["slide_rescaled"])
    probabilities = slide_predict(model, rgb, text, **sizes)
    assert_close(probabilities[None], golden["slide_softmax"])
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


def test_small_text_encoder(small):
    embeds = small.model.text_encoder(torch.from_numpy(small.golden["text_tokens"]))
    assert_close(embeds, small.golden["text_encoder_out"])
    if "text_encoder_out_normed" in small.golden.files:
        mean = average_templates(embeds[:, None])
        assert_close(mean, small.golden["text_encoder_out_normed"])


@pytest.mark.parametrize("computed", ["numpy", "openvino"])
def test_small_network(small, computed, tmp_path):
    graphs = None
    if computed == "openvino":
        written = export_graphs(small.model, tmp_path, precisions=("float32",))
        graphs = {name: tmp_path / files["float32"].file for name, files in written.items()}
    logits = run_parts(small.model, small.image, small.text.float(), graphs)
    assert_close(logits, small.golden["low_logits"])


def real_cases(*datasets):
    return [(architecture, one) for architecture in ARCHITECTURES for one in datasets]


@pytest.fixture(scope="module", params=real_cases("voc", "coco"), ids="-".join)
def real(request, shared_dir):
    return real_case(shared_dir, *request.param)


real_case = functools.lru_cache(maxsize=1)(RealCase)


@pytest.mark.nightly
def test_real_scores(real):
    """The small vectors hold the arithmetic in every run."""
    outputs = []
    handle = real.model.register_forward_hook(lambda *call: outputs.append(call[2]))
    scores = real.model.predict(real.image, real.text)
    handle.remove()
    golden, (output,) = real.golden, outputs
    folded = run_parts(real.model, real.image, real.text)
    for logits in (output.mask_logits, folded):
        assert np.abs(logits.numpy() - golden["low_logits"]).max() <= REAL_TOLERANCE
    assert_close(output.cls_embed, golden["cls_feat"])
    if "rlb_feat" in golden.files:  # CLIP-RC's
        assert_close(output.cell_embeds, golden["rlb_feat"])
    if "patch_feat" in golden.files:
        assert_close(output.patch_embeds, golden["patch_feat"])
    assert_close(scores[:, :, ::8, ::8], golden["pred_sub8"], REAL_TOLERANCE)
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT


@pytest.mark.nightly
@pytest.mark.parametrize("real", real_cases("voc"), indirect=True, ids="-".join)
def test_real_whole_image(real):
    golden = real.golden
    rgb = golden["raw_rgb"]
    image = prepare_image(rgb, short_side=512, mean=real.model.image_mean, std=real.model.image_std)
    assert tuple(image.shape) == tuple(golden["pipe_shape"])
    assert_close(image[:, :, ::8, ::8], golden["pipe_sub8"])
    probabilities = slide_predict(real.model, rgb, real.text)
    assert_close(probabilities[None, :, ::5, ::5], golden["slide_softmax_sub5"], REAL_TOLERANCE)
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_official_layout_loads(shared_dir, architecture):
    layouts = official_layouts(shared_dir, architecture)
    assert len(layouts) == {"zegclip": 7, "clip_rc": 6}[architecture]
    for entry in layouts.values():
        with torch.device("meta"):
            state_dict = {key: torch.empty(size) for key, size in entry["shapes"].items()}
        model = from_official(architecture, state_dict)
        assert model.architecture == architecture
        assert model.config.image_size == 512
        if architecture == "clip_rc":
            assert model.config.image_encoder.num_cells == 16
        never_read = sum(
            int(np.prod(size))
            for key, size in entry["shapes"].items()
            if key.startswith("decode_head.") and unread(key)
        )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == entry["params"]["trainable"] - never_read


@pytest.mark.nightly
def test_real_text_encoder_and_tokens(shared_dir):
    golden, tokens = (
        load(shared_dir, name) for name in ("zegclip_text_real_public.npz", "zs_tokens_public.npz")
    )
    shapes = next(iter(official_layouts(shared_dir, "zegclip").values()))["shapes"]
    prefix = "text_encoder."
    weights: dict[str, Tensor] = {
        key.removeprefix(prefix): tiny.rule_tensor(key, size, str(golden["salt"]))
        for key, size in shapes.items()
        if key.startswith(prefix)
    }
    encoder = build_text_encoder(ClipTensors(visual=Tower({}), text=Tower(weights)))
    voc = encoder(torch.from_numpy(tokens["voc_single"].astype(np.int64)))
    assert_close(voc, golden["voc_single_raw"])
    assert_close(average_templates(voc[:, None]), golden["voc_single_normed"])
    multi = encoder(torch.from_numpy(tokens["coco_multi"][7].astype(np.int64)))
    assert_close(average_templates(multi), golden["coco_class7_multi"])
