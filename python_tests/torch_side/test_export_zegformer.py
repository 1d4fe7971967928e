"""ZegFormer's exported graphs and kernels against the official code."""

import json

import numpy as np
import pytest
import torch

from support import tiny_zegformer
from support.graph_runs import run_file
from zsseg_rt import ops
from zsseg_rt.export import export_graphs
from zsseg_rt.export.architectures.zegformer import network_of
from zsseg_rt.models import from_official
from zsseg_rt.networks.zegformer import REGION_MEAN, REGION_STD
from zsseg_rt.ops.reference import score_maps
from zsseg_rt.runtime.families.proposals import class_probabilities, fuse

TOLERANCE = 1e-4  # features, masks and score maps, as the reference's notes recommend
CLIP_TOLERANCE = 1e-3  # a pixel at the mask's edge may flip


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()) <= tolerance


def run(folder, name, **feeds):
    return run_file(folder / f"{name}.float32.onnx", feeds)


@pytest.mark.needs_shared
@torch.no_grad()
def test_the_official_picture_through_graphs_and_kernels(shared_dir, tmp_path):
    golden = np.load(shared_dir / "golden" / "zegformer_public.npz", allow_pickle=False)
    config = json.loads(str(golden["config_json"]))
    weights = {
        key.removeprefix("sd/"): torch.from_numpy(golden[key])
        for key in golden.files
        if key.startswith("sd/")
    }
    key = tiny_zegformer.CLIP + "token_embedding.weight"
    weights[key] = tiny_zegformer.rule_tensor(key, tuple(config["clip"][6:8]))
    seen_classes = config["seen_indexes"]
    model = from_official(
        "zegformer", weights, num_heads=config["heads"], seen_classes=seen_classes
    )
    padded = golden["mid/padded_input"]
    network = network_of(model)
    export_graphs(model, tmp_path, size_hw=padded.shape[2:], precisions=("float32",))

    found = run(tmp_path, "image_encoder", image=padded)
    masks = found["region_masks"][0]
    assert_close(masks[None], golden["mid/pred_masks"])
    text, region_text = (
        np.ascontiguousarray(golden[f"text/text_features_test{branch}"]) for branch in ("", "_clip")
    )
    logits = ops.patch_text_similarity(
        found["segment_embeds"], text, logit_scale=100.0, normalize=False
    )[0]
    expected = golden["mid/pred_logits"][0].T
    assert_close(logits, expected[:-1])
    assert_close(found["no_object"][0], expected[-1])

    boxes = ops.mask_boxes(masks, padded.shape[2:])
    np.testing.assert_array_equal(boxes[:, :4], golden["mid/boxes"])
    picture = [torch.from_numpy(golden["image0"])]
    planes = model.prepare(picture, REGION_MEAN, REGION_STD)[0].numpy()
    regions = np.arange(len(masks), dtype=np.int32)
    corners = np.ascontiguousarray(boxes[:, :4])
    for style in ("crop", "mask", "cropmask"):
        crops = ops.crop_regions(
            planes, masks, regions, corners, side=network.region_side, style=style
        )
        assert_close(crops[..., ::14, ::14], golden[f"mid/clip_in_{style}_sub14"][0])
    embeds = run(tmp_path, "region_encoder", crops=crops)["region_embeds"]
    region_logits = 100.0 * region_text @ embeds.T
    assert_close(region_logits, golden["mid/clip_logits"][0].T[:-1], CLIP_TOLERANCE)

    by_text, _ = class_probabilities(logits, found["no_object"][0])
    by_region, _ = class_probabilities(region_logits, found["no_object"][0])
    seen = np.isin(np.arange(len(text)), seen_classes)
    scores = fuse(by_text, by_region, "seen_and_unseen", seen)
    assert_close(scores, golden["mid/fused_cls"][0].T)
    maps = score_maps(masks, scores, padded.shape[2:], padded.shape[2:])
    semseg = golden["mid/semseg_padded_sub4"]
    assert_close(maps[:, ::4, ::4], semseg.reshape(semseg.shape[-3:]))
    labels, values = ops.label_regions(
        masks, scores, canvas_hw=padded.shape[2:], out_hw=padded.shape[2:], with_scores=True
    )
    assert_close(values, np.minimum(maps.max(axis=0), 1.0))
    assert (labels == maps.argmax(axis=0)).mean() > 0.999
