"""A client's picture: what is asked for, and the answer."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from zsseg_rt.photos.header import read_header
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.preview import encode_overlay

VERSION_HEADER = "X-Vocabulary-Version"
"""Says of which classes a picture's labels are."""


def answer_picture(labeller: Labeller, content: bytes, accept: str) -> Response:
    """Label a picture."""
    _refuse_large(content, labeller.most_pixels)
    image, seg = labeller.segment_picture(content)
    wanted, headers = _wanted(accept), {VERSION_HEADER: str(seg.vocabulary_version)}
    if wanted == "application/json":
        return JSONResponse(_describe(seg), headers=headers)
    if wanted == "image/png":
        content = encode_label_png(seg.labels, palette(seg.names))
    else:
        content = encode_overlay(image, seg.labels, seg.names, labeller.channel_order)
    return Response(content, media_type=wanted, headers=headers)


def _wanted(accept: str) -> str:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    known = ("application/json", "image/png", "image/jpeg")
    return next((kind for kind in kinds if kind in known), known[0])


def _refuse_large(content: bytes, most: int) -> None:
    try:
        height, width = read_header(content).size_hw
    except ValueError:
        return  # decoding says what is wrong
    if height * width > most:
        raise HTTPException(
            413, f"image: expected at most {most} pixels, got {width}x{height}. Make it smaller."
        )


def _describe(seg: Segmentation) -> dict[str, Any]:
    height, width = seg.labels.shape
    shares = seg.present()
    known = sum(entry.pixels for entry in shares)
    return {
        "width": width,
        "height": height,
        "classes": [
            {"name": one.name, "label": one.index, "pixels": one.pixels, "share": one.share}
            for one in shares
        ],
        "unknown_share": 1.0 - known / seg.labels.size,
        "vocabulary_version": seg.vocabulary_version,
        "times_ms": dict(seg.times),
    }
