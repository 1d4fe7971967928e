"""The page on training names every option that a configuration takes."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from zsseg_rt.models.registry import find_builder
from zsseg_rt.training.settings import setting_names

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.parametrize("architecture", ["zegclip", "clip_rc", "dense_baseline", "zegformer"])
def test_every_model_option_is_named(architecture):
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [
        text for name, text in rows if name.startswith(("all that start", f"`{architecture}`"))
    ]
    if architecture == "clip_rc":
        texts += [text for name, text in rows if name == "`zegclip`"]
    assert len(texts) == 2 + (architecture == "clip_rc")
    named = set(re.findall(r"`(\w+)`", " ".join(texts)))
    options = set(setting_names(find_builder(architecture, official=False)))
    assert options - named == {"seen_classes", "self_trained"} & options
