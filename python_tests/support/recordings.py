"""Labelled frames made on the spot, written by sinks, and read again."""

import numpy as np

from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.sinks import Sink, open_writers

LONG = 30


def result(index=0, size_hw=(48, 64), source="cam", label=0, **frame) -> Segmentation:
    image = np.full((*size_hw, 3), 40, np.uint8)
    frame = {"image": image, "captured_at": index / 10, "clock": "arrival"} | frame
    return Segmentation(
        labels=np.full(size_hw, label, np.uint8),
        names=("road", "sky", "tree"),
        vocabulary_version=3,
        frame=Frame(source=source, index=index, **frame),
    )


def open_writer(target, alpha=1.0, channel_order="rgb", **settings):
    settings = {"alpha": alpha, "channel_order": channel_order} | settings
    (writer,) = open_writers([target], **settings)
    return writer


def finish(sink, *results, waits=True):
    """Write results, and finish the sink; returns its statistics."""
    for seg in results:
        sink.put(seg, waits=waits)
    sink.finish()
    sink.join(LONG)
    return sink.stats()


def write(target, results, **settings):
    return finish(Sink(open_writer(str(target), **settings)), *results)


def frames_of(path):
    """Times and pictures of a video."""
    import av

    with av.open(str(path)) as container:
        return [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
