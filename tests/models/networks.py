"""Small but real network architectures in plain torch.nn, for the zoo.

Each class is the published architecture, with widths and depths as arguments, so that the same code serves as a test
(small) and as a benchmark (full). Nothing here depends on the zoo.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _initialise_convolutions(module: nn.Module) -> None:
    """He initialisation by fan-out, as torchvision: keeps the activations' variance where the default shrinks it."""
    for submodule in module.modules():
        if isinstance(submodule, nn.Conv2d):
            nn.init.kaiming_normal_(submodule.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual, He et al. 2015, section 3.3."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + residual)


class ResNet18(nn.Module):
    """ResNet-18 as torchvision lays it out: images `[N, 3, H, W]` to logits `[N, classes]`."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        in_channels = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages.append(nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)))
            in_channels = channels
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layers(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise projection, Sandler et al. 2018, figure 4."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2: images `[N, 3, H, W]` to logits `[N, classes]`.

    `stages` are the rows (expansion, channels, repeats, stride) of Sandler et al. 2018, table 2.
    """

    FULL = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    SMALL = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 2))

    def __init__(self, stages: tuple[tuple[int, int, int, int], ...] = FULL, head: int = 1280, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)
        ]  # fmt: skip
        in_channels = 32
        for expansion, channels, repeats, stride in stages:
            for index in range(repeats):
                layers.append(InvertedResidual(in_channels, channels, stride if index == 0 else 1, expansion))
                in_channels = channels
        layers += [nn.Conv2d(in_channels, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(head, classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked `nn.LSTM`, output projection: tokens `[N, L]` int64 to logits `[N, L, vocabulary]`."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.decoder(hidden)


class UNetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a residual: the block of diffusion U-Nets (Ho et al. 2020, appendix B)."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip: nn.Module = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.skip(x) + hidden


class UNet(nn.Module):
    """U-Net: images `[N, 3, H, W]` to per-pixel logits `[N, classes, H, W]`; H and W are multiples of 4.

    The two ways up that networks use both occur: a transposed convolution, then nearest-neighbour interpolation
    followed by a convolution. Skips are concatenated.
    """

    def __init__(self, width: int, classes: int, groups: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = UNetBlock(width, width, groups)
        self.pool1 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2 = UNetBlock(width, 2 * width, groups)
        self.pool2 = nn.AvgPool2d(2)
        self.middle = UNetBlock(2 * width, 4 * width, groups)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1)
        self.merge2 = UNetBlock(4 * width, 2 * width, groups)
        self.up1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.merge1 = UNetBlock(2 * width, width, groups)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        level1 = self.down1(self.stem(x))
        level2 = self.down2(self.pool1(level1))
        x = self.middle(self.pool2(level2))
        x = self.merge2(torch.cat([self.up2(x), level2], dim=1))
        x = self.up1(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.merge1(torch.cat([x, level1], dim=1))
        return self.head(x)
