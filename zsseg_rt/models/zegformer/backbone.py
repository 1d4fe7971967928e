"""ZegFormer's backbone: a ResNet whose batch norms are frozen or trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError

BackboneNorm = Literal["frozen", "learned"]

_EXPANSION = 4  # a bottleneck outputs four times its inner width


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet; the defaults are ResNet-50's.

    Attributes:
        stem_width: Channels of the stem.
        widths: Inner width of the bottlenecks of each stage; a stage outputs four times as many
            channels.
        depths: Bottlenecks per stage.
        norm: Batch norms are constants (``"frozen"``, official) or learn (``"learned"``, to train
            without pretrained weights). In evaluation both are the same, and so are their names.
    """

    stem_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    norm: BackboneNorm = "frozen"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, get_args(BackboneNorm))
        sizes = (self.stem_width, *self.widths, *self.depths)
        if not self.widths or len(self.widths) != len(self.depths) or min(sizes) < 1:
            raise ArgumentError(
                f"widths: expected a positive width and depth per stage, got widths "
                f"{self.widths}, depths {self.depths} and stem_width {self.stem_width}."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        return tuple(_EXPANSION * width for width in self.widths)


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics, scale and shift are constants, in training too."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(num_channels))
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``[B, C, H, W]``."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class LearnedBatchNorm(FrozenBatchNorm):
    """Batch norm that learns; in evaluation mode it computes what :class:`FrozenBatchNorm` does.

    Both store the same tensors, so the weights of either load into the other. In training, each
    process normalises its own share of a batch.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        del self.weight, self.bias
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift ``[B, C, H, W]``."""
        if not self.training:
            return super().forward(x)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=True, momentum=0.1)


_NORMS = {"frozen": FrozenBatchNorm, "learned": LearnedBatchNorm}


class NormedConv(nn.Conv2d):
    """A convolution without bias, followed by a norm; padding keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: nn.Module,
        stride: int = 1,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, H, W]`` to ``[B, out_channels, H / stride, W / stride]``."""
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


class _Stem(nn.Module):
    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        norm = _NORMS[config.norm](config.stem_width)
        self.conv1 = NormedConv(3, config.stem_width, 7, norm, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv1(image)), kernel_size=3, stride=2, padding=1)


class _Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1; the shortcut is projected where channels change."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: BackboneNorm) -> None:
        super().__init__()
        out_channels, make_norm = _EXPANSION * width, _NORMS[norm]
        self.conv1 = NormedConv(in_channels, width, 1, make_norm(width))
        self.conv2 = NormedConv(width, width, 3, make_norm(width), stride)
        self.conv3 = NormedConv(width, out_channels, 1, make_norm(out_channels))
        self.shortcut = (
            None
            if in_channels == out_channels and stride == 1
            else NormedConv(in_channels, out_channels, 1, make_norm(out_channels), stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet of bottlenecks, stride in the 3x3 convolution.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = _Stem(config)
        in_channels = config.stem_width
        self.stage_names = [f"res{index + 2}" for index in range(len(config.widths))]
        for index, name in enumerate(self.stage_names):
            width, norm = config.widths[index], config.norm
            blocks = [_Bottleneck(in_channels, width, 1 if index == 0 else 2, norm)]
            in_channels = config.channels[index]
            blocks += [
                _Bottleneck(in_channels, width, 1, norm) for _ in range(1, config.depths[index])
            ]
            self.add_module(name, nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute feature maps.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            One map per stage, at strides 4, 8, 16 and 32, finest first.
        """
        x = self.stem(image)
        maps = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps
