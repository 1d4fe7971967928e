"""Who decides what a segment is: the values in bundle.json, and the official flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Fusion = Literal["seen_and_unseen", "all_classes", "regions", "segments"]
FUSIONS: tuple[str, ...] = get_args(Fusion)

_FLAGS = ("ensemble", "ensemble_all_classes", "clip_classification")


def fusion_of_flags(
    *,
    ensemble: bool = True,
    ensemble_all_classes: bool = False,
    clip_classification: bool = True,
) -> Fusion:
    """Translate the flags of the official configuration.

    Example:
        >>> fusion_of_flags(ensemble=False)
        'regions'
    """
    if not clip_classification:
        return "segments"
    if ensemble_all_classes:
        return "all_classes"
    return "seen_and_unseen" if ensemble else "regions"


def with_fusion(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the flags of earlier versions replaced by one ``fusion``.

    Example:
        >>> with_fusion({"ensemble": False, "queries": 100})
        {'queries': 100, 'fusion': 'regions'}
    """
    flags = {name: settings[name] for name in _FLAGS if name in settings}
    rest = {name: value for name, value in settings.items() if name not in flags}
    return rest | {"fusion": fusion_of_flags(**flags)} if flags else rest
