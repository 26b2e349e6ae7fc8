"""What M3AE and CAV-MAE are built of: the pre-norm transformer block and fixed positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELUS = ("tanh", "none")  # as F.gelu calls them: the approximation by tanh, or none, which is exact


class Block(nn.Module):
    """Map tokens [N, T, width] → [N, T, width]: attention and an MLP of 4 × width, each after LayerNorm and beside a shortcut.

    eps: of LayerNorm. gelu: of ``GELUS``.
    """

    def __init__(self, width: int, heads: int, eps: float, gelu: str):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        if gelu not in GELUS:
            raise ValueError(f"gelu: expected one of {', '.join(GELUS)}, got {gelu!r}")
        self.heads, self.gelu = heads, gelu
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend to all tokens, or to those where `visible`, bool [N, T], is True: at least one in each row."""
        N, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(N, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if visible is None else visible[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [N, heads, T, width / heads]
        x = x + self.proj(mixed.transpose(1, 2).reshape(N, T, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate=self.gelu))
        return out


def initialize(module: nn.Module) -> None:
    """Set linear layers as both papers do: Xavier-uniform weights, zero biases. Use as ``encoder.apply(initialize)``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def positions_1d(places: Tensor, width: int) -> Tensor:
    """Return [sin(p ω), cos(p ω)] of each place p, float32 [T, width], with ω_j = 10000^(−j / (width / 2)); width is even."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = places.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def positions_2d(rows: int, columns: int, width: int) -> Tensor:
    """Return [rows · columns, width], the first half from the column, the second from the row; width is divisible by 4."""
    place = torch.arange(rows * columns)
    row, column = place // columns, place % columns
    return torch.cat([positions_1d(column, width // 2), positions_1d(row, width // 2)], dim=1)
