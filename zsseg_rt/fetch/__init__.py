"""Fetch published weights by name and make bundles of them; needs the extra ``train``."""

from zsseg_rt.fetch.bundles import fetch_bundle
from zsseg_rt.fetch.progress import Progress
from zsseg_rt.pretrained import SETS, PretrainedSet

__all__ = ["SETS", "PretrainedSet", "Progress", "fetch_bundle"]
