"""Small encoders to start with: a sample of one modality → features [s] ≥ 0, the same s for every modality."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _check_positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


class MLP(nn.Sequential):
    """[N, in_features] → [N, out_features]: linear layers of the widths in `hidden` and of `out_features`, ReLU after each."""

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int] = (128,)):
        widths = [_check_positive("in_features", in_features)]
        widths += [_check_positive("hidden", width) for width in hidden]
        widths += [_check_positive("out_features", out_features)]
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers)


class SmallCNN(nn.Module):
    """[N, H, W] or [N, C, H, W] → [N, out_features]: conv 5 × 5 stride 2 (8 channels), conv 3 × 3 stride 2 (16), linear; ReLU
    after each.

    shape: a sample's, (H, W) or (C, H, W), of any size; a sample without channels gets one. Images with a side under 9, which the
    convolutions would leave nothing of, are padded by half the kernels' widths.
    """

    def __init__(self, shape: Sequence[int], out_features: int):
        super().__init__()
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape: expected (H, W) or (C, H, W), each at least 1, got {tuple(shape)}")
        self.shape = tuple(shape)
        channels, height, width = (1, *shape) if len(shape) == 2 else shape
        padded = min(height, width) < 9
        places = _places(height, padded) * _places(width, padded)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 5, stride=2, padding=2 * padded),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1 * padded),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * places, _check_positive("out_features", out_features)),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        return self.layers(x.unsqueeze(1) if len(self.shape) == 2 else x)


def _places(side: int, padded: bool) -> int:
    """What the two convolutions leave of a side."""
    return -(-side // 4) if padded else ((side - 5) // 2 - 2) // 2 + 1


def encoder_for(shape: Sequence[int], out_features: int) -> nn.Module:
    """The encoder for samples of `shape`: ``SmallCNN`` for [H, W] and [C, H, W], ``MLP`` for [F]; ValueError for others."""
    if len(shape) == 1:
        return MLP(shape[0], out_features)
    if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        raise ValueError(f"shape: expected channels first, [C, H, W], got {list(shape)}, which looks like [H, W, C]")
    if len(shape) in (2, 3):
        return SmallCNN(shape, out_features)
    raise ValueError(f"shape: expected a sample [F], [H, W] or [C, H, W], got {list(shape)}")
