"""The operators, one to a file, each from top to bottom: schema, fake, autograd, checks, choice of backend, public function."""

from mla_fast.ops.backend import (
    BACKENDS,
    INTERPRETED,
    MISSING,
    BackendError,
    alpha_tensor,
    available,
    check_alpha,
    check_choice,
    resolve,
)
from mla_fast.ops.cross_entropy import head_gradients
from mla_fast.ops.head_step import head_check_, head_restore_
from mla_fast.ops.large_head import Terms, gradients, is_large, linear_cross_entropy, loss_of, terms_of
from mla_fast.ops.rls import ORDERS, identity, pending_rows, rls_fold, rls_project_, rls_step, rls_step_, square_sum
from mla_fast.ops.window import window_gram, window_project, window_step_

__all__ = [
    "BACKENDS", "INTERPRETED", "MISSING", "BackendError", "alpha_tensor", "available", "check_alpha", "check_choice", "resolve",
    "Terms", "gradients", "head_gradients", "is_large", "linear_cross_entropy", "loss_of", "terms_of",
    "head_check_", "head_restore_",
    "ORDERS", "identity", "pending_rows", "rls_fold", "rls_project_", "rls_step", "rls_step_", "square_sum",
    "window_gram", "window_project", "window_step_",
]  # fmt: skip
