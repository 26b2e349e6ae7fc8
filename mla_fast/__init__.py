"""MLA (alternating unimodal adaptation, CVPR 2024) as fused kernels under a drop-in PyTorch optimizer."""

from mla_fast import reference
from mla_fast.fusion import Fused, entropy_fusion
from mla_fast.ops import rls_project_, window_project
from mla_fast.optimizer import MLAOptimizer

__all__ = ["Fused", "MLAOptimizer", "entropy_fusion", "reference", "rls_project_", "window_project"]
