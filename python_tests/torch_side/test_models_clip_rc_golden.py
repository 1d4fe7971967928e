"""CLIP-RC against the official code's outputs: what it does not share with ZegCLIP."""

import numpy as np
import pytest
import torch

from support.golden import assert_close
from support.golden_descriptor import SmallCase, unread
from zsseg_rt.models import functional
from zsseg_rt.models.descriptor.clip_rc import attention_allowed

pytestmark = [pytest.mark.needs_shared, pytest.mark.usefixtures("without_gradients")]


@pytest.fixture(scope="module")
def small(shared_dir):
    return SmallCase(shared_dir, "clip_rc")


def test_small_cells(small):
    output, _ = small.output
    assert_close(output.cell_embeds, small.golden["rlb_feat"])
    assert output.recovery is None


def test_small_attention_mask(small):
    allowed = attention_allowed((4, 4), small.config["rlb"], small.config["ntok"])
    assert np.array_equal(allowed.numpy(), small.golden["attn_allowed"] != 0)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stage", ["q_proj", "lateral_proj"])
def test_small_projections(small, stage, side):
    assert_close(
        small.output[1]["decode_head." + stage][side == "out"], small.golden[f"{stage}_{side}"]
    )


@pytest.mark.parametrize("index", [0, 1, 2])
def test_small_decoder_layers(small, index):
    _, seen = small.output
    assert_close(seen[f"decode_head.decoder_q.layers.{index}"][1], small.golden[f"dec{index}_q"])
    assert_close(
        seen[f"decode_head.decoder_v.layers.{index}"][1], small.golden[f"dec{index}_lateral"]
    )


def test_small_masks_of_each_cell(small):
    _, seen = small.output
    queries = seen["decode_head.decoder_q.layers.2"][1]
    patches = seen["decode_head.decoder_v.layers.2"][1]
    raw = functional.patch_text_similarity(patches, queries, normalize=False)
    assert_close(raw.unflatten(2, (4, 4)), small.golden["attn_raw"])


@pytest.mark.parametrize("which", ["train_inductive", "train_selftrain"])
def test_small_training_masks_recovery_and_gradients(small, which):
    model = small.build(prompt_dropout=0.0, decoder_dropout=0.0).train()
    text = small.text[small.config["seen"]] if which == "train_inductive" else small.text
    with torch.enable_grad():
        output = model(torch.from_numpy(small.golden["train_image"]), text)
        recovery = output.recovery
        query_loss = (recovery.queries - recovery.query_targets).abs().mean()
        patch_loss = (recovery.patches - recovery.patch_targets).abs().mean()
        masks = model.upsample(output.mask_logits)
        (masks.square().sum() + query_loss + patch_loss).backward()
    assert_close(masks.detach(), small.golden[f"{which}/pred_masks"])
    assert_close(recovery.queries.detach(), small.golden[f"{which}/q"])
    assert_close(recovery.patches.detach(), small.golden[f"{which}/lateral"])
    assert_close(recovery.query_targets, small.golden[f"{which}/ori_q"])
    assert_close(recovery.patch_targets, small.golden[f"{which}/ori_lateral"])
    weight = small.config["rec_w"]
    official = [small.golden[f"{which}/decode.recovery_loss_{side}"] for side in "qk"]
    found = [weight * float(query_loss.detach()), weight * float(patch_loss.detach())]
    np.testing.assert_allclose(found, official, rtol=1e-5)
    without = {name for name, tensor in model.trainable_parameters() if tensor.grad is None}
    assert without == {key for key in small.golden[f"{which}/no_grad_keys"] if not unread(key)}
