"""Fetch published weights by name and make bundles of them; needs the extra ``fetch``."""

from zsseg_rt.bundles.pretrained import SETS, PretrainedSet
from zsseg_rt.fetch.bundles import fetch_bundle
from zsseg_rt.fetch.checkpoints import Progress

__all__ = ["SETS", "PretrainedSet", "Progress", "fetch_bundle"]
