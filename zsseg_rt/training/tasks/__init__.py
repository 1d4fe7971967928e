"""One training task a family of models.

- :class:`zsseg_rt.training.tasks.descriptor.DescriptorTask` trains ZegCLIP and CLIP-RC.
- :class:`zsseg_rt.training.tasks.dense.DenseTask` trains the fine-tuned dense baseline.
- :class:`zsseg_rt.training.tasks.zegformer.ZegFormerTask` trains ZegFormer.
- :class:`zsseg_rt.training.tasks.zeroseg.ZeroSegTask` trains ZeroSeg.
"""
