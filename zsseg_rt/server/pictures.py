"""A client's picture: what is asked for, and the answer."""

from __future__ import annotations

import time
from dataclasses import replace
from email import message_from_bytes
from email.message import Message
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException
from starlette.responses import Response

from zsseg_rt.errors import SourceError
from zsseg_rt.photos.header import read_header
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.server.access import Json
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.server.preview import encode_message, encode_overlay

VERSION_HEADER = "X-Vocabulary-Version"
"""Says of which classes a picture's labels are."""
FRAME = "application/x-zsseg-frame"
"""What asks for a picture as the WebSocket sends frames."""


def picture_in(body: bytes, content_type: str) -> bytes:
    """The picture of a request: its body, or the first file of a form (RFC 7578).

    Raises:
        SourceError: The form has no file.
    """
    described = Message()
    described["content-type"] = content_type
    if described.get_content_type() != "multipart/form-data":
        return body
    boundary = described.get_boundary("").encode("latin-1", "replace")
    fields = []
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        field = message_from_bytes(head.lstrip())
        if field.get_filename() is not None or field.get_content_maintype() == "image":
            return content
        fields.append(str(field.get_param("name", header="content-disposition")))
    named = ", ".join(map(repr, fields[:-1])) or "none"  # what follows the last is its end
    raise SourceError(
        f"body: expected a form with a file, got fields without one: {named}. Send it as "
        "curl -F image=@PHOTO does, or the photo alone as the body."
    )


def answer_picture(labeller: Labeller, content: bytes, accept: str) -> Response:
    """Label a picture."""
    _refuse_large(content, labeller.most_pixels)
    image, seg = labeller.segment_picture(content)
    wanted, headers = _wanted(accept), {VERSION_HEADER: str(seg.vocabulary_version)}
    if wanted == FRAME:
        packed = _pack(image, seg, labeller.channel_order)
        return Response(packed, media_type=wanted, headers=headers)
    if wanted == "application/json":
        return Json(_describe(seg), headers=headers)
    if wanted == "image/png":
        content = encode_label_png(seg.labels, palette(seg.names))
    else:
        content = encode_overlay(image, seg.labels, seg.names, labeller.channel_order)
    return Response(content, media_type=wanted, headers=headers)


def _pack(image: npt.NDArray[np.uint8], seg: Segmentation, channel_order: str) -> bytes:
    """The picture as viewers get frames."""
    now = time.monotonic()
    frame = Frame(source="", index=0, image=image, captured_at=now, clock="arrival")
    message = encode_message(0, replace(seg, frame=frame), channel_order, now)
    return message.pack(round(1e3 * now, 3))


def _wanted(accept: str) -> str:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    known = ("application/json", "image/png", "image/jpeg", FRAME)
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
