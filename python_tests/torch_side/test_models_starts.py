"""Initial weights of decode heads: random as ever, copies of one layer, or aligned with CLIP."""

import math

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")

from support import tiny  # noqa: E402
from support.errors import refused  # noqa: E402
from tools.studies.starts import HeadStart, scale_for  # noqa: E402
from zsseg_rt.errors import ArgumentError  # noqa: E402
from zsseg_rt.models import create_model  # noqa: E402
from zsseg_rt.models.descriptor.model import CrossAttention  # noqa: E402
from zsseg_rt.training.assembly import build_model  # noqa: E402
from zsseg_rt.training.config import ModelConfig  # noqa: E402

SIZES = tiny.TinySizes(num_layers=2, text_layers=1, grid_side=3)
ALIGNED = HeadStart(aligned=True)
FAMILIES = ("zegclip", "clip_rc")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny.clip_state_dict(SIZES), path)

    def build(architecture, **settings):
        given = {"image_size": 64, "num_heads": 4, "text_heads": 4, "activation": "quick_gelu"}
        torch.manual_seed(0)
        start = settings.pop("head", HeadStart())
        model = create_model(architecture, pretrained=path, **given | settings)
        start.apply(model.decode_head)
        return model

    return build


def names(count=5, *, centred):
    """Unit rows; CLIP's own texts are nearly centred, random ones of few channels are not."""
    rows = torch.randn(count, SIZES.embed_dim, generator=torch.Generator().manual_seed(3))
    rows = rows - rows.mean(dim=1, keepdim=True) if centred else rows
    return torch.nn.functional.normalize(rows, dim=-1)


@torch.no_grad()
def masks_and_cosines(model, text):
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    output = model(image, text)
    patches = output.patch_embeds.flatten(2)
    return output.mask_logits.flatten(2), text @ patches, patches


def test_zegclip_starts_as_the_cosine(build):
    model = build("zegclip", head=ALIGNED)
    found, cosines, _ = masks_and_cosines(model, names(centred=True))
    assert cosines.std() > 0.05
    torch.testing.assert_close(found, 14 * cosines, rtol=0, atol=1e-3)  # the norms' eps, 32 wide


def test_clip_rc_starts_as_the_cosine(build):
    found, cosines, patches = masks_and_cosines(
        build("clip_rc", head=ALIGNED, num_cells=4), names(centred=True)
    )
    spread = patches.std(dim=1, unbiased=False)  # its norms centre patches too
    expected = 14 * cosines / (spread * math.sqrt(SIZES.embed_dim))[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert (found - 14 * cosines).abs().max() < 1.5


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_cosine_s_factor_is_an_option(build, architecture):
    text = names(centred=True)
    plain, scaled, moved = (
        masks_and_cosines(build(architecture, head=HeadStart(aligned=True, **settings)), text)[0]
        for settings in ({}, {"scale": 56.0}, {"scale": 56.0, "offset": -3.0})
    )
    torch.testing.assert_close(scaled, 4 * plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(moved, scaled - 3, rtol=0, atol=0.3)


def test_the_factor_fits_the_names():
    from tools.scenes import CLASS_NAMES
    from zsseg_rt.models.clip.weights import build_text_encoder
    from zsseg_rt.torch_files.clip_weights import load_clip
    from zsseg_rt.training.class_embeddings import embed_phrases

    encoder = build_text_encoder(load_clip("demo"))
    assert scale_for(embed_phrases(encoder, CLASS_NAMES, ("a photo of a {}.",))) == 14.0
    near = names(20, centred=True) * 0.2 + torch.eye(SIZES.embed_dim)[0]
    assert scale_for(torch.nn.functional.normalize(near, dim=-1)) > 50.0
    assert scale_for(names(2, centred=True)) == 14.0
    assert scale_for(torch.ones(5, 4) / 2) == 14.0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_layers_can_start_as_copies_of_one(build, architecture):
    plain, copied = (build(architecture, start=s).decode_head for s in ("random", "copies"))
    stacks = {"zegclip": ("decoder_1",), "clip_rc": ("decoder_q", "decoder_v")}[architecture]
    for stack in stacks:
        first, *others = (layer.state_dict() for layer in getattr(copied, stack).layers)
        as_drawn = getattr(plain, stack).layers[0].state_dict()
        for name, value in first.items():
            assert torch.equal(value, as_drawn[name])
            assert all(torch.equal(value, other[name]) for other in others)
    weights = getattr(copied, stacks[0]).layers
    assert weights[0].linear1.weight is not weights[1].linear1.weight


@pytest.mark.parametrize(
    ("architecture", "settings", "argument"),
    [
        ("zegclip", {"start": "alined"}, "start"),
        ("clip_rc", {"start": "alined"}, "start"),
        ("zegclip", {"start": "aligned"}, "start"),
        ("clip_rc", {"start": "aligned", "start_scale": 5.0}, "start_scale"),
        ("zegclip", {"start_offset": -3.0}, "start_offset"),
        ("clip_rc", {"low_initial_logits": True}, "low_initial_logits"),
    ],
)
def test_initial_weights_that_are_not_the_package_s_are_refused(
    build, architecture, settings, argument
):
    with refused(ArgumentError, argument):
        build(architecture, **settings)


@pytest.mark.parametrize("key", ["start_offset", "low_initial_logits"])
def test_a_recipe_that_names_retired_weights_is_told_what_to_do(key):
    config = ModelConfig(options={"pretrained": "demo", key: -3.6})
    with pytest.raises(ArgumentError, match=rf"{key}: .*retired.*tools\.studies\.starts"):
        build_model(config, seen=(), protocol="inductive")
    build_model(ModelConfig(options={"pretrained": "demo", key: 0}), seen=(), protocol="inductive")


@pytest.mark.parametrize(
    "settings",
    [
        {"offset": -3.0},
        {"scale": 5.0},
        {"aligned": True, "scale": 0.0},
        {"aligned": True, "offset": math.inf},
        {"aligned": True, "low_logits": True},
    ],
)
def test_starts_that_do_not_fit_are_refused(settings):
    with pytest.raises(ArgumentError, match="expected"):
        HeadStart(**settings)


def test_clip_rc_can_start_with_logits_as_small_as_zegclips(build):
    image, text = torch.randn(1, 3, 64, 64), names(3, centred=True)
    starts = (HeadStart(), HeadStart(low_logits=True))
    models = [build("clip_rc", head=start) for start in starts]
    plain, low = (model(image, text).mask_logits.detach() for model in models)
    factor = models[0].decode_head.decoder_q.decoder_layers()[-1].multihead_attn.logit_scale
    assert plain.abs().max() > 1
    torch.testing.assert_close(low, factor * plain)


def test_attention_drops_weights_in_training_only():
    torch.manual_seed(0)
    attention = CrossAttention(16, 16, 2, dropout=0.5)
    queries, memory = torch.randn(1, 3, 16), torch.randn(1, 9, 16)
    torch.testing.assert_close(attention.eval()(queries, memory), attention(queries, memory))
    first, second = (attention.train()(queries, memory) for _ in range(2))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(
        attention.mask_logits(queries, memory), attention.eval().mask_logits(queries, memory)
    )
