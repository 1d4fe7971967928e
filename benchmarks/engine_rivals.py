"""Plain torch, eager or compiled, beside the engine: what else a GPU can do with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class TorchRival:
    """Eager torch from frame to labels.

    Args:
        model: A ZegCLIP model in float32.
        precision: What the model, the upsampling and the activation compute in.
        device: Where.
        compiled: Whether torch.compile makes CUDA graphs of the model.
    """

    def __init__(self, model: Any, precision: str, device: str, *, compiled: bool = False) -> None:
        import copy

        import torch

        from zsseg_rt.models.descriptor.model import IMAGE_MEAN, IMAGE_STD

        self._torch, self._device = torch, torch.device(device)
        self._dtype = getattr(torch, precision)
        self._model = copy.deepcopy(model).to(device=device, dtype=self._dtype).eval()
        if compiled:
            self._model = torch.compile(self._model, mode="reduce-overhead")
        side = model.config.image_size
        self._size_hw = (side, side)
        self._mean, self._std = (
            torch.tensor(values, device=device).reshape(3, 1, 1)
            for values in (IMAGE_MEAN, IMAGE_STD)
        )
        self._seen = list(model.config.seen_classes)
        self._bias = model.config.seen_bias
        self._text = self._bias_of_class = None

    def set_classes(self, text: np.ndarray) -> None:
        """Place the text embeddings [C, D]."""
        torch = self._torch
        self._text = torch.from_numpy(text).to(device=self._device, dtype=self._dtype)
        bias = torch.zeros(len(text), 1, 1, dtype=self._dtype)
        bias[self._seen] = self._bias
        self._bias_of_class = bias.to(self._device)

    def place(self, frame: np.ndarray) -> Any:
        """Copy a frame to the device."""
        return self._torch.from_numpy(frame).to(self._device)

    def from_host(self, frame: np.ndarray) -> np.ndarray:
        """Labels in host memory of a frame in host memory."""
        labels: np.ndarray = self._label(self.place(frame)).cpu().numpy()
        return labels

    def from_device(self, frame: Any) -> Any:
        """Labels on the device of a frame there; returns once they are."""
        labels = self._label(frame)
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)
        return labels

    def try_out(self, call: Callable[[], Any]) -> str:
        """Call once; returns why it is impossible, or ""."""
        try:
            call()
        except self._torch.OutOfMemoryError:
            self._torch.cuda.empty_cache()
            return "out of memory"
        except Exception as exc:  # noqa: BLE001 - a compiler's can be any
            return f"{type(exc).__name__}: {exc}".splitlines()[0]
        return ""

    def _label(self, frame: Any) -> Any:
        torch = self._torch
        functional = torch.nn.functional
        with torch.inference_mode(), exact_float32(torch, self._device):
            planes = frame.permute(2, 0, 1)[None].float()
            resized = functional.interpolate(planes, self._size_hw, mode="bilinear")[0]
            image = ((resized / 255 - self._mean) / self._std)[None].to(self._dtype)
            logits = self._model(image, self._text).mask_logits
            full = functional.interpolate(logits, tuple(frame.shape[:2]), mode="bilinear")[0]
            best = (full.sigmoid() - self._bias_of_class).argmax(0)
            kind = torch.uint8 if len(self._text) <= 254 else torch.int32
            return best.to(kind)


@contextmanager
def exact_float32(torch: Any, device: Any) -> Iterator[None]:
    """No TF32 in matrix products and convolutions: float32 is compared with float32."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def count_launches(call: Callable[[], Any], device: str | None) -> int | str:
    """Kernels that one call runs on the GPU, ours and others', as CUPTI tells torch's profiler."""
    if device in (None, "cpu"):
        return "missing: no GPU that torch sees"
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(on_gpu) or "missing: CUPTI told of no kernel"


def free_bytes(device: str | None) -> int | None:
    """Free memory of the GPU, what torch only keeps for later not counted as used."""
    if device in (None, "cpu"):
        return None
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free
