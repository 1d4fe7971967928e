"""upsample_argmax on the CPU for any sizes, logits and settings that hypothesis thinks of."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support.label_agreement import assert_labels_agree
from zsseg_rt import ops
from zsseg_rt.ops import reference

LOGITS = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, 0.5, 30.0, 1e4, -1e4, 1e-30, 65504.0])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_labels_without_activation_equal_the_reference_in_every_bit(data):
    shape = data.draw(st.tuples(*[st.integers(1, n) for n in (2, 20, 4, 4)]))
    out_hw = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    values = data.draw(st.lists(LOGITS, min_size=1, max_size=64))
    picks = np.random.default_rng(data.draw(st.integers(0, 99))).integers(len(values), size=shape)
    logits = np.array(values, np.float32)[picks]
    labels, scores = ops.upsample_argmax(logits, out_hw, with_scores=True)
    expected_labels, expected_scores = reference.upsample_argmax(logits, out_hw, with_scores=True)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(scores, expected_scores)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_labels_agree_for_any_settings(data):
    shape = data.draw(st.tuples(*[st.integers(1, n) for n in (2, 20, 4, 4)]))
    out_hw = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = generator.standard_normal(shape, np.float32)
    logits *= data.draw(st.sampled_from([0.1, 3.0, 1e4]))
    arguments = {
        "activation": data.draw(st.sampled_from(["none", "sigmoid", "softmax"])),
        "seen": generator.random(shape[1]) < data.draw(st.floats(0, 1)),
        "seen_bias": data.draw(st.floats(-2, 2, width=32)),
        "unknown_below": data.draw(st.sampled_from([None, 0.0, 0.5])),
    }
    labels, _ = ops.upsample_argmax(logits, out_hw, **arguments)
    assert_labels_agree(logits, out_hw, labels, arguments, excluded_share=1.0)
