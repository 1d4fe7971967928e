"""The page of settings names every option that a configuration takes."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from zsseg_rt.common.schema import setting_names
from zsseg_rt.models.registry import find_builder
from zsseg_rt.training.tasks.cat_seg import CatSegTask
from zsseg_rt.training.tasks.cosine_head import CosineHeadTask
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.tasks.zegformer import SegmentWeights, ZegFormerTask
from zsseg_rt.training.tasks.zeroseg import ZeroSegTask
from zsseg_rt.training.tasks.zeroseg_features import TeacherFeatures, TeacherViews

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def rows_of(page):
    items = r"^- \*\*(.*?)\*\*: (.*(?:\n  .*)*)$"
    return re.findall(items, page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "architecture", ["zegclip", "clip_rc", "cosine_head", "zegformer", "cat_seg"]
)
def test_every_model_option_is_named(architecture):
    rows = rows_of(PAGE)
    texts = [
        text for name, text in rows if name.startswith(("all that start", f"`{architecture}`"))
    ]
    if architecture == "clip_rc":
        texts += [text for name, text in rows if name == "`zegclip`"]
    assert len(texts) == 2 + (architecture == "clip_rc")
    named = set(re.findall(r"`(\w+)`", " ".join(texts)))
    options = set(setting_names(find_builder(architecture, official=False)))
    assert options - named == {"seen_classes", "self_trained"} & options


@pytest.mark.parametrize(
    ("row", "takers", "others"),
    [
        ("ZegCLIP, CLIP-RC", [DescriptorTask], ()),
        ("cosine head", [CosineHeadTask], ()),
        ("CAT-Seg", [CatSegTask], ()),
        ("ZegFormer", [ZegFormerTask, SegmentWeights], ()),
        (
            "ZeroSeg",
            [ZeroSegTask, TeacherFeatures, TeacherViews],
            ("teacher", "teacher_architecture", "teacher_activation", "views"),
        ),
    ],
)
def test_every_task_option_is_named_and_there(row, takers, others):
    (text,) = (text for name, text in rows_of(PAGE) if name == row)
    named = set(re.findall(r"`(\w+)`", text))
    taken = {name for taker in takers for name in setting_names(taker)}
    assert named == (taken | set(others)) - {
        "seen",
        "ignore_label",
        "protocol",
        "batch_size",
        "num_images",
        "prompts",
    }
