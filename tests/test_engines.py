"""Training engines that take the optimizer into their own hands, where they are installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import deepspeed, torch, torch.nn.functional as F
from helpers import ALTERNATION, CLASSES, make_model, make_steps, train, wrap

stage, model, plain = int({stage}), make_model(), make_model()
optimizer, its_own = wrap(model, process_group=None), wrap(plain, process_group=None)
config = {{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 7, "zero_optimization": {{"stage": stage}},
          "zero_allow_untested_optimizer": True}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
steps = make_steps(9)
for modality, x, y in steps:
    optimizer.modality = modality
    engine.backward(F.cross_entropy(engine({{modality: x}})[modality], y))
    for name, encoder in model.encoders.items():
        if name != modality:
            encoder.zero_grad()  # DeepSpeed puts zeros where there is no gradient
    engine.step()
train(plain, its_own, steps)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
assert optimizer.diagnostics()["layers"]["head"]["steps"] == 9
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")
@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed(stage):
    """Stage 0 in float32 steps the parameters themselves; from stage 1 on it steps copies, which is refused."""
    rendezvous = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(29610 + stage),
    }
    environment = os.environ | rendezvous | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT.format(stage=stage)], env=environment, capture_output=True, text=True)
    if stage == 0:
        assert ran.returncode == 0, ran.stderr[-2000:]
    else:
        assert "RuntimeError: head: expected the weight of head among the parameters that the optimizer steps" in ran.stderr
