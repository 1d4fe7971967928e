"""Tensors that a bundle keeps beside its graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.errors import BundleError


def read_weights(bundle: Bundle, names: Sequence[str]) -> list[npt.NDArray[np.float32]]:
    """The named tensors of a bundle's ``weights``, C-contiguous.

    Raises:
        BundleError: The bundle has no such file, or it is damaged or lacks one of the tensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if bundle.weights is None:
        raise BundleError(f"{bundle.path / 'bundle.json'}: missing key 'weights'")
    path = bundle.open_path(bundle.weights)
    try:
        tensors = load_file(path)
        return [np.ascontiguousarray(tensors[name], np.float32) for name in names]
    except (SafetensorError, KeyError, OSError) as exc:
        raise BundleError(f"{path}: expected {', '.join(names)}, got {exc}") from exc
