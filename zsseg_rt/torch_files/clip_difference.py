"""CAT-Seg's checkpoint as what training changed of CLIP; the rest is taken from CLIP's own file.

Only q and v of both towers are tuned. By construction all else of CLIP is OpenAI's, bit for bit, so
that a file of the 25.1 M other numbers stands for 154.3 M.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zsseg_rt.common.files import is_file, write_whole
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.checkpoints import DIFFERS_FROM
from zsseg_rt.torch_files.clip_weights import ClipWeights
from zsseg_rt.torch_files.weights import read_safetensors

CLIP_PREFIX = "sem_seg_head.predictor.clip_model."
_KEYS, _HASH = "equal_keys", "equal_sha256"  # in the file's metadata, beside DIFFERS_FROM


def split_weights(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors with the attention weights of q, k and v apart."""
    found = {}
    for key, value in tower.items():
        if not key.endswith("in_proj_weight"):
            found[key] = value
            continue
        stem = key.removesuffix("in_proj_weight")
        found |= {f"{stem}{n}_proj_weight": w for n, w in zip("qkv", value.chunk(3), strict=True)}
    return found


def official_tensors(clip: ClipWeights) -> dict[str, Tensor]:
    """CLIP's tensors, float32, under the keys of CAT-Seg's checkpoints."""
    found = {f"visual.{key}": value for key, value in split_weights(clip.visual).items()}
    found |= split_weights(clip.text)
    if clip.logit_scale is not None:
        found["logit_scale"] = torch.tensor(clip.logit_scale)
    return {CLIP_PREFIX + key: value for key, value in found.items()}


def equal_keys(state_dict: Mapping[str, Tensor], clip: Mapping[str, Tensor]) -> list[str]:
    """Keys of the float32 tensors that are CLIP's, bit for bit."""
    found = [key for key in clip if key in state_dict and _equal(state_dict[key], clip[key])]
    if not found:
        raise CheckpointError(
            "clip: expected the CLIP that the checkpoint was tuned from, with which it shares "
            "tensors, got one with which it shares none. Pass OpenAI's ViT-B/16."
        )
    return found


def difference(state_dict: Mapping[str, Tensor], equal: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that are not CLIP's."""
    left_out = set(equal)
    return {key: value for key, value in state_dict.items() if key not in left_out}


def write_difference(
    path: Path, state_dict: Mapping[str, Tensor], equal: Iterable[str], name: str
) -> None:
    """Write what differs from a CLIP, ``.safetensors``, with a hash of what does not.

    Args:
        path: The file; one that is there is replaced.
        state_dict: The whole checkpoint, float32.
        equal: What :func:`equal_keys` returned.
        name: What the CLIP is called, for errors.
    """
    from safetensors.torch import save

    equal = sorted(equal)
    metadata = {
        DIFFERS_FROM: name,
        _KEYS: " ".join(equal),
        _HASH: _sha256({key: state_dict[key] for key in equal}),
    }
    own = {
        key: value.clone(memory_format=torch.contiguous_format)  # views share memory
        for key, value in difference(state_dict, equal).items()
    }
    write_whole(path, save(own, metadata))


def read_difference(path: Path, clip: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The whole checkpoint that a difference stands for; None if the file is not a difference."""
    if path.suffix != ".safetensors" or not is_file(path):
        return None
    own, metadata = read_safetensors(path)
    if DIFFERS_FROM not in metadata:
        return None
    keys = metadata.get(_KEYS, "").split()
    taken = {key: clip[key] for key in keys if key in clip}
    expected = metadata.get(_HASH, "")
    if len(taken) < len(keys) or _sha256(taken) != expected:
        raise CheckpointError(
            f"clip: expected {metadata[DIFFERS_FROM][:80]}, of which {path.name} lacks {len(keys)} "
            f"tensors with SHA-256 {expected[:12]}, got other weights. Pass that CLIP, as a file "
            "of any kind."
        )
    return taken | own


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != torch.float32 or other.dtype != torch.float32 or one.shape != other.shape:
        return False
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().contiguous()
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).numpy().data)
    return digest.hexdigest()
