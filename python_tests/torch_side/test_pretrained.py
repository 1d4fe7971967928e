"""Names, what they stand for, and which of a name and a path wins."""

import json
import math
import re
import shutil

import pytest

from support.errors import refused
from zsseg_rt import Bundle
from zsseg_rt.bundles.pretrained import SETS, bundle_place, find_bundle
from zsseg_rt.errors import BundleError, ConfigError
from zsseg_rt.profiling.workload import Variant, read_against


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def copy_demo(place):
    shutil.copytree(Bundle.demo("scenes").path, place)
    return place


def test_a_name_stands_for_the_fetched_bundle_unless_a_bundle_is_at_the_path(home, tmp_path):
    place = copy_demo(bundle_place("naclip-b16"))
    assert Bundle.load("naclip-b16").path == place
    (tmp_path / "naclip-b16").mkdir()  # other things do not hide it
    assert find_bundle("naclip-b16") == place
    (tmp_path / "naclip-b16").rmdir()
    here = copy_demo(tmp_path / "naclip-b16")
    assert find_bundle("naclip-b16").resolve() == here


def test_a_name_that_stands_for_nothing_says_what_to_do(home, tmp_path):
    for name in ("naclip-b16", "naclip-b16-336"):
        with refused(BundleError, name, "fetch"):
            Bundle.load(name)
    with pytest.raises(BundleError) as caught:
        Bundle.load("naclip-l41")
    assert "Did you mean 'naclip-l14'? " in str(caught.value)
    assert all(name in str(caught.value) for name in SETS)
    (tmp_path / "photos").mkdir()
    with refused(BundleError, "photos"):
        Bundle.load("photos")
    base = Variant(name="scenes.zsseg", bundle=Bundle.demo("scenes").path)
    with refused(ConfigError, "--against"):
        read_against("naclip-b16", base)
    place = copy_demo(bundle_place("naclip-b16"))
    other = read_against("naclip-b16", base)  # as the profiler compares
    assert (other.name, other.bundle) == ("naclip-b16", place)
    for path in ("./naclip-b16", "runs/naclip-b16", "naclip-b16.zsseg"):  # are no names
        with pytest.raises(BundleError, match="expected a bundle folder, found nothing"):
            Bundle.load(path)


OWN = ("tinyclip", "pe-core", "siglip2")  # that open_clip does not know by a tag
CLIPS = {
    name: one
    for name, one in SETS.items()
    if one.architecture == "dense_clip" and not name.startswith(OWN)
}


@pytest.mark.parametrize("entry", CLIPS.values(), ids=CLIPS)
def test_every_set_agrees_with_open_clip(entry):
    open_clip = pytest.importorskip("open_clip", reason="needs pip install '.[train]'")
    torch = pytest.importorskip("torch")
    from open_clip.pretrained import get_pretrained_cfg

    from zsseg_rt.models.dense.dense_clip import HEADS
    from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD

    assert re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in entry.sha256.values())
    assert set(entry.sha256) <= set(entry.files)
    published = get_pretrained_cfg(entry.clip, entry.tag)
    assert published["hf_hub"] == f"{entry.repository}/"
    assert (published["mean"], published["std"]) == (CLIP_MEAN, CLIP_STD)
    quick = published.get("quick_gelu", False)
    assert entry.activation == ("quick_gelu" if quick else "gelu")
    assert entry.head in HEADS
    sizes = open_clip.get_model_config(entry.clip)
    assert entry.size % sizes["vision_cfg"]["patch_size"] == 0
    with torch.device("meta"):
        model = open_clip.model.CLIP(**sizes)
    towers = sum(v.numel() for k, v in model.named_parameters() if k != "logit_scale")
    assert entry.num_parameters == towers


def test_sets_that_open_clip_does_not_know_count_their_weights(shared_dir):
    models = json.loads((shared_dir / "specs" / "small_encoders_keys.json").read_text())
    for name, model, more in (
        ("tinyclip-8m", "tinyclip_8m_16.open_clip", 0),
        ("pe-core-s16", "pe_core_s16_384.perception_models", 0),
        ("siglip2-b16", "siglip2_b16_224.transformers", (256 - 196) * 768),  # of 256 pixels
    ):
        count = sum(math.prod(shape) for key, shape in models[model].items() if "logit" not in key)
        assert SETS[name].num_parameters == count + more
        assert SETS[name].size % 16 == 0
    torch = pytest.importorskip("torch")
    from zsseg_rt.models.cat_seg.model import CatSeg, CatSegConfig
    from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoderConfig

    encoder = ImageEncoderConfig(grid_side=14, num_prompts=0, num_deep_prompts=0)
    with torch.device("meta"):
        model = CatSeg(CatSegConfig(image_encoder=encoder, text_encoder=TextEncoderConfig()))
    entry = SETS["cat-seg-b16"]
    assert sum(weight.numel() for weight in model.parameters()) == entry.num_parameters
    assert entry.size == model.config.view
