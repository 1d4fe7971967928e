"""ZegFormer against the official code's outputs."""

import ast

import numpy as np
import pytest
import torch
from torch import Tensor

from support import golden, tiny_zegformer
from support.golden import load
from support.graph_runs import run_file
from support.tiny_zegformer import class_prompts
from zsseg_rt import ops
from zsseg_rt.export import export_graphs
from zsseg_rt.models import from_official
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.zegformer.decoder import Segments, crop_regions
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD, REGION_MEAN, REGION_STD
from zsseg_rt.torch_files.official import REGION_TEMPLATES, SINGLE_TEMPLATE

pytestmark = pytest.mark.usefixtures("without_gradients")

TOLERANCE = 1e-4  # features, masks and score maps, as the reference's notes recommend
CLIP_TOLERANCE = 1e-3  # a pixel at the mask's edge may flip
VARIANTS = {
    "ens_cropmask": {},
    "ens_mask": {"region_style": "mask"},
    "ens_crop": {"region_style": "crop"},
    "ens_all_cls": {"fusion": "all_classes"},
    "clip_only": {"ensemble": False},
    "seg_only": {"fusion": "segments"},
    "ens_cropmask_nocal": {"calibration": -1.0},
}


def assert_close(actual, expected, tolerance=TOLERANCE):
    golden.assert_close(actual, expected, tolerance)


def tensor(golden, key: str) -> Tensor:
    return torch.from_numpy(golden[key])


@pytest.fixture(scope="module")
def small(shared_dir):
    return load(shared_dir, "zegformer_public.npz")


@pytest.fixture(scope="module")
def small_config(small):
    return golden.config_of(small)


@pytest.fixture(scope="module")
def small_state_dict(small, small_config):
    vocabulary, width = small_config["clip"][6:8]
    key = tiny_zegformer.CLIP + "token_embedding.weight"
    return golden.state_dict_of(small) | {key: tiny_zegformer.rule_tensor(key, (vocabulary, width))}


@pytest.fixture(scope="module")
def build(small_config, small_state_dict):
    def build(**settings) -> ZegFormer:
        arguments = {
            "num_heads": small_config["heads"],
            "seen_classes": small_config["seen_indexes"],
            "calibration": small_config["gz"],
        }
        return from_official("zegformer", small_state_dict, **arguments | settings)

    return build


@pytest.fixture(scope="module")
def small_model(build):
    return build()


@pytest.fixture(scope="module")
def small_inputs(small, small_config):
    return (
        [tensor(small, "image0")],
        tensor(small, "text/text_features_test"),
        tensor(small, "text/text_features_test_clip"),
        small_config["outs"],
    )


def boxes_of(masks, size_hw) -> Tensor:
    return torch.from_numpy(ops.mask_boxes(masks.numpy(), size_hw)[:, :4].astype(np.int64))


@pytest.mark.parametrize("style", ["cropmask", "mask", "crop"])
def test_small_regions(small, small_model, small_inputs, style):
    plane = small_model.prepare(small_inputs[0], REGION_MEAN, REGION_STD)[0]
    crops = crop_regions(plane, tensor(small, "mid/pred_masks")[0], style=style, side=224)
    assert_close(crops[None, :, :, ::14, ::14], small[f"mid/clip_in_{style}_sub14"])
    if style == "cropmask":
        assert_close(crops.mean(dim=(2, 3))[None], small["mid/clip_in_cropmask_mean"])
    embeds = small_model.clip_model.visual.encode_image(crops)
    assert_close(embeds[None], small[f"mid/clip_feat_{style}"], CLIP_TOLERANCE)


def test_small_outputs(small, small_model, small_inputs):
    output = small_model(*small_inputs)
    assert_close(output.pred_logits, small["mid/pred_logits"])
    assert_close(output.pred_masks, small["mid/pred_masks"])
    assert_close(output.clip_logits, small["mid/clip_logits"], CLIP_TOLERANCE)
    assert_close(output.class_scores, small["mid/fused_cls"])
    boxes = boxes_of(tensor(small, "mid/pred_masks")[0], (96, 128))
    assert_close(boxes, small["mid/boxes"], 0)


def test_small_graphs_and_kernels(small, small_model, small_inputs, tmp_path):
    padded, regions = small["mid/padded_input"], np.arange(8, dtype=np.int32)
    files = export_graphs(small_model, tmp_path, size_hw=padded.shape[2:], precisions=("float32",))
    paths = {name: tmp_path / kinds["float32"].file for name, kinds in files.items()}
    outputs = run_file(paths["image_encoder"], {"image": padded})
    masks = outputs["region_masks"][0]
    assert_close(outputs["region_masks"], small["mid/pred_masks"])
    logits = 100 * outputs["segment_embeds"] @ small["text/text_features_test"].T
    logits = np.dstack([logits, outputs["no_object"][..., None]])
    assert_close(logits, small["mid/pred_logits"])
    boxes = ops.mask_boxes(masks, padded.shape[2:])
    planes = small_model.prepare(small_inputs[0], REGION_MEAN, REGION_STD)[0].numpy()
    crops = ops.crop_regions(planes, masks, regions, boxes[:, :4].copy(), side=224)
    assert_close(crops[None, :, :, ::14, ::14], small["mid/clip_in_cropmask_sub14"])
    embeds = run_file(paths["region_encoder"], {"crops": crops})["region_embeds"]
    clip = 100 * embeds @ small["text/text_features_test_clip"].T
    assert_close(clip, small["mid/clip_logits"][0, :, :-1], CLIP_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_score_maps(small, build, small_inputs, variant):
    (scores,) = build(**VARIANTS[variant])(*small_inputs).sem_seg
    step = 1 if variant == "ens_cropmask" else 4
    assert_close(scores[:, ::step, ::step], small[f"sem_seg/{variant}/0"])


def test_small_crafted_masks(small, small_model, small_inputs):
    image, masks = tensor(small, "crafted/image"), tensor(small, "crafted/pred_masks")
    segments = Segments(tensor(small, "crafted/pred_logits"), masks)
    planes = small_model.prepare([image], REGION_MEAN, REGION_STD)
    padded_hw = (planes.shape[2], planes.shape[3])
    assert_close(boxes_of(masks[0], padded_hw), small["crafted/boxes"], 0)
    crops = crop_regions(planes[0], masks[0], style="cropmask", side=224)
    assert_close(crops[None, :, :, ::14, ::14], small["crafted/clip_in_sub14"])
    assert_close(crops.mean(dim=(2, 3))[None], small["crafted/clip_in_mean"])
    logits = small_model.classify_regions(planes, segments, small_inputs[2])
    assert_close(logits[0], small["crafted/clip_logits"], CLIP_TOLERANCE)
    scores = small_model.fuse(segments.logits, logits)[0]
    assert_close(scores, small["crafted/fused_cls"])
    size = (image.shape[1], image.shape[2])
    maps = small_model.score_maps(scores, masks[0], padded_hw, size, size)
    assert_close(maps[:, ::4, ::4], small["crafted/sem_seg_sub4"])


def embed_classes(encoder, names, templates) -> Tensor:
    open_clip = pytest.importorskip("open_clip")
    rows = [open_clip.tokenize(class_prompts(name, templates)) for name in names]
    return torch.stack([average_templates(encoder(tokens)) for tokens in rows])


def test_small_text_features(small, small_config, small_model):
    encoder, names = small_model.text_encoder, small_config["ALL"]
    single = embed_classes(encoder, names, SINGLE_TEMPLATE)
    assert_close(single, small["text/text_features_test"])
    regions = embed_classes(encoder, names, REGION_TEMPLATES)
    assert_close(regions, small["text/text_features_test_clip"])
    assert_close(regions[: len(small_config["seen"])], small["text/text_features_clip"])


def read_shapes(shared_dir, depth: int) -> dict[str, tuple[int, ...]]:
    lines = (shared_dir / "specs" / f"zegformer_r{depth}_eval_keys.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {key: tuple(ast.literal_eval(shape)) for key, shape, _ in rows}


@pytest.mark.parametrize(("depth", "trainable"), [(50, 41.35e6), (101, 60.29e6)])
def test_every_official_layout_loads(shared_dir, depth, trainable):
    with torch.device("meta"):
        state_dict = {k: torch.empty(v) for k, v in read_shapes(shared_dir, depth).items()}
    model = from_official("zegformer", state_dict)
    assert model.clip_model.image_side == 224
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == pytest.approx(trainable, abs=0.005e6)
    training = {k: v for k, v in state_dict.items() if not k.startswith(tiny_zegformer.CLIP)}
    assert from_official("zegformer", training, ensemble=False).clip_model is None


VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "potted plant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CONTEXT = 13  # the longest prompt; the text tower is causal, so what follows has no effect


SAMPLED = slice(2, None, 6)  # regions that are classified; all 100 take a minute


class RealCase:
    """The official VOC model by the rule, its reference, and what it makes of one photo."""

    def __init__(self, shared_dir) -> None:
        self.golden = load(shared_dir, "zegformer_real_r50_voc.npz")
        state_dict = tiny_zegformer.rule_state_dict(read_shapes(shared_dir, 50))
        key = tiny_zegformer.CLIP + "positional_embedding"
        state_dict[key] = state_dict[key][:CONTEXT]
        self.model = from_official("zegformer", state_dict, seen_classes=range(15))
        del state_dict
        self.text = self.embed(SINGLE_TEMPLATE)
        self.text_clip = self.embed(REGION_TEMPLATES)
        self.image = self.resize(self.golden["image"])
        planes = self.model.prepare([self.image], IMAGE_MEAN, IMAGE_STD)
        head = self.model.sem_seg_head
        self.maps = self.model.backbone(planes)
        self.mask_features = head.pixel_decoder(self.maps)
        self.queries = head.predictor.decode(self.maps[-1])[-1]
        self.segments = self.model.propose(planes, self.text)

    def embed(self, templates) -> Tensor:
        open_clip = pytest.importorskip("open_clip")
        prompts = [class_prompts(name, templates) for name in VOC_NAMES]
        tokens = torch.stack([open_clip.tokenize(group) for group in prompts])
        assert not tokens[..., CONTEXT:].any()
        embeds = self.model.text_encoder(tokens[..., :CONTEXT].flatten(0, 1))
        return average_templates(embeds.unflatten(0, tokens.shape[:2]))

    def resize(self, image: np.ndarray) -> Tensor:
        pil = pytest.importorskip("PIL.Image")
        pil_image = pil.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resized = np.asarray(pil_image.resize((512, 683), pil.Resampling.BILINEAR))
        assert resized.sum(dtype=np.int64) == self.golden["resized_sum"]
        return torch.from_numpy(resized.copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def real(shared_dir):
    return RealCase(shared_dir)


@pytest.mark.nightly
def test_real_text_features(real):
    assert_close(real.text[:, ::8], real.golden["text/test"], 1e-6)
    assert_close(real.text_clip[:, ::8], real.golden["text/test_clip"], 1e-6)


@pytest.mark.nightly
def test_real_segments(real):
    golden, segments = real.golden, real.segments
    assert_close(real.maps[-1].mean(dim=(2, 3)), golden["mid/res5_mean"])
    assert_close(real.mask_features[:, ::8, ::8, ::8], golden["mid/mask_features_sub8"])
    assert_close(real.queries, golden["mid/hs_last"])
    assert_close(segments.logits, golden["mid/pred_logits"])
    assert_close(segments.masks[:, :, ::4, ::4], golden["mid/pred_masks_sub4"])


@pytest.mark.nightly
def test_real_regions(real):
    golden, segments = real.golden, real.segments
    boxes = boxes_of(segments.masks[0], (704, 512)).numpy()
    assert np.mean((boxes == golden["mid/boxes"]).all(axis=1)) >= 0.98
    planes = real.model.prepare([real.image], REGION_MEAN, REGION_STD)
    sampled = Segments(segments.logits[:, SAMPLED], segments.masks[:, SAMPLED])
    logits = real.model.classify_regions(planes, sampled, real.text_clip)
    errors = np.abs(logits[0].numpy() - golden["mid/clip_logits"][SAMPLED]).max(axis=1)
    # About three pixels a mask lie within 2e-4 of its edge; one that flips moves a region's logits.
    assert np.median(errors) <= TOLERANCE
    assert np.quantile(errors, 0.8) <= CLIP_TOLERANCE
    assert errors.max() <= 0.2
    scores = real.model.fuse(sampled.logits, logits)[0].numpy()
    assert np.abs(scores - golden["mid/fused_cls"][SAMPLED]).max() <= 1e-3  # likewise


@pytest.mark.nightly
def test_real_score_maps(real):
    golden = real.golden
    scores = real.model.fuse(real.segments.logits[0], tensor(golden, "mid/clip_logits"))
    assert_close(scores, golden["mid/fused_cls"])
    masks, size = real.segments.masks[0], (683, 512)
    maps = real.model.score_maps(scores, masks, (704, 512), size, (500, 375))
    assert_close(maps[:, ::8, ::8], golden["sem_seg_sub8"])
    assert np.mean(maps.argmax(dim=0).numpy() == golden["argmax"]) >= 0.9999
