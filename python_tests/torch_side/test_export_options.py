"""What an export may be told: each option exists, is documented and read, or is refused."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from support import tiny, tiny_zegformer
from support.errors import refused
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.errors import ArgumentError, BundleError
from zsseg_rt.export import export_bundle, export_dense_bundle, export_graphs
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.export.options import ENCODER_OPTIONS, MODEL_OPTIONS, ExportOptions
from zsseg_rt.models.registry import find_builder

FIELDS = [field.name for field in dataclasses.fields(ExportOptions)]


def foreign(path, **options):
    size = {"image_size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return export_dense_bundle("absent.onnx", path, **size, **options)


@pytest.mark.parametrize("export", [export_bundle, export_graphs])
def test_an_unknown_option_names_the_nearest(export, tmp_path):
    message = r"clas_names: expected an option of export.* Did you mean 'class_names'\?"
    with pytest.raises(ArgumentError, match=message):
        export(tiny.zegclip_model(), tmp_path / "a.zsseg", clas_names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_a_foreign_encoder_names_the_nearest(tmp_path):
    with refused(ArgumentError, "logit_scal", "'logit_scale'"):
        foreign(tmp_path / "a.zsseg", logit_scal=1.0)


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (tiny.zegclip_model, {"region_templates": ("{}",)}),
        (tiny.clip_rc_model, {"logit_scale": 100.0}),
        (tiny_zegformer.model, {"tokenizer": None}),
        (zeroseg_model, {"unknown_below": 0.5}),
    ],
    ids=["zegclip", "clip_rc", "zegformer", "zeroseg"],
)
def test_an_option_of_other_architectures_is_refused_by_name(build, option, tmp_path):
    model, name = build(), next(iter(option))
    with refused(ArgumentError, name, model.architecture):
        export_bundle(model, tmp_path / "a.zsseg", **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"class_names": ["a"]}, {"text_encoder": None}])
def test_an_option_of_models_is_refused_for_foreign_encoders(option, tmp_path):
    with refused(ArgumentError, next(iter(option))):
        foreign(tmp_path / "a.zsseg", **option)


def test_precisions_are_checked_with_the_options():
    with refused(BundleError, "precisions"):
        ExportOptions(precisions=("int4",))


def test_every_option_is_read_and_documented_once():
    read = ENCODER_OPTIONS.union(*(exporter.reads for exporter in EXPORTERS.values()))
    assert set(FIELDS) == read
    assert all(exporter.reads >= MODEL_OPTIONS for exporter in EXPORTERS.values())
    attributes = ExportOptions.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert re.findall(r"^        (\w+):", attributes, re.M) == FIELDS


def test_every_exporter_is_of_an_architecture():
    for architecture in EXPORTERS:
        assert find_builder(architecture, official=False)


def test_foreign_encoders_are_exported_without_torch(tmp_path):
    code = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from support.colour_words import export_colour_bundle
export_colour_bundle(Path(sys.argv[1]))
"""
    path = tmp_path / "colours.zsseg"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # support
    call = [sys.executable, "-c", code, path]
    subprocess.run(call, env=os.environ | paths, check=True, timeout=120)
    assert (path / "bundle.json").is_file()
