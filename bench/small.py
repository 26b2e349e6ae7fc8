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
            ops.rls_fold("triton", P, pending, slot)
        ops.window_step_("triton", torch.rand(3, 33), 1, torch.rand(33), torch.randn(6, 33), alpha)
        for shape in ((3, 5, 7), (2, 3, 9001)):
            logits = torch.randn(shape, requires_grad=True)
            present = torch.rand(shape[1], shape[0]) > 0.3
            mla.entropy_fusion(logits, present, backend="triton").logits.sum().backward()
    torch.cuda.synchronize()
    print("each kernel ran")


if __name__ == "__main__":
    main()
