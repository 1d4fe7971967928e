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


@pytest.fixture(params=["none", "sigmoid", "softmax"])
def sample(request, zegclip_bundle, monkeypatch):
    """A bundle, its golden sample with random logits whose labels are theirs, its seen classes."""
    bundle = Bundle.load(zegclip_bundle)
    seen = tuple(f"name {index}" for index in range(0, 7, 2))
    head = replace(bundle.head, activation=request.param, seen=seen, seen_bias=0.3)
    bundle = replace(bundle, head=head)
    golden = self_check.read_golden(bundle, create_family(bundle, EngineConfig()))
    logits = np.random.default_rng(0).standard_normal(golden["mask_logits"].shape)
    golden["mask_logits"] = (3.0 * logits).astype(np.float32)
    golden["labels"] = label(bundle, golden, golden["mask_logits"])
    monkeypatch.setattr(self_check, "read_golden", lambda *_: golden)
    return bundle, golden


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


def labels_stage(bundle, golden, **outputs):
    family = create_family(bundle, EngineConfig())
    report = check_against_golden(bundle, family, "bfloat16", lambda *_: {**golden, **outputs})
    return report.stages[-1]


def test_labels_within_the_tolerance_pass(sample):
    """Seen classes give up a part of their score: a logit's lead is not yet the winner's.

    Seen classes go up and the others down by less than is tolerated.
    """
    bundle, golden = sample
    logits = golden["mask_logits"]
    sign = np.where(seen_classes(bundle, golden), 1.0, -1.0)[None, :, None, None]
    slack = 0.9 * TOLERANCES["bfloat16"].stage * np.abs(logits).max()
    logits = (logits + sign * slack).astype(np.float32)
    labels = label(bundle, golden, logits)
    assert (labels != golden["labels"]).mean() > 0.02
    stage = labels_stage(bundle, golden, mask_logits=logits, labels=labels)
    assert (stage.stage, stage.error) == ("labels", 0.0)


def test_a_clear_winners_wrong_label_fails(sample):
    bundle, golden = sample
    logits = golden["mask_logits"].copy()
    logits[:, 1] += 0.5 * np.abs(logits).max()  # an unseen class, by far more than is tolerated
    stage = labels_stage(bundle, golden, labels=label(bundle, golden, logits))
    assert stage.error > 0.1
    assert not stage.passed


def test_errors_count_in_the_largest_golden_value():
    golden = np.array([2.0, -4.0], np.float32)
    for values, expected in (
        ([2.0, -4.0], 0.0),
        ([2.0, -3.0], 0.25),
        ([np.nan, -4.0], np.inf),
        ([np.inf, -4.0], np.inf),
        ([2.0], np.inf),
    ):
        assert scaled_error(np.array(values, np.float16), golden) == expected
