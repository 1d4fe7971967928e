"""One entry for every model: pick the exporter of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsseg_rt.export import descriptor
from zsseg_rt.export.dense_clip import export_dense_clip
from zsseg_rt.export.proposals import export_zegformer
from zsseg_rt.export.zeroseg import export_zeroseg
from zsseg_rt.models.dense_clip import DenseCLIP
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zeroseg import ZeroSeg

__all__ = ["export_bundle"]


def export_bundle(model: Any, path: str | Path, **options: Any) -> Path:
    """Write a model as a bundle that the engine runs without torch.

    The graphs, then the whole engine, are compared with torch before the bundle appears under its
    name; a bundle that disagrees is not written.

    Args:
        model: A model that :func:`zsseg_rt.models.from_official` or
            :func:`zsseg_rt.models.create_model` made.
        path: Folder to write, ``NAME.zsseg``.
        **options: Those of the family's exporter:
            :func:`zsseg_rt.export.dense_clip.export_dense_clip` for a
            :class:`zsseg_rt.models.dense_clip.DenseCLIP`,
            :func:`zsseg_rt.export.zeroseg.export_zeroseg` for a
            :class:`zsseg_rt.models.zeroseg.ZeroSeg`,
            :func:`zsseg_rt.export.proposals.export_zegformer` for a
            :class:`zsseg_rt.models.zegformer.ZegFormer`,
            :func:`zsseg_rt.export.descriptor.export_bundle` for the others. Common to all are
            ``class_names``, ``text_encoder``, ``precisions``, ``templates``, ``template_set``,
            ``text_bank``, ``size_hw``, ``name``, ``space``, ``source``, ``licence``,
            ``overwrite`` and ``verify``.

    Returns:
        The bundle folder.

    Raises:
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: The model cannot be exported, or does not fit float16.
        ShapeError: The model cannot take pictures of ``size_hw``.
        VocabularyError: Names, templates or the text bank are unusable.
    """
    if isinstance(model, DenseCLIP):
        return export_dense_clip(model, path, **options)
    if isinstance(model, ZeroSeg):
        return export_zeroseg(model, path, **options)
    if isinstance(model, ZegFormer):
        return export_zegformer(model, path, **options)
    return descriptor.export_bundle(model, path, **options)
