"""TIPSv2 in torch against the official code's vectors, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support import golden_tips
from support.errors import refused

torch = pytest.importorskip("torch")

from support.golden import case_of, load  # noqa: E402
from support.golden_tips import model_of  # noqa: E402
from zsseg_rt import models  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError  # noqa: E402
from zsseg_rt.models.base import slide_scores  # noqa: E402
from zsseg_rt.models.dense.tips import Tips, TipsConfig, resized_rgb  # noqa: E402


@torch.no_grad()
def test_windows_give_the_official_probabilities_and_labels(shared_dir):
    vectors = load(shared_dir, "tips_small_public.npz")
    model = model_of(case_of(vectors, str(vectors["slide/weights_of"]))[1])
    side, stride = map(int, vectors["slide/side_stride"])
    assert (model.windows.crop_size, model.windows.stride) == (side, stride)
    image, text = (torch.from_numpy(vectors[f"slide/{name}"]) for name in ("image", "text"))
    scores = slide_scores(
        lambda window: model.predict(window, text), image[None], crop_size=side, stride=stride
    )
    found = scores[0, :, ::4, ::4].numpy()
    np.testing.assert_allclose(found, vectors["slide/probabilities_sub4"], atol=1e-6)
    large = torch.nn.functional.interpolate(scores, size=(90, 130), mode="bilinear")[0]
    best = large.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-6).numpy()
    assert clear.mean() > 0.99
    labels = vectors["slide/labels_90x130"]
    np.testing.assert_array_equal(large.argmax(0).numpy()[clear], labels[clear])


@pytest.mark.parametrize("case", ["enlarge", "shrink"])
def test_pictures_are_resized_as_officially(shared_dir, case):
    vectors = load(shared_dir, "tips_small_public.npz")
    found = resized_rgb(vectors[f"preprocess/{case}/rgb"], 112)
    np.testing.assert_array_equal(found, vectors[f"preprocess/{case}/out_uint8"])


def test_other_heads_and_floats_for_tokens_are_refused():
    with refused(ArgumentError, "head"):
        TipsConfig(head="naclip")
    c = golden_tips.SMALL
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    model = models.from_official("tips", towers, num_heads=c["heads"], text_heads=4)
    assert isinstance(model, Tips)
    with refused(DTypeError, "tokens"):
        model.text_encoder(torch.rand(2, 64))


def changed(tower: str, **values: Any) -> dict[str, Any]:
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    for key, value in values.items():
        name = key.replace("__", ".")
        if value is None:
            del towers[tower][name]
        else:
            towers[tower][name] = value
    return towers


@pytest.mark.parametrize(
    ("towers", "said"),
    [
        (changed("vision", norm__bias=None), "norm.bias missing"),
        (changed("vision", head__weight=np.ones(2, np.float32)), "head.weight unknown"),
        (changed("vision", cls_token=np.ones((1, 1, 32), np.float32)), "[1, 1, 32]"),
        (changed("vision", norm__bias=np.full(64, np.nan, np.float32)), "NaN"),
        (changed("vision", norm__bias=np.zeros(64)), "float64"),
        (changed("vision", pos_embed=np.ones((1, 60, 64), np.float32)), "60"),
        (changed("vision", **{"blocks__0__mlp__w12__weight": np.ones((2, 2))}), "SwiGLU"),
        (changed("text", ln_final__bias=None), "ln_final.bias missing"),
        (changed("text", temperature=np.float32(0)), "temperature"),
        (changed("text", temperature=np.float32("nan")), "temperature"),
        ({"text": {}}, "'vision'"),
        ({"vision": {}, "words": {}}, "words"),
        ({"vision": {}}, "patch_embed.proj.weight"),
    ],
)
def test_other_weights_are_refused(towers, said):
    with pytest.raises(CheckpointError) as caught:
        models.from_official("tips", towers)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "vision.npz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vision\.npz: expected a TIPSv2"):
        models.create_model("tips", vision=path)


def test_files_that_grow_too_much_are_refused(tmp_path):
    path = tmp_path / "vision.npz"
    np.savez_compressed(path, cls_token=np.zeros(1 << 22, np.float32))
    with pytest.raises(CheckpointError, match=r"16777\d+ bytes in a file of \d+"):
        models.create_model("tips", vision=path)


def test_files_and_tensors_make_the_same_model(tmp_path):
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    towers["text"]["temperature"] = np.float32(0.05)
    for name, tensors in towers.items():
        np.savez(tmp_path / f"{name}.npz", **tensors)
    files = {name: tmp_path / f"{name}.npz" for name in towers}
    heads = {"num_heads": 4, "text_heads": 4, "logit_scale": None}
    read = models.create_model("tips", **files, **heads)
    assert read.logit_scale == pytest.approx(20)
    assert read.size_hw == (112, 112)
    tensors = {n: {k: torch.as_tensor(v) for k, v in t.items()} for n, t in towers.items()}
    given = models.from_official("tips", tensors, **heads)
    for key, value in given.state_dict().items():
        torch.testing.assert_close(read.state_dict()[key], value, rtol=0, atol=0)
