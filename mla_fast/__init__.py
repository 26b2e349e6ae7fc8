"""MLA (alternating unimodal adaptation, CVPR 2024) as fused kernels under a drop-in PyTorch optimizer."""

from mla_fast import callbacks, data, encoders, reference
from mla_fast.checkpoint import CheckpointError
from mla_fast.distributed import distribute
from mla_fast.graph import GraphedStep
from mla_fast.interaction import Interaction
from mla_fast.model import MultimodalModel
from mla_fast.ops import linear_cross_entropy, rls_project_, window_project
from mla_fast.ops.dispatch import DispatchPlan, dispatch
from mla_fast.ops.fusion import Fused, entropy_fusion
from mla_fast.optimizer import MLAOptimizer
from mla_fast.step import alternating_step
from mla_fast.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DispatchPlan",
    "Fused",
    "GraphedStep",
    "Interaction",
    "MLAOptimizer",
    "MultimodalModel",
    "Trainer",
    "alternating_step",
    "callbacks",
    "data",
    "dispatch",
    "distribute",
    "encoders",
    "entropy_fusion",
    "reference",
    "linear_cross_entropy",
    "rls_project_",
    "window_project",
]
