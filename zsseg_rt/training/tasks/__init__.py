"""The training tasks of all architectures that can be trained."""

from collections.abc import Mapping

from zsseg_rt.training.tasks.cat_seg import CatSegTask
from zsseg_rt.training.tasks.descriptor import CosineHeadTask, DescriptorTask
from zsseg_rt.training.tasks.labelled import TrainingTask
from zsseg_rt.training.tasks.zegformer import ZegFormerTask
from zsseg_rt.training.tasks.zeroseg import ZeroSegTask

__all__ = ["TASKS"]

TASKS: Mapping[str, type[TrainingTask]] = {
    "cat_seg": CatSegTask,
    "clip_rc": DescriptorTask,
    "cosine_head": CosineHeadTask,
    "zegclip": DescriptorTask,
    "zegformer": ZegFormerTask,
    "zeroseg": ZeroSegTask,
}
