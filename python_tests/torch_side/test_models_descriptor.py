"""Laws of ZegCLIP and CLIP-RC that hold for any weights and sizes, and what they refuse."""

import numpy as np
import pytest
import torch

from support import tiny
from support.descriptor_models import run_parts
from support.errors import refused
from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.models import create_model, from_official, slide_predict
from zsseg_rt.models.descriptor.model import attention_allowed
from zsseg_rt.networks.descriptor import cells_of_patches


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny.clip_state_dict(), path)
    return path


def overlapping(clip_file, stride, size=64):
    return create_model(
        "zegclip", pretrained=clip_file, activation="quick_gelu", num_heads=4, text_heads=4,
        image_size=size, patch_stride=stride, num_prompts=2,
    )  # fmt: skip


@pytest.mark.parametrize("stride", [8, 4])
@torch.no_grad()
def test_overlapping_patches_make_a_finer_grid(clip_file, stride):
    model, side = overlapping(clip_file, stride), 64 // stride
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
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
    found = encoder.input_tokens(image)[0, place] - encoder.patch_positions((side, side))[place - 1]
    torch.testing.assert_close(found, token, rtol=0, atol=1e-5)


def test_impossible_strides_are_refused(clip_file):
    for stride in (3, 0, 32):
        with pytest.raises(ShapeError, match=f"one of 2, 4, 8, 16 for .* 16 pixels, got {stride}"):
            overlapping(clip_file, stride)


@torch.no_grad()
def test_blocks_without_prompts_of_their_own_run_without():
    sizes = tiny.TinySizes()
    state_dict = tiny.zegclip_state_dict(sizes)
    key = "backbone.deep_prompt_embeddings"
    short = tiny.from_official(
        "zegclip", state_dict | {key: state_dict[key][:1]}, **tiny.zegclip_config()
    )
    lengths = []
    for block in short.backbone.transformer.resblocks:
        block.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
    logits = short(image, text).mask_logits
    assert lengths == [20, 20, 17, 17]
    torch.testing.assert_close(run_parts(short, image, text), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seen", [(7,), (-1,)])
def test_seen_classes_outside_the_vocabulary_are_refused(seen):
    model = tiny.zegclip_model(seen_classes=seen)
    with refused(ShapeError, "seen_classes"):
        model.predict(tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32))


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.1])
@pytest.mark.parametrize("decoder_dropout", [0.0, 0.1])
@torch.no_grad()
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


def test_half_precision_text_embeddings_are_promoted():
    model, image, text = tiny.zegclip_model(), tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
    assert torch.equal(model(image, text.half()).mask_logits, model(image, text).mask_logits)


@pytest.mark.parametrize(
    ("tokens", "error", "argument"),
    [
        (torch.zeros(2, 15, dtype=torch.int64), ShapeError, "tokens"),
        (torch.zeros(2, 16), DTypeError, "tokens"),
    ],
)
def test_wrong_tokens_are_refused(tokens, error, argument):
    with refused(error, argument):
        tiny.zegclip_model().text_encoder(tokens)


# ---------------------------------------------------------------- sliding windows


@pytest.mark.parametrize(
    ("rgb", "error", "message"),
    [
        (np.zeros((4, 4), np.uint8), ShapeError, r"rgb: expected \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ShapeError, r"rgb: expected \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), DTypeError, "rgb: expected uint8, got float32"),
        (torch.zeros(4, 4, 3), DTypeError, r"rgb: expected a NumPy array, got torch\.Tensor"),
    ],
)
def test_wrong_pictures_are_refused(rgb, error, message):
    with pytest.raises(error, match=message):
        slide_predict(tiny.zegclip_model(), rgb, tiny.text_embeds(7, 32))


def test_windows_with_gaps_are_refused():
    rgb = np.zeros((8, 8, 3), np.uint8)
    with refused(ShapeError, "stride"):
        slide_predict(tiny.zegclip_model(), rgb, tiny.text_embeds(7, 32), crop_size=64, stride=65)


# ---------------------------------------------------------------- cells


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


@pytest.mark.parametrize(
    ("grid_hw", "num_cells", "stride"), [((6, 6), 16, 1), ((5, 5), 4, 2), ((4, 4), 4, 2)]
)
def test_official_cells_are_of_one_size(grid_hw, num_cells, stride):
    """``stride = grid // r``; patches behind the last cell lie in none."""
    cells = cell_of_patches(grid_hw, num_cells, official=True).reshape(grid_hw)
    side = int(num_cells**0.5)
    expected = torch.full(grid_hw, num_cells)
    for index in range(num_cells):
        top, left = (stride * part for part in divmod(index, side))
        expected[top : top + stride, left : left + stride] = index
    assert torch.equal(cells, expected)


@pytest.mark.parametrize(
    ("grid_hw", "num_cells", "num_prompts"), [((6, 4), 4, 3), ((5, 7), 9, 0), ((2, 9), 16, 1)]
)
def test_who_sees_whom(grid_hw, num_cells, num_prompts):
    allowed = attention_allowed(grid_hw, num_cells, num_prompts)
    patches = grid_hw[0] * grid_hw[1]
    first, cells = 1 + num_prompts, slice(1 + num_prompts + patches, None)
    assert torch.equal(allowed, allowed.T)
    assert allowed[: first + patches, : first + patches].all()
    assert not allowed[:first, cells].any()
    assert (allowed[first : first + patches, cells].sum(dim=1) == 1).all()
    assert torch.equal(allowed[cells, cells], torch.eye(num_cells, dtype=torch.bool))


# ---------------------------------------------------------------- the model and its parts


@torch.no_grad()
def test_recovery_is_for_training_only_and_changes_no_mask():
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
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


# ---------------------------------------------------------------- checkpoints


def clip_rc(state_dict, **config):
    return from_official("clip_rc", state_dict, **tiny.zegclip_config(), **config)


@pytest.mark.parametrize(
    ("architecture", "weights", "unread"),
    [("zegclip", tiny.zegclip_state_dict, 19), ("clip_rc", tiny.clip_rc_state_dict, 48)],
)
@torch.no_grad()
def test_unread_keys_may_be_absent_as_in_the_jittor_port(architecture, weights, unread):
    whole = weights()
    names = (".self_attn.", ".norm1.", "empty_weight")
    lean = {k: v for k, v in whole.items() if not any(name in k for name in names)}
    assert len(whole) - len(lean) == unread
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
    found, expected = (
        from_official(architecture, content, **tiny.zegclip_config())(image, text).mask_logits
        for content in (lean, whole)
    )
    assert torch.equal(found, expected)


def test_recovery_decoder_and_text_encoder_may_be_absent():
    state_dict = tiny.clip_rc_state_dict()
    optional = ("decode_head.recovery_decoder.", "text_encoder.")
    lean = {key: value for key, value in state_dict.items() if not key.startswith(optional)}
    model = clip_rc(lean)
    assert model.decode_head.recovery_decoder is None
    assert model.text_encoder is None
