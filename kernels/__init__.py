"""Triton kernels, installed as ``mla_fast.kernels``: the CUDA side of operators that ``mla_fast.ops`` declares.

They import triton and torch, nothing of ours. With TRITON_INTERPRET=1, set before this is imported, they run on CPU tensors.
"""

from . import launch
from .fusion import entropy_fusion, entropy_fusion_backward
from .head_step import head_check_, head_restore_
from .rls import rls_fold_, rls_project_, rls_step_
from .softmax import softmax_delta_, softmax_sums
from .window import window_project, window_step_

__all__ = [
    "entropy_fusion",
    "entropy_fusion_backward",
    "head_check_",
    "head_restore_",
    "launch",
    "rls_fold_",
    "rls_project_",
    "rls_step_",
    "softmax_delta_",
    "softmax_sums",
    "window_project",
    "window_step_",
]
