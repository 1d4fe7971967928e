"""Laws of the CLIP-RC model that hold for any weights and sizes, and what it refuses."""

import pytest
import torch

from support import tiny
from zsseg_rt.models import from_official
from zsseg_rt.models.descriptor.model import (
    attention_allowed,
)
from zsseg_rt.networks.descriptor import cells_of_patches

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
    model, lean = (build(content, **rates) for content in (weights, bare))
    assert model(image, text).recovery is None
    trained = model.train()(image, text)
    assert trained.recovery.queries.shape == trained.recovery.query_targets.shape == (1, 28, 64)
    assert trained.recovery.patches.shape == trained.recovery.patch_targets.shape == (1, 16, 32)
    without = lean.train()(image, text)
    assert without.recovery is None
    assert torch.equal(without.mask_logits, trained.mask_logits)


# ---------------------------------------------------------------- checkpoints


def build(state_dict, **config):
    return from_official("clip_rc", state_dict, **tiny.zegclip_config(), **config)


@torch.no_grad()
def test_checkpoints_of_the_jittor_port_load():
    state_dict = tiny.clip_rc_state_dict()
    lean = {k: v for k, v in state_dict.items() if ".self_attn." not in k and ".norm1." not in k}
    assert len(state_dict) - len(lean) == 48
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
    found, expected = (build(content)(image, text).mask_logits for content in (lean, state_dict))
    assert torch.equal(found, expected)


def test_recovery_decoder_and_text_encoder_may_be_absent():
    state_dict = tiny.clip_rc_state_dict()
    optional = ("decode_head.recovery_decoder.", "text_encoder.")
    lean = {key: value for key, value in state_dict.items() if not key.startswith(optional)}
    model = build(lean)
    assert model.decode_head.recovery_decoder is None
    assert model.text_encoder is None
