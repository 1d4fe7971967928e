"""Initial weights of decode heads: random as ever, copies of one layer, or aligned with CLIP."""

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")

from support import tiny  # noqa: E402
from support.errors import refused  # noqa: E402
from tools.studies.starts import HeadStart  # noqa: E402
from zsseg_rt.errors import ArgumentError  # noqa: E402
from zsseg_rt.models import create_model  # noqa: E402

SIZES = tiny.TinySizes(num_layers=2, text_layers=1, grid_side=3)
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
    ],
)
def test_initial_weights_that_are_not_the_package_s_are_refused(
    build, architecture, settings, argument
):
    with refused(ArgumentError, argument):
        build(architecture, **settings)
