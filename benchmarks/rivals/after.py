"""The steps after the network: labels from logits, and labels painted on the frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from engine import random_frame

from rivals.models import smooth_logits

Picture = npt.NDArray[Any]


class Labelling:
    """Labels [H, W] from logits [1, C, 32, 32]: bilinear, then the best class.

    Args:
        library: ``"zsseg_rt"``, ``"torch argmax"``, ``"torch max"``, ``"torch.compile"`` or
            ``"opencv"``.
        threads: CPU threads.
    """

    def __init__(self, library: str, threads: int) -> None:
        self._call = {
            "zsseg_rt": self._ours, "torch argmax": self._torch, "torch max": self._torch,
            "torch.compile": self._compiled, "opencv": self._opencv,
        }[library]  # fmt: skip
        _set_threads(library, threads)
        self.described = {
            "precision": "float32",
            "labelled by": {
                "zsseg_rt": "upsample_argmax", "opencv": "OpenCV resize, a running maximum",
                "torch max": "torch interpolate + max",
            }.get(library, "torch interpolate + argmax"),
        }  # fmt: skip
        self._library, self._function = library, None

    def select(self, classes: int, out_hw: tuple[int, int]) -> None:
        """Take other logits."""
        self._logits, self._out_hw = smooth_logits(classes), out_hw
        self._function = None
        if self._library.startswith("torch"):
            import torch

            self._tensor = torch.from_numpy(self._logits)

    def __call__(self) -> Picture:
        """Label the pixels."""
        return self._call()

    def _ours(self) -> Picture:
        from zsseg_rt import ops

        labels, _ = ops.upsample_argmax(self._logits, self._out_hw)
        return np.asarray(labels)[0]

    def _torch(self) -> Picture:
        import torch
        import torch.nn.functional as F

        with torch.inference_mode():
            full = F.interpolate(self._tensor, self._out_hw, mode="bilinear", align_corners=False)
            best = full.max(1).indices if self._library == "torch max" else full.argmax(1)
            labels: Picture = best[0].numpy()
        return labels

    def _compiled(self) -> Picture:
        import torch
        import torch.nn.functional as F

        if self._function is None:
            out_hw = self._out_hw
            torch._dynamo.reset()  # of other sizes nothing is kept, as it would be in a program
            self._function = torch.compile(
                lambda x: F.interpolate(x, out_hw, mode="bilinear", align_corners=False).argmax(1)
            )
        with torch.inference_mode():
            labels: Picture = self._function(self._tensor)[0].numpy()
        return labels

    def _opencv(self) -> Picture:
        import cv2

        size, planes = self._out_hw[::-1], self._logits[0]
        best = cv2.resize(planes[0], size, interpolation=cv2.INTER_LINEAR)
        labels = np.zeros(self._out_hw, np.uint8 if len(planes) <= 255 else np.uint16)
        for index in range(1, len(planes)):
            values = cv2.resize(planes[index], size, interpolation=cv2.INTER_LINEAR)
            labels[cv2.compare(values, best, cv2.CMP_GT) != 0] = index
            cv2.max(values, best, dst=best)
        return labels


class Painting:
    """The frame with half-transparent colours: uint8 [H, W, 3] from labels [H, W].

    Args:
        library: ``"zsseg_rt"``, ``"opencv"`` or ``"supervision"``.
        threads: CPU threads.
    """

    def __init__(self, library: str, threads: int) -> None:
        self._call = {
            "zsseg_rt": self._ours, "opencv": self._opencv, "supervision": self._supervision
        }[library]  # fmt: skip
        _set_threads(library, threads)
        words = {"zsseg_rt": "overlay", "opencv": "take + addWeighted"}
        self.described = {"precision": "uint8", "labelled by": words.get(library, "MaskAnnotator")}

    def select(self, classes: int, out_hw: tuple[int, int]) -> None:
        """Take another frame and its labels."""
        from zsseg_rt import ops

        self._frame = random_frame(out_hw)
        self._labels = np.asarray(ops.upsample_argmax(smooth_logits(classes), out_hw)[0])[0]
        self._palette = np.random.default_rng(0).integers(0, 256, (classes, 3)).astype(np.uint8)

    def __call__(self) -> Picture:
        """Paint."""
        return self._call()

    def _ours(self) -> Picture:
        from zsseg_rt import ops

        return np.asarray(ops.overlay(self._frame, self._labels, self._palette))

    def _opencv(self) -> Picture:
        import cv2

        colours = np.take(self._palette, self._labels, axis=0)
        painted: Picture = cv2.addWeighted(self._frame, 0.5, colours, 0.5, 0)
        return painted

    def _supervision(self) -> Picture:
        import supervision as sv

        present = np.unique(self._labels)
        masks = self._labels == present[:, None, None]
        found = sv.Detections(xyxy=sv.mask_to_xyxy(masks), mask=masks, class_id=present.astype(int))
        # It takes colours as RGB and pictures as BGR; ours are RGB.
        colours = [sv.Color(*map(int, colour[::-1])) for colour in self._palette]
        annotator = sv.MaskAnnotator(color=sv.ColorPalette(colours), opacity=0.5)
        painted: Picture = annotator.annotate(self._frame.copy(), found)
        return painted


def _set_threads(library: str, threads: int) -> None:
    import cv2

    from zsseg_rt import ops

    ops.set_num_threads(threads)
    cv2.setNumThreads(threads)
    if library.startswith("torch"):
        import torch

        torch.set_num_threads(threads)
