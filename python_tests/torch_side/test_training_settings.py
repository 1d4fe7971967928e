"""What a person writes in a configuration is checked against what takes it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.errors import refused
from zsseg_rt.common import schema
from zsseg_rt.common.schema import checked_settings
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.models.descriptor.builders import ZegCLIPStart
from zsseg_rt.training.config import ModelConfig
from zsseg_rt.training.parts import build_model
from zsseg_rt.training.tasks.descriptor import DescriptorTask


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({}, "model.options.pretrained"),
        ({"pretrained": 3}, "model.options.pretrained"),
        ({"image_size": "512"}, "model.options.image_size"),
        ({"num_prompts": 1.5}, "model.options.num_prompts"),
        ({"unit_inputs": "no"}, "model.options.unit_inputs"),
        ({"activation": "relu"}, "model.options.activation"),
        ({"image_sise": 1}, "model.options"),
        ({"decoder": {"heads": 8}}, "model.options.decoder"),
    ],
)
def test_model_options_are_refused_before_anything_is_read(options, argument):
    given = {"pretrained": "nowhere.pt"} | options if options else {}
    config = ModelConfig(architecture="zegclip", options=given)
    with refused(ArgumentError, argument):
        build_model(config, seen=(0,), protocol="inductive")


def test_inherited_settings_are_checked_too():
    taken = checked_settings(DescriptorTask, {"focal_weight": 3}, "task.options", ("seen",))
    assert taken == {"focal_weight": 3.0}
    with refused(ArgumentError, "task.options.focal_weight"):
        checked_settings(DescriptorTask, {"focal_weight": "a"}, "task.options", ("seen",))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("unseen", "car", r"options of folder\.unseen: expected a list, got 'car'"),
        ("class_names", 3, r"options of folder\.class_names: expected a list, got 3"),
        ("zero_is_unlabelled", "no", "zero_is_unlabelled: expected true or false, got 'no'"),
    ],
)
def test_data_options_of_a_wrong_type_are_refused(tmp_path, name, value, message):
    with pytest.raises(ArgumentError, match=message):
        create_dataset("folder", tmp_path, **{name: value})


def test_values_that_only_code_can_give_pass():
    decoder = object()
    given = {"pretrained": Path("a"), "decoder": decoder}
    assert checked_settings(ZegCLIPStart, given, "options")["decoder"] is decoder


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (int | tuple[int, int], "a", "x: expected an integer or a list, got 'a'"),
        (int | tuple[int, int], [1], "x: expected 2 items, got 1"),
        (str | Path | None, 1, "x: expected a string, got 1"),
        (Sequence[str] | None, ["a", 1], r"x\[1\]: expected a string, got 1"),
    ],
)
def test_a_choice_of_types_names_all(kind, raw, message):
    with pytest.raises(ArgumentError, match=message):
        schema.decode(kind, raw, "x", ArgumentError)


@pytest.mark.parametrize(
    ("kind", "raw"),
    [(int | str, "a"), (int | tuple[int, int], 3), (Sequence[str] | None, None), (int | None, 3)],
)
def test_a_choice_of_types_takes_each(kind, raw):
    assert schema.decode(kind, raw, "x", ArgumentError) == raw
