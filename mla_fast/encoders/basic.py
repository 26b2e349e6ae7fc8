"""Small encoders and ResNet-18, each of which maps the samples of one modality to non-negative features [N, s]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_fast.data.layout import looks_channels_last


def _check_positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


class MLP(nn.Sequential):
    """Map [N, in_features] → [N, out_features] by linear layers of the widths `hidden` and `out_features`, with ReLU after each.

    ``MLP(in_features, 128, hidden=(128, 128))`` is the paper's encoder for data with missing modalities.
    """

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int] = (128,)):
        widths = [_check_positive("in_features", in_features)]
        widths += [_check_positive("hidden", width) for width in hidden]
        widths += [_check_positive("out_features", out_features)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers)


class SmallCNN(nn.Module):
    """Map images [N, H, W] or [N, C, H, W] → [N, out_features] by two convolutions and a linear layer.

    The convolutions are 5 × 5 with 8 channels and 3 × 3 with 16, both with stride 2; ReLU follows each layer.

    shape: of a sample, (H, W) or (C, H, W), of any size. Images with a side below 9, of which the convolutions would leave
        nothing, are padded by half the widths of the kernels.
    """

    def __init__(self, shape: Sequence[int], out_features: int):
        super().__init__()
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape: expected (H, W) or (C, H, W), each at least 1, got {tuple(shape)}")
        self.shape = tuple(shape)
        channels, height, width = (1, *shape) if len(shape) == 2 else shape
        padded = min(height, width) < 9
        positions = _positions(height, padded) * _positions(width, padded)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 5, stride=2, padding=2 * padded),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1 * padded),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * positions, _check_positive("out_features", out_features)),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        features: Tensor = self.layers(x.unsqueeze(1) if len(self.shape) == 2 else x)
        return features


def _positions(side: int, padded: bool) -> int:
    """Return the size of the second convolution's output along a side of the image."""
    return -(-side // 4) if padded else ((side - 5) // 2 - 2) // 2 + 1


class ResNet18(nn.Module):
    """Map images [N, H, W] or [N, C, H, W], or videos [N, T, C, H, W], to features [N, 512] by ResNet-18 (He et al., CVPR 2016).

    The classifier of the original is left out; its global average pooling is over the frames of a video too.

    channels: C. With one channel, images [N, H, W], such as spectrograms, are accepted too. H, W and T may be any from 1.

    In training, the statistics of BatchNorm are over all frames of the batch; a batch without rows leaves them unchanged.

    Parameters are named as in torchvision's ``resnet18``. Load its weights with ``encoder.load_state_dict(weights,
    strict=False)``, or strictly after removing ``fc.*``; for other channels than 3 remove ``conv1.weight`` too.
    """

    out_features = 512

    def __init__(self, channels: int):
        super().__init__()
        self.channels = _check_positive("channels", channels)
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        frames = self._frames(x)  # [N T, C, H, W]
        h: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(frames)), inplace=True))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h)))).mean((2, 3))
        return h if x.dim() < 5 else h.unflatten(0, x.shape[:2]).mean(1)

    def _frames(self, x: Tensor) -> Tensor:
        frames = x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, 1) if x.dim() == 5 else x
        if frames.dim() != 4 or frames.shape[1] != self.channels or 0 in x.shape[1:]:
            flat = "[N, H, W], " if self.channels == 1 else ""
            C = self.channels
            raise ValueError(f"x: expected {flat}[N, {C}, H, W] or [N, T, {C}, H, W], where only N may be 0, got {list(x.shape)}")
        return frames


class BasicBlock(nn.Module):
    """Map [N, in_channels, H, W] → [N, channels, H / stride, W / stride] by two 3 × 3 convolutions beside a shortcut.

    The shortcut is a 1 × 1 convolution if the shape changes, and otherwise the identity.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(h)) + shortcut, inplace=True)


class MeanEmbedding(nn.Module):
    """Map tokens, integers [N, T], → [N, out_features] by the mean of their embeddings and a linear layer, with ReLU after it.

    Token 0 is padding, left out of the mean; a sample of padding alone has a mean of zero. The order of tokens does not count.

    vocabulary: the highest token plus one. Raises TypeError or ValueError for other inputs.
    """

    def __init__(self, vocabulary: int, out_features: int, width: int = 128):
        super().__init__()
        self.vocabulary = _check_positive("vocabulary", vocabulary)
        self.embedding = nn.EmbeddingBag(vocabulary, _check_positive("width", width), mode="mean", padding_idx=0)
        self.layer = nn.Linear(width, _check_positive("out_features", out_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.int64, torch.int32) or x.dim() != 2:
            raise TypeError(f"x: expected tokens, int64 [N, T], got {x.dtype} {list(x.shape)}")
        return F.relu(self.layer(self.embedding(x)))


class SequenceCNN(nn.Module):
    """Map sequences [N, T, in_features] of any T ≥ 1 → [N, out_features] by two convolutions along T, their mean, a linear layer.

    The convolutions are of width 5 with 32 channels and of width 3 with 64, padded by zeros; ReLU follows each layer.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = _check_positive("in_features", in_features)
        self.convolutions = nn.Sequential(
            nn.Conv1d(in_features, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 64, 3, padding=1), nn.ReLU()
        )
        self.layer = nn.Linear(64, _check_positive("out_features", out_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.in_features:
            raise ValueError(f"x: expected [N, T, {self.in_features}] with T ≥ 1, got {list(x.shape)}")
        return F.relu(self.layer(self.convolutions(x.mT).mean(2)))


def encoder_for(shape: Sequence[int], out_features: int, layout: str | None = None, vocabulary: int | None = None) -> nn.Module:
    """Return an encoder for samples of `shape`: ``SmallCNN`` for [H, W] and [C, H, W], ``MLP`` for [F].

    layout: of ``data.LAYOUTS``, to say so; ``SequenceCNN`` for a sequence [T, F], ``MeanEmbedding`` for tokens [T] of a
        `vocabulary`. Images have their channels first, as ``data.arrange`` returns them.

    Raises ValueError for other shapes, and without a layout for what looks like [H, W, C], which has the channels last.
    """
    if layout == "tokens":
        return MeanEmbedding(vocabulary or 0, out_features)
    if layout == "sequence":
        return SequenceCNN(shape[-1], out_features)
    if len(shape) == 1:
        return MLP(shape[0], out_features)
    if layout is None and len(shape) == 3 and looks_channels_last(shape):
        expected = "expected channels first, [C, H, W], or layout='image' to say that they are"
        raise ValueError(f"shape: {expected}, got {list(shape)}, which looks like [H, W, C]")
    if len(shape) in (2, 3):
        return SmallCNN(shape, out_features)
    raise ValueError(f"shape: expected a sample [F], [H, W] or [C, H, W], got {list(shape)}")
