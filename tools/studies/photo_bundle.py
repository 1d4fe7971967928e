"""Make the photo bundle that ships with the package: DeepLabV3 in CLIP's text space.

The network sees the 20 things of PASCAL VOC and background. Of its 21 scores per cell, softmax
makes shares, and the embedding is the sum of 21 text rows by these shares. A text row is CLIP
ViT-B/32's, less the mean of all rows of the bank, at unit length; background's is opposite to the
mean of the things. The bank has every name of four published lists. Nothing here is random: the
same files give the same bundle.

    python -m tools.studies.photo_bundle ENCODERS TEXT_EMBEDDINGS --out zsseg_rt/demo/photos.zsseg
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import ConceptSpec
from zsseg_rt.export import export_dense_bundle
from zsseg_rt.export.bundle_writer import write_golden, write_manifest
from zsseg_rt.export.golden import require_passed, verify_bundle

Rows = npt.NDArray[np.float32]

THINGS = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch",
    "train", "tv",
)  # fmt: skip
"""Classes of the network after background, in its order."""
BACKGROUND = "background"
ENCODER = "deeplabv3_mnv2_voc_clipspace.onnx"
LISTS = (
    ("coco80_names.txt", "coco_clip_a+cname.npy"),
    ("Objects365_names_fix.csv", "o365_clip_a+cnamefix.npy"),
    ("oid500_names.txt", "oid_clip_a+cname.npy"),
    ("lvis_v1_names.txt", "lvis_v1_clip_a+cname.npy"),
)
"""Names and rows; where two lists have one name, the first counts."""
_ODD = {"ballon", "billards", "noddles", "french", "skiboard", "canned", BACKGROUND}
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP, which the graph takes
_STD = (0.26862954, 0.26130258, 0.27577711)
_LEAST_COSINE = 0.35  # 'tree' has 0.26 with its nearest, 'taxi' 0.50, 'laptop' 0.37
_ALSO = ("woman", "human face", "human head", "sparrow")
_SCALE = 10.0  # of the products; labels do not depend on it
_LARGE = 1024  # elements from which weights are rounded to float16
_SOURCE = (
    "DeepLabV3-MobileNetV2 of google-coral/test_data (deeplabv3_mnv2_pascal_quant.tflite, PASCAL "
    "VOC; Apache-2.0), weights dequantised and rounded to float16; text rows of CLIP ViT-B/32, "
    "prompt 'a NAME', of facebookresearch/Detic (datasets/metadata, Apache-2.0), less their mean"
)


def clean_names(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Names that people type, with the row of each: ``sofa_bed``, ``Handbag/Satchel``."""
    for row, line in enumerate(lines):
        name = re.sub(r"\s+", " ", line.replace("_", " ")).strip().lower()
        if name in _ODD or name.startswith("other ") or "," in name:
            continue
        if name.endswith(") computer monitor"):
            name = "computer monitor"
        if "/" not in name:
            yield row, name
        elif " " not in name:
            yield from ((row, part) for part in name.split("/"))


def read_bank(folder: Path) -> dict[str, Rows]:
    """Unit rows [512] of all names; ``cab (taxi)`` is also ``cab`` where no list has that."""
    banks: dict[str, Rows] = {}
    for names_file, rows_file in LISTS:
        lines = (folder / names_file).read_text(encoding="utf-8").splitlines()
        if names_file.endswith(".csv"):
            lines = [line.split(",")[2] for line in lines]
        rows = np.load(folder / rows_file).astype(np.float32)
        if len(rows) != len(lines):
            raise SystemExit(f"{rows_file}: expected {len(lines)} rows, got {len(rows)}")
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for row, name in clean_names(lines):
            banks.setdefault(name, rows[row])
    for name in [name for name in banks if name.endswith(")")]:
        bare = name[: name.index(" (")]
        if bare not in banks and bare != BACKGROUND:
            banks[bare] = banks.pop(name)
    return banks


def centred(bank: dict[str, Rows]) -> dict[str, Rows]:
    """The rows less their mean, at unit length, and background's; values that float16 holds."""
    names = sorted(bank)
    rows = np.stack([bank[name] for name in names])
    rows = _unit(rows - rows.mean(axis=0))
    things = rows[[names.index(name) for name in THINGS]]
    background = _unit(-things.mean(axis=0, keepdims=True))
    rows = np.concatenate([background, rows]).astype(np.float16).astype(np.float32)
    return dict(zip([BACKGROUND, *names], rows, strict=True))


def _unit(rows: Rows) -> Rows:
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def in_text_space(model: onnx.ModelProto, bank: dict[str, Rows]) -> onnx.ModelProto:
    """The network from pixels to embeddings [1, 512, 33, 33]: shares of 21 classes by their rows.

    Large weights are rounded to float16.
    """
    graph = model.graph
    while graph.node[-1].output[0] != "logits":
        del graph.node[-1]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    rows = np.stack([bank[name] for name in (BACKGROUND, *THINGS)], axis=1)[:, :, None, None]
    kept.append(numpy_helper.from_array(rows, "text_rows"))
    for tensor in kept:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and values.size >= _LARGE:
            half = values.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    graph.node.extend(
        [
            helper.make_node("Softmax", ["logits"], ["shares"], "shares", axis=1),
            helper.make_node("Conv", ["shares", "text_rows"], ["embeds"], "text_rows"),
        ]
    )
    graph.ClearField("output")
    sizes = [1, rows.shape[0], 33, 33]
    graph.output.append(helper.make_tensor_value_info("embeds", TensorProto.FLOAT, sizes))
    return model


def write_photo_bundle(encoders: Path, embeddings: Path, path: Path) -> Path:
    """Write the bundle.

    Args:
        encoders: Folder with the network, :data:`ENCODER`.
        embeddings: Folder with the files of :data:`LISTS`.
        path: The bundle to write; one that is there is replaced.
    """
    bank = centred(read_bank(embeddings))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "encoder.onnx"
        onnx.save(in_text_space(onnx.load(encoders / ENCODER), bank), graph)
        bundle = export_dense_bundle(
            graph,
            Path(folder) / path.name,
            image_size=513,
            mean=_MEAN,
            std=_STD,
            align="corners",
            normalize=False,
            logit_scale=_SCALE,
            text_bank=(list(bank), np.stack(list(bank.values()))),
            templates=("a {}",),
            template_set="a NAME",
            architecture="deeplabv3-mobilenetv2 (20 things of PASCAL VOC)",
            space="CLIP ViT-B/32, less the mean of the bank",
            source=_SOURCE,
            licence="Apache-2.0 (weights and text rows; see NOTICE beside the bundle)",
        )
        _finish(bundle)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(bundle, path)
    return path


def _finish(path: Path) -> None:
    """State what the network sees, and shorten the golden sample by its largest array.

    The labels of the golden frame depend on that array, so they still check it.
    """
    bundle = Bundle.load(path)
    with np.load(path / "golden.npz") as golden:
        kept = {name: golden[name] for name in golden.files if name != "image"}
    concepts = ConceptSpec(
        names=THINGS, also=_ALSO, least_cosine=_LEAST_COSINE, background=(BACKGROUND,)
    )
    entry = write_golden(path, kept)
    framed = dataclasses.replace(bundle.preprocess, resize="windows")
    finished = {"golden": entry, "concepts": concepts, "preprocess": framed}
    write_manifest(path, dataclasses.replace(bundle, **finished))
    require_passed(verify_bundle(path), path.name)


def main() -> None:
    """Write the bundle that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoders", type=Path, help=f"folder with {ENCODER}")
    parser.add_argument("embeddings", type=Path, help="folder with names and rows, vitb32")
    parser.add_argument("--out", type=Path, required=True, help="bundle to write, NAME.zsseg")
    given = parser.parse_args()
    print(write_photo_bundle(given.encoders, given.embeddings, given.out))


if __name__ == "__main__":
    main()
