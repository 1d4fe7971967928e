"""The published weights that can be fetched by name, and what is made from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zsseg_rt.common import schema
from zsseg_rt.common.files import default_cache_dir, is_file, is_folder
from zsseg_rt.demo import DEFAULT, DEMOS, demo_bundle
from zsseg_rt.errors import ArgumentError, BundleError

_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PretrainedSet:
    """Published weights, and what makes a bundle of them.

    Attributes:
        name: What users type.
        repository: Repository on the Hugging Face Hub, ``owner/name``, or ``spaces/owner/name``; or
            the address of a folder on another server.
        clip: open_clip's name of the architecture.
        tag: open_clip's name of the weights; what others' are called here.
        head: Dense head, see :class:`zsseg_rt.export.clip_file.DenseHead`; empty for other systems.
        activation: The MLPs' activation, which the file does not say.
        num_parameters: Numbers in the model.
        number_bytes: Bytes of each in the file: float32, or float16.
        licence: Licence of the weights, as their repository states it.
        good_for: One line for those who choose.
        published: Accuracy that its authors, or who is named, report; empty: none was read.
        cost: What a frame costs at ``size``, and where times were measured; empty: not counted.
        size: Side of the bundle's input in pixels.
        files: Names that the file may have, the preferred one first.
        all_files: Whether all of ``files`` are needed.
        revision: Commit of the repository; its files never change.
        sha256: Of files whose SHA-256 is known beside what the hub says, in hex by name.
        architecture: The torch model that the file is read into.
    """

    name: str
    repository: str
    clip: str
    tag: str
    head: str
    activation: str
    num_parameters: int
    licence: str
    good_for: str
    published: str = ""
    cost: str = ""
    size: int = 448
    files: tuple[str, ...] = (_FILE, "open_clip_pytorch_model.bin")
    all_files: bool = False
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "dense_clip"
    number_bytes: int = 4

    @property
    def page(self) -> str:
        """Where the files are, for people."""
        return self.repository if "://" in self.repository else f"huggingface.co/{self.repository}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; the file has some tens of kB more."""
        return self.number_bytes * self.num_parameters


_B16, _L14 = 149_620_736, 427_616_512
_OPENAI_LICENCE = "Apache-2.0 as its repository states; OpenAI published it under MIT"


def _openai_b16(
    name: str, head: str, good_for: str, published: str = "", cost: str = ""
) -> PretrainedSet:
    return PretrainedSet(
        name=name,
        repository="timm/vit_base_patch16_clip_224.openai",
        clip="ViT-B-16",
        tag="openai",
        head=head,
        activation="quick_gelu",
        num_parameters=_B16,
        licence=_OPENAI_LICENCE,
        good_for=good_for,
        published=published,
        cost=cost,
        revision="977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        sha256={_FILE: "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f"},
    )


def _tips(
    size: str, num_parameters: int, good_for: str, published: str, cost: str
) -> PretrainedSet:
    weights = f"v2_0/checkpoints/pytorch/tips_v2_oss_{size}14"
    return PretrainedSet(
        name=f"tipsv2-{size}14",
        repository="https://storage.googleapis.com/tips_data",
        clip=f"TIPSv2 {size.upper()}/14",
        tag="tips_v2_oss",
        head="maskclip",
        activation="gelu",
        num_parameters=num_parameters,
        licence="CC-BY 4.0, as the authors' repository states of all but its code",
        good_for=good_for,
        published=published,
        cost=cost,
        files=(f"{weights}_vision.npz", f"{weights}_text.npz", "v1_0/checkpoints/tokenizer.model"),
        all_files=True,
        architecture="tips",
    )


def _tinyclip_39m(name: str, head: str, good_for: str, cost: str) -> PretrainedSet:
    return PretrainedSet(
        name=name,
        repository="timm/vit_medium_patch16_clip_224.tinyclip_yfcc15m",
        clip="TinyCLIP-ViT-39M-16-Text-19M",
        tag="yfcc15m",
        head=head,
        activation="gelu",
        num_parameters=83_101_184,
        number_bytes=2,
        licence="MIT",
        good_for=good_for,
        published="ImageNet 63.5 (its authors); nobody published labels of patches",
        cost=cost,
        files=(_FILE,),
    )


def _pe_core(
    size: str, num_parameters: int, imagenet: str, cost: str, commit: str
) -> PretrainedSet:
    return PretrainedSet(
        name=f"pe-core-{size}16",
        repository=f"timm/PE-Core-{size.upper()}-16-384",
        clip=f"PE-Core {size.upper()}/16",
        tag="pe_core",
        head="value_mlp",
        activation="gelu",
        num_parameters=num_parameters,
        licence="Apache-2.0",
        good_for=f"Perception Encoder {size.upper()}/16: good names for its cost; not tried here",
        published=f"ImageNet {imagenet} (its authors); nobody published labels of patches",
        cost=cost,
        size=384,
        files=(_FILE,),
        revision=commit,
    )


_ALL = (
    _openai_b16(
        "sfp-b16",
        "sfp",
        "OpenAI's CLIP ViT-B/16 with SFP's head: any names, nothing trained; not tried here",
        "mean mIoU of eight sets 44.0, VOC21 63.9, ADE20K 20.8 (as ActiveSAM quotes it)",
        "74 GMAC",
    ),
    _openai_b16(
        "naclip-b16",
        "naclip",
        "the same weights with NACLIP's head: simpler and older",
        "mean mIoU of eight sets 39.4, VOC21 58.9, ADE20K 17.4 (arXiv 2404.08181)",
        "69 GMAC; docs/models.md has times",
    ),
    PretrainedSet(
        name="tinyclip-8m",
        repository="wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
        clip="TinyCLIP-ViT-8M-16-Text-3M",
        tag="yfcc15m",
        head="naclip",
        activation="gelu",
        num_parameters=23_446_016,
        licence="MIT",
        good_for="any words in real time on a plain CPU: few and clear names; not tried here",
        published="ImageNet 41.1 (its authors); nobody published labels of patches",
        cost="4.4 GMAC, 9.1 at 448, 1.7 at 224; docs/models.md has times",
        size=336,
        files=("model.safetensors",),
        revision="a2a8c6eaa2549ad66eb7c31b85022bf58273a26c",
        sha256={
            "model.safetensors": "9339ee3d736344d0ddcaa6c03edc9f89688f08caaea5401220885233da726fcc"
        },
    ),
    _tinyclip_39m(
        "tinyclip-39m",
        "sfp",
        "half of ViT-B/16's cost, with SFP's head; not tried here",
        "39 GMAC, 19 at 336, 7.7 at 224; docs/models.md has times",
    ),
    _tinyclip_39m(
        "tinyclip-39m-naclip",
        "naclip",
        "the same weights with NACLIP's head: simpler and older",
        "36 GMAC, 18 at 336, 7.6 at 224",
    ),
    _pe_core("s", 87_187_712, "72.7", "16 GMAC", "3249a38eb1c432ec19231c6fe1774acb6a4e4efe"),
    _pe_core("t", 69_545_600, "62.1", "4.9 GMAC", "7fe539ed578ac49a1c2b4f946e4b0747704c825a"),
    PretrainedSet(
        name="siglip2-b16",
        repository="timm/ViT-B-16-SigLIP2-256",
        clip="SigLIP 2 B/16-256",
        tag="siglip2",
        head="value_mlp",
        activation="gelu_tanh",
        num_parameters=375_234_048,
        licence="Apache-2.0",
        good_for="SigLIP 2 B/16: names in many languages; 393 MB of token rows; not tried here",
        published="ImageNet 79.1 (its authors); nobody published labels of patches",
        cost="24 GMAC",
        size=256,
        files=(_FILE, "tokenizer.json"),
        all_files=True,
    ),
    PretrainedSet(
        name="naclip-l14",
        repository="timm/vit_large_patch14_clip_224.openai",
        clip="ViT-L-14",
        tag="openai",
        head="naclip",
        activation="quick_gelu",
        num_parameters=_L14,
        licence=_OPENAI_LICENCE,
        good_for="OpenAI's CLIP ViT-L/14, 2.9 times the weights, patches of 14 pixels: slower",
        cost="314 GMAC",
        revision="18d0535469bb561bf468d76c1d73aa35156c922b",
        sha256={_FILE: "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e"},
    ),
    PretrainedSet(
        name="naclip-b16-laion2b",
        repository="laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        clip="ViT-B-16",
        tag="laion2b_s34b_b88k",
        head="naclip",
        activation="gelu",
        num_parameters=_B16,
        licence="MIT",
        good_for="ViT-B/16 trained on LAION-2B, where OpenAI's data or licence does not suit",
        cost="69 GMAC",
        revision="7288da5a0d6f0b51c4a2b27c624837a9236d0112",
    ),
    PretrainedSet(
        name="naclip-b16-datacomp",
        repository="laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
        clip="ViT-B-16",
        tag="datacomp_xl_s13b_b90k",
        head="naclip",
        activation="gelu",
        num_parameters=_B16,
        licence="MIT",
        good_for="ViT-B/16 trained on DataComp-1B, whose data are published as addresses",
        cost="69 GMAC",
        revision="d110532e8d4ff91c574ee60a342323f28468b287",
    ),
    _openai_b16(
        "sc-clip-b16",
        "sc_clip",
        "naclip-b16's weights with SC-CLIP's head, akin to SFP's; not tried here",
        cost="75 GMAC",
    ),
    _openai_b16(
        "clearclip-b16",
        "clearclip",
        "naclip-b16's weights with ClearCLIP's head",
        "mean mIoU of eight sets 38.1, VOC20 80.9, ADE20K 16.7 (repository; ResCLIP, ActiveSAM)",
        "69 GMAC",
    ),
    _openai_b16(
        "sclip-b16",
        "sclip",
        "naclip-b16's weights with SCLIP's head",
        "mean mIoU of eight sets 39.1, VOC21 59.6, ADE20K 16.5 (its README)",
        "73 GMAC",
    ),
    _openai_b16(
        "maskclip-b16",
        "maskclip",
        "naclip-b16's weights with MaskCLIP's head",
        "mIoU VOC20 74.9, ADE20K 9.8 (ClearCLIP's repository)",
        "72 GMAC",
    ),
    PretrainedSet(
        name="cat-seg-b16",
        repository="spaces/hamacojr/CAT-Seg-weights",
        clip="ViT-B-16",
        tag="cat_seg",
        head="",
        activation="quick_gelu",
        num_parameters=154_289_377,
        licence="MIT, as the authors' repository cvlab-kaist/CAT-Seg states",
        good_for="CAT-Seg B by its authors, trained on COCO-Stuff's masks: slower; not tried here",
        published="mIoU VOC20 94.6, Context59 57.5, ADE20K 31.8, with five views (its paper)",
        cost="57 GMAC, and 1.1 for each name",
        size=384,
        files=("model_base.pth",),
        architecture="cat_seg",
    ),
    _tips(
        "b",
        195_948_288,
        "TIPSv2 B/14: an open backbone of its own, any names, nothing trained; not tried here",
        "mIoU ADE20K 17.4 (its README)",
        "104 GMAC",
    ),
    _tips(
        "l",
        487_941_120,
        "TIPSv2 L/14, 2.5 times the weights: slower; not tried here",
        "mIoU ADE20K 24.7 (its README)",
        "357 GMAC",
    ),
)

RECOMMENDED = "sfp-b16"
"""The best labels of any names without training on masks, by published figures alone."""

SIDES = ("224", "336", "448")
"""Inputs that can be asked for: whole patches of 14 and of 16 pixels."""

SETS: dict[str, PretrainedSet] = {one.name: one for one in _ALL}
"""All sets by name, in the order in which they are listed."""


def find_set(name: str) -> PretrainedSet | None:
    """The set of this name, or None; ``NAME-336`` is ``NAME`` with an input of 336x336 pixels."""
    base, _, side = name.rpartition("-")
    one = SETS.get(base)
    if one is None or side not in SIDES or one.architecture == "cat_seg":
        return SETS.get(name)
    return replace(one, name=name, size=int(side))


def known_set(name: str) -> PretrainedSet:
    """The set of this name; :func:`find_set`, but a wrong name is an error."""
    if (one := find_set(name)) is None:
        hint = schema.nearest(name, list(SETS)).replace("Known keys", "Known names")
        raise ArgumentError(
            f"name: expected a set that can be fetched, got {name!r}. {hint}"
            f" Inputs: --size {', '.join(SIDES)}; CAT-Seg has one."
        )
    return one


_SUFFIX = ".zsseg"
_MANIFEST = "bundle.json"
_SHIPPED = {"demo": DEFAULT, **{f"demo-{name}": name for name in DEMOS}}


def bundle_place(name: str) -> Path:
    """The folder of the bundle that is fetched under this name."""
    return default_cache_dir() / "bundles" / f"{name}{_SUFFIX}"


def checkpoint_folder(repository: str) -> Path:
    """The folder of the files from one repository, also where to put them by hand."""
    return default_cache_dir() / "checkpoints" / repository.rpartition("://")[2].replace("/", "--")


def find_bundle(given: str | Path) -> Path:
    """The folder that a path or a fetched bundle's name stands for; ``demo``, ``demo-scenes`` ship.

    A bundle at the path wins over the name. Anything else at the path does not: a folder of results
    called ``naclip-b16`` does not hide the bundle of this name. With a folder in front, such as
    ``results/naclip-b16``, it is always a path.
    """
    path = Path(given)
    if not _may_be_name(given) or is_file(path / _MANIFEST):
        return path
    fetched = bundle_place(path.name)
    if is_folder(fetched):
        return fetched
    if path.name in _SHIPPED:
        return demo_bundle(_SHIPPED[path.name])
    if (one := find_set(path.name)) is not None:
        size = round(one.weight_bytes / 1e6)
        raise BundleError(
            f"{path}: expected a bundle that was fetched, found none in {fetched.parent}. Run: "
            f"zsseg-rt fetch {path} (downloads about {size} MB)"
        )
    if not os.path.lexists(path):
        hint = schema.nearest(path.name, list(SETS)).replace("Known keys", "Names to fetch")
        raise BundleError(
            f"{path}: expected a bundle folder or the name of a fetched bundle, found nothing. "
            f"Check the path. {hint}"
        )
    return path


def _may_be_name(given: str | Path) -> bool:
    """Whether it is one plain word, such as names are, without a path's marks."""
    word = os.fspath(given)
    return bool(word) and Path(word).name == word and Path(word).suffix != _SUFFIX
