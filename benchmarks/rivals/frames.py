"""From a frame to its labels: the engine, torch, and OpenVINO or ONNX Runtime on its graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engine import class_names, random_frame, random_text

Labels = npt.NDArray[Any]
Feeds = dict[str, npt.NDArray[np.float32]]


class EngineRival:
    """Our engine.

    Args:
        bundle: The bundle's folder.
        precision: As the engine's setting.
        threads: CPU threads.
    """

    def __init__(self, bundle: str, precision: str, threads: int) -> None:
        from zsseg_rt import Engine, EngineConfig

        config = EngineConfig(
            device="cpu", backend="openvino", precision=precision, num_threads=threads
        )
        self._engine = Engine(bundle, config)
        self.described = {"precision": self._engine.precision, "labelled by": "upsample_argmax"}

    def select(self, classes: int, out_hw: tuple[int, int]) -> None:
        """Name other classes and take a frame of another size."""
        embeddings = random_text(self._engine.bundle.text.embed_dim, classes)
        self._engine.set_classes(class_names(classes), embeddings=embeddings)
        self._frame = random_frame(out_hw)

    def __call__(self) -> Labels:
        """Label the frame."""
        return self._engine.segment(self._frame).labels


class PreparedRival:
    """The steps that rivals share: OpenCV before the network, torch after it.

    Args:
        bundle: The bundle, for the sizes and the rule that turns logits into labels.
        threads: CPU threads of torch and OpenCV.
    """

    def __init__(self, bundle: str, threads: int) -> None:
        import cv2
        import torch

        from zsseg_rt import Bundle

        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        self._bundle = Bundle.load(bundle)
        self.described = {"precision": "float32", "labelled by": "torch interpolate + max"}

    def select(self, classes: int, out_hw: tuple[int, int]) -> None:
        """Name other classes and take a frame of another size."""
        import torch

        head = self._bundle.head
        seen = np.isin(class_names(classes), list(head.seen)).astype(np.float32)
        self._lowered = torch.from_numpy(seen[:, None, None] * np.float32(head.seen_bias))
        self._text = random_text(self._bundle.text.embed_dim, classes)
        self._frame, self._out_hw = random_frame(out_hw), out_hw

    def image(self) -> npt.NDArray[np.float32]:
        """The frame as the network's input [1, 3, h, w], as users of torch make it."""
        import cv2

        settings = self._bundle.preprocess
        resized = cv2.resize(
            self._frame, tuple(settings.size_hw)[::-1], interpolation=cv2.INTER_LINEAR
        )
        scaled = resized.astype(np.float32) / 255.0
        image = (scaled - np.float32(settings.mean)) / np.float32(settings.std)
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)[None]

    def labels_of(self, logits: Any) -> Labels:
        """Labels of a tensor of logits [1, C, gh, gw], by the fastest way that torch has.

        In place, so that memory is touched once; ``max`` gives the labels of ``argmax`` earlier.
        """
        import torch.nn.functional as F

        full = F.interpolate(logits, self._out_hw, mode="bilinear", align_corners=False)[0]
        labels: Labels = full.sigmoid_().sub_(self._lowered).max(0).indices.numpy()
        return labels


class TorchRival(PreparedRival):
    """The torch model with the bundle's weights.

    Args:
        bundle: The bundle's folder.
        threads: CPU threads.
        torch_file: The model.
        precision: ``"float32"`` or ``"bfloat16"``.
        compiled: Whether the image tower and the head are compiled, each on its own, so that other
            numbers of classes do not compile the tower again.
    """

    def __init__(
        self, bundle: str, threads: int, torch_file: str, precision: str, compiled: bool
    ) -> None:
        import torch

        super().__init__(bundle, threads)
        self._dtype = getattr(torch, precision)
        self._model = torch.load(torch_file, weights_only=False).to(self._dtype)  # our own file
        if compiled:
            self._model.backbone = torch.compile(self._model.backbone)
            self._model.decode_head = torch.compile(self._model.decode_head)
        self.described["precision"] = precision

    def __call__(self) -> Labels:
        """Label the frame."""
        import torch

        with torch.inference_mode():
            image = torch.from_numpy(self.image()).to(self._dtype)
            text = torch.from_numpy(self._text).to(self._dtype)
            return self.labels_of(self._model(image, text).mask_logits.float())


class GraphRival(PreparedRival):
    """The bundle's two graphs run by another library; what is between them is torch's.

    Args:
        bundle: The bundle's folder.
        threads: CPU threads.
        library: ``"openvino"`` or ``"onnxruntime"``.
        precision: ``"float32"`` or ``"auto"``, which leaves it to OpenVINO.
    """

    def __init__(self, bundle: str, threads: int, library: str, precision: str) -> None:
        import torch
        from safetensors.torch import load_file

        super().__init__(bundle, threads)
        opened = {"openvino": OpenVinoGraph, "onnxruntime": OnnxRuntimeGraph}[library]
        paths = {name: Path(bundle) / held["float32"].file for name, held in self._graphs()}
        self._encoder, self._decoder = (
            opened(paths[name], threads, precision) for name in ("image_encoder", "decoder")
        )
        assert self._bundle.weights is not None
        tensors = load_file(Path(bundle) / self._bundle.weights.file)
        weight, self._bias = tensors["descriptor.weight"].float(), tensors["descriptor.bias"]
        self._related, self._of_text = (part.T.contiguous() for part in weight.chunk(2, dim=1))
        self._torch = torch
        self.described["precision"] = self._encoder.precision

    def _graphs(self) -> Any:
        return self._bundle.graphs.items()

    def select(self, classes: int, out_hw: tuple[int, int]) -> None:
        """See :class:`PreparedRival`; the text's half of the queries is computed once."""
        super().select(classes, out_hw)
        self._embeds = self._torch.from_numpy(self._text)
        self._text_queries = self._embeds @ self._of_text + self._bias

    def __call__(self) -> Labels:
        """Label the frame."""
        with self._torch.inference_mode():
            encoded = self._encoder.run({"image": self.image()})
            related = self._torch.from_numpy(encoded["cls_embed"]) * self._embeds
            queries = (related @ self._related + self._text_queries)[None]
            feeds = {"queries": queries.numpy(), "patch_embeds": encoded["patch_embeds"]}
            decoded = self._decoder.run(feeds)
            keys, embeds = (
                self._torch.from_numpy(decoded[name]) for name in ("patch_keys", "class_embeds")
            )
            logits = self._bundle.head.logit_scale * (embeds @ keys.transpose(1, 2))
            return self.labels_of(logits.reshape(1, -1, *self._bundle.head.grid_hw))


class OpenVinoGraph:
    """A graph that OpenVINO compiled, with the settings of its own guide for short latency."""

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        import openvino

        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads
        }  # fmt: skip
        if precision == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        kind = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(kind, kind)
        self._request = compiled.create_infer_request()
        self._names = [output.get_any_name() for output in compiled.outputs]

    def run(self, feeds: Feeds) -> Feeds:
        """Run it; results are valid until the next run."""
        self._request.infer(feeds, share_inputs=True)
        return {name: self._request.get_tensor(name).data for name in self._names}


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime's CPU provider, all its optimisations on."""

    precision = "float32"

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Feeds) -> Feeds:
        """Run it."""
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
