"""Published weights that have a name here, and where the bundles made from them are kept."""

from zsseg_rt.bundles.pretrained.places import bundle_place, checkpoint_folder, find_bundle
from zsseg_rt.bundles.pretrained.sets import RECOMMENDED, SETS, PretrainedSet, known_set

__all__ = [
    "RECOMMENDED",
    "SETS",
    "PretrainedSet",
    "bundle_place",
    "checkpoint_folder",
    "find_bundle",
    "known_set",
]
