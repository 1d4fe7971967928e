"""The self-check's verdict on labels: rounding may not fail it, a wrong label must."""

from dataclasses import replace

import numpy as np
import pytest

from zsseg_rt import Bundle
from zsseg_rt.config import EngineConfig
from zsseg_rt.ops import reference
from zsseg_rt.runtime import self_check
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import TOLERANCES, check_against_golden, scaled_error

SLACK = 0.9 * TOLERANCES["bfloat16"].stage


@pytest.fixture(params=["none", "sigmoid", "softmax"])
def bundle(request, zegclip_bundle):
    bundle = Bundle.load(zegclip_bundle)
    seen = tuple(f"name {index}" for index in range(0, 7, 2))
    head = replace(bundle.head, activation=request.param, seen=seen, seen_bias=0.3)
    return replace(bundle, head=head)


@pytest.fixture
def golden(bundle, monkeypatch):
    """Its golden sample with random logits, whose labels are theirs."""
    arrays = self_check.read_golden(bundle, create_family(bundle, EngineConfig()))
    logits = np.random.default_rng(0).standard_normal(arrays["mask_logits"].shape)
    arrays["mask_logits"] = (3.0 * logits).astype(np.float32)
    arrays["labels"] = label(bundle, arrays, arrays["mask_logits"])
    monkeypatch.setattr(self_check, "read_golden", lambda *_: arrays)
    return arrays


def seen_classes(bundle, golden):
    return np.isin([str(name) for name in golden["class_names"]], bundle.head.seen)


def label(bundle, golden, logits):
    labels, _ = reference.upsample_argmax(
        logits,
        golden["frame"].shape[:2],
        activation=bundle.head.activation,
        seen=seen_classes(bundle, golden),
        seen_bias=bundle.head.seen_bias,
    )
    return labels[0]


def shifted(bundle, golden):
    """The golden logits, seen classes up and the others down by less than is tolerated."""
    logits = golden["mask_logits"]
    sign = np.where(seen_classes(bundle, golden), 1.0, -1.0)[None, :, None, None]
    return (logits + sign * SLACK * np.abs(logits).max()).astype(np.float32)


def labels_stage(bundle, golden, **outputs):
    family = create_family(bundle, EngineConfig())
    report = check_against_golden(bundle, family, "bfloat16", lambda *_: {**golden, **outputs})
    return report.stages[-1]


def test_labels_within_the_tolerance_pass(bundle, golden):
    """Seen classes give up a part of their score: a logit's lead is not yet the winner's."""
    logits = shifted(bundle, golden)
    labels = label(bundle, golden, logits)
    assert (labels != golden["labels"]).mean() > 0.02
    stage = labels_stage(bundle, golden, mask_logits=logits, labels=labels)
    assert (stage.stage, stage.error) == ("labels", 0.0)


def test_a_clear_winners_wrong_label_fails(bundle, golden):
    logits = golden["mask_logits"].copy()
    logits[:, 1] += 0.5 * np.abs(logits).max()  # an unseen class, by far more than is tolerated
    stage = labels_stage(bundle, golden, labels=label(bundle, golden, logits))
    assert stage.error > 0.1
    assert not stage.passed


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, -4.0], 0.0),
        ([2.0, -3.0], 0.25),
        ([np.nan, -4.0], np.inf),
        ([np.inf, -4.0], np.inf),
        ([2.0], np.inf),
    ],
)
def test_errors_count_in_the_largest_golden_value(values, expected):
    golden = np.array([2.0, -4.0], np.float32)
    assert scaled_error(np.array(values, np.float16), golden) == expected
