"""Whether labels are the reference's, but for pixels where two classes are as good as equal."""

import numpy as np

from zsseg_rt.ops import reference


def top_two_margin(
    logits, out_hw, *, activation, seen, seen_bias, unknown_below=None, align="half_pixel", **rules
):
    """How far the decision is from another, relative to max(1, the winner's magnitude)."""
    count = int(rules["num_classes"][0]) if "num_classes" in rules else logits.shape[1]
    logits, seen = logits[:, :count], None if seen is None else seen[:count]
    values = reference.upsample_bilinear(logits, out_hw, align).astype(np.float64)
    if activation == "sigmoid":
        values = np.exp(-np.logaddexp(0, -values))
    elif activation == "softmax":
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    if seen is not None:
        values = values - seen_bias * seen[:, None, None]
    ordered = np.sort(values, axis=1)
    first = ordered[:, -1]
    margin = first - ordered[:, -2] if values.shape[1] > 1 else np.full(first.shape, np.inf)
    if unknown_below is not None:
        _, scores = reference.upsample_argmax(
            logits,
            out_hw,
            activation=activation,
            seen=seen,
            seen_bias=seen_bias,
            align=align,
            with_scores=True,
        )
        margin = np.minimum(margin, np.abs(scores - unknown_below))
    return margin / np.maximum(1.0, np.abs(first))


def assert_labels_agree(logits, out_hw, labels, arguments, *, excluded_share=0.01):
    expected = reference.upsample_argmax(logits, out_hw, **arguments)[0]
    tolerance = reference.UPSAMPLE_ARGMAX_TOLERANCE[logits.dtype.name]
    with np.errstate(invalid="ignore"):
        clear = top_two_margin(logits, out_hw, **arguments) > tolerance
    assert labels.dtype == expected.dtype
    np.testing.assert_array_equal(labels[clear], expected[clear])
    assert np.sum(~clear) <= excluded_share * clear.size
    if arguments["activation"] == "none" and arguments["seen_bias"] == 0:
        np.testing.assert_array_equal(labels, expected)
