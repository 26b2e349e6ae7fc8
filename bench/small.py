"""One small case of each kernel, for a memory checker to watch: ``compute-sanitizer python -m bench.small``."""

import torch

import mla_fast as mla
from mla_fast import ops


def main() -> None:
    with torch.device("cuda"):
        alpha = torch.tensor(1.0, dtype=torch.float64)
        for s, C, R in ((33, 6, 1), (65, 130, 1), (33, 6, 2)):
            P, pending, slot = torch.eye(s), torch.zeros(R, s), torch.zeros(2, dtype=torch.int32)
            for _ in range(R + 2):
                ops.rls_step("triton", P, torch.rand(s), torch.randn(C, s), alpha, pending, slot)
            ops.rls_step("triton", P, torch.rand(s), torch.randn(C, s), alpha, pending, slot, torch.ones(1))
            ops.rls_fold("triton", P, pending, slot)
            mla.rls_project_(P, torch.rand(s), torch.randn(C, s).bfloat16(), alpha)
        for K, s in ((3, 33), (9, 33), (3, 2100)):
            means = torch.rand(K, s)
            gram = ops.window_gram("triton", means)
            ops.window_step_("triton", means, gram, 1, torch.rand(s), torch.randn(6, s), alpha)
        for C in (6, 9001):
            ops.linear_cross_entropy(torch.randn(5, 33), torch.arange(5), torch.randn(C, 33), torch.randn(C), 5)
        for shape in ((3, 5, 7), (2, 3, 9001)):
            logits = torch.randn(shape, requires_grad=True)
            present = torch.rand(*shape[:2]).T > 0.3
            mla.entropy_fusion(logits, present, backend="triton").logits.sum().backward()
            plan = mla.dispatch(present)
            packed = torch.randn(sum(plan.counts), shape[2], requires_grad=True)
            plan.fuse(packed).logits.sum().backward()
            plan.segment_mean(packed)
            for padded in (False, True):
                plan = mla.dispatch(present, padded=padded)
                rows, means = plan.pack_features(list(logits))
                sum(t.sum() for t in (*rows, *means, *plan.unpack(rows))).backward()
    torch.cuda.synchronize()
    print("each kernel ran")


if __name__ == "__main__":
    main()
